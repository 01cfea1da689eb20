"""Ways to tune a model of images and texts, against formulas in float64, scikit-learn, and a tiny CLIP."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.multimodal import tuning
from tlkernels.methods.peft import LoRAConfig, LoRALinear, remove, trainable_parameters

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


# ---- linear probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.05, 1.0, 30.0])
def test_linear_probe_as_sklearn(C: float) -> None:
    x = randn(90, 6)
    labels = (x @ randn(6, 4, seed=1) + 2.0 * randn(90, 4, seed=2)).argmax(1)
    fit = tuning.fit_linear_probe(x, labels, C=C, tolerance=1e-8)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(x.numpy(), labels.numpy())
    weight = fit.head.weight.detach()
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-5, rtol=1e-5)
    bias = fit.head.bias.detach().numpy()
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5, rtol=1e-5)
    # a stationary point of the stated objective
    w, b = fit.head.weight.detach().requires_grad_(), fit.head.bias.detach().requires_grad_()
    objective = 0.5 * w.square().sum() + C * functional.cross_entropy(x @ w.T + b, labels, reduction="sum")
    assert max(float(g.abs().max()) for g in torch.autograd.grad(objective, [w, b])) < 90 * C * 1.01e-8


def test_linear_probe_search() -> None:
    x, labels = randn(60, 5).float(), torch.arange(60) % 3
    x[torch.arange(60), labels] += 1.0
    val, val_labels = randn(200, 5, seed=3).float(), torch.arange(200) % 3
    val[torch.arange(200), val_labels] += 1.0
    strengths = [10.0, 0.001, 0.1]
    fit = tuning.fit_linear_probe(x, labels, C=strengths, validation=(val, val_labels), num_classes=4)
    assert fit.head.weight.shape == (4, 5) and fit.head.weight.dtype == torch.float32
    assert list(fit.accuracy) == sorted(strengths)
    for c, accuracy in fit.accuracy.items():
        alone = tuning.fit_linear_probe(x, labels, C=c, num_classes=4).head
        assert accuracy == pytest.approx(float((alone(val).argmax(1) == val_labels).float().mean()), abs=0.0051)
    assert fit.accuracy[fit.C] == max(fit.accuracy.values())
    assert min(c for c, a in fit.accuracy.items() if a == fit.accuracy[fit.C]) == fit.C
    best = tuning.fit_linear_probe(x, labels, C=fit.C, num_classes=4).head
    torch.testing.assert_close(fit.head.weight, best.weight, atol=1e-4, rtol=1e-3)
    with pytest.warns(UserWarning, match="fit_linear_probe: with C 1000 the gradient is .* at the end, above tol"):
        tuning.fit_linear_probe(x, labels, C=1000.0, max_iter=2)


# ---- Tip-Adapter ----------------------------------------------------------------------------------------------------


def cache() -> tuple[Tensor, Tensor, Tensor]:
    return randn(12, 6), torch.arange(12) % 4, randn(5, 6, seed=1)


@pytest.mark.parametrize("trainable", [False, True])
def test_tip_adapter(trainable: bool) -> None:
    features, labels, classes = cache()
    adapter = tuning.TipAdapter(features, labels, classes, alpha=1.3, beta=2.5, logit_scale=20.0, trainable=trainable)
    x = randn(7, 6, seed=4, grad=True)
    f, w = functional.normalize(x), functional.normalize(classes)
    keys = adapter.keys if trainable else functional.normalize(features)
    values = functional.one_hot(labels, 5).double()
    want = 1.3 * torch.exp(-2.5 * (1 - f @ keys.T)) @ values + 20.0 * f @ w.T
    assert_same(adapter(x), want, [x, adapter.keys] if trainable else [x])
    assert [name for name, _ in adapter.named_parameters()] == (["keys"] if trainable else [])
    torch.testing.assert_close(adapter.keys.detach(), functional.normalize(features))
    # a query that is a key, with sharpness without end: its label's value, and nothing else
    adapter.beta, adapter.logit_scale = 1e6, 0.0
    torch.testing.assert_close(adapter(features), 1.3 * values)
    loaded = tuning.TipAdapter(randn(12, 6, seed=9), labels, classes, trainable=trainable)
    loaded.load_state_dict(adapter.state_dict())
    assert torch.equal(loaded.keys, adapter.keys)


def test_tip_adapter_of_augmentations() -> None:
    features, labels, classes = cache()
    views = torch.stack([features, features + 0.3 * randn(12, 6, seed=5)])
    adapter = tuning.TipAdapter(views, labels, classes)
    torch.testing.assert_close(adapter.keys, functional.normalize(views.mean(0)))


def test_tip_adapter_search() -> None:
    features, labels, classes = cache()
    x = randn(80, 6, seed=6)
    targets = (x @ classes.T + 3 * torch.exp(x @ features.T) @ functional.one_hot(labels, 5).double()).argmax(1)
    adapter = tuning.TipAdapter(features, labels, classes, logit_scale=3.0)
    alphas, betas = [0.0, 0.5, 2.0, 8.0], [0.3, 1.0, 4.0]
    found = adapter.search(x, targets, alphas, betas)
    scores = {}
    for beta in betas:
        for alpha in alphas:
            other = tuning.TipAdapter(features, labels, classes, alpha=alpha, beta=beta, logit_scale=3.0)
            scores[alpha, beta] = float((other(x).argmax(1) == targets).double().mean())
    assert scores[found.alpha, found.beta] == found.accuracy == max(scores.values()) > scores[0.0, 1.0]
    assert (adapter.alpha, adapter.beta) == (found.alpha, found.beta)
    assert next(pair for pair, score in scores.items() if score == found.accuracy) == (found.alpha, found.beta)
    assert adapter.search(x, targets).accuracy >= 0.0 and 0.1 <= adapter.beta <= 7.0
    before = adapter.alpha, adapter.beta
    with pytest.raises(ValueError, match=r"TipAdapter\.search: beta is 0.0; expected > 0"):
        adapter.search(x, targets, [1.0], [1.0, 0.0])
    assert (adapter.alpha, adapter.beta) == before


def test_tip_adapter_f_learns() -> None:
    features, labels, classes = cache()
    x = randn(60, 6, seed=6)
    targets = (x @ randn(6, 4, seed=7)).argmax(1)
    adapter = tuning.TipAdapter(features, labels, classes, alpha=5.0, beta=1.0, logit_scale=2.0, trainable=True)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(adapter(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_search_found_is_in_the_state() -> None:
    features, labels, classes = cache()
    adapter = tuning.TipAdapter(features, labels, classes, logit_scale=20.0)
    adapter.search(randn(9, 6, seed=3), torch.arange(9) % 5, alphas=[2.5], betas=[3.5])
    loaded = tuning.TipAdapter(features, labels, classes)
    loaded.load_state_dict(adapter.state_dict())
    assert (loaded.alpha, loaded.beta, loaded.logit_scale) == (2.5, 3.5, 20.0)
    x = randn(4, 6, seed=5)
    assert torch.equal(loaded(x), adapter(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_float32_for_16_bits(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    keys, texts, x = (functional.normalize(randn(n, 6, seed=n)).to(dtype) for n in (40, 5, 3))
    adapter = tuning.TipAdapter(keys, torch.zeros(40, dtype=torch.int64), texts, beta=0.5, alpha=3.0)
    encode = torch.nn.Flatten(1)
    context = tuning.PromptContext(randn(2, 8, 2).to(dtype), [1, 2], 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tip = adapter(x)
        coop_model = tuning.CoOp(context, lambda prompts, classes: encode(prompts)[:, :6])
        coop = coop_model(x)
        prompts = coop_model.class_features()
        cocoop = tuning.CoCoOp(context, lambda prompts, classes: encode(prompts)[:, 2:8], 6)(x)
    assert tip.dtype == coop.dtype == cocoop.dtype == torch.float32
    # of the features as they are rounded after they are normalized
    f, k, w = functional.normalize(x.float()).to(dtype).double(), adapter.keys.double(), adapter.class_features.double()
    want = 100.0 * f @ w.T
    want[:, 0] += 3.0 * torch.exp(-0.5 * (1 - f @ k.T)).sum(1)
    torch.testing.assert_close(tip.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(coop.double(), 100.0 * f @ prompts.double().T, rtol=1e-5, atol=1e-4)


def test_coop_of_two_dtypes_and_of_no_features() -> None:
    context = tuning.PromptContext(torch.ones(2, 8, 1), [1, 2], 3, init=torch.ones(3, 1))
    model = tuning.CoOp(context, lambda prompts, classes: prompts.flatten(1).bfloat16(), logit_scale=1.0)
    torch.testing.assert_close(model(torch.ones(1, 8)), torch.ones(1, 2), rtol=0, atol=0.01)
    with pytest.raises(TypeError, match="CoOp: encode_text: result is a NoneType; expected a tensor"):
        tuning.CoOp(context, lambda prompts, classes: None)(torch.ones(1, 8))


def test_integer_features_and_no_validation() -> None:
    features, labels, classes = cache()
    with pytest.raises(TypeError, match="TipAdapter: features has dtype int64; expected float32"):
        tuning.TipAdapter(torch.ones(2, 12, 6, dtype=torch.int64), labels, classes)
    nothing = features[:0], labels[:0]
    with pytest.raises(ValueError, match="fit_linear_probe: validation has no rows"):
        tuning.fit_linear_probe(features, labels, C=[1.0, 2.0], validation=nothing)


# ---- learned prompts ------------------------------------------------------------------------------------------------

LENGTHS = [1, 3, 2]


def embedded(length: int = 10, width: int = 4) -> Tensor:
    """Tokens that tell where they come from: the class, then the place."""
    place = torch.arange(3)[:, None] * 100 + torch.arange(length)
    return place[:, :, None].double() + torch.arange(width) / 10


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize(
    ("position", "start"),
    [("end", "0 a b c {} rest"), ("middle", "0 a {} b c rest"), ("front", "0 {} a b c rest")],
)
def test_prompt_context(position: Any, start: str, specific: bool) -> None:
    context = tuning.PromptContext(
        embedded(), LENGTHS, 3, position=position, class_specific=specific, generator=torch.Generator().manual_seed(0)
    )
    assert context.context.shape == ((3, 3, 4) if specific else (3, 4))
    assert list(context.state_dict()) == ["context"]
    rows = []
    for c, length in enumerate(LENGTHS):
        learned = context.context[c] if specific else context.context
        tokens: list[Tensor] = []
        for word in start.split():
            if word == "{}":
                tokens += [embedded()[c, 4 + i] for i in range(length)]
            elif word == "rest":
                tokens += [embedded()[c, i] for i in range(4 + length, 10)]
            else:
                tokens.append(embedded()[c, 0] if word == "0" else learned["abc".index(word)])
        rows.append(torch.stack(tokens))
    assert_same(context(), torch.stack(rows), [context.context])
    shift = randn(5, 4, grad=True)
    shifted = context(shift)
    assert shifted.shape == (5, 3, 10, 4)
    for b in range(5):
        moved = (shifted[b] - context()).detach()
        count = (moved.abs() > 1e-12).any(-1).sum(1)
        assert count.tolist() == [3, 3, 3]
        torch.testing.assert_close(moved.sum(1), 3 * shift[b].detach().expand(3, 4))


def test_prompt_context_init() -> None:
    given = randn(3, 4)
    context = tuning.PromptContext(embedded(), LENGTHS, 3, init=given)
    assert torch.equal(context()[0, 1:4], given) and torch.equal(context.context, given)
    drawn = tuning.PromptContext(torch.zeros(2, 410, 100), [1, 1], 400)
    assert drawn.context.std().item() == pytest.approx(0.02, rel=0.05)
    half = tuning.PromptContext(torch.zeros(2, 8, 5, dtype=torch.bfloat16), [1, 2], 3)
    assert half.context.dtype == torch.float32 and half().dtype == torch.bfloat16


class Encoder(nn.Module):
    """A frozen text encoder: a mix over positions, a non-linearity, and the end token of each class."""

    def __init__(self, length: int = 10, width: int = 4, features: int = 6) -> None:
        super().__init__()
        self.mix = nn.Parameter(randn(length, length, seed=1) * 0.3)
        self.project = nn.Parameter(randn(width, features, seed=2))
        self.end = torch.tensor([4 + n for n in LENGTHS])

    def forward(self, prompts: Tensor, classes: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("lk,nke->nle", self.mix, prompts * 0.1))
        return hidden[torch.arange(prompts.shape[0]), self.end[classes]] @ self.project


def test_coop() -> None:
    encoder = Encoder().requires_grad_(False)
    context = tuning.PromptContext(embedded(), LENGTHS, 3, class_specific=True)
    model = tuning.CoOp(context, encoder, logit_scale=7.0)
    assert [name for name, _ in model.named_parameters()] == ["context.context"]
    assert list(model.state_dict()) == ["context.context"]
    images = randn(5, 6, grad=True)
    texts = torch.stack([encoder(context()[c : c + 1], torch.tensor([c]))[0] for c in range(3)])
    want = 7.0 * functional.cosine_similarity(images[:, None], texts[None], dim=2)
    assert_same(model(images), want, [images, context.context])
    # any callable, with a context for all
    shared = tuning.PromptContext(embedded(), LENGTHS, 3)
    plain = tuning.CoOp(shared, lambda prompts, classes: encoder(prompts, classes))
    labels = torch.tensor([0, 1, 2, 0, 1])
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    before = functional.cross_entropy(plain(images), labels).item()
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(plain(images.detach()), labels).backward()
        optimizer.step()
    assert functional.cross_entropy(plain(images), labels).item() < before
    assert all(p.grad is None for p in encoder.parameters())


def test_cocoop() -> None:
    encoder = Encoder().requires_grad_(False)
    context = tuning.PromptContext(embedded(), LENGTHS, 3)
    model = tuning.CoCoOp(context, encoder, 6, hidden_features=2, logit_scale=7.0, images_per_call=2)
    with torch.no_grad():
        for k, p in enumerate(model.meta_net.parameters()):
            p.copy_(randn(*p.shape, seed=k + 3))
    images = randn(5, 6, grad=True)
    rows = []
    for b in range(5):
        f = functional.normalize(images[b], dim=0)
        first, second = model.meta_net[0], model.meta_net[2]
        shift = functional.relu(f @ first.weight.T + first.bias) @ second.weight.T + second.bias
        prompts = embedded().clone()
        prompts = torch.cat([prompts[:, :1], (context.context + shift).expand(3, 3, 4), prompts[:, 4:]], 1)
        texts = functional.normalize(encoder(prompts, torch.arange(3)))
        rows.append(7.0 * texts @ f)
    variables = [images, context.context, *model.meta_net.parameters()]
    assert_same(model(images), torch.stack(rows), variables)
    assert model(images[:0]).shape == (0, 3)
    assert tuning.CoCoOp(context, encoder, 48).meta_net[0].weight.shape == (3, 48)


# ---- all weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collisions", ["keep", "mask"])
def test_flyp_loss(collisions: Any) -> None:
    x, y = randn(8, 5, grad=True), randn(8, 5, seed=1, grad=True)
    scale = torch.tensor(4.0, dtype=DOUBLE, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 4])
    terms = []
    for i in range(8):
        allowed = [j for j in range(8) if collisions == "keep" or j == i or labels[j] != labels[i]]

        def z(a: int, b: int) -> Tensor:
            return scale * functional.cosine_similarity(x[a], y[b], dim=0)

        rows = torch.logsumexp(torch.stack([z(i, j) for j in allowed]), 0)
        columns = torch.logsumexp(torch.stack([z(j, i) for j in allowed]), 0)
        terms.append(0.5 * (rows + columns) - z(i, i))
    given = labels if collisions == "mask" else None
    out = tuning.flyp_loss(x, y, scale, given, collisions=collisions)
    assert_same(out, torch.stack(terms).mean(), [x, y, scale])


def test_flyp_loss_of_a_repeated_class() -> None:
    """Perfect features: what is left is the share of images whose class stands k times, times log k."""
    eye = torch.eye(5, dtype=DOUBLE)
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    kept = tuning.flyp_loss(eye[labels], eye[labels], 200.0)
    assert float(kept) == pytest.approx((2 * math.log(2) + 3 * math.log(3)) / 6)
    masked = tuning.flyp_loss(eye[labels], eye[labels], 200.0, labels, collisions="mask")
    assert float(masked) == pytest.approx(0.0, abs=1e-12)
    distinct = tuning.flyp_loss(eye, eye[[1, 0, 2, 3, 4]], 1.5, torch.arange(5), collisions="mask")
    assert float(distinct) == pytest.approx(float(tuning.flyp_loss(eye, eye[[1, 0, 2, 3, 4]], 1.5)))


def test_sample_prompts() -> None:
    prompts = {"cat": ["a cat", "art: cat", "cat"], "dog": ["dog"]}
    labels = torch.arange(3000) % 2
    drawn = tuning.sample_prompts(labels, prompts, generator=torch.Generator().manual_seed(0))
    assert drawn[1::2] == ["dog"] * 1500
    for prompt in prompts["cat"]:
        assert abs(drawn.count(prompt) / 1500 - 1 / 3) < 4.5 * (2 / 9 / 1500) ** 0.5
    same = tuning.sample_prompts(labels.tolist(), list(prompts.values()), generator=torch.Generator().manual_seed(0))
    assert same == drawn
    with pytest.raises(ValueError, match="sample_prompts: labels is from 0 to 2; expected 0 <= label < 2"):
        tuning.sample_prompts([0, 2], prompts)
    with pytest.raises(ValueError, match="sample_prompts: prompts has 'cat' for class 0; expected a list"):
        tuning.sample_prompts([0], ["cat", "dog"])


def test_wise_ft_curve() -> None:
    start = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    end = copy.deepcopy(start)
    with torch.no_grad():
        for p in end.parameters():
            p.add_(1.0)
    model = copy.deepcopy(end)
    model[0].eval()

    def score(m: nn.Module) -> float:
        m.eval()
        return m[0].weight[0, 0].item()  # type: ignore[index]

    a, b = start[0].weight[0, 0].item(), end[0].weight[0, 0].item()
    for pretrained, finetuned in ((start, end), (start.state_dict(), model), (start, model.state_dict())):
        curve = tuning.wise_ft_curve(model, pretrained, finetuned, score, (0.0, 1.0, 0.25, 0.5))  # type: ignore[arg-type]
        assert curve == pytest.approx({alpha: (1 - alpha) * a + alpha * b for alpha in (0.0, 1.0, 0.25, 0.5)})
        assert all(
            torch.equal(p, q) for p, q in zip(model.state_dict().values(), end.state_dict().values(), strict=True)
        )
        assert model.training and model[1].training and not model[0].training

    def broken(m: nn.Module) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        tuning.wise_ft_curve(model, start, end, broken)
    assert torch.equal(model[0].weight, end[0].weight)
    with pytest.raises(ValueError, match=r"wise_ft_curve: alphas has 1\.5; expected 0 to 1"):
        tuning.wise_ft_curve(model, start, end, score, (0.0, 1.5))


# ---- low-rank updates -----------------------------------------------------------------------------------------------


def tiny_clip() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(**sizes, vocab_size=50, max_position_embeddings=12, eos_token_id=49)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def test_apply_clip_lora() -> None:
    model = tiny_clip()
    ids = torch.tensor([[1, 5, 6, 49, 0], [1, 7, 49, 0, 0]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        return model(input_ids=ids, pixel_values=pixels).logits_per_image

    before = logits().detach()
    applied = tuning.apply_clip_lora(model)
    want = {f"{tower}.encoder.layers.{i}.self_attn.{p}_proj" for tower in ("vision_model", "text_model")
            for i in range(2) for p in "qkv"}  # fmt: skip
    assert set(applied.targets) == want and applied.config.r == 2  # type: ignore[attr-defined]
    assert all(isinstance(model.get_submodule(name), LoRALinear) for name in want)
    assert trainable_parameters(model).trainable == 12 * 2 * (16 + 16)
    torch.testing.assert_close(logits(), before)
    labels = torch.tensor([1, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        loss = functional.cross_entropy(logits(), labels)
        loss.backward()
        optimizer.step()
    assert functional.cross_entropy(logits(), labels) < functional.cross_entropy(before, labels)
    towers = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert towers == {"vision_model", "text_model"}
    remove(model)
    torch.testing.assert_close(logits(), before)


def test_apply_clip_lora_of_ones_own() -> None:
    model = tiny_clip()
    config = LoRAConfig(r=4, lora_alpha=8.0, target_modules="ignored", use_rslora=True)
    applied = tuning.apply_clip_lora(model, projections=["out_proj", "fc1"], config=config)
    assert len(applied.targets) == 8 and {name.split(".")[-1] for name in applied.targets} == {"out_proj", "fc1"}
    assert applied.config.r == 4 and applied.config.use_rslora  # type: ignore[attr-defined]
    assert config.target_modules == "ignored"


def test_apply_clip_lora_wrong_calls() -> None:
    model = tiny_clip()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="apply_clip_lora: vision is 'visual', where no module is called 'q_proj'"):
        tuning.apply_clip_lora(model, vision="visual")
    with pytest.raises(ValueError, match="apply_clip_lora: projections is 'q_proj'; expected names"):
        tuning.apply_clip_lora(model, projections="q_proj")
    with pytest.raises(ValueError, match="r is 0; expected 1 or more"):
        tuning.apply_clip_lora(model, config=LoRAConfig(r=0))
    assert [name for name, _ in model.named_modules()] == names and all(p.requires_grad for p in model.parameters())


def test_coop_on_clip() -> None:
    """The text tower of transformers as the encoder: prompts as they are give the tower's own features."""
    from transformers.masking_utils import create_causal_mask

    model = tiny_clip().requires_grad_(False)
    tower, projection = model.text_model, model.text_projection
    ids = torch.tensor([[1, 5, 6, 11, 49, 0, 0], [1, 5, 6, 12, 13, 49, 0]])  # start, two of context, name, end
    end = (ids == 49).int().argmax(1)

    def encode(prompts: Tensor, classes: Tensor) -> Tensor:
        hidden = tower.embeddings(inputs_embeds=prompts)
        mask = create_causal_mask(config=tower.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
        return projection(tower.final_layer_norm(hidden)[torch.arange(len(classes)), end[classes]])

    embeddings = tower.embeddings.token_embedding(ids)
    context = tuning.PromptContext(embeddings, [1, 2], 2, init=embeddings[0, 1:3])
    coop = tuning.CoOp(context, encode, logit_scale=model.logit_scale.exp().item())
    want = functional.normalize(model.get_text_features(input_ids=ids).pooler_output)
    torch.testing.assert_close(coop.class_features(), want)
    pixels = torch.randn(3, 3, 16, 16)
    images = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(coop(images), model(input_ids=ids, pixel_values=pixels).logits_per_image)
    coop(images).square().sum().backward()
    assert context.context.grad is not None and context.context.grad.any()


# ---- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, y: tuning.fit_linear_probe(x, y.float()), ValueError, "fit_linear_probe: labels has dtype float32"),
        (lambda x, y: tuning.fit_linear_probe(x, y - 1), ValueError, "labels is from -1 to 2; expected 0 <= label"),
        (lambda x, y: tuning.fit_linear_probe(x, y, num_classes=2), ValueError, "expected 0 <= label < 2"),
        (lambda x, y: tuning.fit_linear_probe(x, y, C=0.0), ValueError, "C is 0.0; expected one or more numbers above"),
        (lambda x, y: tuning.fit_linear_probe(x, y, C=[1, 2]), ValueError, "validation is None with 2 values of C"),
        (lambda x, y: tuning.fit_linear_probe(x, y, validation=(x[:, :2], y)), ValueError,
         r"validation\[0\] has shape \(4, 2\); expected \(rows, 3\)"),
        (lambda x, y: tuning.TipAdapter(x, y, x[:, :2]), ValueError, r"TipAdapter: features has shape \(4, 3\)"),
        (lambda x, y: tuning.TipAdapter(x, y, x.double()), TypeError, "features has dtype float32; expected float64"),
        (lambda x, y: tuning.TipAdapter(x, y, x[:2]), ValueError, "labels is from 0 to 3; expected 0 <= label < 2"),
        (lambda x, y: tuning.TipAdapter(x, y, x, beta=0.0), ValueError, "TipAdapter: beta is 0.0; expected > 0"),
        (lambda x, y: tuning.TipAdapter(x, y, x)(x[:, :2]), ValueError, r"features has shape \(4, 2\); expected"),
        (lambda x, y: tuning.PromptContext(x, [1], 1), ValueError, r"embeddings has shape \(4, 3\); expected \("),
        (lambda x, y: tuning.PromptContext(embedded(), [1, 6, 2], 3), ValueError,
         r"name_lengths is \[1, 6, 2\]; expected 3 of 1 to 5 tokens"),
        (lambda x, y: tuning.PromptContext(embedded(), LENGTHS, 3, position="back"), ValueError,
         "position is 'back'; expected 'end', 'middle' or 'front'"),
        (lambda x, y: tuning.PromptContext(embedded(), LENGTHS, 3, init=x), ValueError,
         r"init has shape \(4, 3\); expected \(3, 4\)"),
        (lambda x, y: tuning.PromptContext(embedded(), LENGTHS, 3)(x), ValueError, r"shift has shape \(4, 3\)"),
        (lambda x, y: tuning.CoOp(tuning.PromptContext(embedded(), LENGTHS, 3), Encoder()), ValueError,
         "CoOp: encode_text has 2 parameters that require gradients; expected a frozen encoder"),
        (lambda x, y: tuning.CoOp(embedded(), Encoder()), TypeError, "CoOp: context is a Tensor; expected a PromptC"),
        (lambda x, y: tuning.CoOp(tuning.PromptContext(embedded(), LENGTHS, 3), lambda p, c: p)(x), ValueError,
         r"CoOp: encode_text returned shape \(3, 10, 4\); expected \(3, features\)"),
        (lambda x, y: tuning.CoCoOp(tuning.PromptContext(embedded(), LENGTHS, 3, class_specific=True), print, 6),
         ValueError, "CoCoOp: context is class-specific; expected one context for all classes"),
        (lambda x, y: tuning.flyp_loss(x, x, 1.0, y), ValueError, "labels are given with collisions 'keep'"),
        (lambda x, y: tuning.flyp_loss(x, x, 1.0, collisions="mask"), ValueError, "labels is None with collisions"),
        (lambda x, y: tuning.flyp_loss(x, x, 1.0, collisions="drop"), ValueError, "collisions is 'drop'; expected"),
        (lambda x, y: tuning.flyp_loss(x, x[:2], 1.0), ValueError, r"text_features has shape \(2, 3\); expected"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(torch.eye(4)[:, :3] + 1.0, torch.arange(4))
