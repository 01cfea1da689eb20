r"""What every transfer method is measured against, and the simplest methods that use source data.

- `baselines`: source only, target only, and fine-tuning, over seeds.
- `ProbabilityEnsemble`: the mean of the probabilities of a transferred model and one from scratch.
- `augment_features`: shared and domain-specific copies of the features (Daume 2007).
- `TrAdaBoost`: boosting that lowers the weight of source examples which do not fit the target (Dai 2007).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor, nn

from tlkernels.methods.fundamentals.transfer import (
    Array,
    Method,
    TransferEstimate,
    _built,
    _difference,
    _optional,
    _seeded,
    _seeds,
    _trained,
    transfer_gain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Baselines", "ProbabilityEnsemble", "TrAdaBoost", "augment_features", "baselines"]

Score: TypeAlias = "float | Tensor | Array | Sequence[float]"


# ---- source only, target only, fine-tuned ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Baselines:
    """What `baselines` found.

    Attributes
    ----------
    scores : dict of str to ndarray
        For "source only", "target only" and "fine-tuned": ``[seeds]``, or ``[seeds, n]`` where `evaluate` returned the
        scores of n test examples.
    seeds : tuple of int
        The seeds.
    """

    scores: dict[str, Array]
    seeds: tuple[int, ...]

    def interval(self, arm: str, *, confidence: float = 0.95) -> TransferEstimate:
        """The mean score of an arm with its confidence interval.

        Of ``[seeds]`` it is Student's t (needs SciPy; NaN for a single seed), of ``[seeds, n]`` the bootstrap over
        seeds and examples.

        Raises
        ------
        ImportError
            If SciPy is needed and missing.
        ValueError
            If there is no such arm, or `confidence` is not between 0 and 1.
        """
        if arm not in self.scores:
            raise ValueError(f"Baselines: arm is {arm!r}; expected one of {list(self.scores)}")
        scores = self.scores[arm]
        method: Method = "t" if scores.ndim == 1 else "bootstrap"
        zeros = np.zeros_like(scores)
        return _difference("Baselines", scores, zeros, True, confidence, "two-sided", method, 4000, 0)

    def transfer_gain(self, **options: Any) -> TransferEstimate:
        """`transfer_gain` of fine-tuning over the target alone, paired by seed; `options` are its own."""
        options.setdefault("method", "t" if self.scores["fine-tuned"].ndim == 1 else "bootstrap")
        return transfer_gain(self.scores["fine-tuned"], self.scores["target only"], **options)

    def table(self, *, confidence: float = 0.95) -> list[dict[str, Any]]:
        """One row per arm: "method", "mean", "low", "high", "seeds"; ``pandas.DataFrame`` takes it as it is."""
        rows = []
        for arm in self.scores:
            found = self.interval(arm, confidence=confidence)
            row = {"method": arm, "mean": found.value, "low": found.low, "high": found.high, "seeds": len(self.seeds)}
            rows.append(row)
        return rows

    def __str__(self) -> str:
        lines = [f"{'method':<12}{'mean':>9}{'95% CI':>20}"]
        for row in self.table():
            lines.append(f"{row['method']:<12}{row['mean']:>9.4f}{row['low']:>10.4f}{row['high']:>10.4f}")
        lines.append(f"transfer gain {self.transfer_gain()}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, *, confidence: float = 0.95) -> Axes:
        """Mean, interval and every seed's score of each arm. Needs matplotlib; returns the axes."""
        if ax is None:
            ax = _optional("matplotlib.pyplot", "matplotlib").subplots()[1]
        for x, (arm, scores) in enumerate(self.scores.items()):
            found = self.interval(arm, confidence=confidence)
            margins = [[found.value - found.low], [found.high - found.value]]
            has_interval = math.isfinite(found.low)
            ax.errorbar([x], [found.value], margins if has_interval else None, fmt="o", color=f"C{x}", capsize=6)
            by_seed = scores if scores.ndim == 1 else scores.mean(1)
            ax.plot(np.full(len(by_seed), x + 0.15), by_seed, ".", color=f"C{x}", alpha=0.5)
        ax.set_xticks(range(len(self.scores)), list(self.scores))
        ax.set_xlim(-0.5, len(self.scores) - 0.5)
        ax.set_ylabel("score on the target")
        ax.set_title(f"transfer gain {self.transfer_gain(confidence=confidence)}", fontsize="medium")
        return ax


def baselines(
    build: Callable[[], nn.Module], train: Callable[[nn.Module, Any], nn.Module | None],
    evaluate: Callable[[nn.Module], Score], source: Any, target: Any, *, seeds: int | Sequence[int] = 5,
    prepare: Callable[[nn.Module], nn.Module | None] | None = None,
    fine_tune: Callable[[nn.Module, Any], nn.Module | None] | None = None,
) -> Baselines:  # fmt: skip
    """The three baselines of transfer learning in one call: source only, target only, and fine-tuning.

    Parameters
    ----------
    build : callable
        Without arguments, to a new model, freshly initialised.
    train : callable
        ``train(model, data)`` trains in place, or returns the trained model.
    evaluate : callable
        From a model to its score on the target's *test* data, the higher the better: a number, or the scores of every
        test example, such as correctness, which also tell how sure the scores are with a single seed.
    source, target : object
        Training data, as `train` takes it.
    seeds : int or sequence of int, default 5
        A number (0, 1, ...), or the seeds. The generators of torch, NumPy and Python are seeded before each build, and
        again before each training, so that all arms of a seed start from the same weights; they are restored.
    prepare : callable, optional
        Called with a copy of the source's model before it is fine-tuned: to replace the head, freeze layers. In place,
        or it returns the model.
    fine_tune : callable, optional
        In place of `train` for the source's model on the target: another learning rate, for example.

    Returns
    -------
    Baselines
        The scores, a table with intervals, the transfer gain, and a plot.

    Raises
    ------
    TypeError
        If `build` does not return a module, or `train`, `fine_tune` or `prepare` something else than None or a module.
    ValueError
        If `seeds` is empty, or a score is not finite or not of the shape of the others.

    References
    ----------
    Sinno Jialin Pan, Qiang Yang. *A Survey on Transfer Learning.* TKDE 22, 2010.
    """
    op = "baselines"
    chosen = _seeds(op, seeds)
    scores: dict[str, list[Array]] = {"source only": [], "target only": [], "fine-tuned": []}

    def built(seed: int) -> nn.Module:
        with _seeded(seed):
            return _built(op, build)

    def trained(seed: int, how: Callable[..., Any], model: nn.Module, *data: Any) -> nn.Module:
        with _seeded(seed):
            return _trained(op, how, model, *data)

    def score(arm: str, model: nn.Module) -> None:
        result = evaluate(model)
        values = np.asarray(result.detach().cpu() if isinstance(result, Tensor) else result, dtype=np.float64)
        first = next((found[0] for found in scores.values() if found), values)
        if values.ndim > 1 or values.size == 0 or values.shape != first.shape or not np.isfinite(values).all():
            what = f"{values.shape} scores" if values.ndim else f"{values}"
            raise ValueError(f"{op}: evaluate returned {what}; expected a finite number, or [n] of them, as before")
        scores[arm].append(values)

    for seed in chosen:
        model = trained(seed, train, built(seed), source)
        score("source only", model)
        model = copy.deepcopy(model)
        if prepare is not None:
            model = trained(seed, prepare, model)
        score("fine-tuned", trained(seed, fine_tune or train, model, target))
        score("target only", trained(seed, train, built(seed), target))
    return Baselines({arm: np.stack(found) for arm, found in scores.items()}, chosen)


# ---- ensemble -------------------------------------------------------------------------------------------------------


class ProbabilityEnsemble(nn.Module):
    r"""Several classifiers as one: the mean of their probabilities.

    A transferred model and one trained from scratch err on different examples, and their ensemble is a guard against
    negative transfer.

    Parameters
    ----------
    *models : nn.Module
        Classifiers that return logits ``[..., classes]`` for the same inputs.
    weights : sequence of float, optional
        One per model, at least 0 and not all 0; only their ratios matter. By default all are equal.

    Raises
    ------
    TypeError
        If one of the models is no module.
    ValueError
        If there are no models, or the weights are not as above.

    Notes
    -----
    The output is :math:`\log \sum_i w_i \operatorname{softmax}(z_i)`, computed from the logarithms, so that it neither
    underflows nor loses the gradient of unlikely classes. Its softmax is the mean probability: it can stand where
    logits do.
    """

    log_weights: Tensor

    def __init__(self, *models: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not models:
            raise ValueError("ProbabilityEnsemble: no models; expected at least one")
        for i, model in enumerate(models):
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"ProbabilityEnsemble: model {i} is a {type(model).__name__}; expected a torch.nn.Module"
                )
        shares = torch.tensor([1.0] * len(models) if weights is None else list(weights), dtype=torch.float64)
        if len(shares) != len(models) or not bool((shares >= 0).all() and 0 < shares.sum() < math.inf):
            want = f"{len(models)} numbers >= 0 that are not all 0"
            raise ValueError(f"ProbabilityEnsemble: weights is {shares.tolist()}; expected {want}")
        self.models = nn.ModuleList(models)
        self.register_buffer("log_weights", (shares / shares.sum()).log().float())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log-probabilities ``[..., classes]`` for the input of all models."""
        each = [
            model(*args, **kwargs).log_softmax(-1) + w for model, w in zip(self.models, self.log_weights, strict=True)
        ]
        return torch.logsumexp(torch.stack(each), 0)


# ---- feature augmentation -------------------------------------------------------------------------------------------


@overload
def augment_features(x: Tensor, domain: int | Tensor | Array | Sequence[int], domains: int = 2) -> Tensor: ...
@overload
def augment_features(x: Array, domain: int | Tensor | Array | Sequence[int], domains: int = 2) -> Array: ...
def augment_features(
    x: Tensor | Array, domain: int | Tensor | Array | Sequence[int], domains: int = 2
) -> Tensor | Array:
    r"""Feature augmentation, "frustratingly easy" domain adaptation: one copy of the features for all, one per domain.

    Any classifier on the augmented features then learns what the domains share, and what only one of them has.

    Parameters
    ----------
    x : Tensor or ndarray
        ``[n, d]``.
    domain : int, or integers [n]
        The domain of all rows, or of each: 0 (source), 1 (target), ... Negative for a domain not seen in training,
        which gets only the shared copy.
    domains : int, default 2
        The number of domains.

    Returns
    -------
    Tensor or ndarray
        ``[n, (1 + domains) * d]``: for two domains :math:`[x, x, 0]` of the source and :math:`[x, 0, x]` of the target.

    Raises
    ------
    ValueError
        If x is not a matrix, or `domain` has another length or a value of `domains` or above.

    References
    ----------
    Hal Daume III. *Frustratingly Easy Domain Adaptation.* ACL 2007, arXiv:0907.1815.
    """
    if x.ndim != 2:
        raise ValueError(f"augment_features: x has shape {tuple(x.shape)}; expected [examples, features]")
    which = np.asarray(domain.cpu() if isinstance(domain, Tensor) else domain)
    if which.shape not in ((), (len(x),)) or which.dtype.kind not in "iu":
        want = f"an integer, or {len(x)} of them"
        raise ValueError(f"augment_features: domain has shape {which.shape} and dtype {which.dtype}; expected {want}")
    if which.size and int(which.max()) >= domains:
        raise ValueError(f"augment_features: domain has {int(which.max())}; expected below domains = {domains}")
    own = np.broadcast_to(which, len(x))[:, None] == np.arange(domains)
    mask = np.concatenate([np.ones((len(x), 1), dtype=bool), own], axis=1)[:, :, None]
    if isinstance(x, Tensor):
        return (x[:, None] * torch.from_numpy(mask).to(x.device)).flatten(1)
    return (x[:, None] * mask).reshape(len(x), -1)


# ---- TrAdaBoost -----------------------------------------------------------------------------------------------------


@dataclass
class TrAdaBoost:
    r"""TrAdaBoost: boosting on source and target, in which source examples that do not fit lose their weight.

    Parameters
    ----------
    estimator : scikit-learn classifier, optional
        The weak learner, cloned for every round; it must take ``sample_weight`` in `fit`. By default a decision tree of
        depth 1.
    n_estimators : int, default 50
        The number of rounds N.

    Attributes
    ----------
    estimators_ : list
        The classifiers of all rounds; only the second half votes.
    errors_ : ndarray
        ``[n_estimators]``, the weighted errors on the target.
    classes_ : ndarray
        The labels.
    sample_weight_ : ndarray
        ``[n_source + n_target]``, the weights after the last round, summing to 1.

    Notes
    -----
    With the n source and m target examples' weights w, all 1 at first, every round normalises them, trains h, and takes
    the error on the target :math:`\epsilon_t = \sum_{T} w_i [h(x_i) \ne y_i] / \sum_T w_i`. With
    :math:`\beta = 1 / (1 + \sqrt{2 \ln n / N})` and :math:`\beta_t = \epsilon_t / (1 - \epsilon_t)`, what h got wrong
    is multiplied by :math:`\beta` in the source and by :math:`1 / \beta_t` in the target. The prediction is the vote of
    rounds :math:`\lceil N / 2 \rceil` to N, each with weight :math:`\ln(1 / \beta_t)`: for two classes the paper's
    rule, ties included, which go to the second class. The paper asks for :math:`\epsilon_t < 1/2`, which fails while a
    large source that does not fit outweighs the target. A larger error is taken as 1/2: the round does not vote and
    leaves the target's weights, and goes on lowering the source's. An error of 0 is taken as :math:`10^{-10}`.

    References
    ----------
    Wenyuan Dai, Qiang Yang, Gui-Rong Xue, Yong Yu. *Boosting for Transfer Learning.* ICML 2007.
    """

    estimator: Any = None
    n_estimators: int = 50
    estimators_: list[Any] = field(init=False, repr=False, compare=False)
    errors_: Array = field(init=False, repr=False, compare=False)
    classes_: Array = field(init=False, repr=False, compare=False)
    sample_weight_: Array = field(init=False, repr=False, compare=False)

    def fit(self, source: Array, source_labels: Array, target: Array, target_labels: Array) -> TrAdaBoost:
        """Train on labelled examples of both domains.

        Parameters
        ----------
        source, target : ndarray
            ``[n, d]`` and ``[m, d]``.
        source_labels, target_labels : ndarray
            ``[n]`` and ``[m]``.

        Returns
        -------
        TrAdaBoost
            Itself.

        Raises
        ------
        ImportError
            If scikit-learn is missing.
        ValueError
            If the shapes are not as above, `n_estimators` is below 1, or no round that votes has an error below 1/2.
        """
        op = "TrAdaBoost"
        if self.n_estimators < 1:
            raise ValueError(f"{op}: n_estimators is {self.n_estimators}; expected at least 1")
        xs, ys, xt, yt = (np.asarray(given) for given in (source, source_labels, target, target_labels))
        for name, x, y in (("source", xs, ys), ("target", xt, yt)):
            if x.ndim != 2 or len(x) == 0 or y.shape != x.shape[:1]:
                shapes = f"{x.shape} with labels {y.shape}"
                raise ValueError(f"{op}: {name} has shape {shapes}; expected [examples, features] with [examples]")
        if xs.shape[1] != xt.shape[1]:
            raise ValueError(f"{op}: target has {xt.shape[1]} features; expected {xs.shape[1]}, as source has")
        clone = _optional("sklearn.base", "scikit-learn").clone
        learner = self.estimator
        if learner is None:
            learner = _optional("sklearn.tree", "scikit-learn").DecisionTreeClassifier(max_depth=1)
        n, x, y = len(xs), np.concatenate([xs, xt]), np.concatenate([ys, yt])
        beta = 1 / (1 + math.sqrt(2 * math.log(n) / self.n_estimators))
        weight = np.full(len(x), 1 / len(x))
        estimators: list[Any] = []
        errors: list[float] = []
        for _ in range(self.n_estimators):
            weak = clone(learner).fit(x, y, sample_weight=weight)
            wrong = weak.predict(x) != y
            errors.append(float(weight[n:] @ wrong[n:] / weight[n:].sum()))
            estimators.append(weak)
            weight[:n][wrong[:n]] *= beta
            weight[n:][wrong[n:]] *= math.exp(_vote(errors[-1]))
            weight /= weight.sum()
        if min(errors[math.ceil(self.n_estimators / 2) - 1 :]) >= 0.5:
            want = "n_estimators or an estimator with which a round of the second half errs on less than half"
            raise ValueError(f"{op}: every voting round errs on half of the target's weight or more; expected {want}")
        self.estimators_, self.errors_, self.classes_ = estimators, np.array(errors), np.unique(y)
        self.sample_weight_ = weight
        return self

    def decision_function(self, x: Array) -> Array:
        """The votes ``[n, classes]`` for each class, in the order of `classes_`."""
        if not hasattr(self, "estimators_"):
            raise RuntimeError("TrAdaBoost: not fitted; call fit first")
        rounds = len(self.estimators_)
        votes = np.zeros((len(x), len(self.classes_)))
        for t in range(math.ceil(rounds / 2) - 1, rounds):  # rounds ceil(N / 2) to N, counted from 1
            said = self.estimators_[t].predict(x)
            votes += _vote(float(self.errors_[t])) * (said[:, None] == self.classes_)
        return votes

    def predict(self, x: Array) -> Array:
        """The labels ``[n]`` of ``x`` ``[n, d]``."""
        votes = self.decision_function(x)
        # of equal votes the last class, which for two classes is the paper's ">="
        return self.classes_[len(self.classes_) - 1 - votes[:, ::-1].argmax(1)]

    def score(self, x: Array, y: Array) -> float:
        """The share of ``x`` ``[n, d]`` whose label is that of ``y`` ``[n]``."""
        return float((self.predict(x) == np.asarray(y)).mean())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters, for scikit-learn's model selection."""
        return {"estimator": self.estimator, "n_estimators": self.n_estimators}

    def set_params(self, **params: Any) -> TrAdaBoost:
        """Set parameters, and return itself."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"TrAdaBoost: no parameter {name!r}; expected one of {list(self.get_params())}")
            setattr(self, name, value)
        return self


def _vote(error: float) -> float:
    """ln(1 / beta_t): what a round's vote counts, and the exponent of its target weights."""
    error = min(max(error, 1e-10), 0.5)
    return math.log((1 - error) / error)
