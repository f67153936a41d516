"""Which subjects at which step: a pure function of (seed, step). No I/O, no Ray.

Every epoch is a full random permutation of the subjects, cut into global batches; a tail smaller than a batch is
dropped (other subjects each epoch). A worker takes its contiguous part of each global batch, so that the global batch
at step k is the same at any number of workers and a restart continues with exactly what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kmtr.types import InputError


@dataclass(frozen=True)
class Plan:
    """Order of `subjects` samples in global batches.

    Attributes:
        subjects: number of rows in the split.
        global_batch: subjects per step over all workers.
        seed: of the order.
    """

    subjects: int
    global_batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subjects < self.global_batch:
            raise InputError(
                f"data.global_batch: expected at most the {self.subjects} training subjects of the dataset, "
                f"got {self.global_batch}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.subjects // self.global_batch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Row numbers of the global batch at `step`, int64 ``batch``."""
        first = step % self.steps_per_epoch * self.global_batch
        return permutation(self.seed, self.epoch(step), self.subjects)[first : first + self.global_batch]

    def share(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """The rows of one worker at `step`, int64 ``batch / world_size``."""
        if self.global_batch % world_size:
            raise InputError(
                f"data.global_batch: expected a multiple of the {world_size} workers, got {self.global_batch}"
            )
        size = self.global_batch // world_size
        return self.batch(step)[rank * size : (rank + 1) * size]


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of `n` rows in one epoch, by a counter-based generator; read-only int64."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)
    order.flags.writeable = False
    return order
