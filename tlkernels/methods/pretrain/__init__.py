"""Pre-training without labels: contrast, siamese networks, redundancy reduction, clustering, distillation, masking.

Losses, and the networks and state that go with them; the loop is yours.
"""

from __future__ import annotations

from tlkernels.methods.pretrain._common import GroupSum
from tlkernels.methods.pretrain.contrastive import (
    MoCoLoss,
    dcl_loss,
    moco_v3_loss,
    simclr_loss,
    supcon_loss,
)
from tlkernels.methods.pretrain.dino import DINOLoss, IBOTLoss
from tlkernels.methods.pretrain.heads import (
    DINOHead,
    ProjectionHead,
    barlow_twins_projector,
    byol_predictor,
    byol_projector,
    cancel_gradients,
    moco_v1_projector,
    moco_v2_projector,
    moco_v3_predictor,
    moco_v3_projector,
    simclr_projector,
    simsiam_predictor,
    simsiam_projector,
    swav_projector,
    vicreg_projector,
)
from tlkernels.methods.pretrain.mae import (
    PatchMask,
    mae_loss,
    mask_patches,
    patchify,
    restore_patches,
    unpatchify,
)
from tlkernels.methods.pretrain.momentum import MomentumEncoder, cosine_momentum, linear_warmup
from tlkernels.methods.pretrain.queue import FeatureQueue
from tlkernels.methods.pretrain.redundancy import VICRegTerms, barlow_twins_loss, vicreg_loss
from tlkernels.methods.pretrain.siamese import byol_loss, negative_cosine_similarity, simsiam_loss
from tlkernels.methods.pretrain.swav import SwAVLoss, SwAVPrototypes, sinkhorn_codes, swav_loss
from tlkernels.methods.pretrain.text import (
    ReplacedTokens,
    SentencePair,
    causal_lm_loss,
    next_sentence_pairs,
    replace_tokens,
    replaced_token_loss,
    sentence_order_pairs,
)

__all__ = [
    "DINOHead",
    "DINOLoss",
    "FeatureQueue",
    "GroupSum",
    "IBOTLoss",
    "MoCoLoss",
    "MomentumEncoder",
    "PatchMask",
    "ProjectionHead",
    "ReplacedTokens",
    "SentencePair",
    "SwAVLoss",
    "SwAVPrototypes",
    "VICRegTerms",
    "barlow_twins_loss",
    "barlow_twins_projector",
    "byol_loss",
    "byol_predictor",
    "byol_projector",
    "cancel_gradients",
    "causal_lm_loss",
    "cosine_momentum",
    "dcl_loss",
    "linear_warmup",
    "mae_loss",
    "mask_patches",
    "moco_v1_projector",
    "moco_v2_projector",
    "moco_v3_loss",
    "moco_v3_predictor",
    "moco_v3_projector",
    "negative_cosine_similarity",
    "next_sentence_pairs",
    "patchify",
    "replace_tokens",
    "replaced_token_loss",
    "restore_patches",
    "sentence_order_pairs",
    "simclr_loss",
    "simclr_projector",
    "simsiam_loss",
    "simsiam_predictor",
    "simsiam_projector",
    "sinkhorn_codes",
    "supcon_loss",
    "swav_loss",
    "swav_projector",
    "unpatchify",
    "vicreg_loss",
    "vicreg_projector",
]
