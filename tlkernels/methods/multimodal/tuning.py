r"""Ways to fit a model of images and texts to a task, from no training at all to all of its weights.

=====================  ==============================================================================================
`TipAdapter`           a cache of a few labelled examples beside the zero-shot classes: no training, or of its keys
`fit_linear_probe`     logistic regression on frozen features
`CoOp`, `CoCoOp`       learned context words for a frozen text encoder, the same for all images or shifted by each
`apply_clip_lora`      low-rank updates in the attention of both towers
`flyp_loss`            all weights, with the loss of pre-training on prompts of the classes
`wise_ft_curve`        between the weights before and after, by `tlkernels.methods.finetune.wise_ft`
=====================  ==============================================================================================
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels import ops
from tlkernels.methods._common import accumulator, check_float, check_scalar, check_tensor, normalized, wide
from tlkernels.methods.finetune.merging import State, wise_ft
from tlkernels.methods.multimodal._checks import check_pairs
from tlkernels.methods.peft.apply import Applied, apply
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.ops._common import name_of, no_autocast

__all__ = [
    "CoCoOp",
    "CoOp",
    "LinearProbeFit",
    "PromptContext",
    "TipAdapter",
    "TipAdapterSearch",
    "apply_clip_lora",
    "fit_linear_probe",
    "flyp_loss",
    "sample_prompts",
    "wise_ft_curve",
]

#: prompts [n, length, width] and the class of each [n] to features [n, D]
TextEncoder: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _check_labels(op: str, name: str, labels: Tensor, rows: int, classes: int | None = None) -> None:
    check_tensor(op, **{name: labels})
    if labels.dtype != torch.int64 or tuple(labels.shape) != (rows,):
        got = f"dtype {name_of(labels.dtype)} and shape {tuple(labels.shape)}"
        raise ValueError(f"{op}: {name} has {got}; expected int64 ({rows},)")
    if rows and (int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= classes)):
        bound = "" if classes is None else f" < {classes}"
        raise ValueError(f"{op}: {name} is from {int(labels.min())} to {int(labels.max())}; expected 0 <= label{bound}")


def _check_matrix(op: str, name: str, t: Tensor, width: int | None = None) -> None:
    check_float(op, **{name: t})
    if t.dim() != 2 or (width is not None and t.shape[1] != width):
        want = "features" if width is None else str(width)
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected (rows, {want})")


# ---- linear probe ---------------------------------------------------------------------------------------------------


class LinearProbeFit(NamedTuple):
    """What `fit_linear_probe` returns."""

    #: from features to logits, of the features' dtype
    head: nn.Linear
    #: the one that was chosen
    C: float
    #: of the validation set by each C; empty without one
    accuracy: dict[float, float]


def fit_linear_probe(
    features: Tensor, labels: Tensor, *, C: float | Sequence[float] = 1.0,
    validation: tuple[Tensor, Tensor] | None = None, num_classes: int | None = None, max_iter: int = 1000,
    tolerance: float = 1e-6,
) -> LinearProbeFit:  # fmt: skip
    r"""Logistic regression on frozen features, by L-BFGS in float64 on the features' device.

    Parameters
    ----------
    features : Tensor
        ``[N, D]``, float32, bfloat16, float16 or float64.
    labels : Tensor
        int64 ``[N]``.
    C : float or sequence of float
        Inverse strength of the penalty, > 0. Of several, the best on `validation` is taken, the smaller of equals.
    validation : tuple of Tensor, optional
        Features and labels; with several `C`.
    num_classes : int, optional
        By default one more than the largest label.
    max_iter : int
        Of L-BFGS, for each C; a warning tells where it was not enough.
    tolerance : float
        Largest element of the gradient of the mean loss at the end.

    Returns
    -------
    LinearProbeFit
        (head, C, accuracy).

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, labels or `C` do not fit.

    Notes
    -----
    .. math:: \min_{W, b} \; \frac12 \|W\|_F^2 + C \sum_i -\log \operatorname{softmax}(W x_i + b)_{y_i}

    as in scikit-learn's ``LogisticRegression`` for three classes or more. The bias is not penalized, and each C starts
    from the solution of the one before.

    References
    ----------
    Radford et al., CLIP, ICML 2021, arXiv:2103.00020, appendix A.3.
    """
    op = "fit_linear_probe"
    _check_matrix(op, "features", features)
    rows, width = features.shape
    if not rows:
        raise ValueError(f"{op}: features has no rows; expected at least one")
    _check_labels(op, "labels", labels, rows, num_classes)
    strengths = sorted([float(C)] if isinstance(C, (int, float)) else [float(c) for c in C])
    if not strengths or not all(0.0 < c < math.inf for c in strengths):
        raise ValueError(f"{op}: C is {C}; expected one or more numbers above 0")
    if len(strengths) > 1 and validation is None:
        raise ValueError(f"{op}: validation is None with {len(strengths)} values of C; expected features and labels")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if validation is not None:
        _check_matrix(op, "validation[0]", validation[0], width)
        _check_labels(op, "validation[1]", validation[1], validation[0].shape[0])
        if not validation[0].shape[0]:
            raise ValueError(f"{op}: validation has no rows; expected at least one")
    x = features.detach().to(torch.float64)
    weight = torch.zeros(classes, width, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    best: tuple[float, float, Tensor, Tensor] | None = None
    accuracy: dict[float, float] = {}
    for c in strengths:
        _minimize(op, x, labels, weight, bias, c, max_iter, tolerance)
        found = 0.0
        if validation is not None:
            logits = validation[0].to(torch.float64) @ weight.detach().T + bias.detach()
            found = accuracy[c] = float((logits.argmax(1) == validation[1]).double().mean())
        if best is None or found > best[0]:
            best = (found, c, weight.detach().clone(), bias.detach().clone())
    assert best is not None
    head = nn.Linear(width, classes, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(best[2])
        head.bias.copy_(best[3])
    return LinearProbeFit(head, best[1], accuracy)


@torch.enable_grad()
def _minimize(
    op: str, x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, c: float, max_iter: int, tolerance: float
) -> None:  # fmt: skip
    penalty = 0.5 / (c * x.shape[0])
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=tolerance, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional.linear(x, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    worst = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    if worst > tolerance:
        warnings.warn(
            f"{op}: with C {c:g} the gradient is {worst:.3g} at the end, above tolerance {tolerance}; "
            "more max_iter, or features of similar scale, would help",
            stacklevel=3,
        )


# ---- Tip-Adapter ----------------------------------------------------------------------------------------------------


class TipAdapterSearch(NamedTuple):
    """What `TipAdapter.search` found."""

    alpha: float
    beta: float
    accuracy: float


class TipAdapter(nn.Module):
    r"""Tip-Adapter: labelled examples as keys and values of a cache, beside the zero-shot classifier.

    Parameters
    ----------
    features : Tensor
        ``[N, D]``, image features of the examples, or ``[A, N, D]``, of A augmentations, which are averaged.
        Normalized here.
    labels : Tensor
        int64 ``[N]``.
    class_features : Tensor
        ``[C, D]`` of the same dtype, text features of the classes; normalized here.
    alpha : float
        Weight of the cache, >= 0.
    beta : float
        Sharpness, > 0.
    logit_scale : float
        Of the zero-shot logits; CLIP's is 100.
    trainable : bool
        Tip-Adapter-F: the keys are a parameter, to be trained with cross-entropy.

    Attributes
    ----------
    keys : Tensor or torch.nn.Parameter
        ``[N, D]``.
    class_features : Tensor
        ``[C, D]``, rows of length 1.
    alpha, beta, logit_scale : float
        May be set; see `search`. They are in the ``state_dict``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or a number is out of range.

    Notes
    -----
    For a feature f of length 1, keys K, values V (one-hot rows of the labels) and class features W,

    .. math:: \text{logits} = \alpha \, e^{-\beta (1 - f K^T)} V + s \, f W^T

    The product with V adds the columns of each class.

    References
    ----------
    Zhang et al., Tip-Adapter, ECCV 2022, arXiv:2207.09519.
    """

    keys: Tensor
    labels: Tensor
    class_features: Tensor

    def __init__(
        self, features: Tensor, labels: Tensor, class_features: Tensor, *, alpha: float = 1.0, beta: float = 5.5,
        logit_scale: float = 100.0, trainable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "TipAdapter"
        _check_matrix(op, "class_features", class_features)
        check_float(op, features=features)
        if features.dim() == 3:
            features = features.mean(0)
        _check_matrix(op, "features", features, class_features.shape[1])
        if features.dtype != class_features.dtype:
            got, want = name_of(features.dtype), name_of(class_features.dtype)
            raise TypeError(f"{op}: features has dtype {got}; expected {want}, like class_features")
        _check_labels(op, "labels", labels, features.shape[0], class_features.shape[0])
        _check_cache(op, alpha, beta)
        self.alpha, self.beta, self.logit_scale = alpha, beta, logit_scale
        keys = normalized(features.detach())
        if trainable:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("labels", labels.clone())
        self.register_buffer("class_features", normalized(class_features.detach()))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[B, C]`` of image features ``[B, D]``, which are normalized here; float32 or float64."""
        _check_matrix("TipAdapter", "features", features, self.keys.shape[1])
        zero_shot, affinity = self._similarities(features)
        return zero_shot + self.alpha * self._cache(affinity, self.beta)

    def _similarities(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The zero-shot logits, and the cosines with the keys."""
        query = normalized(features)
        return _scaled_cosines(query, self.class_features, self.logit_scale), _scaled_cosines(query, self.keys, 1.0)

    def _cache(self, affinity: Tensor, beta: float) -> Tensor:
        weights = torch.exp(beta * (affinity - 1.0))
        empty = weights.new_zeros(weights.shape[0], self.class_features.shape[0])
        return empty.index_add(1, self.labels, weights)

    @torch.no_grad()
    def search(
        self, features: Tensor, labels: Tensor, alphas: Sequence[float] | None = None,
        betas: Sequence[float] | None = None,
    ) -> TipAdapterSearch:  # fmt: skip
        """Set `alpha` and `beta` to the pair of the best accuracy on a validation set; the first of equals.

        Parameters
        ----------
        features : Tensor
            ``[B, D]``, B >= 1.
        labels : Tensor
            int64 ``[B]``.
        alphas, betas : sequence of float, optional
            By default 20 values each, evenly from 0.1 to 3 and from 0.1 to 7.

        Returns
        -------
        TipAdapterSearch

        Raises
        ------
        TypeError, ValueError
            If shapes do not fit, or a value is out of range; nothing is set then.
        """
        op = "TipAdapter.search"
        _check_matrix(op, "features", features, self.keys.shape[1])
        _check_labels(op, "labels", labels, features.shape[0], self.class_features.shape[0])
        if not features.shape[0]:
            raise ValueError(f"{op}: features has no rows; expected at least one")
        alphas = torch.linspace(0.1, 3.0, 20).tolist() if alphas is None else list(alphas)
        betas = torch.linspace(0.1, 7.0, 20).tolist() if betas is None else list(betas)
        if not alphas or not betas:
            raise ValueError(f"{op}: alphas or betas is empty; expected at least one value of each")
        for alpha, beta in [(a, betas[0]) for a in alphas] + [(alphas[0], b) for b in betas]:
            _check_cache(op, alpha, beta)
        zero_shot, affinity = self._similarities(features)
        best: TipAdapterSearch | None = None
        for beta in betas:
            cache = self._cache(affinity, beta)
            for alpha in alphas:
                right = (zero_shot + alpha * cache).argmax(1) == labels
                accuracy = float(right.double().mean())
                if best is None or accuracy > best.accuracy:
                    best = TipAdapterSearch(alpha, beta, accuracy)
        assert best is not None
        self.alpha, self.beta = best.alpha, best.beta
        return best

    def get_extra_state(self) -> dict[str, float]:
        """The numbers, which `search` may have found, for ``state_dict()``."""
        return {"alpha": self.alpha, "beta": self.beta, "logit_scale": self.logit_scale}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` gave."""
        self.alpha, self.beta, self.logit_scale = state["alpha"], state["beta"], state["logit_scale"]

    def extra_repr(self) -> str:
        """Sizes and numbers."""
        return f"keys={tuple(self.keys.shape)}, alpha={self.alpha}, beta={self.beta}, logit_scale={self.logit_scale}"


def _scaled_cosines(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``scale * x y^T`` of rows of length 1, in float32 at least: times 100, logits of 16 bits are off by 0.2."""
    acc = accumulator(torch.promote_types(x.dtype, y.dtype))
    with no_autocast(x.device):
        return scale * (x.to(acc) @ y.to(acc).T)


def _check_cache(op: str, alpha: float, beta: float) -> None:
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"{op}: alpha is {alpha}; expected >= 0")
    if not 0.0 < beta < math.inf:
        raise ValueError(f"{op}: beta is {beta}; expected > 0")


# ---- learned prompts ------------------------------------------------------------------------------------------------


class PromptContext(nn.Module):
    r"""The prompts of all classes, as embeddings, with learned vectors in the place of the context words.

    Parameters
    ----------
    embeddings : Tensor
        ``[C, L, E]``, floating point: the embedded tokens of "start, n placeholders, class name, full stop, end,
        padding" for each class. Only the placeholders are replaced.
    name_lengths : sequence of int
        Tokens of each class name, C of them.
    num_context : int
        n >= 1.
    position : {"end", "middle", "front"}
        Where the class name stands: after the context, after its first half, or before it.
    class_specific : bool
        A context for each class, instead of one for all.
    init : Tensor, optional
        ``[n, E]``, or ``[C, n, E]`` with `class_specific`: such as the embeddings of "a photo of a". By default normal
        with standard deviation 0.02.
    generator : torch.Generator, optional
        Of the CPU, for the initial values.

    Attributes
    ----------
    context : torch.nn.Parameter
        ``[n, E]`` or ``[C, n, E]``; the state_dict holds nothing else.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or lengths do not fit.

    Notes
    -----
    The end token stays at its place whatever the position, so the text encoder reads its feature where the tokenizer
    put it.

    References
    ----------
    Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134.
    """

    embeddings: Tensor
    order: Tensor

    def __init__(
        self, embeddings: Tensor, name_lengths: Sequence[int], num_context: int = 16, *,
        position: Literal["end", "middle", "front"] = "end", class_specific: bool = False, init: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "PromptContext"
        check_float(op, embeddings=embeddings)
        if embeddings.dim() != 3:
            raise ValueError(f"{op}: embeddings has shape {tuple(embeddings.shape)}; expected (classes, length, width)")
        classes, length, width = embeddings.shape
        if num_context < 1:
            raise ValueError(f"{op}: num_context is {num_context}; expected 1 or more")
        if position not in ("end", "middle", "front"):
            raise ValueError(f"{op}: position is {position!r}; expected 'end', 'middle' or 'front'")
        lengths = list(name_lengths)
        # a start, an end
        if len(lengths) != classes or any(n < 1 or n + num_context + 2 > length for n in lengths):
            raise ValueError(
                f"{op}: name_lengths is {lengths}; expected {classes} of 1 to {length - num_context - 2} tokens, "
                f"which fit into {length} with {num_context} of context, a start and an end"
            )
        shape = (classes, num_context, width) if class_specific else (num_context, width)
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        if init is None:
            init = torch.randn(shape, generator=generator, dtype=dtype) * 0.02
        elif tuple(init.shape) != shape:
            raise ValueError(f"{op}: init has shape {tuple(init.shape)}; expected {shape}")
        self.num_context, self.class_specific = num_context, class_specific
        self.context = nn.Parameter(init.detach().to(embeddings.device, dtype, copy=True))
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)
        order = torch.tensor([_order(position, num_context, n, length) for n in lengths])
        self.register_buffer("order", order.to(embeddings.device), persistent=False)

    def forward(self, shift: Tensor | None = None) -> Tensor:
        """The prompts, differentiable in the context.

        Parameters
        ----------
        shift : Tensor, optional
            ``[B, E]``, added to every context vector (CoCoOp).

        Returns
        -------
        Tensor
            ``[C, L, E]``, or ``[B, C, L, E]`` with `shift`; of the embeddings' dtype.
        """
        classes, _, width = self.embeddings.shape
        context = self.context if self.class_specific else self.context.expand(classes, -1, -1)
        base = self.embeddings
        order = self.order[:, :, None].expand(-1, -1, width)
        if shift is not None:
            if shift.dim() != 2 or shift.shape[1] != width:
                raise ValueError(f"PromptContext: shift has shape {tuple(shift.shape)}; expected (batch, {width})")
            context = context + shift[:, None, None]
            base, order = (t.expand(shift.shape[0], -1, -1, -1) for t in (base, order))
        start, rest = base[..., :1, :], base[..., 1 + self.num_context :, :]
        return torch.cat([start, context.to(base.dtype), rest], dim=-2).gather(-2, order)


def _order(position: str, context: int, name: int, length: int) -> list[int]:
    """Where each token of a prompt is taken from "start, context, name, rest"."""
    before = {"end": context, "middle": context // 2, "front": 0}[position]
    words, names = range(1, 1 + context), range(1 + context, 1 + context + name)
    return [0, *words[:before], *names, *words[before:], *range(1 + context + name, length)]


class _Prompted(nn.Module):
    """A context and a frozen text encoder, which is no part of the module."""

    def __init__(self, context: PromptContext, encode_text: TextEncoder, logit_scale: float) -> None:
        super().__init__()
        own = type(self).__name__
        if not isinstance(context, PromptContext):
            raise TypeError(f"{own}: context is a {type(context).__name__}; expected a PromptContext")
        if isinstance(encode_text, nn.Module):
            trained = sum(p.requires_grad for p in encode_text.parameters())
            if trained:
                raise ValueError(
                    f"{own}: encode_text has {trained} parameters that require gradients; expected a frozen encoder: "
                    "encode_text.requires_grad_(False)"
                )
        self.context, self.logit_scale = context, logit_scale
        # in a tuple, which hides a module: its weights are not to be saved or trained with the prompts
        self._encoder = (encode_text,)

    def _encode(self, prompts: Tensor, classes: Tensor) -> Tensor:
        features = self._encoder[0](prompts, classes)
        check_float(f"{type(self).__name__}: encode_text", result=features)
        if features.dim() != 2 or features.shape[0] != prompts.shape[0]:
            got, want = tuple(features.shape), f"({prompts.shape[0]}, features)"
            raise ValueError(f"{type(self).__name__}: encode_text returned shape {got}; expected {want}")
        return normalized(features)

    def _classes(self) -> Tensor:
        return torch.arange(self.context.embeddings.shape[0], device=self.context.embeddings.device)


class CoOp(_Prompted):
    r"""CoOp: the context words of the classes' prompts are learned, the model is frozen.

    Parameters
    ----------
    context : PromptContext
    encode_text : callable
        ``encode_text(prompts, classes)``: embedded prompts ``[n, L, E]`` and the class of each, int64 ``[n]``, to
        features ``[n, D]``. The class tells where its end token is. A module must be frozen.
    logit_scale : float
        CLIP's is 100.

    Raises
    ------
    TypeError, ValueError
        If `context` is none, or the encoder is a module with parameters that require gradients.

    Notes
    -----
    .. math:: \text{logits}_c = s \cos(f, g([v_1, \dots, v_n, \text{name}_c]))

    References
    ----------
    Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, arXiv:2109.01134.
    """

    def __init__(self, context: PromptContext, encode_text: TextEncoder, logit_scale: float = 100.0) -> None:
        super().__init__(context, encode_text, logit_scale)

    def class_features(self) -> Tensor:
        """Text features of the classes, ``[C, D]``, rows of length 1; differentiable in the context."""
        return self._encode(self.context(), self._classes())

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits ``[B, C]`` of image features ``[B, D]``, which are normalized here; float32 or float64."""
        texts = self.class_features()
        _check_matrix("CoOp", "image_features", image_features, texts.shape[1])
        return _scaled_cosines(normalized(image_features), texts, self.logit_scale)


class CoCoOp(_Prompted):
    r"""CoCoOp: learned context words that a small network shifts for each image.

    Parameters
    ----------
    context : PromptContext
        Not class-specific.
    encode_text : callable
        As for `CoOp`; it is given the prompts of several images at once.
    image_features : int
        D, the width of the image features.
    hidden_features : int, optional
        Of the network; by default ``image_features // 16``.
    logit_scale : float
        CLIP's is 100.
    images_per_call : int
        Images whose prompts, C each, are encoded in one call.

    Attributes
    ----------
    meta_net : torch.nn.Sequential
        Linear, ReLU, Linear: from an image feature of length 1 to the shift.

    Raises
    ------
    TypeError, ValueError
        As `CoOp`; if the context is class-specific, or a size is not positive.

    Notes
    -----
    .. math:: v_m(f) = v_m + h(f), \qquad \text{logits}_c = s \cos(f, g([v_1(f), \dots, v_n(f), \text{name}_c]))

    B C texts are encoded for B images.

    References
    ----------
    Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, arXiv:2203.05557.
    """

    def __init__(
        self, context: PromptContext, encode_text: TextEncoder, image_features: int, *,
        hidden_features: int | None = None, logit_scale: float = 100.0, images_per_call: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(context, encode_text, logit_scale)
        if context.class_specific:
            raise ValueError("CoCoOp: context is class-specific; expected one context for all classes")
        hidden = max(image_features // 16, 1) if hidden_features is None else hidden_features
        for name, size in (
            ("image_features", image_features), ("hidden_features", hidden), ("images_per_call", images_per_call),
        ):  # fmt: skip
            if size < 1:
                raise ValueError(f"CoCoOp: {name} is {size}; expected 1 or more")
        self.images_per_call, self.image_features = images_per_call, image_features
        width, where = context.context.shape[-1], context.context
        self.meta_net = nn.Sequential(
            nn.Linear(image_features, hidden), nn.ReLU(), nn.Linear(hidden, width)
        ).to(where.device, where.dtype)  # fmt: skip

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits ``[B, C]`` of image features ``[B, D]``, which are normalized here; float32 or float64."""
        _check_matrix("CoCoOp", "image_features", image_features, self.image_features)
        unit = normalized(image_features)
        classes = self._classes()
        logits = []
        for part in unit.split(self.images_per_call):
            shift = self.meta_net(part.to(self.meta_net[0].weight.dtype))
            texts = self._encode(self.context(shift).flatten(0, 1), classes.repeat(part.shape[0]))
            texts = wide(texts).unflatten(0, (part.shape[0], classes.shape[0]))
            with no_autocast(part.device):
                logits.append(self.logit_scale * torch.linalg.vecdot(wide(part)[:, None], texts))
        return torch.cat(logits)


# ---- all weights ----------------------------------------------------------------------------------------------------


def flyp_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, labels: Tensor | None = None, *,
    collisions: Literal["keep", "mask"] = "keep",
) -> Tensor:  # fmt: skip
    r"""Fine-tune like you pre-train: the contrastive loss on images and prompts of their classes.

    Parameters
    ----------
    image_features : Tensor
        ``[N, D]``, float32, bfloat16, float16 or float64; normalized here.
    text_features : Tensor
        ``[N, D]`` of the same dtype: of a prompt of each image's class, from `sample_prompts`.
    logit_scale : float or Tensor of one element
        Differentiable.
    labels : Tensor, optional
        int64 ``[N]``, with ``collisions="mask"``.
    collisions : {"keep", "mask"}
        What another image's prompt of the same class is. "keep": a negative, as in the paper, whose loss is that of
        pre-training unchanged. "mask": left out of both sums; this forms the matrix ``[N, N]``.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or `labels` is missing or too much.

    Notes
    -----
    .. math:: L = -\frac{1}{2 N} \sum_i \left( \log \frac{e^{z_{ii}}}{\sum_{j \in A_i} e^{z_{ij}}}
        + \log \frac{e^{z_{ii}}}{\sum_{j \in A_i} e^{z_{ji}}} \right), \qquad z_{ij} = s \cos(x_i, t_j)

    :math:`A_i` is the batch, or with "mask" i and all of other classes. With "keep" a batch with k images of a class
    has a loss of at least :math:`(k / N) \log k` from it, where their prompts are the same.

    References
    ----------
    Goyal et al., Finetune like you pretrain, CVPR 2023, arXiv:2212.00638.
    """
    op = "flyp_loss"
    rows, _ = check_pairs(op, image_features=image_features, text_features=text_features)
    if collisions not in ("keep", "mask"):
        raise ValueError(f"{op}: collisions is {collisions!r}; expected 'keep' or 'mask'")
    check_scalar(op, logit_scale=logit_scale)
    x, y = normalized(image_features), normalized(text_features)
    if collisions == "keep":
        if labels is not None:
            raise ValueError(f"{op}: labels are given with collisions 'keep'; expected None, all others are negatives")
        return ops.info_nce(x, y, logit_scale)
    if labels is None:
        raise ValueError(f"{op}: labels is None with collisions 'mask'; expected int64 ({rows},)")
    _check_labels(op, "labels", labels, rows)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale
    with no_autocast(x.device):
        z = scale * (wide(x) @ wide(y).T)
    itself = torch.arange(rows, device=x.device)
    same = (labels[:, None] == labels) & (itself[:, None] != itself)
    z = z.masked_fill(same, -torch.inf)
    return 0.5 * (functional.cross_entropy(z, itself) + functional.cross_entropy(z.T, itself))


def sample_prompts(
    labels: Tensor | Sequence[int], prompts: Mapping[str, Sequence[str]] | Sequence[Sequence[str]], *,
    generator: torch.Generator | None = None,
) -> list[str]:  # fmt: skip
    """A prompt for each label, drawn from those of its class, as FLYP takes them.

    Parameters
    ----------
    labels : Tensor or sequence of int
        ``[N]``, each below the number of classes.
    prompts : mapping of str to sequence of str, or sequence of those
        Of each class, in the order of the labels, as from `tlkernels.methods.multimodal.prompt_ensemble`.
    generator : torch.Generator, optional
        Of the CPU.

    Returns
    -------
    list of str
        N prompts.

    Raises
    ------
    ValueError
        If a label has no class, or its class no prompt.

    References
    ----------
    Goyal et al., Finetune like you pretrain, CVPR 2023, arXiv:2212.00638, section 3.
    """
    op = "sample_prompts"
    of_class = list(prompts.values()) if isinstance(prompts, Mapping) else list(prompts)
    numbers = [int(label) for label in labels]
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(of_class):
        raise ValueError(
            f"{op}: labels is from {min(numbers)} to {max(numbers)}; expected 0 <= label < {len(of_class)}"
        )
    for label in set(numbers):
        if isinstance(of_class[label], str) or not of_class[label]:
            raise ValueError(f"{op}: prompts has {of_class[label]!r} for class {label}; expected a list of prompts")
    # one uniform number for each label, so that a seed draws alike whatever the numbers of prompts
    drawn = torch.rand(len(numbers), generator=generator, dtype=torch.float64).tolist()
    return [of_class[c][int(u * len(of_class[c]))] for c, u in zip(numbers, drawn, strict=True)]


def wise_ft_curve(
    model: nn.Module, pretrained: State, finetuned: State, evaluate: Callable[[nn.Module], float],
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> dict[float, float]:  # fmt: skip
    """The score of each model on the line between the weights before and after fine-tuning.

    Parameters
    ----------
    model : torch.nn.Module
        To evaluate with; it gets its own weights and mode back.
    pretrained, finetuned : torch.nn.Module or mapping of str to Tensor
        As for `tlkernels.methods.finetune.wise_ft`, which makes the weights, with all keys of the model. `model` may be
        one of them.
    evaluate : callable
        From the model to a score.
    alphas : sequence of float
        Shares of the fine-tuned weights, each from 0 to 1.

    Returns
    -------
    dict of float to float
        The score by alpha.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If the weights do not fit each other or the model, or an alpha is out of range.

    References
    ----------
    Wortsman et al., Robust Fine-Tuning of Zero-Shot Models, CVPR 2022, arXiv:2109.01903, figure 1.
    """
    for alpha in alphas:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"wise_ft_curve: alphas has {alpha}; expected 0 to 1")
    # copies, because what is given may be the model itself, or share its memory, and it changes from alpha to alpha
    own, start, end = (_copied(state) for state in (model, pretrained, finetuned))
    modes = [(module, module.training) for module in model.modules()]
    scores: dict[float, float] = {}
    try:
        for alpha in alphas:
            model.load_state_dict(wise_ft(start, end, alpha))
            scores[alpha] = float(evaluate(model))
    finally:
        model.load_state_dict(own)
        for module, training in modes:
            module.training = training
    return scores


def _copied(state: State) -> dict[str, Tensor]:
    entries = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in entries.items()}


# ---- low-rank updates -----------------------------------------------------------------------------------------------


def apply_clip_lora(
    model: nn.Module, *, vision: str = "vision_model", text: str = "text_model",
    projections: Sequence[str] = ("q_proj", "k_proj", "v_proj"), config: LoRAConfig | None = None,
) -> Applied:  # fmt: skip
    """Put LoRA into the attention of both towers, and freeze all else.

    Parameters
    ----------
    model : torch.nn.Module
        With both towers, such as transformers' ``CLIPModel`` or ``SiglipModel``; changed in place.
    vision, text : str
        Names of the towers in the model.
    projections : sequence of str
        Last parts of the names of the layers to adapt.
    config : LoRAConfig, optional
        Everything but the targets, which are set here. By default that of CLIP-LoRA: rank 2, alpha 1, dropout 0.25.

    Returns
    -------
    tlkernels.methods.peft.Applied
        What was replaced; `tlkernels.methods.peft.merge`, ``remove`` and ``save_adapter`` take the model from there.

    Raises
    ------
    TypeError, ValueError
        As `tlkernels.methods.peft.apply`; or if a tower has no such layer. The model is then as it was.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language
    Models, CVPR Workshops 2024, arXiv:2405.18541.
    """
    op = "apply_clip_lora"
    if not projections or isinstance(projections, str):
        raise ValueError(f"{op}: projections is {projections!r}; expected names, such as ['q_proj', 'v_proj']")
    towers, layers = ("|".join(map(re.escape, names)) for names in ((vision, text), projections))
    chosen = replace(
        LoRAConfig(r=2, lora_alpha=1.0, lora_dropout=0.25) if config is None else config,
        target_modules=rf"(?:{towers})\.(?:.*\.)?(?:{layers})",
    )
    chosen.check()
    names = [name for name, _ in model.named_modules() if chosen.matches(name)]
    for which, tower in (("vision", vision), ("text", text)):
        if not any(name.startswith(f"{tower}.") for name in names):
            raise ValueError(
                f"{op}: {which} is {tower!r}, where no module is called {' or '.join(map(repr, projections))}; "
                "expected a tower with such layers"
            )
    return apply(model, chosen)
