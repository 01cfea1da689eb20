"""Triton kernels, one module per op family; each function is the kernel of the op of the same name."""
