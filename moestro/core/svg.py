"""Words and lines of SVG that all charts are made of; see `core/charts.py`."""

import html

from moestro.core.axes import Axis


def escaped(text: str) -> str:
    """Any text as HTML and XML may hold it: signs escaped, control characters shown as their symbols."""
    shown = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {
        127: 0x2421,
        0xFFFE: 0xFFFD,
        0xFFFF: 0xFFFD,
    }
    return html.escape(text.translate(shown).encode(errors="replace").decode())


def x_labels(x: Axis, height: float, ticks: int = 6) -> list[str]:
    """The axis below a plot of this height: line, ticks with their values, title."""
    parts = [f'<line class="axis" x1="0" x2="100%" y1="{px(height)}" y2="{px(height)}"/>']
    for tick in x.ticks(ticks):
        right = 100 * float(x.share(tick))
        parts.append(
            f'<line class="axis" x1="{right:.2f}%" x2="{right:.2f}%" y1="{px(height)}" y2="{px(height + 4)}"/>'
        )
        parts.append(text_at(right, height + 17, x.text(tick, ticks), "middle tick", "%"))
    return [*parts, text_at(100, height + 31, x.title, "end title", "%")]


def down_line(share: float, height: float, kind: str) -> str:
    """A vertical line at a share of the width."""
    return f'<line class="{kind}" x1="{100 * share:.2f}%" x2="{100 * share:.2f}%" y1="0" y2="{px(height)}"/>'


def text_at(x: float, y: float, text: str, kind: str, unit: str = "", shift: float = 0) -> str:
    """Text of a kind (a class of charts.css); x may be in percent, moved by pixels."""
    if not text:
        return ""
    moved = f' dx="{px(shift)}"' if shift else ""
    return f'<text class="{kind}" x="{px(x)}{unit}" y="{px(y)}"{moved}>{escaped(text)}</text>'


def own(colour: str) -> str:
    """The attribute that gives a mark its colour, a variable of charts.css."""
    return f'style="--own:var(--{colour})"'


def px(number: float) -> str:
    """A coordinate: two decimals, without trailing zeros."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number else "0"
