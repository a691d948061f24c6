"""The search: nothing that runs is missed, what cannot run is refused with the nearest that can."""

from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moestro.cluster.topology import changed, read_cluster
from moestro.core.errors import PlanError
from moestro.plan.layout import SCHEDULES, Layout, text_of
from moestro.plan.memory import memory
from moestro.plan.planfile import stage_sizes
from moestro.plan.profile import load_profile
from moestro.plan.search import Question, candidates, case_of, search
from moestro.plan.shape import read_model
from moestro.plan.stacks import find_stack
from moestro.plan.step import step_time


def specs(kind: str, name: str) -> Path:
    return Path(str(files("moestro").joinpath("specs", kind, f"{name}.toml")))


def question(model: str = "mixtral-8x7b", cluster: str = "h100", devices: int = 32, **more: object) -> Question:
    asked = {"sequences": 128, "length": 4096, **more}
    return Question(
        shape=read_model(specs("models", model)),
        cluster=read_cluster(specs("clusters", cluster)),
        stack=find_stack(""),
        profile=load_profile(),
        devices=devices,
        **asked,  # type: ignore[arg-type]
    )


def test_the_best_fits_and_is_the_fastest_of_those_shown() -> None:
    found = search(question())
    seconds = [float(step.total_s) for step in found.steps]
    assert seconds == sorted(seconds)
    assert all(float(one.total_gib) < 80 for one in found.memories)
    assert found.fitting <= found.considered


def test_no_layout_of_a_plain_loop_is_faster() -> None:
    """Every combination of degrees, one by one, against the search."""
    asked = question(devices=16, sequences=64)
    best = float(search(asked).steps[0].total_s)
    room = asked.cluster.device.memory_gib - asked.profile.memory.runtime_gib
    tried = []
    for tp, pp, ep, micro, zero in product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4), (1, 3)):
        data = 16 // (tp * pp)
        if tp * pp * data != 16 or 64 % (data * micro) or (16 // pp) % ep or (zero == 3 and pp > 1):
            continue
        for schedule, full in product((0, 2), (0.0, 1.0)):
            if pp == 1 and schedule:
                continue
            layout = Layout(
                devices=16,
                tp=tp,
                pp=pp,
                ep=ep,
                micro_batch=micro,
                zero=zero,
                sequences=64,
                by_cost=1.0,
                schedule=schedule,
                full=full,
            )
            case = case_of(asked, layout)
            if float(memory(case, asked.profile.memory).total_gib) <= room:
                tried.append(float(step_time(case, asked.profile.constants).total_s))
    assert len(tried) > 50
    assert best <= min(tried) * (1 + 1e-9)


def test_candidates_can_all_run() -> None:
    found = candidates(question())
    data = found.devices / (found.tp * found.pp * found.cp)
    batches = found.sequences / (data * found.micro_batch)
    assert np.allclose(data, np.round(data))
    assert np.allclose(batches, np.round(batches))
    assert ((32 / found.pp) % (found.ep * found.etp) == 0).all()
    interleaved = found.schedule == SCHEDULES.index("interleaved")
    assert (batches[interleaved] % found.pp[interleaved] == 0).all()


def test_nothing_is_done_again_that_the_model_lacks() -> None:
    sparse, dense = candidates(question()), candidates(question("llama3-8b"))
    assert not np.any(sparse.again_up)
    assert not np.any(sparse.again_dense)
    assert np.any(sparse.again_experts)
    assert not np.any(dense.again_experts)
    assert np.any(candidates(question("deepseek-v3", devices=512, sequences=512)).again_up)


def test_a_faster_network_is_never_slower() -> None:
    asked = question(devices=64)
    faster = replace(asked, cluster=changed(asked.cluster, ["network.spine=4x", "network.rail=4x"]))
    assert float(search(faster).steps[0].total_s) <= float(search(asked).steps[0].total_s)


def test_skewed_experts_slow_the_step() -> None:
    even, skewed = question(load_RE=np.ones((1, 8))), question(load_RE=np.array([[4.0, 1, 1, 1, 1, 1, 1, 1]]))
    assert float(search(skewed).steps[0].total_s) > float(search(even).steps[0].total_s)


def test_settings_fix_a_layout() -> None:
    found = search(question(fixed={"tp": 2, "pp": 4, "schedule": 0}))
    assert all("tp2 pp4" in text_of(layout) and "1f1b" in text_of(layout) for layout in found.layouts)


def test_an_impossible_cut_is_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(PlanError, match=r"no layout with tp=3 is possible .* 32 heads.*nearest that works is tp[24] "):
        search(question(fixed={"tp": 3}))


def test_a_model_that_cannot_fit_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        PlanError, match=r"deepseek-v3 does not fit 8 x H100: the leanest layout, .*; it fits \d+ devices"
    ):
        search(question("deepseek-v3", devices=8))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(PlanError, match="no layout divides"):
        search(question(devices=37, sequences=7))


def test_a_format_the_device_does_not_know_is_refused() -> None:
    with pytest.raises(PlanError, match="precision is nvfp4 but H100 has no fp4"):
        search(question(precision="nvfp4"))


def test_stages_are_cut_by_cost() -> None:
    asked = question("llama3-70b", devices=64, fixed={"pp": 8, "schedule": 0})
    sizes = stage_sizes(asked, search(asked))
    assert sum(sizes) == 80
    assert sizes[-1] < max(sizes)


def test_a_trillion_parameters_on_16384_devices_take_seconds() -> None:
    found = search(question("moe-1t", devices=16384, sequences=16384))
    assert found.seconds < 10
    assert found.seconds / found.considered < 50e-6
