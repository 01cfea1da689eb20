"""Diagnostics, contrastive decoding and canonical correlation, against formulas, lightly and scikit-learn."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA as SklearnCCA
from torch import Tensor
from torch.nn import functional

from bench.peers import submodule
from tlkernels.methods.multimodal import correlation, decoding, diagnostics

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).requires_grad_(grad)


def assert_same(out: Tensor, want: Tensor, variables: list[Tensor], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(out, want, rtol=rtol, atol=1e-12)
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out) if out.dim() else torch.tensor(-1.7)
    got = torch.autograd.grad(out, variables, weights.to(out), retain_graph=True)
    wanted = torch.autograd.grad(want, variables, weights.to(out), retain_graph=True)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", ["decoding", "retrieval"])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tlkernels.methods.multimodal.{name}"))
    assert result.attempted > 0 and result.failed == 0


# ---- gap, alignment, uniformity -------------------------------------------------------------------------------------


def test_modality_gap() -> None:
    x, y = randn(7, 5, grad=True), randn(11, 5, seed=1, grad=True)
    unit = [t / t.square().sum(1, keepdim=True).sqrt() for t in (x, y)]
    gap = diagnostics.modality_gap(x, y)
    delta = unit[0].sum(0) / 7 - unit[1].sum(0) / 11
    assert_same(gap.vector, delta, [x, y])
    assert_same(gap.distance, delta.square().sum().sqrt(), [x, y])
    assert_same(diagnostics.modality_gap(x, y, normalize=False).vector, x.mean(0) - y.mean(0), [x, y])
    # two opposite points are 2 apart, and half of the features moved to the other side leave no gap
    point = functional.one_hot(torch.zeros(6, dtype=torch.int64), 4).double()
    assert float(diagnostics.modality_gap(point, -3 * point).distance) == 2.0
    mixed = torch.cat([point[:3], -point[:3]])
    assert float(diagnostics.modality_gap(mixed, -mixed).distance) == 0.0


def test_shift_modality_gap() -> None:
    x, y = randn(6, 4, grad=True), randn(9, 4, seed=1, grad=True)
    a, b = (functional.normalize(t) for t in (x, y))
    delta = a.mean(0) - b.mean(0)
    for shift in (-0.3, 0.5, 1.2):
        got = diagnostics.shift_modality_gap(x, y, shift)
        assert_same(got[0], functional.normalize(a - shift * delta), [x, y])
        assert_same(got[1], functional.normalize(b + shift * delta), [x, y])
    for t, unit in zip(diagnostics.shift_modality_gap(x, y, 0.0), (a, b), strict=True):
        torch.testing.assert_close(t, unit)
    one = diagnostics.shift_modality_gap(x[:1], y[:1], 0.4, gap=delta)[0]
    torch.testing.assert_close(one, functional.normalize(a[:1] - 0.4 * delta))


def test_mean_cosine() -> None:
    x = randn(8, 5, grad=True)
    cosine = functional.cosine_similarity(x[:, None], x[None], dim=2)
    assert_same(diagnostics.mean_cosine(x), (cosine.sum() - cosine.trace()) / 56, [x])
    assert float(diagnostics.mean_cosine(torch.eye(5) * 3)) == 0.0
    assert float(diagnostics.mean_cosine(torch.ones(4, 3).bfloat16())) == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [2.0, 1.0, 3.5])
@pytest.mark.parametrize("normalize", [True, False])
def test_alignment(alpha: float, normalize: bool) -> None:
    x, y = randn(7, 5, grad=True), randn(7, 5, seed=1, grad=True)
    a, b = (functional.normalize(t) if normalize else t for t in (x, y))
    want = (a - b).square().sum(1).sqrt().pow(alpha).mean()
    assert_same(diagnostics.alignment(x, y, alpha=alpha, normalize=normalize), want, [x, y])
    same = diagnostics.alignment(x, x, alpha=alpha)  # no distance: 0, and a gradient that is a number
    assert same.item() == 0.0 and torch.autograd.grad(same, x)[0].isfinite().all()


@pytest.mark.parametrize("t", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_uniformity(t: float, normalize: bool) -> None:
    x = randn(9, 6, grad=True)
    unit = functional.normalize(x) if normalize else x
    want = torch.stack([torch.exp(-t * (unit[i] - unit[j]).square().sum()) for i in range(9) for j in range(i)])
    assert_same(diagnostics.uniformity(x, t=t, normalize=normalize), want.mean().log(), [x])


def test_uniformity_closed_forms() -> None:
    n = 6
    # all alike: 0; orthogonal: d^2 = 2; opposite pairs: (n / 2 at d^2 = 4 and the rest at 2) of n (n - 1) / 2
    assert float(diagnostics.uniformity(torch.ones(n, 3).double())) == pytest.approx(0.0, abs=1e-14)
    assert float(diagnostics.uniformity(torch.eye(n).double(), t=1.5)) == pytest.approx(-3.0)
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    want = math.log((3 * math.exp(-8) + 12 * math.exp(-4)) / 15)
    assert float(diagnostics.uniformity(points)) == pytest.approx(want)
    # on the sphere, E exp(2 t u.v) of uniform directions in three dimensions is sinh(2 t) / (2 t)
    many = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    assert float(diagnostics.uniformity(many)) == pytest.approx(math.log(math.sinh(4) / 4) - 4, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniformity_dtypes(dtype: torch.dtype) -> None:
    x = randn(40, 16).to(dtype).requires_grad_()
    out = diagnostics.uniformity(x)
    assert out.dtype == torch.float32
    exact = x.detach().double().requires_grad_()
    want = diagnostics.uniformity(exact)
    assert out.item() == pytest.approx(want.item(), abs=1e-5)
    got, wanted = torch.autograd.grad(out, x)[0], torch.autograd.grad(want, exact)[0]
    assert got.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert float((got.double() - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize(("t", "weight", "alpha"), [(1.0, 1.0, 2.0), (2.0, 0.4, 3.0)])
def test_loss_as_lightly(t: float, weight: float, alpha: float) -> None:
    theirs = submodule("lightly.loss.hypersphere_loss").HypersphereLoss(t=t, lam=weight, alpha=alpha)
    x, y = randn(12, 8, grad=True), randn(12, 8, seed=1, grad=True)
    ours = diagnostics.alignment_uniformity_loss(x, y, alpha=alpha, t=t, weight=weight)
    assert_same(ours, theirs(x, y), [x, y])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: diagnostics.modality_gap(x, x[:, :2]), ValueError, r"modality_gap: y has shape \(4, 2\)"),
        (lambda x: diagnostics.modality_gap(x[:0], x), ValueError, r"modality_gap: x has shape \(0, 3\)"),
        (lambda x: diagnostics.shift_modality_gap(x, x, 0.1, gap=x), ValueError, r"gap has shape \(4, 3\); expected"),
        (lambda x: diagnostics.mean_cosine(x[:1]), ValueError, r"mean_cosine: x has shape \(1, 3\)"),
        (lambda x: diagnostics.alignment(x, x[:2]), ValueError, r"alignment: y has shape \(2, 3\)"),
        (lambda x: diagnostics.alignment(x, x, alpha=0.0), ValueError, "alignment: alpha is 0.0; expected > 0"),
        (lambda x: diagnostics.uniformity(x, t=-1.0), ValueError, "uniformity: t is -1.0; expected > 0"),
        (lambda x: diagnostics.uniformity(x[:1]), ValueError, r"uniformity: x has shape \(1, 3\).*with 2 rows"),
        (lambda x: diagnostics.uniformity(x.long()), TypeError, "uniformity: x has dtype int64"),
    ],
)  # fmt: skip
def test_diagnostics_wrong_calls(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(torch.ones(4, 3))


# ---- contrastive decoding -------------------------------------------------------------------------------------------


def test_contrastive_logits() -> None:
    logits, distorted = randn(3, 4, 9, grad=True), randn(3, 4, 9, seed=1, grad=True)
    alpha, beta = 0.7, 0.3
    out = decoding.contrastive_logits(logits, distorted, alpha=alpha, beta=beta)
    p = logits.softmax(-1)
    plausible = p >= beta * p.amax(-1, keepdim=True)
    assert plausible.any(-1).all() and not plausible.all()
    assert torch.equal(out > -torch.inf, plausible) and torch.equal(decoding.plausible_tokens(logits, beta), plausible)
    # as a distribution: p^(1 + alpha) / p'^alpha among the plausible
    ratio = (p ** (1 + alpha) / distorted.softmax(-1) ** alpha) * plausible
    assert_same(out.softmax(-1), ratio / ratio.sum(-1, keepdim=True), [logits, distorted])
    torch.testing.assert_close(out[plausible], ((1 + alpha) * logits - alpha * distorted)[plausible])


def test_contrastive_logits_at_the_ends() -> None:
    logits, distorted = randn(5, 7), randn(5, 7, seed=1)
    assert torch.equal(decoding.contrastive_logits(logits, distorted, alpha=0.0, beta=0.0), logits)
    best = decoding.contrastive_logits(logits, distorted, beta=1.0)
    assert torch.equal(best.isfinite(), functional.one_hot(logits.argmax(1), 7).bool())
    # what was impossible stays so, and makes no NaN
    blocked = logits.index_fill(1, torch.tensor([2]), -torch.inf).requires_grad_()
    out = decoding.contrastive_logits(blocked, distorted.index_fill(1, torch.tensor([2]), -torch.inf), beta=0.0)
    assert (out[:, 2] == -torch.inf).all() and out[:, :2].isfinite().all()
    out.softmax(-1)[:, 0].sum().backward()
    assert blocked.grad is not None and blocked.grad.isfinite().all()
    half = decoding.contrastive_logits(logits.half(), distorted.half(), beta=0.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, 2 * logits.half().float() - distorted.half().float(), rtol=0, atol=0)


def test_diffusion_noise() -> None:
    image = torch.full((200, 3, 40), 2.5, dtype=DOUBLE)
    b = 1e-5 + (0.005 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    for step in (0, 500, 999):
        kept = float(np.prod(1 - b[: step + 1]))
        noisy = decoding.diffusion_noise(image, step, generator=torch.Generator().manual_seed(step))
        deviation = (1 - kept) ** 0.5
        assert float(noisy.mean()) == pytest.approx(2.5 * kept**0.5, abs=4.5 * deviation / 24000**0.5)
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.02)
        noise = torch.empty_like(image).normal_(generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(noisy, kept**0.5 * image + deviation * noise)
    low = decoding.diffusion_noise(image.bfloat16(), 10)
    assert low.dtype == torch.bfloat16 and low.shape == image.shape
    # of two steps with the noise levels of the ends
    assert float(decoding.diffusion_noise(image, 0, num_steps=2).std()) == pytest.approx(math.sqrt(b[0]), rel=0.02)


class Cached:
    """A language model whose next logits depend on all tokens so far, which its state holds, and on an image."""

    def __init__(self, vocabulary: int = 6) -> None:
        self.embed, self.out = randn(vocabulary, 5), randn(5, vocabulary, seed=1) * 2
        self.calls = 0

    def whole(self, tokens: Tensor, image: Tensor) -> Tensor:
        weights = torch.arange(1, tokens.shape[1] + 1, dtype=DOUBLE)
        hidden = (self.embed[tokens] * weights[None, :, None]).sum(1) / weights.sum()
        return torch.tanh(hidden + image) @ self.out

    def step(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.calls += 1
        past, image = state
        past = torch.cat([past, tokens], 1)
        return self.whole(past, image), (past, image)


def test_decoder_greedy() -> None:
    model, image, distorted = Cached(), randn(3, 5, seed=4), randn(3, 5, seed=5)
    none = torch.zeros(3, 0, dtype=torch.int64)
    prompt = torch.tensor([[0, 1], [2, 3], [4, 5]])
    decoder = decoding.ContrastiveDecoder(
        model.step, (none, image), (none, distorted), alpha=1.5, beta=0.2, greedy=True
    )
    got = decoder.generate(prompt, 8)
    assert model.calls == 16
    tokens = prompt
    for _ in range(8):
        p, q = (model.whole(tokens, v).softmax(-1) for v in (image, distorted))
        score = (p**2.5 / q**1.5) * (p >= 0.2 * p.amax(1, keepdim=True))
        tokens = torch.cat([tokens, score.argmax(1, keepdim=True)], 1)
    assert torch.equal(got, tokens[:, 2:])
    plain = decoding.ContrastiveDecoder(model.step, (none, image), (none, distorted), alpha=0.0, greedy=True)
    assert not torch.equal(plain.generate(prompt, 8), got)
    # a sequence that has ended is filled up, and the others are as before
    end = int(got[0, 2])
    decoder = decoding.ContrastiveDecoder(
        model.step, (none, image), (none, distorted), alpha=1.5, beta=0.2, greedy=True
    )
    ended = decoder.generate(prompt, 8, eos_token_id=end)
    for row, full in zip(ended, got, strict=True):
        where = (full == end).nonzero()
        stop = int(where[0]) if len(where) else 8
        assert torch.equal(row[: stop + 1], full[: min(stop + 1, ended.shape[1])]) and (row[stop:] == end).all()


def test_decoder_samples() -> None:
    logits, distorted = randn(1, 5).expand(20000, 5), randn(1, 5, seed=3).expand(20000, 5)
    decoder = decoding.ContrastiveDecoder(
        lambda tokens, state: (state, state), logits, distorted, alpha=0.8, beta=0.2, temperature=1.7,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    drawn = decoder.next(torch.zeros(20000, 1, dtype=torch.int64))
    p = logits[0].softmax(0)
    want = (1.8 * logits[0] - 0.8 * distorted[0]).masked_fill(p < 0.2 * p.max(), -torch.inf).div(1.7).softmax(0)
    assert (want == 0).any()
    found = torch.bincount(drawn, minlength=5) / 20000
    assert ((found - want).abs() <= 4.5 * (want * (1 - want) / 20000).sqrt()).all()


def test_decoder_keeps_its_state_on_errors() -> None:
    states: list[Any] = []

    def step(tokens: Tensor, state: int) -> tuple[Tensor, int]:
        states.append(state)
        if len(states) == 2:
            raise RuntimeError("out of memory")
        return torch.zeros(1, 3), state + 1

    decoder = decoding.ContrastiveDecoder(step, 10, 20, greedy=True)
    token = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.next(token)
    decoder.next(token)
    decoder.next(token)
    assert states == [10, 20, 10, 20, 11, 21]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: decoding.contrastive_logits(x, x[:1]), ValueError, r"distorted_logits has shape \(1, 3\); expected"),
        (lambda x: decoding.contrastive_logits(x.long(), x), TypeError, "logits has dtype int64"),
        (lambda x: decoding.contrastive_logits(x, x, alpha=-1.0), ValueError, "alpha is -1.0; expected >= 0"),
        (lambda x: decoding.contrastive_logits(x, x, beta=2.0), ValueError, "beta is 2.0; expected 0 <= beta <= 1"),
        (lambda x: decoding.plausible_tokens(x, -0.1), ValueError, "plausible_tokens: beta is -0.1"),
        (lambda x: decoding.diffusion_noise(x, 1000), ValueError, "step is 1000 of num_steps 1000"),
        (lambda x: decoding.ContrastiveDecoder(None, 0, 0, temperature=0.0), ValueError, "temperature is 0.0"),  # type: ignore[arg-type]
        (lambda x: decoding.ContrastiveDecoder(None, 0, 0, beta=-1.0), ValueError, "ContrastiveDecoder: beta is -1"),  # type: ignore[arg-type]
        (lambda x: decoding.ContrastiveDecoder(lambda t, s: (x, s), 0, 0).next(x), ValueError, "tokens has dtype"),
        (lambda x: decoding.ContrastiveDecoder(lambda t, s: (x, s), 0, 0).generate(x.long(), 0), ValueError,
         "max_new_tokens is 0; expected 1 or more"),
    ],
)  # fmt: skip
def test_decoding_wrong_calls(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(torch.ones(2, 3))


# ---- canonical correlation ------------------------------------------------------------------------------------------


def two_views(n: int, p: int, q: int, shared: int = 2) -> tuple[Tensor, Tensor]:
    hidden = randn(n, shared, seed=7)
    x = hidden @ randn(shared, p, seed=8) + 0.7 * randn(n, p, seed=9) + 3.0
    return x, hidden @ randn(shared, q, seed=10) + 0.9 * randn(n, q, seed=11) - 1.0


def formula(x: Tensor, y: Tensor, reg: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """(singular values, A, B) of the whitened cross-covariance, by the definition."""
    x, y = x - x.mean(0), y - y.mean(0)
    n = x.shape[0] - 1
    whitening = []
    for view, r in ((x, reg[0]), (y, reg[1])):
        values, vectors = torch.linalg.eigh(view.T @ view / n + r * torch.eye(view.shape[1], dtype=DOUBLE))
        whitening.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
    u, d, vh = torch.linalg.svd(whitening[0] @ (x.T @ y / n) @ whitening[1], full_matrices=False)
    return d, whitening[0] @ u, whitening[1] @ vh.T


@pytest.mark.parametrize(("p", "q"), [(4, 6), (5, 3), (1, 3)])
@pytest.mark.parametrize("reg", [0.0, 0.3, (0.1, 2.0)])
def test_cca_formula(p: int, q: int, reg: Any) -> None:
    x, y = two_views(60, p, q)
    found = correlation.cca(x, y, reg=reg)
    k = min(p, q)
    d, a, b = formula(x, y, reg if isinstance(reg, tuple) else (reg, reg))
    torch.testing.assert_close(found.correlations, d)
    sign = (found.x_weights * a[:, :k]).sum(0).sign()
    torch.testing.assert_close(found.x_weights, a[:, :k] * sign)
    torch.testing.assert_close(found.y_weights, b[:, :k] * sign)
    assert (found.x_weights.gather(0, found.x_weights.abs().argmax(0, keepdim=True)) > 0).all()
    u, v = found.transform_x(x), found.transform_y(y.numpy())
    if reg == 0.0:
        # uncorrelated variates of variance 1, correlated across the views by d alone
        together = torch.cov(torch.cat([u, v], 1).T)
        cross, eye = torch.diag(d[:k]), torch.eye(k, dtype=DOUBLE)
        torch.testing.assert_close(together, torch.cat([torch.cat([eye, cross]), torch.cat([cross, eye])], 1))
    fewer = correlation.cca(x, y, 1, reg=reg)
    torch.testing.assert_close(fewer.x_weights, found.x_weights[:, :1])


def test_cca_as_sklearn() -> None:
    x, y = two_views(200, 5, 4, shared=3)
    found = correlation.cca(x.numpy(), y.numpy(), 3)
    theirs = SklearnCCA(n_components=3, max_iter=20000, tol=1e-14).fit(x.numpy(), y.numpy())
    u, v = theirs.transform(x.numpy(), y.numpy())
    for i in range(3):
        r = np.corrcoef(u[:, i], v[:, i])[0, 1]
        assert float(found.correlations[i]) == pytest.approx(r, abs=1e-7)
        mine = found.transform_x(x)[:, i].numpy()
        assert abs(np.corrcoef(u[:, i], mine)[0, 1]) == pytest.approx(1.0, abs=1e-7)


def test_cca_closed_forms() -> None:
    x = randn(30, 4)
    # one view is an invertible map of the other: all correlations are 1; for one feature it is Pearson's
    found = correlation.cca(x, x @ randn(4, 4, seed=3) + 5.0)
    torch.testing.assert_close(found.correlations, torch.ones(4, dtype=DOUBLE))
    a, b = x[:, 0], x[:, 0] + x[:, 1]
    pearson = torch.corrcoef(torch.stack([a, b]))[0, 1]
    torch.testing.assert_close(correlation.cca(a[:, None], -b[:, None]).correlations[0], pearson)
    # directions of no variance are left out, also where there are more features than samples
    doubled = torch.cat([x, x], 1)
    found = correlation.cca(doubled, x[:, :3])
    assert found.correlations.shape == (3,) and found.x_weights.shape == (8, 3)
    torch.testing.assert_close(found.correlations, torch.ones(3, dtype=DOUBLE))
    assert correlation.cca(randn(5, 9), randn(5, 7)).correlations.shape == (4,)
    # badly conditioned: the square of this condition number is beyond float64
    scale = torch.tensor([1.0, 1e-5, 1e-9, 1e4], dtype=DOUBLE)
    y = x @ randn(4, 3, seed=5) + randn(30, 3, seed=6)
    torch.testing.assert_close(correlation.cca(x * scale, y).correlations, correlation.cca(x, y).correlations,
                               rtol=1e-5, atol=0)  # fmt: skip


@pytest.mark.parametrize(("p", "q", "k"), [(4, 3, None), (3, 5, 2), (4, 4, 1)])
@pytest.mark.parametrize("reg", [0.0, 0.2, (0.05, 0.3)])
def test_deep_cca_gradient(p: int, q: int, k: int | None, reg: Any) -> None:
    x, y = (v.requires_grad_() for v in two_views(25, p, q))
    regs = reg if isinstance(reg, tuple) else (reg, reg)
    # autograd through the decompositions: here the eigenvalues are apart, and its answer is right
    want = formula(x, y, regs)[0][:k].sum()
    out = correlation.canonical_correlation(x, y, k, reg=reg)
    assert_same(out, want, [x, y], rtol=1e-8)
    loss = correlation.DCCALoss(k, reg=reg)
    assert torch.autograd.gradcheck(loss, (x, y))
    for mine, other in ((x, y), (y, x)):
        alone = correlation.canonical_correlation(mine, other.detach(), k, reg=regs if mine is x else regs[::-1])
        torch.testing.assert_close(torch.autograd.grad(alone, mine)[0], torch.autograd.grad(out, mine,
                                   retain_graph=True)[0])  # fmt: skip


def test_deep_cca_where_eigenvalues_are_equal() -> None:
    """White views: autograd through the decompositions divides by differences of equal eigenvalues."""
    basis = torch.linalg.qr(randn(20, 6) - randn(20, 6).mean(0)).Q * math.sqrt(19)
    x, y = basis[:, :3].clone().requires_grad_(), (basis[:, :3] * 0.6 + basis[:, 3:] * 0.8).requires_grad_()
    out = correlation.canonical_correlation(x, y, reg=0.0)
    assert float(out) == pytest.approx(1.8)
    grad = torch.autograd.grad(out, [x, y])
    # S11 = S22 = 1, S12 = 0.6: U V' = 1, and the gradient is (y - 0.6 x) / (n - 1)
    torch.testing.assert_close(grad[0], (y - 0.6 * x) / 19)
    torch.testing.assert_close(grad[1], (x - 0.6 * y) / 19)


def test_deep_cca_learns() -> None:
    """Gradient ascent on linear maps reaches the sum of the canonical correlations."""
    x, y = two_views(80, 5, 6)
    best = float(correlation.cca(x, y, 2).correlations.sum())
    a, b = randn(5, 2, seed=1).requires_grad_(), randn(6, 2, seed=2).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)
    loss = correlation.DCCALoss(reg=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x @ a, y @ b)
        value.backward()
        return value

    start = -float(loss(x @ a, y @ b))
    optimizer.step(closure)
    assert start < best - 0.1 and -float(loss(x @ a, y @ b)) == pytest.approx(best, abs=1e-5)


def test_deep_cca_dtypes() -> None:
    x, y = (v.float().requires_grad_() for v in two_views(50, 4, 3))
    exact = correlation.canonical_correlation(x.double(), y.double())
    wide = correlation.canonical_correlation(x, y, dtype=DOUBLE)
    assert wide.dtype == DOUBLE and torch.equal(wide, exact)
    assert torch.autograd.grad(wide, x)[0].dtype == torch.float32
    narrow = correlation.DCCALoss()(x.bfloat16(), y.bfloat16())
    assert narrow.dtype == torch.float32 and -float(narrow) == pytest.approx(float(exact), abs=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        same = correlation.canonical_correlation(x, y)
    assert torch.equal(same, correlation.canonical_correlation(x, y))
    grad = torch.autograd.grad(correlation.canonical_correlation(x, y), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="canonical_correlation: its gradient may not be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: correlation.cca(x, x[:4]), ValueError, r"cca: y has shape \(4, 3\); expected \(6, features\)"),
        (lambda x: correlation.cca(x, x, 4), ValueError, "cca: num_components is 4; expected 1 to 3"),
        (lambda x: correlation.cca(x, x, reg=-1.0), ValueError, "cca: reg is -1.0; expected one or two numbers"),
        (lambda x: correlation.cca(x * math.nan, x), ValueError, "cca: x has a value that is not finite"),
        (lambda x: correlation.cca(x[:1], x[:1]), ValueError, "cca: x has 1 samples; expected 2 or more"),
        (lambda x: correlation.cca(x.long(), x), TypeError, "cca: x has dtype int64"),
        (lambda x: correlation.cca(x, x).transform_x(x[:, :2]), ValueError, r"CCA: x has shape \(6, 2\); expected"),
        (lambda x: correlation.canonical_correlation(x[:3], x[:3], reg=0.0), ValueError,
         "canonical_correlation: the covariance of x has an eigenvalue of .* expected a larger reg"),
        (lambda x: correlation.canonical_correlation(x, x, 0), ValueError, "num_components is 0; expected 1 to 3"),
        (lambda x: correlation.canonical_correlation(x, x, dtype=torch.float16), TypeError, "dtype is torch.float16"),
        (lambda x: correlation.DCCALoss(0), ValueError, "DCCALoss: num_components is 0; expected 1 or more"),
        (lambda x: correlation.DCCALoss(dtype=torch.int64), TypeError, "DCCALoss: dtype is torch.int64"),
        (lambda x: correlation.DCCALoss(reg=(0.0, math.inf)), ValueError, r"DCCALoss: reg is \(0.0, inf\)"),
    ],
)  # fmt: skip
def test_correlation_wrong_calls(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(randn(6, 3))


def test_a_step_that_returns_the_logits_of_all_tokens() -> None:
    def step(tokens: Tensor, state: int) -> tuple[Tensor, int]:
        return torch.zeros(*tokens.shape, 5), state + 1

    decoder = decoding.ContrastiveDecoder(step, 0, 0, greedy=True)
    with pytest.raises(ValueError, match=r"step returns logits of shape \(2, 3, 5\); expected \(2, vocabulary\)"):
        decoder.next(torch.zeros(2, 3, dtype=torch.int64))
    assert decoder._states == (0, 0) and decoder.logits is None
