"""Losses over the batch of all processes of `torch.distributed`, and steps over batches that do not fit.

Not imported with the package: ``from tlkernels import distributed``.
"""

from __future__ import annotations

from tlkernels.distributed.contrastive import (
    CLIPLoss,
    InfoNCELoss,
    SigLIPLoss,
    info_nce,
    sigmoid_contrastive,
    sim_lse,
)
from tlkernels.distributed.grad_cache import CachedFeatures, GradCache

__all__ = [
    "CLIPLoss",
    "CachedFeatures",
    "GradCache",
    "InfoNCELoss",
    "SigLIPLoss",
    "info_nce",
    "sigmoid_contrastive",
    "sim_lse",
]
