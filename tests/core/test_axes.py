"""`core.axes`: places, ticks and labels one can check in the head."""

import math

import pytest

from moestro.core.axes import Axis, number_text, round_step


def test_a_value_lies_where_its_share_of_the_axis_is() -> None:
    axis = Axis(low=10, high=30).fitted([])
    assert axis.share([10, 15, 30]).tolist() == [0, 0.25, 1]


def test_on_a_log_axis_equal_factors_are_equal_ways() -> None:
    axis = Axis(low=1, high=100, log=True).fitted([])
    assert axis.share(10) == pytest.approx(0.5)
    assert math.isnan(axis.share(0))


def test_limits_give_way_to_data_so_that_nothing_is_cut_off() -> None:
    assert Axis(low=0, high=5).fitted([-1, 7]).limits == (-1, 7)


def test_room_is_left_beyond_data_but_not_beyond_limits() -> None:
    assert Axis().fitted([10, 20], room=0.1).limits == (9, 21)
    assert Axis(low=10).fitted([10, 20], room=0.1).limits == (10, 21)


def test_room_does_not_take_an_axis_below_zero() -> None:
    assert Axis().fitted([0, 10], room=0.1).limits == (0, 11)
    assert Axis().fitted([-10, 10], room=0.1).limits == (-12, 12)


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [math.nan], [2.0, 2.0 + 1e-12], [math.inf, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_always_has_a_length_and_ticks(values: list[float], log: bool) -> None:
    axis = Axis(log=log).fitted(values)
    low, high = axis.limits
    assert low < high
    assert len(axis.ticks()) >= 2
    assert all(low <= tick <= high for tick in axis.ticks())


@pytest.mark.parametrize(("least", "step"), [(0.3, 0.5), (0.5, 0.5), (6, 10), (1.01, 2), (200, 200)])
def test_steps_are_one_two_or_five(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)


def test_ticks_are_round_and_have_the_digits_they_need() -> None:
    axis = Axis(low=1.9, high=3.7).fitted([])
    assert [axis.text(tick) for tick in axis.ticks()] == ["2.0", "2.5", "3.0", "3.5"]


def test_a_wide_log_axis_has_decades_and_a_narrow_one_more() -> None:
    assert Axis(low=1, high=1e4, log=True).fitted([]).ticks() == [1, 10, 100, 1000, 10000]
    assert Axis(low=1.8, high=9, log=True).fitted([]).ticks() == [2, 3, 5, 7]


def test_log_ticks_are_labelled_without_zeros() -> None:
    axis = Axis(low=1e-5, high=1e6, log=True).fitted([])
    assert [axis.text(value) for value in (1e-5, 0.3, 1.5, 1000, 1e6)] == ["1e-5", "0.3", "1.5", "1,000", "1 M"]


def test_a_whole_axis_has_no_half_steps() -> None:
    assert Axis(low=0, high=1, whole=True).fitted([]).ticks() == [0, 1]


@pytest.mark.parametrize(
    ("value", "resolution", "text"),
    [
        (0, 0, "0"),
        (2.443, 0, "2.44"),
        (2.443, 1e-3, "2.443"),
        (12345, 0, "12,345"),
        (0.0005, 5e-4, "0.0005"),
        (1.5e-5, 5e-6, "1.5e-5"),
        (2.5e6, 0, "2.50 M"),
        (-3.25, 0.1, "-3.2"),
        (math.nan, 0, "not finite"),
    ],
)
def test_numbers_read_well(value: float, resolution: float, text: str) -> None:
    assert number_text(value, resolution) == text


def test_an_axis_is_named_with_its_unit() -> None:
    assert [Axis(label="time", unit="s").title, Axis(unit="s").title, Axis(label="step").title] == [
        "time (s)",
        "s",
        "step",
    ]
