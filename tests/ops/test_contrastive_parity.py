"""Against the losses that others publish: values, and the gradients of all their arguments.

open_clip (CLIP, SigLIP), pytorch-metric-learning (SupCon, NT-Xent) and lightly (NT-Xent, DCL).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tlkernels import ops

peers = pytest.importorskip("bench.peers", reason="the benchmarks, which know how to import the peers, are not here")

# They compute in float32 on a stored matrix, some with a small constant in a logarithm or a denominator.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_parity(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Of three times the loss, so that a gradient that ignores what comes after it is found."""
    values, gradients = [], []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        loss = function(*leaves)
        values.append(loss)
        gradients.append(torch.autograd.grad(3 * loss, leaves))
    tolerance = TOLERANCE[tensors[0].dtype]
    assert values[0].shape == values[1].shape == ()
    torch.testing.assert_close(*values, rtol=tolerance, atol=0)
    for mine, other in zip(*gradients, strict=True):
        assert other.any()
        torch.testing.assert_close(mine, other, rtol=20 * tolerance, atol=tolerance * float(other.abs().max() + 0.1))


def normalized(t: Tensor) -> Tensor:
    return functional.normalize(t, dim=-1)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ROWS = pytest.mark.parametrize("rows", [2, 37, 130])


@DTYPES
@ROWS
def test_clip_of_open_clip(backend: str, rows: int, dtype: torch.dtype) -> None:
    theirs = peers.submodule("open_clip.loss").ClipLoss()
    x, y = (normalized(randn(rows, 64, seed=i, dtype=dtype)) for i in range(2))
    for scale in (1.0, 14.3, 100.0):
        assert_parity(ops.info_nce, theirs, x, y, torch.tensor(scale, dtype=dtype))
        assert_parity(  # with the scale as CLIP learns it
            lambda x, y, t: ops.info_nce(x, y, t.exp()), lambda x, y, t: theirs(x, y, t.exp()),
            x, y, torch.tensor(scale, dtype=dtype).log() + 0.01,
        )  # fmt: skip


@DTYPES
@ROWS
def test_siglip_of_open_clip(backend: str, rows: int, dtype: torch.dtype) -> None:
    theirs = peers.submodule("open_clip.loss").SigLipLoss()
    x, y = (normalized(randn(rows, 64, seed=i, dtype=dtype)) for i in range(2))
    for scale, bias in ((10.0, -10.0), (30.0, -3.0), (1.0, 0.5)):
        scalars = torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)
        assert_parity(ops.sigmoid_contrastive, theirs, x, y, *scalars)
        assert_parity(
            lambda x, y, s, b: ops.sigmoid_contrastive(x, y, s, b, reduction="none").mean(), theirs, x, y, *scalars
        )
        assert_parity(
            lambda x, y, s, b: ops.sigmoid_contrastive(x, y, s, b, negative_only=True),
            lambda x, y, s, b: theirs._loss(x, y, s, b, negative_only=True), x, y, *scalars,
        )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_sup_con_of_pytorch_metric_learning(backend: str, temperature: float, dtype: torch.dtype) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.SupConLoss(temperature=temperature)
    for classes in (2, 7, 20):  # of the last, some anchors have no positive: both leave them out of the mean
        labels = torch.randint(0, classes, (41,), generator=torch.Generator().manual_seed(classes))
        assert_parity(
            lambda z, labels=labels: ops.sup_con(normalized(z), labels, temperature=temperature),
            lambda z, labels=labels: theirs(z, labels), randn(41, 32, dtype=dtype),
        )  # fmt: skip
        ref_labels = labels.roll(3)[:30]
        assert_parity(
            lambda z, ref, labels=labels, ref_labels=ref_labels: ops.sup_con(
                normalized(z), labels, normalized(ref), ref_labels, temperature=temperature
            ),
            lambda z, ref, labels=labels, ref_labels=ref_labels: theirs(z, labels, ref_emb=ref, ref_labels=ref_labels),
            randn(41, 32, dtype=dtype), randn(30, 32, seed=1, dtype=dtype),
        )  # fmt: skip


@DTYPES
@ROWS
def test_nt_xent_of_pytorch_metric_learning(backend: str, rows: int, dtype: torch.dtype) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs, labels = losses.NTXentLoss(temperature=0.2), torch.arange(rows).repeat(2)
    assert_parity(
        lambda z: ops.nt_xent(normalized(z), temperature=0.2), lambda z: theirs(z, labels),
        randn(2 * rows, 32, dtype=dtype),
    )  # fmt: skip


@DTYPES
@ROWS
def test_nt_xent_of_lightly(backend: str, rows: int, dtype: torch.dtype) -> None:
    theirs = peers.submodule("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.1)
    z = randn(rows, 32, dtype=dtype), randn(rows, 32, seed=1, dtype=dtype)
    assert_parity(lambda a, b: ops.nt_xent(normalized(a), normalized(b), temperature=0.1), theirs, *z)


@ROWS
def test_moco_of_lightly(backend: str, rows: int) -> None:
    """Its NT-Xent with a memory bank: the other view of each sample, and a queue that belongs to nobody."""
    torch.manual_seed(0)
    theirs = peers.submodule("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=0.1, memory_bank_size=(150, 32))
    queue = theirs.memory_bank.bank.clone()  # before it takes up these views

    def ours(a: Tensor, b: Tensor) -> Tensor:
        a, b = normalized(a), normalized(b)
        near, far = 10 * (a * b).sum(1), ops.sim_lse(a, queue, 10.0, cols=False).row
        return (torch.logaddexp(near, far) - near).mean()

    assert_parity(ours, theirs, randn(rows, 32), randn(rows, 32, seed=1))


@DTYPES
@ROWS
def test_dcl_of_lightly(backend: str, rows: int, dtype: torch.dtype) -> None:
    """Its negatives are those of both views: two log-sum-exps without the sample itself, merged."""
    theirs = peers.submodule("lightly.loss.dcl_loss").DCLLoss(temperature=0.1)

    def direction(a: Tensor, b: Tensor) -> Tensor:
        itself = torch.arange(rows)
        across = ops.info_nce(a, b, 10.0, symmetric=False, decoupled=True, reduction="none", return_lse=True)
        positive = across[1] - across[0]
        return (ops.lse_merge(across[1], ops.sim_lse(a, None, 10.0, exclude=itself).row) - positive).mean()

    def ours(a: Tensor, b: Tensor) -> Tensor:
        a, b = normalized(a), normalized(b)
        return (direction(a, b) + direction(b, a)) / 2

    assert_parity(ours, theirs, randn(rows, 32, dtype=dtype), randn(rows, 32, seed=1, dtype=dtype))
