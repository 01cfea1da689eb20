"""Modules over the ops: 4-bit layers, and what puts them into a model."""

from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear
from tlkernels.nn.nf4 import NF4Embedding, NF4Linear

__all__ = ["DoRALinear", "LoRAConv2d", "LoRAEmbedding", "LoRALinear", "NF4Embedding", "NF4Linear"]
