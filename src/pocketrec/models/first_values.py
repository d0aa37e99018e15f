"""How tables start: blocks and first values that backbones share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Schema


def click_blocks(schema: Schema, dim: int, *, linear: bool) -> tuple[Block, ...]:
    """``embedding``: columns ``[0, dim)``; with ``linear``, column ``dim``, which no published count includes."""
    embedding = Block("embedding", 0, schema.rows, 0, dim)
    return (embedding, Block("linear", 0, schema.rows, dim, dim + 1, counted=False)) if linear else (embedding,)


def click_table(schema: Schema, dim: int, source: torch.Generator, linear_std: float | None = None) -> DenseTable:
    """Embeddings Xavier-uniform on the whole ``n x dim`` matrix; linear weights normal, none if ``linear_std`` is."""
    linear = linear_std is not None
    weight = torch.empty(schema.rows, dim + linear)
    xavier(weight[:, :dim], source)
    if linear_std is not None:
        weight[:, dim].normal_(0, linear_std, generator=source)
    return DenseTable(schema, click_blocks(schema, dim, linear=linear), weight)


def pair_blocks(schema: Schema, dim: int) -> tuple[Block, ...]:
    """One block of rows for users, one for items, ``dim`` columns each."""
    users, items = schema.fields
    return (Block("user", users.offset, users.stop, 0, dim), Block("item", items.offset, items.stop, 0, dim))


def pair_table(schema: Schema, dim: int, source: torch.Generator) -> DenseTable:
    """Vectors of users and items, Xavier-uniform on the whole ``n x dim`` matrix."""
    weight = torch.empty(schema.rows, dim)
    xavier(weight, source)
    return DenseTable(schema, pair_blocks(schema, dim), weight)


def xavier(matrix: Tensor, source: torch.Generator) -> None:
    """Fill a matrix ``(n, d)`` with uniform numbers in ``+-sqrt(6 / (n + d))``."""
    bound = math.sqrt(6 / sum(matrix.shape))
    matrix.uniform_(-bound, bound, generator=source)
