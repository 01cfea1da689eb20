r"""Classifiers on features, for classes that come one after the other: means, covariances, and corrections of a head.

What they keep are sums in float64, so that it does not matter in which batches the data came, or in what order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.continual._base import check_number, copied

__all__ = ["SLDA", "BiasCorrection", "ICaRL", "NearestClassMean", "RanPAC", "align_weights", "herding"]


def _check_features(op: str, features: Tensor, labels: Tensor | None, dim: int | None) -> None:
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{op}: features is {got}; expected floating-point (n, dim)")
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"{op}: features has {features.shape[1]} columns; expected {dim}, as before")
    if labels is not None and (labels.dim() != 1 or len(labels) != len(features) or labels.is_floating_point()):
        raise ValueError(f"{op}: labels has shape {tuple(labels.shape)}; expected integer classes ({len(features)},)")
    if labels is not None and len(labels) and int(labels.min()) < 0:
        raise ValueError(f"{op}: labels holds {int(labels.min())}; expected classes >= 0")


def herding(features: Tensor, count: int) -> Tensor:
    r"""Indices of the examples whose running mean follows the class mean best, the best first.

    Parameters
    ----------
    features : Tensor [n, dim]
        Of one class; they are scaled to length 1 first, as in the paper.
    count : int
        How many, 1 to n.

    Returns
    -------
    int64 Tensor [count]
        All different. The first k of them are the choice of k.

    Raises
    ------
    ValueError
        If `features` is no matrix or `count` out of range.

    Notes
    -----
    The k-th is :math:`\arg\min_x \|\mu - \frac1k (\phi(x) + \sum_{j<k} \phi(p_j))\|`.

    References
    ----------
    Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725, algorithm 4.
    """
    _check_features("herding", features, None, None)
    if not 1 <= count <= len(features):
        raise ValueError(f"herding: count is {count}; expected 1 to {len(features)}, the examples")
    rows = functional.normalize(features.detach().double(), dim=1)
    mean, total = rows.mean(0), torch.zeros_like(rows[0])
    left = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    chosen = []
    for k in range(1, count + 1):
        distance = (mean - (rows + total) / k).norm(dim=1).masked_fill(~left, float("inf"))
        best = int(distance.argmin())
        chosen.append(best)
        left[best] = False
        total = total + rows[best]
    return torch.tensor(chosen, device=features.device)


class _ClassSums:
    """Counts and sums of features by class, in float64; classes in the order of their numbers."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    @property
    def dim(self) -> int | None:
        first = next(iter(self.sums.values()), None)
        return None if first is None else len(first)

    @property
    def classes(self) -> list[int]:
        return sorted(self.sums)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        for c in labels.unique().tolist():
            mine = rows[labels == c]
            self.sums[c] = self.sums.get(c, torch.zeros_like(mine[0])) + mine.sum(0)
            self.counts[c] = self.counts.get(c, 0) + len(mine)

    @property
    def means(self) -> Tensor:
        return torch.stack([self.sums[c] / self.counts[c] for c in self.classes])

    def state(self) -> dict[str, Any]:
        return {"sums": copied(self.sums), "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.sums, self.counts = copied(state["sums"]), dict(state["counts"])


class NearestClassMean:
    r"""The class whose mean is nearest, of features as they are or of length 1.

    Parameters
    ----------
    normalize : bool
        Scale features to length 1 before and class means after (iCaRL's rule; of a frozen backbone: SimpleCIL).

    References
    ----------
    Mensink et al., TPAMI 2013. Rebuffi et al., iCaRL, CVPR 2017. Zhou et al., Revisiting class-incremental learning
    with pre-trained models, IJCV 2024, arXiv:2303.07338 (SimpleCIL).
    """

    def __init__(self, *, normalize: bool = False) -> None:
        self.normalize = normalize
        self._sums = _ClassSums()

    def _rows(self, features: Tensor) -> Tensor:
        rows = features.detach().double()
        return functional.normalize(rows, dim=1) if self.normalize else rows

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``[n, dim]`` and their classes ``[n]``.

        Raises
        ------
        ValueError
            If shapes are not these.
        """
        _check_features("NearestClassMean", features, labels, self._sums.dim)
        self._sums.add(self._rows(features), labels)

    @property
    def classes(self) -> list[int]:
        """The classes seen, in order."""
        return self._sums.classes

    @property
    def means(self) -> Tensor:
        """Class means ``[classes, dim]``, float64; of length 1 with `normalize`."""
        if not self._sums.sums:
            raise ValueError("NearestClassMean: no class was seen; expected add() before")
        means = self._sums.means
        return functional.normalize(means, dim=1) if self.normalize else means

    def predict(self, features: Tensor) -> Tensor:
        """Classes ``[n]`` of features ``[n, dim]``."""
        _check_features("NearestClassMean", features, None, self._sums.dim)
        nearest = torch.cdist(self._rows(features), self.means).argmin(1)
        return torch.tensor(self.classes, device=features.device)[nearest]

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"normalize": self.normalize, **self._sums.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if bool(state["normalize"]) != self.normalize:
            raise ValueError(
                f"NearestClassMean: state_dict has normalize {state['normalize']}; expected {self.normalize}"
            )
        self._sums.load(state)


class ICaRL:
    r"""iCaRL's exemplars: chosen by herding, cut down as classes come, and the nearest of their means.

    Parameters
    ----------
    capacity : int
        Exemplars of all classes together; each of k classes has capacity // k.

    Notes
    -----
    The representation is trained by the user with the exemplars beside the new data (`tensors`) and a distillation loss
    (`LwF`); then `update` chooses exemplars of the new classes, and `predict` takes the class whose exemplars' mean
    feature, of the *present* representation, is nearest.

    Raises
    ------
    ValueError
        If `capacity` is not positive.

    References
    ----------
    Rebuffi et al., iCaRL: incremental classifier and representation learning, CVPR 2017, arXiv:1611.07725.
    """

    def __init__(self, capacity: int) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"ICaRL: capacity is {capacity!r}; expected a positive number of exemplars")
        self.capacity = capacity
        self._inputs: dict[int, Tensor] = {}

    @property
    def classes(self) -> list[int]:
        """The classes that have exemplars, in order."""
        return sorted(self._inputs)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs and classes of all exemplars, each class's best first."""
        if not self._inputs:
            raise ValueError("ICaRL: there are no exemplars; expected update() before")
        return (
            torch.cat([self._inputs[c] for c in self.classes]),
            torch.cat([torch.full((len(t),), c, device=t.device) for c, t in sorted(self._inputs.items())]),
        )

    @torch.no_grad()
    def update(self, features: nn.Module | Any, inputs: Tensor, labels: Tensor) -> None:
        """Choose exemplars of the classes in `labels` and cut the others' down.

        Parameters
        ----------
        features : callable
            ``features(inputs)`` returns features ``[n, dim]``.
        inputs : Tensor [n, ...]
            All of the new classes' data.
        labels : int64 Tensor [n]

        Raises
        ------
        ValueError
            If the capacity is below the number of classes, or a class has exemplars already.
        """
        found = features(inputs)
        _check_features("ICaRL", found, labels, None)
        new = labels.unique().tolist()
        again = sorted(set(new) & set(self._inputs))
        if again:
            raise ValueError(f"ICaRL: labels holds class {again[0]}, which has exemplars; expected new classes")
        each = self.capacity // (len(self._inputs) + len(new))
        if each < 1:
            raise ValueError(
                f"ICaRL: capacity is {self.capacity} for {len(self._inputs) + len(new)} classes; expected one each"
            )
        for c, kept in self._inputs.items():
            self._inputs[c] = kept[:each].clone()
        for c in new:
            index = (labels == c).nonzero().flatten()
            self._inputs[c] = inputs[index[herding(found[index], min(each, len(index)))]].clone()

    @torch.no_grad()
    def predict(self, features: nn.Module | Any, inputs: Tensor) -> Tensor:
        """Classes ``[n]`` by the nearest mean of exemplars, all features of length 1."""
        x, y = self.tensors
        nearest = NearestClassMean(normalize=True)
        nearest.add(features(x), y)
        return nearest.predict(features(inputs))

    def state_dict(self) -> dict[str, Any]:
        """The exemplars."""
        return {"capacity": self.capacity, "inputs": copied(self._inputs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if state["capacity"] != self.capacity:
            raise ValueError(f"ICaRL: state_dict has capacity {state['capacity']}; expected {self.capacity}")
        self._inputs = copied(state["inputs"])


class SLDA:
    r"""Streaming linear discriminant analysis: class means and one covariance, exact whatever the batches.

    Parameters
    ----------
    shrinkage : float
        0 to 1: the precision is that of :math:`(1 - \epsilon) \Sigma + \epsilon I`. The paper's is 1e-4.

    Notes
    -----
    :math:`\Sigma` is the pooled within-class covariance with 1 / n; scores are
    :math:`\mu_c^T \Lambda x - \tfrac12 \mu_c^T \Lambda \mu_c`, without priors.

    Raises
    ------
    ValueError
        If `shrinkage` is out of range.

    References
    ----------
    Hayes & Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, CVPR workshops 2020,
    arXiv:1909.01520.
    """

    def __init__(self, *, shrinkage: float = 1e-4) -> None:
        self.shrinkage = check_number("SLDA", "shrinkage", shrinkage, 0.0, 1.0)
        self._sums = _ClassSums()
        self._squares: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``[n, dim]`` and their classes ``[n]``.

        Raises
        ------
        ValueError
            If shapes are not these.
        """
        _check_features("SLDA", features, labels, self._sums.dim)
        rows = features.detach().double()
        for c in labels.unique().tolist():  # squares about the class's first mean would drift: about the running one
            mine = rows[labels == c]
            count, mean = len(mine), mine.mean(0)
            scatter = (mine - mean).T @ (mine - mean)
            before = self._sums.counts.get(c, 0)
            if before:
                step = mean - self._sums.sums[c] / before
                scatter = scatter + torch.outer(step, step) * (before * count / (before + count))
            self._squares = scatter if self._squares is None else self._squares + scatter
            self._sums.add(mine, torch.full((count,), c))

    @property
    def classes(self) -> list[int]:
        """The classes seen, in order."""
        return self._sums.classes

    @property
    def covariance(self) -> Tensor:
        """The pooled covariance ``[dim, dim]``, float64, without shrinkage."""
        if self._squares is None:
            raise ValueError("SLDA: no class was seen; expected add() before")
        return self._squares / sum(self._sums.counts.values())

    def scores(self, features: Tensor) -> Tensor:
        """Discriminants ``[n, classes]`` of features ``[n, dim]``, float64."""
        _check_features("SLDA", features, None, self._sums.dim)
        sigma, eye = self.covariance, torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
        weights = torch.linalg.solve((1 - self.shrinkage) * sigma + self.shrinkage * eye, self._sums.means.T)
        return features.double() @ weights - 0.5 * (self._sums.means * weights.T).sum(1)

    def predict(self, features: Tensor) -> Tensor:
        """Classes ``[n]`` of features ``[n, dim]``."""
        return torch.tensor(self.classes, device=features.device)[self.scores(features).argmax(1)]

    def state_dict(self) -> dict[str, Any]:
        """Sums, counts and squares."""
        return {"shrinkage": self.shrinkage, "squares": copied(self._squares), **self._sums.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if state["shrinkage"] != self.shrinkage:
            raise ValueError(f"SLDA: state_dict has shrinkage {state['shrinkage']}; expected {self.shrinkage}")
        self._squares = copied(state["squares"])
        self._sums.load(state)


class RanPAC:
    r"""Ridge regression on randomly projected features, from sums that do not depend on the order of classes.

    Parameters
    ----------
    dim : int
        Of the features.
    projected : int
        Of the random projection.
    ridge : float
        :math:`\lambda`; `choose_ridge` picks one by held-out data.
    seed : int
        Of the projection.

    Raises
    ------
    ValueError
        If a size is not positive or `ridge` is negative.

    Notes
    -----
    :math:`z = \mathrm{relu}(W x)` with W normal, :math:`G = \sum z z^T`, :math:`C = \sum z y^T` with one-hot y, and
    scores :math:`z^T (G + \lambda I)^{-1} C`. Sums are float64.

    References
    ----------
    McDonnell et al., RanPAC: random projections and pre-trained models for continual learning, NeurIPS 2023,
    arXiv:2307.02251.
    """

    def __init__(self, dim: int, *, projected: int = 2000, ridge: float = 1.0, seed: int = 0) -> None:
        for name, value in (("dim", dim), ("projected", projected)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"RanPAC: {name} is {value!r}; expected a positive size")
        self.ridge = check_number("RanPAC", "ridge", ridge)
        self.projection = torch.randn(dim, projected, generator=torch.Generator().manual_seed(seed)).double()
        self._gram = torch.zeros(projected, projected, dtype=torch.float64)
        self._products: dict[int, Tensor] = {}

    def _rows(self, features: Tensor) -> Tensor:
        _check_features("RanPAC", features, None, len(self.projection))
        return (features.detach().double().cpu() @ self.projection).clamp(min=0)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``[n, dim]`` and their classes ``[n]``.

        Raises
        ------
        ValueError
            If shapes are not these.
        """
        _check_features("RanPAC", features, labels, len(self.projection))
        rows, labels = self._rows(features), labels.cpu()
        self._gram += rows.T @ rows
        for c in labels.unique().tolist():
            total = rows[labels == c].sum(0)
            self._products[c] = self._products.get(c, torch.zeros_like(total)) + total

    @property
    def classes(self) -> list[int]:
        """The classes seen, in order."""
        return sorted(self._products)

    def weights(self, ridge: float | None = None) -> Tensor:
        """The regression's weights ``[projected, classes]``, float64."""
        if not self._products:
            raise ValueError("RanPAC: no class was seen; expected add() before")
        eye = torch.eye(len(self._gram), dtype=torch.float64)
        products = torch.stack([self._products[c] for c in self.classes], 1)
        return torch.linalg.solve(self._gram + (self.ridge if ridge is None else ridge) * eye, products)

    def choose_ridge(self, features: Tensor, labels: Tensor, ridges: Sequence[float]) -> float:
        """Set and return the ridge whose squared error on held-out features ``[n, dim]`` is the least.

        Raises
        ------
        ValueError
            If `ridges` is empty, or a label was never seen.
        """
        if not len(ridges):
            raise ValueError("RanPAC: ridges is empty; expected numbers to choose from")
        unknown = sorted(set(labels.tolist()) - set(self.classes))
        if unknown:
            raise ValueError(f"RanPAC: labels holds class {unknown[0]}; expected classes that were added")
        rows = self._rows(features)
        target = (labels.cpu()[:, None] == torch.tensor(self.classes)).double()
        errors = [float((rows @ self.weights(r) - target).square().mean()) for r in ridges]
        self.ridge = float(ridges[errors.index(min(errors))])
        return self.ridge

    def predict(self, features: Tensor) -> Tensor:
        """Classes ``[n]`` of features ``[n, dim]``."""
        best = (self._rows(features) @ self.weights()).argmax(1)
        return torch.tensor(self.classes)[best].to(features.device)

    def state_dict(self) -> dict[str, Any]:
        """Projection, ridge and sums."""
        return copied({
            "projection": self.projection, "ridge": self.ridge, "gram": self._gram, "products": self._products,
        })  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if state["projection"].shape != self.projection.shape:
            got = tuple(state["projection"].shape)
            raise ValueError(f"RanPAC: state_dict has projection {got}; expected {tuple(self.projection.shape)}")
        mine = copied(dict(state))
        self.projection, self.ridge, self._gram = mine["projection"], mine["ridge"], mine["gram"]
        self._products = mine["products"]


class BiasCorrection(nn.Module):
    r"""BiC: two numbers for the logits of a task's new classes, fitted on held-out examples of old and new ones.

    Parameters
    ----------
    new : int64 Tensor [k]
        Columns of the new classes.

    Notes
    -----
    :math:`\alpha z_c + \beta` for new classes c, others as they are. `fit` minimises cross entropy over the two.

    Raises
    ------
    ValueError
        If `new` is empty or has another shape.

    References
    ----------
    Wu et al., Large scale incremental learning (BiC), CVPR 2019, arXiv:1905.13260.
    """

    new: Tensor

    def __init__(self, new: Tensor) -> None:
        super().__init__()
        if new.dim() != 1 or not len(new) or new.is_floating_point():
            raise ValueError(f"BiasCorrection: new has shape {tuple(new.shape)}; expected the new columns (k,)")
        self.register_buffer("new", new.clone())
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        """Corrected logits ``[N, C]``."""
        at = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        at[self.new] = True
        return torch.where(at, self.alpha.to(logits) * logits + self.beta.to(logits), logits)

    def fit(self, logits: Tensor, labels: Tensor, *, steps: int = 200) -> float:
        """Fit both numbers to held-out logits ``[N, C]`` and labels ``[N]``; returns the cross entropy."""
        logits = logits.detach().to(self.alpha.dtype)
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(self(logits), labels)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return float(closure().detach())


@torch.no_grad()
def align_weights(weight: Tensor, new: Tensor) -> float:
    r"""WA: scale the new classes' rows of a head so that their mean length is the old ones'.

    Parameters
    ----------
    weight : Tensor [classes, dim]
        Changed in place.
    new : int64 Tensor [k]
        Rows of the new classes.

    Returns
    -------
    float
        :math:`\gamma = \mathrm{mean} \|w_{old}\| / \mathrm{mean} \|w_{new}\|`, by which they were multiplied.

    Raises
    ------
    ValueError
        If there are no old or no new classes, or the new rows are all 0.

    References
    ----------
    Zhao et al., Maintaining discrimination and fairness in class incremental learning, CVPR 2020, arXiv:1911.07053.
    """
    if weight.dim() != 2:
        raise ValueError(f"align_weights: weight has shape {tuple(weight.shape)}; expected (classes, dim)")
    at = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    at[new] = True
    if not bool(at.any()) or bool(at.all()):
        raise ValueError(
            f"align_weights: new has {int(at.sum())} of {len(weight)} classes; expected some old, some new"
        )
    norms = weight.double().norm(dim=1)
    if not float(norms[at].mean()) > 0:
        raise ValueError("align_weights: weight is 0 in all new rows; expected a trained head")
    gamma = float(norms[~at].mean() / norms[at].mean())
    weight[at] *= gamma
    return gamma
