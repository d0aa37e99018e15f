"""Touch-up: what the rows of a coded table share, and the head, adjusted until the model says what the dense one says.

The target is the dense model's probability, not the label, which would be learned by heart. Codes stay as they are, so
that the file keeps its size to the byte.
"""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.data.dataset import Dataset
from pocketrec.families.coding.clicks.table import CodedTable
from pocketrec.families.distillation import ClickStudent, Target, better, stages
from pocketrec.format.planes import MOST_PLANES
from pocketrec.format.sections import Section, coder
from pocketrec.models.backbone import ClickModel, L, Model
from pocketrec.models.table import Lookup
from pocketrec.training.run import Run

RATES = (1e-3, 2e-4)
"""Learning rates of the stages."""

BATCH = 2048

_UNIT = 127
"""What the largest entry of a direction is in the file."""


class TrainableCodedTable(Lookup):
    """A coded table whose means, scales and directions can be trained: ``e_i = m_f + sum_j level_ij s_fcj b_fj``.

    Attributes:
        centre: ``m``, ``(F, D)``.
        stretch: logarithm of ``s``, by field, class and direction, ``(F, 8, k)``.
        basis: ``b``, ``(F, k, D)``; entries are at most 1 at the start.
    """

    units: Tensor
    kinds: Tensor
    fields: Tensor

    def __init__(self, coded: CodedTable) -> None:
        super().__init__()
        self.schema, self.blocks = coded.schema, coded.blocks
        most = max(1, *(len(s.basis) for s in coded.sections))
        stretch = torch.zeros(self.schema.width, 1 << MOST_PLANES, most)
        basis = torch.zeros(self.schema.width, most, self.width)
        units = np.zeros((self.schema.rows, most), np.float32)
        kinds, codes = coded.classes.numpy(), coded.codes.numpy()
        for i, (field, section) in enumerate(zip(self.schema.fields, coded.sections, strict=True)):
            classes, directions = section.coders.shape
            stretch[i, :classes, :directions] = torch.from_numpy(section.scales * np.float32(_UNIT)).log()
            basis[i, :directions] = torch.from_numpy(section.basis.astype(np.float32) / _UNIT)
            for which in range(classes):
                rows = field.offset + np.flatnonzero(kinds[field.offset : field.stop] == which)
                values = section.coefficients(codes[rows, :directions], which)
                units[rows, :directions] = values / section.scales[which]
        self.centre = nn.Parameter(torch.from_numpy(coded.centre.astype(np.float32)))
        self.stretch = nn.Parameter(stretch)
        self.basis = nn.Parameter(basis)
        self.register_buffer("units", torch.from_numpy(units))
        self.register_buffer("kinds", torch.from_numpy(kinds.astype(np.int64)))
        self.register_buffer("fields", torch.from_numpy(self.schema.field_of_row.astype(np.int64)))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``; rows of one field are decoded together."""
        flat = ids.reshape(-1).long()
        fields = self.fields[flat]
        order = fields.argsort(stable=True)
        found, rows = fields[order], flat[order]
        scaled = self.units[rows] * self.stretch.exp()[found, self.kinds[rows].clamp_min(0)]
        parts = scaled.split(fields.bincount(minlength=self.schema.width).tolist())
        vectors = torch.cat([part @ basis for part, basis in zip(parts, self.basis, strict=True)]) + self.centre[found]
        return vectors[order.argsort()].view(*ids.shape, self.width)

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self(torch.arange(self.schema.rows))

    @torch.no_grad()
    def settled(self, coded: CodedTable) -> CodedTable:
        """The table that it came from, around what was learned, rounded as a file has it."""
        sections = []
        for i, section in enumerate(coded.sections):
            classes, directions = section.coders.shape
            basis = self.basis[i, :directions].numpy()
            top = np.maximum(np.abs(basis).max(axis=1, initial=0), 1e-20)
            scales = self.stretch[i, :classes, :directions].exp().numpy() * top / _UNIT
            rounded = np.rint(basis / top[:, None] * _UNIT).astype(np.int8)
            sections.append(Section(section.planes, coder(section.bits, scales), rounded))
        centre = self.centre.numpy().astype(np.float16)
        return CodedTable(self.schema, self.blocks, centre, sections, coded.classes.numpy(), coded.codes.numpy())


class Probabilities(Target):
    """The probabilities of another model: mean cross-entropy of ``sigmoid(teacher)`` and the student's logit.

    Args:
        teacher: the dense model; it is left as it is.
    """

    def __init__(self, teacher: ClickModel[Lookup]) -> None:
        super().__init__()
        self.teacher = deepcopy(teacher).requires_grad_(False)

    def loss(self, student: Model[Lookup], batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Mean cross-entropy in nats against the teacher."""
        with torch.no_grad():
            target = self.teacher(batch[0]).sigmoid()
        return F.binary_cross_entropy_with_logits(student(batch[0]), target)


def touched_up(model: ClickModel, teacher: ClickModel, table: L) -> ClickStudent[L]:
    """A model around ``table`` that learns the teacher's probabilities, by its head, too.

    Scalars of the head stay: a file has them in its header, whose length they would change.
    """
    student = ClickStudent(model, table, Probabilities(teacher))
    for parameter in student.inner.parameters():
        parameter.requires_grad_(parameter.ndim > 0)
    return student


def touch_up(model: ClickModel, dense: ClickModel, data: Dataset, run: Run, epochs: int) -> ClickModel:
    """The model after training against the dense one, or as it was where validation says that this is better.

    Args:
        model: around a :class:`~pocketrec.families.coding.clicks.table.CodedTable`.
        dense: the teacher.
        data: its training and validation rows are read.
        run: keeps the result.
        epochs: most of each stage.

    Returns:
        A model of the same codes: its file has the same size.
    """
    coded = cast("CodedTable", model.table)
    student = touched_up(model, dense, TrainableCodedTable(coded))
    fitted = run.fit("touch-up", student, data, stages(epochs, BATCH, RATES))
    return better(model, fitted.inner.with_table(fitted.table.settled(coded)), data)
