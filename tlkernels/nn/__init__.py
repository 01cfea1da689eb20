"""Modules over the ops: 4-bit layers, adapted layers, contrastive losses."""

from tlkernels.nn.contrastive import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss
from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear
from tlkernels.nn.nf4 import NF4Embedding, NF4Linear

__all__ = [
    "CLIPLoss",
    "DoRALinear",
    "InfoNCELoss",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "NF4Embedding",
    "NF4Linear",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
]
