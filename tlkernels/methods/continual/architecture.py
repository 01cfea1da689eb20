r"""Methods that give each task weights, units or columns of its own, so that later tasks cannot change its outputs.

====================  =====================================================================  ==============
`PackNet`             prunes the task's weights, keeps the rest as they are for good         Mallya 2018
`SupSup`              one mask per task over random weights that never change                Wortsman 2020
`HAT`                 gates of units, learned with the task; gradients of used units shrink  Serra 2018
`ProgressiveNetwork`  a column per task, which reads the frozen columns before it            Rusu 2016
====================  =====================================================================  ==============
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from tlkernels.methods.continual._base import ContinualMethod, check_number

__all__ = ["HAT", "PackNet", "ProgressiveNetwork", "SupSup"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _layers(op: str, model: nn.Module, skip: Sequence[str]) -> dict[str, Any]:
    """The linear layers and convolutions of `model` by name, but for the modules of `skip` and all in them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(skip, str):
        raise TypeError(f"{op}: heads is {skip!r}; expected a sequence of names")
    names = dict(model.named_modules())
    for name in skip:
        if name not in names:
            raise ValueError(f"{op}: heads has {name!r}, which is no module of the model")
    found: dict[str, Any] = {
        name: m for name, m in names.items() if isinstance(m, _WEIGHTED) and not _within(name, skip)
    }
    if not found:
        raise ValueError(f"{op}: model has no linear layer or convolution outside heads; expected one at least")
    times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in found.items():
        if times[id(module.weight)] > 1:
            raise ValueError(f"{op}: the weight of {name!r} is shared in the model; expected a weight of its own")
    return found


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _task(op: str, task: int, tasks: int) -> int:
    if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < tasks:
        raise ValueError(f"{op}: task is {task!r}; expected one of the {tasks} tasks learned, counted from 0")
    return task


class PackNet(ContinualMethod):
    r"""Packs tasks into one network: prune what a task trained, freeze what is left, give the rest to the next.

    Parameters
    ----------
    model : torch.nn.Module
    fraction : float
        In [0, 1): the share of a task's weights, in each layer, that `prune` takes away. Default 0.5.
    heads : sequence of str
        Names of modules that are not packed, such as the heads of the tasks. They are the loop's own matter: a head
        shared by tasks, and trained on, changes their outputs.

    Attributes
    ----------
    owners : dict of str to Tensor
        Of each packed weight, its shape, int16: 0 where free, t + 1 where task t holds it.

    Raises
    ------
    TypeError, ValueError
        If `model` is no module or has nothing to pack, or `fraction` is out of its range.

    Notes
    -----
    A task's order: ``before_task()``, training, ``prune()``, some more training, ``after_task()``. Without `prune` the
    task keeps every weight that was free. In training the weights of earlier tasks are read, as in the paper; with
    `apply_task` those of later tasks are 0. With :math:`M_t` the weights that task t holds after the removal of the
    smallest magnitudes of its layer, task t computes with

    .. math:: W \odot \sum_{s \le t} M_s .

    ``after_backward`` zeroes the gradients of weights that the task does not hold, and ``after_step`` puts them back
    bit for bit: momentum and weight decay of an optimizer move weights without a gradient too. Biases, the parameters
    of norms and all others outside `heads` learn in the first task and are frozen then; so are the running statistics
    of batch norms, which run in eval mode from there on.

    References
    ----------
    Mallya & Lazebnik, PackNet, CVPR 2018, arXiv:1711.05769.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.methods.continual.architecture import PackNet
    >>> model = torch.nn.Linear(4, 2)
    >>> packnet = PackNet(model, 0.5)
    >>> packnet.before_task()
    >>> packnet.prune()
    >>> packnet.after_task()
    >>> packnet.free
    4
    """

    def __init__(self, model: nn.Module, fraction: float = 0.5, *, heads: Sequence[str] = ()) -> None:
        layers = _layers(self._op, model, heads)
        super().__init__(model)
        self.fraction = check_number(self._op, "fraction", fraction, 0.0, 1.0)
        if self.fraction == 1:
            raise ValueError(f"{self._op}: fraction is {fraction}; expected less than 1")
        self.heads = tuple(heads)
        self.owners = {f"{name}.weight".lstrip("."): torch.zeros_like(m.weight, dtype=torch.int16)
                       for name, m in layers.items()}  # fmt: skip
        self._stage = "idle"  # then "train", and "retrain" after prune
        self._anchors: dict[str, Tensor] = {}
        self._applied: int | None = None
        for name, module in model.named_modules():
            if isinstance(module, _BATCH_NORMS) and not _within(name, heads):
                module.register_forward_pre_hook(self._still)

    def _still(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # model.train() in the loop would wake them up, so it is asked at every call
        if self.tasks:
            module.eval()

    @property
    def free(self) -> int:
        """The number of weights that no task holds."""
        return sum(int((owner == 0).sum()) for owner in self.owners.values())

    def _packed(self) -> Iterator[tuple[Tensor, Tensor, str]]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name, owner in self.owners.items():
            p = named[name]
            if owner.device != p.device:
                owner = self.owners[name] = owner.to(p.device)
            yield p, owner, name

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers, beside the packed weights, that are frozen after the first task."""
        for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name not in self.owners and not _within(name, self.heads):
                yield name, t

    def _anchor(self) -> None:
        self._anchors = {name: p.detach().clone() for p, _, name in self._packed()}
        if self.tasks:
            self._anchors.update({name: t.detach().clone() for name, t in self._others()})

    def _expect(self, call: str, stages: Sequence[str]) -> None:
        if self._applied is not None:
            raise RuntimeError(f"{self._op}: {call} inside apply_task({self._applied}); expected it outside")
        if self._stage not in stages:
            why = "no task runs; expected before_task() first" if self._stage == "idle" else f"in stage {self._stage!r}"
            raise RuntimeError(f"{self._op}: {call}: {why}")

    def before_task(self, loader: Iterable[Any] | None = None) -> None:
        """Give all free weights to a new task.

        Raises
        ------
        RuntimeError
            If no weight is free, or a task runs already.
        """
        self._expect("before_task", ["idle"])
        if not self.free:
            raise RuntimeError(
                f"{self._op}: no weight is free for task {self.tasks}; expected a larger fraction pruned"
            )
        for _, owner, _ in self._packed():
            owner[owner == 0] = self.tasks + 1
        self._stage = "train"
        self._anchor()

    @torch.no_grad()
    def prune(self) -> None:
        """Set the smallest of the running task's weights in each layer to 0 and free them.

        Raises
        ------
        RuntimeError
            If no task runs, or it is pruned already.
        ValueError
            If a weight is not finite.
        """
        self._expect("prune", ["train"])
        for p, _, name in self._packed():
            if not p.isfinite().all():
                raise ValueError(f"{self._op}: {name} has values that are not finite; expected finite weights")
        for p, owner, _ in self._packed():
            mine = (owner == self.tasks + 1).flatten().nonzero().squeeze(1)
            # stable: of equal magnitudes the first go, whatever the device
            order = p.detach().flatten()[mine].abs().sort(stable=True).indices
            gone = mine[order[: round(self.fraction * len(mine))]]
            owner.view(-1)[gone] = 0
            p[owner == 0] = 0
        self._stage = "retrain"
        self._anchor()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Zero the gradients of all that the running task does not hold."""
        self._expect("after_backward", ["train", "retrain"])
        for p, owner, _ in self._packed():
            if p.grad is not None:
                p.grad.masked_fill_(owner != self.tasks + 1, 0)
        if self.tasks:
            for _, t in self._others():
                if t.grad is not None:
                    t.grad.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Put all that the running task does not hold back to what it was."""
        self._expect("after_step", ["train", "retrain"])
        for p, owner, name in self._packed():
            p.copy_(torch.where(owner == self.tasks + 1, p, self._anchors[name].to(p.device)))
        if self.tasks:
            for name, t in self._others():
                t.copy_(self._anchors[name])

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Freeze the running task's weights for good.

        Raises
        ------
        RuntimeError
            If no task runs.
        """
        self._expect("after_task", ["train", "retrain"])
        self._stage, self._anchors = "idle", {}
        super().after_task(loader)

    @contextmanager
    def apply_task(self, task: int) -> Iterator[None]:
        """Within it the model is that of `task`: weights of later tasks, and free ones, are 0.

        Parameters
        ----------
        task : int
            From 0, one that is learned.

        Raises
        ------
        ValueError
            If there is no such task.
        RuntimeError
            If another one is applied.
        """
        _task(self._op, task, self.tasks)
        if self._applied is not None:
            raise RuntimeError(f"{self._op}: apply_task({task}) inside apply_task({self._applied}); expected one")
        kept = {name: p.detach().clone() for p, _, name in self._packed()}
        self._applied = task
        try:
            with torch.no_grad():
                for p, owner, _ in self._packed():
                    p.masked_fill_((owner == 0) | (owner > task + 1), 0)
            yield
        finally:
            with torch.no_grad():
                for p, _, name in self._packed():
                    p.copy_(kept[name])
            self._applied = None

    def _state(self) -> dict[str, Any]:
        return {"owners": self.owners, "stage": self._stage, "anchors": self._anchors}

    def _load(self, state: dict[str, Any]) -> None:
        _check_tensors(self._op, "owners", state["owners"], self.owners)
        self.owners, self._stage, self._anchors = state["owners"], state["stage"], state["anchors"]


def _check_tensors(op: str, name: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    if got.keys() != want.keys() or any(got[key].shape != want[key].shape for key in want):
        raise ValueError(f"{op}: {name} of state_dict are of other layers or shapes; expected those of the model")


class _StraightThrough(torch.autograd.Function):
    """The mask of the largest scores; its gradient goes to the scores as it is."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int) -> Tensor:
        # stable: of equal scores the first stay, whatever the device
        order = scores.flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(scores)
        mask.view(-1)[order[:kept]] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Supermask(nn.Module):
    """A weight times a mask: of the scores, of a stored task, or the mix of all stored ones."""

    def __init__(self, weight: Tensor, kept: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.kept = kept
        self.masks: list[Tensor] = []  # packed, eight to a byte
        self.mix: Tensor | None = None  # weights of the masks; None: that of the scores

    def mask(self, task: int) -> Tensor:
        bits = torch.arange(8, device=self.masks[task].device, dtype=torch.uint8)
        flat = (self.masks[task][:, None] >> bits & 1).flatten()[: self.scores.numel()]
        return flat.view_as(self.scores).to(self.scores.device, self.scores.dtype)

    def store(self) -> Tensor:
        flat = _StraightThrough.apply(self.scores.detach(), self.kept).flatten().to(torch.uint8)
        flat = functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        return (flat << torch.arange(8, device=flat.device, dtype=torch.uint8)).sum(1).to(torch.uint8)

    def forward(self, weight: Tensor) -> Tensor:
        if self.mix is None:
            return weight * _StraightThrough.apply(self.scores, self.kept)
        parts = [a.to(weight.dtype) * self.mask(i) for i, a in enumerate(self.mix) if a.requires_grad or a != 0]
        return weight * torch.stack(parts).sum(0)


class SupSup(ContinualMethod):
    r"""Supermasks in superposition: fixed random weights, a learned mask for each task, the task found by entropy.

    Parameters
    ----------
    model : torch.nn.Module
        All its parameters outside `heads` are frozen; its linear layers and convolutions outside them get masks (as
        parametrizations of their ``weight``, whose scores are what an optimizer gets).
    kept : float
        In (0, 1]: the share of a layer's weights that a mask keeps. Default 0.5.
    heads : sequence of str
        Names of modules that get no masks and stay as they are.
    init : str or None
        ``"signed"``: the weights are drawn anew as plus or minus :math:`\sqrt{2 / \mathrm{fan\,in}}`, as in the paper.
        None: the model's own weights.
    generator : torch.Generator, optional
        CPU. For the weights and the scores; seed 0 by default.

    Raises
    ------
    TypeError, ValueError
        If `model` is no module or has no layer for a mask, or an argument is out of its range.

    Notes
    -----
    A task's mask has ones at the ``round(kept n)`` largest scores of a layer (edge-popup), with the straight-through
    gradient :math:`\partial L / \partial s = W \odot \partial L / \partial (W \odot M)`. ``before_task`` draws new
    scores, ``after_task`` stores the mask in one bit a weight. For data of an unknown task, with the outputs p of

    .. math:: W(\alpha) = W \odot \sum_i \alpha_i M_i, \qquad \alpha_i = 1/k,

    the task is that of the largest :math:`-\partial H(p(\alpha)) / \partial \alpha_i` (one-shot), or the last one left
    when the half with the smaller ones is dropped again and again (binary).

    ``state_dict`` has the masks; weights and scores are in the model's own ``state_dict``.

    References
    ----------
    Wortsman et al., Supermasks in Superposition, NeurIPS 2020, arXiv:2006.14769. Ramanujan et al., CVPR 2020,
    arXiv:1911.13299 (edge-popup).
    """

    def __init__(
        self, model: nn.Module, kept: float = 0.5, *, heads: Sequence[str] = (), init: str | None = "signed",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        layers = _layers(self._op, model, heads)
        super().__init__(model)
        self.kept = check_number(self._op, "kept", kept, 0.0, 1.0)
        if self.kept == 0:
            raise ValueError(f"{self._op}: kept is {kept}; expected more than 0")
        if init not in ("signed", None):
            raise ValueError(f"{self._op}: init is {init!r}; expected 'signed' or None")
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer):
                raise ValueError(f"{self._op}: {name} has a parametrization already; expected a plain layer")
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._masks: list[_Supermask] = []
        for name, p in model.named_parameters():
            if not _within(name, heads):
                p.requires_grad_(False)
        for layer in layers.values():
            weight: Tensor = layer.weight
            if init == "signed":
                signs = torch.rand(weight.shape, generator=self.generator) < 0.5
                weight.fill_(math.sqrt(2 / weight[0].numel())).copy_(
                    torch.where(signs.to(weight.device), weight, -weight)
                )
            mask = _Supermask(weight, max(1, round(self.kept * weight.numel())))
            parametrize.register_parametrization(layer, "weight", mask, unsafe=True)
            self._masks.append(mask)
        self._training = False

    def scores(self) -> list[nn.Parameter]:
        """Return the scores of the layers: what an optimizer trains."""
        return [mask.scores for mask in self._masks]

    @torch.no_grad()
    def before_task(self, loader: Iterable[Any] | None = None) -> None:
        """Draw new scores and let the model run with their mask.

        Raises
        ------
        RuntimeError
            If a task runs already.
        """
        if self._training:
            raise RuntimeError(f"{self._op}: before_task: task {self.tasks} runs; expected after_task() first")
        for mask in self._masks:
            bound = 1 / math.sqrt(mask.scores[0].numel())
            drawn = torch.rand(mask.scores.shape, generator=self.generator, dtype=torch.float64)
            mask.scores.copy_((2 * drawn - 1) * bound)
            mask.mix = None
        self._training = True

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Store the mask of the running task, in bits; the model stays in it.

        Raises
        ------
        RuntimeError
            If no task runs.
        ValueError
            If a score is not finite.
        """
        if not self._training:
            raise RuntimeError(f"{self._op}: after_task: no task runs; expected before_task() first")
        if not all(mask.scores.isfinite().all() for mask in self._masks):
            raise ValueError(f"{self._op}: scores are not finite; expected finite ones")
        for mask in self._masks:
            mask.masks.append(mask.store())
        self._training = False
        super().after_task(loader)
        self.apply_task(self.tasks - 1)

    def _mix(self, mix: Tensor | None) -> None:
        for mask in self._masks:
            mask.mix = mix

    def apply_task(self, task: int) -> None:
        """Let the model run with the mask of `task`, from 0, until another one or the next ``before_task``.

        Raises
        ------
        ValueError
            If there is no such task.
        RuntimeError
            While a task runs.
        """
        _task(self._op, task, self.tasks)
        if self._training:
            raise RuntimeError(f"{self._op}: apply_task({task}): task {self.tasks} runs; expected after_task() first")
        mix = torch.zeros(self.tasks)
        mix[task] = 1
        self._mix(mix)

    def entropy_gradient(self, inputs: Any, alpha: Tensor) -> Tensor:
        r"""Return :math:`\partial H(p(\alpha)) / \partial \alpha`, H summed over the batch's samples.

        Parameters
        ----------
        inputs : Tensor
            A batch for the model, whose outputs are logits with the classes last.
        alpha : Tensor
            ``[tasks]``.

        Returns
        -------
        Tensor
            ``[tasks]``.

        Raises
        ------
        ValueError
            If no task is learned, or `alpha` has another shape.
        """
        if tuple(alpha.shape) != (self.tasks,) or not self.tasks:
            raise ValueError(f"{self._op}: alpha has shape {tuple(alpha.shape)}; expected ({self.tasks},), one or more")
        before = [mask.mix for mask in self._masks]
        leaf = alpha.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                self._mix(leaf)
                logs = self.model(inputs).log_softmax(-1)
                (grad,) = torch.autograd.grad(-(logs.exp() * logs).sum(), leaf)
        finally:
            for mask, mix in zip(self._masks, before, strict=True):
                mask.mix = mix
        return grad

    def infer_task(self, inputs: Tensor, *, method: str = "one_shot") -> int:
        """Return the task that a batch, all of one task, comes from.

        Parameters
        ----------
        inputs : Tensor
        method : str
            ``"one_shot"``, a single backward pass, or ``"binary"``, log2 of the tasks.

        Returns
        -------
        int

        Raises
        ------
        ValueError
            If no task is learned, `method` is another, or the model's outputs are not finite.
        """
        if method not in ("one_shot", "binary"):
            raise ValueError(f"{self._op}: method is {method!r}; expected 'one_shot' or 'binary'")
        left = torch.arange(self.tasks)
        dtype = self._masks[0].scores.dtype
        device = self._masks[0].scores.device
        while True:
            alpha = torch.zeros(self.tasks, dtype=dtype, device=device)
            alpha[left] = 1 / max(1, len(left))
            grad = self.entropy_gradient(inputs, alpha).cpu()[left]
            if not grad.isfinite().all():
                raise ValueError(f"{self._op}: inputs give outputs that are not finite; expected finite ones")
            order = grad.sort(stable=True).indices
            left = left[order[: 1 if method == "one_shot" else (len(left) + 1) // 2]]
            if len(left) == 1:
                return int(left[0])

    def _state(self) -> dict[str, Any]:
        return {"masks": [m.masks for m in self._masks], "training": self._training,
                "generator": self.generator.get_state()}  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        masks = state["masks"]
        sizes = [-(-m.scores.numel() // 8) for m in self._masks]
        if len(masks) != len(sizes) or any(len(b) != n for n, bs in zip(sizes, masks, strict=True) for b in bs):
            raise ValueError(f"{self._op}: masks of state_dict are of other layers; expected those of the model")
        self.generator.set_state(state["generator"])
        self._training = state["training"]
        for mask, stored in zip(self._masks, masks, strict=True):
            mask.masks = stored
            mask.mix = None
        if not self._training and masks[0]:
            mix = torch.zeros(len(masks[0]))
            mix[-1] = 1
            self._mix(mix)


class HAT(ContinualMethod):
    r"""Hard attention to the task: a gate for each unit and task, and smaller gradients where earlier gates are open.

    Parameters
    ----------
    model : torch.nn.Module
    layers : sequence of str
        Names of linear layers and 2-D convolutions that follow one another; each output unit (channel) gets a gate.
        Between them only what keeps zeros zero and channels apart: ReLU, tanh, pooling, dropout, flattening.
    tasks : int
        The most tasks, >= 1.
    s_max : float
        >= 1, the slope of the gates at a task's end. Default 400.
    weight : float
        >= 0, c, the weight of the sparsity term. Default 0.75.
    generator : torch.Generator, optional
        CPU. For the embeddings, standard normal; seed 0 by default.

    Attributes
    ----------
    embeddings : torch.nn.ParameterList
        A ``[tasks, units]`` parameter of each layer, for the optimizer besides the model's.

    Raises
    ------
    TypeError, ValueError
        If a name is no such layer, units do not fit, or an argument is out of its range.

    Notes
    -----
    The gates are :math:`a^t_l = \sigma(s e^t_l)`, with s going from :math:`1/s_{max}` to :math:`s_{max}` in an epoch:
    call ``anneal(batch, batches)`` before each forward pass. ``penalty`` and ``after_backward`` apply

    .. math:: c \frac{\sum_{l,i} a^t_{l,i} (1 - a^{<t}_{l,i})}{\sum_{l,i} (1 - a^{<t}_{l,i})}, \qquad
        g'_{l,ij} = \big[ 1 - \min(a^{<t}_{l,i}, a^{<t}_{l-1,j}) \big] g_{l,ij}, \qquad
        q'_{l,i} = \frac{s_{max} [\cosh(s e_{l,i}) + 1]}{s [\cosh(e_{l,i}) + 1]} q_{l,i}

    with :math:`a^{<t}` the largest gates of earlier tasks at :math:`s_{max}`, q the gradient of an embedding and the
    argument of the first cosh cut to 50. The inputs of the first layer count as used; a bias has the factor of its
    unit. ``after_step`` cuts embeddings to [-6, 6]. Momentum and weight decay are not held back; plain SGD keeps to the
    factors. Parameters outside `layers` are not protected: heads are to be a task's own.

    References
    ----------
    Serra et al., Overcoming Catastrophic Forgetting with Hard Attention to the Task, ICML 2018, arXiv:1801.01423.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], tasks: int, *, s_max: float = 400.0, weight: float = 0.75,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        op = self._op
        self.s_max = check_number(op, "s_max", s_max, 1.0)
        self.weight = check_number(op, "weight", weight)
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"{op}: tasks is {tasks!r}; expected a whole number >= 1")
        if isinstance(layers, str) or not len(layers):
            raise ValueError(f"{op}: layers is {layers!r}; expected a sequence of names, one at least")
        modules = dict(model.named_modules())
        self._layers: list[nn.Linear | nn.Conv2d] = []
        for name in layers:
            layer = modules.get(name)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
                raise ValueError(f"{op}: layers has {name!r}; expected a Linear or an ungrouped Conv2d of the model")
            if self._layers and layer.weight.shape[1] % len(self._layers[-1].weight):
                units, inputs = len(self._layers[-1].weight), layer.weight.shape[1]
                raise ValueError(f"{op}: layer {name!r} has {inputs} inputs; expected a multiple of the {units} before")
            self._layers.append(layer)
        self.capacity = tasks
        gen = torch.Generator().manual_seed(0) if generator is None else generator
        self.embeddings = nn.ParameterList(
            torch.randn(tasks, len(m.weight), generator=gen, dtype=torch.float64).to(m.weight) for m in self._layers
        )
        self._used = [torch.zeros(len(m.weight), dtype=m.weight.dtype, device=m.weight.device) for m in self._layers]
        self.task, self.s = 0, self.s_max
        for i, layer in enumerate(self._layers):
            layer.register_forward_hook(self._gating(i))

    def _gating(self, i: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def gate(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            a = self.gates()[i]
            return out * (a[:, None, None] if isinstance(module, nn.Conv2d) else a)

        return gate

    def gates(self, task: int | None = None, s: float | None = None) -> list[Tensor]:
        """Return the gates ``[units]`` of each layer, for the present task and slope unless others are given."""
        task, s = self.task if task is None else task, self.s if s is None else s
        return [torch.sigmoid(s * e[task]) for e in self.embeddings]

    def anneal(self, batch: int, batches: int) -> float:
        r"""Set the slope for a batch of an epoch: :math:`1/s_{max} + (s_{max} - 1/s_{max}) b / (B - 1)`.

        Parameters
        ----------
        batch : int
            b, from 0.
        batches : int
            B, those of the epoch. Of a single one the slope is `s_max`.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If `batch` is not one of them.
        """
        if not 0 <= batch < batches:
            raise ValueError(f"{self._op}: batch is {batch}; expected 0 to batches - 1, which is {batches - 1}")
        part = batch / (batches - 1) if batches > 1 else 1.0
        self.s = 1 / self.s_max + (self.s_max - 1 / self.s_max) * part
        return self.s

    def before_task(self, loader: Iterable[Any] | None = None) -> None:
        """Turn to the next task's gates.

        Raises
        ------
        RuntimeError
            If there are gates for no further task.
        """
        if self.tasks >= self.capacity:
            raise RuntimeError(f"{self._op}: all of the {self.capacity} tasks are learned; expected a larger tasks")
        self.task = self.tasks

    def apply_task(self, task: int) -> None:
        """Let the model run with the final gates of a learned `task`, from 0.

        Raises
        ------
        ValueError
            If there is no such task.
        """
        self.task, self.s = _task(self._op, task, self.tasks), self.s_max

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Return the sparsity term, times its weight; 0 where no capacity is free."""
        pairs = list(zip(self.gates(), self._used, strict=True))
        free = torch.stack([(1 - used).sum() for _, used in pairs]).sum()
        taken = torch.stack([(a * (1 - used)).sum() for a, used in pairs]).sum()
        return self.weight * taken / free if free > 0 else taken * 0

    @torch.no_grad()
    def after_backward(self) -> None:
        """Scale the gradients of weights and of embeddings in place."""
        previous: Tensor | None = None
        for layer, used, e in zip(self._layers, self._used, self.embeddings, strict=True):
            w = layer.weight
            if w.grad is not None:
                out = used.view(-1, *[1] * (w.dim() - 1))
                held = out
                if previous is not None:
                    # a flattened convolution gives each channel's positions in a row
                    inputs = previous.repeat_interleave(w.shape[1] // len(previous))
                    held = torch.minimum(out, inputs.view(1, -1, *[1] * (w.dim() - 2)))
                w.grad.mul_(1 - held)
            if layer.bias is not None and layer.bias.grad is not None:
                layer.bias.grad.mul_(1 - used)
            if e.grad is not None:
                top = torch.cosh((self.s * e).clamp(-50, 50)) + 1
                factor = self.s_max * top / (self.s * (torch.cosh(e) + 1))
                now = torch.arange(len(e), device=e.device) == self.task
                e.grad.copy_(torch.where(now[:, None], factor * e.grad, 0))  # other tasks' gates stay
            previous = used

    @torch.no_grad()
    def after_step(self) -> None:
        """Cut the present task's embeddings to [-6, 6], where their gradient does not vanish."""
        for e in self.embeddings:
            e[self.task].clamp_(-6, 6)

    @torch.no_grad()
    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Add the task's final gates to those in use.

        Raises
        ------
        RuntimeError
            If ``before_task`` was not called since the last task, or another task is applied.
        """
        if self.tasks >= self.capacity or self.task != self.tasks:
            raise RuntimeError(f"{self._op}: after_task: no task runs; expected before_task() first")
        self._used = [torch.maximum(u.to(a), a) for u, a in zip(self._used, self.gates(s=self.s_max), strict=True)]
        self.s = self.s_max
        super().after_task(loader)

    def _state(self) -> dict[str, Any]:
        return {"embeddings": list(self.embeddings), "used": self._used, "task": self.task, "s": self.s}

    @torch.no_grad()
    def _load(self, state: dict[str, Any]) -> None:
        mine = {str(i): e for i, e in enumerate(self.embeddings)}
        _check_tensors(self._op, "embeddings", {str(i): e for i, e in enumerate(state["embeddings"])}, mine)
        for e, stored in zip(self.embeddings, state["embeddings"], strict=True):
            e.copy_(stored)
        self._used, self.task, self.s = state["used"], state["task"], state["s"]


class ProgressiveNetwork(nn.Module):
    r"""Columns of blocks, one for each task; a column reads the hidden layers of those before it, which are frozen.

    Parameters
    ----------
    activation : callable
        f, after every block but the last and within the adapters. Default ReLU.

    Attributes
    ----------
    columns : torch.nn.ModuleList
        Of each task its blocks.

    Notes
    -----
    With :math:`h^{(k)}_i` the output of block i of column k,

    .. math:: h^{(k)}_i = f\Big( \mathrm{block}^{(k)}_i (h^{(k)}_{i-1}) + U^{(k)}_i
        f\big( V^{(k)}_i [\alpha^{(k:j)}_i h^{(j)}_{i-1}]_{j<k} \big) \Big), \qquad i > 1,

    without the outer f for the last block. V, linear or a 1 x 1 convolution without bias, takes the joined outputs of
    the earlier columns to the width that block i reads; U has the form of block i (a second one of the factory); the
    learned scalars :math:`\alpha` are 1 at first. Earlier columns stay in eval mode and without gradients.

    References
    ----------
    Rusu et al., Progressive Neural Networks, 2016, arXiv:1606.04671.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor] = functional.relu) -> None:
        super().__init__()
        if not callable(activation):
            raise TypeError(f"ProgressiveNetwork: activation is a {type(activation).__name__}; expected a function")
        self.activation = activation
        self.columns = nn.ModuleList()
        self.reductions = nn.ModuleList()  # V, of each column and each block from the second on
        self.laterals = nn.ModuleList()  # U
        self.scales = nn.ModuleList()  # alpha

    def add_column(self, factory: Callable[[], Sequence[nn.Module]], sample: Tensor) -> list[nn.Parameter]:
        """Freeze the columns there are and add one.

        Parameters
        ----------
        factory : callable
            Gives a list of blocks, two at least, as many as the earlier columns have. It is called twice, but for the
            first column: once more for the adapters.
        sample : Tensor
            A batch of inputs, from whose hidden layers the adapters take their widths.

        Returns
        -------
        list of torch.nn.Parameter
            Of the new column: what to optimize.

        Raises
        ------
        TypeError, ValueError
            If the factory gives no such list, or a hidden layer is neither ``[N, F]`` nor ``[N, C, H, W]``, or its
            kind or extent differs from the earlier columns'. Nothing has changed then.
        """
        blocks = list(factory())
        if not all(isinstance(block, nn.Module) for block in blocks):
            raise TypeError("ProgressiveNetwork: factory gives what is no module; expected a list of modules")
        depth = len(self.columns[0]) if len(self.columns) else max(2, len(blocks))  # type: ignore[arg-type]
        if len(blocks) != depth:
            raise ValueError(f"ProgressiveNetwork: factory gives {len(blocks)} blocks; expected {depth}")
        reductions: list[nn.Module] = []
        laterals: list[nn.Module] = []
        scales: list[nn.Parameter] = []
        training = self.training
        if len(self.columns):
            for module in (self, *blocks):
                module.eval()  # the trial pass moves no running statistics
            try:
                with torch.no_grad():
                    before = self._hidden(sample, len(self.columns))
                    h = sample
                    second = list(factory())
                    for i, block in enumerate(blocks[:-1]):
                        h = self.activation(block(h))
                        olds = [column[i] for column in before]
                        if h.dim() not in (2, 4) or any(o.shape[2:] != h.shape[2:] or o.dim() != h.dim() for o in olds):
                            shapes = [tuple(o.shape) for o in [*olds, h]]
                            raise ValueError(
                                f"ProgressiveNetwork: block {i} gives {shapes} in the columns; expected [N, F], or "
                                "[N, C, H, W] with one H, W"
                            )
                        total, width = sum(o.shape[1] for o in olds), h.shape[1]
                        v = (
                            nn.Linear(total, width, bias=False)
                            if h.dim() == 2
                            else nn.Conv2d(total, width, 1, bias=False)
                        )
                        reductions.append(v.to(h.device, h.dtype))
                        scales.append(nn.Parameter(h.new_ones(len(olds))))
                    laterals = second[1:]
            finally:
                self.train(training)
        self.requires_grad_(False)
        self.columns.append(nn.ModuleList(blocks))
        self.reductions.append(nn.ModuleList(reductions))
        self.laterals.append(nn.ModuleList(laterals))
        self.scales.append(nn.ParameterList(scales))
        new = [self.columns[-1], self.reductions[-1], self.laterals[-1], self.scales[-1]]
        self.train(training)
        return [p for part in new for p in part.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> ProgressiveNetwork:
        """Set the mode of the last column; the others stay in eval mode."""
        super().train(mode)
        for parts in (self.columns, self.reductions, self.laterals):
            for part in parts[:-1]:
                part.train(False)
        return self

    def _hidden(self, x: Tensor, columns: int) -> list[list[Tensor]]:
        """The outputs of all blocks of the first columns."""
        found: list[list[Tensor]] = []
        for k in range(columns):
            # frozen columns need no graph, and read nothing of the columns after them
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == len(self.columns) - 1):
                blocks: Any = self.columns[k]
                scales: Any = self.scales[k]
                reductions: Any = self.reductions[k]
                laterals: Any = self.laterals[k]
                h, outs = x, []
                for i, block in enumerate(blocks):
                    y = block(h)
                    if i and k:
                        read = torch.cat([scales[i - 1][j] * found[j][i - 1] for j in range(k)], 1)
                        y = y + laterals[i - 1](self.activation(reductions[i - 1](read)))
                    h = y if i == len(blocks) - 1 else self.activation(y)
                    outs.append(h)
            found.append(outs)
        return found

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Return the outputs of a task's column, by default of the last.

        Raises
        ------
        ValueError
            If there is no such column.
        """
        task = len(self.columns) - 1 if task is None else task
        _task("ProgressiveNetwork", task, len(self.columns))
        return self._hidden(x, task + 1)[task][-1]
