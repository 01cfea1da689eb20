r"""Methods that change the gradient of the new task so that it does not undo what earlier tasks learned.

======  ======================================================================  ==================
`GEM`   no memory's loss may grow: a quadratic programme over the tasks         Lopez-Paz 2017
`AGEM`  the loss on a sample of the memory may not grow: one projection         Chaudhry 2019
`OGD`   orthogonal to the gradients of the logits on earlier tasks              Farajtabar 2020
`GPM`   orthogonal, layer by layer, to the inputs that earlier tasks gave       Saha 2021
======  ======================================================================  ==================

All of them act in ``after_backward()``; ``penalty()`` is 0. What an optimizer adds to the gradient (momentum of earlier
steps, weight decay, per-weight rates) is not projected: plain SGD keeps to the methods' promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels import ops
from tlkernels.methods.continual._base import (
    ContinualMethod,
    check_loader,
    check_number,
    split_batch,
    trainable_parameters,
)

__all__ = ["AGEM", "GEM", "GPM", "OGD"]

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def _whole(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}; expected a whole number >= 1")
    return value


def _plain_forward(model: nn.Module, inputs: Tensor, tasks: Tensor) -> Tensor:
    out: Tensor = model(inputs)
    return out


class _Memory(ContinualMethod):
    """Some samples of each task, and the gradients of the loss on them."""

    def __init__(
        self, model: nn.Module, memory: int, loss: Loss, forward: Forward | None, generator: torch.Generator | None
    ) -> None:
        super().__init__(model)
        trainable_parameters(self._op, model)
        self.memory = _whole(self._op, "memory", memory)
        if not callable(loss):
            raise TypeError(f"{self._op}: loss is a {type(loss).__name__}; expected a function of (outputs, labels)")
        self._loss, self._forward = loss, forward or _plain_forward
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._samples: list[tuple[Tensor, Tensor]] = []  # of each task, in order

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Put some of the task's samples, drawn at random, into the memory.

        Parameters
        ----------
        loader : iterable of (inputs, labels, ...)

        Raises
        ------
        TypeError, ValueError
            If it is none, or gives no samples or no labels; nothing has changed then.
        """
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        keys = torch.empty(0, dtype=torch.float64)
        for batch in check_loader(self._op, loader):
            x, y = split_batch(self._op, batch)
            if y is None or len(y) != len(x):
                got = "no labels" if y is None else f"{len(x)} inputs and {len(y)} labels"
                raise ValueError(f"{self._op}: loader gives {got}; expected a label for each input")
            # the samples with the largest of independent keys are a uniform draw, whatever the number of batches
            new = torch.rand(len(x), generator=self.generator, dtype=torch.float64, device=self.generator.device)
            keys = torch.cat([keys, new.cpu()])
            top = keys.topk(min(self.memory, len(keys))).indices.sort().values
            xs = [torch.cat([*xs, x.detach()])[top.to(x.device)]]
            ys = [torch.cat([*ys, y.detach()])[top.to(y.device)]]
            keys = keys[top]
        if not len(keys):
            raise ValueError(f"{self._op}: loader gives no samples; expected one at least")
        device = next(self.model.parameters()).device
        self._samples.append((xs[0].to(device), ys[0].to(device)))
        super().after_task()

    def _gradients(self, named: dict[str, nn.Parameter], x: Tensor, y: Tensor, tasks: Tensor) -> list[Tensor | None]:
        """Of the loss on samples of the memory; ``.grad`` stays as it is."""
        with torch.enable_grad():
            value = self._loss(self._forward(self.model, x, tasks), y)
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return list(found)

    def _add(
        self, params: Sequence[nn.Parameter], memories: Sequence[Sequence[Tensor | None]], weights: Tensor
    ) -> None:
        """Add the memories' gradients with their weights to ``.grad``, which is made where it is needed."""
        used = [i for i in range(len(params)) if any(grads[i] is not None for grads in memories)]
        out = []
        for i in used:
            p = params[i]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            out.append(p.grad)
        ops.task_combine_(out, [[grads[i] for i in used] for grads in memories], weights, accumulate=True)

    def _state(self) -> dict[str, Any]:
        return {"samples": self._samples, "generator": self.generator.get_state()}

    def _load(self, state: dict[str, Any]) -> None:
        device = next(self.model.parameters()).device
        self.generator.set_state(state["generator"].cpu())
        self._samples = [(x.to(device), y.to(device)) for x, y in state["samples"]]


class GEM(_Memory):
    r"""Gradient episodic memory: the step may not increase the loss on any earlier task's memory.

    Parameters
    ----------
    model : torch.nn.Module
    memory : int
        Samples kept of each task. Default 256.
    margin : float
        >= 0, the paper's memory strength: the least weight of each memory's gradient where one conflicts. Default 0.5.
    loss : callable
        ``loss(outputs, labels)``, a scalar. Default cross-entropy.
    forward : callable, optional
        ``forward(model, inputs, tasks) -> outputs`` for samples of the memory; `tasks` ``[N]`` are the numbers of their
        tasks, 0 for the first. By default ``model(inputs)``.
    generator : torch.Generator, optional
        For the choice of samples; by default one of our own with seed 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \min_{\tilde g} \tfrac12 \lVert \tilde g - g \rVert^2 \quad\text{with}\quad
        \langle \tilde g, g_k \rangle \ge 0 \;\; \text{for each earlier task } k,
        \qquad \tilde g = g + \sum_k v_k g_k ,

    solved in its dual over the tasks, :math:`v \ge` `margin`, where some :math:`\langle g, g_k \rangle < 0`. A step
    costs one more forward and backward pass for each earlier task, in the mode that the model is in.

    References
    ----------
    Lopez-Paz and Ranzato, Gradient episodic memory for continual learning, NeurIPS 2017, arXiv:1706.08840.
    """

    def __init__(
        self, model: nn.Module, memory: int = 256, *, margin: float = 0.5, loss: Loss = functional.cross_entropy,
        forward: Forward | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, memory, loss, forward, generator)
        self.margin = check_number(self._op, "margin", margin)

    def after_backward(self) -> None:
        """Project ``.grad`` where it conflicts with a memory's gradient.

        Raises
        ------
        ValueError
            If a gradient is not finite; ``.grad`` is as it was then.
        """
        if not self._samples:
            return
        named = trainable_parameters(self._op, self.model)
        params = list(named.values())
        own = [None if p.grad is None else p.grad.detach() for p in params]
        memories = []
        for task, (x, y) in enumerate(self._samples):
            memories.append(self._gradients(named, x, y, torch.full((len(x),), task, device=x.device)))
        gram = ops.task_gram([*memories, own])
        if not bool(gram.isfinite().all()):
            raise ValueError(f"{self._op}: a gradient has a NaN or an infinity; expected finite ones")
        products = gram[:-1, -1]
        if bool((products < 0).any()):
            self._add(params, memories, ops.gem_weights(gram[:-1, :-1].contiguous(), products, self.margin))


class AGEM(_Memory):
    r"""Averaged GEM: the step may not increase the loss on samples drawn from all earlier tasks.

    Parameters
    ----------
    model : torch.nn.Module
    memory : int
        Samples kept of each task. Default 256.
    batch_size : int
        Samples drawn from the memory at a step, without replacement. Default 64.
    loss, forward, generator
        As for `GEM`; a batch has samples of several tasks.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \tilde g = g - \frac{\langle g, g_{ref} \rangle}{\lVert g_{ref} \rVert^2} g_{ref}
        \quad \text{where } \langle g, g_{ref} \rangle < 0 .

    References
    ----------
    Chaudhry et al., Efficient lifelong learning with A-GEM, ICLR 2019, arXiv:1812.00420.
    """

    def __init__(
        self, model: nn.Module, memory: int = 256, *, batch_size: int = 64, loss: Loss = functional.cross_entropy,
        forward: Forward | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, memory, loss, forward, generator)
        self.batch_size = _whole(self._op, "batch_size", batch_size)

    def after_backward(self) -> None:
        """Project ``.grad`` where it conflicts with the gradient on a batch of the memory.

        Raises
        ------
        ValueError
            If a gradient is not finite; ``.grad`` is as it was then.
        """
        if not self._samples:
            return
        named = trainable_parameters(self._op, self.model)
        params = list(named.values())
        own = [None if p.grad is None else p.grad.detach() for p in params]
        reference = self._gradients(named, *self._draw())
        gram = ops.task_gram([own, reference])
        if not bool(gram.isfinite().all()):
            raise ValueError(f"{self._op}: a gradient has a NaN or an infinity; expected finite ones")
        c = ops.agem_coefficient(gram[0, 1], gram[1, 1])
        if c:
            self._add(params, [reference], torch.tensor([c], dtype=torch.float64, device=gram.device))

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and task numbers of a batch of the memory, each sample as likely as the others."""
        sizes = [len(x) for x, _ in self._samples]
        order = torch.randperm(sum(sizes), generator=self.generator, device=self.generator.device)
        picked = order[: self.batch_size].sort().values.cpu()
        xs, ys, tasks, start = [], [], [], 0
        for task, (x, y) in enumerate(self._samples):
            rows = picked[(picked >= start) & (picked < start + sizes[task])] - start
            start += sizes[task]
            xs.append(x[rows.to(x.device)])
            ys.append(y[rows.to(y.device)])
            tasks.append(torch.full((len(rows),), task, device=x.device))
        return torch.cat(xs), torch.cat(ys), torch.cat(tasks)


class OGD(ContinualMethod):
    r"""Orthogonal gradient descent: a step does not change, to first order, the logits of earlier tasks' samples.

    Parameters
    ----------
    model : torch.nn.Module
        ``model(inputs)`` gives logits ``[N, classes]``.
    samples : int
        Samples of each task whose logits are held. Default 200.
    logits : "label", "all" or "mean"
        The logit of a sample's label (OGD-GTL), each (OGD-ALL: as many directions as classes), or their mean (OGD-AVE).
        Default "label".
    tol : float
        Directions whose part outside of the basis is shorter than this, by the task's longest, are dropped. Default
        1e-6.
    forward : callable, optional
        ``forward(model, inputs, tasks) -> logits``, as for `GEM`.
    generator : torch.Generator, optional
        For the choice of samples; by default one of our own with seed 0.

    Attributes
    ----------
    rank : int
        Stored directions; each takes the memory of the parameters.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math:: \tilde g = g - \sum_{v \in S} \langle g, v \rangle v

    with S an orthonormal basis of the span of :math:`\nabla_\theta f_y(x; \theta^*_t)` over samples of earlier tasks. A
    parameter that gets new rows has none of them in the basis.

    References
    ----------
    Farajtabar et al., Orthogonal gradient descent for continual learning, AISTATS 2020, arXiv:1910.07104.
    """

    def __init__(
        self, model: nn.Module, samples: int = 200, *, logits: str = "label", tol: float = 1e-6,
        forward: Forward | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if logits not in ("label", "all", "mean"):
            raise ValueError(f"{self._op}: logits is {logits!r}; expected 'label', 'all' or 'mean'")
        super().__init__(model)
        trainable_parameters(self._op, model)
        self.samples, self.logits = _whole(self._op, "samples", samples), logits
        self.tol = check_number(self._op, "tol", tol, 0.0, 1.0)
        self._forward = forward
        # draws the samples of a task; its losses are never asked for
        self._store = _Memory(model, samples, functional.cross_entropy, forward, generator)
        self._basis: dict[str, Tensor] = {}  # [rank, *shape]

    @property
    def rank(self) -> int:
        """Stored directions."""
        return next((t.shape[0] for t in self._basis.values()), 0)

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Add the directions of some of the task's samples to the basis.

        Parameters
        ----------
        loader : iterable of (inputs, labels, ...)

        Raises
        ------
        TypeError, ValueError
            If it is none, gives no samples or no labels, a label is out of range, or a gradient not finite.
        """
        store = self._store
        store.after_task(loader)
        x, y = store._samples.pop()
        named = trainable_parameters(self._op, self.model)
        basis = self._padded(named)
        old = self._flat(basis, named)
        new = self._directions(named, x, y).to(old.dtype)
        if not bool(new.isfinite().all()):
            raise ValueError(f"{self._op}: a gradient of a logit has a NaN or an infinity; expected finite ones")
        length = new.norm(dim=1).max()
        for _ in range(2):  # the second takes out what rounding left
            new -= (new @ old.T) @ old
        _, s, rows = torch.linalg.svd(new, full_matrices=False)
        old = torch.cat([old, rows[s > self.tol * length]])
        parts = old.split([p.numel() for p in named.values()], 1)
        self._basis = {n: t.reshape(-1, *named[n].shape).clone() for n, t in zip(named, parts, strict=True)} | {
            n: torch.cat([t, t.new_zeros(len(old) - len(t), *t.shape[1:])])
            for n, t in basis.items()
            if n not in named  # frozen by now
        }
        super().after_task()

    def _directions(self, named: dict[str, nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
        """Gradients of logits, ``[directions, parameters]``, sample by sample, in eval mode."""
        forward = self._forward or _plain_forward
        params, rows = list(named.values()), []
        with _evaluating(self.model), torch.enable_grad():
            for i in range(len(x)):
                task = torch.full((1,), self.tasks, device=x.device)
                out = forward(self.model, x[i : i + 1], task).reshape(-1)
                if self.logits == "mean":
                    values = [out.mean()]
                elif self.logits == "all":
                    values = list(out)
                else:
                    label = int(y[i])
                    if not 0 <= label < len(out):
                        raise ValueError(f"{self._op}: loader gives a label {label}; expected one of {len(out)} logits")
                    values = [out[label]]
                for k, value in enumerate(values):
                    grads = torch.autograd.grad(value, params, retain_graph=k < len(values) - 1, allow_unused=True)
                    parts = [
                        (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)
                    ]
                    rows.append(torch.cat([t.to(torch.promote_types(t.dtype, torch.float32)) for t in parts]))
        return torch.stack(rows)

    def _padded(self, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The basis, with zeros where a parameter is new or has grown."""
        found = dict(self._basis)
        for name, p in named.items():
            old = self._basis.get(name)
            new = p.new_zeros(self.rank, *p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
            if old is not None:
                if old.shape[1:] == p.shape:
                    continue
                if old.dim() != new.dim() or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
                    raise ValueError(
                        f"{self._op}: parameter {name!r} has shape {tuple(p.shape)}; expected {tuple(old.shape[1:])} "
                        "as it was, or larger"
                    )
                new[tuple(slice(n) for n in old.shape)] = old
            found[name] = new
        return found

    def _flat(self, basis: dict[str, Tensor], named: dict[str, nn.Parameter]) -> Tensor:
        return torch.cat([basis[name].flatten(1) for name in named], 1)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take the stored directions out of ``.grad``.

        Raises
        ------
        ValueError
            If a parameter has become smaller.
        """
        if not self.rank:
            return
        named = {n: p for n, p in trainable_parameters(self._op, self.model).items() if p.grad is not None}
        basis = self._padded(named)
        for _ in range(2):
            parts = []
            for name, p in named.items():
                assert p.grad is not None
                parts.append(basis[name].flatten(1) @ p.grad.flatten().to(basis[name].dtype))
            total = torch.stack([t.double() for t in parts]).sum(0)
            for name, p in named.items():
                assert p.grad is not None
                p.grad -= (total.to(basis[name].dtype) @ basis[name].flatten(1)).reshape(p.shape).to(p.dtype)

    def _state(self) -> dict[str, Any]:
        return {"basis": self._basis, "generator": self._store.generator.get_state()}

    def _load(self, state: dict[str, Any]) -> None:
        every = dict(self.model.named_parameters())
        for name, t in state["basis"].items():
            fits = name in every and t.dim() == every[name].dim() + 1
            if not fits or any(a > b for a, b in zip(t.shape[1:], every[name].shape, strict=True)):
                raise ValueError(f"{self._op}: state_dict has {name!r} of shape {tuple(t.shape[1:])}, unlike the model")
        self._store.generator.set_state(state["generator"].cpu())
        self._basis = {name: t.to(every[name].device) for name, t in state["basis"].items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and its modules as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class GPM(ContinualMethod):
    r"""Gradient projection memory: a layer's weights change only for inputs that earlier tasks did not give.

    Parameters
    ----------
    model : torch.nn.Module
        Its `torch.nn.Linear` and ``Conv2d`` layers (of one group) are served; other layers learn freely.
    threshold : float or sequence of float
        Share of the inputs' energy to hold, in (0, 1]; one for each task, the last for all that follow. Default 0.97.
    exclude : sequence of str
        Names of layers that learn freely, such as the head of a single task.
    forward : callable, optional
        ``forward(model, inputs, tasks)``, as for `GEM`.

    Attributes
    ----------
    ranks : dict of str to int
        Directions held of each layer's inputs.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; if the model has no such layer.

    Notes
    -----
    With R a layer's inputs as columns (patches for a convolution; with a 1 appended where it has a bias, so that a bias
    is held as well) and M an orthonormal basis of what is held,

    .. math::
        \hat R = R - M M^\top R, \qquad
        \lVert R \rVert_F^2 - \lVert \hat R \rVert_F^2 + \lVert \hat R_k \rVert_F^2 \ge \epsilon \lVert R \rVert_F^2 ,

    the least k whose left singular vectors :math:`\hat U_k` join M, and :math:`\nabla W \leftarrow \nabla W - \nabla W
    M M^\top`. The singular vectors come from :math:`R R^\top`, summed in float64 over all of the task's data, so that
    no memory depends on their number. With a threshold of 1 directions below 1e-12 of the energy are left out.

    References
    ----------
    Saha, Garg and Roy, Gradient projection memory for continual learning, ICLR 2021, arXiv:2103.09762.
    """

    def __init__(
        self, model: nn.Module, threshold: float | Sequence[float] = 0.97, *, exclude: Sequence[str] = (),
        forward: Forward | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        values = [threshold] if isinstance(threshold, (int, float)) else list(threshold)
        if not values:
            raise ValueError(f"{self._op}: threshold is empty; expected one number at least")
        self.threshold = [check_number(self._op, "threshold", value, 0.0, 1.0) for value in values]
        if min(self.threshold) == 0:
            raise ValueError(f"{self._op}: threshold is 0; expected in (0, 1]")
        if isinstance(exclude, str):
            raise TypeError(f"{self._op}: exclude is {exclude!r}; expected a sequence of names, such as [{exclude!r}]")
        names = dict(model.named_modules())
        unknown = [name for name in exclude if name not in names]
        if unknown:
            raise ValueError(f"{self._op}: exclude has {unknown[0]!r}; expected names of the model's modules")
        self.exclude = frozenset(exclude)
        self._forward = forward or _plain_forward
        self._basis: dict[str, Tensor] = {}  # [inputs (+ 1), rank]
        self._layers()

    @property
    def ranks(self) -> dict[str, int]:
        """Directions held, by layer."""
        return {name: m.shape[1] for name, m in self._basis.items()}

    def _layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        found: dict[str, nn.Linear | nn.Conv2d] = {}
        for name, module in self.model.named_modules():
            if name in self.exclude or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                raise ValueError(f"{self._op}: layer {name!r} has {module.groups} groups; expected 1, or it in exclude")
            found[name] = module
        if not found:
            raise ValueError(f"{self._op}: model has no linear layer or convolution")
        return found

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Hold the directions of the inputs that the task gave to each layer.

        Parameters
        ----------
        loader : iterable of (inputs, ...)
            Labels are not used.

        Raises
        ------
        TypeError, ValueError
            If it is none, gives no samples, or some layer an input that is not finite; nothing has changed then, and
            the model has no hooks left.
        """
        data, layers = check_loader(self._op, loader), self._layers()
        grams: dict[str, Tensor] = {}
        handles = []
        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(_adder(grams, name)))
            with _evaluating(self.model), torch.no_grad():
                for batch in data:
                    x, _ = split_batch(self._op, batch)
                    if len(x):
                        self._forward(self.model, x, torch.full((len(x),), self.tasks, device=x.device))
        finally:
            for handle in handles:
                handle.remove()
        if not grams:
            raise ValueError(f"{self._op}: loader gives no samples to any layer; expected one at least")
        epsilon = self.threshold[min(self.tasks, len(self.threshold) - 1)]
        basis = dict(self._basis)
        for name, gram in grams.items():
            if not bool(gram.isfinite().all()):
                raise ValueError(f"{self._op}: inputs of layer {name!r} have a NaN or an infinity")
            basis[name] = self._extended(name, gram, epsilon)
        self._basis = basis
        super().after_task()

    def _extended(self, name: str, gram: Tensor, epsilon: float) -> Tensor:
        old = self._basis.get(name, gram.new_zeros(len(gram), 0)).to(gram)
        self._check(name, old, len(gram))
        away = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - old @ old.T
        values, vectors = torch.linalg.eigh(away @ gram @ away)
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
        total = gram.trace()
        held = total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])
        # rounding must not ask for directions that the inputs do not have
        wanted = total * min(epsilon, 1.0 - 1e-12)
        k = int((held < wanted).sum())
        k = min(k, int((values > 1e-12 * total).sum()), len(gram) - old.shape[1])
        joined = torch.cat([old, vectors[:, :k]], 1)
        return torch.linalg.qr(joined)[0] if k else joined

    def _check(self, name: str, basis: Tensor, inputs: int) -> None:
        if len(basis) != inputs:
            raise ValueError(
                f"{self._op}: layer {name!r} has {inputs} inputs, its bias included; expected {len(basis)} as before"
            )

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take what is held out of ``.grad`` of the layers' weights and biases.

        Raises
        ------
        RuntimeError
            If a layer that is held is gone.
        ValueError
            If its number of inputs changed.
        """
        layers = self._layers()
        for name, basis in self._basis.items():
            if name not in layers:
                raise RuntimeError(f"{self._op}: model has no layer {name!r} any more; expected its old names")
            layer = layers[name]
            weight, bias = layer.weight.grad, None if layer.bias is None else layer.bias.grad
            self._check(name, basis, layer.weight[0].numel() + (layer.bias is not None))
            if not basis.shape[1] or (weight is None and bias is None):
                continue
            rows = layer.weight.shape[0]
            parts = [basis.new_zeros(rows, layer.weight[0].numel()) if weight is None else weight.reshape(rows, -1)]
            if layer.bias is not None:
                parts.append(basis.new_zeros(rows, 1) if bias is None else bias[:, None])
            g = torch.cat([t.to(basis.dtype) for t in parts], 1)
            g -= (g @ basis) @ basis.T
            width = layer.weight[0].numel()
            if weight is not None:
                weight.copy_(g[:, :width].reshape(weight.shape))
            if bias is not None:
                bias.copy_(g[:, width])

    def _state(self) -> dict[str, Any]:
        return {"basis": self._basis}

    def _load(self, state: dict[str, Any]) -> None:
        layers = self._layers()
        for name, basis in state["basis"].items():
            if name not in layers:
                raise ValueError(f"{self._op}: state_dict has layer {name!r}, which the model has not")
            self._check(name, basis, layers[name].weight[0].numel() + (layers[name].bias is not None))
        self._basis = {name: t.to(layers[name].weight.device) for name, t in state["basis"].items()}


def _adder(grams: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds :math:`R R^T` of a layer's input to `grams`."""

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if isinstance(module, nn.Conv2d):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            if any(module._reversed_padding_repeated_twice):
                x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            x = functional.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride).mT
        rows = x.reshape(-1, x.shape[-1]).to(torch.float64)
        if module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        gram = rows.T @ rows
        grams[name] = grams[name] + gram if name in grams else gram

    return add
