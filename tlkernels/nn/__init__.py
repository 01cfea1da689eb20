"""Modules over the ops: 4-bit and adapted layers, contrastive losses, distances between batches, Fisher information."""

from tlkernels.nn.contrastive import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss
from tlkernels.nn.discrepancy import CORALLoss, JointMMDLoss, LocalMMDLoss, MMDLoss
from tlkernels.nn.fisher import EKFAC, KFAC, FisherDiagonal, GaussNewton, fisher_spectrum
from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear
from tlkernels.nn.nf4 import NF4Embedding, NF4Linear

__all__ = [
    "EKFAC",
    "KFAC",
    "CLIPLoss",
    "CORALLoss",
    "DoRALinear",
    "FisherDiagonal",
    "GaussNewton",
    "InfoNCELoss",
    "JointMMDLoss",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LocalMMDLoss",
    "MMDLoss",
    "NF4Embedding",
    "NF4Linear",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "fisher_spectrum",
]
