r"""LoRA, rsLoRA and DoRA for the layers of a model.

For a chosen linear layer, convolution or embedding, :math:`W x` becomes :math:`(W + \gamma B A) x` with factors of low
rank; `tlkernels.nn.lora` has the layers and the papers, `tlkernels.methods.peft.init` the initial values.

Examples
--------
>>> import torch
>>> from tlkernels.methods.peft.apply import apply, trainable_parameters
>>> from tlkernels.methods.peft.lora import LoRAConfig
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
>>> applied = apply(model, LoRAConfig(r=4, target_modules=["0"], modules_to_save=["2"]))
>>> trainable_parameters(model).trainable
3850
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tlkernels.methods.peft._tuner import TunerConfig, is_conv1d, pattern_value
from tlkernels.methods.peft.init import initialize
from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear, _LoRAModule
from tlkernels.nn.nf4 import NF4Embedding, NF4Linear

__all__ = ["LoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TunerConfig):
    """LoRA and its variants; fields have the PEFT library's names and meaning.

    Attributes
    ----------
    target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern
        As for `TunerConfig`.
    r : int
        Rank, 1 to the smaller side of a layer's weight.
    lora_alpha : float
        The update's scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with `use_rslora`.
    lora_dropout : float
        Probability, in [0, 1), of dropping an element of the update's input. Embeddings have none.
    bias : {"none", "all", "lora_only"}
        Which biases of the model itself to train: none, all, or those of the adapted layers.
    use_rslora : bool
        The rank-stabilized scaling.
    use_dora : bool
        DoRA; for linear layers only.
    lora_bias : bool
        A bias in the update; not for embeddings, nor with `use_dora`.
    init_lora_weights : bool or str
        As for `tlkernels.methods.peft.init.initialize`.
    loftq_config : mapping
        With ``init_lora_weights="loftq"``: ``"loftq_iter"`` (default 1), and ``"loftq_bits"``, which is 4.
    rank_pattern, alpha_pattern : mapping from str
        Another rank or alpha for some layers, by a regular expression that matches the last parts of the name.
    adapter_dtype : torch.dtype, optional
        Of the factors. By default float32 beside weights of 16 or 4 bits, else the weight's.
    task_type : str, optional
        Written to `save_adapter`'s file, for PEFT: ``"CAUSAL_LM"``, ``"SEQ_CLS"`` and so on. Its classes for
        classification want the head in `modules_to_save`.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. Kalajdzievski, rsLoRA, 2023, arXiv:2312.03732. Liu et al., DoRA, ICML
    2024, arXiv:2402.09353.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, int] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_dtype: torch.dtype | None = None
    task_type: str | None = None

    def check(self) -> None:
        """Raise if a field has a value that it cannot have, naming it."""
        super().check()
        if not _is_rank(self.r):
            self._fail("r", "1 or more")
        if not _is_finite(self.lora_alpha):
            self._fail("lora_alpha", "a finite number")
        if not 0.0 <= self.lora_dropout < 1.0:
            self._fail("lora_dropout", "0 <= lora_dropout < 1")
        if self.bias not in ("none", "all", "lora_only"):
            self._fail("bias", "'none', 'all' or 'lora_only'")
        for name, allowed, want in (
            ("rank_pattern", _is_rank, "ranks, 1 or more"),
            ("alpha_pattern", _is_finite, "finite numbers"),
        ):
            for pattern, value in getattr(self, name).items():
                try:
                    re.compile(pattern)
                except re.error as error:
                    self._fail(name, f"regular expressions ({pattern!r}: {error})")
                if not allowed(value):
                    self._fail(name, want)
        if self.lora_bias and self.use_dora:
            self._fail("lora_bias", "False where use_dora is True")
        if unknown := set(self.loftq_config) - {"loftq_bits", "loftq_iter"}:
            self._fail("loftq_config", f"only 'loftq_bits' and 'loftq_iter' (not {sorted(unknown)})")
        if self.loftq_config.get("loftq_bits", 4) != 4:
            self._fail("loftq_config", "loftq_bits 4")
        if self.loftq_config.get("loftq_iter", 1) < 1:
            self._fail("loftq_config", "loftq_iter 1 or more")

    def rank_of(self, name: str) -> int:
        """The rank of the layer of this name."""
        rank = pattern_value(self.rank_pattern, name)
        return self.r if rank is None else int(rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer of this name."""
        alpha = pattern_value(self.alpha_pattern, name)
        return self.lora_alpha if alpha is None else alpha

    def scaling_of(self, name: str) -> float:
        """The scaling of the update of the layer of this name."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def wrap(self, name: str, module: nn.Module) -> _LoRAModule:
        """Build the layer that takes the place of `module`; see `TunerConfig.wrap`."""
        options: dict[str, Any] = {
            "rank": self.rank_of(name), "lora_alpha": self.alpha_of(name), "use_rslora": self.use_rslora,
            "dtype": self.adapter_dtype,
        }  # fmt: skip
        linear = isinstance(module, (nn.Linear, NF4Linear)) or is_conv1d(module)
        embedding = isinstance(module, (nn.Embedding, NF4Embedding))
        if not (linear or embedding or isinstance(module, nn.Conv2d)):
            kinds = "a linear layer, a Conv2d or an embedding"
            raise TypeError(f"LoRAConfig: {name} is a {type(module).__name__}; expected {kinds}")
        if self.use_dora and not linear:
            raise TypeError(f"LoRAConfig: {name} is a {type(module).__name__}; use_dora is for linear layers")
        if self.lora_bias and embedding:
            raise TypeError(f"LoRAConfig: {name} is a {type(module).__name__}; lora_bias is not for embeddings")
        if not embedding:
            options["dropout"] = self.lora_dropout
            if not self.use_dora:
                options["lora_bias"] = self.lora_bias
        kind = DoRALinear if self.use_dora else LoRALinear if linear else LoRAEmbedding if embedding else LoRAConv2d
        try:
            layer: _LoRAModule = kind(module, **options)  # type: ignore[arg-type]
            initialize(layer, self.init_lora_weights, loftq_iterations=self.loftq_config.get("loftq_iter", 1))
        except (TypeError, ValueError) as error:
            raise type(error)(f"LoRAConfig: {name}: {error}") from error
        return layer


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
