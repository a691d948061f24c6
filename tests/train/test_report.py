"""A report shows what a run has, says what it lacks, opens offline, and lets no text of the run become markup."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moestro.core.events import EventLog
from moestro.place.loads import LoadWriter
from moestro.train import report_charts
from moestro.train.loop import go_on, start
from moestro.train.recipe import Recipe
from moestro.train.report import open_run, write_report
from moestro.train.report_charts import Run, load_limits, load_maps, picked, routing_charts, timeline_of
from moestro.train.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """The report as a reader sees it; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.figures: list[str] = []
        self.words: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if dict(attributes).get("role") == "img":
            self.figures.append(dict(attributes).get("aria-label") or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        for tag in self.open:
            self.words[tag] = self.words.get(tag, "") + data


def page_of(folder: RunFolder) -> Page:
    assert write_report(folder) == folder.report
    return Page(folder.report.read_text(encoding="utf-8"))


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter([False] * steps + [True])
    return lambda: next(asked)


EXPERT_FIGURES = ["Experts per token", "Threshold", "Busiest expert", "Router entropy", "Balance loss", "Layer 0"]


def test_a_finished_run_shows_everything(make_recipe: MakeRecipe) -> None:
    outcome = start(make_recipe("report.sample_tokens=8", "report.title=Tiny study"))
    page = page_of(outcome.folder)
    assert page.headings == ["Learning", "Experts", "Speed", "Samples", "Events", "Recipe"]
    wanted = ["Loss", "Learning rate", "Gradient norm", "Layer 1", *EXPERT_FIGURES, "Throughput"]
    wanted += ["Where step time goes", "Experts per token by kind of token", "Checkpoints, resumes and skipped steps"]
    assert set(wanted) < set(page.figures)
    assert page.words["h1"] == "Tiny studyfinished"
    assert outcome.evaluation is not None
    assert f"{outcome.evaluation.bits_per_byte:.3f} bits/byte" in page.words["header"]
    assert f"gzip -9 {outcome.compressors['gzip -9']:.3f}" in page.words["header"]
    assert f"gzip -9: {outcome.compressors['gzip -9']:.2f}" in page.words["svg"]
    assert page.words["mark"] == "def class import "
    assert "mean_experts = 1.35" in page.words["details"]


def test_nothing_is_fetched_from_anywhere(make_recipe: MakeRecipe) -> None:
    folder = start(make_recipe("report.sample_tokens=2")).folder
    page = page_of(folder)
    text = folder.report.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|@import|url\(|//cdn", text) == []
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    assert not {"link", "img", "iframe", "object"} & page.count.keys()
    assert "default-src 'none'" in text


def test_text_of_a_run_stays_text(make_recipe: MakeRecipe) -> None:
    nasty = "</pre><script>alert(1)</script>"
    settings = [
        f"report.title={json.dumps(nasty)}",
        f"report.prompts=[{json.dumps(nasty)}]",
        "report.sample_tokens=200",
    ]
    folder = start(make_recipe(*settings, "report.temperature=5.0")).folder
    with EventLog(folder.events) as log:
        log.write("skipped", 6, loss="nan", grad_norm="nan", batch=f"{nasty} \ud800")
    page = page_of(folder)
    assert page.count["script"] == 1
    assert page.words["h1"].startswith(nasty)
    assert page.words["mark"] == nasty
    assert f"batch: {nasty} ?" in page.words["li"]


def test_a_stopped_run_says_how_far_it_came_and_then_goes_on(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("report.sample_tokens=2")
    folder = start(recipe, stop=stop_after(4)).folder
    page = page_of(folder)
    assert page.words["h1"] == "run4 of 6 steps"
    assert "gzip" not in page.words["main"]
    assert "Loss" in page.figures
    assert go_on(recipe.out).finished
    assert "went on after step 4" in page_of(folder).words["li"]


def test_a_run_without_a_checkpoint_says_that_it_has_no_samples(make_recipe: MakeRecipe) -> None:
    folder = start(make_recipe(), stop=stop_after(0)).folder
    for checkpoint in folder.checkpoints():
        (checkpoint / "manifest.json").unlink()
    assert "There are no samples" in page_of(folder).words["p"]
    for checkpoint in folder.checkpoints():
        checkpoint.rename(folder.root / "elsewhere")
    assert "the run has no checkpoint yet" in page_of(folder).words["p"]


def test_a_run_that_has_not_begun_has_a_report_too(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    folder = RunFolder(recipe.out)
    folder.create(recipe)
    page = page_of(folder)
    assert page.headings == ["Samples", "Recipe"]
    assert "first evaluation at step 3" in page.words["header"]


def test_a_dense_run_has_no_expert_panels(make_recipe: MakeRecipe) -> None:
    settings = ["model.dense_layers=[0,1]", "model.dense_width=16", "report.sample_tokens=2"]
    page = page_of(start(make_recipe(*settings)).folder)
    assert page.headings == ["Learning", "Speed", "Samples", "Events", "Recipe"]
    assert not {*EXPERT_FIGURES, "Experts per token by kind of token"} & set(page.figures)
    assert "experts per token" not in page.words["header"]
    assert "dense feed-forward of width 16" in page.words["header"]


def test_one_step_of_a_recurrent_model_is_enough(make_recipe: MakeRecipe) -> None:
    xl = ["model.attention.kind=transformer_xl", "model.attention.memory_length=16"]
    page = page_of(start(make_recipe("train.steps=1", *xl, "report.sample_tokens=2")).folder)
    assert {"Loss", "Throughput", *EXPERT_FIGURES} < set(page.figures)


def test_a_rule_with_a_fixed_number_of_experts_has_no_chart_of_it(make_recipe: MakeRecipe) -> None:
    folder = start(make_recipe("model.moe.router.rule=top2", "report.prompts=[]")).folder
    page = page_of(folder)
    assert {"Busiest expert", "Layer 0"} < set(page.figures)
    assert not {"Experts per token", "Threshold"} & set(page.figures)
    assert "Samples" not in page.headings


def test_skipped_steps_are_on_the_timeline_with_their_batch(make_recipe: MakeRecipe) -> None:
    folder = start(make_recipe("report.prompts=[]")).folder
    with EventLog(folder.events) as log:
        for step in range(2, 32):
            log.write("skipped", step, loss="nan", grad_norm="inf", batch="tokens 1..9 of poem.txt")
    page = page_of(folder)
    assert "step 2 was not applied: loss nan, gradient norm inf; batch: tokens 1..9 of poem.txt" in page.words["li"]
    assert "and 10 more" in page.words["li"]
    assert page.count["li"] == 20 + 1
    chart = timeline_of(open_run(folder))
    assert chart is not None
    assert "not applied" in chart.body


def made_up(make_recipe: MakeRecipe, layers: int, experts: int, steps: int) -> Run:
    """A run of any size that was never trained: expert e of every layer got e tokens each step."""
    sizes = (f"model.num_layers={layers}", f"model.moe.num_experts={experts}", f"train.steps={steps}")
    recipe = make_recipe(*sizes)
    folder = RunFolder(recipe.out)
    folder.create(recipe)
    writer = LoadWriter(folder.loads, layers, experts)
    with EventLog(folder.events) as log:
        for step in range(1, steps + 1):
            writer.append(step, np.tile(np.arange(experts), (layers, 1, 1)))
            per_layer = {name: [1.0 + step] * layers for name in ("experts", "entropy", "threshold")}
            log.write("step", step, bits_per_byte=2.0, lr=0.1, grad_norm=1.0, tokens_per_s=9.0, **per_layer)
    writer.close()
    return open_run(folder)


def test_colours_of_a_load_map_are_loads_over_their_mean(make_recipe: MakeRecipe) -> None:
    _, first, second = load_maps(made_up(make_recipe, layers=2, experts=3, steps=5))
    assert (first.title, second.title) == ("Layer 0", "Layer 1")
    assert first.readout["values"] == [[0] * 5, [1] * 5, [2] * 5]
    assert first.note == "at the end 0.00 to 2.00, 1 of 3 without tokens"


def test_a_huge_model_is_drawn_in_part_and_says_so(make_recipe: MakeRecipe) -> None:
    run = made_up(make_recipe, layers=58, experts=256, steps=40)
    maps = load_maps(run)[1:]
    assert [maps[0].title, maps[-1].title, len(maps)] == ["Layer 0", "Layer 57", 12]
    assert all(np.size(chart.readout["values"]) <= report_charts.MOST_CELLS / 12 for chart in maps)
    assert maps[0].readout["rows"][-1] == "252\u2013255"
    assert maps[0].readout["values"][0][0] == pytest.approx(np.mean([0, 1, 2, 3]) / 127.5, rel=0.01)
    assert load_limits(run) == "12 of 58 sparse layers are drawn; a row is the mean of 4 neighbouring experts."
    curves = {chart.title: chart for chart in routing_charts(run)}
    assert [key.name for key in curves["Router entropy"].keys][-1] == "mean of all layers"


def test_a_thousand_steps_stay_a_small_file(make_recipe: MakeRecipe) -> None:
    run = made_up(make_recipe, layers=8, experts=16, steps=1000)
    folder = RunFolder(run.recipe.out)
    write_report(folder)
    assert folder.report.stat().st_size < 1_000_000


def test_the_budget_falls_from_its_start_to_its_target(make_recipe: MakeRecipe) -> None:
    run = made_up(make_recipe, layers=1, experts=4, steps=20)
    assert run.recipe.model.moe
    assert run.recipe.model.moe.router.anneal_share == 0.45
    (budget,) = report_charts._target(run)
    wanted = dict(zip(np.asarray(budget.x).tolist(), budget.y, strict=True))  # type: ignore[call-overload]
    assert wanted[1] == pytest.approx(2 - 0.65 / 9)
    assert wanted[8] > wanted[9] == wanted[20] == 1.35


def test_picked_layers_are_spread_and_include_both_ends() -> None:
    assert picked(3, 12) == [0, 1, 2]
    assert picked(9, 3) == [0, 4, 8]


def test_the_log_says_what_a_run_computes_on(make_recipe: MakeRecipe) -> None:
    run = open_run(start(make_recipe("train.steps=1")).folder)
    assert {"hardware", "threads", "torch", "python"} < run.history.beginning["environment"].keys()


def test_reports_do_not_change_the_run(make_recipe: MakeRecipe) -> None:
    folder = start(make_recipe("report.sample_tokens=2")).folder
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    write_report(folder)
    after = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file() and path != folder.report}
    assert after == before


def test_a_report_is_replaced_whole(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = start(make_recipe("report.prompts=[]"), stop=stop_after(2)).folder
    first = write_report(folder).read_text(encoding="utf-8")
    go_on(folder.root)
    assert write_report(folder).read_text(encoding="utf-8") != first
    assert list(folder.root.glob("*.partial")) == []
