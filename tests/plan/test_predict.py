"""Prediction of rows: parts add up, bands mean something, anchors pull, and published rows are met."""

import json
from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import PlanError
from moestro.plan.fit import fit, left_out, profile_of, widening
from moestro.plan.memory import memory
from moestro.plan.profile import anchored, load_profile, part_shares, predict, save_profile
from moestro.plan.published import Row, read_rows, together
from moestro.plan.step import step_time

ROWS = Path(__file__).parents[2] / "benchmarks" / "published_rows.json"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for row in read_rows(ROWS) if row.step_s]


def test_parts_of_a_step_add_up_to_it(rows: list[Row]) -> None:
    step = step_time(together(rows), load_profile().constants)
    assert sum(step.parts.values()) == pytest.approx(step.total_s)
    assert (np.asarray(step.parts["bubble"]) >= 0).all()


def test_one_row_and_a_column_of_rows_say_the_same(rows: list[Row]) -> None:
    profile = load_profile()
    column = predict(rows, profile)
    for place in (0, 100, 200, len(rows) - 1):
        alone = predict([rows[place]], profile)
        assert alone.step_s[0] == pytest.approx(column.step_s[place])
        assert alone.memory_gib[0] == pytest.approx(column.memory_gib[place])


def test_the_profile_in_the_package_meets_what_was_measured(rows: list[Row]) -> None:
    found = predict(rows, load_profile())
    error = np.abs(found.step_s / [row.step_s for row in rows] - 1)
    assert np.median(error) < 0.06
    assert np.isfinite(found.step_s).all()


def test_every_layout_that_ran_is_called_possible(rows: list[Row]) -> None:
    found = predict(rows, load_profile())
    refused = {row.id for row, fits in zip(rows, found.fits, strict=True) if not fits}
    assert refused <= {"megatron-sc21-t2-zero3-530b-640", "bridge-26.02.01-llama3-70b-gb300-nvfp4-64-g256-tp1pp1ep1"}


def test_the_band_holds_the_median_and_is_wider_for_what_is_unknown(rows: list[Row]) -> None:
    profile = load_profile()
    known = predict([rows[0]], profile)
    assert known.p10_s[0] < known.step_s[0] < known.p90_s[0]
    entry = json.loads(ROWS.read_text())["entries"][0]
    from moestro.plan.published import row_of

    unknown = predict([row_of({**entry, "software": "never heard of"})], profile)
    assert unknown.p90_s[0] / unknown.p10_s[0] > known.p90_s[0] / known.p10_s[0]


def test_an_anchor_pulls_its_group_and_narrows_it(rows: list[Row]) -> None:
    profile, group = load_profile(), rows[:4]
    before = predict(group, profile)
    after = predict(group, profile, {group[0].id: 2 * float(before.step_s[0])})
    assert (after.step_s > 1.5 * before.step_s).all()
    assert (after.step_s < 2.01 * before.step_s).all()
    narrowed = (after.p90_s / after.p10_s) / (before.p90_s / before.p10_s)
    assert (narrowed < 1 + 1e-9).all()
    assert (narrowed[:2] < 0.96).all()
    with pytest.raises(PlanError, match="names nobody"):
        predict(group, profile, {"nobody": 1.0})


def test_an_anchor_teaches_most_to_rows_of_the_same_parts(rows: list[Row]) -> None:
    group, flat = rows[:3], np.zeros(3)
    share_RP = np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]])
    log_s, spread = anchored(group, flat, np.full(3, 0.1), share_RP, {group[0].id: float(np.exp(0.2))})
    assert log_s[0] == pytest.approx(log_s[1])
    assert 0 < log_s[2] < log_s[1] < 0.2
    assert spread[1] < spread[2] <= 0.1


def test_shares_of_parts_make_up_a_step(rows: list[Row]) -> None:
    case, profile = together(rows), load_profile()
    share_RP = part_shares(step_time(case, profile.constants), len(rows))
    assert (share_RP.sum(axis=1) <= 1 + 1e-9).all()
    assert (share_RP.sum(axis=1) > 0.7).all()


@pytest.mark.slow
def test_reports_left_out_are_predicted_within_the_aims(rows: list[Row]) -> None:
    found = left_out(rows, fit(rows))
    for kind, most in (("dense", 0.065), ("moe", 0.15)):
        groups: dict[str, list[float]] = {}
        for row in rows:
            if row.kind == kind:
                groups.setdefault(row.group, []).append(abs(found.step_s[row.id] / row.step_s - 1))
        assert np.median([np.median(errors) for errors in groups.values()]) < most
    assert all(0.5 < widen < 3 for widen in widening(rows, found).values())


def test_a_fit_recovers_a_software_that_is_slower_than_others(rows: list[Row]) -> None:
    some = rows[::6]
    from dataclasses import replace

    slowed = [replace(row, step_s=1.2 * row.step_s) if "nemo" in row.software else row for row in some]
    plain, other = fit(some), fit(slowed)
    gain = [dict(zip(found.names_E, found.effect_E, strict=True))["software nemo-25.02"] for found in (plain, other)]
    assert gain[1] > gain[0] + 0.01


def test_a_profile_survives_its_file(rows: list[Row], tmp_path: Path) -> None:
    profile = profile_of(fit(rows[::8]), "test", {"dense": 1.0, "moe": 1.0}, "some rows")
    save_profile(profile, tmp_path / "profile.json")
    again = predict(rows[:5], load_profile(tmp_path / "profile.json"))
    assert again.step_s == pytest.approx(predict(rows[:5], profile).step_s, rel=1e-3)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(PlanError, match="cannot be read"):
        load_profile(tmp_path / "broken.json")


def test_memory_of_all_rows_is_finite(rows: list[Row]) -> None:
    assert np.isfinite(np.asarray(memory(together(rows)).total_gib)).all()
