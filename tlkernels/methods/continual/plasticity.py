r"""Continual backprop: units of little use give way to fresh ones, so that a network stays able to learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.continual._base import ContinualMethod, check_number

__all__ = ["ContinualBackprop"]

_UTILITIES = ("contribution", "mean_corrected", "adaptation")
_Layer = nn.Linear | nn.Conv2d


class ContinualBackprop(ContinualMethod):
    r"""Resets a small share of the hidden units, those of the least utility, after each step.

    Parameters
    ----------
    model : torch.nn.Module
    units : sequence of (str, str, str)
        Of each hidden layer the names of the layer that computes it, of its activation, and of the layer that reads it:
        linear layers and ungrouped 2-D convolutions. A linear layer may read flattened channels.
    optimizer : torch.optim.Optimizer, optional
        Whose state of the reset weights is zeroed.
    rate : float
        :math:`\rho` in [0, 1], the share of the mature units replaced in a step. Default 1e-4.
    maturity : int
        m >= 0: units of more than m steps are eligible. Default 100.
    decay : float
        :math:`\eta` in [0, 1), of the running utility. Default 0.99.
    utility : str
        ``"contribution"`` (default, the paper of 2024), ``"mean_corrected"`` or ``"adaptation"`` (that of 2021).
    generator : torch.Generator, optional
        CPU. For the new weights; seed 0 by default.

    Attributes
    ----------
    ages : list of Tensor
        ``[units]``, int64: steps since a unit's reset.
    replaced : int
        Units reset so far.

    Raises
    ------
    TypeError, ValueError
        If a name is no such layer, widths do not fit, or an argument is out of its range.

    Notes
    -----
    With :math:`h` the activations, :math:`w^{out}` the weights that read the unit i and :math:`w^{in}` those that
    compute it, the utility is :math:`\hat u_i = u_i / (1 - \eta^{a_i})`, :math:`u_i \leftarrow \eta u_i + (1 - \eta)
    y_i`, with the instantaneous

    .. math:: y_i = \overline{|h_i|} \sum_k |w^{out}_{ki}|, \qquad
        y_i = \overline{|h_i - \hat f_i|} \sum_k |w^{out}_{ki}|, \qquad
        y_i = \frac{\overline{|h_i - \hat f_i|} \sum_k |w^{out}_{ki}|}{\sum_j |w^{in}_{ij}|}

    of the three kinds. Bars are means over the batch (and positions); :math:`f_i` is the running mean of
    :math:`\overline{h_i}` with the same decay, :math:`\hat f_i = f_i / (1 - \eta^{a_i})`, this step's included. The
    share :math:`\rho` times the number of eligible units adds up from step to step, and as many units are reset as it
    has whole ones. A reset draws the incoming weights as PyTorch initializes the layer, sets the bias, the outgoing
    weights, age and utility to 0, and, for the two mean-corrected kinds, adds :math:`w^{out}_{ki} \hat f_i` to the
    reading layer's bias first (for a convolution, summed over the kernel).

    Call ``after_step()`` once after each step: it uses the activations of the last forward pass with gradients. States
    of an optimizer that have a weight's shape are zeroed where it is reset; step counts are shared, and stay.

    References
    ----------
    Dohare, Sutton, Mahmood, Continual Backprop, 2021, arXiv:2108.06325. Dohare et al., Loss of Plasticity in Deep
    Continual Learning, Nature 632, 2024.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[tuple[str, str, str]], optimizer: torch.optim.Optimizer | None = None,
        *, rate: float = 1e-4, maturity: int = 100, decay: float = 0.99, utility: str = "contribution",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        op = self._op
        self.rate = check_number(op, "rate", rate, 0.0, 1.0)
        self.decay = check_number(op, "decay", decay, 0.0, 1.0)
        if self.decay == 1:
            raise ValueError(f"{op}: decay is {decay}; expected less than 1")
        if isinstance(maturity, bool) or not isinstance(maturity, int) or maturity < 0:
            raise ValueError(f"{op}: maturity is {maturity!r}; expected a whole number >= 0")
        if utility not in _UTILITIES:
            raise ValueError(f"{op}: utility is {utility!r}; expected one of {', '.join(_UTILITIES)}")
        self.maturity, self.utility, self.optimizer = maturity, utility, optimizer
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        modules = dict(model.named_modules())
        if not len(units):
            raise ValueError(f"{op}: units is empty; expected the names of one hidden layer at least")
        self._parts: list[tuple[_Layer, _Layer]] = []
        hooked = []
        for names in units:
            if isinstance(names, str) or len(names) != 3:
                raise ValueError(f"{op}: units has {names!r}; expected (layer, activation, next layer)")
            first, activation, second = (modules.get(name) for name in names)
            for name, layer in ((names[0], first), (names[2], second)):
                if not isinstance(layer, _Layer) or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
                    raise ValueError(f"{op}: units has {name!r}; expected a Linear or an ungrouped Conv2d of the model")
            if activation is None:
                raise ValueError(f"{op}: units has {names[1]!r}, which is no module of the model")
            assert isinstance(first, _Layer) and isinstance(second, _Layer)
            if second.weight.shape[1] % len(first.weight):
                inputs, outs = second.weight.shape[1], len(first.weight)
                raise ValueError(f"{op}: layer {names[2]!r} has {inputs} inputs; expected a multiple of {outs} units")
            self._parts.append((first, second))
            hooked.append(activation)
        self._seen: list[Tensor | None] = [None] * len(hooked)
        like = [first.weight for first, _ in self._parts]
        self.ages = [torch.zeros(len(w), dtype=torch.int64, device=w.device) for w in like]
        self._use = [torch.zeros_like(w[:, 0].flatten(1)[:, 0] if w.dim() > 2 else w[:, 0]) for w in like]
        self._mean = [torch.zeros_like(u) for u in self._use]
        self._due = [0.0] * len(like)
        self.replaced = 0
        for i, module in enumerate(hooked):
            module.register_forward_hook(self._watching(i))

    def _watching(self, i: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def watch(module: nn.Module, args: Any, out: Tensor) -> None:
            if torch.is_grad_enabled():  # a pass for evaluation is no step
                self._seen[i] = out.detach()

        return watch

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the utilities and reset the units that are due.

        Raises
        ------
        RuntimeError
            If no forward pass with gradients came before.
        ValueError
            If activations are not finite, or have other than the layer's units; nothing has changed then.
        """
        rows: list[Tensor] = []
        for (first, _), seen in zip(self._parts, self._seen, strict=True):
            if seen is None:
                raise RuntimeError(f"{self._op}: after_step: no activations seen; expected a forward pass before")
            dim = 1 if isinstance(first, nn.Conv2d) else seen.dim() - 1
            if seen.shape[dim] != len(first.weight) or not seen.numel():
                shape = tuple(seen.shape)
                raise ValueError(f"{self._op}: activations have shape {shape}; expected {len(first.weight)} units")
            if not seen.isfinite().all():
                raise ValueError(f"{self._op}: activations are not finite; expected finite ones")
            rows.append(seen.movedim(dim, 0).flatten(1).to(first.weight.dtype))
        for i, h in enumerate(rows):
            self._update(i, h)
            self._reset(i)
        self._seen = [None] * len(rows)

    def _outgoing(self, i: int) -> Tensor:
        """The weights that read the units, ``[outputs, units, rest]``, a view."""
        first, second = self._parts[i]
        return second.weight.detach().view(len(second.weight), len(first.weight), -1)

    def _corrected(self, i: int, running: Tensor) -> Tensor:
        return running / (1 - self.decay ** self.ages[i].clamp(min=1).to(running.dtype))

    def _update(self, i: int, h: Tensor) -> None:
        self.ages[i] += 1
        self._mean[i].mul_(self.decay).add_(h.mean(1), alpha=1 - self.decay)
        if self.utility != "contribution":
            h = h - self._corrected(i, self._mean[i])[:, None]
        y = h.abs().mean(1) * self._outgoing(i).abs().sum((0, 2))
        if self.utility == "adaptation":
            incoming = self._parts[i][0].weight.abs().flatten(1).sum(1)
            y = y / incoming.clamp(min=torch.finfo(y.dtype).tiny)
        self._use[i].mul_(self.decay).add_(y, alpha=1 - self.decay)

    def utilities(self) -> list[Tensor]:
        """Return the utilities ``[units]`` of each hidden layer, corrected for the start."""
        return [self._corrected(i, u) for i, u in enumerate(self._use)]

    def _reset(self, i: int) -> None:
        eligible = (self.ages[i] > self.maturity).nonzero().squeeze(1)
        self._due[i] += self.rate * len(eligible)
        count = min(int(self._due[i]), len(eligible))
        if not count:
            return
        self._due[i] -= count
        self.replaced += count
        order = self.utilities()[i][eligible].sort(stable=True).indices
        gone = eligible[order[:count]]
        first, second = self._parts[i]
        outgoing = self._outgoing(i)
        if self.utility != "contribution" and second.bias is not None:
            # what the unit gave on average goes to the bias, so that the outputs move little
            mean = self._corrected(i, self._mean[i])[gone]
            second.bias.add_((outgoing[:, gone] * mean[:, None]).sum((1, 2)))
        drawn = torch.rand((count, *first.weight.shape[1:]), generator=self.generator, dtype=torch.float64)
        bound = 1 / math.sqrt(first.weight[0].numel())
        first.weight[gone] = ((2 * drawn - 1) * bound).to(first.weight)
        outgoing[:, gone] = 0
        if first.bias is not None:
            first.bias[gone] = 0
        self.ages[i][gone] = 0
        self._use[i][gone] = 0
        self._mean[i][gone] = 0
        self._forget(i, gone)

    def _forget(self, i: int, gone: Tensor) -> None:
        if self.optimizer is None:
            return
        first, second = self._parts[i]
        for p in (first.weight, first.bias, second.weight):
            for t in self.optimizer.state.get(p, {}).values() if p is not None else ():
                if p is not None and isinstance(t, Tensor) and t.shape == p.shape and t.dim():
                    if p is second.weight:
                        t.view(len(p), len(first.weight), -1)[:, gone] = 0
                    else:
                        t[gone] = 0

    def _state(self) -> dict[str, Any]:
        return {"ages": self.ages, "utility": self._use, "mean": self._mean, "due": list(self._due),
                "replaced": self.replaced, "generator": self.generator.get_state()}  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        if [len(a) for a in state["ages"]] != [len(a) for a in self.ages]:
            raise ValueError(f"{self._op}: ages of state_dict are of other layers; expected those of the model")
        self.generator.set_state(state["generator"])
        self.ages, self._use, self._mean = state["ages"], state["utility"], state["mean"]
        self._due, self.replaced = state["due"], state["replaced"]
