"""The commands as a user types them: what they leave, what they print, and one clear line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moestro.cli.main import main
from moestro.core.events import read_events

TINY = """
[data]
heldout_share = 0.2
[model]
num_layers = 2
width = 16
attention = { num_heads = 2 }
moe = { num_experts = 4, expert_width = 16 }
[train]
steps = 6
length = 32
sequences = 4
precision = "fp32"
tensorboard = false
[report]
sample_tokens = 10
"""

Moestro = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moestro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moestro:
    """Run a command in this process: exit status, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moestro", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text("".join(f"line {i} of {number}\n" for i in range(90)))
    (tmp_path / "tiny.toml").write_text(
        f'out = "{tmp_path}/run"\n' + TINY.replace("[data]", f'[data]\nsource = "{corpus}"')
    )
    return tmp_path / "tiny.toml"


def test_train_evaluate_generate_report(moestro: Moestro, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    status, _, said = moestro("train", recipe, f"out={run}", "train.steps=8")
    assert status == 0, said
    assert "step 8/8" in said
    assert "held-out:" in said
    assert "gzip -9" in said
    assert (run / "report.html").stat().st_size > 1000
    assert "steps = 8" in (run / "recipe.toml").read_text()

    status, printed, _ = moestro("evaluate", run, "--json")
    logged = [event for event in read_events(run / "events.jsonl") if event["event"] == "evaluation"][-1]
    assert json.loads(printed)["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-5)
    status, printed, _ = moestro("evaluate", run, "--data", recipe, "--length", 16)
    assert "bits per byte" in printed

    first, again, other = (
        moestro("generate", run, "--prompt", "line ", "--tokens", 12, "--seed", s)[1] for s in (1, 1, 2)
    )
    assert first.startswith("line ")
    assert first == again != other

    (run / "report.html").unlink()
    assert moestro("report", run)[1].strip() == str(run / "report.html")
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=3"], "train.stepz is not a known key; did you mean train.steps?"),
        (["train.steps=0"], "train.steps is 0; it must be 1 or more"),
        (["train.steps=many"], "train.steps is 'many'; it must be a valid integer"),
        (["model.attention.num_heads=3"], "model.attention.num_heads is 3; it must divide model.width = 16"),
        (
            ["model.moe.router.rule=topk", "model.moe.router.k=9"],
            "takes 9 experts per token but model.moe.num_experts is 4",
        ),
        (["data.source=/nowhere"], "data.source '/nowhere' does not exist"),
        (["data.tokenizer=bpe:3"], "data.tokenizer is 'bpe:3'"),
        (["train.device=cuda:77"], "train.device is 'cuda:77', which is not usable here"),
        (["steps"], "'steps' is not a setting; write key=value"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing(
    moestro: Moestro, recipe: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    status, printed, said = moestro("train", recipe, *words)
    assert status == 1
    assert printed == ""
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate", "report", "resume"])
def test_a_folder_that_is_no_run_gets_one_line(moestro: Moestro, tmp_path: Path, command: str) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        status, printed, said = moestro(command, path)
        assert (status, printed) == (1, "")
        assert said.startswith("moestro: ")
        assert len(said.splitlines()) == 1


def test_help_names_every_command(moestro: Moestro) -> None:
    status, printed, _ = moestro("--help")
    assert status == 0
    assert all(name in printed for name in ("train", "resume", "evaluate", "generate", "report", "doctor"))


def test_doctor_says_which_path_is_active(moestro: Moestro) -> None:
    found = json.loads(moestro("doctor", "--json")[1])
    assert found["experts in float32"]["state"] in ("fused", "grouped")
    assert "FLOP/s" in found["matrix products"]["state"]
    assert "torch" in moestro("doctor")[1]


def test_ctrl_c_saves_and_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moestro", "train", str(recipe), "train.steps=100000", "train.checkpoint_every=0"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events = tmp_path / "run" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not [event for event in read_events(events) if event["event"] == "step"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"go on with: moestro resume {tmp_path}/run" in said
    assert "Traceback" not in said
    done = [event for event in read_events(events) if event["event"] == "checkpoint"][-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "model.safetensors").exists()
