r"""How alike two representations, or two domains, are.

- `linear_cka`, `MinibatchCKA`, `cka_matrix`: do two layers, of one model or of two, represent the same examples alike?
- `proxy_a_distance`, `ideal_joint_error`, `ben_david_bound`: can a classifier tell source from target, and what does
  that say of the error on the target?
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tlkernels.methods.fundamentals.transfer import _optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BenDavidBound",
    "CKAMatrix",
    "MinibatchCKA",
    "ProxyADistance",
    "ben_david_bound",
    "cka_matrix",
    "ideal_joint_error",
    "linear_cka",
    "proxy_a_distance",
]

Features: TypeAlias = "Tensor | np.ndarray[Any, Any]"


# ---- centred kernel alignment ---------------------------------------------------------------------------------------


def linear_cka(
    x: Tensor, y: Tensor, *, unbiased: bool = False, form: Literal["auto", "features", "gram"] = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    r"""Linear CKA: the similarity of two representations of the same examples.

    Parameters
    ----------
    x : Tensor
        ``[n, p]``, floating point: one row per example.
    y : Tensor
        ``[n, q]``, floating point: the same examples in the same order.
    unbiased : bool, default False
        The estimator with the unbiased HSIC, which does not grow with the number of features over examples; n is then
        at least 4, and the value can be below 0.
    form : {"auto", "features", "gram"}, default "auto"
        The product that is formed: of features, ``[p, q]``, or of examples, ``[n, n]``. They are equal; "auto" takes
        the one with fewer operations. The unbiased estimator is always computed from Gram matrices.
    dtype : torch.dtype, optional
        Of the computation and the result, float32 or float64. By default float64 for float64 inputs, else float32.

    Returns
    -------
    Tensor
        A scalar, 1 where the representations are equal up to rotation, scale and offset, and 0 where they are
        uncorrelated; NaN where one of them is constant. Differentiable in both arguments.

    Raises
    ------
    TypeError
        If x or y is not floating point, or `dtype` is another.
    ValueError
        If x or y is not a matrix, their rows differ in number or are too few, or `form` is another.

    Notes
    -----
    With the columns of x and y centred, X and Y,

    .. math::
        \mathrm{CKA} = \frac{\lVert Y^T X \rVert_F^2}{\lVert X^T X \rVert_F \, \lVert Y^T Y \rVert_F}
        = \frac{\langle X X^T, Y Y^T \rangle_F}{\lVert X X^T \rVert_F \, \lVert Y Y^T \rVert_F} .

    The unbiased estimator replaces each :math:`\langle K, L \rangle_F` by
    :math:`\mathrm{HSIC}_1 = \langle \tilde K, \tilde L \rangle_F / (n (n - 3))`, with zero diagonals and, off them,
    :math:`\tilde K_{ij} = K_{ij} - \frac{r_i + r_j}{n - 2} + \frac{s}{(n - 1)(n - 2)}`, where r are the row sums and s
    the sum of K without its diagonal. The columns are centred in two passes, so that offsets far larger than the spread
    cost no more digits than they did in the input.

    References
    ----------
    Simon Kornblith, Mohammad Norouzi, Honglak Lee, Geoffrey Hinton. *Similarity of Neural Network Representations
    Revisited.* ICML 2019, arXiv:1905.00414.
    Le Song, Alex Smola, Arthur Gretton, Justin Bedo, Karsten Borgwardt. *Feature Selection via Dependence
    Maximization.* JMLR 13, 2012.
    """
    _check_form(form)
    x, y = _check_matrix("linear_cka", "x", x, dtype), _check_matrix("linear_cka", "y", y, dtype)
    _check_rows("linear_cka", len(x), len(y), at_least=4 if unbiased else 2)
    x, y = _scaled(_centred(x)), _scaled(_centred(y))
    (n, p), q = x.shape, y.shape[1]
    if unbiased:
        k, el = _u_centred(x @ x.T), _u_centred(y @ y.T)
    elif form == "features" or (form == "auto" and p * q + p * p + q * q < n * (p + q)):
        cross = (y.T @ x).square().sum()
        return cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y))
    else:
        k, el = x @ x.T, y @ y.T
    return (k * el).sum() / (torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(el))


class MinibatchCKA:
    r"""Linear CKA of every layer of one set with every layer of another, from minibatches.

    Only one minibatch's ``[n, n]`` Gram matrices are held, whatever the number of examples and features.

    Parameters
    ----------
    x_layers, y_layers : int
        The number of representations in either set.

    Notes
    -----
    With the unbiased :math:`\mathrm{HSIC}_1` (see `linear_cka`) averaged over minibatches :math:`b`,

    .. math::
        \mathrm{CKA}_{ij} = \frac{\sum_b \mathrm{HSIC}_1(K_i^b, L_j^b)}
        {\sqrt{\sum_b \mathrm{HSIC}_1(K_i^b, K_i^b)} \sqrt{\sum_b \mathrm{HSIC}_1(L_j^b, L_j^b)}} .

    The sums do not depend on how large the minibatches are, up to their noise. They are kept in float64.

    References
    ----------
    Thao Nguyen, Maithra Raghu, Simon Kornblith. *Do Wide and Deep Networks Learn the Same Things?* ICLR 2021,
    arXiv:2010.15327.
    """

    def __init__(self, x_layers: int, y_layers: int) -> None:
        if min(x_layers, y_layers) < 1:
            raise ValueError(f"MinibatchCKA: x_layers and y_layers are {x_layers} and {y_layers}; expected at least 1")
        self._cross = torch.zeros(x_layers, y_layers, dtype=torch.float64)
        self._x = torch.zeros(x_layers, dtype=torch.float64)
        self._y = torch.zeros(y_layers, dtype=torch.float64)

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Take in one minibatch.

        Parameters
        ----------
        xs, ys : sequence of Tensor
            ``[n, features]`` each, floating point, of the same n >= 4 examples, one per layer. If `ys` is `xs`,
            nothing is computed twice.

        Raises
        ------
        TypeError
            If one is not floating point.
        ValueError
            If their number or rows are not as above.
        """
        if (len(xs), len(ys)) != self._cross.shape:
            want = tuple(self._cross.shape)
            raise ValueError(
                f"MinibatchCKA: got {len(xs)} and {len(ys)} representations; expected {want[0]} and {want[1]}"
            )
        for name, tensors in (("xs", xs), ("ys", ys)):
            for i, tensor in enumerate(tensors):
                _check_matrix("MinibatchCKA", f"{name}[{i}]", tensor, None)
                _check_rows("MinibatchCKA", len(xs[0]), len(tensor), at_least=4)
        self._add(grams := [_gram(x) for x in xs], grams if ys is xs else [_gram(y) for y in ys])

    def _add(self, k: list[Tensor], el: list[Tensor]) -> None:
        """Take in centred Gram matrices [n, n] of one minibatch."""
        n = len(k[0])
        x = torch.stack([_u_centred(gram.double()).flatten() for gram in k])
        y = x if el is k else torch.stack([_u_centred(gram.double()).flatten() for gram in el])
        scale = 1 / (n * (n - 3))
        self._cross += (x @ y.T).cpu() * scale
        self._x += x.square().sum(1).cpu() * scale
        self._y += y.square().sum(1).cpu() * scale

    def compute(self) -> Tensor:
        """CKA ``[x_layers, y_layers]``, float64; NaN where a representation is constant, or before any minibatch."""
        return self._cross / (self._x.sqrt()[:, None] * self._y.sqrt())


@dataclass(frozen=True)
class CKAMatrix:
    """What `cka_matrix` found.

    Attributes
    ----------
    values : Tensor
        ``[len(layers_a), len(layers_b)]``, float64.
    layers_a, layers_b : tuple of str
        The names of the layers.
    """

    values: Tensor
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The heat map, from 0 to 1, of `layers_a` up and `layers_b` across. Needs matplotlib; returns the axes."""
        if ax is None:
            ax = _optional("matplotlib.pyplot", "matplotlib").subplots()[1]
        image = ax.imshow(self.values.numpy(), origin="lower", vmin=0, vmax=1, cmap="magma")
        ax.set_xticks(range(len(self.layers_b)), self.layers_b, rotation=90)
        ax.set_yticks(range(len(self.layers_a)), self.layers_a)
        ax.figure.colorbar(image, ax=ax, label="linear CKA")
        return ax


def cka_matrix(
    model_a: nn.Module, model_b: nn.Module | None, batches: Iterable[Any], *, layers_a: Iterable[str] | None = None,
    layers_b: Iterable[str] | None = None,
) -> CKAMatrix:  # fmt: skip
    """The CKA of every layer of a model with every layer of another, in one pass over the data.

    Parameters
    ----------
    model_a : nn.Module
        Run in eval mode and without gradients; its modes are restored.
    model_b : nn.Module, optional
        The other model. None compares the layers of `model_a` with each other.
    batches : iterable
        Of what the models take: a tensor, a tuple or list whose first element they take, or a mapping of keyword
        arguments. At least 4 examples each.
    layers_a, layers_b : iterable of str, optional
        Names of modules. By default all that have no children and are called. A module's output is the first tensor
        that it returns, ``[n, ...]``, flattened to ``[n, features]``; of a module that is called several times, the
        last one.

    Returns
    -------
    CKAMatrix
        The similarities, with the estimator of `MinibatchCKA`, and a plot of them.

    Raises
    ------
    ValueError
        If a name is not in the model, a layer was not called or returned no floating-point tensor ``[n, ...]``, or a
        minibatch is too small or there is none.
    """
    other = model_a if model_b is None else model_b
    choices = [_chosen("layers_a", model_a, layers_a), _chosen("layers_b", other, layers_b)]
    shared = model_b is None and list(choices[0][0]) == list(choices[1][0])
    cka: MinibatchCKA | None = None
    names: dict[int, list[str]] = {}
    grams: dict[str, Tensor] = {}

    def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        features = _first_tensor(output)
        if features is not None and features.dim() and features.is_floating_point():
            grams[name] = _gram(features.reshape(len(features), -1))

    def grams_of(model: nn.Module, side: int, batch: Any) -> list[Tensor]:
        chosen, explicit = choices[side]
        grams.clear()
        with _observed(model, chosen, observe):
            _call(model, batch)
        if side not in names:
            names[side] = [name for name in chosen if explicit or name in grams]
        if missing := [name for name in names[side] if name not in grams]:
            want = "layers that every batch calls and that return floating-point tensors"
            raise ValueError(f"cka_matrix: layers_{'ab'[side]} has {missing}, which gave no features; expected {want}")
        for name in names[side]:
            _check_rows(f"cka_matrix: {name!r}", len(grams[names[side][0]]), len(grams[name]), at_least=4)
        return [grams[name] for name in names[side]]

    for batch in batches:
        k = grams_of(model_a, 0, batch)
        el = k if shared else grams_of(other, 1, batch)
        if shared:
            names[1] = names[0]
        if cka is None:
            cka = MinibatchCKA(len(k), len(el))
        _check_rows("cka_matrix", len(k[0]), len(el[0]), at_least=4)
        cka._add(k, el)
    if cka is None:
        raise ValueError("cka_matrix: batches is empty; expected at least one batch")
    return CKAMatrix(cka.compute(), tuple(names[0]), tuple(names[1]))


def _chosen(argument: str, model: nn.Module, layers: Iterable[str] | None) -> tuple[dict[str, nn.Module], bool]:
    """The modules to watch, and whether they were asked for by name."""
    modules = dict(model.named_modules())
    if layers is None:
        return {name: m for name, m in modules.items() if next(m.children(), None) is None}, False
    chosen = {}
    for name in layers:
        if name not in modules:
            raise ValueError(
                f"cka_matrix: {argument} has {name!r}, which the model has not; it has {sorted(modules)[1:]}"
            )
        chosen[name] = modules[name]
    return chosen, True


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((t for t in map(_first_tensor, output) if t is not None), None)
    return None


def _gram(x: Tensor) -> Tensor:
    x = _centred(x if x.dtype == torch.float64 else x.float())
    return x @ x.T


def _centred(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x - x.mean(0)  # the first mean was rounded: of numbers around 1e4, to 1e-3


def _scaled(x: Tensor) -> Tensor:
    """Divided by the largest magnitude, which CKA does not see, and without which the fourth powers leave the range."""
    scale = x.detach().abs().amax() if x.numel() else x.new_ones(())
    return x / torch.where(scale > 0, scale, 1.0)


def _u_centred(gram: Tensor) -> Tensor:
    n = len(gram)
    off = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    gram = gram * off
    rows = gram.sum(1)
    return (gram - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))) * off


def _check_form(form: str) -> None:
    if form not in ("auto", "features", "gram"):
        raise ValueError(f"linear_cka: form is {form!r}; expected 'auto', 'features' or 'gram'")


def _check_matrix(op: str, name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{op}: {name} is a {getattr(x, 'dtype', type(x).__name__)}; expected a floating-point tensor")
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected [examples, features]")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"{op}: dtype is {dtype}; expected torch.float32 or torch.float64")
    return x.to(dtype or torch.promote_types(x.dtype, torch.float32))


def _check_rows(op: str, rows: int, others: int, *, at_least: int) -> None:
    if rows != others:
        raise ValueError(f"{op}: representations of {rows} and {others} examples; expected the same examples")
    if rows < at_least:
        raise ValueError(f"{op}: {rows} examples; expected at least {at_least}")


# ---- a model, watched -----------------------------------------------------------------------------------------------

Observe: TypeAlias = "Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]"


@contextlib.contextmanager
def _observed(model: nn.Module, layers: Mapping[str, nn.Module], observe: Observe) -> Iterator[None]:
    """In eval mode and without gradients, observe(name, args, kwargs, output) of every call of a layer."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: observe(name, args, kwargs, output)

    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch of a data loader: (input, ...), {name: input}, or the input itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


# ---- domains --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProxyADistance:
    r"""What `proxy_a_distance` found.

    Attributes
    ----------
    distance : float
        :math:`\max(0, 2 (1 - 2 \epsilon))`: 0 where the classifier does no better than chance, 2 where it never errs.
    error : float
        The cross-validated error :math:`\epsilon`, the mean of the two domains' error rates.
    fold_errors : tuple of float
        The error of every fold.
    """

    distance: float
    error: float
    fold_errors: tuple[float, ...]


def proxy_a_distance(
    source: Features, target: Features, *, classifier: Any = None, folds: int = 5, seed: int = 0
) -> ProxyADistance:
    r"""The proxy A-distance: how well a classifier tells two domains apart.

    Parameters
    ----------
    source, target : Tensor or ndarray
        ``[n_source, d]`` and ``[n_target, d]``, features of unlabelled examples of the two domains.
    classifier : scikit-learn classifier, optional
        Cloned for every fold; it sees labels 0 (source) and 1 (target). By default logistic regression on standardised
        features, with balanced class weights.
    folds : int, default 5
        Of the stratified cross-validation. The error is always that of examples the classifier was not trained on; on
        its training data, enough features separate any two samples.
    seed : int, default 0
        Of the shuffle.

    Returns
    -------
    ProxyADistance
        The distance, and the error behind it.

    Raises
    ------
    ImportError
        If scikit-learn is missing.
    ValueError
        If the features are not matrices of as many columns, not finite, or `folds` is below 2 or above the number of
        examples of a domain.

    Notes
    -----
    :math:`\hat d_A = 2 (1 - 2 \epsilon)`, where :math:`\epsilon = (\epsilon_S + \epsilon_T) / 2` is the mean of the
    domains' error rates, so that domains of unequal size have chance level 1/2. A classifier below chance would give a
    negative value; it is clipped at 0, so the estimate is biased upwards by chance where the domains are the same.

    References
    ----------
    Shai Ben-David, John Blitzer, Koby Crammer, Fernando Pereira. *Analysis of Representations for Domain Adaptation.*
    NeurIPS 2006.
    """
    op = "proxy_a_distance"
    selection = _optional("sklearn.model_selection", "scikit-learn")
    base = _optional("sklearn.base", "scikit-learn")
    xs, xt = _check_features(op, source, target)
    if not 2 <= folds <= min(len(xs), len(xt)):
        raise ValueError(
            f"{op}: folds is {folds}; expected 2 to {min(len(xs), len(xt))}, the size of the smaller domain"
        )
    if classifier is None:
        classifier = _logistic(class_weight="balanced")
    x, domain = np.concatenate([xs, xt]), np.repeat([0, 1], [len(xs), len(xt)])
    wrong, fold_errors = np.empty(len(x), dtype=bool), []
    for train, test in selection.StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, domain):
        wrong[test] = base.clone(classifier).fit(x[train], domain[train]).predict(x[test]) != domain[test]
        fold_errors.append(_balanced(wrong[test], domain[test]))
    error = _balanced(wrong, domain)
    return ProxyADistance(max(0.0, 2 * (1 - 2 * error)), error, tuple(fold_errors))


def ideal_joint_error(
    source: Features, source_labels: Features, target: Features, target_labels: Features, *, classifier: Any = None,
    folds: int = 5, seed: int = 0,
) -> float:  # fmt: skip
    r"""The joint error :math:`\lambda^* = \min_h \epsilon_S(h) + \epsilon_T(h)`, of one classifier, estimated.

    Parameters
    ----------
    source, target : Tensor or ndarray
        ``[n_source, d]`` and ``[n_target, d]``.
    source_labels, target_labels : Tensor or ndarray
        ``[n_source]`` and ``[n_target]``.
    classifier : scikit-learn classifier, optional
        Cloned for every fold; it must take ``sample_weight`` in `fit`, by which both domains weigh the same. By default
        logistic regression.
    folds : int, default 5
        Of the cross-validation, within each domain.
    seed : int, default 0
        Of the shuffle.

    Returns
    -------
    float
        The sum of the two domains' cross-validated errors of a classifier trained on both. Where it is large, no
        matching of the feature distributions can help.

    Raises
    ------
    ImportError
        If scikit-learn is missing.
    ValueError
        As `proxy_a_distance`; and if labels do not go with the features.

    References
    ----------
    Shai Ben-David et al. *A Theory of Learning from Different Domains.* Machine Learning 79, 2010.
    """
    op = "ideal_joint_error"
    selection = _optional("sklearn.model_selection", "scikit-learn")
    base = _optional("sklearn.base", "scikit-learn")
    xs, xt = _check_features(op, source, target)
    ys, yt = (
        np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels) for labels in (source_labels, target_labels)
    )
    for name, labels, x in (("source_labels", ys, xs), ("target_labels", yt, xt)):
        if labels.shape != (len(x),):
            raise ValueError(f"{op}: {name} has shape {labels.shape}; expected ({len(x)},), one per example")
    if not 2 <= folds <= min(len(xs), len(xt)):
        raise ValueError(
            f"{op}: folds is {folds}; expected 2 to {min(len(xs), len(xt))}, the size of the smaller domain"
        )
    x, y, domain = np.concatenate([xs, xt]), np.concatenate([ys, yt]), np.repeat([0, 1], [len(xs), len(xt)])
    weight = np.where(domain == 0, len(x) / (2 * len(xs)), len(x) / (2 * len(xt)))
    scale = _optional("sklearn.preprocessing", "scikit-learn").StandardScaler
    wrong = np.empty(len(x), dtype=bool)
    for train, test in selection.StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, domain):
        scaler = scale().fit(x[train])
        model = base.clone(classifier) if classifier is not None else _logistic()[-1]
        model.fit(scaler.transform(x[train]), y[train], sample_weight=weight[train])
        wrong[test] = model.predict(scaler.transform(x[test])) != y[test]
    return 2 * _balanced(wrong, domain)


@dataclass(frozen=True)
class BenDavidBound:
    r"""The terms of the bound on the target error.

    Attributes
    ----------
    source_error : float
        :math:`\epsilon_S(h)`.
    half_divergence : float
        Half the empirical divergence.
    complexity : float
        What the divergence may be off by, from the size of the samples; 0 where it was left out.
    joint_error : float
        :math:`\lambda`, the error of the best joint classifier; 0 where it was left out.
    """

    source_error: float
    half_divergence: float
    complexity: float
    joint_error: float

    @property
    def bound(self) -> float:
        """The sum of the terms. At 1 and above it says nothing."""
        return self.source_error + self.half_divergence + self.complexity + self.joint_error

    def __str__(self) -> str:
        rows = [
            ("source error", self.source_error),
            ("divergence / 2", self.half_divergence),
            ("complexity", self.complexity),
            ("joint error", self.joint_error),
            ("bound", self.bound),
        ]
        return "\n".join(f"{name:<15}{value:8.4f}" for name, value in rows)


def ben_david_bound(
    source_error: float, divergence: float, *, joint_error: float = 0.0, vc_dim: float | None = None,
    unlabelled: int | None = None, delta: float = 0.05,
) -> BenDavidBound:  # fmt: skip
    r"""The terms of Ben-David's bound on the target error of a classifier trained on the source.

    Parameters
    ----------
    source_error : float
        The classifier's error on the source, from 0 to 1.
    divergence : float
        The empirical divergence, from 0 to 2: `proxy_a_distance` is the usual stand-in.
    joint_error : float, default 0.0
        :math:`\lambda`; see `ideal_joint_error`. It needs target labels, and without them the bound is a report only.
    vc_dim : float, optional
        The VC dimension of the classifiers (d + 1 for linear ones on d features). None leaves the complexity term out.
    unlabelled : int, optional
        With `vc_dim`, the number of unlabelled examples of each domain.
    delta : float, default 0.05
        The bound holds with probability ``1 - delta``.

    Returns
    -------
    BenDavidBound
        The terms and their sum.

    Raises
    ------
    ValueError
        If an argument is out of its range, or one of `vc_dim` and `unlabelled` is given without the other.

    Notes
    -----
    With probability at least :math:`1 - \delta`, for every h of a class of VC dimension d and samples of
    :math:`m'` unlabelled examples,

    .. math::
        \epsilon_T(h) \le \epsilon_S(h) + \tfrac12 \hat d_{H \Delta H}
        + 4 \sqrt{\frac{2 d \log(2 m') + \log(2 / \delta)}{m'}} + \lambda .

    The theorem's divergence is over symmetric differences of hypotheses, and its :math:`\epsilon_S` is the true one. A
    proxy A-distance is over the hypotheses themselves, so with it the sum guides and does not guarantee.

    References
    ----------
    Theorem 2 of Shai Ben-David, John Blitzer, Koby Crammer, Alex Kulesza, Fernando Pereira, Jennifer Wortman Vaughan.
    *A Theory of Learning from Different Domains.* Machine Learning 79, 2010.
    """
    op = "ben_david_bound"
    for name, value, high in (
        ("source_error", source_error, 1), ("divergence", divergence, 2), ("joint_error", joint_error, 2),
    ):  # fmt: skip
        if not 0 <= value <= high:
            raise ValueError(f"{op}: {name} is {value}; expected 0 to {high}")
    if not 0 < delta < 1:
        raise ValueError(f"{op}: delta is {delta}; expected between 0 and 1")
    if (vc_dim is None) != (unlabelled is None):
        raise ValueError(f"{op}: vc_dim is {vc_dim} and unlabelled is {unlabelled}; expected both or neither")
    complexity = 0.0
    if vc_dim is not None and unlabelled is not None:
        if vc_dim <= 0 or unlabelled < 1:
            raise ValueError(f"{op}: vc_dim is {vc_dim} and unlabelled is {unlabelled}; expected numbers above 0")
        complexity = 4 * math.sqrt((2 * vc_dim * math.log(2 * unlabelled) + math.log(2 / delta)) / unlabelled)
    return BenDavidBound(source_error, divergence / 2, complexity, joint_error)


def _check_features(op: str, source: Features, target: Features) -> tuple[Any, Any]:
    pair = []
    for name, given in (("source", source), ("target", target)):
        x = given.detach().double().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given, dtype=np.float64)
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{op}: {name} has shape {x.shape}; expected [examples, features]")
        if not np.isfinite(x).all():
            raise ValueError(f"{op}: {name} has NaN or infinite values; expected finite ones")
        pair.append(x)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"{op}: target has {pair[1].shape[1]} features; expected {pair[0].shape[1]}, as source has")
    return pair[0], pair[1]


def _balanced(wrong: np.ndarray[Any, Any], domain: np.ndarray[Any, Any]) -> float:
    return float((wrong[domain == 0].mean() + wrong[domain == 1].mean()) / 2)


def _logistic(**kwargs: Any) -> Any:
    linear = _optional("sklearn.linear_model", "scikit-learn")
    scale = _optional("sklearn.preprocessing", "scikit-learn").StandardScaler()
    return _optional("sklearn.pipeline", "scikit-learn").make_pipeline(
        scale, linear.LogisticRegression(max_iter=1000, **kwargs)
    )
