"""Packed tensors of a mini-batch and the way between packed rows and padded blocks.

Shapes: B crystals, N nodes, E edges and T tokens over the whole batch, d the width of a token state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

ABSENT: Any = None  # typed as present, since a model reads only what it declares to need
GROUP = 16  # texts that are padded to one length together


class Sizes(NamedTuple):
    """Shapes of a padded batch: rows of each kind, with those that pad, and the most rows of one crystal."""

    crystals: int  # without the one that pads
    nodes: int = 0
    edges: int = 0
    tokens: int = 0
    most_nodes: int = 0
    most_tokens: int = 0


@dataclass(slots=True)
class Texts:
    """The different texts of a batch, shorter ones first: found on the host, so that none waits for a GPU."""

    first: Tensor  # (b,) int64, a crystal that has the text; absent in a padded batch
    of: Tensor  # (B,) int64, the text that a crystal has
    size: int  # tokens t of all of them

    @property
    def padded(self) -> bool:
        """Whether the tokens of the batch are those of its texts, and not those of its crystals."""
        return self.first is None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Texts:
        """The same texts on `device`."""
        first, of = (part.to(device, non_blocking=non_blocking) for part in (self.first, self.of))
        return Texts(first, of, self.size)


def different_texts(offsets: Tensor, ids: Tensor | None = None) -> Texts:
    """Texts of a batch with token offsets (B + 1,); those with the same one of `ids` (B,) are equal."""
    lengths = offsets.diff().numpy()  # by numpy, which is quicker for so few
    first = of = np.arange(len(lengths))
    if ids is not None:
        _, first, of = np.unique(ids.numpy(), return_index=True, return_inverse=True)
    order = lengths[first].argsort(kind="stable")
    first, of = first[order], order.argsort()[of]
    return Texts(torch.from_numpy(first), torch.from_numpy(of), int(lengths[first].sum()))


@dataclass(slots=True)
class Batch:
    """What a model may read; a part is None when the model does not declare that it needs it.

    A padded batch has the shapes `sizes`, whatever its crystals: behind them stands one that is none, in
    nodes, edges, tokens and their offsets (B + 2,) alone. Its nodes and edges count 0 times, so that nothing
    depends on them, and it has no crystal vector. Where the different texts are known, its tokens are those
    of B texts: first empty ones, as many as crystals share a text with others.
    """

    n: int  # crystals B
    atomic_numbers: Tensor = ABSENT  # (N,) int64
    multiplicities: Tensor = ABSENT  # (N,) atoms of the cell that a node stands for
    node_offsets: Tensor = ABSENT  # (B + 1,) int64
    edge_source: Tensor = ABSENT  # (E,) int64, node index within the batch
    edge_target: Tensor = ABSENT  # (E,) int64, node index within the batch
    distances: Tensor = ABSENT  # (E,) angstrom
    edge_multiplicities: Tensor = ABSENT  # (E,) parallel edges that an edge stands for
    vectors: Tensor = ABSENT  # (E, 3) from the target to the source, angstrom
    edge_reverse: Tensor = ABSENT  # (E,) int64, edge index within the batch
    ridge_areas: Tensor = ABSENT  # (E,) square angstrom
    # Of a padded batch alone. Edges into node n are edge_starts[n]:edge_starts[n + 1], and edges out of it
    # source_order[source_starts[n]:source_starts[n + 1]]; those that pad are in none.
    shares: Tensor = ABSENT  # (N,) of its crystal's atoms that a node stands for
    edge_starts: Tensor = ABSENT  # (N + 1,) int64
    source_order: Tensor = ABSENT  # (E,) int64
    source_starts: Tensor = ABSENT  # (N + 1,) int64
    token_ids: Tensor = ABSENT  # (T,) int64
    token_states: Tensor = ABSENT  # (T, d) hidden states of the text encoder; bfloat16 from the cache
    token_offsets: Tensor = ABSENT  # (B + 1,) int64
    cls_states: Tensor = ABSENT  # (B, d) of the first token, for a model that reads no other
    texts: Texts = ABSENT  # absent where no texts are known to be equal
    targets: Tensor = ABSENT  # (B,) standardised
    masked_nodes: Tensor = ABSENT  # (N,) bool, nodes whose input is hidden
    # Of a batch that several processes share: crystals before these, and in all; None where it is whole.
    place: tuple[int, int] | None = None
    sizes: Sizes | None = None  # of a padded batch, known on the host

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in parts.items() if isinstance(v, Tensor | Texts)
        }
        return replace(self, **moved)


def widened(values: Tensor) -> Tensor:
    """The values in float32, or as they are where that is more precise."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sums_of(values: Tensor, groups: Tensor, n: int) -> Tensor:
    """Sums (n, ...) of the values (R, ...) of each group, `widened`; groups (R,)."""
    values = widened(values)
    return values.new_zeros(n, *values.shape[1:]).index_add(0, groups, values)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return sums_of(gradients[0], index, ctx.n).to(gradients[0].dtype), None


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Rows (R, ...) of the values (n, ...) at index (R,); gradients of a row's copies add up `widened`."""
    return _Rows.apply(values, index)


def segments(offsets: Tensor) -> Tensor:
    """Index (rows,) of the crystal that each packed row belongs to, from offsets (B + 1,)."""
    return torch.repeat_interleave(offsets.diff())


def rows_of(offsets: Tensor, crystals: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Packed rows (r,) of some crystals (b,), one crystal after the other, and their own offsets (b + 1,).

    With their number r as `size`, no GPU is asked for it.
    """
    lengths = offsets.diff()[crystals]
    own = functional.pad(lengths.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(offsets[crystals] - own[:-1], lengths, output_size=size)
    return torch.arange(len(shift), device=shift.device) + shift, own


def pad(packed: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows (R, ...) to a zero-padded block (B, L, ...) and its mask (B, L), True at real rows."""
    lengths = offsets.diff()
    width = int(lengths.max())
    mask = torch.arange(width, device=offsets.device) < lengths[:, None]
    block = packed.new_zeros(len(lengths) * width, *packed.shape[1:])
    block = block.index_copy(0, _places(offsets, width), packed)
    return block.view(len(lengths), width, *packed.shape[1:]), mask


def gather_block(packed: Tensor, offsets: Tensor, crystals: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of some crystals (b,) as a block (b, L, ...) and its mask; at padding stand rows of others."""
    lengths = offsets.diff()[crystals]
    places = torch.arange(int(lengths.max()), device=offsets.device)
    mask = places < lengths[:, None]
    places = (offsets[crystals][:, None] + places).clamp_(max=len(packed) - 1)
    return packed.index_select(0, places.flatten()).unflatten(0, mask.shape), mask


class Block:
    """The way between packed rows (R, d) of a padded batch and a block (B, L, d), of shapes known before.

    Each way is a gathering whose gradient is the other: nothing is added up. For that the block's rows that
    are not the crystal's must take no part in what is computed of it.

    Attributes:
        mask: (B, L), true at rows of the crystal; elsewhere in the block stand those of others.

    Args:
        offsets: (B + 1,) of the crystals.
        rows: R.
        most: L. Of the crystal that pads, rows beyond stand for others.
    """

    def __init__(self, offsets: Tensor, rows: int, most: int):
        places = torch.arange(most, device=offsets.device)
        self.mask = places < offsets.diff()[:, None]
        self.rows = (offsets[:-1, None] + places).clamp(max=rows - 1)
        row = torch.arange(rows, device=offsets.device)
        owner = torch.searchsorted(offsets[1:], row, right=True)
        self.places = owner * most + (row - offsets[owner]).clamp(max=most - 1)

    def padded(self, packed: Tensor) -> Tensor:
        """Packed rows (R, d) as a block (B, L, d)."""
        return _Padded.apply(packed, self)

    def packed(self, block: Tensor) -> Tensor:
        """A block (B, L, d) as packed rows (R, d)."""
        return _Packed.apply(block, self)


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return packed.index_select(0, block.rows.flatten()).unflatten(0, block.rows.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].flatten(0, 1).index_select(0, ctx.block.places), None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return padded.flatten(0, 1).index_select(0, block.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        block = ctx.block
        rows = gradients[0].index_select(0, block.rows.flatten()).unflatten(0, block.rows.shape)
        return rows * block.mask.unsqueeze(-1), None


def unpad(block: Tensor, offsets: Tensor) -> Tensor:
    """The real rows (R, ...) of a block (B, L, ...): the inverse of `pad`."""
    return block.flatten(0, 1).index_select(0, _places(offsets, block.shape[1]))


def _places(offsets: Tensor, width: int) -> Tensor:
    """Flat positions (rows,) of the packed rows in a block of (B, width)."""
    owner = segments(offsets)
    return torch.arange(len(owner), device=offsets.device) + (owner * width - offsets[owner])


def gathered(own: Tensor, place: tuple[int, int]) -> Tensor:
    """All processes' rows (B, d) of which this process has `own` (b, d), with gradients.

    Args:
        own: rows of this process.
        place: number of rows of the processes before this one, and B.
    """
    first, whole = place
    before, after = own.new_zeros(first, own.shape[1]), own.new_zeros(whole - first - len(own), own.shape[1])
    return all_reduce(torch.cat([before, own, after]))


def with_text(batch: Batch, other: Batch) -> Batch:
    """The crystals of a batch with the texts of another."""
    parts = ("token_ids", "token_states", "token_offsets", "texts")
    return replace(batch, **{name: getattr(other, name) for name in parts})
