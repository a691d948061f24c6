"""A report of several ranks shows where each one's time goes; of one rank it says nothing of ranks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from moestro.cli.main import app
from moestro.core.events import EventLog
from moestro.train.rank_charts import MOST_BARS, balance_text, rank_charts, table
from moestro.train.recipe import Recipe
from moestro.train.report import open_run, write_report
from moestro.train.report_charts import Run
from moestro.train.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]


def run_of(recipe: Recipe, *second_WP: tuple[float, float, float, float], steps: int = 4) -> Run:
    """Every step alike, but the first, which takes ten times as long; columns are own work, exchange, sums, waiting."""
    folder = RunFolder(recipe.out)
    folder.create(recipe)
    with EventLog(folder.events) as log:
        for step in range(1, steps + 1):
            parts = (np.array(second_WP) * (10 if step == 1 else 1)).T.tolist()
            names = ("compute_s", "exchange_s", "reduction_s", "idle_s")
            log.write("timeline", step, **dict(zip(names, parts, strict=True)))
        log.write("shares", steps, rows=[3, 1])
    return open_run(folder)


FAST, SLOW = (0.2, 0.02, 0.04, 0.14), (0.34, 0.02, 0.04, 0.0)


def test_waiting_is_told_and_for_whom(make_recipe: MakeRecipe) -> None:
    run = run_of(make_recipe(), FAST, SLOW)
    assert balance_text(run).startswith(
        "Ranks wait for each other 17.5% of the time. Rank 1 has most work of its own, 26%"
    )
    head, fast, slow = table(run)
    assert head.split()[:3] == ["ms", "of", "a"]
    assert fast.split()[2:] == ["200.0", "(", "50%)", "20.0", "(", "5%)", "40.0", "(", "10%)", "140.0", "(", "35%)"]
    assert slow.split()[-3:] == ["0.0", "(", "0%)"]


def test_bars_areas_and_a_map_of_waiting(make_recipe: MakeRecipe) -> None:
    charts = rank_charts(run_of(make_recipe(), FAST, SLOW))
    assert [chart.title for chart in charts] == [
        "Where each rank's time goes",
        "Own work, messages and waiting",
        "Which rank waits",
    ]
    assert "rank 0, waiting for others: 140 ms" in charts[0].body
    assert [key.value for key in charts[0].keys] == ["67.5%", "5.0%", "10.0%", "17.5%"]
    waiting = charts[2].readout["values"]
    assert waiting[0][-1] == 35.0
    assert waiting[1][-1] == 0.0


def test_of_many_ranks_some_are_drawn(make_recipe: MakeRecipe) -> None:
    chart = rank_charts(run_of(make_recipe(), *[FAST] * 100))[0]
    assert f"{MOST_BARS} of 100 ranks" in chart.note
    assert chart.body.count("own work:") == MOST_BARS


def test_the_page_and_the_command_have_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("report.prompts=[]")
    run_of(recipe, FAST, SLOW)
    page = write_report(RunFolder(recipe.out)).read_text(encoding="utf-8")
    assert '<section id="ranks">' in page
    assert "from here on ranks get 3 1 rows" in page
    printed = CliRunner().invoke(app, ["report", str(recipe.out)]).stdout
    assert "rank 1" in printed
    assert "Ranks wait for each other" in printed


def test_one_rank_has_no_such_section(make_recipe: MakeRecipe) -> None:
    run = run_of(make_recipe("report.prompts=[]"), steps=0)
    assert rank_charts(run) == []
    assert (balance_text(run), table(run)) == ("", [])
    assert 'id="ranks"' not in write_report(RunFolder(run.recipe.out)).read_text(encoding="utf-8")
