r"""AdaLoRA: an update in the form of a singular value decomposition, and a budget of rank that training distributes.

.. math:: y = W x + b + \gamma \, P \Lambda Q \, x, \qquad \gamma = \alpha / r .

P (``lora_B``, ``[out, r]``), Q (``lora_A``, ``[r, in]``) and the diagonal :math:`\Lambda` (``lora_E``, ``[r, 1]``, zero
at first) are trained, P and Q with a penalty that keeps them near orthogonal,

.. math:: R = \sum_k \| P_k^T P_k - I \|_F^2 + \| Q_k Q_k^T - I \|_F^2 .

After each step the sensitivity of every entry w of the three and how much it varies are averaged,

.. math::
    I = | w \, \nabla_w L |, \qquad \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \qquad
    \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) \, | I - \bar I |, \qquad s(w) = \bar I \, \bar U ,

and the i-th triplet of layer k has the score

.. math::
    S_{k,i} = s(\lambda_{k,i}) + \tfrac{1}{d_\mathrm{out}} \sum_j s(P_{k,ji})
    + \tfrac{1}{d_\mathrm{in}} \sum_j s(Q_{k,ij}) .

Of all triplets of the model those with the b(t) highest scores keep their :math:`\lambda`; that of the others is set
to zero. With n layers the budget falls from :math:`b_0 = n r` to :math:`b_T = n r_T`, by

.. math:: b(t) = b_T + (b_0 - b_T) \Big( 1 - \frac{t - t_i}{T - t_i - t_f} \Big)^3 \qquad (t_i < t < T - t_f) .

Qingru Zhang et al. *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning.* ICLR 2023,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._tuner import TunerConfig
from tlkernels.nn.lora import LoRALinear
from tlkernels.ops import lora as ops

__all__ = ["AdaLoRAConfig", "AdaLoRALinear", "RankAllocator", "orthogonality_penalty"]


class AdaLoRALinear(LoRALinear):
    r"""A frozen linear layer with the update :math:`\gamma P \Lambda Q`.

    Parameters
    ----------
    base_layer : torch.nn.Module
        As for `tlkernels.nn.lora.LoRALinear`, dense or in 4 bits.
    rank : int
        r at first.
    lora_alpha : float
        :math:`\gamma` is ``lora_alpha / rank``, and stays so when triplets are dropped.
    dropout, dtype
        As for `LoRALinear`.

    Attributes
    ----------
    lora_A : torch.nn.Parameter
        Q: ``[rank, in_features]``, normal with standard deviation 0.02 at first.
    lora_E : torch.nn.Parameter
        The diagonal of :math:`\Lambda`: ``[rank, 1]``, zeros at first.
    lora_B : torch.nn.Parameter
        P: ``[out_features, rank]``, as `lora_A` at first.

    References
    ----------
    Zhang et al., AdaLoRA, ICLR 2023, arXiv:2303.10512.
    """

    lora_E: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, rank: int = 12, lora_alpha: float = 12.0, *, dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base_layer, rank, lora_alpha, dropout=dropout, dtype=dtype)
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(rank, 1))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def _as_matrices(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        return super()._as_matrices(lora_a * self.lora_E.detach(), lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``; see `tlkernels.ops.lora_linear`."""
        if self.merged:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        a = self.lora_A * self.lora_E
        return ops.lora_linear(x, self._base_weight(), self.bias, a, self.lora_B, self.scaling, dropout=dropout)


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(TunerConfig):
    """What AdaLoRA does with a model; a `RankAllocator` distributes the budget.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`: linear layers.
    init_r : int
        The rank of every layer at first: 1.5 times the average in the end is usual.
    lora_alpha : float
        The update's scaling is ``lora_alpha / init_r``.
    lora_dropout : float
        Of the update's input.

    References
    ----------
    Zhang et al., AdaLoRA, ICLR 2023, arXiv:2303.10512.
    """

    init_r: int = 12
    lora_alpha: float = 12.0
    lora_dropout: float = 0.0

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        if self.init_r < 1:
            self._fail("init_r", "1 or more")
        if not 0.0 <= self.lora_dropout < 1.0:
            self._fail("lora_dropout", "0 <= lora_dropout < 1")

    def wrap(self, name: str, module: nn.Module) -> AdaLoRALinear:
        """Build the `AdaLoRALinear` for a linear layer.

        Raises
        ------
        TypeError, ValueError
            If it is none, or smaller than the rank.
        """
        try:
            return AdaLoRALinear(module, self.init_r, self.lora_alpha, dropout=self.lora_dropout)
        except (TypeError, ValueError) as error:
            raise type(error)(f"AdaLoRAConfig: {name}: {error}") from error


def _layers(owner: str, model: nn.Module) -> dict[str, AdaLoRALinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaLoRALinear)}
    if not layers:
        raise ValueError(f"{owner}: model has no AdaLoRA layers; expected a model with an AdaLoRAConfig applied")
    return layers


def orthogonality_penalty(model: nn.Module, *, squared: bool = True) -> Tensor:
    r"""How far the factors of a model are from orthogonal, to be added to the loss with a small weight.

    Parameters
    ----------
    model : torch.nn.Module
        With AdaLoRA layers.
    squared : bool
        The paper's :math:`\sum_k \|P_k^T P_k - I\|_F^2 + \|Q_k Q_k^T - I\|_F^2`. False: the mean of the norms, not
        squared, over all factors, which is what the authors' code and the PEFT library have.

    Returns
    -------
    Tensor
        A scalar of the factors' dtype, differentiable.

    Raises
    ------
    ValueError
        If the model has no such layers.

    References
    ----------
    Zhang et al., AdaLoRA, ICLR 2023, arXiv:2303.10512, equation 4.
    """
    factors = [f for layer in _layers("orthogonality_penalty", model).values() for f in (layer.lora_A, layer.lora_B.T)]
    grams = [f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device) for f in factors]
    norms = torch.stack([torch.linalg.matrix_norm(g).to(factors[0]) for g in grams])
    return norms.square().sum() if squared else norms.mean()


class RankAllocator:
    """Distribute a budget of rank over the AdaLoRA layers of a model, step by step.

    Call `step` in every training step after ``optimizer.step()`` and before ``optimizer.zero_grad()``.

    Parameters
    ----------
    model : torch.nn.Module
        With AdaLoRA layers.
    target_r : int
        The average rank in the end, 1 to the initial one.
    total_steps : int
        T.
    tinit : int
        Steps before the budget begins to fall.
    tfinal : int
        Last steps, in which the distribution stays. ``tinit + tfinal < total_steps``.
    deltaT : int
        Steps between two distributions.
    beta1, beta2 : float
        Of the averages, in (0, 1).

    Attributes
    ----------
    step_count : int
        How often `step` was called.

    Raises
    ------
    ValueError
        If the model has no such layers, or an argument is out of range.

    References
    ----------
    Zhang et al., AdaLoRA, ICLR 2023, arXiv:2303.10512, algorithm 1.
    """

    def __init__(
        self, model: nn.Module, *, target_r: int, total_steps: int, tinit: int = 0, tfinal: int = 0, deltaT: int = 1,
        beta1: float = 0.85, beta2: float = 0.85,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        self._layers = _layers(name, model)
        smallest = min(layer.rank for layer in self._layers.values())
        if not 1 <= target_r <= smallest:
            raise ValueError(f"{name}: target_r is {target_r}; expected 1 to {smallest}, the initial rank")
        if tinit < 0 or tfinal < 0 or tinit + tfinal >= total_steps:
            raise ValueError(
                f"{name}: tinit, tfinal and total_steps are {tinit}, {tfinal} and {total_steps}; expected tinit >= 0, "
                "tfinal >= 0 and tinit + tfinal < total_steps"
            )
        if deltaT < 1:
            raise ValueError(f"{name}: deltaT is {deltaT}; expected 1 or more")
        for argument, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name}: {argument} is {beta}; expected 0 < {argument} < 1")
        self.total_steps, self.tinit, self.tfinal, self.deltaT = total_steps, tinit, tfinal, deltaT
        self.beta1, self.beta2 = beta1, beta2
        self.initial_budget = sum(layer.rank for layer in self._layers.values())
        self.target_budget = target_r * len(self._layers)
        self.step_count = 0
        self._sensitivity = [torch.zeros_like(p) for p in self._parameters()]
        self._uncertainty = [torch.zeros_like(p) for p in self._parameters()]
        self._kept: dict[str, Tensor] = {
            layer: torch.ones(module.rank, dtype=torch.bool) for layer, module in self._layers.items()
        }

    def _parameters(self) -> list[nn.Parameter]:
        return [p for layer in self._layers.values() for p in (layer.lora_A, layer.lora_E, layer.lora_B)]

    def budget(self, step: int) -> int:
        """The number of triplets that are kept at a step, b(t) rounded down; steps count from 1."""
        if step <= self.tinit:
            return self.initial_budget
        if step > self.total_steps - self.tfinal:
            return self.target_budget
        rest = 1 - (step - self.tinit) / (self.total_steps - self.tfinal - self.tinit)
        return int((self.initial_budget - self.target_budget) * rest**3 + self.target_budget)

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer keeps at present, by the layer's name."""
        return {name: int(kept.sum()) for name, kept in self._kept.items()}

    @torch.no_grad()
    def step(self) -> int:
        """Take the present gradients into the averages and, where it is time for it, distribute the budget anew.

        Returns
        -------
        int
            The budget.

        Raises
        ------
        RuntimeError
            If a factor has no gradient.
        """
        step, last = self.step_count + 1, self.total_steps - self.tfinal
        if step < last:
            self._update()
        self.step_count = step
        budget = self.budget(step)
        due = self.tinit < step < last and step % self.deltaT == 0
        if due or step == last:
            self._distribute(budget)
        if due or step >= last:
            self._mask()
        return budget

    def _update(self) -> None:
        parameters = self._parameters()
        grads = [p.grad for p in parameters if p.grad is not None]
        if len(grads) < len(parameters):
            raise RuntimeError("RankAllocator.step: a factor has no gradient; expected a call after backward()")
        now = torch._foreach_mul(list(parameters), grads)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self._sensitivity, now, 1 - self.beta1)
        torch._foreach_sub_(now, self._sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self._uncertainty, now, 1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """The score of every triplet, ``[rank]``, by the layer's name."""
        products = iter(torch._foreach_mul(self._sensitivity, self._uncertainty))
        return {
            name: next(products).mean(1) + next(products).squeeze(1) + next(products).mean(0) for name in self._layers
        }

    def _distribute(self, budget: int) -> None:
        scores = self.scores()
        device = next(iter(scores.values())).device  # a model may be spread over several
        whole = torch.cat([score.to(device) for score in scores.values()])
        kept = torch.zeros_like(whole, dtype=torch.bool)
        kept[torch.topk(whole, budget).indices] = True
        sizes = [len(score) for score in scores.values()]
        self._kept = {name: part.cpu() for name, part in zip(scores, kept.split(sizes), strict=True)}

    def _mask(self) -> None:
        for name, layer in self._layers.items():
            layer.lora_E.masked_fill_(~self._kept[name].to(layer.lora_E.device)[:, None], 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What the allocator knows, to go on later."""
        return {
            "step_count": self.step_count,
            "sensitivity": list(self._sensitivity),
            "uncertainty": list(self._uncertainty),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an allocator of a model of the same form was saved.

        Raises
        ------
        ValueError
            If the layers or their sizes are others; nothing has changed then.
        """
        sizes = [t.shape for t in self._sensitivity]
        same = all([t.shape for t in state[name]] == sizes for name in ("sensitivity", "uncertainty"))
        if list(state["kept"]) != list(self._layers) or not same:
            raise ValueError("RankAllocator.load_state_dict: the state is of other layers; expected those of the model")
        for own, name in ((self._sensitivity, "sensitivity"), (self._uncertainty, "uncertainty")):
            torch._foreach_copy_(own, [new.to(old.device) for new, old in zip(state[name], own, strict=True)])
        self._kept = {name: kept.clone() for name, kept in state["kept"].items()}
        self.step_count = int(state["step_count"])
