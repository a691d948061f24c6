"""`core.charts`: marks are where arithmetic done by hand puts them, and text from data stays text."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moestro.core.axes import Axis
from moestro.core.bars import Bar, Stack, bars, stacked_bars
from moestro.core.charts import (
    STEPS_ACROSS,
    Chart,
    Key,
    Reference,
    Series,
    Shades,
    chart_script,
    depth_colours,
    figure,
    heat_map,
    line_chart,
    shades_key,
    stacked_area,
    standalone_svg,
    thin,
    timeline,
)
from moestro.core.svg import escaped

TEN = Axis(low=0, high=10)
NASTY = "</text><script>alert('&')</script>"


def elements(chart: Chart, kind: str, tag: str = "path") -> list[ElementTree.Element]:
    """Elements of the chart with a class among theirs."""
    root = ElementTree.fromstring(f"<svg>{chart.body}</svg>")
    return [element for element in root.iter(tag) if kind in element.get("class", "").split()]


def points(path: ElementTree.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", "").replace("h0", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def texts(chart: Chart) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(f"<svg>{chart.body}</svg>").iter("text")]


def lines_of(*series: Series, y: Axis = TEN, references: tuple[Reference, ...] = ()) -> Chart:
    return line_chart("Title", series, x=TEN, y=y, references=references, height=100)


def test_a_point_is_drawn_at_its_share_of_the_plot() -> None:
    chart = lines_of(Series(name="a", x=[0, 5, 10], y=[0, 2.5, 10]))
    (line,) = elements(chart, "line")
    assert points(line) == [(0, 100), (500, 75), (1000, 0)]  # y runs downwards


def test_a_point_on_a_log_axis() -> None:
    chart = lines_of(Series(name="a", x=[0, 10], y=[10, 100]), y=Axis(low=1, high=100, log=True))
    (line,) = elements(chart, "line")
    assert points(line) == [(0, 50), (1000, 0)]


def test_a_missing_value_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    chart = lines_of(Series(name="a", x=[0, 1, 2, 3], y=[5, 5, np.nan, 5]))
    (line,) = elements(chart, "line")
    assert line.get("d") == "M0 50 100 50M300 50h0"
    assert points(elements(chart, "dots")[0]) == [(300, 50)]


def test_dots_mark_every_measured_point() -> None:
    chart = lines_of(Series(name="a", x=[0, 10], y=[5, 5], style="dots"))
    assert points(elements(chart, "dots")[0]) == [(0, 50), (1000, 50)]


def test_a_band_goes_along_its_high_edge_and_back_along_the_low_one() -> None:
    chart = lines_of(Series(name="a", x=[0, 10], y=[5, 5], low=[4, 4], high=[6, 7]))
    (band,) = elements(chart, "band")
    assert points(band) == [(0, 40), (1000, 30), (1000, 60), (0, 60)]


def test_a_reference_line_is_level_with_its_value() -> None:
    chart = lines_of(Series(name="a", x=[0], y=[5]), references=(Reference("gzip", 2),))
    (line,) = elements(chart, "reference", "line")
    assert (line.get("y1"), line.get("y2")) == ("80", "80")
    assert "gzip" in texts(chart)


def test_names_of_near_references_stand_apart() -> None:
    references = (Reference("high", 5.1), Reference("low", 5.0))
    names = elements(lines_of(Series(name="a", x=[0], y=[5]), references=references), "halo", "text")
    places = {name.text: float(name.get("y", "nan")) for name in names}
    assert places["low"] - places["high"] >= 14


def test_stacked_areas_begin_where_the_one_below_ends() -> None:
    parts = [Series(name="a", x=[0, 10], y=[2, 4]), Series(name="b", x=[0, 10], y=[8, 6])]
    below, above = elements(stacked_area("Title", parts, x=TEN, y=TEN, height=100), "area")
    assert points(below) == [(0, 80), (1000, 60), (1000, 100), (0, 100)]
    assert points(above) == [(0, 0), (1000, 0), (1000, 60), (0, 80)]


def test_parts_of_a_bar_lie_behind_each_other() -> None:
    parts = (Key("works", "c0"), Key("waits", "c4"))
    chart = stacked_bars("Title", [Stack(name="a", values=(2, 3), value="60 %")], parts, x=TEN)
    works, waits = elements(chart, "bar", "rect")
    assert (works.get("x"), works.get("width")) == ("0.000%", "20.000%")
    assert (waits.get("x"), waits.get("width")) == ("20.000%", "30.000%")
    assert {"a", "60 %"} < set(texts(chart))
    assert [key.name for key in chart.keys] == ["works", "waits"]


def test_a_bar_starts_at_zero_and_its_interval_spans_its_limits() -> None:
    chart = bars("Title", [Bar(name="a", value=5, low=4, high=8, note="small print")], x=TEN)
    (bar,) = elements(chart, "bar", "rect")
    assert (bar.get("x"), bar.get("width")) == ("0.00%", "50.00%")
    (interval,) = elements(chart, "interval", "line")
    assert (interval.get("x1"), interval.get("x2")) == ("40.00%", "80.00%")
    assert {"a", "small print", "5.00"} <= set(texts(chart))


def cells(chart: Chart) -> dict[tuple[int, int], str]:
    """Colour of every (row, column), unrolled from the paths."""
    found: dict[tuple[int, int], str] = {}
    for path in elements(chart, "cells"):
        for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d", "")):
            for place in range(int(column), int(column) + int(width)):
                assert (int(row), place) not in found
                found[int(row), place] = path.get("style", "").removeprefix("--own:var(--").removesuffix(")")
    return found


def test_every_cell_has_the_colour_of_its_ratio() -> None:
    loads = [[1, 1, 4], [0.25, 2, 0], [100, 0.01, np.nan]]
    chart = heat_map("Title", loads, x=TEN, rows=["a", "b", "c"], shades=Shades(high=4))
    assert cells(chart) == {
        (0, 0): "q8", (0, 1): "q8", (0, 2): "q16",
        (1, 0): "q0", (1, 1): "q12", (1, 2): "none",
        (2, 0): "q16", (2, 1): "q0",  # beyond the scale; and no cell where nothing is known
    }  # fmt: skip


def test_amounts_are_shaded_from_nothing_to_the_highest() -> None:
    level = Shades(kind="amount", high=10).level([0, 5, 10, 99])
    assert level.tolist() == [8, 12, 16, 16]


def test_the_key_of_ratios_names_middle_ends_and_zero() -> None:
    assert [text for text in texts(shades_key(Shades(high=4))) if text] == [
        "0", "\u2264 1/4", "1/2", "1", "2", "\u2265 4",
    ]  # fmt: skip


def test_rows_of_a_heat_map_are_named_as_densely_as_there_is_room() -> None:
    names = [f"e{row}" for row in range(8)]
    for height, shown in ((14, names), (5, ["e0", "e3", "e6"])):
        chart = heat_map("T", np.ones((8, 2)), x=TEN, rows=names, shades=Shades(), row_height=height)
        assert [text for text in texts(chart) if text in names] == shown


def test_a_timeline_has_a_dot_where_something_happened() -> None:
    chart = timeline("Title", {"saved": ("c0", [5, 10]), "resumed": ("c1", [5])}, x=TEN)
    assert [points(dots) for dots in elements(chart, "dots")] == [[(500, 12), (1000, 12)], [(500, 36)]]


def test_thinning_keeps_extremes_and_ends() -> None:
    y_N = np.sin(np.arange(10_000) / 50)
    y_N[5_003], y_N[777] = 9, -9
    x_N, kept_N = thin(np.arange(10_000), y_N, most=600)
    assert len(x_N) <= 600
    assert {0, 777, 5_003, 9_999} <= set(x_N.tolist())
    assert kept_N.tolist() == y_N[x_N].tolist()


def test_many_lines_share_the_points_of_a_chart() -> None:
    series = [Series(name=str(number), x=np.arange(2_000) / 200, y=np.ones(2_000)) for number in range(24)]
    assert sum(len(points(line)) for line in elements(lines_of(*series), "line")) <= 4_800


def test_depth_colours_span_the_ramp() -> None:
    assert depth_colours(1) == ["d0"]
    assert depth_colours(3) == ["d0", "d6", "d11"]
    assert len(set(depth_colours(12))) == 12


@pytest.mark.parametrize("drawn", ["figure", "standalone"])
def test_text_from_data_stays_text(drawn: str) -> None:
    charts = [
        line_chart(NASTY, [Series(name=NASTY, x=[0], y=[1], value=NASTY)] * 2, x=Axis(label=NASTY), y=Axis(unit=NASTY),
                   references=[Reference(NASTY, 1)], note=NASTY),
        bars(NASTY, [Bar(name=NASTY, value=1, note=NASTY)], x=Axis()),
        heat_map(NASTY, [[1]], x=TEN, rows=[NASTY], shades=Shades(label=NASTY), row_label=NASTY),
        timeline(NASTY, {NASTY: ("c0", [1])}, x=TEN),
        stacked_area(NASTY, [Series(name=NASTY, x=[0, 1], y=[1, 1])] * 2, x=TEN, y=TEN),
    ]  # fmt: skip
    text = "".join(map(figure, charts)) if drawn == "figure" else standalone_svg(*charts)
    assert "<script" not in text
    root = ElementTree.fromstring(f"<page>{text}</page>")
    assert not list(root.iter("script"))
    assert NASTY in "".join(root.itertext())


def test_signs_no_document_may_hold_are_replaced() -> None:
    assert escaped("a\x00b\x1b\ud800<\n") == "a\u2400b\u241b?&lt;\n"


def test_a_standalone_file_needs_nothing_else() -> None:
    text = standalone_svg(lines_of(Series(name="a", x=[0, 10], y=[0, 10])), shades_key(Shades()), width=500)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "500"
    assert "var(--c0)" in text
    assert "--c0:" in text
    assert re.findall(r"https?:|url\(|@import|href|src=", text.replace('xmlns="http://www.w3.org/2000/svg"', "")) == []


def test_charts_in_a_standalone_file_do_not_overlap() -> None:
    chart = lines_of(Series(name="a", x=[0, 10], y=[0, 10]), Series(name="b" * 200, x=[0, 10], y=[0, 10]))
    root = ElementTree.fromstring(standalone_svg(chart, chart))
    first, second = (svg for svg in root if svg.tag.endswith("svg"))
    assert float(first.get("y", "nan")) + float(first.get("height", "nan")) + chart.bottom < float(
        second.get("y", "nan")
    )
    assert float(second.get("y", "nan")) + chart.height + chart.bottom <= float(root.get("height", "nan"))


def test_the_script_reads_places_on_the_scale_they_are_drawn_on() -> None:
    assert f"const ACROSS = {STEPS_ACROSS};" in chart_script()


def test_nothing_to_draw_is_an_empty_chart() -> None:
    assert elements(lines_of(), "line") == []
    assert "0" in texts(bars("Title", [], x=Axis()))
