r"""FeCAM: the nearest class by a Mahalanobis distance of its own, on features that a power makes more normal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlkernels.methods.continual._base import check_number, copied
from tlkernels.methods.continual.classifiers import _check_features

__all__ = ["FeCAM"]


class FeCAM:
    r"""Class means and class covariances, each shrunk and scaled to a correlation matrix.

    Parameters
    ----------
    diagonal : float
        :math:`\gamma_1` >= 0, shrinkage by the mean variance.
    off_diagonal : float
        :math:`\gamma_2` >= 0, shrinkage by the mean covariance.
    power : float
        Of Tukey's transformation, in [0, 1]: 0 is the logarithm, 1 leaves features as they are. Below 1 features have
        to be >= 0, as after a ReLU, and > 0 for 0.
    correlation : bool
        Scale each shrunk covariance to variances of 1.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    With :math:`\tilde x = x^\lambda` and :math:`\Sigma` the covariance (1 / (n - 1)) of a class's transformed features,
    :math:`V_1` and :math:`V_2` the means of its diagonal and of the rest,

    .. math:: \Sigma_s = \Sigma + \gamma_1 V_1 I + \gamma_2 V_2 (1 - I), \quad
        N_{ij} = \Sigma_{s,ij} / \sqrt{\Sigma_{s,ii} \Sigma_{s,jj}}, \quad
        D_c(x) = (\hat x - \hat\mu_c)^\top N_c^{-1} (\hat x - \hat\mu_c),

    where :math:`\hat x` is :math:`\tilde x` and :math:`\hat\mu_c` is :math:`\tilde\mu_c`, the transformed mean of the
    features as they are, both scaled to length 1, as in the code of the paper's authors. Scores are :math:`-D_c`.
    Sums are float64, and a covariance of each class is kept.

    References
    ----------
    Goswami et al., FeCAM: exploiting the heterogeneity of class distributions in exemplar-free continual learning,
    NeurIPS 2023, arXiv:2309.14062.
    """

    def __init__(
        self, *, diagonal: float = 1.0, off_diagonal: float = 1.0, power: float = 0.5, correlation: bool = True
    ) -> None:
        self.diagonal = check_number("FeCAM", "diagonal", diagonal)
        self.off_diagonal = check_number("FeCAM", "off_diagonal", off_diagonal)
        self.power = check_number("FeCAM", "power", power, 0.0, 1.0)
        self.correlation = bool(correlation)
        self._counts: dict[int, int] = {}
        self._means: dict[int, Tensor] = {}  # of the features as they are
        self._centres: dict[int, Tensor] = {}  # of the transformed ones
        self._squares: dict[int, Tensor] = {}  # about the centres

    @property
    def classes(self) -> list[int]:
        """The classes seen, in order."""
        return sorted(self._counts)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``[n, dim]`` and their classes ``[n]``.

        Raises
        ------
        ValueError
            If shapes are not these, or a feature is not finite, or negative where the power is below 1; nothing has
            changed then.
        """
        _check_features("FeCAM", features, labels, self._dim)
        rows = features.detach().double()
        powers = self._transformed(rows)
        for c in labels.unique().tolist():
            mine, raw = powers[labels == c], rows[labels == c].mean(0)
            n, centre = len(mine), mine.mean(0)
            squares = (mine - centre).T @ (mine - centre)
            before = self._counts.get(c, 0)
            if before:
                step = centre - self._centres[c]
                squares = squares + self._squares[c] + torch.outer(step, step) * (before * n / (before + n))
                centre = self._centres[c] + step * (n / (before + n))
                raw = self._means[c] + (raw - self._means[c]) * (n / (before + n))
            self._counts[c], self._means[c] = before + n, raw
            self._centres[c], self._squares[c] = centre, squares

    def covariance(self, c: int) -> Tensor:
        """The covariance ``[dim, dim]`` of a class's transformed features, float64, before shrinkage.

        Raises
        ------
        ValueError
            If fewer than two of its examples were seen.
        """
        if self._counts.get(c, 0) < 2:
            raise ValueError(f"FeCAM: class {c} has {self._counts.get(c, 0)} examples; expected two at least")
        return self._squares[c] / (self._counts[c] - 1)

    def scores(self, features: Tensor) -> Tensor:
        """Negative distances ``[n, classes]`` of features ``[n, dim]``, float64.

        Raises
        ------
        ValueError
            If no class was seen, one of them less than twice, or its shrunk covariance is not positive definite.
        """
        if not self._counts:
            raise ValueError("FeCAM: no class was seen; expected add() before")
        _check_features("FeCAM", features, None, self._dim)
        rows = functional.normalize(self._transformed(features.detach().double()), dim=1)
        return torch.stack([-self._distance(rows, c) for c in self.classes], 1)

    def predict(self, features: Tensor) -> Tensor:
        """Classes ``[n]`` of features ``[n, dim]``."""
        return torch.tensor(self.classes, device=features.device)[self.scores(features).argmax(1)]

    def state_dict(self) -> dict[str, Any]:
        """Settings, counts, means and squares; tensors are copies."""
        return {
            "settings": self._settings(), "counts": dict(self._counts), "means": copied(self._means),
            "centres": copied(self._centres), "squares": copied(self._squares),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is of other settings or lacks something; nothing has changed then.
        """
        missing = sorted({"settings", "counts", "means", "centres", "squares"} - state.keys())
        if missing:
            raise ValueError(f"FeCAM: state_dict lacks {missing[0]!r}; expected what state_dict() returns")
        if state["settings"] != self._settings():
            raise ValueError(f"FeCAM: state_dict has settings {state['settings']}; expected {self._settings()}")
        self._counts, self._means = dict(state["counts"]), copied(state["means"])
        self._centres, self._squares = copied(state["centres"]), copied(state["squares"])

    @property
    def _dim(self) -> int | None:
        first = next(iter(self._means.values()), None)
        return None if first is None else len(first)

    def _settings(self) -> dict[str, float]:
        return {
            "diagonal": self.diagonal, "off_diagonal": self.off_diagonal, "power": self.power,
            "correlation": self.correlation,
        }  # fmt: skip

    def _transformed(self, rows: Tensor) -> Tensor:
        if not torch.isfinite(rows).all():
            raise ValueError("FeCAM: features has a NaN or an infinity; expected finite numbers")
        if self.power < 1 and bool((rows < 0).any() if self.power > 0 else (rows <= 0).any()):
            wants = ">= 0" if self.power > 0 else "> 0"
            raise ValueError(f"FeCAM: features has {float(rows.min()):g}; expected {wants} with power {self.power:g}")
        return rows.pow(self.power) if self.power > 0 else rows.log()

    def _distance(self, rows: Tensor, c: int) -> Tensor:
        sigma = self.covariance(c)
        dim = len(sigma)
        variances = sigma.diagonal()
        rest = (sigma.sum() - variances.sum()) / max(dim * (dim - 1), 1)
        eye = torch.eye(dim, dtype=sigma.dtype, device=sigma.device)
        sigma = sigma + self.diagonal * variances.mean() * eye + self.off_diagonal * rest * (1 - eye)
        if self.correlation:
            lengths = sigma.diagonal().sqrt()
            sigma = sigma / lengths[:, None] / lengths
        factor, info = torch.linalg.cholesky_ex(sigma)
        if int(info) or not torch.isfinite(factor).all():
            raise ValueError(
                f"FeCAM: the shrunk covariance of class {c} is not positive definite; expected a larger diagonal "
                f"(now {self.diagonal:g}) or more than {self._counts[c]} different examples"
            )
        away = rows - functional.normalize(self._transformed(self._means[c][None]), dim=1)
        return torch.linalg.solve_triangular(factor, away.T, upper=False).square().sum(0)
