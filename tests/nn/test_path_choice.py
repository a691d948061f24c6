"""The fastest path is measured once, kept, and read again; what is damaged or cannot be measured does no harm."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.specs import MoESpec
from moestro.nn import path_choice
from moestro.nn.experts import Experts
from moestro.nn.path_choice import Measured, measured_path, possible_paths, remember, remembered

X_TD = torch.zeros(8, 16, dtype=torch.bfloat16)
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
TRITONS = import_module("triton").TritonError("does not compile") if find_spec("triton") else None


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experts:
    """Experts, an empty cache, and few tokens that are enough to be measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(path_choice, "FEW", 1)
    monkeypatch.setattr(path_choice, "SETTLED", {})
    monkeypatch.setattr(path_choice, "possible_paths", lambda *_: ["triton", "grouped", "loop"])
    remembered.cache_clear()
    made = Experts(16, MoESpec(num_experts=3, expert_width=16))
    made.initialise(0.1, 0.1)
    return made


def test_the_fastest_is_taken_and_measured_once(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(*_: Any) -> Measured:
        asked.append(1)
        return Measured({"triton": 2.0, "grouped": 1.0})

    monkeypatch.setattr(path_choice, "measure", measure)
    assert [measured_path(X_TD, 2, experts) for _ in range(3)] == ["grouped"] * 3
    remembered.cache_clear()  # another process
    path_choice.SETTLED.clear()
    assert measured_path(X_TD, 2, experts) == "grouped"
    assert len(asked) == 1
    assert measured_path(X_TD, 1, experts) == "grouped"  # another number of slots is another measurement
    assert len(asked) == 2


def test_other_block_sizes_are_another_measurement(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path_choice.key_of(X_TD, 2, experts)
    monkeypatch.setitem(path_choice.CANDIDATES, "down", path_choice.CANDIDATES["down"][1:])
    assert path_choice.key_of(X_TD, 2, experts) != before


def test_few_tokens_are_not_measured(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_choice, "FEW", 9)
    assert measured_path(X_TD, 2, experts) == "triton"
    assert remembered() == {}


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"ms": 3}}'])
def test_a_damaged_file_counts_as_none(experts: Experts, content: str) -> None:
    path_choice.choices_file().parent.mkdir(parents=True)
    path_choice.choices_file().write_text(content)
    assert remembered() == {}
    remember("key", Measured({"loop": 1.0}, {"down": 2}))
    remembered.cache_clear()
    assert remembered() == {"key": Measured({"loop": 1.0}, {"down": 2})}


def test_measuring_leaves_gradients_and_random_numbers_alone(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], Any]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(path_choice, "milliseconds", once)
    before = torch.get_rng_state()
    found = path_choice.measure(X_TD, 2, experts, ["grouped", "loop"])
    assert found.ms == {"grouped": 1.0, "loop": 1.0}
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in experts.parameters())


@pytest.mark.parametrize("error", [RuntimeError("no such operator"), pytest.param(TRITONS, marks=NEEDS_TRITON)])
def test_a_path_that_fails_is_left_out(error: Exception, experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Callable[[], Any]) -> float:
        raise error

    monkeypatch.setattr(path_choice, "milliseconds", fails)
    found = path_choice.measure(X_TD, 2, experts, ["grouped"])
    assert found.best(["triton", "grouped"]) == "triton"


def test_8_bits_are_possible_where_asked_for_and_widths_are_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_choice.gpu, "why_not", lambda *_: "")
    for width, hidden, asked, possible in ((128, 256, True, True), (128, 256, False, False), (128, 192, True, False)):
        made = Experts(width, MoESpec(num_experts=2, expert_width=hidden))
        paths = possible_paths(torch.zeros(1, width, dtype=torch.bfloat16), made, asked)
        assert ("fp8" in paths) is possible
        assert paths[0] == "triton"
