"""Figures as people read them."""

from __future__ import annotations

import math
import re


def size(count: float) -> str:
    """Bytes: ``1.2 MiB``.

    Example:
        >>> size(1300), size(5 << 20)
        ('1.27 KiB', '5 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def amount(count: float) -> str:
    """Learned values, as the papers print them: ``3.48M``.

    Example:
        >>> amount(3_477_792), amount(869_444), amount(512)
        ('3.48M', '869K', '512')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def quality(value: float | None) -> str:
    """Four decimals, as the papers print them; a dash where it is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def spread(value: float | None) -> str:
    """A standard deviation without its leading zero: ``±.0004``."""
    return "" if value is None or not math.isfinite(value) else f"±{value:.4f}".replace("±0.", "±.")


def signed(value: float) -> str:
    """A difference with a true minus sign, ``−.0012``; ``0`` where four decimals are all zero."""
    text = f"{value:+.4f}".replace("-", "−")
    return re.sub(r"^([+−])0\.", r"\1.", text) if float(f"{value:.4f}") else "0"


def share(value: float | None) -> str:
    """A percentage to one decimal: ``93.7 %``."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def plain(value: object) -> str:
    """A setting: numbers to four digits, lists with commas."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return str(value)


def microseconds(value: float) -> str:
    """A latency: ``85 µs``, ``1.3 ms``."""
    return f"{value / 1000:.3g} ms" if value >= 1000 else f"{value:.3g} µs"


def milliseconds(value: float) -> str:
    """A time of a phase: ``0.041 ms``, ``12.3 s``, ``1.4 h``."""
    for limit, divisor, unit in ((1000, 1, "ms"), (120_000, 1000, "s"), (7_200_000, 60_000, "min")):
        if value < limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value / 3_600_000:.3g} h"


def budget(text: str) -> str:
    """What a budget asks for, in words.

    Example:
        >>> budget("sparsity=0.95"), budget("25%"), budget("4MiB"), budget("dense")
        ('95 % sparse', '25 % of bytes', 'file of 4 MiB', 'uncompressed')
    """
    if (found := sparsity(text)) is not None:
        return f"{100 * found:.6g} % sparse"
    if match := re.fullmatch(r"\s*([\d.eE+-]+)\s*%\s*", text):
        return f"{float(match[1]):.6g} % of bytes"
    if text == "dense":
        return "uncompressed"
    return "file of " + re.sub(r"(?<=\d)\s*(?=[A-Za-z])", " ", text.strip())


def sparsity(text: str) -> float | None:
    """The sparsity that a budget asks for, if it is one."""
    match = re.fullmatch(r"\s*sparsity\s*=\s*([\d.eE+-]+)\s*", text)
    return float(match[1]) if match else None
