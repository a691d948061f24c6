"""`moestro plan` as a user types it: tables, JSON, plan.toml, predictions, and one clear line for bad input."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moestro.cli.main import main
from moestro.core.events import read_events
from moestro.dist.layout import fit
from moestro.place.loads import LoadWriter
from moestro.train.ranks import check_pipeline
from moestro.train.recipe import load_recipe

ROWS = Path(__file__).parents[2] / "benchmarks" / "published_rows.json"
Run = Callable[..., tuple[int, str, str]]
DEMO = str(Path(__file__).parents[2] / "recipes" / "demo.toml")
SMALL = ("-m", "mixtral-8x7b", "-n", "16", "-b", "64")


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `moestro plan ...` in this process: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moestro", "plan", *arguments])
        status = 0
        try:
            main()
        except SystemExit as done:
            status = int(done.code or 0)
        out, error = capsys.readouterr()
        return status, out, error

    return run


def test_a_plan_is_a_table_with_reasons(plan: Run) -> None:
    status, out, _ = plan(*SMALL, "--explain", "--tokens", "1e12")
    assert status == 0
    for words in (
        "46.7 G weights",
        "p10 - p90",
        "2 loses by",
        "where the time goes",
        "experts",
        "peak",
        "goodput",
        "USD",
    ):
        assert words in out


def test_json_parts_add_up(plan: Run) -> None:
    _, out, _ = plan(*SMALL, "--json")
    best = json.loads(out)["layouts"][0]
    assert sum(best["time_ms"].values()) == pytest.approx(1e3 * best["step_s"], rel=0.01)
    assert sum(best["memory_parts_gib"].values()) == pytest.approx(best["memory_gib"], rel=0.01)
    assert best["p10_s"] < best["step_s"] < best["p90_s"]


def test_what_if_changes_the_answer(plan: Run) -> None:
    seconds = []
    for setting in ("network.host=0.1x", "network.host=1x"):
        _, out, _ = plan(*SMALL, "--json", "--set", setting)
        seconds.append(json.loads(out)["layouts"][0]["step_s"])
    assert seconds[0] > seconds[1]


def test_plan_toml_is_a_recipe(plan: Run, tmp_path: Path) -> None:
    target = tmp_path / "plan.toml"
    status, out, _ = plan(*SMALL, "--tokens", "1e9", "-o", str(target), "--chart", str(tmp_path / "plan.svg"))
    assert status == 0
    assert f"wrote {target}" in out
    recipe = load_recipe(target)
    assert recipe.train.steps == -(-(10**9) // (64 * 4096))
    assert (recipe.train.sequences, recipe.train.precision, recipe.dist.ranks) == (64, "bf16", 0)
    assert fit(recipe.dist, 16).world == 16
    assert "--nnodes 2" in target.read_text()
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    """A model that four ranks on this machine can train in no time, and the cluster they are."""
    model = tmp_path / "tiny.toml"
    model.write_text(
        "[model]\nnum_layers = 4\nwidth = 16\nvocab_size = 260\nattention = { num_heads = 4, num_kv_heads = 2 }\n"
        '[model.moe]\nnum_experts = 4\nexpert_width = 16\nrouter = { rule = "top2" }\n'
    )
    sizes = ("-n", "4", "-b", "16", "-l", "32", "--precision", "fp32")
    return ("-m", str(model), "-c", "cpu", *sizes, "-o", str(tmp_path / "plan.toml"))


LAYOUTS = (
    ("schedule=interleaved", "pp=2", "virtual=2", "ep=2"),
    ("schedule=zero_bubble", "pp=2", "micro_batch=2", "zero=1"),
    ("schedule=1f1b", "pp=4", "micro_batch=4", "recompute=full"),
    ("tp=2", "etp=2", "zero=3"),
    ("tp=2", "ep=4", "etp=1", "zero=1", "micro_batch=4"),
    ("zero=2", "recompute=full"),
)


@pytest.mark.parametrize("asked", LAYOUTS, ids=" ".join)
def test_what_a_layout_says_stands_in_the_plan(
    plan: Run, tmp_path: Path, tiny: tuple[str, ...], asked: tuple[str, ...]
) -> None:
    status, _, error = plan(*tiny, *(word for setting in asked for word in ("--set", f"layout.{setting}")))
    assert status == 0, error
    recipe = load_recipe(tmp_path / "plan.toml")
    wanted = dict(setting.split("=") for setting in asked)
    for name in ("pp", "tp", "ep", "zero", "schedule"):
        assert str(getattr(recipe.dist, name)) == wanted.get(name, str(getattr(recipe.dist, name)))
    assert recipe.dist.stages_per_rank == int(wanted.get("virtual", 1))
    assert recipe.dist.expert_tp == (wanted.get("etp") == "2")
    assert recipe.dist.ranks == 4
    assert recipe.train.recompute == ("all" if "recompute" in wanted else "none")
    layout = fit(recipe.dist, 4)
    if "micro_batch" in wanted:
        assert recipe.train.micro_batches == 16 // (layout.dp * int(wanted["micro_batch"]))
    check_pipeline(recipe, layout, recipe.train.sequences // recipe.train.micro_batches)


@pytest.mark.parametrize("setting", ["cp=2", "schedule=dualpipe", "schedule=zero_bubble_v", "recompute=half"])
def test_a_plan_has_no_layout_that_the_trainer_lacks(plan: Run, tiny: tuple[str, ...], setting: str) -> None:
    status, _, error = plan(*tiny, "--set", f"layout.{setting}")
    assert status == 1
    assert "the nearest that works is" in error
    assert "the trainer" in error


@pytest.mark.slow
@pytest.mark.parametrize("asked", [*LAYOUTS[:3], LAYOUTS[4], ("alone",)], ids=" ".join)
def test_the_trainer_runs_a_plan_as_it_is(
    plan: Run, tmp_path: Path, tiny: tuple[str, ...], asked: tuple[str, ...]
) -> None:
    settings = [word for setting in asked if "=" in setting for word in ("--set", f"layout.{setting}")]
    assert plan(*tiny, *settings)[0] == 0
    (tmp_path / "text.txt").write_text("one two three four\n" * 400)
    here = [f"out={tmp_path}/run", f"data.source={tmp_path}/text.txt", "train.steps=3"]
    command = [sys.executable, "-m", "moestro", "train", str(tmp_path / "plan.toml"), *here]
    command += ["dist.ranks=1"] if asked == ("alone",) else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert len(steps) == 3


def test_a_recipe_keeps_its_tables(plan: Run, tmp_path: Path) -> None:
    target = tmp_path / "plan.toml"
    status, _, error = plan(
        "-m",
        DEMO,
        "-c",
        "cpu",
        "-n",
        "4",
        "-b",
        "16",
        "-l",
        "256",
        "--precision",
        "fp32",
        "--software",
        "moestro",
        "-o",
        str(target),
        "--set",
        "model.vocab_size=4096",
    )
    assert status == 0, error
    before, after = tomllib.loads(Path(DEMO).read_text()), tomllib.loads(target.read_text())
    assert after["optimizer"] == before["optimizer"]
    assert after["model"]["vocab_size"] == 4096
    assert after["train"]["steps"] == before["train"]["steps"]


def test_predictions_of_all_rows(plan: Run, tmp_path: Path) -> None:
    target = tmp_path / "predictions.json"
    status, _, _ = plan("predict", str(ROWS), "-o", str(target))
    assert status == 0
    found = json.loads(target.read_text())
    assert len(found) == 376
    assert all(one["p10_s"] < one["step_s"] < one["p90_s"] and one["memory_gb"] > 0 for one in found.values())


def test_rows_without_measurements_are_answered_the_same(plan: Run, tmp_path: Path) -> None:
    entries = json.loads(ROWS.read_text())["entries"][:12]
    bare = [{key: value for key, value in entry.items() if key not in ("measured", "derived")} for entry in entries]
    answers = []
    for name, table in (("full", entries), ("bare", bare)):
        (tmp_path / name).write_text(json.dumps({"entries": table}))
        answers.append(json.loads(plan("predict", str(tmp_path / name))[1]))
    assert answers[0] == answers[1]


def entry_without(*names: str, **changes: object) -> dict[str, object]:
    """A published dense row without some fields (dotted), and with others changed (table__field)."""
    entry: dict[str, dict[str, object]] = json.loads(ROWS.read_text())["entries"][0]
    for name in names:
        table, _, key = name.rpartition(".")
        (entry[table] if table else entry).pop(key)
    for name, value in changes.items():
        table, _, key = name.rpartition("__")
        (entry[table] if table else entry)[key] = value  # type: ignore[assignment]
    return entry  # type: ignore[return-value]


@pytest.mark.parametrize(
    "entry",
    [
        entry_without("parallelism", "software", "recompute", "features", "precision", "group", "kind"),
        entry_without("model.head_dim", "model.kv_heads", "model.gated", "model.dense_layers", "model.tied"),
        entry_without("hardware.class", "hardware.hbm_gb", "hardware.nvlink_domain", "config_gaps"),
        entry_without(software="SomethingNew 3.1", hardware__gpu="XPU-9", **{"hardware__class": "XPU-9"}),
        entry_without("hardware.inter_gbps", hardware__count=8, parallelism__dp=8),
    ],
    ids=["bare", "few sizes", "few rates", "unknown names", "one host"],
)
def test_a_row_with_fields_missing_is_answered(plan: Run, tmp_path: Path, entry: dict[str, object]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([entry]))
    status, out, error = plan("predict", str(tmp_path / "rows.json"))
    assert status == 0, error
    found = json.loads(out)["megatron-sc21-t1-1.7b"]
    assert 0 < found["p10_s"] < found["step_s"] < found["p90_s"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (entry_without("model.layers"), "row megatron-sc21-t1-1.7b: model.layers is missing"),
        (entry_without("model.ffn"), "model.ffn is missing"),
        (entry_without(model__heads="8"), "model.heads is '8'; it must be a number above 0"),
        (entry_without(model__vocab=float("nan")), "model.vocab is nan"),
        (entry_without(parallelism=[]), "parallelism is []; it must be an object"),
        (entry_without(model__experts=8), "model.top_k is missing"),
        (entry_without("hardware.inter_gbps"), "hardware.inter_gbps is None; 32 devices need it"),
        (entry_without("hardware.hbm_gb", hardware__gpu="XPU-9", **{"hardware__class": "XPU-9"}), "not known; give"),
        (entry_without(precision="int3"), "row megatron-sc21-t1-1.7b: precision is 'int3'"),
        (entry_without("id"), "row 1 has id None"),
        (3, "row 1 is 3"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_field(
    plan: Run, tmp_path: Path, entry: object, words: str
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([entry]))
    status, _, error = plan("predict", str(tmp_path / "rows.json"))
    assert status == 1
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_an_anchor_moves_its_group(plan: Run, tmp_path: Path) -> None:
    name = "megatron-sc21-t1-1.7b"
    plain = json.loads(plan("predict", str(ROWS))[1])
    moved = json.loads(plan("predict", str(ROWS), "--anchor", f"{name}={3 * plain[name]['step_s']}")[1])
    assert moved["megatron-sc21-t1-7.5b"]["step_s"] > 2 * plain["megatron-sc21-t1-7.5b"]["step_s"]
    assert moved["mpt-70b-h100-512-s2048"] == plain["mpt-70b-h100-512-s2048"]


def test_a_runs_load_trace_slows_the_plan(plan: Run, tmp_path: Path) -> None:
    writer = LoadWriter(tmp_path / "loads.trace", 1, 8)
    writer.append(1, np.array([[[7, 1, 1, 1, 1, 1, 1, 1]]]))
    writer.close()
    seconds = []
    for more in ((), ("--loads", str(tmp_path / "loads.trace"))):
        seconds.append(json.loads(plan(*SMALL, "--json", *more)[1])["layouts"][0]["step_s"])
    assert seconds[1] > seconds[0]
    status, _, error = plan("-m", "qwen3-30b-a3b", "--loads", str(tmp_path / "loads.trace"))
    assert status == 1
    assert "loads of 8 experts; the model has 128" in error


def test_simulation_of_a_step_and_of_runs(plan: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    status, out, _ = plan("simulate", *SMALL, "--trace", str(trace), "--tokens", "1e12", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["step_s"] == pytest.approx(found["predicted_step_s"], rel=0.1)
    assert found["wall_days_p10"] < found["wall_days_p90"]
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model is missing"),
        (("-m", "gpt-9"), "gpt-9 is neither a file nor a known name"),
        ((*SMALL, "--set", "network.moon=2x"), "network.moon is not a level"),
        ((*SMALL, "--set", "moon=2"), "--set moon=2 is not known"),
        ((*SMALL, "--set", "layout.tp=many"), "layout.KEY=VALUE"),
        ((*SMALL, "--set", "layout.tp=3"), "the nearest that works is"),
        ((*SMALL, "--precision", "int3"), "precision is 'int3'"),
        ((*SMALL, "--set", "reliability.restart_s=-1"), "reliability.restart_s is -1"),
        (("-m", "mixtral-8x7b", "-n", "0"), "--devices is 0"),
        (("-m", DEMO, "-c", "cpu", "-n", "4"), "model.vocab_size is 0, to be taken from the tokenizer"),
        ((*SMALL, "--precision", "fp8", "-o", "plan.toml"), "--precision is fp8, but a plan.toml is for the trainer"),
        (("predict", "nowhere.json"), "nowhere.json cannot be read"),
        (("predict", str(ROWS), "--anchor", "x"), "--anchor is 'x'"),
        (("predict", str(ROWS), "--anchor", "x=1"), "--anchor names x"),
    ],
)
def test_bad_input_gets_one_line(plan: Run, arguments: tuple[str, ...], words: str) -> None:
    status, _, error = plan(*arguments)
    assert status == 1
    assert words in error
    assert len(error.strip().splitlines()) == 1
