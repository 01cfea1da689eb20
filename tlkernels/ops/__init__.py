"""The ops: one module per family. Each holds the equation, the reference, the schema, the gradient, the function."""

from tlkernels.ops._registry import load_libraries
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
    "absmax_dequantize",
    "absmax_quantize",
    "nf4_dequantize",
    "nf4_embedding",
    "nf4_linear",
    "nf4_linear_t",
    "nf4_quantize",
]

load_libraries()
