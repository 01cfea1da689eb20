"""Regularisers of fine-tuning: towards the starting point, against noise, against sharp minima.

================  ==================================================  ===========================
`L2SP`            stay near the pre-trained weights                   Li, Grandvalet, Davoine 2018
`apply_mixout`    put pre-trained weights back at random              Lee, Cho, Kang 2020
`r_drop_loss`     two dropout passes agree                            Liang et al. 2021
`r3f_penalty`     outputs agree under noise on the embeddings         Aghajanyan et al. 2021
`smart_penalty`   outputs agree under the worst small perturbation    Jiang et al. 2020
`SAM`             descend with the gradient of the worst neighbour    Foret et al. 2021
================  ==================================================  ===========================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tlkernels.nn.quantize import _matches

__all__ = [
    "L2SP",
    "SAM",
    "Mixout",
    "apply_mixout",
    "r3f_penalty",
    "r_drop_loss",
    "remove_mixout",
    "smart_penalty",
    "symmetric_kl",
]

_CHUNK = 2**24  # weights per sweep: bounds what the differences take beside a model of billions


# ---- L2-SP -----------------------------------------------------------------------------------------------------------


class L2SP:
    r"""L2 penalty towards the starting point, and towards zero for new layers.

    .. math::
        \Omega(w) = \frac{\alpha}{2} \lVert w_S - w_S^0 \rVert_2^2 + \frac{\beta}{2} \lVert w_{\bar S} \rVert_2^2

    :math:`S` are the weights that came from pre-training, :math:`\bar S` the new ones.

    Parameters
    ----------
    model : torch.nn.Module
        Its floating-point parameters are penalised; tied ones once.
    alpha, beta : float
        >= 0. The paper takes 0.01 for beta, and finds alpha by cross-validation.
    new : sequence of str
        Patterns of the parameters in :math:`\bar S`, as for `layer_groups`, for instance ``["classifier"]``.
    start : mapping of str to Tensor, optional
        :math:`w^0` by parameter name, such as a checkpoint's state dict; entries beyond the parameters are passed
        over. By default the values that the model has now.
    dtype : torch.dtype, optional
        To store :math:`w^0` in; bfloat16 halves its memory, and moves the starting point by its rounding, so that the
        penalty starts a little above 0. By default each parameter's own.
    device : torch.device or str, optional
        To keep :math:`w^0` on, e.g. ``"cpu"``; it is brought over piece by piece when needed.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; if a parameter is neither in `start` nor matched by `new`, or has another shape
        there; if a pattern matches nothing.

    Notes
    -----
    `penalty` adds to the loss. `add_gradient_` adds :math:`\alpha (w - w^0)` and :math:`\beta w` to ``.grad`` instead,
    in one multi-tensor sweep without any graph: between ``backward`` (and the unscaling of a gradient scaler) and
    ``optimizer.step``. Use one of the two, and no weight decay beside it. Differences are taken in float32 at least.

    References
    ----------
    Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018,
    arXiv:1802.01483, section 3.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> anchor = L2SP(model, alpha=0.1)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> round(anchor.penalty().item(), 4)  # 0.1 / 2 * (1 + 1)
    0.1
    """

    def __init__(
        self, model: nn.Module, alpha: float = 0.1, beta: float = 0.01, *, new: Sequence[str] = (),
        start: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(new, str):
            raise TypeError(f"L2SP: new is {new!r}; expected a sequence of patterns, such as [{new!r}]")
        for name, value in (("alpha", alpha), ("beta", beta)):
            _check_nonnegative("L2SP", name, value)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"L2SP: dtype is {dtype}; expected a floating-point dtype")
        named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        for pattern in new:
            if not any(_matches(name, [pattern]) for name in named):
                raise ValueError(f"L2SP: new has the pattern {pattern!r}, which matches no parameter")
        self._old = {name: p for name, p in named.items() if not _matches(name, new)}
        self._new = {name: p for name, p in named.items() if name not in self._old}
        source: Mapping[str, Tensor] = self._old if start is None else start
        for name, p in self._old.items():
            if name not in source:
                raise ValueError(f"L2SP: start has no {name}; expected it there, or in the patterns of new")
            if source[name].shape != p.shape:
                raise ValueError(
                    f"L2SP: start[{name!r}] has shape {tuple(source[name].shape)}; expected {tuple(p.shape)}, like the "
                    "parameter, or a pattern of new for it"
                )
        self.alpha, self.beta = alpha, beta
        self._start = {
            name: source[name].detach().to(device=device or p.device, dtype=dtype or p.dtype, copy=True)
            for name, p in self._old.items()
        }

    def penalty(self) -> Tensor:
        """The penalty: a scalar, float32 or float64, differentiable once with respect to the parameters.

        Beside the parameters themselves, the graph holds nothing.
        """
        params = [*self._old.values(), *self._new.values()]
        value: Tensor = _QuadraticPenalty.apply(self, *params)
        return value

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add the gradient of the penalty to ``.grad`` of every parameter that requires gradients.

        Where there is no ``.grad`` yet, it becomes the penalty's.
        """
        for params, starts, coefficient in self._sweeps(only_trainable=True):
            differences = _differences(params, starts)
            there = [i for i, p in enumerate(params) if p.grad is not None]
            if there:
                grads = [g for p in params if (g := p.grad) is not None]
                torch._foreach_add_(grads, [differences[i] for i in there], alpha=coefficient)
            for p, difference in zip(params, differences, strict=True):
                if p.grad is None:
                    p.grad = (difference * coefficient).to(p.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The starting point, by parameter name: not to be had from the model any more once it has been trained."""
        return dict(self._start)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a starting point.

        Raises
        ------
        ValueError
            If it has other names or shapes.
        """
        for name in sorted(state.keys() ^ self._start.keys()):
            raise ValueError(f"L2SP.load_state_dict: {name} is in the state or in the model, not in both")
        for name, own in self._start.items():
            if state[name].shape != own.shape:
                raise ValueError(
                    f"L2SP.load_state_dict: {name} has shape {tuple(state[name].shape)}; expected {tuple(own.shape)}"
                )
        for name, own in self._start.items():
            own.copy_(state[name])

    def _sweeps(self, *, only_trainable: bool) -> Iterator[tuple[list[nn.Parameter], list[Tensor] | None, float]]:
        for named, coefficient in ((self._old, self.alpha), (self._new, self.beta)):
            names = [name for name, p in named.items() if p.requires_grad or not only_trainable]
            for chunk in _chunks([(name, named[name].numel()) for name in names]):
                starts = [self._start[name] for name in chunk] if named is self._old else None
                yield [named[name] for name in chunk], starts, coefficient


class _QuadraticPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: L2SP, *params: Tensor) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(*params)  # so that a change in place before backward is an error, not a wrong gradient
        total = torch.zeros((), device=params[0].device) if params else torch.zeros(())
        for chunk, starts, coefficient in owner._sweeps(only_trainable=False):
            norms = torch._foreach_norm(_differences(chunk, starts))
            total = total + 0.5 * coefficient * torch.stack([n.to(total.device) for n in norms]).square().sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where they have been changed
        grads: dict[int, Tensor] = {}
        for chunk, starts, coefficient in ctx.owner._sweeps(only_trainable=True):
            differences = _differences(chunk, starts)
            for p, difference in zip(chunk, differences, strict=True):
                grads[id(p)] = (difference * (coefficient * grad_output.to(difference.device))).to(p.dtype)
        owned = (*ctx.owner._old.values(), *ctx.owner._new.values())
        return (None, *(grads.get(id(p)) for p in owned))


def _differences(params: Sequence[Tensor], starts: Sequence[Tensor] | None) -> list[Tensor]:
    """Fresh tensors w - w0 (or w), in float32 at least."""
    wide = [p.detach().float() if p.dtype in (torch.bfloat16, torch.float16) else p.detach() for p in params]
    if starts is None:
        return wide
    return list(torch._foreach_sub(wide, [s.to(w) for s, w in zip(starts, wide, strict=True)]))


def _chunks(sizes: list[tuple[str, int]]) -> Iterator[list[str]]:
    chunk: list[str] = []
    total = 0
    for name, size in sizes:
        if chunk and total + size > _CHUNK:
            yield chunk
            chunk, total = [], 0
        chunk.append(name)
        total += size
    if chunk:
        yield chunk


def _check_nonnegative(op: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{op}: {name} is {value}; expected a finite number >= 0")


# ---- mixout ----------------------------------------------------------------------------------------------------------


class Mixout(nn.Module):
    r"""The weight of a layer, mixed at random with what it was; a parametrization, see `apply_mixout`.

    .. math:: \tilde W = \frac{M \odot W^0 + (1 - M) \odot W - p \, W^0}{1 - p}, \qquad M \sim \mathrm{Bernoulli}(p)

    Parameters
    ----------
    start : Tensor
        :math:`W^0`, copied; of any shape.
    p : float
        The probability of the pre-trained weight, in [0, 1).
    input_dim : int, optional
        The dimension of the weight that runs over the layer's inputs: one M for each input, as dropout has. By default
        one M for each element.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    :math:`E[\tilde W] = W`. In evaluation, and at p = 0, :math:`\tilde W` is W itself. With :math:`W^0 = 0` it is
    dropout: of the inputs with `input_dim` (drawn once for the whole batch), of the weights without.

    References
    ----------
    Lee, Cho and Kang, Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models, ICLR 2020,
    arXiv:1909.11299, section 3.
    """

    start: Tensor

    def __init__(self, start: Tensor, p: float, input_dim: int | None = None) -> None:
        super().__init__()
        _check_probability("Mixout", p)
        if input_dim is not None and not -start.dim() <= input_dim < start.dim():
            raise ValueError(
                f"Mixout: input_dim is {input_dim}; expected a dimension of start, which has shape {tuple(start.shape)}"
            )
        self.p, self.input_dim = p, input_dim
        self.register_buffer("start", start.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """[...] -> [...], of the shape of `start`."""
        if not self.training or self.p == 0:
            return weight
        shape = list(weight.shape)
        if self.input_dim is not None:
            shape = [size if i == self.input_dim % weight.dim() else 1 for i, size in enumerate(shape)]
        keep = torch.empty(shape, device=weight.device, dtype=weight.dtype).bernoulli_(1 - self.p)
        # ((1 - keep) w0 + keep w - p w0) / (1 - p) is this, with one product less and no rounding where w = w0
        return self.start + (weight - self.start) * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the parametrization."""
        return f"p={self.p}, input_dim={self.input_dim}"


def apply_mixout(
    model: nn.Module, p: float, *, layers: Sequence[str] = ("*",), start: Mapping[str, Tensor] | None = None,
    per_element: bool = False,
) -> list[str]:  # fmt: skip
    """Mix the weights of linear layers with their pre-trained values while training, in place.

    Parameters
    ----------
    model : torch.nn.Module
        `torch.nn.Linear` (with subclasses) and transformers' ``Conv1D``; biases are left alone.
    p : float
        The probability of the pre-trained weight, in [0, 1). The paper finds 0.7 to 0.9 good for BERT-large.
    layers : sequence of str
        Patterns of the modules to take, as for `layer_groups`. Leave out new layers, whose start is no pre-trained one.
    start : mapping of str to Tensor, optional
        The pre-trained weights by parameter name. By default the values that the model has now.
    per_element : bool
        Draw for each weight instead of for each input of the layer.

    Returns
    -------
    list of str
        The names of the layers.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; if no layer matches, or one has a parametrized weight already. The model is as
        it was then.

    Notes
    -----
    Mixout stands where dropout stood: the paper sets the dropout that feeds these layers to 0. A weight that is tied to
    an embedding is mixed where the linear layer uses it, not in the embedding; it stays tied.

    The parametrization renames ``weight`` in the ``state_dict`` to ``parametrizations.weight.original`` and adds the
    starting point, so that training can be resumed. `remove_mixout` gives back the plain model; optimizers keep their
    parameters in both directions.

    References
    ----------
    Lee, Cho and Kang, Mixout, ICLR 2020, arXiv:1909.11299.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> apply_mixout(model, 0.9, layers=["0"])
    ['0']
    """
    _check_probability("apply_mixout", p)
    if isinstance(layers, str):
        raise TypeError(f"apply_mixout: layers is {layers!r}; expected a sequence of patterns, such as [{layers!r}]")
    found: dict[str, tuple[nn.Module, nn.Parameter, int, Tensor]] = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear)
        if not (linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))) or not _matches(name, layers):
            continue
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"apply_mixout: {name or 'the model'} has a parametrized weight already")
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            continue  # made by a hook, or in 4 bits: not trained
        key = f"{name}.weight".lstrip(".")
        if start is not None and (key not in start or start[key].shape != weight.shape):
            got = f"has shape {tuple(start[key].shape)}" if key in start else "is missing"
            raise ValueError(f"apply_mixout: start[{key!r}] {got}; expected shape {tuple(weight.shape)}")
        found[name] = (module, weight, 1 if linear else 0, weight if start is None else start[key])
    if not found:
        raise ValueError(f"apply_mixout: no linear layer matches layers = {list(layers)}; expected at least one")
    for module, weight, input_dim, own_start in found.values():
        mixout = Mixout(own_start.to(weight), p, None if per_element else input_dim).train(module.training)
        parametrize.register_parametrization(module, "weight", mixout)
    return list(found)


def remove_mixout(model: nn.Module) -> nn.Module:
    """Undo `apply_mixout`: each weight is again the trained parameter itself.

    Returns the model. Layers without mixout are left alone.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations
            if len(chain.weight) == 1 and isinstance(chain.weight[0], Mixout):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return model


def _check_probability(op: str, p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{op}: p is {p}; expected 0 <= p < 1")


# ---- agreement of outputs --------------------------------------------------------------------------------------------


def symmetric_kl(logits_p: Tensor, logits_q: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two categorical distributions, mean over rows.

    .. math:: \mathrm{KL}(p \Vert q) + \mathrm{KL}(q \Vert p) = \sum_c (p_c - q_c)(\log p_c - \log q_c)

    Parameters
    ----------
    logits_p, logits_q : Tensor
        ``[..., C]``, of any floating-point dtype, finite.
    mask : Tensor, optional
        Bool ``[...]``: the rows that count. All by default; 0 is returned where none does.

    Returns
    -------
    Tensor
        Scalar, float32 (float64 for float64), differentiable in both.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if logits_p.shape != logits_q.shape or logits_p.dim() < 1:
        raise ValueError(
            f"symmetric_kl: logits_p and logits_q have shapes {tuple(logits_p.shape)} and {tuple(logits_q.shape)}; "
            "expected one shape [..., C]"
        )
    if mask is not None and mask.shape != logits_p.shape[:-1]:
        raise ValueError(
            f"symmetric_kl: mask has shape {tuple(mask.shape)}; expected {tuple(logits_p.shape[:-1])}, the rows of "
            "logits_p"
        )
    log_p, log_q = (_wide(logits).log_softmax(-1) for logits in (logits_p, logits_q))
    rows = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    if mask is None:
        return rows.mean()
    return torch.where(mask, rows, 0).sum() / mask.sum().clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def r_drop_loss(
    logits1: Tensor, logits2: Tensor, targets: Tensor, alpha: float = 1.0, *, ignore_index: int = -100
) -> Tensor:
    r"""R-Drop: cross-entropy of two passes with different dropout, and their disagreement.

    .. math::
        L = \frac12 \Big[ \underbrace{-\log P_1(y) - \log P_2(y)}_{L_{NLL}} + \alpha \,
        \underbrace{\tfrac12 \left( \mathrm{KL}(P_1 \Vert P_2) + \mathrm{KL}(P_2 \Vert P_1) \right)}_{L_{KL}} \Big]

    Parameters
    ----------
    logits1, logits2 : Tensor
        ``[..., C]``, from two forward passes of one batch in train mode (or one pass of the batch twice, cut in two).
    targets : Tensor
        int64 ``[...]``.
    alpha : float
        >= 0; the paper uses 0.1 to 5, by task.
    ignore_index : int
        Rows with this target count nowhere.

    Returns
    -------
    Tensor
        Scalar: the mean over rows.

    Raises
    ------
    ValueError
        If the shapes do not fit, or alpha is negative.

    Notes
    -----
    This is half of the paper's loss, with its alpha: equal to plain cross-entropy at alpha = 0, so that learning rates
    carry over. Code that adds :math:`\alpha L_{KL}` to the *mean* of the two cross-entropies has twice this alpha.

    References
    ----------
    Liang et al., R-Drop: Regularized Dropout for Neural Networks, NeurIPS 2021, arXiv:2106.14448, section 2.1.
    """
    _check_nonnegative("r_drop_loss", "alpha", alpha)
    if logits1.shape != logits2.shape or targets.shape != logits1.shape[:-1]:
        raise ValueError(
            f"r_drop_loss: logits1, logits2 and targets have shapes {tuple(logits1.shape)}, {tuple(logits2.shape)} and "
            f"{tuple(targets.shape)}; expected [..., C], [..., C] and [...]"
        )
    classes, rows = logits1.shape[-1], targets.reshape(-1)
    nll = sum(
        nn.functional.cross_entropy(_wide(logits).reshape(-1, classes), rows, ignore_index=ignore_index)
        for logits in (logits1, logits2)
    )
    return 0.5 * (nll + 0.5 * alpha * symmetric_kl(logits1, logits2, targets != ignore_index))


def r3f_penalty(
    forward: Callable[[Tensor], Tensor], embeddings: Tensor, logits: Tensor, *, eps: float = 1e-5,
    noise: Literal["normal", "uniform"] = "uniform", mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    r"""R3F: how far the output moves under noise on the embeddings.

    .. math::
        \mathrm{KL}_S\big(f(x), f(x + z)\big) = \mathrm{KL}(f(x) \Vert f(x + z)) + \mathrm{KL}(f(x + z) \Vert f(x)),
        \qquad z \sim \mathcal N(0, \sigma^2 I) \text{ or } \mathcal U(-\sigma, \sigma)

    Parameters
    ----------
    forward : callable
        From embeddings, of the shape of `embeddings`, to logits ``[..., C]``; for a transformers model
        ``lambda e: model(inputs_embeds=e, attention_mask=m).logits``.
    embeddings : Tensor
        :math:`x`, e.g. ``model.get_input_embeddings()(input_ids)``.
    logits : Tensor
        :math:`f(x)`, ``[..., C]``, from the pass that made the task loss.
    eps : float
        :math:`\sigma` > 0; the paper uses 1e-5.
    noise : {"normal", "uniform"}
    mask : Tensor, optional
        Bool ``[...]``: the rows of logits that count, as for `symmetric_kl`.
    generator : torch.Generator, optional
        On the device of `embeddings`.

    Returns
    -------
    Tensor
        Scalar; the loss is ``task_loss + lam * r3f_penalty(...)``, lambda 0.1 to 5 in the paper.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Aghajanyan et al., Better Fine-Tuning by Reducing Representational Collapse, ICLR 2021, arXiv:2008.03156.
    """
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"r3f_penalty: eps is {eps}; expected a finite number > 0")
    if noise not in ("normal", "uniform"):
        raise ValueError(f"r3f_penalty: noise is {noise!r}; expected 'normal' or 'uniform'")
    z = torch.empty_like(embeddings, requires_grad=False)
    z = z.normal_(0, eps, generator=generator) if noise == "normal" else z.uniform_(-eps, eps, generator=generator)
    return symmetric_kl(logits, forward(embeddings + z), mask)


def smart_penalty(
    forward: Callable[[Tensor], Tensor], embeddings: Tensor, output: Tensor, *, eps: float = 1e-5,
    step_size: float = 1e-3, steps: int = 1, noise_std: float = 1e-5,
    divergence: Callable[[Tensor, Tensor], Tensor] = symmetric_kl, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    r"""SMART: how far the output moves under the worst small perturbation of the embeddings.

    .. math::
        R_s = \frac1n \sum_i \max_{\lVert \tilde x_i - x_i \rVert_\infty \le \epsilon}
        \ell_s\big(f(\tilde x_i), f(x_i)\big)

    with the maximum sought by projected gradient ascent from :math:`\tilde x_i = x_i + \nu`,
    :math:`\nu \sim \mathcal N(0, \sigma^2 I)`:

    .. math::
        \tilde x_i \leftarrow \Pi_{\lVert \tilde x_i - x_i \rVert_\infty \le \epsilon}
        \big( \tilde x_i + \eta \, g_i / \lVert g_i \rVert_\infty \big), \qquad
        g_i = \nabla_{\tilde x_i} \ell_s\big(f(x_i), f(\tilde x_i)\big)

    Parameters
    ----------
    forward : callable
        As for `r3f_penalty`.
    embeddings : Tensor
        ``[B, ...]``; the norms are over all but the first dimension.
    output : Tensor
        :math:`f(x)`.
    eps, step_size, noise_std : float
        :math:`\epsilon`, :math:`\eta`, :math:`\sigma`, all > 0; the defaults are the paper's.
    steps : int
        Of the ascent, >= 1.
    divergence : callable
        :math:`\ell_s` of two outputs, a mean over the batch: `symmetric_kl` for classes,
        `torch.nn.functional.mse_loss` for regression.
    generator : torch.Generator, optional
        On the device of `embeddings`.

    Returns
    -------
    Tensor
        Scalar, differentiable in the model's parameters; the perturbation counts as constant.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    The paper's second part, the Bregman proximal point, is ``divergence(output, output_of_the_average)`` with the
    average of `EMA`.

    References
    ----------
    Jiang et al., SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled
    Regularized Optimization, ACL 2020, arXiv:1911.03437, algorithm 1.
    """
    for name, value in (("eps", eps), ("step_size", step_size), ("noise_std", noise_std)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"smart_penalty: {name} is {value}; expected a finite number > 0")
    if steps < 1:
        raise ValueError(f"smart_penalty: steps is {steps}; expected >= 1")
    x, fixed = embeddings.detach(), output.detach()
    delta = torch.empty_like(x).normal_(0, noise_std, generator=generator)
    for _ in range(steps):
        with torch.enable_grad():
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(divergence(forward(x + delta), fixed), delta)
        with torch.no_grad():
            largest = gradient.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
            ascent = gradient / torch.where(largest == 0, 1, largest)
            delta = (delta + step_size * ascent).clamp(-eps, eps)
    return divergence(forward(embeddings + delta), output)


# ---- sharpness -------------------------------------------------------------------------------------------------------


class SAM:
    r"""Sharpness-aware minimisation: step with the gradient of the worst point nearby.

    .. math::
        \hat\epsilon(w) = \rho \, \frac{\nabla L(w)}{\lVert \nabla L(w) \rVert_2}, \qquad
        g_{\mathrm{SAM}} = \nabla L(w) \big|_{w + \hat\epsilon(w)}

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any; it makes the step. The norm is over all its parameters together.
    rho : float
        > 0; 0.05 in the paper.

    Raises
    ------
    ValueError
        If `rho` is not as stated.

    Notes
    -----
    Two forward and backward passes for each step. Batch norms see both; dropout differs between them unless the closure
    seeds it. The weights come back bit for bit before the optimizer steps, also after an error in the second pass.

    References
    ----------
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021, arXiv:2010.01412,
    equations 2 and 3.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 1)
    >>> sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> def closure():
    ...     loss = model(torch.ones(2, 4)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = sam.step(closure)
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05) -> None:
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"SAM: rho is {rho}; expected a finite number > 0")
        self.optimizer, self.rho = optimizer, rho

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Make one step.

        Parameters
        ----------
        closure : callable
            Computes the loss, calls ``backward`` and returns the loss. Gradients are zeroed before each of its two
            calls.

        Returns
        -------
        Tensor
            The loss at w, detached.
        """
        with torch.enable_grad():
            self.optimizer.zero_grad()
            loss = closure().detach()
            with self.perturbed():
                self.optimizer.zero_grad()
                closure()
        self.optimizer.step()
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        r"""Hold the weights at :math:`w + \hat\epsilon(w)`, by the gradients that are there on entering.

        For loops of one's own, with accumulation: accumulate, enter, zero the gradients, accumulate again, leave, step.

        Raises
        ------
        RuntimeError
            If no parameter has a gradient.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            raise RuntimeError("SAM.perturbed: no parameter has a gradient; call backward first")
        with torch.no_grad():
            saved = [p.detach().clone() for p in params]
            grads = [p.grad for p in params]
            norm = nn.utils.get_total_norm(grads, foreach=None)
            scale = torch.where(norm > 0, self.rho / norm, 0.0)  # at a stationary point there is no direction
            torch._foreach_add_(params, [g * scale.to(g.device, g.dtype) for g in grads])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, saved)
