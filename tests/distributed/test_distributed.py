"""Losses and steps across processes: groups of 1 to 4 run all cases of `distributed_cases`, each group once."""

from __future__ import annotations

import doctest
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # for the processes as well, which get this one's path

import distributed_cases

from tlkernels import distributed, ops
from tlkernels.distributed import contrastive, grad_cache

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

#: seconds that a group may take before it counts as hanging
PATIENCE = 150


def start(target: Callable[..., None], world: int, *arguments: Any) -> list[Any]:
    """`world` processes that run ``target(rank, world, *arguments)``, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    # what DDP, FSDP and the peers import when they are first used is imported once as well
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "distributed_cases"])
    processes = [context.Process(target=target, args=(rank, world, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any], seconds: float) -> bool:
    """Wait; end what has not ended then. Whether all ended by themselves."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    return not hanging


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_group(world: int, tmp_path: Path) -> None:
    """All cases for this size in one test: a group is started once, on whichever worker of pytest-xdist."""
    processes = start(distributed_cases.run_group, world, str(tmp_path / "store"), str(tmp_path / "report"))
    ended = finish(processes, PATIENCE)
    faults: list[str] = []
    for rank in range(world):
        file = tmp_path / f"report.{rank}"
        said = json.loads(file.read_text()) if file.exists() else {}
        faults += [f"{name}, {fault}" for name, fault in said.items() if fault]
        cases = [name for name, (worlds, _) in distributed_cases.CASES.items() if world in worlds]
        missing = [name for name in cases if name not in said]
        faults += [f"rank {rank} did not run {', '.join(missing)}"] if missing else []
    assert ended and not faults, "\n".join([*faults, "" if ended else "the group was hanging"])


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_process_dies(exchange: str, when: str, tmp_path: Path) -> None:
    """The others get an error within the group's timeout of four seconds."""
    processes = start(distributed_cases.die, 3, str(tmp_path / "store"), str(tmp_path / "report"), exchange, when)
    assert finish(processes, 40), "a process was hanging"
    for rank in (0, 1):
        said = (tmp_path / f"report.{rank}").read_text()
        assert said.split(":")[0] in ("RuntimeError", "DistBackendError", "DistNetworkError"), said


# ---- one process ----------------------------------------------------------------------------------------------------


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 4, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_alone(exchange: str) -> None:
    """Without a process group the losses are those of one process."""
    assert not dist.is_initialized()
    for ours, theirs in (
        (distributed.info_nce, ops.info_nce),
        (distributed.sigmoid_contrastive, ops.sigmoid_contrastive),
    ):
        x, y = features()
        got, want = ours(x, y, 2.0, -1.0, exchange=exchange), theirs(x, y, 2.0, -1.0)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        weights = torch.tensor(1.7, dtype=torch.float64)
        for a, b in zip(
            torch.autograd.grad(got, (x, y), weights), torch.autograd.grad(want, (x, y), weights), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_label_smoothing_alone(exchange: str, decoupled: bool) -> None:
    """What `ops.info_nce` computes, values and gradients, also of labels that leave columns out."""
    found = []
    for loss, options in ((distributed.info_nce, {"exchange": exchange}), (ops.info_nce, {})):
        x, y = features()
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([3, 0, -100, 6, 6])
        got = loss(x[:5], y, scale, -1.0, labels, label_smoothing=0.2, decoupled=decoupled, **options)
        (got * 1.7).backward()
        found.append((got.detach(), x.grad, y.grad, scale.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_launched_but_not_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"info_nce: WORLD_SIZE is 4, but torch.distributed is not initialized"):
        distributed.info_nce(x, y)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.info_nce(x, y).isfinite()
    with pytest.raises(RuntimeError, match=r"process_group is given, but torch.distributed is not initialized"):
        distributed.info_nce(x, y, process_group=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [distributed.CLIPLoss, distributed.SigLIPLoss, distributed.InfoNCELoss])
def test_wrong_exchange(module: Any) -> None:
    with pytest.raises(ValueError, match=f"{module.__name__}: exchange is 'bus'; expected 'gather' or 'ring'"):
        module(exchange="bus")


def test_examples() -> None:
    for module in (contrastive, grad_cache):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


def test_of_nothing_is_zero() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    for exchange in ("gather", "ring"):
        for loss in (distributed.info_nce, distributed.sigmoid_contrastive):
            got = loss(empty, empty, 1.0, 0.0, exchange=exchange)
            got.backward()
            assert got == 0 and empty.grad is not None and empty.grad.shape == (0, 4)
