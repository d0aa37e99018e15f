"""A ranking model whose final vectors are its table: what a device needs to recommend, without the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from pocketrec.data.dataset import Dataset, Split
from pocketrec.errors import UnsupportedOp
from pocketrec.format.program import Program
from pocketrec.models.backbone import Model, RankingModel
from pocketrec.models.table import Block, DenseTable


class BakedModel(RankingModel):
    """Final user and item vectors ``(n, D')`` as a dense table; propagation is the identity.

    It can be compressed by post-training methods and saved, not trained.
    """

    propagates: ClassVar[bool] = False

    def __init__(self, source: RankingModel, table: DenseTable) -> None:
        super().__init__()
        self.backbone, self.schema, self.table = source.backbone, source.schema, table
        self.source = source

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model) -> RankingModel:
        """Propagate once. A model whose vectors are final already, baked or without a graph, is returned as it is.

        Raises:
            UnsupportedOp: The model is not a ranking model.
        """
        if not isinstance(model, RankingModel):
            raise UnsupportedOp(f"Only ranking models can be baked, but got {type(model).__name__}; leave `bake` out.")
        if not model.propagates:
            return model
        vectors = model.propagate(model.table.weight()).detach().float().contiguous()
        blocks = tuple(Block(f.name, f.offset, f.stop, 0, vectors.shape[1]) for f in model.schema.fields)
        return cls(model, DenseTable(model.schema, blocks, vectors))

    def propagate(self, weight: Tensor) -> Tensor:
        """The identity."""
        return weight

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """``(B, D'), (I, D') -> (B, I)`` scores, as the source's."""
        return self.source.scores(users, items)

    def lower(self) -> Program:
        """The score of a pair, as the source's."""
        return self.source.lower()

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Baked vectors are not trained: raises :class:`~pocketrec.errors.UnsupportedOp`."""
        self._refuse()

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Baked vectors are not trained: raises :class:`~pocketrec.errors.UnsupportedOp`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedOp("Baked vectors are final and cannot be trained; compress with `bake` off to fine-tune.")
