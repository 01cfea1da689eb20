r"""SwAV: predict one view's cluster assignment from another view.

With scores :math:`S = Z C^T` of unit features and unit prototypes, codes Q are the assignment that spreads a batch
evenly over the prototypes,

.. math:: Q = \arg\max_Q \, \langle Q, S \rangle + \epsilon H(Q), \qquad
    \sum_k Q_{bk} = \frac1B, \quad \sum_b Q_{bk} = \frac1K

by a few iterations of Sinkhorn and Knopp, here on log Q, which does not overflow at any :math:`\epsilon`.

Caron et al. *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.* NeurIPS 2020,
arXiv:2006.09882.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tlkernels.methods._common import check_tensor, normalized, wide
from tlkernels.methods.pretrain._common import Reduce, check_positive, check_rows, soft_cross_entropy
from tlkernels.methods.pretrain.queue import FeatureQueue

__all__ = ["SwAVLoss", "SwAVPrototypes", "sinkhorn_codes", "swav_loss"]


@torch.no_grad()
def sinkhorn_codes(
    scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, reduce: Reduce | None = None
) -> Tensor:  # fmt: skip
    r"""Assign samples to prototypes, evenly over the batch.

    Parameters
    ----------
    scores : Tensor [N, K], float32, bfloat16, float16 or float64
        Similarities, N >= 1.
    epsilon : float > 0
        The temperature.
    iterations : int
        Each normalises over samples, then over prototypes; >= 1.
    reduce : callable, optional
        Sums a tensor over all processes (`GroupSum`): codes are then those of the whole batch. Each process has at
        least one row.

    Returns
    -------
    Tensor [N, K]
        Codes, without gradient, each row of sum 1; float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math:: \log Q \leftarrow S / \epsilon; \qquad
        \log Q_{bk} \leftarrow \log Q_{bk} - \log \sum_{b'} Q_{b'k}, \quad
        \log Q_{bk} \leftarrow \log Q_{bk} - \log \sum_{k'} Q_{bk'} \quad (\text{iterations times})

    The constants 1 / K and 1 / B of the paper cancel in the last step.

    References
    ----------
    Caron et al., SwAV, NeurIPS 2020, section 3.1. Cuturi, Sinkhorn Distances, NeurIPS 2013.
    """
    op = "sinkhorn_codes"
    check_rows(op, 1, "codes are of a batch", scores=scores)
    check_positive(op, epsilon=epsilon)
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}; expected >= 1")
    log = wide(scores) / epsilon
    for _ in range(iterations):
        over_samples = torch.logsumexp(log, 0)
        if reduce is not None:
            over_samples = _merged(over_samples, reduce)
        log = torch.log_softmax(log - over_samples, 1)
    return log.exp()


def _merged(lse: Tensor, reduce: Reduce) -> Tensor:
    """The log-sum-exp over processes, by sums alone: relative to the processes' mean, whose spread float64 can hold."""
    local = lse.double()
    middle = reduce(local) / reduce(torch.ones_like(local[:1]))
    return (middle + reduce((local - middle).exp()).log()).to(lse.dtype)


class SwAVPrototypes(nn.Linear):
    """The prototypes of SwAV: a linear layer without bias, whose rows are kept at length 1.

    Parameters
    ----------
    num_features : int
        D.
    num_prototypes : int
        K.

    Notes
    -----
    Call `normalize` after each step of the optimizer, and `cancel_gradients` before it in the first steps.
    """

    def __init__(self, num_features: int = 128, num_prototypes: int = 3000) -> None:
        for name, value in (("num_features", num_features), ("num_prototypes", num_prototypes)):
            if value < 1:
                raise ValueError(f"SwAVPrototypes: {name} is {value}; expected >= 1")
        super().__init__(num_features, num_prototypes, bias=False)
        self.normalize()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale each prototype to length 1, in place."""
        self.weight.copy_(normalized(self.weight))


def swav_loss(
    scores: Sequence[Tensor], *, num_assign: int = 2, queue_scores: Sequence[Tensor] | None = None,
    temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3, reduce: Reduce | None = None,
) -> Tensor:  # fmt: skip
    r"""The loss of SwAV: swapped prediction of codes, with any number of crops.

    .. math:: L = \frac{1}{A} \sum_{i \le A} \frac{1}{V - 1} \sum_{v \ne i} \frac1N \sum_b
        -\sum_k Q^{(i)}_{bk} \log \mathrm{softmax}_k (S^{(v)}_b / \tau)

    Parameters
    ----------
    scores : sequence of V Tensors [N, K], float32, bfloat16, float16 or float64
        For each crop, the similarities of unit features and unit prototypes; V >= 2, large crops first.
    num_assign : int
        A: codes are made for the first A crops, 1 <= A <= V.
    queue_scores : sequence of A Tensors [M, K], optional
        Scores of earlier samples, which take part in the assignment alone.
    temperature, epsilon : float > 0
    iterations, reduce
        As for `sinkhorn_codes`.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64), differentiable through the predictions alone.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Caron et al., SwAV, NeurIPS 2020, equation 2 and section 3.2 (multi-crop).
    """
    op = "swav_loss"
    if len(scores) < 2 or not 1 <= num_assign <= len(scores):
        raise ValueError(
            f"{op}: scores has {len(scores)} crops and num_assign is {num_assign}; "
            "expected at least 2 crops and 1 <= num_assign <= their number"
        )
    check_rows(op, 1, "codes are of a batch", **{f"scores[{i}]": s for i, s in enumerate(scores)})
    check_positive(op, temperature=temperature, epsilon=epsilon)
    if queue_scores is not None and len(queue_scores) != num_assign:
        raise ValueError(f"{op}: queue_scores has {len(queue_scores)} entries; expected num_assign = {num_assign}")
    rows = scores[0].shape[0]
    loss = wide(scores[0]).new_zeros(())
    for i in range(num_assign):
        everyone = scores[i].detach()
        if queue_scores is not None:
            check_tensor(op, **{f"queue_scores[{i}]": queue_scores[i]})
            if queue_scores[i].dim() != 2 or queue_scores[i].shape[1] != everyone.shape[1]:
                raise ValueError(
                    f"{op}: queue_scores[{i}] has shape {tuple(queue_scores[i].shape)}; "
                    f"expected (M, {everyone.shape[1]})"
                )
            everyone = torch.cat([everyone, queue_scores[i].detach().to(everyone.dtype)])
        codes = sinkhorn_codes(everyone, epsilon=epsilon, iterations=iterations, reduce=reduce)[:rows]
        for v, of_crop in enumerate(scores):
            if v != i:
                loss = loss + soft_cross_entropy(wide(of_crop) / temperature, codes)
    return loss / (num_assign * (len(scores) - 1))


class SwAVLoss(nn.Module):
    """`swav_loss` from features, with a queue of earlier ones for each crop that is assigned.

    Parameters
    ----------
    num_features : int
        D.
    queue_size : int
        Of each queue; 0 for none. 3840 in the paper, for batches of 256.
    num_assign, temperature, epsilon, iterations, reduce
        As for `swav_loss`. With `reduce`, each process has its own queues.

    Attributes
    ----------
    queues : torch.nn.ModuleList of FeatureQueue
        In the ``state_dict``.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Examples
    --------
    >>> import torch
    >>> prototypes, loss_fn = SwAVPrototypes(8, 5), SwAVLoss(8)
    >>> views = [torch.randn(4, 8, requires_grad=True) for _ in range(3)]
    >>> loss_fn(views, prototypes).backward()
    """

    def __init__(
        self, num_features: int = 128, queue_size: int = 0, *, num_assign: int = 2, temperature: float = 0.1,
        epsilon: float = 0.05, iterations: int = 3, reduce: Reduce | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive("SwAVLoss", temperature=temperature, epsilon=epsilon)
        for name, value, least in (
            ("queue_size", queue_size, 0), ("num_assign", num_assign, 1), ("iterations", iterations, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"SwAVLoss: {name} is {value}; expected >= {least}")
        self.num_assign, self.temperature, self.epsilon = num_assign, temperature, epsilon
        self.iterations, self.reduce = iterations, reduce
        queues = num_assign if queue_size else 0
        self.queues = nn.ModuleList(FeatureQueue(num_features, queue_size, start="empty") for _ in range(queues))

    def forward(self, features: Sequence[Tensor], prototypes: nn.Module, *, use_queue: bool = True) -> Tensor:
        """Compute the loss; in training mode, enqueue the features of the assigned crops.

        Parameters
        ----------
        features : sequence of V Tensors [N, D], float32, bfloat16, float16 or float64
            Projections of the crops, large crops first; normalised here.
        prototypes : torch.nn.Module
            `SwAVPrototypes`.
        use_queue : bool
            False leaves the queues alone: in the paper, for the first epochs, whose features change fast. A queue
            takes part once it is full.

        Returns
        -------
        Tensor
            0-d.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as stated, or a batch is larger than the queue; the queues are as they were then.
        """
        op = "SwAVLoss"
        if len(features) < max(2, self.num_assign):
            raise ValueError(f"{op}: features has {len(features)} crops; expected at least {max(2, self.num_assign)}")
        check_rows(op, 1, "codes are of a batch", **{f"features[{i}]": f for i, f in enumerate(features)})
        z = [normalized(f) for f in features]
        queues: list[FeatureQueue] = [q for q in self.queues if isinstance(q, FeatureQueue)] if use_queue else []
        for queue, of_crop in zip(queues, z, strict=False):
            queue.check(of_crop)
        scores = [prototypes(of_crop) for of_crop in z]
        earlier = None
        if queues and all(queue.full for queue in queues):
            with torch.no_grad():
                earlier = [prototypes(queue.features().to(z[0].dtype)) for queue in queues]
        loss = swav_loss(
            scores, num_assign=self.num_assign, queue_scores=earlier, temperature=self.temperature,
            epsilon=self.epsilon, iterations=self.iterations, reduce=self.reduce,
        )  # fmt: skip
        if self.training:
            for queue, of_crop in zip(queues, z, strict=False):
                queue.enqueue(of_crop)
        return loss
