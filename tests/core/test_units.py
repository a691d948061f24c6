"""`core.units`: figures as people read them."""

import pytest

from moestro.core.units import bytes_text, count_text, duration_text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (11_300_000, "11.3 M"), (671e9, "671 G"), (1e12, "1.00 T")],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize(("number", "text"), [(512, "512 B"), (1536, "1.50 KiB"), (3 * 1024**3, "3.00 GiB")])
def test_bytes_are_binary(number: float, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.25 s"), (65, "1:05"), (3725, "1:02:05"), (59.7, "1:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
