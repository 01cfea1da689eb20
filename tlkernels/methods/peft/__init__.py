"""Parameter-efficient fine-tuning: small trainable parts beside a frozen model, put in, merged, saved and served."""

from __future__ import annotations

from tlkernels.methods.peft._tuner import (
    TunerConfig,
    TunerModule,
)
from tlkernels.methods.peft.adalora import (
    AdaLoRAConfig,
    AdaLoRALinear,
    RankAllocator,
    orthogonality_penalty,
)
from tlkernels.methods.peft.adapters import Adapter as BottleneckAdapter
from tlkernels.methods.peft.adapters import (
    AdapterConfig,
    AdapterFusion,
    AdapterFusionConfig,
    AdapterFusionLayer,
    AdapterLayer,
    adapters_of,
    bottleneck,
)
from tlkernels.methods.peft.apply import (
    Applied,
    TrainableReport,
    applied,
    apply,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from tlkernels.methods.peft.bank import (
    AdapterBank,
    BankLinear,
    BankMemory,
)
from tlkernels.methods.peft.checkpoint import (
    get_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from tlkernels.methods.peft.ia3 import (
    IA3Config,
    IA3Linear,
)
from tlkernels.methods.peft.init import (
    Decomposition,
    QuantizedDecomposition,
    initialize,
    loftq,
    olora,
    orthogonal,
    pissa,
)
from tlkernels.methods.peft.intrinsic import (
    Fastfood,
    IntrinsicModel,
    fast_walsh_hadamard,
)
from tlkernels.methods.peft.lora import (
    LoRAConfig,
)
from tlkernels.methods.peft.merging import (
    merge_adapters,
)
from tlkernels.methods.peft.oft import (
    OFTConfig,
    OFTLinear,
    cayley,
)
from tlkernels.methods.peft.optim import (
    PickedOptimizer,
    loraplus_groups,
    qlora_optimizer,
)
from tlkernels.methods.peft.prompts import (
    PrefixTuning,
    PromptTuning,
)
from tlkernels.methods.peft.selective import (
    Selection,
    bitfit,
    ln_tuning,
)
from tlkernels.methods.peft.vera import (
    VeraConfig,
    VeraLinear,
    VeraProjection,
)
from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear

__all__ = [
    "AdaLoRAConfig",
    "AdaLoRALinear",
    "AdapterBank",
    "AdapterConfig",
    "AdapterFusion",
    "AdapterFusionConfig",
    "AdapterFusionLayer",
    "AdapterLayer",
    "Applied",
    "BankLinear",
    "BankMemory",
    "BottleneckAdapter",
    "Decomposition",
    "DoRALinear",
    "Fastfood",
    "IA3Config",
    "IA3Linear",
    "IntrinsicModel",
    "LoRAConfig",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "OFTConfig",
    "OFTLinear",
    "PickedOptimizer",
    "PrefixTuning",
    "PromptTuning",
    "QuantizedDecomposition",
    "RankAllocator",
    "Selection",
    "TrainableReport",
    "TunerConfig",
    "TunerModule",
    "VeraConfig",
    "VeraLinear",
    "VeraProjection",
    "adapters_of",
    "applied",
    "apply",
    "bitfit",
    "bottleneck",
    "cayley",
    "fast_walsh_hadamard",
    "get_adapter",
    "initialize",
    "ln_tuning",
    "load_adapter",
    "loftq",
    "loraplus_groups",
    "merge",
    "merge_adapters",
    "olora",
    "orthogonal",
    "orthogonality_penalty",
    "pissa",
    "qlora_optimizer",
    "read_adapter",
    "remove",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
    "write_adapter",
]
