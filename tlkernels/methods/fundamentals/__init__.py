"""Fundamentals: whether transfer helps, which layers carry it, how alike domains and representations are."""

from __future__ import annotations

from tlkernels.methods.fundamentals.baselines import (
    Baselines,
    ProbabilityEnsemble,
    TrAdaBoost,
    augment_features,
    baselines,
)
from tlkernels.methods.fundamentals.similarity import (
    BenDavidBound,
    CKAMatrix,
    MinibatchCKA,
    ProxyADistance,
    ben_david_bound,
    cka_matrix,
    ideal_joint_error,
    linear_cka,
    proxy_a_distance,
)
from tlkernels.methods.fundamentals.transfer import (
    LayerTransferCurve,
    TransferEstimate,
    layer_transfer_curve,
    negative_transfer_gap,
    transfer_gain,
)

__all__ = [
    "Baselines",
    "BenDavidBound",
    "CKAMatrix",
    "LayerTransferCurve",
    "MinibatchCKA",
    "ProbabilityEnsemble",
    "ProxyADistance",
    "TrAdaBoost",
    "TransferEstimate",
    "augment_features",
    "baselines",
    "ben_david_bound",
    "cka_matrix",
    "ideal_joint_error",
    "layer_transfer_curve",
    "linear_cka",
    "negative_transfer_gap",
    "proxy_a_distance",
    "transfer_gain",
]
