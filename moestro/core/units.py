"""Figures as people read them: counts, bytes and durations. Pure functions, used by progress, tables and reports."""


def count_text(number: float) -> str:
    """1234567 -> '1.23 M'; three significant digits, decimal prefixes."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{_three_digits(number / size)}{suffix}"
    return f"{number:g}"


def bytes_text(number: float) -> str:
    """1536 -> '1.50 KiB'; three significant digits, binary prefixes."""
    for power, suffix in ((4, " TiB"), (3, " GiB"), (2, " MiB"), (1, " KiB")):
        if abs(number) >= 1024**power:
            return f"{_three_digits(number / 1024**power)}{suffix}"
    return f"{number:.0f} B"


def duration_text(seconds: float) -> str:
    """3725 -> '1:02:05'; 65 -> '1:05'; 0.25 -> '0.25 s'."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}" if hours else f"{minutes}:{rest_s:02d}"


def _three_digits(number: float) -> str:
    digits_after_point = 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:.{digits_after_point}f}"
