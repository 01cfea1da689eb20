"""Continual learning: penalties, projections, replay, architectures, prompts; streams and metrics to judge them.

Methods are small objects for the user's own training loop: `ContinualMethod` says when each part is called.
"""

from tlkernels.methods.continual._base import ContinualMethod
from tlkernels.methods.continual.architecture import HAT, PackNet, ProgressiveNetwork, SupSup
from tlkernels.methods.continual.buffers import (
    ClassBalancedBuffer,
    GreedyBalancedBuffer,
    ReplayBuffer,
    ReservoirBuffer,
    RingBuffer,
)
from tlkernels.methods.continual.classifiers import (
    SLDA,
    BiasCorrection,
    ICaRL,
    NearestClassMean,
    RanPAC,
    align_weights,
    herding,
)
from tlkernels.methods.continual.fecam import FeCAM
from tlkernels.methods.continual.meta_replay import MER, OML
from tlkernels.methods.continual.metrics import AccuracyMatrix, summarize
from tlkernels.methods.continual.orthogonal_lora import OLoRA
from tlkernels.methods.continual.plasticity import ContinualBackprop
from tlkernels.methods.continual.projection import AGEM, GEM, GPM, OGD
from tlkernels.methods.continual.prompts import PromptPool
from tlkernels.methods.continual.regularization import EWC, KFACEWC, MAS, SI, L2Anchor, LwF, RWalk
from tlkernels.methods.continual.replay import DER, ER, ERACE, DERPlusPlus, GenerativeReplay
from tlkernels.methods.continual.replay_selection import GSS, MIR, GradientBuffer
from tlkernels.methods.continual.streams import (
    Stream,
    Task,
    domain_stream,
    permuted_stream,
    rotated_stream,
    split_stream,
)

__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "EWC",
    "GEM",
    "GPM",
    "GSS",
    "HAT",
    "KFACEWC",
    "MAS",
    "MER",
    "MIR",
    "OGD",
    "OML",
    "SI",
    "SLDA",
    "AccuracyMatrix",
    "BiasCorrection",
    "ClassBalancedBuffer",
    "ContinualBackprop",
    "ContinualMethod",
    "DERPlusPlus",
    "FeCAM",
    "GenerativeReplay",
    "GradientBuffer",
    "GreedyBalancedBuffer",
    "ICaRL",
    "L2Anchor",
    "LwF",
    "NearestClassMean",
    "OLoRA",
    "PackNet",
    "ProgressiveNetwork",
    "PromptPool",
    "RWalk",
    "RanPAC",
    "ReplayBuffer",
    "ReservoirBuffer",
    "RingBuffer",
    "Stream",
    "SupSup",
    "Task",
    "align_weights",
    "domain_stream",
    "herding",
    "permuted_stream",
    "rotated_stream",
    "split_stream",
    "summarize",
]
