"""The training state of an engine as named pieces of whole weights, in files that any number of workers reads.

Each worker holds pieces: the part of a weight that its AdamW updates, with both moments and what there is of copies
(the EMA, the weights of the best validation), in fp32. It writes them to ``state-rankNN.safetensors`` as flat tensors
named ``kind:start:weight``, where start counts numbers of the flattened weight. Whoever restarts, with another number
of workers or in another ZeRO stage, reads the ranges that it needs. Nothing is gathered and nothing is unpickled.

The only file that knows where DeepSpeed keeps what AdamW updates: `Held`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kmtr.types import KmtrError

WEIGHT, AVERAGE, BEST = "weight", "average", "best"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, as torch names them."""
Copies = Mapping[str, Mapping[Tensor, Tensor]]
"""Kind (`AVERAGE`, `BEST`) -> master -> a tensor like it, on any device."""


class CheckpointError(KmtrError):
    """A checkpoint that can't be used; it would be so again."""


@dataclass(frozen=True)
class Piece:
    """Part of a weight that this worker updates.

    Attributes:
        name: of the weight in the module.
        start: number of the flattened weight that the piece begins with.
        size: numbers in it.
        master: the tensor that AdamW updates; the piece lies in it from `offset` on.
        offset: where in `master`, flattened.
    """

    name: str
    start: int
    size: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's part of a tensor that is laid out as `master` is, flat; it shares the memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


class Held:
    """fp32 weights and AdamW state of a DeepSpeed engine in this worker, in any ZeRO stage, with or without offload.

    Without ZeRO the weights themselves are updated (bf16 is autocast there, see `engine`), whole in every worker; to
    write them is divided among the workers.
    """

    def __init__(self, wrapped: Any):
        self.wrapped, self.optimizer = wrapped, wrapped.optimizer
        self.stage = int(wrapped.zero_optimization_stage())

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors that AdamW updates, in a fixed order."""
        flat = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hides them from param_groups
        return list(flat) if flat is not None else [p for g in self.optimizer.param_groups for p in g["params"]]

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a master, made here where no step has been taken yet."""
        state: dict[str, Tensor] = getattr(self.optimizer, "optimizer", self.optimizer).state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state.update({kind: torch.zeros_like(master) for kind in MOMENTS})
        return state

    def pieces(self, whole: bool = False) -> Iterator[Piece]:
        """Every piece of this worker.

        Args:
            whole: without ZeRO all weights; else this worker's share of them, as it writes.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        for name, weight in self.wrapped.module.named_parameters():
            if self.stage == 3:
                group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
                start = rank * size
                size = max(0, min(size, weight.ds_numel - start))  # the last worker's end is padding
                yield Piece(name, start, size, self.optimizer.fp32_partitioned_groups_flat[group], offset)
            elif self.stage:
                mapping = weight._hp_mapping
                if mapping is not None:  # else another worker updates all of it
                    where, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                    (master,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
                    yield Piece(name, start, where.numel, master, where.start)
            else:
                size = weight.numel()
                start, end = (0, size) if whole else (rank * size // world, (rank + 1) * size // world)
                yield Piece(name, start, end - start, weight, start)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the masters into the weights that the model computes with."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # small weights are kept whole; they are gathered anew below
            for low, master in zip(self.optimizer.fp16_partitioned_groups_flat, self.masters, strict=True):
                low.data.copy_(master.data)  # one and the same in fp32
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage:
            self.optimizer.update_lp_params()


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    """Weight -> its shape, also of a module that ZeRO-3 has sharded."""
    return {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in module.named_parameters()}


@dataclass(frozen=True)
class Content:
    """This worker's pieces as they were at a moment, on the host; training may go on meanwhile.

    Attributes:
        tensors: ``kind:start:name`` -> flat, fp32.
        updates: AdamW's.
    """

    tensors: dict[str, Tensor]
    updates: int

    def write(self, path: Path) -> None:
        """As safetensors, with the number of updates in the header."""
        save_file(self.tensors, path, {"updates": str(self.updates)})


@torch.no_grad()
def collect(held: Held, copies: Copies) -> Content:
    """Copy this worker's pieces to the host.

    Raises:
        CheckpointError: weights that were updated unlike often, which one number could not say.
    """
    content, updates = {}, set()
    for piece in held.pieces():
        state = held.moments(piece.master)
        updates.add(float(state["step"]))
        for kind, tensor in _kinds(piece.master, state, copies).items():
            if piece.size:
                content[f"{kind}:{piece.start}:{piece.name}"] = piece.of(tensor).detach().to("cpu", copy=True)
    if len(updates) > 1:
        raise CheckpointError(f"checkpoint: expected all weights updated equally often, got {sorted(updates)}")
    return Content(content, int(updates.pop()) if updates else 0)


@torch.no_grad()
def load(paths: Iterable[Path], held: Held, copies: Copies) -> int:
    """Fill an engine's weights, moments and copies from the files of all workers that wrote; returns AdamW's updates.

    Raises:
        CheckpointError: part of a weight is in none of the files.
    """
    with Pieces(paths) as stored:
        for piece in held.pieces(whole=True):
            state = held.moments(piece.master)
            state["step"].fill_(stored.updates)
            for kind, tensor in _kinds(piece.master, state, copies).items():
                stored.read(kind, piece.name, piece.start, piece.of(tensor))
        held.refresh()
        return stored.updates


def kinds(paths: Iterable[Path]) -> set[str]:
    """Kinds of tensors in the files of all workers."""
    with Pieces(paths) as stored:
        return stored.kinds


def _kinds(master: Tensor, state: Mapping[str, Tensor], copies: Copies) -> dict[str, Tensor]:
    found = {WEIGHT: master} | {kind: state[kind] for kind in MOMENTS}
    return found | {kind: of[master] for kind, of in copies.items()}


class Pieces:
    """The state files of all workers, opened together and read by range.

    Attributes:
        updates: AdamW's, when they were written.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = sorted(paths)

    def __enter__(self) -> Pieces:
        self._open = ExitStack()
        self._found: dict[tuple[str, str], list[tuple[int, str, Any]]] = {}
        self.updates = 0
        for path in self.paths:
            file = self._open.enter_context(safe_open(path, "pt"))
            self.updates = max(self.updates, int(file.metadata()["updates"]))
            for key in list(file.keys()):
                kind, start, name = key.split(":", 2)
                self._found.setdefault((kind, name), []).append((int(start), key, file))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._found}

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill `into`, flat, with the numbers of a weight from `start` on.

        Raises:
            CheckpointError: some of them are in no file.
        """
        filled, end = 0, start + len(into)
        for first, key, file in self._found.get((kind, name), ()):
            part = file.get_slice(key)
            low, high = max(first, start), min(first + part.get_shape()[0], end)
            if low < high:
                into[low - start : high - start].copy_(part[low - first : high - first])
                filled += high - low
        if filled != len(into):
            raise CheckpointError(
                f"checkpoint: {kind} of {name}: expected {len(into)} numbers from {start} on, found {filled}; "
                "a file of a worker is missing"
            )


def whole(paths: Iterable[Path], kind: str, model: Mapping[str, list[int]], prefix: str) -> dict[str, Tensor]:
    """Whole weights of a submodule out of the files of all workers, fp32 on the CPU, under their names in it.

    Args:
        kind: `WEIGHT`, `AVERAGE` or `BEST`.
        model: weight -> shape, as `shapes` tells.
    """
    found = {}
    with Pieces(paths) as stored:
        for name, shape in model.items():
            if name.startswith(f"{prefix}."):
                weight = torch.empty(shape)
                stored.read(kind, name, 0, weight.view(-1))
                found[name.removeprefix(f"{prefix}.")] = weight
    return found
