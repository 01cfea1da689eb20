"""Fisher information of a model over a data set: diagonal, Kronecker-factored, as an operator, and its spectrum."""

from tlkernels.nn.fisher._engine import Report, Route
from tlkernels.nn.fisher.curvature import GaussNewton, Spectrum, fisher_spectrum
from tlkernels.nn.fisher.diagonal import FisherDiagonal
from tlkernels.nn.fisher.kfac import EKFAC, KFAC

__all__ = ["EKFAC", "KFAC", "FisherDiagonal", "GaussNewton", "Report", "Route", "Spectrum", "fisher_spectrum"]
