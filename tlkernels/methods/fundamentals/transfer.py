r"""Whether transfer helps, and which layers carry it.

- `transfer_gain`, `negative_transfer_gap`: the difference that the source made, with a confidence interval.
- `layer_transfer_curve`: the score against the number of layers taken from the source model.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LayerTransferCurve",
    "TransferEstimate",
    "layer_transfer_curve",
    "negative_transfer_gap",
    "transfer_gain",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
Scores: TypeAlias = "Tensor | Array | Sequence[float] | Sequence[Sequence[float]]"
Alternative: TypeAlias = Literal["two-sided", "greater", "less"]
Method: TypeAlias = Literal["bootstrap", "t"]


def _optional(module: str, package: str) -> Any:
    """A module of an optional package, imported where it is used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing; install it with `pip install {package}`") from error


# ---- gain and gap ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransferEstimate:
    """A difference of two mean scores, and how sure it is.

    Attributes
    ----------
    value : float
        The difference.
    low, high : float
        The confidence interval; a one-sided one has an infinite end. NaN where the data do not give one.
    standard_error : float
        Of `value`.
    p_value : float
        Of the hypothesis that the difference is 0, against `alternative`.
    confidence : float
        The level of the interval.
    alternative : {"two-sided", "greater", "less"}
        What the interval and `p_value` are for.
    method : {"bootstrap", "t"}
        How they were computed.
    """

    value: float
    low: float
    high: float
    standard_error: float
    p_value: float
    confidence: float
    alternative: Alternative
    method: Method

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return (
            f"{self.value:+.4f} ({self.confidence:.0%} CI {self.low:+.4f} to {self.high:+.4f}, p = {self.p_value:.3g})"
        )


def transfer_gain(
    transfer: Scores, scratch: Scores, *, paired: bool = True, confidence: float = 0.95,
    alternative: Alternative = "two-sided", method: Method = "bootstrap", resamples: int = 4000, seed: int = 0,
) -> TransferEstimate:  # fmt: skip
    r"""What transfer adds to the score on the target: the mean score with it, minus the mean score without.

    Parameters
    ----------
    transfer, scratch : Tensor, ndarray or sequence
        Scores of the model with transfer and of the one trained on the target alone; the higher the better. Either
        ``[n]``: one model's scores (such as correctness, 0 or 1) of n test examples, the same for both and in the same
        order, or one score for each of n seeds; or ``[seeds, n]``: the scores of n test examples for every seed.
    paired : bool, default True
        Whether entry i (row i) of both belongs together: the same test example, or the same seed. If not, both may
        differ in their number of seeds. Examples of ``[seeds, n]`` are always the same ones.
    confidence : float, default 0.95
        The level of the interval, between 0 and 1.
    alternative : {"two-sided", "greater", "less"}, default "two-sided"
        "greater" looks for a gain above 0: the interval is ``[low, inf)``; "less" for one below: ``(-inf, high]``.
    method : {"bootstrap", "t"}, default "bootstrap"
        "t" is for a few seeds, of which a bootstrap interval is too narrow. It needs SciPy.
    resamples : int, default 4000
        Of the bootstrap.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    TransferEstimate
        The gain, its interval and p-value. Below 0, transfer is negative.

    Raises
    ------
    ImportError
        If ``method="t"`` and SciPy is missing.
    ValueError
        If the shapes are not as above, scores are not finite, or another argument is out of its range.

    Notes
    -----
    With scores :math:`a` (transfer) and :math:`b` (scratch), the gain is :math:`\bar a - \bar b`; for correctness it is
    :math:`\epsilon_{\text{scratch}} - \epsilon_{\text{transfer}}`, the error it saves.

    *bootstrap*: the percentile interval. ``[n]`` paired: entries are drawn with replacement, the same for both;
    unpaired, for each by itself. ``[seeds, n]``: seeds and examples are both drawn, independently of each other (rows
    of both together if paired), and the mean is over the drawn rows and columns. So the interval holds both for other
    seeds and for other test examples; it errs on the wide side. The p-value is :math:`(1 + \#\{g^* \le 0\}) / (1 + R)`
    for "greater", and twice the smaller of both sides for "two-sided".

    *t*: Student's t of the paired differences, or Welch's t if unpaired. ``[seeds, n]`` is first averaged over
    examples: the interval is for other seeds on these examples.

    References
    ----------
    Sinno Jialin Pan, Qiang Yang. *A Survey on Transfer Learning.* TKDE 22, 2010.
    Art B. Owen. *The Pigeonhole Bootstrap.* Annals of Applied Statistics 1, 2007.
    """
    a, b = _check_scores("transfer_gain", paired, transfer=transfer, scratch=scratch)
    return _difference("transfer_gain", a, b, paired, confidence, alternative, method, resamples, seed)


def negative_transfer_gap(
    transfer: Scores, scratch: Scores, *, paired: bool = True, confidence: float = 0.95,
    alternative: Alternative = "greater", method: Method = "bootstrap", resamples: int = 4000, seed: int = 0,
) -> TransferEstimate:  # fmt: skip
    r"""The negative-transfer gap: the target error with the source, minus the target error without. Above 0, it hurts.

    Parameters
    ----------
    transfer, scratch : Tensor, ndarray or sequence
        Scores, the higher the better, as in `transfer_gain`: *not* errors.
    paired, confidence, method, resamples, seed
        As in `transfer_gain`.
    alternative : {"two-sided", "greater", "less"}, default "greater"
        "greater" tests for negative transfer.

    Returns
    -------
    TransferEstimate
        The gap. ``low > 0`` says that transfer was negative at this level.

    Raises
    ------
    ImportError, ValueError
        As `transfer_gain`.

    Notes
    -----
    With the algorithm A, source S and target T, the gap is
    :math:`R_T(A(S, T)) - R_T(A(\varnothing, T))`: the same algorithm twice, not whatever is best without a source. It
    is `transfer_gain` with the other sign.

    References
    ----------
    Zirui Wang, Zihang Dai, Barnabas Poczos, Jaime Carbonell. *Characterizing and Avoiding Negative Transfer.* CVPR
    2019, arXiv:1811.09751.
    """
    op = "negative_transfer_gap"
    a, b = _check_scores(op, paired, transfer=transfer, scratch=scratch)
    return _difference(op, b, a, paired, confidence, alternative, method, resamples, seed)


def _check_scores(op: str, paired: bool, **given: Scores) -> tuple[Array, Array]:
    pair = []
    for name, scores in given.items():
        x = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
        if x.ndim not in (1, 2) or x.size == 0:
            raise ValueError(f"{op}: {name} has shape {x.shape}; expected [n] or [seeds, n]")
        if not np.isfinite(x).all():
            raise ValueError(f"{op}: {name} has NaN or infinite values; expected finite scores")
        pair.append(x)
    (first, a), (second, b) = zip(given, pair, strict=True)
    if a.ndim != b.ndim or (paired and a.shape != b.shape) or (a.ndim == 2 and a.shape[1] != b.shape[1]):
        same = "the same shape" if paired else "the same examples"
        raise ValueError(f"{op}: {second} has shape {b.shape}, and {first} {a.shape}; expected {same}")
    return a, b


def _difference(
    op: str, a: Array, b: Array, paired: bool, confidence: float, alternative: Alternative, method: Method,
    resamples: int, seed: int,
) -> TransferEstimate:  # fmt: skip
    """Of mean(a) - mean(b)."""
    if not 0 < confidence < 1:
        raise ValueError(f"{op}: confidence is {confidence}; expected between 0 and 1")
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"{op}: alternative is {alternative!r}; expected 'two-sided', 'greater' or 'less'")
    if method not in ("bootstrap", "t"):
        raise ValueError(f"{op}: method is {method!r}; expected 'bootstrap' or 't'")
    if resamples < 1:
        raise ValueError(f"{op}: resamples is {resamples}; expected at least 1")
    value = float(a.mean() - b.mean())
    tail = (1 - confidence) / (2 if alternative == "two-sided" else 1)
    if method == "t":
        low, high, error, below, above = _student(a, b, paired, value, tail)
    else:
        drawn = _bootstrap(a, b, paired, resamples, np.random.default_rng(seed))
        low, high = (float(q) for q in np.quantile(drawn, [tail, 1 - tail]))
        error = float(drawn.std(ddof=1)) if resamples > 1 else math.nan
        below, above = ((1 + int(side.sum())) / (1 + resamples) for side in (drawn <= 0, drawn >= 0))
    if alternative == "greater":
        high, p_value = math.inf, below
    elif alternative == "less":
        low, p_value = -math.inf, above
    else:
        p_value = min(1.0, 2 * min(below, above))
    return TransferEstimate(value, low, high, error, p_value, confidence, alternative, method)


def _student(a: Array, b: Array, paired: bool, value: float, tail: float) -> tuple[float, float, float, float, float]:
    """The interval, its standard error, and the probabilities of a difference below and above 0."""
    student = _optional("scipy.stats", "scipy").t
    a, b = (x.mean(1) if x.ndim == 2 else x for x in (a, b))
    if min(len(a), len(b)) < 2:
        return (math.nan,) * 5
    if paired:
        error, freedom = float((a - b).std(ddof=1)) / math.sqrt(len(a)), float(len(a) - 1)
    else:
        va, vb = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
        error, total = math.sqrt(va + vb), va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
        freedom = (va + vb) ** 2 / total if total else float(len(a) + len(b) - 2)
    margin = float(student.ppf(1 - tail, freedom)) * error
    statistic = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return (
        value - margin,
        value + margin,
        error,
        float(student.sf(statistic, freedom)),
        float(student.cdf(statistic, freedom)),
    )


def _bootstrap(a: Array, b: Array, paired: bool, resamples: int, rng: np.random.Generator) -> Array:
    """[resamples] draws of mean(a) - mean(b)."""
    if a.ndim == 1 and not paired:
        return _crossed(a[None], resamples, rng) - _crossed(b[None], resamples, rng)
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    if paired:
        return _crossed(a - b, resamples, rng)
    # the examples are shared, the seeds are not: one matrix whose upper rows count for a, and whose lower count against
    return _crossed(np.concatenate([a, -b]), resamples, rng, rows=(len(a), len(b)))


def _crossed(x: Array, resamples: int, rng: np.random.Generator, rows: tuple[int, ...] = ()) -> Array:
    """[resamples] means of x [r, n] with rows and columns drawn; rows in groups that are averaged each by itself."""
    # A draw is a multinomial count of each *different* column. Of right and wrong there are few, whatever n is.
    columns, counts = np.unique(x, axis=1, return_counts=True)
    n, few = x.shape[1], 4 * len(counts) < x.shape[1]
    drawn = np.empty(resamples)
    step = max(1, 2**22 // (len(counts) if few else n))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        by_column = rng.multinomial(n, counts / n, size) if few else _drawn_counts(counts, n, size, rng)
        by_row = by_column @ columns.T / n
        weights = [rng.multinomial(r, np.full(r, 1 / r), size) / r for r in rows or (len(x),)]
        drawn[start : start + size] = (by_row * np.concatenate(weights, axis=1)).sum(1)
    return drawn


def _drawn_counts(counts: Array, n: int, size: int, rng: np.random.Generator) -> Array:
    """The same as rng.multinomial(n, counts / n, size), by drawing the n one by one: faster for many counts."""
    kind = np.repeat(np.arange(len(counts)), counts)[rng.integers(0, n, (size, n))]
    kind += np.arange(size)[:, None] * len(counts)
    return np.bincount(kind.ravel(), minlength=size * len(counts)).reshape(size, len(counts))


# ---- experiments ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators of torch, NumPy and Python seeded; afterwards they go on from where they were."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _seeds(op: str, seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ValueError(f"{op}: seeds is {seeds!r}; expected a number >= 1, or the seeds")
    return chosen


def _built(op: str, build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: build returned a {type(model).__name__}; expected a new torch.nn.Module")
    return model


def _trained(op: str, train: Callable[..., Any], model: nn.Module, *data: Any) -> nn.Module:
    """The model that `train` returns, or the one it was given, trained in place."""
    result = train(model, *data)
    if result is not None and not isinstance(result, nn.Module):
        raise TypeError(f"{op}: train returned a {type(result).__name__}; expected None, or the model")
    return model if result is None else result


@dataclass(frozen=True)
class LayerTransferCurve:
    """What `layer_transfer_curve` found.

    Attributes
    ----------
    ks : tuple of int
        How many groups of layers were copied.
    groups : tuple of tuple of str
        The groups, from the input up.
    scores : dict of str to ndarray
        For each arm that was run, ``[seeds, len(ks)]``: "AnB" copies from the source and freezes, "AnB+" copies from
        the source and fine-tunes, "BnB" and "BnB+" are their controls, which copy from a model trained on the target.
    """

    ks: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    scores: dict[str, Array]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The mean score of each arm against k, and every seed's. Needs matplotlib; returns the axes."""
        if ax is None:
            ax = _optional("matplotlib.pyplot", "matplotlib").subplots()[1]
        for i, (arm, scores) in enumerate(self.scores.items()):
            style = "--" if arm.startswith("B") else "-"
            ax.plot(self.ks, scores.mean(0), style, color=f"C{i}", marker="o", label=f"{arm}: {_ARMS[arm]}")
            for row in scores if len(scores) > 1 else ():
                ax.plot(self.ks, row, ".", color=f"C{i}", alpha=0.5)
        ax.set_xticks(self.ks)
        ax.set_xlabel("groups of layers copied (k)")
        ax.set_ylabel("score on the target")
        ax.legend()
        return ax


_ARMS = {
    "BnB": "from target, frozen",
    "BnB+": "from target, fine-tuned",
    "AnB": "from source, frozen",
    "AnB+": "from source, fine-tuned",
}


def layer_transfer_curve(
    build: Callable[[], nn.Module], train: Callable[[nn.Module], nn.Module | None],
    evaluate: Callable[[nn.Module], float], source: nn.Module | Mapping[str, Tensor], *,
    groups: Sequence[str | Sequence[str]] | None = None, ks: Sequence[int] | None = None,
    arms: Sequence[Literal["BnB", "BnB+", "AnB", "AnB+"]] = ("BnB", "BnB+", "AnB", "AnB+"),
    seeds: int | Sequence[int] = 1,
) -> LayerTransferCurve:  # fmt: skip
    r"""How transferable are the layers: the score on the target against the number of layers copied from the source.

    Parameters
    ----------
    build : callable
        Without arguments, to a new model for the target task, freshly initialised.
    train : callable
        Trains a model on the target, in place, or returns the trained model. Parameters that do not require gradients
        must stay as they are, as they do with every optimizer of torch.
    evaluate : callable
        From a trained model to its score on the target's test data.
    source : nn.Module or mapping of str to Tensor
        The model trained on the source, or its state dict. The layers of `groups` have the names and shapes they have
        in the target's model.
    groups : sequence, optional
        The layers from the input up; each a name of a module or parameter, or a sequence of such names. By default the
        model's children that have parameters, without the last (the output layer).
    ks : sequence of int, optional
        How many groups are copied. By default 0 to ``len(groups)``.
    arms : sequence of {"BnB", "BnB+", "AnB", "AnB+"}
        Which to run; by default all four. Each costs one training for every k above 0 and every seed, and one more per
        seed for the target's own model.
    seeds : int or sequence of int, default 1
        A number (0, 1, ...), or the seeds. The generators of torch, NumPy and Python are seeded before each build, and
        again before each training, so that all arms of a seed start and train alike; they are restored.

    Returns
    -------
    LayerTransferCurve
        The scores of all arms, and a plot of them.

    Raises
    ------
    TypeError
        If `build` does not return a module, or `train` something else than None or a module.
    ValueError
        If a group is not in the model or in the source, its shapes differ, or `ks`, `arms` or `seeds` are not as above.
    RuntimeError
        If `train` changed a frozen layer.

    Notes
    -----
    The drop of "BnB" is co-adaptation lost: layers that were trained together and are relearned apart. The further drop
    of "AnB" is specificity: features of the source that do not serve the target. "AnB+" above the score at k = 0 is
    what transfer gains. Frozen groups run in eval mode, so that their batch-norm statistics stay the source's.

    References
    ----------
    Jason Yosinski, Jeff Clune, Yoshua Bengio, Hod Lipson. *How Transferable Are Features in Deep Neural Networks?*
    NeurIPS 2014, arXiv:1411.1792.
    """
    op = "layer_transfer_curve"
    unknown = [arm for arm in arms if arm not in _ARMS]
    if unknown or not arms:
        raise ValueError(f"{op}: arms is {list(arms)}; expected some of {list(_ARMS)}")
    chosen = _seeds(op, seeds)
    with _seeded(chosen[0]):
        probe = _built(op, build)
    layers = _groups(op, probe, groups)
    counts = tuple(range(len(layers) + 1)) if ks is None else tuple(ks)
    if not counts or min(counts) < 0 or max(counts) > len(layers):
        raise ValueError(f"{op}: ks is {list(counts)}; expected numbers from 0 to {len(layers)}, the number of groups")
    donor = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    _check_donor(op, probe.state_dict(), donor, [name for group in layers[: max(counts)] for name in group])

    scores: dict[str, Array] = {arm: np.empty((len(chosen), len(counts))) for arm in arms}
    for s, seed in enumerate(chosen):

        def run(state: Mapping[str, Tensor], k: int, frozen: bool, seed: int = seed) -> nn.Module:
            with _seeded(seed):
                model = _built(op, build)
            names = [name for group in layers[:k] for name in group]
            handles = _transplant(model, state, names, frozen)
            try:
                with _seeded(seed):
                    trained = _trained(op, train, model)
            finally:
                for handle in handles:
                    handle.remove()
            if frozen:
                _check_frozen(op, trained.state_dict(), state, names)
            return trained

        own = run({}, 0, False)
        reference = float(evaluate(own))
        target = own.state_dict()
        for arm in arms:
            state = donor if arm.startswith("A") else target
            for i, k in enumerate(counts):
                frozen = not arm.endswith("+")
                scores[arm][s, i] = reference if k == 0 else float(evaluate(run(state, k, frozen)))
    return LayerTransferCurve(counts, layers, scores)


def _groups(op: str, model: nn.Module, groups: Sequence[str | Sequence[str]] | None) -> tuple[tuple[str, ...], ...]:
    if groups is None:
        groups = [name for name, child in model.named_children() if next(child.parameters(), None) is not None][:-1]
        if not groups:
            raise ValueError(
                f"{op}: the model has fewer than two children with parameters; expected groups to be given"
            )
    layers = tuple((group,) if isinstance(group, str) else tuple(group) for group in groups)
    keys = model.state_dict().keys()
    for group in layers:
        for name in group:
            if not any(_within(key, [name]) for key in keys):
                raise ValueError(f"{op}: groups has {name!r}, which the model has not, or which holds no state")
    return layers


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _check_donor(op: str, state: Mapping[str, Tensor], donor: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for key, value in state.items():
        if _within(key, names):
            if key not in donor:
                raise ValueError(f"{op}: source has no {key!r}; expected all layers of the groups")
            if donor[key].shape != value.shape:
                shapes = f"shape {tuple(donor[key].shape)} at {key!r}; expected {tuple(value.shape)}"
                raise ValueError(f"{op}: source has {shapes}, that of the target's model")


def _transplant(model: nn.Module, state: Mapping[str, Tensor], names: Sequence[str], frozen: bool) -> list[Any]:
    """Copy the named layers from `state`; the handles of the hooks that keep frozen ones in eval mode."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if _within(key, names):
                value.copy_(state[key])
    if not frozen:
        return []
    for key, parameter in model.named_parameters():
        if _within(key, names):
            parameter.requires_grad_(False)
    # `train` will call model.train(); only the call of a layer comes after that
    layers = [module for name, module in model.named_modules() if _within(name, names)]
    return [layer.register_forward_pre_hook(_leave_training) for layer in layers]


def _leave_training(module: nn.Module, _: Any) -> None:
    module.training = False


def _check_frozen(op: str, after: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for key, value in after.items():
        if _within(key, names) and not torch.equal(value, state[key].to(value)):
            raise RuntimeError(
                f"{op}: train changed {key!r}, which is frozen; expected it to leave parameters that do not require "
                "gradients as they are"
            )
