r"""Layers with a weight in 4 bits that is never made dense: :math:`y = x \hat W^T + b`, and rows of :math:`\hat W`.

The weight is frozen: it is held in buffers, and gradients flow to the input and the bias. `tlkernels.ops.nf4` has the
format and its equations.

Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer. *QLoRA: Efficient Finetuning of Quantized LLMs.*
NeurIPS 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from tlkernels.nn import _nf4_state
from tlkernels.ops import nf4 as ops
from tlkernels.ops.nf4 import NF4Weight

__all__ = ["NF4Embedding", "NF4Linear", "PackedCodes"]

_BUFFERS = ("packed", "absmax", "code", "absmax_scale", "absmax_offset")


class PackedCodes(Tensor):
    """The bytes behind ``layer.weight``: uint8 ``[ceil(numel / 2), 1]``, sharing the layer's memory.

    Some code reads a layer's weight and does the product itself. Torch's fused transformer layers step back when a
    weight is a subclass with its own torch functions, and call the layer, which is right; other code that would take
    the codes for a matrix gets an error instead of wrong numbers.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            raise TypeError(
                f"{func.__name__}: the weight is 4-bit codes, not a matrix; call the layer, or use layer.dequantize()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _TracedCodes:
    """`PackedCodes` while torch.export traces with fake tensors, which cannot be of another class."""

    def __init__(self, codes: Tensor) -> None:
        self._codes = codes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codes, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_TracedCodes, lambda traced: traced._codes, (args, kwargs or {}))
        return PackedCodes.__torch_function__(func, types, args, kwargs)


_PRODUCTS = (nn.functional.linear, nn.functional.embedding, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm)


class _NF4Module(nn.Module):
    """A layer with one 4-bit matrix in its buffers, its moves between devices, and its state_dict."""

    packed: Tensor
    absmax: Tensor
    code: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    dtype: torch.dtype
    block_size: int
    absmax_block_size: int

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _hold(self, weight: NF4Weight) -> None:
        """Make `weight` this layer's own. The tensors themselves are kept, so that two layers can share them."""
        if not isinstance(weight, NF4Weight):
            raise TypeError(f"{type(self).__name__}: weight is a {type(weight).__name__}; expected an NF4Weight")
        if tuple(weight.shape) != self._shape():
            name, shape = type(self).__name__, tuple(weight.shape)
            raise ValueError(f"{name}: weight was quantized from shape {shape}; expected {self._shape()}")
        packed = weight.packed
        if packed.dim() != 1 or packed.dtype != torch.uint8:
            packed = packed.reshape(-1).view(torch.uint8)
        # Buffers of these names are not in the state_dict, which has its own layout: they are not "persistent".
        for name, tensor in zip(_BUFFERS, (packed, *ops._tensors(weight)[1:]), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.dtype, self.block_size, self.absmax_block_size = weight.dtype, weight.block_size, weight.absmax_block_size

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight as the ops take it. Its dtype is the layer's; its tensors are the layer's own."""
        return NF4Weight(
            self.packed, self.absmax, self._shape(), self.dtype, self.block_size, self.code, self.absmax_scale,
            self.absmax_offset, self.absmax_block_size,
        )  # fmt: skip

    @property
    def weight(self) -> PackedCodes | _TracedCodes:
        """The 4-bit codes: uint8 ``[ceil(numel / 2), 1]`` on the layer's device. Not a matrix; see `dequantize`."""
        codes = self.packed.view(-1, 1)
        return _TracedCodes(codes) if isinstance(codes, FakeTensor) else codes.as_subclass(PackedCodes)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.absmax.dtype == torch.uint8

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or by default the layer's."""
        return ops.nf4_dequantize(self.nf4_weight, dtype=dtype)

    def _format_repr(self) -> str:
        table = _nf4_state.quant_type(self.code)
        code = "" if table == "nf4" else f", code={table}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"block_size={self.block_size}, double_quant={self.double_quant}{code}, dtype={dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to a device as any module; of a change of dtype, take note for the output and leave the 4-bit data."""
        ours = {id(buffer) for buffer in self._buffers.values() if buffer is not None}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        self.dtype = probe.dtype if probe.is_floating_point() else self.dtype
        return super()._apply(lambda t: _moved(t, fn) if id(t) in ours else fn(t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for suffix, tensor in _nf4_state.write(self.nf4_weight).items():
            destination[f"{prefix}weight{suffix}"] = tensor if keep_vars else tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        others: list[str] = []
        # first, because hooks that it runs may rename entries; what it does not expect includes all 4-bit entries
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        name = f"{prefix}weight"
        state = {k[len(name) :]: v for k, v in state_dict.items() if k == name or k.startswith(f"{name}.")}
        useless = {name + suffix for suffix in _nf4_state.unexpected(state)}
        unexpected_keys += [k for k in others if k in useless or k.removeprefix(name) not in state]
        missing_keys += [name + suffix for suffix in _nf4_state.missing(state)]
        if state:
            try:
                self._load(_nf4_state.read(state, name, self._shape()), local_metadata.get("assign_to_params_buffers"))
            except _nf4_state.StateError as error:
                error_msgs.append(str(error))

    def _load(self, weight: NF4Weight, assign: bool | None = False) -> None:
        """Take a weight's values, block size, table and kind of scales; with `assign`, its own tensors and dtype."""
        if assign:
            return self._hold(weight)
        if self.packed.is_meta:
            warnings.warn(
                f"{type(self).__name__}: loading into a layer on the meta device does nothing; "
                "use load_state_dict(..., assign=True), or to_empty(device=...) first",
                stacklevel=2,
            )
            return None
        pairs = zip(_BUFFERS, ops._tensors(self.nf4_weight), ops._tensors(weight), strict=True)
        tensors: dict[str, Any] = {name: _copied(old, new, self.packed.device) for name, old, new in pairs}
        return self._hold(weight._replace(dtype=self.dtype, **tensors))


def _copied(old: Tensor | None, new: Tensor | None, device: torch.device) -> Tensor | None:
    """`old`, filled with `new`, so that whoever shares its memory sees the change; or a copy where it does not fit."""
    if new is None:
        return None
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return new.to(device, copy=True)
    return old.copy_(new)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn` of a buffer's bytes, which it may move but not convert: scales stay float32 in a bfloat16 model."""
    data = tensor.reshape(-1).view(torch.uint8)
    moved = fn(data)
    if moved.dtype != torch.uint8:  # Module.type() converts integers too
        moved = data.to(moved.device)
    moved = moved.view(tensor.dtype).view(tensor.shape)
    if torch._has_compatible_shallow_copy_type(tensor, moved) and not isinstance(moved, FakeTensor):
        tensor.data = moved  # in place, as torch does with parameters, so that layers that share it still do
        return tensor
    return moved


class NF4Linear(_NF4Module):
    r"""A linear layer :math:`y = x \hat W^T + b` with a frozen weight in 4 bits.

    Parameters
    ----------
    in_features, out_features : int
        Any sizes; a row need not be a multiple of `block_size`.
    bias : bool
        Whether there is a bias, a trainable parameter.
    block_size : int
        Weights per scale, a power of two from 32 to 4096.
    double_quant : bool
        Store the scales in 8 bits: 4.13 instead of 4.5 bits a weight at block_size 64.
    device, dtype
        Of the initial weight, drawn as `torch.nn.Linear` draws it. The dtype is also the bias's and the default of
        `dequantize`. A large layer that is to be loaded is best made on the meta device.

    Attributes
    ----------
    nf4_weight : NF4Weight
        The weight as the ops take it, of shape ``(out_features, in_features)``.
    weight : Tensor
        The bytes of the 4-bit codes, uint8 ``[ceil(out_features * in_features / 2), 1]``.
    bias : Parameter or None
        ``[out_features]``.

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype or size than stated.

    Notes
    -----
    The output has the input's dtype (under ``torch.autocast``, its dtype), whatever the dtype of the bias.

    ``.half()``, ``.to(torch.bfloat16)`` and the like change the bias and the default dtype of `dequantize`; the codes
    and the float32 scales stay as they are, bit for bit.

    ``state_dict()`` is in the layout of bitsandbytes' ``Linear4bit``: ``weight``, ``weight.absmax``,
    ``weight.quant_map``, ``weight.nested_absmax``, ``weight.nested_quant_map``,
    ``weight.quant_state.bitsandbytes__nf4`` and ``bias``. Loading takes block size, table (NF4 or FP4) and kind of
    scales from the checkpoint; as torch does, it keeps the layer's device and dtype unless ``assign=True``.

    The weight is in buffers: FSDP replicates it instead of sharding it, and an optimizer never sees it.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch, tlkernels
    >>> layer = tlkernels.nn.NF4Linear.from_linear(torch.nn.Linear(64, 128))
    >>> layer(torch.randn(3, 64)).shape
    torch.Size([3, 128])
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, block_size: int = 64,
        double_quant: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._hold(_quantize(dense.weight, block_size, double_quant))
        self.register_parameter("bias", dense.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, block_size: int = 64, double_quant: bool = True, code: Tensor | None = None
    ) -> NF4Linear:
        """Quantize a linear layer. The bias is shared with it, not copied; the mode (train or eval) is taken over.

        Parameters
        ----------
        linear : torch.nn.Linear
        block_size, double_quant
            As for the class.
        code : Tensor, optional
            float32 ``[16]``: another table than NF4, as for `tlkernels.ops.nf4_quantize`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"NF4Linear.from_linear: linear is a {type(linear).__name__}; expected a torch.nn.Linear")
        weight = _quantize(linear.weight, block_size, double_quant, code)
        return cls.from_weight(weight, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: Tensor | None = None) -> NF4Linear:
        """A layer around a weight of shape ``(out_features, in_features)`` that is quantized already.

        Nothing is copied: the layer uses the weight's tensors, and `bias` itself where it is a Parameter.
        """
        out_features, in_features = ops._matrix("NF4Linear.from_weight", weight)
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"NF4Linear.from_weight: bias has shape {tuple(bias.shape)}; expected ({out_features},)")
        layer = cls(in_features, out_features, bias is not None, device="meta")
        layer._hold(weight)
        layer.bias = nn.Parameter(bias) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        return layer

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as `torch.nn.Linear` does, e.g. after ``to_empty``."""
        sizes, bias = (self.in_features, self.out_features), self.bias is not None
        dense = nn.Linear(*sizes, bias, device=self.packed.device, dtype=self.dtype)
        self._load(_quantize(dense.weight, self.block_size, self.double_quant, self.code))
        if self.bias is not None:
            self.bias.data.copy_(dense.bias.data)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, of the input's dtype; see `tlkernels.ops.nf4_linear`."""
        dtype = _autocast_dtype(input)
        if dtype is None:
            return ops.nf4_linear(input, self.nf4_weight, self.bias)
        with torch.autocast(input.device.type, enabled=False):  # the op accumulates in float32, whatever it runs on
            return ops.nf4_linear(input.to(dtype), self.nf4_weight, self.bias)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._format_repr()}"


class NF4Embedding(_NF4Module):
    """An embedding with a frozen table in 4 bits: rows of it, decoded.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Any sizes; a row need not be a multiple of `block_size`.
    padding_idx : int, optional
        Kept as an attribute, as other code looks for it. `torch.nn.Embedding` gives that row no gradient; here no row
        has one.
    block_size : int
        Weights per scale, a power of two from 32 to 4096.
    double_quant : bool
        Store the scales in 8 bits: 4.13 instead of 4.5 bits a weight at block_size 64.
    device, dtype
        Of the initial table, drawn as `torch.nn.Embedding` draws it. The dtype is the output's.

    Attributes
    ----------
    nf4_weight : NF4Weight
        The table as the ops take it, of shape ``(num_embeddings, embedding_dim)``.
    weight : Tensor
        The bytes of the 4-bit codes, uint8 ``[ceil(num_embeddings * embedding_dim / 2), 1]``.

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype or size than stated.

    Notes
    -----
    ``.half()``, ``.to(torch.bfloat16)`` and the like change the dtype of the output; codes and scales stay as they are.
    The ``state_dict()`` is laid out as `NF4Linear`'s.

    An output head tied to the table shares it when both are built from one `NF4Weight`, and still does after moves
    between devices: ``NF4Linear.from_weight(embedding.nf4_weight)``. Loading with ``assign=True`` unties them.

    References
    ----------
    Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314.

    Examples
    --------
    >>> import torch, tlkernels
    >>> table = tlkernels.nn.NF4Embedding.from_embedding(torch.nn.Embedding(1000, 64))
    >>> table(torch.tensor([[1, 5], [7, 7]])).shape
    torch.Size([2, 2, 64])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, block_size: int = 64,
        double_quant: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            want = f"{-num_embeddings} <= padding_idx < {num_embeddings}"
            raise ValueError(f"NF4Embedding: padding_idx is {padding_idx}; expected {want}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        dense = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.padding_idx = dense.padding_idx
        self._hold(_quantize(dense.weight, block_size, double_quant))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, block_size: int = 64, double_quant: bool = True, code: Tensor | None = None
    ) -> NF4Embedding:
        """Quantize an embedding; the mode (train or eval) is taken over.

        Parameters
        ----------
        embedding : torch.nn.Embedding
            ``scale_grad_by_freq`` and ``sparse`` concern a gradient that there is none of.
        block_size, double_quant
            As for the class.
        code : Tensor, optional
            float32 ``[16]``: another table than NF4, as for `tlkernels.ops.nf4_quantize`.

        Raises
        ------
        ValueError
            If the embedding has a ``max_norm``: it renormalises its weight in place when called.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"NF4Embedding.from_embedding: embedding is a {type(embedding).__name__}; expected a torch.nn.Embedding"
            )
        if embedding.max_norm is not None:
            raise ValueError(
                f"NF4Embedding.from_embedding: max_norm is {embedding.max_norm}; expected None: "
                "it writes to the weight, which is frozen in 4 bits"
            )
        weight = _quantize(embedding.weight, block_size, double_quant, code)
        return cls.from_weight(weight, embedding.padding_idx).train(embedding.training)

    @classmethod
    def from_weight(cls, weight: NF4Weight, padding_idx: int | None = None) -> NF4Embedding:
        """An embedding around a table of shape ``(num_embeddings, embedding_dim)`` that is quantized already.

        Nothing is copied: the layer uses the weight's tensors.
        """
        layer = cls(*ops._matrix("NF4Embedding.from_weight", weight), padding_idx, device="meta")
        layer._hold(weight)
        return layer

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def reset_parameters(self) -> None:
        """Draw the table anew, as `torch.nn.Embedding` does, e.g. after ``to_empty``."""
        dense = nn.Embedding(*self._shape(), self.padding_idx, device=self.packed.device, dtype=self.dtype)
        self._load(_quantize(dense.weight, self.block_size, self.double_quant, self.code))

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...]`` -> ``[..., embedding_dim]``, of the layer's dtype; see `tlkernels.ops.nf4_embedding`."""
        return ops.nf4_embedding(input, self.nf4_weight, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self._format_repr()}"


def _quantize(w: Tensor, block_size: int, double_quant: bool, code: Tensor | None = None) -> NF4Weight:
    """`ops.nf4_quantize`; of a weight on the meta device just the sizes, without tracing the op."""
    if not w.is_meta:
        return ops.nf4_quantize(w, block_size=block_size, code=code, double_quant=double_quant)
    ops._check_block_size("nf4_quantize", block_size)
    blocks = -(-w.numel() // block_size)
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=w.device)
    weight = NF4Weight(packed, absmax, tuple(w.shape), w.dtype, block_size, code)
    if not double_quant:
        return weight
    scale = torch.empty(-(-blocks // weight.absmax_block_size), dtype=torch.float32, device=w.device)
    return weight._replace(absmax_scale=scale, absmax_offset=scale.new_empty(()))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what torch.autocast makes `torch.nn.functional.linear` convert x to, or None; it leaves float64 alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if x.is_floating_point() and x.dtype != torch.float64 else x.dtype
