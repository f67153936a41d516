"""Sequences of different lengths one after the other, without padding: whose each token is, and attention within each.

Everything done token by token runs on ``token channel`` of all subjects of a micro-batch at once; only attention has to
know where a subject ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

T = TypeVar("T")


def indices(values: Sequence[int], device: torch.device) -> Int[Tensor, " value"]:
    """Whole numbers as a tensor that is made on the device, run by run of consecutive ones: a copy from memory that is
    not page-locked would make the host wait for all that the device has to do.
    """
    breaks = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1] + 1), len(values)]
    runs = [torch.arange(values[a], values[b - 1] + 1, device=device) for a, b in pairwise(breaks) if b > a]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Lengths:
    """Number of tokens of each subject.

    Attributes:
        host: known to the host, so that no shape has to be asked from the device.
        counts: the same on the device.
    """

    host: tuple[int, ...]
    counts: Int[Tensor, " batch"]

    @staticmethod
    def of(kinds: Sequence[Bool[Tensor, "batch ..."]]) -> list[Lengths]:
        """Lengths of the chosen cells of several grids, with one transfer from the device for all of them."""
        counts = torch.stack([chosen.flatten(1).sum(1) for chosen in kinds])
        return [Lengths(tuple(host), each) for host, each in zip(counts.tolist(), counts, strict=True)]

    @staticmethod
    def joined(parts: Sequence[Lengths]) -> Lengths:
        """All rows of the first, then of the second, and so on."""
        return Lengths(tuple(n for one in parts for n in one.host), torch.cat([one.counts for one in parts]))

    @property
    def total(self) -> int:
        return sum(self.host)

    @cached_property
    def starts(self) -> Int[Tensor, " offset"]:
        """Place of each subject's first token, and the total: ``batch + 1`` numbers, int32 as the kernels want them."""
        return F.pad(self.counts.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def subject(self) -> Int[Tensor, " token"]:
        """Row of the batch that each token belongs to."""
        rows = torch.arange(len(self.host), device=self.counts.device)
        return torch.repeat_interleave(rows, self.counts, output_size=self.total)


@dataclass(frozen=True)
class Pending(Generic[T]):
    """Something of chosen cells that is made once the host knows how many there are.

    Each question makes the host wait for the device, so that what belongs together is asked together: `joint`.

    Attributes:
        cells: True where chosen, of any grids.
        make: lengths of `cells`, in their order -> what is made.
    """

    cells: tuple[Bool[Tensor, "batch ..."], ...]
    make: Callable[[Sequence[Lengths]], T]

    def settle(self) -> T:
        """Ask the device once, and make it."""
        return self.make(Lengths.of(self.cells) if self.cells else [])


def joint(parts: Mapping[str, Pending[Any]]) -> Pending[dict[str, Any]]:
    """All of them by their names, with one question."""

    def make(lengths: Sequence[Lengths]) -> dict[str, Any]:
        left = iter(lengths)
        return {name: part.make([next(left) for _ in part.cells]) for name, part in parts.items()}

    return Pending(tuple(cells for part in parts.values() for cells in part.cells), make)


@dataclass(frozen=True)
class Places:
    """Chosen cells of a grid, subject after subject, in the grid's order.

    Attributes:
        lengths: cells of each subject.
        index: position of each cell on the grid's axes, slice and time first.
    """

    lengths: Lengths
    index: Int[Tensor, "token axis"]

    def cell(self, shape: tuple[int, int]) -> Int[Tensor, " token"]:
        """Number of each token's (subject, slice, t) among those of all subjects with a grid of this shape."""
        slices, frames = shape
        return (self.lengths.subject * slices + self.index[:, 0]) * frames + self.index[:, 1]


def gather(chosen: Bool[Tensor, "batch ..."], lengths: Lengths | None = None) -> Places:
    """The chosen cells.

    Args:
        lengths: of `chosen`, where the host knows them already; else the device is asked.
    """
    lengths = Lengths.of([chosen])[0] if lengths is None else lengths
    where = torch.nonzero_static(chosen, size=lengths.total)
    return Places(lengths, where[:, 1:])


def join(
    sequences: Sequence[tuple[Float[Tensor, "_ channel"], Lengths]],
) -> tuple[Float[Tensor, "token channel"], Lengths, list[Int[Tensor, " _"]]]:
    """Several sequences of each subject as one, in the order given.

    Returns:
        the joined sequence, its lengths, and the place in it of every token of each sequence.
    """
    if len(sequences) == 1:
        x, lengths = sequences[0]
        return x, lengths, [torch.arange(len(x), device=x.device)]
    of = [lengths for _, lengths in sequences]
    host = tuple(sum(counts) for counts in zip(*(lengths.host for lengths in of), strict=True))
    joined = Lengths(host, torch.stack([lengths.counts for lengths in of]).sum(0))
    places = []
    for number, (x, lengths) in enumerate(sequences):
        # Before a subject's token come its own sequence so far, of the sequences before it all up to this subject, of
        # those behind it all up to the subject before.
        before = sum((o.starts[1:] for o in of[:number]), lengths.starts.new_zeros(len(host)))
        before = sum((o.starts[:-1] for o in of[number + 1 :]), before)
        places.append(torch.arange(len(x), device=x.device) + before[lengths.subject])
    parts = torch.cat([x for x, _ in sequences])
    return torch.empty_like(parts).index_copy(0, torch.cat(places), parts), joined, places


def attend(
    query: Float[Tensor, "token head channel"],
    key: Float[Tensor, "source head channel"],
    value: Float[Tensor, "source head channel"],
    queries: Lengths,
    sources: Lengths,
) -> Float[Tensor, "token head channel"]:
    """Softmax attention of each subject's queries to its own sources, never to another's.

    In half precision on a GPU one kernel takes all subjects. Elsewhere each run of neighbours with the same lengths is
    one call of `scaled_dot_product_attention`; nothing is padded, so none has a mask.
    """
    if not queries.total:  # no kernel is launched for nothing; all weights get a gradient, as on the other workers
        return query + 0.0 * (key.sum() + value.sum())
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # here and not above: it imports the compiler

        longest = max(queries.host), max(sources.host)
        return cast(Tensor, varlen_attn(query, key, value, queries.starts, sources.starts, *longest))
    runs = [(*sizes, len(list(run))) for sizes, run in groupby(zip(queries.host, sources.host, strict=True))]
    parts = zip(
        runs,
        query.split([n * count for n, _, count in runs]),
        key.split([m * count for _, m, count in runs]),
        value.split([m * count for _, m, count in runs]),
        strict=True,
    )
    out = []
    for (n, m, count), q, k, v in parts:
        q, k, v = (x.unflatten(0, (count, size)).transpose(1, 2) for x, size in ((q, n), (k, m), (v, m)))
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)
