"""The machine's own ceilings, measured in the same run as the benchmarks that are held against them.

On CPU the loops are this library's own (`tlkernels._numpy`, over csrc/cpu): no library call between the number and the
hardware. A call runs on its thread and releases the GIL, so n Python threads measure n cores. On CUDA devices a large
device-to-device copy gives the bandwidth, and large matrix products give the arithmetic rates.
"""

from __future__ import annotations

import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

#: Working sets in bytes, over all threads together, from the private caches out to memory.
WORKING_SETS = tuple(2**k for k in (18, 20, 21, 22, 23, 24, 25, 26, 27, 28))


@dataclass
class Ceilings:
    """Peak rates. Bandwidths are by working-set size: bytes -> bytes/s; a copy counts bytes read and written."""

    threads: int = 0
    read: dict[int, float] = field(default_factory=dict)
    copy: dict[int, float] = field(default_factory=dict)
    fp32: float = 0.0  # flop/s
    bf16: float = 0.0
    note: str = ""

    def seconds(self, bytes_read: int, bytes_written: int, flops: int, arithmetic: str) -> float:
        """The least time for so many bytes and flops, or 0 where no ceiling was measured.

        What writes less than a tenth of its traffic is held against the read rate, the rest against the copy rate, at
        the problem's own working-set size.
        """
        total = bytes_read + bytes_written
        bandwidth = interpolate(self.read if bytes_written * 10 < total and self.read else self.copy, total)
        peak = (self.bf16 or self.fp32) if arithmetic == "bf16" else self.fp32
        return max(total / bandwidth if bandwidth else 0.0, flops / peak if peak else 0.0)


def interpolate(rates: dict[int, float], size: int) -> float:
    """The rate at a working-set size, linear in the logarithms, flat beyond the ends; 0 where none was measured."""
    if not rates:
        return 0.0
    sizes = sorted(rates)
    return float(
        math.exp(np.interp(math.log(max(size, 1)), [math.log(s) for s in sizes], [math.log(rates[s]) for s in sizes]))
    )


def measure(device: torch.device, threads: int, quick: bool = False) -> Ceilings:
    """Measure the ceilings of a device, with so many threads (CPU only)."""
    return _measure_cuda(device) if device.type == "cuda" else _measure_cpu(threads, quick)


# ---- CPU ------------------------------------------------------------------------------------------------------------


def _measure_cpu(threads: int, quick: bool) -> Ceilings:
    ceilings = Ceilings(threads=threads)
    try:
        loops: Any = importlib.import_module("tlkernels._numpy")
    except ImportError as error:
        ceilings.note = f"not measured: tlkernels._numpy is not built ({error}); the fractions are left out"
        return ceilings
    seconds = 0.02 if quick else 0.06
    for size in WORKING_SETS[::3] if quick else WORKING_SETS:
        ceilings.read[size] = _bandwidth(loops, "read", size, threads, seconds)
        ceilings.copy[size] = _bandwidth(loops, "copy", size, threads, seconds)
    ceilings.fp32 = _arithmetic(loops.roofline_fma_fp32, threads, seconds)
    ceilings.bf16 = _arithmetic(loops.roofline_dot_bf16, threads, seconds)
    return ceilings


def _bandwidth(loops: Any, kind: str, size: int, threads: int, seconds: float) -> float:
    """Best rate of `kind` over a working set cut among the threads; for a copy the better of both kinds of store."""
    arrays = 1 if kind == "read" else 2
    part = max(size // threads // arrays // 4096, 1) * 4096
    data = [_pages(part) for _ in range(threads)]
    if kind == "read":
        works = [lambda n: [lambda n=n, a=a: loops.roofline_read(a, n) for a in data]]
    else:
        out = [_pages(part) for _ in range(threads)]
        works = [
            lambda n, s=streaming: [
                lambda n=n, o=o, a=a: loops.roofline_copy(o, a, n, streaming=s) for o, a in zip(out, data, strict=True)
            ]
            for streaming in (False, True)
        ]
    return max(part * arrays * threads / _per_repeat(work, seconds) for work in works)


def _arithmetic(loop: Callable[[int], tuple[float, float]], threads: int, seconds: float) -> float:
    """Flop/s over all threads; 0 where the instruction set has no such instruction."""
    flops, _ = loop(1)
    if not flops:
        return 0.0
    return flops * threads / _per_repeat(lambda n: [lambda: loop(n)] * threads, seconds)


def _per_repeat(works: Callable[[int], list[Callable[[], Any]]], seconds: float) -> float:
    """Seconds per repeat, the best of five: a ceiling is what the machine can do when nothing disturbs it."""
    repeats = 1
    while (taken := _together(works(repeats))) < seconds / 4:
        repeats = max(2 * repeats, int(repeats * min(seconds / 3 / max(taken, 1e-9), 100)))
    return min(_together(works(repeats)) for _ in range(5)) / repeats


def _together(works: list[Callable[[], Any]]) -> float:
    """Seconds from when the first of them starts until the last is done, each in a thread of its own."""
    gate, times = threading.Barrier(len(works)), []

    def run(work: Callable[[], Any]) -> None:
        gate.wait()
        start = time.perf_counter()
        work()
        times.append((start, time.perf_counter()))

    pool = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if len(times) < len(works):
        raise RuntimeError("roofline: a loop failed; its error is printed above")
    return max(end for _, end in times) - min(start for start, _ in times)


def _pages(size: int) -> np.ndarray:
    """A page-aligned byte array, every page touched."""
    raw = np.ones(size + 4096, dtype=np.uint8)
    skip = -raw.ctypes.data % 4096
    return raw[skip : skip + size]


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def _measure_cuda(device: torch.device) -> Ceilings:
    ceilings = Ceilings(note="bandwidth: a device-to-device copy of 2 GiB; arithmetic: 8192^3 products of random data")
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ceilings.copy[2 * source.numel()] = 2 * source.numel() / _cuda_seconds(lambda: target.copy_(source))
    n = 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        setattr(ceilings, name, 2 * n**3 / _cuda_seconds(lambda a=a, b=b: torch.mm(a, b)))
    return ceilings


def _cuda_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
