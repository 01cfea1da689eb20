"""The ops: one module per family. Each holds the equation, the reference, the schema, the gradient, the function."""

from tlkernels.ops._registry import load_libraries
from tlkernels.ops.contrastive import (
    SimLSE,
    info_nce,
    lse_merge,
    nt_xent,
    sigmoid_contrastive,
    sim_lse,
    sup_con,
)
from tlkernels.ops.lora import (
    dora_weight_norm,
    lora_dropout_mask,
    lora_grouped_delta_,
    lora_linear,
    lora_linear_grouped,
    lora_merge,
    lora_merge_,
)
from tlkernels.ops.nf4 import (
    FP4_CODE,
    NF4_CODE,
    NF4Weight,
    absmax_dequantize,
    absmax_quantize,
    nf4_dequantize,
    nf4_embedding,
    nf4_linear,
    nf4_linear_t,
    nf4_quantize,
)

__all__ = [
    "FP4_CODE",
    "NF4_CODE",
    "NF4Weight",
    "SimLSE",
    "absmax_dequantize",
    "absmax_quantize",
    "dora_weight_norm",
    "info_nce",
    "lora_dropout_mask",
    "lora_grouped_delta_",
    "lora_linear",
    "lora_linear_grouped",
    "lora_merge",
    "lora_merge_",
    "lse_merge",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_t",
    "nf4_quantize",
    "nt_xent",
    "sigmoid_contrastive",
    "sim_lse",
    "sup_con",
]

load_libraries()
