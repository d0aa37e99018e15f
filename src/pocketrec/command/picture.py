"""AUC against table bytes: one picture as PNG, and one self-contained page that reads well on a phone.

Both are pure functions of a :class:`Chart`: same chart, same bytes. Nothing is fetched when the page is opened.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pocketrec.report.formats import size

_COLORS = ("#1f4e9c", "#d9730d", "#2a8c6a", "#8a3ffc", "#b3261e")
_MARKS = ("o", "s", "^", "D", "v")
_SIZES = (7.5, 7.0, 8.0, 6.5, 8.0)
_INK, _FAINT, _GRID = "#1c2430", "#6b7684", "#e3e7ec"


@dataclass(frozen=True)
class MeasuredFile:
    """One artifact, measured from its file; ``auc`` is ``None`` where the budget is out of the method's reach."""

    budget: str
    table_bytes: int
    file_bytes: int
    values: int
    auc: float | None
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn: one curve per method, the dense model, and the ceiling that no model can pass."""

    title: str
    subtitle: str
    curves: dict[str, tuple[MeasuredFile, ...]]
    dense: MeasuredFile
    ceiling: float
    command: str


def png(chart: Chart) -> bytes:
    """The picture, 1,680 x 1,050 pixels."""
    return _rendered(chart, "png")


def page(chart: Chart) -> str:
    """The page: headline, picture, table, and the command that made them."""
    svg = re.sub(r"^.*?(?=<svg)", "", _rendered(chart, "svg").decode(), flags=re.S)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img" aria-label="AUC against table bytes"', svg, count=1)
    rows = [_row("dense", chart.dense, chart.dense)]
    for name, points in chart.curves.items():
        rows.append(f'<tr><th colspan="5">{escape(name)}</th></tr>')
        rows += [_row(point.budget, point, chart.dense) for point in points]
    return _PAGE.format(
        title=escape(chart.title),
        subtitle=escape(chart.subtitle),
        figure=svg,
        rows="\n".join(rows),
        ceiling=f"{chart.ceiling:.4f}",
        command=escape(chart.command),
    )


def _row(name: str, point: MeasuredFile, dense: MeasuredFile) -> str:
    if point.auc is None or dense.auc is None:
        return f'<tr><td>{escape(name)}</td><td colspan="4">{escape(point.note)}</td></tr>'
    lost = "" if point is dense else f"{point.auc - dense.auc:+.4f}"
    cells = [name, f"{point.auc:.4f}", lost, size(point.table_bytes), size(point.file_bytes)]
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _rendered(chart: Chart, kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "svg.hashsalt": "pocketrec",
        "svg.fonttype": "path",
    }
    with matplotlib.rc_context(style):
        shape = (8, 5) if kind == "png" else (5.8, 4.6)
        margins = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12) if kind == "png" else ConstrainedLayoutEngine()
        figure = Figure(figsize=shape, dpi=210, layout=margins, facecolor="white")
        axes = figure.add_subplot()
        _draw(axes, chart)
        if kind == "png":
            axes.set_title(chart.title, loc="left", fontsize=15, fontweight="bold", color=_INK, pad=32)
            axes.annotate(chart.subtitle, (0, 1), xytext=(0, 14), xycoords="axes fraction", fontsize=10.5, color=_FAINT,
                          textcoords="offset points").set_in_layout(False)  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, chart: Chart) -> None:
    """One curve a method, the first one on top; dense and ceiling as level lines behind them."""
    axes.axhline(chart.ceiling, color=_FAINT, lw=1.2, ls=(0, (2, 3)), zorder=1.5)
    axes.axhline(chart.dense.auc, color=_INK, lw=1.0, alpha=0.55, zorder=1.5)
    axes.plot([chart.dense.table_bytes], [chart.dense.auc], marker="*", ms=15, color=_INK, ls="", mec="white", zorder=9)
    drawn = zip(chart.curves.items(), _COLORS, _MARKS, _SIZES, strict=False)
    for i, ((name, points), color, mark, mark_size) in enumerate(drawn):
        reached = sorted((p for p in points if p.auc is not None), key=lambda p: p.table_bytes)
        xs, ys = [p.table_bytes for p in reached], [p.auc for p in reached]
        axes.plot(
            xs, ys, color=color, marker=mark, ms=mark_size, lw=2.2, label=name, mec="white", mew=1.0, zorder=8 - i
        )
    _scale(axes, chart)
    _text(axes, chart)


def _scale(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    budgets = [p for points in chart.curves.values() for p in points if p.auc is not None]
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(p.table_bytes for p in budgets), 1.35 * chart.dense.table_bytes)
    low = min(p.auc for p in budgets if p.auc is not None)
    axes.set_ylim(low - 0.06 * (chart.ceiling - low), chart.ceiling + 0.10 * (chart.ceiling - low))
    axes.set_xticks([share * chart.dense.table_bytes for share in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x / chart.dense.table_bytes:.3g} %\n{size(x)}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3f}".removeprefix("0")))
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, length=0, labelsize=10.5)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _text(axes: Any, chart: Chart) -> None:
    """Names of axes and curves, and of the two level lines, each above its line and clear of the grid."""
    axes.set_xlabel("bytes of the packed table (log scale)", color=_FAINT, fontsize=11)
    axes.set_ylabel("AUC on the test split", color=_FAINT, fontsize=11)
    right = axes.get_xlim()[1]
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for text, height, color in (
        ("teacher that drew the clicks: no model can do better", chart.ceiling, _FAINT),
        (f"dense, {size(chart.dense.table_bytes)}", chart.dense.auc, _INK),
    ):
        axes.annotate(text, (right, height), xytext=(-2, 8), textcoords="offset points", ha="right", fontsize=10.5,
                      color=color, bbox=clear, zorder=1.2)  # fmt: skip
    axes.legend(loc="lower right", frameon=False, fontsize=11.5, labelcolor="linecolor", handlelength=1.6)


def summary(curves: Sequence[MeasuredFile], dense: MeasuredFile) -> str:
    """The smallest artifact that loses less than .002 AUC, in one line."""
    good = [p for p in curves if p.auc is not None and dense.auc is not None and p.auc > dense.auc - 0.002]
    if not good:
        return "no budget stays within .002 AUC of the dense model"
    best = min(good, key=lambda p: p.table_bytes)
    return f"{dense.table_bytes / best.table_bytes:.0f}x smaller table within .002 AUC of the dense model"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ margin: 0 auto; padding: 1.2rem; max-width: 56rem; background: #fff; color: #1c2430;
         font: 1rem/1.5 system-ui, sans-serif; }}
  h1 {{ font-size: 1.5rem; line-height: 1.2; margin: 0 0 .3rem; }}
  p {{ color: #4a5563; margin: .3rem 0 1rem; }}
  svg {{ display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto 1rem; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }}
  th, td {{ padding: .3rem .32rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap; }}
  th {{ color: #6b7684; font-weight: 600; }}
  th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
  tbody th {{ color: #1c2430; padding-top: .9rem; }}
  code {{ background: #f3f5f7; padding: .1rem .35rem; border-radius: .25rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
{figure}
<div class="scroll">
<table>
<thead><tr><th>budget</th><th>AUC</th><th>&minus; dense</th><th>table</th><th>file</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<p>The teacher that drew the clicks reaches AUC {ceiling}. Every AUC was measured from the artifact's file, not from the
training objects. Made by <code>{command}</code>.</p>
</body>
</html>
"""
