r"""Training a chosen few of a model's own parameters: its biases (BitFit), or its norms (LN-tuning).

Nothing is added to the model and nothing is to be merged: what is trained, and what has to be saved for each task, are
some vectors, about one in a thousand of a transformer's weights.

Elad Ben Zaken, Shauli Ravfogel, Yoav Goldberg. *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models.* ACL 2022, arXiv:2106.10199. Bingchen Zhao et al. *Tuning LayerNorm in Attention: Towards
Efficient Multi-Modal LLM Finetuning.* ICLR 2024, arXiv:2312.11420.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tlkernels.nn.quantize import _matches

__all__ = ["Selection", "bitfit", "ln_tuning"]


class Selection:
    """Some of a model's parameters, which are trained while all others are frozen. `restore` ends it.

    Made by `bitfit` and `ln_tuning`.

    Attributes
    ----------
    names : tuple of str
        Of the parameters that train, in the model's order.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self.names = tuple(names)
        chosen = set(names)
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._first = {name: p.detach().clone() for name, p in model.named_parameters() if name in chosen}
        for name, p in model.named_parameters():
            if name in chosen or p.requires_grad:  # packed weights cannot even be asked
                p.requires_grad_(name in chosen)
                if name not in chosen:
                    p.grad = None  # an optimizer would go on with the last one

    def parameters(self) -> list[Tensor]:
        """The parameters that train, for an optimizer."""
        parameters = dict(self._model.named_parameters())
        return [parameters[name] for name in self.names]

    @property
    def trainable(self) -> int:
        """The number of weights that train."""
        return sum(p.numel() for p in self.parameters())

    @property
    def total(self) -> int:
        """The number of the model's weights."""
        return sum(p.numel() for p in self._model.parameters())

    def report(self) -> str:
        """How many weights train, and the parameters by their last two names with a count of each."""
        counts: dict[str, list[int]] = {}
        for name, p in zip(self.names, self.parameters(), strict=True):
            entry = counts.setdefault(".".join(name.split(".")[-2:]), [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + p.numel()
        lines = [f"{self.trainable} of {self.total} weights train ({self.trainable / self.total:.2%})"]
        lines += [f"  {tensors} x {name}: {weights}" for name, (tensors, weights) in counts.items()]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Tensor]:
        """The trained parameters alone: what a task is, beside the pre-trained model."""
        return {name: p.detach() for name, p in zip(self.names, self.parameters(), strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a task.

        Raises
        ------
        ValueError
            If the names or shapes are others; nothing has changed then.
        """
        odd = sorted(set(state) ^ set(self.names))
        if odd:
            raise ValueError(f"Selection.load_state_dict: {odd[0]} is in the state or selected, not both")
        parameters = self.parameters()
        for name, p in zip(self.names, parameters, strict=True):
            if state[name].shape != p.shape:
                got, want = tuple(state[name].shape), tuple(p.shape)
                raise ValueError(f"Selection.load_state_dict: {name} has shape {got}; expected {want}")
        torch._foreach_copy_(
            parameters, [state[name].to(p.device) for name, p in zip(self.names, parameters, strict=True)]
        )

    @torch.no_grad()
    def reset(self) -> None:
        """Give the selected parameters the values that they had when the selection was made."""
        torch._foreach_copy_(self.parameters(), [self._first[name] for name in self.names])

    def restore(self) -> None:
        """Give all parameters the ``requires_grad`` flags that they had. Their values stay."""
        for name, p in self._model.named_parameters():
            if p.requires_grad != self._flags[name]:
                p.requires_grad_(self._flags[name])


def bitfit(model: nn.Module, subset: Sequence[str] = ("*",), *, modules_to_save: Sequence[str] = ()) -> Selection:
    """Train the biases alone.

    Parameters
    ----------
    model : torch.nn.Module
    subset : sequence of str
        Which biases: patterns (``fnmatch``) of full names, or of their last parts, of the biases or of modules around
        them. All by default. ``["query", "intermediate.dense"]`` are those two of a BERT block that the paper found to
        do nearly as well.
    modules_to_save : sequence of str
        Patterns of modules to train whole, such as a new ``"classifier"``.

    Returns
    -------
    Selection
        In force.

    Raises
    ------
    TypeError
        If `model` is not a module, or patterns are no sequence.
    ValueError
        If a pattern matches nothing.

    Notes
    -----
    A bias is a floating-point parameter whose own name is or ends with ``bias``: of linear layers, convolutions and
    norms, and attention's ``in_proj_bias``.

    References
    ----------
    Ben Zaken et al., BitFit, ACL 2022, arXiv:2106.10199.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> bitfit(model).names
    ('0.bias', '1.bias')
    """
    _check("bitfit", model, subset=subset, modules_to_save=modules_to_save)
    biases = [
        name for name, p in model.named_parameters()
        if name.rpartition(".")[2].endswith("bias") and p.is_floating_point()
    ]  # fmt: skip
    return _select("bitfit", model, biases, subset, modules_to_save, "bias")


def ln_tuning(
    model: nn.Module, subset: Sequence[str] = ("*",), *, bias: bool = True, modules_to_save: Sequence[str] = ()
) -> Selection:
    """Train the weights, and by default the biases, of the layer norms alone.

    Parameters
    ----------
    model : torch.nn.Module
    subset : sequence of str
        Which norms, in `bitfit`'s notation. All by default.
    bias : bool
        Their biases too, where they have them.
    modules_to_save
        As for `bitfit`.

    Returns
    -------
    Selection
        In force.

    Raises
    ------
    TypeError, ValueError
        As `bitfit`.

    Notes
    -----
    A norm is a `torch.nn.LayerNorm`, `torch.nn.GroupNorm` or `torch.nn.RMSNorm`, or a module without children whose
    class is named so, such as ``LlamaRMSNorm``. Batch norms are not among them: their statistics are no parameters.

    References
    ----------
    Zhao et al., ICLR 2024, arXiv:2312.11420.
    """
    _check("ln_tuning", model, subset=subset, modules_to_save=modules_to_save)
    names = [
        f"{path}.{own}" if path else own
        for path, module in model.named_modules()
        if _is_norm(module)
        for own, p in module.named_parameters(recurse=False)
        if p.is_floating_point() and (bias or not own.endswith("bias"))
    ]
    return _select("ln_tuning", model, names, subset, modules_to_save, "norm")


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    name = type(module).__name__.lower()
    return name.endswith(("layernorm", "rmsnorm")) and not any(True for _ in module.children())


def _check(op: str, model: nn.Module, **patterns: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, value in patterns.items():
        if isinstance(value, str) or not all(isinstance(p, str) for p in value):
            raise TypeError(f"{op}: {name} is {value!r}; expected a sequence of patterns")


def _select(
    op: str, model: nn.Module, names: Sequence[str], subset: Sequence[str], saved: Sequence[str], kind: str
) -> Selection:
    everything = [name for name, p in model.named_parameters() if p.is_floating_point()]
    for field, patterns, pool in (("subset", subset, names), ("modules_to_save", saved, everything)):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in pool):
                what = f"no {kind} of the model" if field == "subset" else "no parameter"
                raise ValueError(f"{op}: {field} has {pattern!r}, which matches {what}")
    chosen = {name for name in names if _matches(name, subset)}
    chosen |= {name for name in everything if _matches(name, saved)}
    if not chosen:
        raise ValueError(f"{op}: nothing is selected; expected at least one pattern")
    return Selection(model, [name for name in everything if name in chosen])
