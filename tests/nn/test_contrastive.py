"""The contrastive losses as modules: values and gradients against float64 and the classes they stand in for."""

from __future__ import annotations

import copy
import doctest
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import tlkernels.nn.contrastive
from bench.peers import submodule
from tlkernels.nn import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss

# norm of the difference from float64, of the same rounded input: losses are sums in float32 (or float64); gradients of
# features are rounded to their dtype, each of those that add up where features are used twice, and so is their sum
LIMIT = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(LIMIT)


def peer(module: str, name: str) -> Any:
    """A class of a package that cannot be imported whole without torchvision."""
    try:
        return getattr(submodule(module), name)
    except ImportError as error:
        pytest.skip(str(error))


def open_clip(name: str) -> Any:
    return peer("open_clip.loss", name)


def metric_learning(name: str) -> Any:
    return getattr(pytest.importorskip("pytorch_metric_learning.losses"), name)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, unit: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7919 * len(shape)), dtype=torch.float64)
    return (normalize(x, dim=-1) if unit else x).to(dtype)


def answer(loss: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The loss and its gradients for every floating-point argument; losses get gradients no two of which are alike."""

    def leaf(value: Any) -> Any:
        is_leaf = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if is_leaf else value

    args, kwargs = tuple(leaf(a) for a in args), {name: leaf(a) for name, a in kwargs.items()}
    out = loss(*args, **kwargs)
    if out.requires_grad:
        out.backward(torch.linspace(0.7, 1.9, out.numel()).to(out).reshape(out.shape))
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_leaf and a.requires_grad]
    return [out.detach(), *(torch.zeros_like(a) if a.grad is None else a.grad for a in leaves)]


def assert_close(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    assert len(found) == len(expected)
    limits = [min(limit, LIMIT[found[0].dtype]), *[limit] * (len(found) - 1)]
    for k, (a, b, limit) in enumerate(zip(found, expected, limits, strict=True)):
        assert a.shape == b.shape and a.isfinite().all()
        floor = limit * 1e-3  # sums that cancel: the gradient of a bias, of a loss of 0
        error = float((a.double() - b.double()).norm())
        assert error <= limit * float(b.double().norm()) + floor, f"{k}: {relative_error(a, b):.3g} off"


def wide(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of what its arguments are in float64."""
    return lambda *args: loss(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))


# ---- the formulas ---------------------------------------------------------------------------------------------------


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    z = scale * x @ y.T + (0.0 if bias is None else bias)
    diagonal = torch.arange(x.shape[0])
    return (cross_entropy(z, diagonal) + cross_entropy(z.T, diagonal)) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(x.shape[0], dtype=x.dtype) - 1
    return -logsigmoid(sign * (scale * x @ y.T + bias)).sum() / x.shape[0]


def info_nce(
    x: Tensor, y: Tensor, negatives: Tensor | None, scale: Tensor | float, *, unit: bool, symmetric: bool,
    in_batch: bool, smoothing: float, reduction: str,
) -> Tensor:  # fmt: skip
    if unit:
        x, y = normalize(x, dim=-1), normalize(y, dim=-1)
        negatives = None if negatives is None else normalize(negatives, dim=-1)
    rows = x.shape[0]
    target = torch.arange(rows) if in_batch else torch.zeros(rows, dtype=torch.int64)
    z = x @ y.T if in_batch else (x * y).sum(1, keepdim=True)
    if negatives is not None:
        more = x @ negatives.T if negatives.dim() == 2 else torch.einsum("nd,nmd->nm", x, negatives)
        z = torch.cat([z, more], 1)
    loss = cross_entropy(scale * z, target, label_smoothing=smoothing, reduction="none")
    if symmetric:
        other = cross_entropy(scale * (y @ x.T), target, label_smoothing=smoothing, reduction="none")
        loss = (loss + other) / 2
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def nt_xent(
    z: Tensor, labels: Tensor, ref: Tensor | None = None, ref_labels: Tensor | None = None, temperature: float = 0.07
) -> list[list[Tensor]]:
    """The loss of every positive pair, anchor by anchor."""
    z = normalize(z, dim=1)
    logits = z @ (z if ref is None else normalize(ref, dim=1)).T / temperature
    classes = labels if ref_labels is None else ref_labels
    found = []
    for i, own in enumerate(labels):
        negatives = logits[i][classes != own]
        positives = [j for j in range(len(classes)) if classes[j] == own and not (ref is None and j == i)]
        found.append([torch.cat([logits[i, j : j + 1], negatives]).logsumexp(0) - logits[i, j] for j in positives])
    return found


# ---- CLIP and SigLIP ------------------------------------------------------------------------------------------------

LOSSES = [(CLIPLoss, "ClipLoss", clip), (SigLIPLoss, "SigLipLoss", siglip)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name", "formula"), LOSSES)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_image_text_losses_are_the_formula(
    backend: str, rows: int, kind: Any, name: str, formula: Any, dtype: torch.dtype
) -> None:
    x, y = draw(rows, 24, dtype=dtype, unit=True), draw(rows, 24, seed=1, dtype=dtype, unit=True)
    accumulated = torch.promote_types(dtype, torch.float32)
    scale, bias = torch.tensor(11.3, dtype=accumulated), torch.tensor(-9.1, dtype=accumulated)
    found = answer(kind(), x, y, scale, bias)
    assert found[0].dtype == accumulated and found[1].dtype == dtype
    assert_close(found, answer(wide(formula), x, y, scale, bias), LIMIT[dtype])


@pytest.mark.parametrize("bias", [-3.0, None])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("kind", "name", "formula"), LOSSES)
def test_image_text_losses_are_open_clips(
    kind: Any, name: str, formula: Any, shape: tuple[int, ...], bias: float | None
) -> None:
    x, y = draw(33, 16, unit=True), draw(33, 16, seed=1, unit=True)
    scale = torch.full(shape, 14.3, dtype=torch.float64)
    offset = None if bias is None else torch.full(shape, bias, dtype=torch.float64)
    assert_close(answer(kind(), x, y, scale, offset), answer(open_clip(name)(), x, y, scale, offset), 1e-12)
    given = {"image_features": x, "text_features": y, "logit_scale": scale, "logit_bias": offset}
    ours, theirs = kind()(**given, output_dict=True), open_clip(name)()(**given, output_dict=True)
    assert ours.keys() == theirs.keys() == {"contrastive_loss"}
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "name", "formula"), LOSSES)
def test_arguments_are_open_clips(kind: Any, name: str, formula: Any) -> None:
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(kind, method)).parameters
        theirs = inspect.signature(getattr(open_clip(name), method)).parameters
        assert list(ours) == list(theirs)
        for argument, parameter in theirs.items():
            assert parameter.default is parameter.empty or ours[argument].default == parameter.default
    options = {name: True for name in inspect.signature(kind).parameters if name in ("local_loss", "cache_labels")}
    assert all(getattr(kind(**options), name) is True for name in options)


@pytest.mark.parametrize(("kind", "name", "formula"), LOSSES)
def test_numbers_for_scale_and_bias(kind: Any, name: str, formula: Any) -> None:
    x, y = draw(5, 4), draw(5, 4, seed=1)
    expected = formula(x, y, torch.tensor(3.0), torch.tensor(-1.0))
    torch.testing.assert_close(kind()(x, y, 3.0, -1.0), expected)
    torch.testing.assert_close(kind()(x, y, 3, None), formula(x, y, torch.tensor(3.0), torch.tensor(0.0)))


@pytest.mark.parametrize(("kind", "name", "formula"), LOSSES)
def test_an_empty_batch_costs_nothing(kind: Any, name: str, formula: Any) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    loss = kind()(x, x, 3.0, 0.0)
    loss.backward()
    assert loss == 0 and x.grad is not None and x.grad.shape == (0, 4)


@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
def test_dist_impl_is_kept(dist_impl: str | None) -> None:
    assert SigLIPLoss(dist_impl=dist_impl).dist_impl == open_clip("SigLipLoss")(dist_impl=dist_impl).dist_impl


# ---- InfoNCE --------------------------------------------------------------------------------------------------------

MODES = [
    # negatives, negative_mode, in_batch, symmetric
    (None, "unpaired", None, False),
    (None, "unpaired", True, False),
    (None, "paired", None, False),
    (None, "unpaired", None, True),
    ((9,), "unpaired", None, False),
    ((0,), "unpaired", None, False),
    ((9,), "unpaired", False, False),
    ((9,), "unpaired", True, False),
    ((9,), "unpaired", None, True),
    ((6, 3), "paired", None, False),
    ((6, 1), "paired", False, False),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("negatives", "mode", "in_batch", "symmetric"), MODES)
def test_info_nce_is_cross_entropy(
    negatives: tuple[int, ...] | None, mode: str, in_batch: bool | None, symmetric: bool, unit: bool, reduction: str,
    smoothing: float,
) -> None:  # fmt: skip
    x, y = draw(6, 5), draw(6, 5, seed=1)
    others = None if negatives is None else draw(*negatives, 5, seed=2)
    loss = InfoNCELoss(
        0.3, reduction, mode, normalize=unit, symmetric=symmetric, in_batch=in_batch, label_smoothing=smoothing
    )

    def formula(x: Tensor, y: Tensor, others: Tensor | None) -> Tensor:
        whole = others is None or symmetric or bool(in_batch)
        return info_nce(
            x, y, others, 1 / 0.3, unit=unit, symmetric=symmetric, in_batch=whole, smoothing=smoothing,
            reduction=reduction,
        )  # fmt: skip

    assert_close(answer(loss, x, y, others), answer(formula, x, y, others), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_batch", [None, True])
@pytest.mark.parametrize("negatives", [None, (40,), (20, 3)])
def test_info_nce_in_other_dtypes(
    backend: str, negatives: tuple[int, ...] | None, in_batch: bool | None, dtype: torch.dtype
) -> None:
    mode = "paired" if negatives == (20, 3) else "unpaired"
    x, y = draw(20, 32, dtype=dtype, unit=True), draw(20, 32, seed=1, dtype=dtype, unit=True)
    others = None if negatives is None else draw(*negatives, 32, seed=2, dtype=dtype, unit=True)
    in_batch = None if mode == "paired" else in_batch
    loss = InfoNCELoss(0.1, negative_mode=mode, in_batch=in_batch, normalize=False)

    def formula(x: Tensor, y: Tensor, others: Tensor | None) -> Tensor:
        whole = others is None or bool(in_batch)
        return info_nce(
            x, y, others, 10.0, unit=False, symmetric=False, in_batch=whole, smoothing=0.0, reduction="mean"
        )  # fmt: skip

    found = answer(loss, x, y, others)
    assert found[0].dtype == torch.float32 and {t.dtype for t in found[1:]} == {dtype}
    assert_close(found, answer(wide(formula), x, y, others), LIMIT[dtype])


@pytest.mark.parametrize("negatives", [None, (9,), (6, 3)])
def test_info_nce_learns_its_temperature(negatives: tuple[int, ...] | None) -> None:
    x, y = draw(6, 5), draw(6, 5, seed=1)
    others = None if negatives is None else draw(*negatives, 5, seed=2)
    mode = "paired" if negatives == (6, 3) else "unpaired"
    loss = InfoNCELoss(0.2, negative_mode=mode, learnable_temperature=True)
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale"]
    assert loss.logit_scale is not None and loss.logit_scale.dtype == torch.float32 and loss.logit_scale.dim() == 0
    (2.5 * loss(x, y, others)).backward()
    start = loss.logit_scale.detach().double().requires_grad_()
    expected = info_nce(
        x, y, others, start.exp(), unit=True, symmetric=False, in_batch=others is None, smoothing=0.0, reduction="mean"
    )
    (2.5 * expected).backward()
    assert loss.logit_scale.grad is not None and start.grad is not None
    torch.testing.assert_close(loss.logit_scale.grad.double(), start.grad, rtol=1e-5, atol=1e-6)
    assert loss.temperature == pytest.approx(0.2)


def test_info_nce_bounds_a_learned_scale_in_training() -> None:
    x, y = draw(6, 5, dtype=torch.float32), draw(6, 5, seed=1, dtype=torch.float32)
    loss = InfoNCELoss(learnable_temperature=True, max_logit_scale=20.0)
    assert loss.logit_scale is not None
    with torch.no_grad():
        loss.logit_scale.fill_(math.log(50.0))
    at_50, at_20 = InfoNCELoss(1 / 50)(x, y), InfoNCELoss(1 / 20)(x, y)
    torch.testing.assert_close(loss.eval()(x, y), at_50)  # as it was loaded
    assert loss.temperature == pytest.approx(1 / 50)
    found = loss.train()(x, y)
    torch.testing.assert_close(found, at_20)
    assert loss.temperature == pytest.approx(1 / 20)
    found.backward()  # the bound does not cut off the gradient: it may come back
    assert loss.logit_scale.grad is not None and loss.logit_scale.grad != 0


# ---- SupCon and NT-Xent ---------------------------------------------------------------------------------------------

# the classes of eight anchors
CLASSES = {
    "two of each": [0, 1, 2, 3, 0, 1, 2, 3],
    "two or one": [7, 1, 2, 7, 1, 2, 3, 4],
    "unequal": [0, 0, 0, 1, 1, 2, 0, -3],
    "one large": [0, 0, 0, 0, 0, 0, 0, 1],
    "no negative": [5] * 8,
    "no positive": list(range(8)),
    "several of each": [0, 1, 0, 1, 0, 1, 0, 1],
}
# references for the anchors: none, or the classes of six
REFERENCES: dict[str, list[int] | None] = {
    "themselves": None, "others": [0, 0, 7, 1, 2, 9], "of one class": [0] * 6, "of no class": [20] * 6,
}  # fmt: skip
KINDS = [(SupConLoss, "SupConLoss"), (NTXentLoss, "NTXentLoss")]


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_class_losses_are_metric_learnings(kind: Any, name: str, classes: str, references: str) -> None:
    z, labels = 3 * draw(8, 5), torch.tensor(CLASSES[classes])
    given: dict[str, Any] = {}
    if REFERENCES[references] is not None:
        given = {"ref_emb": draw(6, 5, seed=1), "ref_labels": torch.tensor(REFERENCES[references])}
    for options in ({}, {"temperature": 0.4}):
        ours = answer(kind(**options), z, labels, **given)
        assert_close(ours, answer(metric_learning(name)(**options), z, labels, **given), 1e-12)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_references_with_the_anchors_own_labels(kind: Any, name: str, classes: str) -> None:
    """The very same tensor of labels, or none: row i of the references is anchor i. A copy of it: it is another."""
    z, ref, labels = draw(8, 5), draw(8, 5, seed=1), torch.tensor(CLASSES[classes])
    ours, theirs = kind(), metric_learning(name)()
    for ref_labels in (labels, None, labels.clone()):
        given = {"ref_emb": ref, "ref_labels": ref_labels}
        assert_close(answer(ours, z, labels, **given), answer(theirs, z, labels, **given), 1e-12)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_embeddings_as_they_are(kind: Any, name: str) -> None:
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    z, labels = draw(8, 5), torch.tensor(CLASSES["unequal"])
    theirs = metric_learning(name)(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    assert_close(answer(kind(normalize=False), z, labels), answer(theirs, z, labels), 1e-12)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_arguments_are_metric_learnings_and_lightlys(kind: Any, name: str) -> None:
    model = metric_learning(name)
    ours, theirs = (inspect.signature(k.forward).parameters for k in (kind, model))
    assert [*ours] == [*theirs] and all(ours[p].default == theirs[p].default for p in theirs)
    if name == "SupConLoss":
        default = inspect.signature(model).parameters["temperature"].default
        assert kind().temperature == default == inspect.signature(kind).parameters["temperature"].default
    else:
        lightly = inspect.signature(peer("lightly.loss.ntx_ent_loss", "NTXentLoss")).parameters
        positional = [p for p, q in inspect.signature(kind).parameters.items() if q.kind is q.POSITIONAL_OR_KEYWORD]
        assert positional == [*lightly]


TRIPLETS = ([0, 0, 3, 4, 0], [1, 3, 1, 5, 1], [2, 2, 5, 7, 6])
PAIRS = ([0, 0, 3, 4, 0], [1, 3, 1, 5, 1], [2, 2, 5, 4], [0, 1, 0, 1])


@pytest.mark.parametrize("pairs", [TRIPLETS, PAIRS, ([0, 1], [1, 0], [], []), ([], [], [0, 1], [1, 0])])
@pytest.mark.parametrize("labels", [None, CLASSES["unequal"]])
@pytest.mark.parametrize("with_references", [False, True])
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_pairs_of_a_miner(
    kind: Any, name: str, with_references: bool, labels: list[int] | None, pairs: tuple[list[int], ...]
) -> None:
    z, classes = draw(8, 5), None if labels is None else torch.tensor(labels)
    given: dict[str, Any] = {"indices_tuple": tuple(torch.tensor(p, dtype=torch.int64) for p in pairs)}
    if with_references:
        given |= {"ref_emb": draw(8, 5, seed=1)}
    assert_close(answer(kind(), z, classes, **given), answer(metric_learning(name)(), z, classes, **given), 1e-12)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_real_miner(kind: Any, name: str) -> None:
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    z, labels = draw(24, 8), torch.arange(24) % 5
    for miner in (miners.MultiSimilarityMiner(epsilon=0.1), miners.TripletMarginMiner(margin=0.2)):
        pairs = miner(z, labels)
        assert len(pairs[0])
        ours, theirs = answer(kind(), z, labels, pairs), answer(metric_learning(name)(), z, labels, pairs)
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [9, 35, 70])
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_class_losses_in_other_dtypes(backend: str, kind: Any, name: str, classes: int, dtype: torch.dtype) -> None:
    z, labels = draw(71, 16, dtype=dtype, unit=True), torch.arange(71) % classes
    found = answer(kind(0.3, normalize=False), z, labels)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    # against the model in float64: it does not normalize what is rounded here either
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    model = metric_learning(name)(0.3, distance=distances.DotProductSimilarity(normalize_embeddings=False))
    assert_close(found, answer(wide(model), z, labels), LIMIT[dtype])


def test_normalizing_16_bits_does_not_scale_the_logits() -> None:
    """A length rounded to bfloat16 would change every logit of its row by up to 0.4 %."""
    z, labels = 3.7 * draw(64, 256, dtype=torch.bfloat16), torch.arange(64) % 8
    exact = SupConLoss(0.02, reduction="none")(z.double(), labels)
    assert relative_error(SupConLoss(0.02, reduction="none")(z, labels), exact) < 2e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", CLASSES)
def test_reductions_of_nt_xent(classes: str, reduction: str) -> None:
    z, labels = draw(8, 5), torch.tensor(CLASSES[classes])

    def formula(z: Tensor) -> Tensor:
        pairs = nt_xent(z, labels)
        sums = torch.stack([torch.stack(p).sum() if p else z.new_zeros(()) for p in pairs])
        number = max(1, sum(len(p) for p in pairs))
        return {"none": sums, "sum": sums.sum(), "mean": sums.sum() / number}[reduction]

    loss = NTXentLoss(reduction=reduction)
    assert_close(answer(lambda z: loss(z, labels), z), answer(formula, z), 1e-12)
    everything = labels[:, None] == labels
    pairs = (*(everything & ~torch.eye(8, dtype=torch.bool)).nonzero().T, *(~everything).nonzero().T)
    assert_close(answer(lambda z: loss(z, labels, pairs), z), answer(formula, z), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_of_sup_con(reduction: str) -> None:
    z, labels = draw(8, 5), torch.tensor(CLASSES["unequal"])

    def formula(z: Tensor) -> Tensor:
        z = normalize(z, dim=1)
        logits = (z @ z.T / 0.1).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
        log_probability = logits.log_softmax(1).masked_fill(torch.eye(8, dtype=torch.bool), 0.0)
        positive = (labels[:, None] == labels) & ~torch.eye(8, dtype=torch.bool)
        count = positive.sum(1)
        losses = -(log_probability * positive).sum(1) / count.clamp(min=1)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (count > 0).sum()}[reduction]

    loss = SupConLoss(reduction=reduction)
    assert_close(answer(lambda z: loss(z, labels), z), answer(formula, z), 1e-12)


def test_the_mean_of_sup_con_is_over_losses_above_0() -> None:
    """Anchor 0 has one positive, and no other reference: a loss of exactly 0, which the model's mean leaves out."""
    indices = tuple(torch.tensor(i) for i in ([0, 1, 2], [1, 0, 3], [1, 2], [2, 0]))
    z = draw(4, 5)
    ours, theirs = answer(SupConLoss(), z, None, indices), answer(metric_learning("SupConLoss")(), z, None, indices)
    assert_close(ours, theirs, 1e-12)
    each = SupConLoss(reduction="none")(z, None, indices)
    assert each[0] == 0 and ours[0] == pytest.approx(float(each.sum()) / int((each > 0).sum()))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_nt_xent_of_two_views_is_lightlys(temperature: float | None) -> None:
    options = {} if temperature is None else {"temperature": temperature}
    theirs = peer("lightly.loss.ntx_ent_loss", "NTXentLoss")(**options)
    first, second = draw(12, 7), draw(12, 7, seed=1)
    found = answer(NTXentLoss(**options), first, second)
    assert_close(found, answer(theirs, first, second), 1e-12)
    # and of two samples of each class, with this temperature
    labels = torch.arange(12).repeat(2)
    both = answer(NTXentLoss(temperature or 0.5), torch.cat([first, second]), labels)
    assert_close(both, [found[0], torch.cat(found[1:])], 1e-12)


def test_nt_xent_keeps_small_negatives_beside_large_positives() -> None:
    """All others less the other positives: beside those, a float32 has no digit of the negatives."""
    centers = torch.eye(8)[:4] + 1.0  # at a cosine of 0.9 to each other
    labels = torch.arange(16) % 4
    z = (centers[labels] + 0.01 * draw(16, 8, dtype=torch.float32)).requires_grad_()
    loss = NTXentLoss(0.005, reduction="none")
    found, exact = answer(loss, z, labels), answer(loss, z.double(), labels)
    assert (exact[0] > 0).all() and exact[0].max() < 1e-4
    assert relative_error(found[0], exact[0]) < 1e-4 and relative_error(found[1], exact[1]) < 1e-4


@pytest.mark.parametrize("kind", [SupConLoss, NTXentLoss])
def test_batches_without_anything_to_learn_from(kind: Any) -> None:
    for rows in (0, 1):
        z = torch.ones(rows, 4, requires_grad=True)
        loss = kind()(z, torch.zeros(rows, dtype=torch.int64))
        loss.backward()
        assert loss == 0 and z.grad is not None and not z.grad.any()
    z = torch.ones(3, 4, requires_grad=True)
    loss = kind()(z, torch.arange(3), ref_emb=torch.ones(0, 4), ref_labels=torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and z.grad is not None and not z.grad.any()


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_one_positive_and_one_negative_pair_have_a_loss(kind: Any, name: str) -> None:
    """A documented difference: the model takes a single pair of each for none."""
    z, ref = draw(1, 5), draw(2, 5, seed=1)
    given = {"ref_emb": ref, "ref_labels": torch.tensor([3, 4])}
    logits = normalize(z, dim=1) @ normalize(ref, dim=1).T / 0.2
    expected = logits.logsumexp(1)[0] - logits[0, 0]
    torch.testing.assert_close(kind(0.2)(z, torch.tensor([3]), **given), expected, rtol=1e-12, atol=0)
    assert metric_learning(name)(0.2)(z, torch.tensor([3]), **given) == 0


@pytest.mark.parametrize("kind", [SupConLoss, NTXentLoss])
def test_any_integer_dtype_of_labels(kind: Any) -> None:
    z, labels = draw(8, 5), torch.tensor(CLASSES["unequal"])
    expected = kind()(z, labels)
    for dtype in (torch.int32, torch.int8):
        torch.testing.assert_close(kind()(z, labels.to(dtype)), expected)


# ---- what all of them do --------------------------------------------------------------------------------------------

FOUR = torch.arange(4)
ALL: list[tuple[str, Callable[[], nn.Module], Callable[[Tensor, Tensor], tuple[Any, ...]]]] = [
    ("CLIP", CLIPLoss, lambda x, y: (x, y, 5.0)),
    ("SigLIP", SigLIPLoss, lambda x, y: (x, y, torch.tensor(5.0), torch.tensor(-2.0))),
    ("InfoNCE", lambda: InfoNCELoss(label_smoothing=0.1, symmetric=True), lambda x, y: (x, y)),
    ("InfoNCE learned", lambda: InfoNCELoss(learnable_temperature=True), lambda x, y: (x, y)),
    ("InfoNCE negatives", lambda: InfoNCELoss(label_smoothing=0.1), lambda x, y: (x, y, x.flip(0))),
    ("InfoNCE both", lambda: InfoNCELoss(in_batch=True), lambda x, y: (x, y, x.flip(0))),
    ("SupCon", SupConLoss, lambda x, y: (x, torch.arange(x.shape[0]) // 2)),
    ("SupCon references", SupConLoss, lambda x, y: (x, torch.arange(x.shape[0]) // 2, None, y)),
    ("NTXent views", NTXentLoss, lambda x, y: (x, y)),
    ("NTXent classes", NTXentLoss, lambda x, y: (x, torch.arange(x.shape[0]) // 2)),
    ("NTXent large classes", NTXentLoss, lambda x, y: (x, torch.arange(x.shape[0]) // 4)),
]
PAIRED = (
    "InfoNCE paired",
    lambda: InfoNCELoss(negative_mode="paired"),
    lambda x, y: (x, y, torch.stack([x.flip(0), y.flip(0)], 1)),
)
everywhere = pytest.mark.parametrize(("name", "make", "arguments"), [*ALL, PAIRED])


@pytest.mark.parametrize(("name", "make", "arguments"), ALL)
def test_nothing_of_the_size_of_the_matrix_is_kept(name: str, make: Any, arguments: Any) -> None:
    rows = 256
    x, y = draw(rows, 4, dtype=torch.float32).requires_grad_(), draw(rows, 4, seed=1, dtype=torch.float32)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = make()(*arguments(x, y))
    loss.backward()
    assert kept and max(kept) <= 2 * rows * 4


@everywhere
def test_compile(name: str, make: Any, arguments: Any) -> None:
    torch.compiler.reset()
    loss = make()
    with_labels = name in ("NTXent classes", "NTXent large classes")  # reads the sizes of classes
    compiled = torch.compile(loss, fullgraph=not with_labels, backend="aot_eager")
    x, y = draw(8, 5, dtype=torch.float32), draw(8, 5, seed=1, dtype=torch.float32)
    found = answer(lambda x, y: compiled(*arguments(x, y)), x, y)
    assert_close(found, answer(lambda x, y: loss(*arguments(x, y)), x, y), 1e-6)


@everywhere
def test_autocast_rounds_the_features_and_nothing_else(name: str, make: Any, arguments: Any) -> None:
    x, y = (draw(8, 16, seed=seed, dtype=torch.bfloat16).float() for seed in (0, 1))
    loss = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answer(lambda x, y: loss(*arguments(x, y)), x, y)
    expected = answer(lambda x, y: loss(*arguments(x, y)), x.bfloat16(), y.bfloat16())
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert_close(found, expected, LIMIT[torch.bfloat16])


def test_autocast_takes_features_of_two_dtypes() -> None:
    x, y = draw(8, 16, dtype=torch.float32, unit=True), draw(8, 16, seed=1, dtype=torch.bfloat16, unit=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [CLIPLoss()(x, y, 5.0), SigLIPLoss()(x, y, 5.0, -2.0), InfoNCELoss(normalize=False)(x, y)]
    x = x.bfloat16()
    expected = [CLIPLoss()(x, y, 5.0), SigLIPLoss()(x, y, 5.0, -2.0), InfoNCELoss(normalize=False)(x, y)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@everywhere
def test_copies_and_state(name: str, make: Any, arguments: Any) -> None:
    loss = make()
    if isinstance(loss, InfoNCELoss) and loss.logit_scale is not None:
        with torch.no_grad():
            loss.logit_scale.fill_(1.25)
        assert list(loss.state_dict()) == ["logit_scale"]
    else:
        assert not loss.state_dict()
    loaded = make()
    loaded.load_state_dict(loss.state_dict())
    args = arguments(draw(8, 5), draw(8, 5, seed=1))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loaded):
        assert torch.equal(other(*args), loss(*args)) and repr(other) == repr(loss)


def test_repr() -> None:
    assert repr(CLIPLoss()) == "CLIPLoss()" and repr(SigLIPLoss()) == "SigLIPLoss()"
    assert repr(SupConLoss(0.5)) == "SupConLoss(temperature=0.5, normalize=True, reduction='mean')"
    assert repr(NTXentLoss()) == "NTXentLoss(temperature=None, normalize=True, reduction='mean')"
    assert repr(InfoNCELoss(0.2, in_batch=True, label_smoothing=0.1)) == (
        "InfoNCELoss(temperature=0.2, reduction='mean', negative_mode='unpaired', in_batch=True, label_smoothing=0.1)"
    )
    assert repr(InfoNCELoss(0.2, learnable_temperature=True)) == (
        "InfoNCELoss(temperature=0.2, reduction='mean', negative_mode='unpaired', learnable_temperature=True)"
    )


@pytest.mark.parametrize(("name", "make", "arguments"), ALL)
def test_a_second_derivative_raises(name: str, make: Any, arguments: Any) -> None:
    x, y = draw(8, 5).requires_grad_(), draw(8, 5, seed=1)
    (grad,) = torch.autograd.grad(make()(*arguments(x, y)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="may be differentiated once"):
        grad.sum().backward()


def test_examples_of_the_docstrings() -> None:
    result = doctest.testmod(tlkernels.nn.contrastive)
    assert result.attempted >= 15 and not result.failed


@pytest.mark.parametrize("kind", [SupConLoss, NTXentLoss])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_does_not_pass_for_nothing_to_learn(kind: Any, value: float) -> None:
    z = draw(4, 3)
    z[1, 2] = value
    z.requires_grad_()
    loss = kind()(z, LABELS)
    loss.backward()
    assert loss.isnan() and z.grad is not None and z.grad.isnan().any()


def test_siglip_of_many_float16_has_finite_gradients() -> None:
    """The gradient of the sum, 100 * 4096 / 2 / sqrt(D), is beyond 65504, that of the mean is not."""
    x = torch.full((4096, 4), 0.5, dtype=torch.float16, requires_grad=True)
    y = torch.full((4096, 4), 0.5, dtype=torch.float16, requires_grad=True)
    SigLIPLoss()(x, y, 100.0, -100.0).backward()
    wanted = 50.0 * (0.5 - 1 / 4096)  # of each element: half of the negatives, less the positive's half
    for t in (x, y):
        assert t.grad is not None
        torch.testing.assert_close(t.grad.float(), torch.full((4096, 4), wanted), rtol=2e-3, atol=0)


# ---- wrong calls ----------------------------------------------------------------------------------------------------

X, LABELS, VIEW = torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), torch.ones(4, 3)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CLIPLoss(world_size=2), ValueError, r"CLIPLoss: world_size is 2; expected 1.*tlkernels.distributed"),
    (lambda: CLIPLoss(rank=1), ValueError, "CLIPLoss: rank is 1 of world_size 1; expected 0"),
    (lambda: SigLIPLoss(world_size=3), ValueError, "SigLIPLoss: world_size is 3; expected 1"),
    (lambda: SigLIPLoss(dist_impl="tree"), ValueError, "SigLIPLoss: dist_impl is 'tree'; expected 'bidir'"),
    (lambda: CLIPLoss()(X, X[:3], 1.0), ValueError, "CLIPLoss: text_features has 3 rows; expected 4, like image_f"),
    (lambda: CLIPLoss()(X, X[:, :2], 1.0), ValueError, r"CLIPLoss: text_features has shape \(4, 2\); expected \(N, 3"),
    (lambda: CLIPLoss()(X[0], X, 1.0), ValueError, r"CLIPLoss: image_features has shape \(3,\); expected \(N, D\)"),
    (lambda: CLIPLoss()(X, X.double(), 1.0), TypeError, "text_features has dtype float64; expected float32, like im"),
    (lambda: CLIPLoss()(X.long(), X, 1.0), TypeError, "CLIPLoss: image_features has dtype int64; expected float32"),
    (lambda: CLIPLoss()(X, X, torch.ones(2)), ValueError, r"logit_scale has shape \(2,\); expected one element"),
    (lambda: SigLIPLoss()(X, X, 1.0, torch.ones(2)), ValueError, r"logit_bias has shape \(2,\); expected one elem"),
    (lambda: SigLIPLoss()(X, X[:3], 1.0, 0.0), ValueError, "SigLIPLoss: text_features has 3 rows; expected 4"),
    (lambda: InfoNCELoss(0.0), ValueError, "InfoNCELoss: temperature is 0.0; expected > 0"),
    (lambda: InfoNCELoss(math.nan), ValueError, "InfoNCELoss: temperature is nan; expected > 0"),
    (lambda: InfoNCELoss(torch.ones(())), TypeError, "InfoNCELoss: temperature is Tensor; expected a number"),
    (lambda: InfoNCELoss(reduction="max"), ValueError, "InfoNCELoss: reduction is 'max'; expected 'mean'"),
    (lambda: InfoNCELoss(negative_mode="all"), ValueError, "InfoNCELoss: negative_mode is 'all'; expected 'unpaired'"),
    (lambda: InfoNCELoss(label_smoothing=1.5), ValueError, "label_smoothing is 1.5; expected 0 <= label_smoothing"),
    (lambda: InfoNCELoss(symmetric=True, in_batch=False), ValueError, "in_batch is False with symmetric; expected"),
    (lambda: InfoNCELoss(0.1, "mean", "paired", in_batch=True), ValueError, "'paired' with in_batch; expected 'unp"),
    (lambda: InfoNCELoss(0.1, "mean", "paired", symmetric=True), ValueError, "'paired' with symmetric; expected 'unp"),
    (
        lambda: InfoNCELoss(0.001, learnable_temperature=True),
        ValueError,
        "max_logit_scale is 100.0 for temperature 0.001; expected at least 1000",
    ),
    (lambda: InfoNCELoss(in_batch=False)(X, X), ValueError, "in_batch is False without negative_keys"),
    (lambda: InfoNCELoss()(X, X[:2]), ValueError, "InfoNCELoss: positive_key has 2 rows; expected 4, like query"),
    (lambda: InfoNCELoss()(X, X, X[:, :2]), ValueError, r"negative_keys has shape \(4, 2\); expected \(N, 3\)"),
    (lambda: InfoNCELoss()(X, X, X.half()), TypeError, "negative_keys has dtype float16; expected float32, like query"),
    (
        lambda: InfoNCELoss(negative_mode="paired")(X, X, X),
        ValueError,
        r"negative_keys has shape \(4, 3\); expected \(4, M, 3\) in negative_mode 'paired'",
    ),
    (
        lambda: InfoNCELoss(negative_mode="paired")(X, X, torch.ones(4, 2, 3).double()),
        TypeError,
        "negative_keys has dtype float64; expected float32",
    ),
    (lambda: SupConLoss(0), ValueError, "SupConLoss: temperature is 0; expected > 0"),
    (lambda: SupConLoss(reduction="avg"), ValueError, "SupConLoss: reduction is 'avg'; expected"),
    (lambda: SupConLoss()(X), ValueError, "SupConLoss: labels and indices_tuple are None; expected one of them"),
    (lambda: SupConLoss()(X, LABELS[:3]), ValueError, r"SupConLoss: labels has dtype int64 and shape \(3,\); expected"),
    (lambda: SupConLoss()(X, LABELS.float()), ValueError, "SupConLoss: labels has dtype float32 and shape"),
    (lambda: SupConLoss()(X, LABELS, ref_labels=LABELS), ValueError, "ref_labels are given without ref_emb"),
    (lambda: SupConLoss()(X, LABELS, ref_emb=X[:, :2]), ValueError, r"ref_emb has shape \(4, 2\); expected \(N, 3\)"),
    (
        lambda: SupConLoss()(X, LABELS, ref_emb=X[:2], ref_labels=LABELS[:3]),
        ValueError,
        r"ref_labels has dtype int64 and shape \(3,\); expected int64 \(2,\)",
    ),
    (lambda: SupConLoss()(X, LABELS, ref_emb=X[:2]), ValueError, "labels, which are those of ref_emb too, has dtype"),
    (lambda: SupConLoss()(X, LABELS, (LABELS,) * 2), ValueError, r"indices_tuple has 2 tensors; expected 3 \(triplets"),
    (lambda: SupConLoss()(X, LABELS, (LABELS,) * 4), ValueError, "has a pair that is positive and negative"),
    (lambda: NTXentLoss(-1.0), ValueError, "NTXentLoss: temperature is -1.0; expected > 0"),
    (lambda: NTXentLoss(memory_bank_size=8), ValueError, "memory_bank_size is 8; expected 0: use InfoNCELoss"),
    (lambda: NTXentLoss(memory_bank_size=(8, 3)), ValueError, r"memory_bank_size is \(8, 3\); expected 0"),
    (
        lambda: NTXentLoss(gather_distributed=True),
        ValueError,
        "gather_distributed is True; expected False: tlkernels.d",
    ),
    (lambda: NTXentLoss()(X), ValueError, "NTXentLoss: labels and indices_tuple are None"),
    (lambda: NTXentLoss()(X, VIEW[:3]), ValueError, "NTXentLoss: labels has 3 rows; expected 4, like embeddings"),
    (lambda: NTXentLoss()(X, VIEW, ref_emb=X), ValueError, "NTXentLoss: ref_emb is given with two views; expected Non"),
    # what is no tensor
    (lambda: CLIPLoss()(X.numpy(), X, 1.0), TypeError, "CLIPLoss: image_features is ndarray; expected a tensor"),
    (lambda: SigLIPLoss()(X, 1.0, 1.0), TypeError, "SigLIPLoss: text_features is float; expected a tensor"),
    (lambda: InfoNCELoss()(X, X, [1.0]), TypeError, "InfoNCELoss: negative_keys is list; expected a tensor"),
    (
        lambda: InfoNCELoss(negative_mode="paired")(X, X, [1.0]),
        TypeError,
        "InfoNCELoss: negative_keys is list; expected a tensor",
    ),
    (lambda: InfoNCELoss(label_smoothing="1"), TypeError, "InfoNCELoss: label_smoothing is str; expected a number"),
    (lambda: SupConLoss()(X, [0, 0, 1, 1]), TypeError, "SupConLoss: labels is list; expected a tensor"),
    (lambda: NTXentLoss()(X, LABELS.numpy()), TypeError, "NTXentLoss: labels is ndarray; expected a tensor"),
    (lambda: SupConLoss()(X, LABELS, None, X, [0, 1]), TypeError, "SupConLoss: ref_labels is list; expected a tensor"),
    (lambda: NTXentLoss()(X, LABELS, None, [1.0]), TypeError, "NTXentLoss: ref_emb is list; expected a tensor"),
    (lambda: NTXentLoss(memory_bank_size=[]), ValueError, r"memory_bank_size is \[\]; expected 0: use InfoNCELoss"),
    # what is elsewhere
    (lambda: CLIPLoss()(X, X.to("meta"), 1.0), ValueError, "CLIPLoss: text_features is on meta; expected cpu"),
    (lambda: InfoNCELoss()(X, X, X.to("meta")), ValueError, "InfoNCELoss: negative_keys is on meta; expected cpu"),
    # what no miner finds
    *(
        (lambda kind=kind, given=given: kind()(X, LABELS, given), error, says)
        for kind in (SupConLoss, NTXentLoss)
        for given, error, says in (
            (3, TypeError, "indices_tuple is int; expected a tuple of 3 or 4 tensors"),
            (([0], [1], [2]), TypeError, r"indices_tuple\[0\] is list; expected a tensor"),
            ((LABELS, LABELS.float(), LABELS), ValueError, r"indices_tuple\[1\] has dtype float32 and shape \(4,\)"),
            (
                (LABELS, LABELS, LABELS[:2]),
                ValueError,
                r"\[2\] has dtype int64 and shape \(2,\); expected int64 \(4,\)",
            ),
            ((LABELS, LABELS, LABELS[:2], LABELS), ValueError, r"indices_tuple\[3\] has .*; expected int64 \(2,\)"),
            ((LABELS, LABELS, LABELS + 3), IndexError, r"indices_tuple\[2\] has an entry 4; expected 0 <= index < 4"),
            ((LABELS, LABELS - 1, LABELS), IndexError, r"indices_tuple\[1\] has an entry -1; expected 0 <= index < 4"),
        )
    ),
    (lambda: NTXentLoss()(X, VIEW.long()), ValueError, r"NTXentLoss: labels has dtype int64 and shape \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG, ids=[says[:50] for _, _, says in WRONG])
def test_wrong_calls(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    # what a compiled op finds is a RuntimeError, with the same sentence
    with pytest.raises((error, RuntimeError) if "one elem" in says else error, match=says):
        call()
