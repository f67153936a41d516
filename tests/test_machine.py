"""The device and the memory of this machine, without asking how they are found."""

from __future__ import annotations

import logging
import subprocess
import sys

import psutil
import pytest
import torch

from kmtr import machine

HELD = 200 << 20


def test_a_gpu_is_used_where_there_is_one_and_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [machine.device(setting) for setting in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [machine.device(setting) for setting in ("auto", "cpu")] == ["cpu", "cpu"]
        assert not caplog.messages
        assert machine.device("cuda") == "cpu"
    assert caplog.messages == [
        "train.device=cuda: this machine has no GPU, so what is computed here is computed on its CPUs"
    ]


def test_bf16_is_slow_on_cpus_without_avx512_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(capability: str) -> list[bool]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return [machine.computes_bf16(device) for device in ("cpu", "cuda")]

    assert answers("AVX2") == [False, True]
    assert answers("AVX512") == answers("SVE256") == [True, True]


def test_a_process_is_counted_with_all_that_it_started() -> None:
    """The child holds memory, its parent hardly any."""
    child = f"b = bytearray({HELD}); b[::4096] = b'1' * len(b[::4096]); print('held', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert HELD < machine.family(process.pid) < machine.memory()
        process.stdin.close()
    assert machine.family(process.pid) == 0, "it has ended"


def test_the_peak_stays_when_memory_is_given_back() -> None:
    held = bytearray(HELD)
    held[::4096] = b"1" * len(held[::4096])
    with_it = psutil.Process().memory_info().rss
    del held
    assert HELD < with_it < 1.05 * machine.peak()  # the kernel counts pages of each processor with some delay
    assert machine.peak() < machine.memory()
