r"""Merging models that share an architecture and, in most methods, a pre-trained start :math:`\theta_0`.

=====================  ==============================================================================================
`wise_ft`              :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta_1`
`model_soup`           :math:`\sum_i w_i \theta_i / \sum_i w_i`; `greedy_soup` keeps a model where the score allows it
`merge_slerp`          the great circle between :math:`\theta_0` and :math:`\theta_1`, tensor by tensor
`merge_task_vectors`   :math:`\theta_0 + \sum_i \lambda_i \tau_i`, where :math:`\tau_i = \theta_i - \theta_0`
`merge_ties`           trim :math:`\tau_i`, elect a sign per element, average what agrees with it
`merge_dare`           drop elements of :math:`\tau_i` at random, rescale the others, then sum or TIES
`merge_fisher`         :math:`\sum_i \lambda_i F_i \theta_i / \sum_i \lambda_i F_i`
`merge_regmean`        :math:`W^T = (\sum_i G_i)^{-1} \sum_i G_i W_i^T`, with :math:`G_i = X_i^T X_i`
=====================  ==============================================================================================

These take models or state dicts and return a new state dict, for ``model.load_state_dict``. The functions on lists of
tensors (`task_arithmetic`, `magnitude_prune`, `ties`, `dare_linear`, `dare_ties`) are the same steps for one parameter;
what they do to deltas they do to the factors of adapters.

Rules that hold for all of them:

- Nothing is modified, and no result shares memory with an input.
- Arithmetic is in float32 (float64 for float64), on the device of the first model; results have its dtype and device.
- Models have the same keys and shapes; the first difference raises, with the key.
- Floating-point buffers are merged like parameters. Batch-norm statistics of a merged model are not those of its
  activations: recompute them (``torch.optim.swa_utils.update_bn``).
- Integers and booleans cannot be averaged. Where they are equal they are copied; a scalar that differs (a counter, like
  ``num_batches_tracked``) is copied from the first model, which is the base where there is one; anything else that
  differs raises. So quantized weights are not merged by accident: dequantize them first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tlkernels.methods.fundamentals.similarity import _call, _observed

__all__ = [
    "GreedySoup",
    "dare_linear",
    "dare_ties",
    "greedy_soup",
    "input_grams",
    "magnitude_prune",
    "merge_dare",
    "merge_fisher",
    "merge_regmean",
    "merge_slerp",
    "merge_task_vectors",
    "merge_ties",
    "model_soup",
    "task_arithmetic",
    "task_vector",
    "ties",
    "wise_ft",
]

State: TypeAlias = "Mapping[str, Tensor] | nn.Module"
Weights: TypeAlias = "float | Sequence[float] | Tensor"
MajoritySign: TypeAlias = Literal["total", "frequency"]

# Elements of a model that are in float32 at one time. A sweep over this many is long enough for a GPU, and the copies
# of a 16-bit model stay far below the model itself.
_BUCKET = 2**24


# ---- one parameter: lists of task tensors ---------------------------------------------------------------------------


def task_arithmetic(tensors: Sequence[Tensor], weights: Weights = 1.0) -> Tensor:
    r"""The weighted sum of task tensors, :math:`\sum_i w_i \tau_i`.

    Parameters
    ----------
    tensors : sequence of Tensor
        One tensor per task, floating point, all of one shape.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all. Negative weights subtract a task.

    Returns
    -------
    Tensor
        The sum, in the dtype of ``tensors[0]``.

    Raises
    ------
    TypeError
        If a tensor is not floating point.
    ValueError
        If there are no tensors, their shapes differ, or the number of weights is not the number of tensors.

    References
    ----------
    Gabriel Ilharco et al. *Editing Models with Task Arithmetic.* ICLR 2023, arXiv:2212.04089.
    """
    stacked = _stack("task_arithmetic", tensors)
    return (stacked * _column("task_arithmetic", weights, stacked)).sum(0).to(tensors[0].dtype)


def magnitude_prune(tensors: Sequence[Tensor], weights: Weights = 1.0, density: float = 0.2) -> Tensor:
    r"""The weighted sum of task tensors, each reduced to its largest elements.

    Parameters
    ----------
    tensors : sequence of Tensor
        One tensor per task, floating point, all of one shape.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all.
    density : float, default 0.2
        The share of elements of each tensor that is kept, from 0 to 1: the ``int(density * numel)`` largest magnitudes.

    Returns
    -------
    Tensor
        :math:`\sum_i w_i \operatorname{trim}(\tau_i)`, in the dtype of ``tensors[0]``.

    Raises
    ------
    TypeError, ValueError
        As `task_arithmetic`; and if `density` is not from 0 to 1.
    """
    stacked = _stack("magnitude_prune", tensors)
    trimmed = _trim(stacked, _check_density("magnitude_prune", density))
    return (trimmed * _column("magnitude_prune", weights, stacked)).sum(0).to(tensors[0].dtype)


def ties(
    tensors: Sequence[Tensor], weights: Weights = 1.0, density: float = 0.2,
    majority_sign_method: MajoritySign = "total",
) -> Tensor:  # fmt: skip
    r"""TIES: trim each task tensor, elect a sign for every element, and average the values that have it.

    Parameters
    ----------
    tensors : sequence of Tensor
        One tensor per task, floating point, all of one shape.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all. They scale the values that are averaged, not the election.
    density : float, default 0.2
        The share of elements of each tensor that survives the trimming, from 0 to 1.
    majority_sign_method : {"total", "frequency"}, default "total"
        "total" elects the sign of the sum of values, as in the paper; "frequency" the sign that most tensors have.

    Returns
    -------
    Tensor
        The merged tensor, in the dtype of ``tensors[0]``.

    Raises
    ------
    TypeError, ValueError
        As `task_arithmetic`; and if `density` is not from 0 to 1, or `majority_sign_method` is another.

    Notes
    -----
    With :math:`\hat\tau_i` the ``int(density * numel)`` largest magnitudes of :math:`\tau_i`, and per element

    .. math::
        \gamma = \operatorname{sgn} \sum_i \hat\tau_i, \qquad A = \{i : \operatorname{sgn} \hat\tau_i = \gamma\}, \qquad
        \tau = \frac{1}{\max(|A|, 1)} \sum_{i \in A} w_i \hat\tau_i .

    A vote that ends in a draw counts as positive.

    References
    ----------
    Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal. *TIES-Merging: Resolving Interference When
    Merging Models.* NeurIPS 2023, arXiv:2306.01708.
    """
    stacked = _stack("ties", tensors)
    trimmed = _trim(stacked, _check_density("ties", density))
    return _disjoint_mean("ties", trimmed, weights, majority_sign_method).to(tensors[0].dtype)


def dare_linear(
    tensors: Sequence[Tensor], weights: Weights = 1.0, density: float = 0.2, generator: torch.Generator | None = None
) -> Tensor:
    r"""DARE: drop elements of each task tensor at random, rescale the others, and sum.

    Parameters
    ----------
    tensors : sequence of Tensor
        One tensor per task, floating point, all of one shape.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all.
    density : float, default 0.2
        The probability with which an element is kept, above 0 and up to 1; the paper's drop rate is 1 - density.
    generator : torch.Generator, optional
        Of the random draws, on the tensors' device. By default, torch's own.

    Returns
    -------
    Tensor
        :math:`\sum_i w_i\, m_i \tau_i / \mathrm{density}` with :math:`m_i \sim
        \operatorname{Bernoulli}(\mathrm{density})` per element, in the dtype of ``tensors[0]``. Its expectation is
        `task_arithmetic`.

    Raises
    ------
    TypeError, ValueError
        As `task_arithmetic`; and if `density` is not above 0 and at most 1.

    References
    ----------
    Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li. *Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch.* ICML 2024, arXiv:2311.03099.
    """
    stacked = _stack("dare_linear", tensors)
    dropped = _drop(stacked, _check_density("dare_linear", density, positive=True), generator)
    return (dropped * _column("dare_linear", weights, stacked)).sum(0).to(tensors[0].dtype)


def dare_ties(
    tensors: Sequence[Tensor], weights: Weights = 1.0, density: float = 0.2,
    majority_sign_method: MajoritySign = "total", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """DARE in place of the trimming of TIES: drop at random and rescale, elect signs, average what agrees.

    Parameters
    ----------
    tensors, weights, density, generator
        As in `dare_linear`.
    majority_sign_method : {"total", "frequency"}, default "total"
        As in `ties`.

    Returns
    -------
    Tensor
        The merged tensor, in the dtype of ``tensors[0]``.

    Raises
    ------
    TypeError, ValueError
        As `dare_linear` and `ties`.
    """
    stacked = _stack("dare_ties", tensors)
    dropped = _drop(stacked, _check_density("dare_ties", density, positive=True), generator)
    return _disjoint_mean("dare_ties", dropped, weights, majority_sign_method).to(tensors[0].dtype)


def _stack(op: str, tensors: Sequence[Tensor]) -> Tensor:
    """[tasks, ...] in the dtype of the computation."""
    if len(tensors) == 0:
        raise ValueError(f"{op}: tensors is empty; expected one tensor per task")
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: tensors[{i}] has dtype {_name(tensor.dtype)}; expected floating point")
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{op}: tensors[{i}] has shape {tuple(tensor.shape)}; expected {tuple(tensors[0].shape)}, "
                "that of tensors[0]"
            )
    return torch.stack([tensor.to(_compute_dtype(tensors[0])) for tensor in tensors])


def _column(op: str, weights: Weights, stacked: Tensor) -> Tensor:
    """The weights, one per task, in the shape that multiplies `stacked`."""
    if isinstance(weights, Tensor):
        column = weights.to(stacked)
    else:
        column = torch.tensor(_check_weights(op, weights, len(stacked)), dtype=stacked.dtype, device=stacked.device)
    if column.dim() and column.shape != (len(stacked),):
        raise ValueError(f"{op}: weights has shape {tuple(column.shape)}; expected ({len(stacked)},), one per task")
    return column.expand(len(stacked)).view(-1, *[1] * (stacked.dim() - 1))


def _largest(flat: Tensor, density: float) -> Tensor:
    """The mask of the int(density * n) largest magnitudes of flat [n]; of equal ones, any.

    A radix select: the bits of floats >= 0 are in the order of the floats, so a histogram of the upper 16 tells in one
    pass in which narrow range the last of them lies, and only that range is sorted. A topk of a whole model takes
    three times as long.
    """
    k = int(density * flat.numel())
    if k == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    magnitude = flat.abs()
    upper = magnitude.view(torch.int32) >> 16 if flat.dtype == torch.float32 else magnitude.view(torch.int64) >> 48
    at_least = torch.bincount(upper, minlength=1).flip(0).cumsum(0).flip(0)  # by range: how many are in it or above
    last = int((at_least >= k).sum()) - 1
    mask = upper > last
    within = (upper == last).nonzero()[:, 0]
    mask[within[magnitude[within].topk(k - int(mask.sum()), sorted=False).indices]] = True
    return mask


def _trim(stacked: Tensor, density: float) -> Tensor:
    if density == 1:
        return stacked
    masks = [_largest(tensor.detach().reshape(-1), density) for tensor in stacked]
    return stacked * torch.stack(masks).view_as(stacked)


def _drop(stacked: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    if density == 1:
        return stacked
    # one draw per tensor, so that the first tasks' masks do not depend on how many follow
    masks = [torch.bernoulli(torch.full_like(tensor, density), generator=generator) for tensor in stacked]
    return stacked * torch.stack(masks) / density


def _disjoint_mean(op: str, stacked: Tensor, weights: Weights, majority_sign_method: MajoritySign) -> Tensor:
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"{op}: majority_sign_method is {majority_sign_method!r}; expected 'total' or 'frequency'")
    sign = stacked.sign()
    mass = stacked.sum(0) if majority_sign_method == "total" else sign.sum(0)
    agrees = (sign == torch.where(mass >= 0, 1.0, -1.0)).to(stacked.dtype)
    return (stacked * _column(op, weights, stacked) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


# ---- models: averages -----------------------------------------------------------------------------------------------


@torch.no_grad()
def wise_ft(pretrained: State, finetuned: State, alpha: float = 0.5) -> dict[str, Tensor]:
    r"""WiSE-FT: the straight line between a zero-shot and a fine-tuned model.

    Parameters
    ----------
    pretrained, finetuned : nn.Module or mapping of str to Tensor
        The model before and after fine-tuning.
    alpha : float, default 0.5
        The share of the fine-tuned model, from 0 to 1. Both ends are exact.

    Returns
    -------
    dict of str to Tensor
        :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta_1`, with the dtypes of `pretrained`.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in the other model.
    ValueError
        If keys or shapes differ, or `alpha` is not from 0 to 1. `merge_task_vectors` goes beyond that.

    References
    ----------
    Mitchell Wortsman et al. *Robust Fine-Tuning of Zero-Shot Models.* CVPR 2022, arXiv:2109.01903.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"wise_ft: alpha is {alpha}; expected 0 to 1")
    states = _states("wise_ft", pretrained=pretrained, finetuned=finetuned)
    return _sweep("wise_ft", states, lambda _, lists: list(torch._foreach_lerp(lists[0], lists[1], alpha)))


@torch.no_grad()
def model_soup(models: Sequence[State], weights: Weights = 1.0) -> dict[str, Tensor]:
    r"""The average of models: the uniform soup, or a weighted one.

    Parameters
    ----------
    models : sequence of nn.Module or mapping of str to Tensor
        Models fine-tuned from one start.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per model, at least 0 and not all 0; only their ratios matter.

    Returns
    -------
    dict of str to Tensor
        :math:`\sum_i w_i \theta_i / \sum_i w_i`, with the dtypes of ``models[0]``.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no models, keys or shapes differ, or the weights are not as above.

    References
    ----------
    Mitchell Wortsman et al. *Model Soups: Averaging Weights of Multiple Fine-Tuned Models Improves Accuracy without
    Increasing Inference Time.* ICML 2022, arXiv:2203.05482.
    """
    states = _states("model_soup", models=models)
    shares = _shares("model_soup", weights, len(states))
    return _sweep("model_soup", states, lambda _, lists: _weighted_sum(lists, shares))


@dataclass(frozen=True)
class GreedySoup:
    """What `greedy_soup` found.

    Attributes
    ----------
    state : dict of str to Tensor
        The average of the ingredients.
    ingredients : tuple of int
        The indices of the models in the soup, in the order in which they were added.
    score : float
        The score of the soup.
    scores : tuple of float
        The score of every model by itself, in the order of the models.
    """

    state: dict[str, Tensor]
    ingredients: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(models: Sequence[State], evaluate: Callable[[dict[str, Tensor]], float]) -> GreedySoup:
    """The greedy soup: from the best model down, a model joins the average where the score does not fall.

    Parameters
    ----------
    models : sequence of nn.Module or mapping of str to Tensor
        Models fine-tuned from one start.
    evaluate : callable
        From a state dict to a score on held-out data, the higher the better. Called at most ``2 * len(models) - 1``
        times.

    Returns
    -------
    GreedySoup
        The soup, which models are in it, and the scores. Its score is never below that of the best model.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no models, keys or shapes differ, or a score is NaN.

    References
    ----------
    Recipe 1 of Mitchell Wortsman et al. *Model Soups.* ICML 2022, arXiv:2203.05482.
    """
    states = _states("greedy_soup", models=models)

    def score_of(state: dict[str, Tensor]) -> float:
        score = float(evaluate(state))
        if math.isnan(score):
            raise ValueError("greedy_soup: evaluate returned NaN; expected a score, the higher the better")
        return score

    # each is given as a copy: `evaluate` is free to load it and train on
    scores = [score_of(model_soup([state])) for state in states]
    first, *others = sorted(range(len(states)), key=lambda i: -scores[i])
    soup, ingredients, best = model_soup([states[first]]), [first], scores[first]
    for i in others:
        candidate = model_soup([states[j] for j in (*ingredients, i)])
        score = score_of(candidate)
        if score >= best:
            soup, best = candidate, score
            ingredients.append(i)
    return GreedySoup(soup, tuple(ingredients), best, tuple(scores))


@torch.no_grad()
def merge_slerp(model_a: State, model_b: State, t: float = 0.5) -> dict[str, Tensor]:
    r"""Spherical interpolation of two models, tensor by tensor.

    Parameters
    ----------
    model_a, model_b : nn.Module or mapping of str to Tensor
        The ends.
    t : float, default 0.5
        The position between them, from 0 to 1.

    Returns
    -------
    dict of str to Tensor
        With :math:`\Omega` the angle between the two tensors, flattened,
        :math:`\frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b`, in the dtypes of `model_a`.
        Tensors that are parallel, opposite, or zero have no great circle between them: there it is the straight line.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in the other model.
    ValueError
        If keys or shapes differ, or `t` is not from 0 to 1.

    References
    ----------
    Ken Shoemake. *Animating Rotation with Quaternion Curves.* SIGGRAPH 1985.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"merge_slerp: t is {t}; expected 0 to 1")

    def combine(_: list[str], lists: list[list[Tensor]]) -> list[Tensor]:
        return [_slerp(a, b, t) for a, b in zip(*lists, strict=True)]

    return _sweep("merge_slerp", _states("merge_slerp", model_a=model_a, model_b=model_b), combine)


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    # The angle from atan2, which is accurate at every angle; the arc cosine loses half the digits of small ones.
    unit_a, unit_b = (x.double() / x.double().norm() for x in (a, b))
    angle = 2 * torch.atan2((unit_a - unit_b).norm(), (unit_a + unit_b).norm())
    share_a, share_b = ((part * angle).sin() / angle.sin() for part in (1 - t, t))
    curved = (share_a * a + share_b * b).to(a.dtype)
    return torch.where(angle.sin() > 1e-6, curved, torch.lerp(a, b, t))  # a comparison with NaN is false


# ---- models: task vectors -------------------------------------------------------------------------------------------


@torch.no_grad()
def task_vector(base: State, finetuned: State) -> dict[str, Tensor]:
    r"""What fine-tuning changed, :math:`\tau = \theta - \theta_0`.

    Parameters
    ----------
    base, finetuned : nn.Module or mapping of str to Tensor
        The model before and after fine-tuning.

    Returns
    -------
    dict of str to Tensor
        The difference of every floating-point entry, in float32 (float64 for float64). Other entries are left out.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in the other model.
    ValueError
        If keys or shapes differ.

    References
    ----------
    Gabriel Ilharco et al. *Editing Models with Task Arithmetic.* ICLR 2023, arXiv:2212.04089.
    """
    states = _states("task_vector", base=base, finetuned=finetuned)
    out: dict[str, Tensor] = {}
    for keys in _buckets(states[0]):
        start, end = _computable(states, keys)
        out.update(zip(keys, torch._foreach_sub(end, start), strict=True))
    return out


@torch.no_grad()
def merge_task_vectors(base: State, finetuned: Sequence[State], weights: Weights = 1.0) -> dict[str, Tensor]:
    r"""Task arithmetic: the base plus a weighted sum of task vectors.

    Parameters
    ----------
    base : nn.Module or mapping of str to Tensor
        The model from which the others were fine-tuned.
    finetuned : sequence of nn.Module or mapping of str to Tensor
        One model per task.
    weights : float, sequence of float, or Tensor, default 1.0
        The scaling :math:`\lambda_i` of each task vector, or one for all. A negative one makes the model forget the
        task.

    Returns
    -------
    dict of str to Tensor
        :math:`\theta_0 + \sum_i \lambda_i (\theta_i - \theta_0)`, with the dtypes of `base`.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no fine-tuned models, keys or shapes differ, or the number of weights is not the number of models.

    References
    ----------
    Gabriel Ilharco et al. *Editing Models with Task Arithmetic.* ICLR 2023, arXiv:2212.04089.
    """
    states = _states("merge_task_vectors", base=base, finetuned=finetuned)
    scales = _check_weights("merge_task_vectors", weights, len(states) - 1)

    def combine(_: list[str], lists: list[list[Tensor]]) -> list[Tensor]:
        deltas = [list(torch._foreach_sub(tuned, lists[0])) for tuned in lists[1:]]
        return list(torch._foreach_add(lists[0], _weighted_sum(deltas, scales)))

    return _sweep("merge_task_vectors", states, combine)


@torch.no_grad()
def merge_ties(
    base: State, finetuned: Sequence[State], density: float = 0.2, *, weights: Weights = 1.0, scaling: float = 1.0,
    majority_sign_method: MajoritySign = "total", trim: Literal["model", "tensor"] = "model",
) -> dict[str, Tensor]:  # fmt: skip
    r"""TIES-Merging: the base plus what trimmed task vectors agree on.

    Parameters
    ----------
    base : nn.Module or mapping of str to Tensor
        The model from which the others were fine-tuned.
    finetuned : sequence of nn.Module or mapping of str to Tensor
        One model per task.
    density : float, default 0.2
        The share of each task vector that survives the trimming, from 0 to 1.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all, on the values that are averaged; see `ties`.
    scaling : float, default 1.0
        The factor :math:`\lambda` of the merged task vector.
    majority_sign_method : {"total", "frequency"}, default "total"
        As in `ties`.
    trim : {"model", "tensor"}, default "model"
        Whether the largest magnitudes are those of the whole task vector, as in the paper, or of each tensor by itself,
        which keeps the same share everywhere and needs less memory.

    Returns
    -------
    dict of str to Tensor
        :math:`\theta_0 + \lambda\, \tau`, with the dtypes of `base`; :math:`\tau` as in `ties`.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no fine-tuned models, keys or shapes differ, or another argument is not as above.

    References
    ----------
    Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal. *TIES-Merging: Resolving Interference When
    Merging Models.* NeurIPS 2023, arXiv:2306.01708.
    """
    op = "merge_ties"
    states = _states(op, base=base, finetuned=finetuned)
    scales = _check_weights(op, weights, len(states) - 1)
    _check_density(op, density)
    _check_scaling(op, scaling)
    if trim not in ("model", "tensor"):
        raise ValueError(f"{op}: trim is {trim!r}; expected 'model' or 'tensor'")
    masks = [_model_mask([states[0], state], density) for state in states[1:]] if trim == "model" else []

    def merge(key: str, deltas: Tensor) -> Tensor:
        trimmed = deltas * torch.stack([mask[key] for mask in masks]) if masks else _trim(deltas, density)
        return _disjoint_mean(op, trimmed, scales, majority_sign_method)

    return _sweep(op, states, lambda keys, lists: _add_merged(keys, lists, merge, scaling))


@torch.no_grad()
def merge_dare(
    base: State, finetuned: Sequence[State], density: float = 0.2, *, weights: Weights = 1.0, scaling: float = 1.0,
    method: Literal["linear", "ties"] = "linear", majority_sign_method: MajoritySign = "total",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    r"""DARE: the base plus task vectors of which a random share is dropped and the rest rescaled.

    Parameters
    ----------
    base : nn.Module or mapping of str to Tensor
        The model from which the others were fine-tuned.
    finetuned : sequence of nn.Module or mapping of str to Tensor
        One model per task. One is enough: the result is then its sparse version.
    density : float, default 0.2
        The probability with which an element is kept, above 0 and up to 1; the paper's drop rate is 1 - density.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight per task, or one for all.
    scaling : float, default 1.0
        The factor :math:`\lambda` of the merged task vector.
    method : {"linear", "ties"}, default "linear"
        What follows the dropping: the weighted sum (`dare_linear`), or sign election and disjoint mean (`dare_ties`).
    majority_sign_method : {"total", "frequency"}, default "total"
        As in `ties`; of ``method="ties"``.
    generator : torch.Generator, optional
        Of the random draws, on the device of `base`. By default, torch's own.

    Returns
    -------
    dict of str to Tensor
        :math:`\theta_0 + \lambda\, \tau`, with the dtypes of `base`. Tensors that a state dict holds under two names
        (tied weights) are drawn for twice: load the result into a model that ties them.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no fine-tuned models, keys or shapes differ, or another argument is not as above.

    References
    ----------
    Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li. *Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch.* ICML 2024, arXiv:2311.03099.
    """
    op = "merge_dare"
    states = _states(op, base=base, finetuned=finetuned)
    scales = _check_weights(op, weights, len(states) - 1)
    _check_density(op, density, positive=True)
    _check_scaling(op, scaling)
    if method not in ("linear", "ties"):
        raise ValueError(f"{op}: method is {method!r}; expected 'linear' or 'ties'")

    def merge(_: str, deltas: Tensor) -> Tensor:
        dropped = _drop(deltas, density, generator)
        if method == "ties":
            return _disjoint_mean(op, dropped, scales, majority_sign_method)
        return (dropped * _column(op, scales, dropped)).sum(0)

    return _sweep(op, states, lambda keys, lists: _add_merged(keys, lists, merge, scaling))


def _add_merged(
    keys: list[str], lists: list[list[Tensor]], merge: Callable[[str, Tensor], Tensor], scaling: float
) -> list[Tensor]:
    """base + scaling * merge(key, deltas [tasks, ...]) for every tensor of a bucket."""
    base, *tuned = lists
    stacked = [torch.stack(tensors) for tensors in zip(*tuned, strict=True)]
    torch._foreach_sub_(stacked, base)
    merged = [merge(key, deltas) for key, deltas in zip(keys, stacked, strict=True)]
    return list(torch._foreach_add(base, merged, alpha=scaling))


def _model_mask(states: list[dict[str, Tensor]], density: float) -> dict[str, Tensor]:
    """The mask of the largest magnitudes of a whole task vector, cut into the shapes of its tensors."""
    deltas = task_vector(*states)
    if not deltas or density == 1:
        return {key: torch.ones_like(delta, dtype=torch.bool) for key, delta in deltas.items()}
    device = next(iter(deltas.values())).device
    mask = _largest(torch.cat([delta.reshape(-1).to(device) for delta in deltas.values()]), density)
    parts = mask.split([delta.numel() for delta in deltas.values()])
    return {key: part.view_as(deltas[key]).to(deltas[key].device) for key, part in zip(deltas, parts, strict=True)}


# ---- models: weighted by data ---------------------------------------------------------------------------------------


@torch.no_grad()
def merge_fisher(
    models: Sequence[State], fishers: Sequence[Mapping[str, Tensor]], *, weights: Weights = 1.0, floor: float = 1e-6
) -> dict[str, Tensor]:
    r"""Fisher-weighted averaging: each element from the models that are sure about it.

    Parameters
    ----------
    models : sequence of nn.Module or mapping of str to Tensor
        Models fine-tuned from one start.
    fishers : sequence of mapping of str to Tensor
        Of each model, the diagonal of its Fisher information: for every parameter a tensor of its shape, without
        negative values, the mean over examples of *per-example* squared gradients of the log-likelihood. Entries of the
        models that no Fisher has (buffers, frozen layers) are averaged with the weights alone.
    weights : float, sequence of float, or Tensor, default 1.0
        One weight :math:`\lambda_i` per model, at least 0 and not all 0.
    floor : float, default 1e-6
        The least Fisher value, above 0. Where all models are below it, the result is their weighted average.

    Returns
    -------
    dict of str to Tensor
        The merged model, with the dtypes of ``models[0]``.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no models, keys or shapes differ, a Fisher is missing, negative, NaN, or of another shape, or
        another argument is not as above.

    Notes
    -----
    The mode of a product of Gaussians, the Laplace approximations of the models' posteriors, per element:

    .. math::
        \theta = \frac{\sum_i \lambda_i \hat F_i \theta_i}{\sum_i \lambda_i \hat F_i}, \qquad
        \hat F_i = \max(F_i, \mathrm{floor}) .

    References
    ----------
    Michael Matena, Colin Raffel. *Merging Models with Fisher-Weighted Averaging.* NeurIPS 2022, arXiv:2111.09832.
    """
    op = "merge_fisher"
    states = _states(op, models=models)
    shares = _shares(op, weights, len(states))
    if not 0 < floor < math.inf:
        raise ValueError(f"{op}: floor is {floor}; expected a finite number above 0")
    known = _check_per_model(op, "fishers", fishers, states)
    for i, fisher in enumerate(fishers):
        for key in known:
            if fisher[key].shape != states[0][key].shape:
                shapes = f"{tuple(fisher[key].shape)}; expected {tuple(states[0][key].shape)}"
                raise ValueError(f"{op}: fishers[{i}][{key!r}] has shape {shapes}, that of the parameter")
            if not bool((fisher[key] >= 0).all()):
                raise ValueError(f"{op}: fishers[{i}][{key!r}] has negative values or NaN; expected values >= 0")

    def combine(keys: list[str], lists: list[list[Tensor]]) -> list[Tensor]:
        ones = [torch.ones_like(tensor) for tensor in lists[0]]
        precisions: list[list[Tensor]] = []
        for share, fisher in zip(shares, fishers, strict=True):
            own = [fisher[k].to(one) if k in known else one for k, one in zip(keys, ones, strict=True)]
            precisions.append(list(torch._foreach_mul(torch._foreach_clamp_min(own, floor), share)))
        total = precisions[0]
        for precision in precisions[1:]:
            total = list(torch._foreach_add(total, precision))
        # normalised first: the sum of F * theta would lose digits, or overflow, where one model's F is large
        parts = [torch._foreach_div(precision, total) for precision in precisions]
        merged = list(torch._foreach_mul(parts[0], lists[0]))
        for part, tensors in zip(parts[1:], lists[1:], strict=True):
            torch._foreach_addcmul_(merged, part, tensors)
        return merged

    return _sweep(op, states, combine)


def input_grams(
    model: nn.Module, batches: Iterable[Any], *, layers: Iterable[str] | None = None, normalize: bool = False
) -> dict[str, Tensor]:
    r"""The Gram matrices of the inputs of a model's linear layers, for `merge_regmean`.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode and without gradients; its modes are restored.
    batches : iterable
        Of what the model takes: a tensor, a tuple or list whose first element it takes, or a mapping of keyword
        arguments. Padding counts as data.
    layers : iterable of str, optional
        Names of `torch.nn.Linear` modules. By default all that are called; `torch.nn.MultiheadAttention` computes its
        output projection without calling it.
    normalize : bool, default False
        Divide by the number of rows, so that every model has the same say, however much data it saw.

    Returns
    -------
    dict of str to Tensor
        ``"{layer}.weight"`` to :math:`G = X^T X`, ``[in_features, in_features]``, float32 (float64 for float64 inputs),
        where the rows of X are all inputs that the layer got.

    Raises
    ------
    TypeError
        If one of `layers` is not a `torch.nn.Linear`.
    ValueError
        If one of `layers` is not in the model, or was never called.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if layers is not None:
        modules = dict(model.named_modules())
        for name in (wanted := list(layers)):
            if name not in modules:
                raise ValueError(f"input_grams: layers has {name!r}, which the model does not; it has {list(linears)}")
            if name not in linears:
                raise TypeError(f"input_grams: layer {name!r} is a {type(modules[name]).__name__}; expected a Linear")
        linears = {name: linears[name] for name in wanted}
    grams: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        x = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
        key = f"{name}.weight"
        gram = grams.setdefault(key, x.new_zeros(x.shape[-1], x.shape[-1]))
        gram.addmm_(x.T, x)
        rows[key] = rows.get(key, 0) + len(x)

    with _observed(model, linears, observe):
        for batch in batches:
            _call(model, batch)
    uncalled = [name for name in linears if f"{name}.weight" not in grams] if layers is not None else []
    if uncalled:
        raise ValueError(
            f"input_grams: layers {uncalled} were never called; expected at least one batch that calls them"
        )
    return {key: gram / max(rows[key], 1) if normalize else gram for key, gram in grams.items()}


@torch.no_grad()
def merge_regmean(
    models: Sequence[State], grams: Sequence[Mapping[str, Tensor]], *, alpha: float = 0.9
) -> dict[str, Tensor]:
    r"""RegMean: linear layers whose outputs are nearest to those of each model on its own data.

    Parameters
    ----------
    models : sequence of nn.Module or mapping of str to Tensor
        Models fine-tuned from one start.
    grams : sequence of mapping of str to Tensor
        Of each model, what `input_grams` returns for its data. Entries of the models that no one has a Gram matrix for
        (biases, norms, embeddings) are averaged.
    alpha : float, default 0.9
        The factor of the Gram matrices' off-diagonal elements, from 0 to 1. At 1 the merge is the least-squares
        solution; at 0 each column of a weight is averaged by its input's energy.

    Returns
    -------
    dict of str to Tensor
        The merged model, with the dtypes of ``models[0]``.

    Raises
    ------
    TypeError
        If an entry is not a tensor, or of another kind of dtype in another model.
    ValueError
        If there are no models, keys or shapes differ, a Gram matrix is missing, not finite, or not
        ``[in_features, in_features]`` or has negative eigenvalues, or `alpha` is not from 0 to 1.

    Notes
    -----
    With :math:`W_i` of shape ``[out_features, in_features]`` and
    :math:`\tilde G_i = \alpha\, G_i + (1 - \alpha) \operatorname{diag}(G_i)`,

    .. math::
        W^T = \Big(\sum_i \tilde G_i\Big)^{-1} \sum_i \tilde G_i W_i^T ,

    at :math:`\alpha = 1` the minimum of :math:`\sum_i \lVert X_i W^T - X_i W_i^T \rVert_F^2`. It is solved in float64,
    as a correction of the average, so that inputs which no data excites keep the average.

    References
    ----------
    Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng. *Dataless Knowledge Fusion by Merging Weights of
    Language Models.* ICLR 2023, arXiv:2212.09849.
    """
    op = "merge_regmean"
    states = _states(op, models=models)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha is {alpha}; expected 0 to 1")
    known = _check_per_model(op, "grams", grams, states)
    for i, gram in enumerate(grams):
        for key in known:
            weight, shape = states[0][key], tuple(gram[key].shape)
            if weight.dim() != 2 or shape != (weight.shape[1], weight.shape[1]):
                want = f"[in_features, in_features] of the weight, whose shape is {tuple(weight.shape)}"
                raise ValueError(f"{op}: grams[{i}][{key!r}] has shape {shape}; expected {want}")
            if not bool(gram[key].isfinite().all()):
                raise ValueError(f"{op}: grams[{i}][{key!r}] has NaN or infinite values; expected finite ones")
    shares = _shares(op, 1.0, len(states))

    def combine(keys: list[str], lists: list[list[Tensor]]) -> list[Tensor]:
        merged = _weighted_sum(lists, shares)
        for n, key in enumerate(keys):
            if key in known:
                own = [gram[key].to(merged[n].device, torch.float64) for gram in grams]
                solution = _regression_mean([tensors[n].double() for tensors in lists], own, alpha)
                if solution is None:
                    raise ValueError(f"{op}: grams has a matrix at {key!r} with negative eigenvalues; expected X^T X")
                merged[n] = solution.to(merged[n])
        return merged

    return _sweep(op, states, combine)


def _regression_mean(weights: list[Tensor], grams: list[Tensor], alpha: float) -> Tensor | None:
    """RegMean of one layer: [out, in] weights, [in, in] Gram matrices, float64. None if those are no X'X."""
    grams = [alpha * gram + (1 - alpha) * gram.diagonal().diag() for gram in grams]
    mean = torch.stack(weights).mean(0)
    total = torch.stack(grams).sum(0)
    correction = torch.stack([gram @ (w - mean).T for gram, w in zip(grams, weights, strict=True)]).sum(0)
    # In units of each input's energy, the eigenvalues of `total` are at least 1 - alpha: well conditioned, whatever the
    # inputs' scales. An input that is always zero gets 1 on the diagonal, and its correction is zero.
    energy = total.diagonal().clamp(min=0)
    scale = torch.where(energy > 0, energy.rsqrt(), 0.0)
    total = total * scale * scale[:, None] + torch.where(energy > 0, 0.0, 1.0).diag()
    correction = correction * scale[:, None]
    if alpha < 1:
        factor, failed = torch.linalg.cholesky_ex(total)
        if failed:
            return None
        solved = torch.cholesky_solve(correction, factor)
    else:
        solved = torch.linalg.pinv(total, hermitian=True, rtol=len(total) * torch.finfo(total.dtype).eps) @ correction
    return mean + (solved * scale[:, None]).T


# ---- state dicts ----------------------------------------------------------------------------------------------------


def _states(op: str, **models: State | Sequence[State]) -> list[dict[str, Tensor]]:
    """The state dicts of all models in order; each of the same keys, shapes and kinds of dtype as the first."""
    named: list[tuple[str, State]] = []
    for argument, given in models.items():
        if isinstance(given, (nn.Module, Mapping)):
            named.append((argument, given))
        elif isinstance(given, Sequence):
            named += [(f"{argument}[{i}]", model) for i, model in enumerate(given)]
            if not given:
                raise ValueError(f"{op}: {argument} is empty; expected at least one model")
        else:
            raise TypeError(f"{op}: {argument} is a {type(given).__name__}; expected a model or a state dict")
    states = [_state(op, name, model) for name, model in named]
    for (name, _), state in zip(named[1:], states[1:], strict=True):
        _check_same(op, name, state, named[0][0], states[0])
    return states


def _state(op: str, name: str, model: State) -> dict[str, Tensor]:
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"{op}: {name} is a {type(model).__name__}; expected a model or a state dict")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} has a {type(value).__name__} at {key!r}; expected tensors")
        if value.is_complex():
            raise TypeError(f"{op}: {name} has dtype {_name(value.dtype)} at {key!r}; expected real numbers")
    return {key: value.detach() for key, value in state.items()}


def _check_same(op: str, name: str, state: dict[str, Tensor], first: str, base: dict[str, Tensor]) -> None:
    for key in base:
        if key not in state:
            raise ValueError(f"{op}: {name} has no {key!r}, which {first} has; expected the same keys")
    for key, value in state.items():
        if key not in base:
            raise ValueError(f"{op}: {name} has {key!r}, which {first} has not; expected the same keys")
        if value.shape != base[key].shape:
            shapes = f"shape {tuple(value.shape)} at {key!r}; expected {tuple(base[key].shape)}"
            raise ValueError(f"{op}: {name} has {shapes}, that of {first}")
        if value.is_floating_point() != base[key].is_floating_point():
            dtypes = f"dtype {_name(value.dtype)} at {key!r}; {first} has {_name(base[key].dtype)}"
            raise TypeError(f"{op}: {name} has {dtypes}; expected both floating point, or neither")


def _check_per_model(
    op: str, argument: str, given: Sequence[Mapping[str, Tensor]], states: list[dict[str, Tensor]]
) -> set[str]:
    """The keys of mappings that go with the models; all have the same, and the models have them."""
    if len(given) != len(states):
        raise ValueError(f"{op}: {argument} has {len(given)} entries; expected {len(states)}, one per model")
    keys = set().union(*given)
    for key in sorted(keys):
        if key not in states[0] or not states[0][key].is_floating_point():
            raise ValueError(f"{op}: {argument} has {key!r}, which is no floating-point entry of the models")
        for i, mapping in enumerate(given):
            if key not in mapping:
                raise ValueError(f"{op}: {argument}[{i}] has no {key!r}, which others have; expected the same keys")
    return keys


def _check_weights(op: str, weights: Weights, count: int) -> list[float]:
    if isinstance(weights, Tensor):
        weights = weights.tolist()
    values = [float(weights)] * count if isinstance(weights, (int, float)) else [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"{op}: weights has {len(values)} entries; expected {count}, one per task")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{op}: weights is {values}; expected finite numbers")
    return values


def _shares(op: str, weights: Weights, count: int) -> list[float]:
    """Weights of an average, which sum to 1."""
    values = _check_weights(op, weights, count)
    if min(values) < 0 or sum(values) == 0:
        raise ValueError(f"{op}: weights is {values}; expected numbers >= 0 that are not all 0")
    return [value / sum(values) for value in values]


def _check_density(op: str, density: float, *, positive: bool = False) -> float:
    if not 0 <= density <= 1 or (positive and density == 0):
        raise ValueError(f"{op}: density is {density}; expected {'above 0 and up to 1' if positive else '0 to 1'}")
    return density


def _check_scaling(op: str, scaling: float) -> None:
    if not math.isfinite(scaling):
        raise ValueError(f"{op}: scaling is {scaling}; expected a finite number")


def _weighted_sum(lists: list[list[Tensor]], weights: list[float]) -> list[Tensor]:
    total = list(torch._foreach_mul(lists[0], weights[0]))
    for tensors, weight in zip(lists[1:], weights[1:], strict=True):
        torch._foreach_add_(total, tensors, alpha=weight)
    return total


def _buckets(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """The floating-point keys, in runs of about _BUCKET elements."""
    keys: list[str] = []
    numel = 0
    for key, tensor in state.items():
        if tensor.is_floating_point():
            keys.append(key)
            numel += tensor.numel()
            if numel >= _BUCKET:
                yield keys
                keys, numel = [], 0
    if keys:
        yield keys


def _computable(states: list[dict[str, Tensor]], keys: list[str]) -> list[list[Tensor]]:
    """For each state, the tensors at `keys` in the dtype of the computation, where the first state's are."""
    likes = [states[0][key] for key in keys]
    return [
        [state[key].to(like.device, _compute_dtype(like)) for key, like in zip(keys, likes, strict=True)]
        for state in states
    ]


def _sweep(
    op: str, states: list[dict[str, Tensor]], combine: Callable[[list[str], list[list[Tensor]]], list[Tensor]]
) -> dict[str, Tensor]:
    """A state dict like the first, its floating-point tensors from combine(keys, tensors of each state).

    `combine` must not write to what it gets, and must return new tensors.
    """
    out = {key: _uncombined(op, key, states) for key in states[0] if not states[0][key].is_floating_point()}
    for keys in _buckets(states[0]):
        for key, tensor in zip(keys, combine(keys, _computable(states, keys)), strict=True):
            out[key] = tensor.to(states[0][key].dtype)
    return {key: out[key] for key in states[0]}


def _uncombined(op: str, key: str, states: list[dict[str, Tensor]]) -> Tensor:
    """A copy of an integer or boolean entry, by the rule at the top of this file."""
    first = states[0][key]
    if first.dim() and not all(torch.equal(first, state[key].to(first.device)) for state in states[1:]):
        raise ValueError(
            f"{op}: {key!r} is {_name(first.dtype)} and differs between the models; expected equal values: integers "
            "cannot be averaged (dequantize quantized weights first)"
        )
    return first.clone()


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
