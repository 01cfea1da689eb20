"""Check, then time: every provider of a case in one process, in turns.

A case is run in this order: each provider's first result is held against float64; the memory of one call is measured;
then the providers take turns, one sample each a round, so that a drifting clock or a busy neighbour hits them alike.
A sample of a short call is a loop over as many calls as fill `MIN_SAMPLE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.registry import Case, Problem, Provider, Run, dtype_name
from bench.roofline import Ceilings

MIN_SAMPLE_SECONDS = 2e-3
SLOW_CALL_SECONDS = 0.3
WARM_CALL_SECONDS = 20e-3  # calls shorter than this run once untimed before each sample, on warm caches


@dataclass(frozen=True)
class Effort:
    """How long a provider may take on a case, and within which bounds the number of samples stays."""

    seconds: float = 0.25
    least: int = 3
    most: int = 25


FULL, QUICK = Effort(), Effort(seconds=0.05, least=3, most=7)
CUDA = Effort(least=3, most=3)  # turns; each is a do_bench of many calls


@dataclass
class Row:
    """A line of the report: one provider on one case."""

    op: str
    shape: str
    rows: int | None
    dtype: str
    provider: str
    ours: bool
    threads: int
    seconds: float = math.nan
    lower_quartile: float = math.nan
    upper_quartile: float = math.nan
    samples: int = 0
    error: float = math.nan
    right: bool = False
    extra_bytes: int | None = None
    bytes_per_second: float = math.nan
    flops_per_second: float = math.nan
    fraction: float = math.nan  # of the machine's ceiling
    speedup: float = math.nan  # over the best peer whose result is right
    best_peer: str = ""
    note: str = ""
    yardstick: bool = False  # computes something else that the rest is held against: no peer


@dataclass
class _Contender:
    provider: Provider
    run: Run
    row: Row
    estimate: float
    samples: list[float]


def run_case(
    problem: Problem, providers: list[Provider], ceilings: Ceilings, effort: Effort, device: torch.device
) -> list[Row]:
    """Check and time all providers on one problem."""
    clock = _cuda_samples if device.type == "cuda" else _cpu_samples
    rows, contenders = [], []
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # the collections before each measurement of memory need not look at what large packages hold
    for provider in providers:
        row = _row(problem.case, provider, device)
        try:
            with provider.context():
                run = provider.prepare(problem)
                if run is None:
                    continue
                row.yardstick = run.yardstick
                row.error = (run.error or problem.error)(run.call())
                row.extra_bytes = extra_memory(run.whole or run.call, problem.output_bytes, device)
                estimate = _estimate(run.call, device)
                if row.extra_bytes and estimate < SLOW_CALL_SECONDS:  # what else grew meanwhile is not the call's
                    again = extra_memory(run.whole or run.call, problem.output_bytes, device)
                    row.extra_bytes = min(row.extra_bytes, again or 0)
            contenders.append(_Contender(provider, run, row, estimate, []))
        except Exception as failure:  # a peer that fails is a line of the table, not the end of the run
            row.note = f"raises {type(failure).__name__}: {_first_sentence(failure)}"
        row.right = not row.note and row.error <= problem.tolerance
        if not row.note and not row.right:
            row.note = f"wrong: error {row.error:.1e}, tolerance {problem.tolerance:.0e}"
        elif row.yardstick and row.right:
            row.note = "a yardstick, not a peer"
        rows.append(row)
    _take_turns(contenders, clock, effort)
    for contender in contenders:
        _fill(contender.row, contender.samples, problem, ceilings)
    compare(rows)
    return rows


def _first_sentence(failure: Exception, most: int = 120) -> str:
    text = str(failure).strip().partition("\n")[0].partition(". ")[0]
    return text if len(text) <= most else text[: most - 3] + "..."


def _row(case: Case, provider: Provider, device: torch.device) -> Row:
    return Row(
        op=case.op,
        shape="x".join(map(str, case.shape)),
        rows=case.rows,
        dtype=dtype_name(case.dtype),
        provider=provider.name,
        ours=provider.ours,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _fill(row: Row, samples: list[float], problem: Problem, ceilings: Ceilings) -> None:
    row.lower_quartile, row.seconds, row.upper_quartile = (float(q) for q in np.percentile(samples, (25, 50, 75)))
    row.samples = len(samples)
    if row.yardstick:  # the problem's bytes and operations are not what it needs
        return
    row.bytes_per_second = (problem.bytes_read + problem.bytes_written) / row.seconds
    row.flops_per_second = problem.flops / row.seconds if problem.flops else math.nan
    least = ceilings.seconds(problem.bytes_read, problem.bytes_written, problem.flops, problem.ceiling)
    row.fraction = least / row.seconds if least and row.right else math.nan


def compare(rows: list[Row]) -> None:
    """Fill in the speed-ups of one case's rows: over the fastest peer among those whose results are right."""
    peers = [row for row in rows if not row.ours and row.right and not row.yardstick]
    best = min(peers, key=lambda row: row.seconds, default=None)
    for row in rows:
        comparable = row.right and not row.yardstick
        row.speedup = best.seconds / row.seconds if best is not None and comparable else math.nan
        row.best_peer = best.provider if best is not None else ""


# ---- time -----------------------------------------------------------------------------------------------------------


def _take_turns(contenders: list[_Contender], clock: Callable[[Run, float], list[float]], effort: Effort) -> None:
    quota = {c.provider.name: _quota(c.estimate, effort) for c in contenders}
    for turn in range(effort.most):
        for c in contenders:
            if turn < quota[c.provider.name]:
                with c.provider.context():
                    c.samples += clock(c.run, c.estimate)


def _quota(estimate: float, effort: Effort) -> int:
    if estimate > SLOW_CALL_SECONDS:  # of a slow call one sample says enough, beside those that are not
        return 1
    return int(min(max(effort.seconds / max(estimate, MIN_SAMPLE_SECONDS), effort.least), effort.most))


def _estimate(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cpu_samples(run: Run, estimate: float) -> list[float]:
    loops = max(1, math.ceil(MIN_SAMPLE_SECONDS / max(estimate, 1e-7)))
    if estimate < WARM_CALL_SECONDS:
        run.call()
    start = time.perf_counter()
    for _ in range(loops):
        run.call()
    return [(time.perf_counter() - start) / loops]


def _cuda_samples(run: Run, estimate: float) -> list[float]:
    """Device times of calls on a cold second-level cache (do_bench clears it before each)."""
    from triton.testing import do_bench

    times: list[float] = do_bench(run.call, warmup=1, rep=4, return_mode="all")
    return [t / 1e3 for t in times]


# ---- memory ---------------------------------------------------------------------------------------------------------


def extra_memory(call: Callable[[], Any], output_bytes: int, device: torch.device) -> int | None:
    """Peak memory that a call takes beyond its inputs and its output, in bytes.

    On CPU this is the process's peak resident set (which the kernel's own counter, reset before the call, reports)
    less the resident set before: scratch is counted whoever allocated it. Freed memory that the C library holds back
    is given back first, or a call could hide in it. Scratch that a library keeps from an earlier call is not seen. On
    CUDA devices it is the peak of torch's allocator. None where the kernel offers no such counter.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return max(0, torch.cuda.max_memory_allocated(device) - before - output_bytes)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before - output_bytes)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
