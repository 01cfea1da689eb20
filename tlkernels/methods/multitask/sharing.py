r"""Architectures that share between tasks: one trunk, stitched columns, attention masks on a trunk, gated experts.

Plain modules over parts that the user gives. All are called with one input and return ``{task: output}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CGC", "MTAN", "CrossStitch", "HardSharing", "MMoE", "SoftSharing"]

Factory = Callable[[], nn.Module]


def _heads(op: str, heads: Mapping[str, nn.Module]) -> nn.ModuleDict:
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"{op}: heads is {type(heads).__name__}; expected a mapping of at least one task to a module")
    return nn.ModuleDict(heads)


def _count(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}; expected a positive number")
    return value


class HardSharing(nn.Module):
    """One trunk, a head for each task.

    Parameters
    ----------
    trunk : nn.Module
    heads : mapping of str to nn.Module

    Raises
    ------
    ValueError
        If there is no head.

    References
    ----------
    Caruana, Multitask learning, Machine Learning 1997.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, _heads("HardSharing", heads)

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """What `backward` shares."""
        return list(self.trunk.parameters())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        z = self.trunk(x)
        return {name: head(z) for name, head in self.heads.items()}


class SoftSharing(nn.Module):
    r"""A network for each task, kept alike by a penalty: :math:`\lambda \sum_{i<j} \|\theta_i - \theta_j\|^2`.

    Parameters
    ----------
    trunk : callable
        Makes a task's own trunk; all of the same shapes.
    heads : mapping of str to nn.Module
    strength : float
        :math:`\lambda`.

    Raises
    ------
    ValueError
        If there is no head or `strength` is negative.

    References
    ----------
    Duong et al., Low resource dependency parsing, ACL 2015.
    """

    def __init__(self, trunk: Factory, heads: Mapping[str, nn.Module], *, strength: float = 1e-3) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"SoftSharing: strength is {strength}; expected >= 0")
        self.heads, self.strength = _heads("SoftSharing", heads), strength
        self.trunks = nn.ModuleDict({name: trunk() for name in heads})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        return {name: head(self.trunks[name](x)) for name, head in self.heads.items()}

    def penalty(self) -> Tensor:
        r"""The term to add to the loss.

        By :math:`\sum_{i<j} \|\theta_i - \theta_j\|^2 = T \sum_i \|\theta_i - \bar\theta\|^2`: linear in the tasks.
        """
        rows = [list(trunk.parameters()) for trunk in self.trunks.values()]
        total = torch.zeros((), device=rows[0][0].device, dtype=rows[0][0].dtype)
        for group in zip(*rows, strict=True):
            stack = torch.stack(list(group))
            total = total + len(group) * (stack - stack.mean(0)).square().sum()
        return self.strength * total


class CrossStitch(nn.Module):
    r"""A column for each task; activations are mixed after every block: :math:`[x_A; x_B] \gets \alpha [x_A; x_B]`.

    Parameters
    ----------
    blocks : sequence of callables
        Each makes a task's own block at that depth.
    heads : mapping of str to nn.Module
    own : float
        First weight of a task's own activation, the rest being shared out evenly; 1: separate networks.

    Raises
    ------
    ValueError
        If there is no block or no head.

    References
    ----------
    Misra et al., Cross-stitch networks for multi-task learning, CVPR 2016, arXiv:1604.03539.
    """

    def __init__(self, blocks: Sequence[Factory], heads: Mapping[str, nn.Module], *, own: float = 0.9) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("CrossStitch: blocks is empty; expected at least one")
        self.heads = _heads("CrossStitch", heads)
        self.columns = nn.ModuleDict({name: nn.ModuleList([block() for block in blocks]) for name in heads})
        tasks = len(heads)
        first = torch.full((tasks, tasks), (1 - own) / max(1, tasks - 1)).fill_diagonal_(own if tasks > 1 else 1.0)
        self.stitches = nn.ParameterList([first.clone() for _ in blocks])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        rows = [x] * len(self.heads)
        for depth, stitch in enumerate(self.stitches):
            columns: Any = self.columns.values()
            stacked = torch.stack([c[depth](z) for c, z in zip(columns, rows, strict=True)])
            rows = list(torch.tensordot(stitch.to(stacked), stacked, dims=1).unbind())
        return {name: head(z) for (name, head), z in zip(self.heads.items(), rows, strict=True)}


class MTAN(nn.Module):
    r"""A shared trunk of blocks, and for each task masks that pick features from it.

    Parameters
    ----------
    blocks : sequence of nn.Module
        The shared blocks, one after the other.
    attention : callable
        ``attention(depth)`` makes a task's module for that depth: it gets the shared features of this depth with the
        task's own of the depth before (concatenated along dimension 1; the shared ones alone at depth 0) and returns
        the mask's logits, of the shared features' shape.
    carry : callable
        ``carry(depth)`` makes the module that takes a task's masked features to the next depth's size.
    heads : mapping of str to nn.Module

    Raises
    ------
    ValueError
        If there is no block or no head; on a call, if a mask has another shape than the features.

    Notes
    -----
    :math:`\hat a_t^{(j)} = \sigma(g_t(p^{(j)}, c_t^{(j-1)})) \odot p^{(j)}`,
    :math:`c_t^{(j)} = f_t(\hat a_t^{(j)})`; a head gets the last :math:`\hat a`.

    References
    ----------
    Liu, Johns & Davison, End-to-end multi-task learning with attention, CVPR 2019, arXiv:1803.10704.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], attention: Callable[[int], nn.Module], carry: Callable[[int], nn.Module],
        heads: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        if not blocks:
            raise ValueError("MTAN: blocks is empty; expected at least one")
        self.blocks, self.heads = nn.ModuleList(blocks), _heads("MTAN", heads)
        depths = range(len(blocks))
        self.attention = nn.ModuleDict({name: nn.ModuleList([attention(d) for d in depths]) for name in heads})
        self.carry = nn.ModuleDict({name: nn.ModuleList([carry(d) for d in depths[:-1]]) for name in heads})

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """What `backward` shares."""
        return list(self.blocks.parameters())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        out = {}
        attention: Any = self.attention
        carry: Any = self.carry
        for name, head in self.heads.items():
            own: Tensor | None = None
            for depth, p in enumerate(features):
                logits = attention[name][depth](p if own is None else torch.cat([p, own], 1))
                if logits.shape != p.shape:
                    want = tuple(p.shape)
                    raise ValueError(f"MTAN: attention gives {tuple(logits.shape)}; expected {want}, the features")
                masked = logits.sigmoid() * p
                if depth + 1 < len(features):
                    own = carry[name][depth](masked)
            out[name] = head(masked)
        return out


class MMoE(nn.Module):
    r"""Experts that all tasks share, weighted by a gate of each task: :math:`\sum_k \mathrm{softmax}(W_t x)_k f_k(x)`.

    Parameters
    ----------
    expert : callable
        Makes an expert: ``[N, features] -> [N, hidden]``.
    experts : int
    features : int
        Of the input, which the gates look at.
    heads : mapping of str to nn.Module

    Raises
    ------
    ValueError
        If there is no head or a number is not positive.

    References
    ----------
    Ma et al., Modeling task relationships in multi-task learning with multi-gate mixture-of-experts, KDD 2018.
    """

    def __init__(self, expert: Factory, experts: int, features: int, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        _count("MMoE", "experts", experts)
        _count("MMoE", "features", features)
        self.heads = _heads("MMoE", heads)
        self.experts = nn.ModuleList([expert() for _ in range(experts)])
        self.gates = nn.ModuleDict({name: nn.Linear(features, experts, bias=False) for name in heads})

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """What `backward` shares."""
        return list(self.experts.parameters())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        stacked = torch.stack([expert(x) for expert in self.experts], 1)
        return {
            name: head(torch.einsum("nk,nkh->nh", self.gates[name](x).softmax(1), stacked))
            for name, head in self.heads.items()
        }


class CGC(nn.Module):
    r"""Customized gate control: experts of all tasks and experts of one; several layers of it are PLE.

    Parameters
    ----------
    layers : sequence of callables
        Each makes an expert of that layer.
    shared, own : int
        Experts of all tasks, and of each task, in a layer.
    features : sequence of ints
        Size of each layer's input, which its gates look at.
    heads : mapping of str to nn.Module

    Raises
    ------
    ValueError
        If there is no head or no layer, lengths differ, or a number is not positive.

    Notes
    -----
    A task's gate weighs its own and the shared experts; in all layers but the last a further gate over all experts
    makes the next layer's shared input.

    References
    ----------
    Tang et al., Progressive layered extraction (PLE), RecSys 2020.
    """

    def __init__(
        self, layers: Sequence[Factory], features: Sequence[int], heads: Mapping[str, nn.Module], *, shared: int = 1,
        own: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if not layers or len(layers) != len(features):
            counts = f"layers has {len(layers)}, features {len(features)}"
            raise ValueError(f"CGC: {counts}; expected one size for each layer")
        _count("CGC", "shared", shared)
        _count("CGC", "own", own)
        self.heads = _heads("CGC", heads)
        tasks = list(heads)
        self.shared = nn.ModuleList([nn.ModuleList([make() for _ in range(shared)]) for make in layers])
        self.own = nn.ModuleList([
            nn.ModuleDict({t: nn.ModuleList([make() for _ in range(own)]) for t in tasks}) for make in layers
        ])  # fmt: skip
        self.gates = nn.ModuleList([
            nn.ModuleDict({t: nn.Linear(size, own + shared, bias=False) for t in tasks}) for size in features
        ])  # fmt: skip
        self.shared_gates = nn.ModuleList([
            nn.Linear(size, own * len(tasks) + shared, bias=False) for size in list(features)[:-1]
        ])  # fmt: skip

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """What `backward` shares: the experts and gates that more than one task reaches."""
        return [*self.shared.parameters(), *self.shared_gates.parameters()]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's output."""
        inputs, common = dict.fromkeys(self.heads, x), x
        layers: Any = zip(self.shared, self.own, self.gates, strict=True)
        for depth, (shared, own, gates) in enumerate(layers):
            of_all = [expert(common) for expert in shared]
            of_task = {t: [expert(inputs[t]) for expert in own[t]] for t in self.heads}
            following = {t: _mix(gates[t](inputs[t]), [*of_task[t], *of_all]) for t in self.heads}
            if depth < len(self.shared_gates):
                every = [z for t in self.heads for z in of_task[t]]
                common = _mix(self.shared_gates[depth](common), [*every, *of_all])
            inputs = following
        return {name: head(inputs[name]) for name, head in self.heads.items()}


def _mix(logits: Tensor, rows: Sequence[Tensor]) -> Tensor:
    return torch.einsum("nk,nkh->nh", logits.softmax(1), torch.stack(list(rows), 1))
