"""`moestro import` and `moestro export`: what they print, and that errors are one line."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moestro.cli.main import app, main
from moestro.core.specs import ModelSpec
from moestro.core.tokens import ByteTokenizer
from moestro.nn.decoder import Decoder
from moestro.train.checkpoint import save_model


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny Llama."""
    save_model(
        tmp_path / "run",
        Decoder(ModelSpec(num_layers=1, width=32, vocab_size=257, dense_width=24)).initialise(),
        ByteTokenizer(),
    )
    run("export", tmp_path / "run", tmp_path / "dense", "--dtype", "bf16", "--context", "64")
    return tmp_path / "dense"


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_import_says_what_was_read_and_export_what_was_written(dense: Path, tmp_path: Path) -> None:
    said = run("import", dense, tmp_path / "ours")
    assert "tensors read         11 of 11 (BF16) from 1 file\nparameters filled    11 of 11\n" in said
    assert said.endswith(f"model: {tmp_path / 'ours'}; try it with: moestro generate {tmp_path / 'ours'}\n")
    said = run("export", tmp_path / "ours", tmp_path / "out")
    assert said.startswith("llama: 11 tensors in bf16")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()


def test_a_dense_model_is_upcycled_with_a_recipe_to_go_on(dense: Path, tmp_path: Path) -> None:
    options = ("--experts", 4, "--k", 2, "--rule", "gap", "--recipe", tmp_path / "on.toml")
    said = run("import", dense, tmp_path / "ours", *options)
    assert "llama: 1 layers, 4 experts" in said
    assert "drawn at random      1 routers" in said
    assert f"train on with: moestro train {tmp_path / 'on.toml'}" in said
    assert f'init = "{tmp_path / "ours"}"' in (tmp_path / "on.toml").read_text()


def test_an_error_is_one_line(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("import", dense, tmp_path / "ours", "--experts", 4, "--rule", "gap")
    monkeypatch.setattr(sys, "argv", ["moestro", "export", str(tmp_path / "ours"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("moestro: mixtral cannot hold this model: model.moe.router.rule is 'gap'")
    assert said.count("\n") == 1
