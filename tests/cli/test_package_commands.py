"""The commands on packages as a user types them: what they leave, what they print, one clear line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents, save_model, tensors

from moestro.cli.main import main

Moestro = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moestro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Moestro:
    """Run a command in this process and in `tmp_path`: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moestro", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def good(result: tuple[int, str, str]) -> str:
    """Standard output of a command that must have gone well."""
    assert result[0] == 0, result[2]
    return result[1]


def test_from_model_to_update_and_back(moestro: Moestro, tmp_path: Path) -> None:
    weights = tensors()
    save_model(tmp_path / "m1", weights)
    weights["experts.w"] += np.float32(1e-5)
    save_model(tmp_path / "m2", weights)
    for number in (1, 2):
        good(moestro("pack", f"m{number}", f"p{number}", "--set", "id=demo", "--set", f"sequence={number}"))
    good(moestro("keygen", "key"))
    good(moestro("sign", "p2", "--key", "key"))
    facts = json.loads(good(moestro("diff", "p1", "p2", "u", "--json")))
    assert facts["update_bytes"] < facts["full_bytes"] / 2
    good(moestro("apply", "p1", "u", "p2b"))
    assert contents(tmp_path / "p2") == contents(tmp_path / "p2b")
    assert "signed by" in good(moestro("verify", "p2b", "--trust", "key.pub"))
    good(moestro("unpack", "p2b", "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "m2")


def test_encrypted_packages(moestro: Moestro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m", tensors())
    good(moestro("keygen", "key", "--kind", "x25519"))
    good(moestro("pack", "m", "p", "--compact"))
    good(moestro("encrypt", "p", "e", "--to", "key.pub"))
    assert "encrypted; give --key" in good(moestro("inspect", "e"))
    assert "6 tensors" in good(moestro("inspect", "e", "--key", "key"))
    assert moestro("unpack", "e", "out")[0] == 1
    good(moestro("decrypt", "e", "d", "--key", "key"))
    assert contents(tmp_path / "d") == contents(tmp_path / "p")
    good(moestro("keygen", "next", "--kind", "x25519"))
    good(moestro("encrypt", "--rewrap", "e", "f", "--key", "key", "--to", "next.pub"))
    good(moestro("decrypt", "f", "d2", "--key", "next"))
    assert contents(tmp_path / "d2") == contents(tmp_path / "p")
    monkeypatch.setenv("MOESTRO_PASSWORD", "secret")
    good(moestro("pack", "m", "w", "--to", "password"))
    good(moestro("unpack", "w", "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "m")


def test_a_signature_for_model_signing(moestro: Moestro, tmp_path: Path) -> None:
    save_model(tmp_path / "m", tensors())
    good(moestro("pack", "m", "p"))
    good(moestro("keygen", "key", "--kind", "p256"))
    assert "model_signing verify key p" in good(moestro("to-model-signing", "p", "p.sig", "--key", "key"))
    assert (tmp_path / "p.sig").stat().st_size


def test_inspect_and_verify_speak_json(moestro: Moestro, tmp_path: Path) -> None:
    save_model(tmp_path / "m", tensors())
    packed = json.loads(good(moestro("pack", "m", "p", "--json")))
    facts = json.loads(good(moestro("inspect", "p", "--tensors", "--json")))
    assert facts["package_root"] == packed["package_root"]
    assert {tensor["name"] for tensor in facts["models"][0]["list"]} == set(tensors())
    assert json.loads(good(moestro("verify", "p", "--json")))["tensors"] == len(tensors())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["pack", "nothing", "q"], "nothing does not exist"),
        (["pack", "m", "p"], "p exists already"),
        (["pack", "m", "q", "--set", "sequence=x"], "it must be a whole number"),
        (["pack", "m", "q", "--set", "id=../up"], "package_id is '../up'"),
        (["pack", "m", "q", "--set", "hash=md5"], "hash is 'md5'"),
        (["pack", "m", "q", "--to", "password"], "MOESTRO_PASSWORD"),
        (["verify", "m"], "m is not a package"),
        (["verify", "nothing"], "nothing"),
        (["verify", "p", "--trust", "m/config.json"], "no PEM key"),
        (["unpack", "p", "q", "--model", "other"], "holds the models p"),
        (["apply", "p", "p", "q"], "no update"),
        (["sign", "p", "--key", "nothing"], "cannot be read"),
        (["keygen", "k", "--kind", "rsa"], "key kind is rsa"),
    ],
)
def test_one_clear_line_for_bad_input(moestro: Moestro, tmp_path: Path, words: list[str], line: str) -> None:
    save_model(tmp_path / "m", tensors())
    good(moestro("pack", "m", "p"))
    status, _, err = moestro(*words)
    assert status == 1
    assert line in err
    assert err.startswith("moestro: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "q").exists()
