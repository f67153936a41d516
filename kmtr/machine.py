"""This machine: the device that a process computes on by itself, its share of cores, memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import sys
from contextlib import suppress

import psutil

log = logging.getLogger(__name__)


def device(setting: str) -> str:
    """``cuda`` where this machine has a GPU and `train.device` allows it, else ``cpu``.

    For what a process computes beside the workers of a run, as evaluation. The GPUs of a cluster may be elsewhere, so
    that none here is said, not refused.

    Args:
        setting: `train.device`.
    """
    import torch  # here, since commands that compute nothing import this module too

    if setting != "cpu" and torch.cuda.is_available():
        return "cuda"
    if setting == "cuda":
        log.warning("train.device=cuda: this machine has no GPU, so what is computed here is computed on its CPUs")
    return "cpu"


def computes_bf16(device: str) -> bool:
    """True for a device of this machine that multiplies in bf16 about as fast as in fp32, or faster.

    x86 CPUs without AVX-512 do not: there PyTorch leaves oneDNN's kernels for its own, in which products took 18 times
    as long as in fp32, and convolutions twice (AVX2, 2026-11-30).

    Args:
        device: ``cuda`` or ``cpu``.
    """
    import torch

    return device != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "AVX2")


def threads(processes: int) -> int:
    """Threads of each of so many processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // processes)


def memory() -> int:
    """Bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def peak() -> int:
    """Bytes of memory that this process has held at most so far, on Linux that of its parent when it began included.

    psutil does not tell.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def family(process: int) -> int:
    """Bytes of a process and its descendants, 0 where it has ended.

    Proportional set sizes: a page that several of them share (of the object store, or of batches on their way from
    worker to worker) counts once. Where the system tells none, pages that only one has.
    """
    try:
        first = psutil.Process(process)
        members = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in members:
        try:
            held = member.memory_full_info()
        except psutil.Error:  # it has just ended
            continue
        total += getattr(held, "pss", held.uss)
    return total


def give_back_memory() -> None:
    """Free what nobody refers to, and return it to the system: glibc keeps the heaps of threads that made large arrays,
    so that a process that makes one model after the other grows by gigabytes. Elsewhere only the former.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
