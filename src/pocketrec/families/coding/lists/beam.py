"""Which codes of a trellis cost least: beam search under a quadratic loss with error feedback.

A row ``x`` is coded as ``scale q``; its error ``e = x - scale q`` costs ``e^T H e``. With ``H = M D M^T``, ``M`` unit
upper triangular and ``D`` diagonal, that is ``sum_j D_j (e_j + sum_{i<j} M_ij e_i)^2``: coordinate after coordinate,
each aims at what makes up for the errors before it. A step of the code is taken for all beams and all its codes, and
those of least cost so far go on.

Reference:
    The M-algorithm: Anderson and Mohan, "Sequential coding algorithms: a survey and cost analysis", 1984. Trellis codes
    whose states are the last bits of the stream: Tseng et al., "QTIP: Quantization with trellises and incoherence
    processing", 2024. Error feedback: Frantar et al., "GPTQ: Accurate post-training quantization", 2022.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.format.trellis_codes import Code
from pocketrec.native import library
from pocketrec.native.library import pointer

RIDGE = 1e-3
"""Share of a metric's mean diagonal that every direction has at least."""

_CHUNK_ROWS = 256
_CANDIDATES = 512
"""Beams times codes of a step, at most; at least two beams go on."""

Floats = NDArray[np.float32]


def factors(metrics: Floats) -> tuple[Floats, Floats]:
    """Metrics ``(m, d, d)`` as ``M (m, d, d)``, unit upper triangular, and ``D (m, d)``.

    Example:
        >>> upper, weights = factors(np.array([[[2, 1], [1, 1]]], np.float32))
        >>> upper[0].round(2).tolist(), weights[0].round(2).tolist()
        ([[1.0, 1.0], [0.0, 1.0]], [1.0, 1.0])
    """
    mean = np.trace(metrics, axis1=1, axis2=2) / metrics.shape[1]
    turned = torch.from_numpy(metrics[:, ::-1, ::-1] / np.maximum(mean, 1e-30)[:, None, None])
    turned.diagonal(dim1=1, dim2=2).add_(RIDGE)
    root = torch.linalg.cholesky(turned).numpy()[:, ::-1, ::-1]
    diagonal = np.einsum("mii->mi", root)
    return root / diagonal[:, None], np.square(diagonal) * mean[:, None]


def beam_search(
    code: Code, rows: Floats, scales: Floats, upper: Floats, weights: Floats, beams: int
) -> NDArray[np.uint8]:
    """Codes of rows, one for each step.

    Args:
        code: how the rows are coded.
        rows: ``(m, d)``.
        scales: of the rows, ``(m,)``.
        upper: ``M`` of each row, ``(m, d, d)``.
        weights: ``D`` of each row, ``(m, d)``.
        beams: how many go on at each step, at least 1; fewer where a step has many codes.

    Returns:
        ``(m, steps)``.
    """
    found = np.empty((len(rows), code.steps(rows.shape[1])), np.uint8)
    beams = min(beams, max(2, _CANDIDATES >> code.bits))
    for begin in range(0, len(rows), _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        x, scale, m, d = (np.ascontiguousarray(a[part], np.float32) for a in (rows, scales, upper, weights))
        if not library.available():
            found[part] = _search_numpy(code, x, scale, m, d, beams)
        else:
            _search_compiled(code, x, scale, m, d, beams, found[part])
    return found


def _search_compiled(
    code: Code, rows: Floats, scales: Floats, upper: Floats, weights: Floats, beams: int, codes: NDArray[np.uint8]
) -> None:
    """Write codes ``(m, steps)`` by the compiled library, which must be available."""
    count, width = rows.shape
    status = library.needed().pocketrec_beam(
        pointer(code.table), code.bits, code.span, code.memory, pointer(rows), pointer(scales), pointer(upper),
        pointer(weights), count, width, beams, pointer(codes),
    )  # fmt: skip
    library.check_status(status, "`rows`")


def _search_numpy(
    code: Code, rows: Floats, scales: Floats, upper: Floats, weights: Floats, beams: int
) -> NDArray[np.uint8]:
    count, width = rows.shape
    steps, choices = code.steps(width), 1 << code.bits
    states = np.zeros((count, 1), np.int64)
    costs = np.zeros((count, 1), np.float32)
    pull = np.zeros((count, 1, width), np.float32)
    parents, taken = [], []
    row = np.arange(count)[:, None]
    for step in range(steps):
        span = slice(step * code.span, min((step + 1) * code.span, width))
        reached = (states >> code.bits)[..., None] | (np.arange(choices) << (code.memory - code.bits))
        values = code.table[reached][..., : span.stop - span.start] * scales[:, None, None, None]
        errors = rows[:, None, None, span] - values
        felt = pull[:, :, None, span] + np.einsum("nbcv,nvw->nbcw", errors, upper[:, span, span])
        totals = costs[..., None] + np.einsum("nbcw,nw->nbc", np.square(felt), weights[:, span])
        flat = totals.reshape(count, -1)
        keep = 1 if step == steps - 1 else min(beams, flat.shape[1])
        best = np.argsort(flat, axis=1, kind="stable")[:, :keep]
        parent, chosen = best // choices, best % choices
        errors = errors[row, parent, chosen]
        pull = pull[row, parent] + np.einsum("nbv,nvd->nbd", errors, upper[:, span])
        states, costs = reached[row, parent, chosen], flat[row, best]
        parents.append(parent)
        taken.append(chosen)
    codes = np.empty((count, steps), np.uint8)
    place = np.zeros(count, np.int64)
    for step in range(steps - 1, -1, -1):
        codes[:, step] = taken[step][row[:, 0], place]
        place = parents[step][row[:, 0], place]
    return codes
