"""Layers whose per-sample squared gradients a kernel makes from the layer's input and the gradient of its output.

A rule knows one kind of layer. It brings inputs and gradients of any layout into ``[N, T, features]`` (convolutions and
channel norms keep theirs), so that several uses of a layer are more tokens, and calls the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels import ops
from tlkernels.nn.lora import DoRALinear, LoRALinear, is_conv1d

Use = tuple[Tensor, Tensor]  # a layer's input and the gradient of its output, both in the rule's form


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _untouched(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Why a module is not one of these kinds with that kind's forward pass and plain parameters."""
    kind = next((k for k in kinds if isinstance(module, k) and type(module).forward is k.forward), None)
    if kind is None:
        return f"{type(module).__name__} has a forward pass of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is used outside of the layer"
    if "forward" in vars(module):
        return "its forward was replaced"
    if "weight" not in module._parameters:
        return "its weight is computed (parametrized)"
    return None


class Rule:
    """One kind of layer. `attributes` are the parameters that the op serves."""

    attributes: tuple[str, ...] = ("weight", "bias")
    layouts: tuple[str, ...] = ("batch",)  # what may stand where; see `_taps`
    op = ""

    def why_not(self, module: Any) -> str | None:
        """Why this module is not served, or None."""
        return None

    def settings(self, module: Any) -> tuple[Any, ...]:
        """What has to be equal in modules that share a parameter."""
        return ()

    def idle(self, module: Any) -> bool:
        """Whether its parameters take no part in the forward pass now."""
        return False

    def trailing(self, module: Any) -> tuple[int, int]:
        """How many of the last dimensions of input and output are features: the rest are samples and tokens."""
        return 1, 1

    def batched(self, module: Any, x: Tensor) -> bool:
        """Whether the input has a dimension of samples, where it could be without."""
        return True

    def form(self, module: Any, x: Tensor, grad: Tensor) -> Use:
        """Input and gradient ``[N, T, features]``, from ``[N, ..., features]``."""
        a, b = self.trailing(module)
        n = grad.shape[0]
        tokens = math.prod(grad.shape[1 : grad.dim() - b])
        x = x.reshape(n, tokens, *([math.prod(x.shape[x.dim() - a :])] if a else []))
        return x, grad.reshape(n, tokens, -1)

    def adapt(self, module: Any, use: Use) -> Use:
        """The use of a layer, which may have a rule of its own, as this rule has it."""
        return use

    def join(self, module: Any, uses: Sequence[Use]) -> Use:
        """Several uses as one with more tokens."""
        return torch.cat([x for x, _ in uses], 1), torch.cat([g for _, g in uses], 1)

    def add(self, module: Any, acc: dict[str, Tensor], uses: Sequence[Use], scale: float) -> None:
        """Add the squared per-sample gradients to the accumulators that are in `acc`."""
        x, grad = uses[0] if len(uses) == 1 else self.join(module, uses)
        self.call(module, acc, *_cast(acc, x, grad), scale)

    def call(self, module: Any, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        raise NotImplementedError


def _cast(acc: dict[str, Tensor], x: Tensor, grad: Tensor) -> Use:
    """Both of one dtype, which is that of the gradient unless the accumulators want another."""
    want = next(iter(acc.values())).dtype
    dtype = grad.dtype if accumulator(grad.dtype) == want else want
    return (x.to(dtype) if x.is_floating_point() else x), grad.to(dtype)


class LinearRule(Rule):
    layouts = ("batch", "time", "broadcast", "flat", "shared")
    op = "diag_fisher_linear_"

    def why_not(self, module: nn.Linear) -> str | None:
        return _untouched(module, nn.Linear)

    def call(self, module: Any, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        ops.diag_fisher_linear_(acc.get("weight"), acc.get("bias"), x, grad, scale=scale)


class HFConv1DRule(LinearRule):
    """transformers' ``Conv1D``: weight ``[in_features, out_features]``, so the two sides change places."""

    def why_not(self, module: Any) -> str | None:
        return "its weight is computed (parametrized)" if "weight" not in module._parameters else None

    def call(self, module: Any, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        if "weight" in acc:
            ops.diag_fisher_linear_(acc["weight"], None, grad, x, scale=scale)
        if "bias" in acc:
            ops.diag_fisher_linear_(None, acc["bias"], x, grad, scale=scale)


class EmbeddingRule(Rule):
    attributes = ("weight",)
    layouts = LinearRule.layouts
    op = "diag_fisher_embedding_"

    def why_not(self, module: nn.Embedding) -> str | None:
        if module.max_norm is not None:
            return "max_norm changes the weight in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq rescales its gradient by the batch"
        return _untouched(module, nn.Embedding)

    def settings(self, module: nn.Embedding) -> tuple[Any, ...]:
        return (module.padding_idx,)

    def trailing(self, module: Any) -> tuple[int, int]:
        return 0, 1

    def call(self, module: nn.Embedding, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        ops.diag_fisher_embedding_(acc["weight"], x.long(), grad, padding_idx=module.padding_idx, scale=scale)


class TiedRule(LinearRule):
    """One weight as the table of an embedding and as the matrix of a linear layer, as in language models.

    Looking up row v is a linear layer's gradient with the roles changed: tokens whose "output gradient" is the unit
    vector of v, and whose "input" is the gradient of the looked-up row.
    """

    def adapt(self, module: Any, use: Use) -> Use:
        """The use of one of the layers, as a linear layer's."""
        if not isinstance(module, nn.Embedding):
            return use
        index, grad = use
        rows = module.num_embeddings
        unit = torch.zeros(*index.shape, rows, dtype=grad.dtype, device=grad.device)
        unit.scatter_(-1, index.long()[..., None], 1.0)
        if module.padding_idx is not None:
            unit[..., module.padding_idx] = 0.0
        return grad, unit


class NormRule(Rule):
    layouts = LinearRule.layouts
    op = "diag_fisher_norm_"

    def why_not(self, module: Any) -> str | None:
        return _untouched(module, nn.LayerNorm, nn.RMSNorm)

    def trailing(self, module: Any) -> tuple[int, int]:
        return len(module.normalized_shape), len(module.normalized_shape)

    def settings(self, module: Any) -> tuple[Any, ...]:
        return (module.normalized_shape, module.eps, type(module))

    def norm(self, module: Any, x: Tensor) -> tuple[str, float]:
        if isinstance(module, nn.LayerNorm):
            return "layer", module.eps
        return "rms", module.eps if module.eps is not None else torch.finfo(x.dtype).eps

    def call(self, module: Any, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        norm, eps = self.norm(module, x)
        flat = {name: t.view(-1) for name, t in acc.items()}
        ops.diag_fisher_norm_(flat.get("weight"), flat.get("bias"), x, grad, norm=norm, eps=eps, scale=scale)


class HFRMSNormRule(NormRule):
    """The RMSNorms of transformers, by their name and attributes; taken only where the pass is verified."""

    def why_not(self, module: Any) -> str | None:
        return "its weight is computed (parametrized)" if "weight" not in module._parameters else None

    def trailing(self, module: Any) -> tuple[int, int]:
        return 1, 1

    def settings(self, module: Any) -> tuple[Any, ...]:
        return (type(module), self.norm(module, module.weight))

    def norm(self, module: Any, x: Tensor) -> tuple[str, float]:
        return "rms", float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))


class ConvRule(Rule):
    op = "diag_fisher_conv2d_"

    def why_not(self, module: Any) -> str | None:
        return _untouched(module, nn.Conv1d, nn.Conv2d)

    def settings(self, module: Any) -> tuple[Any, ...]:
        return (module.stride, module.padding, module.padding_mode, module.dilation, module.groups)

    def batched(self, module: Any, x: Tensor) -> bool:
        return x.dim() == len(module.kernel_size) + 2

    def form(self, module: Any, x: Tensor, grad: Tensor) -> Use:
        return x, grad

    @staticmethod
    def padded(module: Any, x: Tensor) -> tuple[Tensor, Any]:
        """(input, padding that is left to do): zeros on equal sides are the op's; every other padding is done here."""
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            if module.padding == "valid":
                return x, 0
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            return functional.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
        return x, module.padding

    def add(self, module: Any, acc: dict[str, Tensor], uses: Sequence[Use], scale: float) -> None:
        if len(uses) > 1:  # positions of several uses, as tokens of a linear layer for each group
            self._add_patches(module, acc, uses, scale)
            return
        x, grad = _cast(acc, *uses[0])
        x, padding = self.padded(module, x)
        op = ops.diag_fisher_conv1d_ if grad.dim() == 3 else ops.diag_fisher_conv2d_
        op(
            acc.get("weight"), acc.get("bias"), x, grad, stride=module.stride, padding=padding,
            dilation=module.dilation, groups=module.groups, scale=scale,
        )  # fmt: skip

    def _add_patches(self, module: Any, acc: dict[str, Tensor], uses: Sequence[Use], scale: float) -> None:
        rows = [_cast(acc, self.patches(module, x), g.flatten(2).mT) for x, g in uses]
        x, grad = torch.cat([a for a, _ in rows], 1), torch.cat([g for _, g in rows], 1)
        groups = module.groups
        xs, grads = x.tensor_split(groups, -1), grad.tensor_split(groups, -1)
        weights = acc["weight"].view(acc["weight"].shape[0], -1).tensor_split(groups) if "weight" in acc else ()
        biases = acc["bias"].tensor_split(groups) if "bias" in acc else ()
        for k in range(groups):
            ops.diag_fisher_linear_(
                weights[k] if weights else None, biases[k] if biases else None, xs[k].contiguous(),
                grads[k].contiguous(), scale=scale,
            )  # fmt: skip

    @classmethod
    def patches(cls, module: Any, x: Tensor) -> Tensor:
        """The input's patches ``[N, positions, in_channels * kernel]``, in the order of the weight's columns."""
        x, padding = cls.padded(module, x)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if x.dim() == 3:  # a line of height one
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
            padding = (0, *padding) if isinstance(padding, tuple) else (0, padding)
        return functional.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride).mT


class ChannelNormRule(Rule):
    op = "diag_fisher_channel_norm_"

    def why_not(self, module: Any) -> str | None:
        return _untouched(module, *BATCH_NORMS)

    def settings(self, module: Any) -> tuple[Any, ...]:
        return (id(module),)  # statistics of its own

    def form(self, module: Any, x: Tensor, grad: Tensor) -> Use:
        return x.reshape(*x.shape[:2], -1), grad.reshape(*x.shape[:2], -1)

    def join(self, module: Any, uses: Sequence[Use]) -> Use:
        return torch.cat([x for x, _ in uses], 2), torch.cat([g for _, g in uses], 2)

    def statistics(self, module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = accumulator(like.dtype)
        return module.running_mean.to(wide), (module.running_var.to(wide) + module.eps).rsqrt()

    def call(self, module: Any, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        ops.diag_fisher_channel_norm_(
            acc.get("weight"), acc.get("bias"), x, grad, *self.statistics(module, x), scale=scale
        )  # fmt: skip


class GroupNormRule(ChannelNormRule):
    """Group and instance norm: normalised here, sample by sample, and multiplied by a weight per channel."""

    def why_not(self, module: Any) -> str | None:
        if isinstance(module, INSTANCE_NORMS) and module.track_running_stats:
            return "instance norm with running statistics"
        return _untouched(module, nn.GroupNorm, *INSTANCE_NORMS)

    def settings(self, module: Any) -> tuple[Any, ...]:
        return (type(module), getattr(module, "num_groups", None), module.eps)

    def form(self, module: Any, x: Tensor, grad: Tensor) -> Use:
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else x.shape[1]
        x = functional.group_norm(x.to(accumulator(x.dtype)), groups, eps=module.eps)
        return super().form(module, x, grad)

    def statistics(self, module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(like.shape[1], dtype=accumulator(like.dtype), device=like.device)
        return torch.zeros_like(one), one


class LoRARule(Rule):
    attributes = ("lora_A", "lora_B", "lora_bias")
    layouts = LinearRule.layouts
    op = "diag_fisher_lora_"

    def why_not(self, module: LoRALinear) -> str | None:
        if isinstance(module, DoRALinear) or type(module).forward is not LoRALinear.forward:
            return f"{type(module).__name__} has a forward pass of its own"
        return "its dropout is on" if module.training and module.dropout > 0.0 else None

    def settings(self, module: LoRALinear) -> tuple[Any, ...]:
        return (id(module),)  # the other factor is its own

    def idle(self, module: LoRALinear) -> bool:
        return module.merged

    def call(self, module: LoRALinear, acc: dict[str, Tensor], x: Tensor, grad: Tensor, scale: float) -> None:
        if "lora_A" in acc or "lora_B" in acc:
            a, b = (t.detach().to(x.dtype) for t in module.factors)
            ops.diag_fisher_lora_(
                acc.get("lora_A"), acc.get("lora_B"), x, grad, a, b, scaling=module.scaling, scale=scale
            )  # fmt: skip
        if "lora_bias" in acc:
            ops.diag_fisher_linear_(None, acc["lora_bias"], x, grad, scale=scale * module.scaling**2)


TIED = TiedRule()
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# order: the first that a module is an instance of
RULES: tuple[tuple[Callable[[nn.Module], bool], Rule], ...] = (
    (lambda m: isinstance(m, LoRALinear), LoRARule()),
    (lambda m: isinstance(m, nn.Linear), LinearRule()),
    (lambda m: isinstance(m, (nn.Conv1d, nn.Conv2d)), ConvRule()),
    (lambda m: isinstance(m, nn.Embedding), EmbeddingRule()),
    (lambda m: isinstance(m, (nn.LayerNorm, nn.RMSNorm)), NormRule()),
    (lambda m: isinstance(m, BATCH_NORMS), ChannelNormRule()),
    (lambda m: isinstance(m, (nn.GroupNorm, *INSTANCE_NORMS)), GroupNormRule()),
    (is_conv1d, HFConv1DRule()),
)
# right only if the numbers say so
GUESSES: tuple[tuple[Callable[[nn.Module], bool], Rule], ...] = (
    (lambda m: type(m).__name__.endswith("RMSNorm") and set(m._parameters) == {"weight"}, HFRMSNormRule()),
)


def rule_of(module: nn.Module, *, guess: bool) -> tuple[Rule | None, str]:
    """(the rule that serves a module, or None; why not)."""
    for fits, rule in RULES + (GUESSES if guess else ()):
        if fits(module):
            why = rule.why_not(module)
            return (None, why) if why else (rule, "")
    return None, f"no kernel for {type(module).__name__}"
