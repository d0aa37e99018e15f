"""A table of users as sums of items whose shared vectors, gains, scales and coefficients can be trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.families.coding.lists.table import TrellisTable, add_codes
from pocketrec.format.layouts.trellis import CENTROID_BITS, GAIN_BITS, centroid_values, geometric
from pocketrec.format.trellis_codes import SCALE_BITS
from pocketrec.models.table import Lookup

_TINY = 1e-20


class TrainableTrellisTable(Lookup):
    """A :class:`~pocketrec.families.coding.lists.table.TrellisTable` to be trained.

    ``v_i = g_i x_i``, ``x_i = C_a + s q_i``. A user is ``sum_k c_k x_k / |x_k| + t r``. Look-ups round ``C`` and ``log
    g`` to what the file can hold, and gradients pass as if they did not. Which shared vector, which atoms and all
    trellis codes stay.

    Attributes:
        shared: ``C``, ``(K, D)``.
        gains: ``log g``, ``(I,)``.
        stretch: logarithms of ``s`` and ``t``, by which all scales of items and of users grow, ``(2,)``.
        coefficients: ``c``, ``(atoms,)``.

    Reference:
        Gradients through rounding: Bengio et al., "Estimating or propagating gradients through stochastic neurons for
        conditional computation", 2013, section 4.
    """

    fill: Tensor
    places: Tensor
    chosen: Tensor
    atoms: Tensor
    item_rests: Tensor
    user_rests: Tensor
    levels: Tensor

    def __init__(self, coded: TrellisTable) -> None:
        super().__init__()
        self.schema, self.blocks = coded.schema, coded.blocks
        records, shape, width = coded.records, coded.shape, coded.width
        gain, gain_ratio, item, item_ratio, user, user_ratio = records.scales[:6].tolist()
        self.step = float(records.scales[6])
        rests = np.zeros((shape.items, width), np.float32)
        grown = geometric(item, item_ratio, SCALE_BITS)[records.item_scales]
        for which, rate in enumerate(shape.rates):
            add_codes(rests, np.flatnonzero(records.classes == which), rate, records.item_codes, grown)
        sums = np.zeros((shape.users, width), np.float32)
        grown = geometric(user, user_ratio, SCALE_BITS)[records.user_scales]
        add_codes(sums, np.arange(shape.users), shape.rest, records.user_codes, grown)
        levels = np.log(np.maximum(geometric(gain, gain_ratio, GAIN_BITS), _TINY))
        self.shared = nn.Parameter(torch.from_numpy(centroid_values(records.centroids, self.step)))
        self.gains = nn.Parameter(torch.from_numpy(levels[records.gains]))
        self.stretch = nn.Parameter(torch.zeros(2))
        self.coefficients = nn.Parameter(torch.from_numpy(records.scales[7:].copy()))
        fill = coded.fill.astype(np.float32)[self.schema.field_of_row]
        numbers = {
            "fill": fill, "places": np.flatnonzero(coded.stored().numpy()),
            "chosen": records.shapes.astype(np.int64), "atoms": records.atoms.astype(np.int64),
            "item_rests": rests, "user_rests": sums, "levels": levels,
        }  # fmt: skip
        for name, array in numbers.items():
            self.register_buffer(name, torch.from_numpy(array))

    def vectors(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of users ``(B,)`` and of all items: ``(B, D), (I, D)``."""
        own, other = self.stretch.exp()
        shared = F.embedding(self.chosen, _through(self.shared, self._numbers().sub(7.5) * self.step))
        shapes = shared + own * self.item_rests
        units = F.embedding(self.atoms[users], F.normalize(shapes, dim=1, eps=_TINY))
        sums = torch.einsum("k,bkd->bd", self.coefficients, units) + other * self.user_rests[users]
        gains = _through(self.gains, self.levels[self._nearest()]).exp()
        return sums, gains[:, None] * shapes

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self.weight()[ids.long()]

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        parts = self.vectors(torch.arange(len(self.atoms), device=self.atoms.device))
        return self.fill.index_copy(0, self.places, torch.cat(parts))

    @torch.no_grad()
    def settled(self, coded: TrellisTable) -> TrellisTable:
        """The table that it came from, around what was learned."""
        scales = coded.records.scales.copy()
        scales[[2, 4]] *= self.stretch.exp().numpy()
        scales[7:] = self.coefficients.numpy()
        numbers, gains = (found.numpy().astype(np.uint8) for found in (self._numbers(), self._nearest()))
        records = replace(coded.records, centroids=numbers, gains=gains, scales=scales)
        return TrellisTable(self.schema, self.blocks, coded.fill, coded.shape, records)

    def _numbers(self) -> Tensor:
        """What the file holds of the shared vectors, ``(K, D)``."""
        return (self.shared.detach() / self.step + 7.5).round().clamp(0, (1 << CENTROID_BITS) - 1)

    def _nearest(self) -> Tensor:
        """The nearest level of each gain by ratio, ``(I,)``."""
        return (self.gains.detach()[:, None] - self.levels).abs().argmin(dim=1)


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value, with the gradient of the value."""
    return value + (rounded - value).detach()
