"""tlkernels: performance kernels for transfer learning.

The ops are ordinary torch ops (``torch.ops.tlkernels.*``) with documented faces in `tlkernels.ops` and modules in
`tlkernels.nn`. Where torch is not installed at all, `tlkernels.numpy` and the command line still work.
"""

from __future__ import annotations

import importlib.util

from tlkernels._version import __version__

__all__ = ["__version__", "numpy"]

if importlib.util.find_spec("torch") is not None:
    from tlkernels import nn, ops
    from tlkernels.nn.fisher import EKFAC, KFAC, FisherDiagonal, GaussNewton, fisher_spectrum
    from tlkernels.nn.quantize import memory_report, quantize_model
    from tlkernels.ops._registry import backend, backends

    __all__ += ["EKFAC", "KFAC", "FisherDiagonal", "GaussNewton", "fisher_spectrum"]
    __all__ += ["backend", "backends", "memory_report", "nn", "ops", "quantize_model"]


def __getattr__(name: str) -> object:
    if name == "numpy":
        import importlib

        return importlib.import_module("tlkernels.numpy")
    raise AttributeError(f"module 'tlkernels' has no attribute {name!r}")
