"""GradCache against one pass over the whole batch, in one process; across processes: `distributed_cases`."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlkernels import distributed, ops
from tlkernels.distributed import GradCache


def encoder(inputs: int, dropout: float = 0.0, *more: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(inputs)
        return nn.Sequential(
            nn.Linear(inputs, 8), nn.Tanh(), nn.Dropout(dropout), *more, nn.Linear(8, 4), nn.Dropout(dropout)
        ).to(dtype)  # fmt: skip


def samples(rows: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, k, generator=generator, dtype=torch.float64).to(dtype) for k in (6, 3))  # type: ignore[return-value]


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]


def compare(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [3, [4, 11], [1, 30]])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_is_one_pass(dropout: float, sizes: Any) -> None:
    """Two encoders and the loss's own parameter; with dropout, one pass whose masks are drawn chunk by chunk."""
    image, text, scale = encoder(6, dropout), encoder(3, dropout), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    images, texts = samples()
    torch.manual_seed(5)
    chunks = sizes if isinstance(sizes, list) else [sizes, sizes]
    # one graph of all chunks: the masks are drawn in the order in which the chunks come
    x = torch.cat([image(part) for part in images.split(chunks[0])])
    y = torch.cat([text(part) for part in texts.split(chunks[1])])
    want_loss = ops.info_nce(x, y, scale.exp())
    want_loss.backward()
    want, want_scale, want_state = gradients(image, text), scale.grad, torch.get_rng_state()
    image.zero_grad()
    text.zero_grad()
    scale.grad = None

    torch.manual_seed(5)
    cache = GradCache([image, text], sizes, lambda x, y, factor: ops.info_nce(x, y, factor))
    loss = cache.step(images, texts, factor=scale.exp())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want_loss.detach(), rtol=1e-12, atol=0)
    compare(gradients(image, text), want)
    torch.testing.assert_close(scale.grad, want_scale, rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), want_state)

    # gradients add up
    torch.manual_seed(5)
    cache.step(images, texts, factor=scale.exp())
    compare(gradients(image, text), [2 * g for g in want])


def test_holds_one_chunk() -> None:
    """No graph reaches beyond a chunk: the tensors saved for the backward pass are those of three rows."""
    image, text = encoder(6), encoder(3)
    seen: list[int] = []
    cache = GradCache([image, text], 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape[0]) or t, lambda t: t):
        cached = cache.encode(*samples())
        assert not seen
    ops.info_nce(*cached.features, 3.0).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape[0]), t)[1], lambda t: t):
        cached.backward()
    assert seen and max(n for n in seen if n not in (4, 8)) == 3  # 4 and 8 are the rows of weights


def test_one_encoder_for_both() -> None:
    """Sentence pairs: the same module twice, keyword arguments, and several outputs, of which one is an integer."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder(6)

        def forward(self, tokens: Tensor, mask: Tensor, scale: float) -> dict[str, Any]:
            hidden = self.inner(tokens) * mask[..., None]
            return {"pooled": scale * hidden.sum(1), "token": (hidden, mask.sum(1))}

    model = Pooled()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 7, 5, 6, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 7, 5, generator=generator) > 0.3

    def loss(a: dict[str, Any], b: dict[str, Any]) -> Tensor:
        assert a["token"][1].dtype == torch.int64
        return ops.info_nce(a["pooled"], b["pooled"]) + a["token"][0].square().sum()

    inputs = [{"tokens": t, "mask": m, "scale": 0.5} for t, m in zip(tokens, masks, strict=True)]
    loss(*(model(**i) for i in inputs)).backward()
    want = gradients(model)
    model.zero_grad()
    GradCache([model, model], 2, loss).step(*inputs)
    compare(gradients(model), want)
    model.zero_grad()
    GradCache([model, model], 2, loss).step(*(tuple(i.values()) for i in inputs))
    compare(gradients(model), want)


def test_own_loop_and_scaler() -> None:
    image, text = encoder(6, 0.3), encoder(3, 0.3)
    images, texts = samples()
    cache = GradCache([image, text], 4, ops.info_nce)
    torch.manual_seed(1)
    cache.step(images, texts)
    want = gradients(image, text)
    image.zero_grad()
    text.zero_grad()
    torch.manual_seed(1)
    cached = cache.encode(images, texts)
    torch.rand(3)  # what happens in between does not matter
    (8.0 * ops.info_nce(*cached.features)).backward()
    state = torch.get_rng_state()
    cached.backward()
    compare(gradients(image, text), [8 * g for g in want])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match=r"GradCache: backward was called before; encode again"):
        cached.backward()

    image.zero_grad()
    text.zero_grad()
    torch.manual_seed(1)
    cache.step(images, texts, backward=lambda loss: (4.0 * loss).backward())
    compare(gradients(image, text), [4 * g for g in want])


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside: bool) -> None:
    """Both passes run as the first was told to. Weights that were cast without a graph do not serve the second."""
    image, text = encoder(6, 0.2, dtype=torch.float32), encoder(3, 0.2, dtype=torch.float32)
    images, texts = samples(dtype=torch.float32)
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = (torch.cat([m(p) for p in t.split(4)]) for m, t in ((image, images), (text, texts)))
        assert x.dtype == torch.bfloat16
        want_loss = ops.info_nce(x, y, 2.0)
    want_loss.backward()
    want = gradients(image, text)
    image.zero_grad()
    text.zero_grad()
    torch.manual_seed(4)
    cache = GradCache([image, text], 4)
    with torch.autocast("cpu", torch.bfloat16):
        cached = cache.encode(images, texts)
        assert cached.features[0].dtype == torch.bfloat16
        loss = ops.info_nce(*cached.features, 2.0)
        loss.backward()
        if not outside:
            cached.backward()
    if outside:
        cached.backward()
    torch.testing.assert_close(loss, want_loss)
    for g, w in zip(gradients(image, text), want, strict=True):
        # weights' gradients add up in bfloat16 in one pass, in float32 from chunk to chunk
        assert float((g - w).norm()) < 1e-2 * float(w.norm())


def test_frozen_tower_runs_once() -> None:
    image, text = encoder(6), encoder(3).requires_grad_(False)
    calls = [0, 0]
    image.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    text.register_forward_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
    images, texts = samples()
    ops.info_nce(image(images), text(texts)).backward()
    want = gradients(image)
    image.zero_grad()
    calls[:] = [0, 0]
    cache = GradCache([image, text], 4)
    cached = cache.encode(images, texts)
    assert [f.requires_grad for f in cached.features] == [True, False]
    ops.info_nce(*cached.features).backward()
    cached.backward()
    compare(gradients(image), want)
    assert calls == [6, 3]


def test_inputs_that_learn() -> None:
    """A frozen encoder of soft prompts: the gradient goes to the inputs."""
    image, text = encoder(6).requires_grad_(False), encoder(3).requires_grad_(False)
    images, texts = samples()
    images.requires_grad_()
    ops.info_nce(image(images), text(texts)).backward()
    want = images.grad
    images.grad = None
    GradCache([image, text], 4, ops.info_nce).step(images, texts)
    torch.testing.assert_close(images.grad, want, rtol=1e-12, atol=1e-15)


def test_running_statistics_change_once() -> None:
    norm, plain = encoder(6, 0.0, nn.BatchNorm1d(8)), encoder(6, 0.0, nn.BatchNorm1d(8))
    big = torch.zeros(3)
    norm.register_buffer("untouched", big)
    images, _ = samples(12)
    torch.cat([plain(p) for p in images.split(4)]).square().sum().backward()
    copied: list[int] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func._opname == "clone" and args[0].data_ptr() == big.data_ptr():
                copied.append(1)
            return func(*args, **(kwargs or {}))

    with Spy():
        GradCache(norm, 4, lambda x: x.square().sum()).step(images)
    compare(gradients(norm), gradients(plain))
    assert norm[3].num_batches_tracked == 3 and not copied
    for got, want in zip(norm[3].buffers(), plain[3].buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_methods_and_modules() -> None:
    """A bound method belongs to its module; a function's modules are named."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = encoder(6), encoder(3, 0.0, nn.BatchNorm1d(8))

        def encode_image(self, t: Tensor) -> Tensor:
            return F.normalize(self.image(t), dim=1)

        def encode_text(self, t: Tensor) -> Tensor:
            return F.normalize(self.text(t), dim=1)

    results = []
    for kind in ("methods", "functions"):
        model = Both()
        encoders = [model.encode_image, model.encode_text]
        named = None
        if kind == "functions":
            encoders = [lambda t, m=model: m.encode_image(t), lambda t, m=model: m.encode_text(t)]
            named = [model]
        GradCache(encoders, 4, ops.info_nce, modules=named).step(*samples(12))
        assert model.text[3].num_batches_tracked == 3
        results.append(gradients(model))
    compare(*results)


def test_no_samples() -> None:
    """A process with an empty part still runs one chunk, since its modules may communicate."""
    image = encoder(6)
    calls: list[int] = []
    image.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[0]))
    GradCache(image, 4, lambda x: x.sum()).step(torch.zeros(0, 6, dtype=torch.float64))
    assert calls == [0, 0] and all((g == 0).all() for g in gradients(image))


class Fails(nn.Module):
    """Raises in its n-th call, after it has drawn random numbers."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.inner, self.when, self.calls = encoder(6, 0.5), when, itertools.count()

    def forward(self, t: Tensor) -> Tensor:
        out = self.inner(t)
        if next(self.calls) == self.when:
            raise ZeroDivisionError("here")
        return out


@pytest.mark.parametrize("when", [1, 4])
def test_an_exception_restores(when: int) -> None:
    """Chunks 0 to 2 are the first pass, 3 to 5 the second."""
    model = Fails(when)
    images, _ = samples(12)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cache = GradCache(model, 4, lambda x: x.square().sum())
    if when == 1:
        with pytest.raises(ZeroDivisionError):
            cache.step(images)
        assert torch.equal(torch.get_rng_state(), before)
        assert not gradients(model)
    else:
        cached = cache.encode(images)
        cached.features[0].square().sum().backward()
        after = torch.get_rng_state()
        with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(ZeroDivisionError):
            cached.backward()
        assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
    assert torch.is_grad_enabled() and model.training and not torch.is_autocast_enabled("cpu")


def test_other_features_in_the_second_pass() -> None:
    class Restless(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.inner, self.by, self.generator = encoder(6), by, random.Random(0)

        def forward(self, t: Tensor) -> Tensor:
            return self.inner(t) * (1 + self.by * self.generator.random())

    images, _ = samples()
    with pytest.raises(RuntimeError, match=r"GradCache: the second pass made other features than the first"):
        GradCache(Restless(1e-3), 4, lambda x: x.square().sum()).step(images)
    GradCache(Restless(1e-3), 4, lambda x: x.square().sum(), verify=False).step(images)
    GradCache(Restless(1e-12), 4, lambda x: x.square().sum()).step(images)  # a rounding

    lengths = iter([4, 4, 3, 4, 4, 3])

    class Longer(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return torch.ones(len(t), next(lengths), requires_grad=True) * 1.0

    lengths = iter([4, 4, 4, 5])
    with pytest.raises(RuntimeError, match=r"the second pass returned shapes \[\(4, 5\)\] for chunk 0; expected"):
        GradCache(lambda t: Longer()(t), 4, lambda x: x.sum()).step(images)


def test_distributed_loss_alone() -> None:
    image, text = encoder(6), encoder(3)
    images, texts = samples()
    ops.sigmoid_contrastive(image(images), text(texts), 2.0, -1.0).backward()
    want = gradients(image, text)
    for exchange in ("gather", "ring"):
        image.zero_grad()
        text.zero_grad()
        loss = distributed.SigLIPLoss(exchange=exchange)
        GradCache([image, text], 4, loss).step(images, texts, logit_scale=2.0, logit_bias=-1.0)
        compare(gradients(image, text), want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_masks() -> None:
    image = encoder(6, 0.5).cuda()
    images = samples()[0].cuda()
    torch.manual_seed(5)
    torch.cat([image(p) for p in images.split(4)]).square().sum().backward()
    want, state = gradients(image), torch.cuda.get_rng_state()
    image.zero_grad()
    torch.manual_seed(5)
    GradCache(image, 4, lambda x: x.square().sum()).step(images)
    compare(gradients(image), want, 1e-10)
    assert torch.equal(torch.cuda.get_rng_state(), state)


# ---- wrong calls ----------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(5, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: GradCache([], 4), ValueError, "GradCache: encoders is empty"),
        (lambda: GradCache([encoder(6), "text"], 4), TypeError, r"encoders\[1\] is str; expected a module"),
        (lambda: GradCache(encoder(6), 0), ValueError, "chunk_size is 0; expected an integer >= 1"),
        (lambda: GradCache(None, 2), TypeError, "encoders is NoneType; expected a module, a function, or a sequence"),
        (lambda: GradCache(encoder(6), 2.5), ValueError, "chunk_size is 2.5; expected an integer >= 1"),
        (lambda: GradCache(encoder(6), 2, loss=3), TypeError, "loss is int; expected a module or a function"),
        (
            lambda: GradCache(encoder(6), 2, modules=nn.Identity()),
            TypeError,
            "modules is Identity; expected a sequence of",
        ),
        (lambda: GradCache(encoder(6), [2.0]), ValueError, "chunk_size is 2.0; expected an integer >= 1"),
        (lambda: GradCache(encoder(6), [2, 3]), ValueError, "chunk_size has 2 entries for 1 encoders"),
        (lambda: GradCache(encoder(6), 2, modules=[print]), TypeError, "modules holds builtin_function_or_method"),
        (lambda: GradCache(encoder(6), 2).step(IMAGES), ValueError, "step needs loss, which is None"),
        (lambda: GradCache(encoder(6), 2).encode(IMAGES, IMAGES), ValueError, "got 2 inputs for 1 encoders"),
        (lambda: GradCache(encoder(6), 2).encode("x"), TypeError, r"inputs\[0\] holds no tensor with dimensions"),
        (
            lambda: GradCache(encoder(6), 2).encode((IMAGES, IMAGES[:3])),
            ValueError,
            r"inputs\[0\] has tensors of \[3, 5\] rows",
        ),
        (lambda: GradCache(lambda t: t.sum(), 2).encode(IMAGES), ValueError, r"returned shape \(\) for chunk 0 of 2"),
        (lambda: GradCache(lambda t: "no", 2).encode(IMAGES), ValueError, "returned str for chunk 0 of 2 samples"),
        (lambda: GradCache(encoder(6), 2, lambda x: x).step(IMAGES), TypeError, r"loss returned shape \(5, 4\)"),
        (lambda: GradCache(encoder(6), 2, lambda x: 1.0).step(IMAGES), TypeError, "loss returned float"),
        (lambda: GradCache(encoder(6), 2).encode(IMAGES).backward(), RuntimeError, "no features have a gradient"),
    ],
)
def test_wrong_calls(make: Any, error: type[Exception], says: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=says):
        make()
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_modes() -> None:
    cache = GradCache(encoder(6), 2, lambda x: x.sum())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"GradCache: gradients are disabled"):
        cache.step(IMAGES)
    with torch.no_grad():
        assert not cache.encode(IMAGES).features[0].requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"GradCache: inference mode is on"):
        cache.encode(IMAGES)
