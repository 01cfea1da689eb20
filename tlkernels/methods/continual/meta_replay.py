r"""Meta-learned replay: MER aligns the gradients of new and old examples, OML learns features that survive a stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tlkernels.methods.continual._base import check_number, trainable_parameters
from tlkernels.methods.continual.buffers import ReplayBuffer, ReservoirBuffer
from tlkernels.methods.continual.replay import Loss, _Replay

__all__ = ["MER", "OML"]


class MER(_Replay):
    r"""Meta-experience replay: Reptile over batches of the newest example and remembered ones.

    Parameters
    ----------
    model : torch.nn.Module
    buffer : ReservoirBuffer
        Of (inputs, labels); filled by `step`, one example after the other.
    lr : float
        :math:`\alpha` > 0, of the inner steps of gradient descent.
    beta : float
        In [0, 1], of a batch.
    gamma : float
        In [0, 1], of an example's batches together.
    batches : int
        s, how many batches an example is learned in.
    batch_size : int
        k, examples of a batch: the newest and k - 1 of the buffer, or as many as it has.
    criterion : callable, optional
        ``criterion(outputs, labels)`` of one example; default cross entropy.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `step` takes the place of the loss, its gradient and the optimizer. For each example of the batch, from the weights
    :math:`\theta_0`, s times: k steps :math:`w_j = w_{j-1} - \alpha \nabla L_j(w_{j-1})` from :math:`w_0 = \theta`, an
    example each, the newest first, then

    .. math:: \theta \leftarrow w_0 + \beta (w_k - w_0);

    at last :math:`\theta \leftarrow \theta_0 + \gamma (\theta - \theta_0)`, and the buffer sees the example. To second
    order this favours weights in which the gradients of the k examples have positive inner products. Buffers of the
    model, such as running statistics, are not drawn back.

    References
    ----------
    Riemer et al., Learning to learn without forgetting by maximizing transfer and minimizing interference, ICLR 2019,
    arXiv:1810.11910, algorithm 1.
    """

    def __init__(
        self, model: nn.Module, buffer: ReplayBuffer, *, lr: float = 0.03, beta: float = 0.1, gamma: float = 1.0,
        batches: int = 5, batch_size: int = 10, criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, batch_size=batch_size, criterion=criterion)
        if not isinstance(buffer, ReservoirBuffer):
            raise TypeError(f"MER: buffer is a {type(buffer).__name__}; expected a ReservoirBuffer")
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"MER: batches is {batches!r}; expected a positive number")
        self.batches, self.lr = batches, check_number("MER", "lr", lr)
        self.beta = check_number("MER", "beta", beta, 0.0, 1.0)
        self.gamma = check_number("MER", "gamma", gamma, 0.0, 1.0)

    def step(self, inputs: Tensor, labels: Tensor) -> float:
        """Learn a batch of the stream, one example after the other.

        Parameters
        ----------
        inputs : Tensor [n, ...]
        labels : Tensor [n, ...]

        Returns
        -------
        float
            The mean of all inner steps' losses.

        Raises
        ------
        ValueError
            If they are empty or of unequal length, or a loss is not finite; an example in which that happens, or in
            which the model or the criterion raises, leaves weights and buffer as they were after the one before it
            (the buffer's generator has advanced).
        """
        if not len(inputs) or len(inputs) != len(labels):
            raise ValueError(
                f"MER: got {len(inputs)} inputs and {len(labels)} labels; expected as many, and one at least"
            )
        params = list(trainable_parameters("MER", self.model).values())
        losses: list[float] = []
        for x, y in zip(inputs.split(1), labels.split(1), strict=True):
            start = [p.detach().clone() for p in params]
            try:
                for _ in range(self.batches):
                    before = [p.detach().clone() for p in params]
                    losses += self._descend(params, x, y)
                    _draw_back(params, before, self.beta)
                _draw_back(params, start, self.gamma)
                self.buffer.add(x, y)
            except BaseException:
                _draw_back(params, start, 0.0)
                raise
        return sum(losses) / len(losses)

    def _descend(self, params: Sequence[nn.Parameter], x: Tensor, y: Tensor) -> list[float]:
        """Take a step for the newest example and each drawn one; their losses."""
        examples = [(x, y)]
        if self.batch_size > 1 and len(self.buffer):
            xs, ys, *_ = self.buffer.sample(self.batch_size - 1)
            examples += zip(xs.split(1), ys.split(1), strict=True)
        losses = []
        for a, b in examples:
            with torch.enable_grad():
                loss = self.criterion(self.model(a), b)
                grads = torch.autograd.grad(loss, params, allow_unused=True)
            losses.append(float(loss.detach()))
            if not abs(losses[-1]) < float("inf"):
                raise ValueError(f"MER: the loss of an example is {losses[-1]}; expected a finite number")
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    if g is not None:
                        p.sub_(g, alpha=self.lr)
        return losses


def _draw_back(params: Sequence[Tensor], origin: Sequence[Tensor], share: float) -> None:
    """Leave of the way from `origin` to the parameters only that share; 0 and 1 are exact."""
    with torch.no_grad():
        for p, o in zip(params, origin, strict=True):
            if share < 1:
                p.copy_(torch.lerp(o, p, share) if share > 0 else o)


class OML(_Replay):
    r"""Online-aware meta-learning: features that a head can be trained on along a stream without forgetting.

    Parameters
    ----------
    representation : torch.nn.Module
        :math:`\phi_\theta`, learned by `meta_loss` alone.
    prediction : torch.nn.Module
        :math:`g_W`, which the stream trains.
    buffer : ReplayBuffer
        Of (inputs, labels), what forgetting is judged on.
    lr : float
        :math:`\alpha` >= 0, of the head's steps.
    batch_size : int
        Examples that are drawn of the buffer for a loss.
    criterion : callable, optional
        ``criterion(outputs, labels)``; default cross entropy.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    ``model`` is both parts, one after the other. From the head's present weights :math:`W_0` a trajectory of k examples
    is learned one by one,

    .. math:: W_j = W_{j-1} - \alpha \nabla_W L(g_{W_{j-1}}(\phi_\theta(x_j)), y_j),

    and `meta_loss` is :math:`L` of :math:`g_{W_k} \circ \phi_\theta` on the trajectory and a batch of the buffer
    together. Its gradient goes through all k steps (second order), with regard to :math:`\theta` and :math:`W_0`; the
    paper's outer optimizer has :math:`\theta` alone. `adapt` takes the k steps for good, with :math:`\theta` fixed.
    The features of a trajectory are computed in one batch.

    References
    ----------
    Javed & White, Meta-learning representations for continual learning, NeurIPS 2019, arXiv:1905.12588.
    """

    def __init__(
        self, representation: nn.Module, prediction: nn.Module, buffer: ReplayBuffer, *, lr: float = 0.01,
        batch_size: int = 32, criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("representation", representation), ("prediction", prediction)):
            if not isinstance(value, nn.Module):
                raise TypeError(f"OML: {name} is a {type(value).__name__}; expected a torch.nn.Module")
        super().__init__(nn.Sequential(representation, prediction), buffer, batch_size=batch_size, criterion=criterion)
        self.representation, self.prediction = representation, prediction
        self.lr = check_number("OML", "lr", lr)

    def meta_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Judge the features by what the head knows after it has learned the trajectory.

        Parameters
        ----------
        inputs : Tensor [k, ...]
            A trajectory, in its order.
        labels : Tensor [k, ...]

        Returns
        -------
        Tensor []
            Differentiable twice over. An empty buffer leaves the trajectory alone.

        Raises
        ------
        ValueError
            If they are empty or of unequal length, or no parameter of `prediction` requires grad.
        """
        named, features = self._start(inputs, labels)
        weights: dict[str, Tensor] = dict(named)
        for h, y in zip(features.split(1), labels.split(1), strict=True):
            loss = self.criterion(functional_call(self.prediction, weights, (h,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            weights = {
                name: w if g is None else w - self.lr * g
                for (name, w), g in zip(weights.items(), grads, strict=True)
            }  # fmt: skip
        if len(self.buffer):
            x, y, *_ = self.buffer.sample(self.batch_size)
            features = torch.cat([features, self.representation(x)])
            labels = torch.cat([labels, y])
        return self.criterion(functional_call(self.prediction, weights, (features,)), labels)

    def adapt(self, inputs: Tensor, labels: Tensor) -> None:
        """Let the head learn the trajectory, one example after the other, and show it to the buffer.

        Parameters
        ----------
        inputs : Tensor [k, ...]
        labels : Tensor [k, ...]

        Raises
        ------
        ValueError
            As `meta_loss`.
        """
        with torch.no_grad():
            named, features = self._start(inputs, labels)
        params = list(named.values())
        start = [p.detach().clone() for p in params]
        try:
            for h, y in zip(features.split(1), labels.split(1), strict=True):
                with torch.enable_grad():
                    grads = torch.autograd.grad(self.criterion(self.prediction(h), y), params, allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(params, grads, strict=True):
                        if g is not None:
                            p.sub_(g, alpha=self.lr)
            self.buffer.add(inputs, labels)
        except BaseException:
            _draw_back(params, start, 0.0)
            raise

    def _start(self, inputs: Tensor, labels: Tensor) -> tuple[dict[str, nn.Parameter], Tensor]:
        if not len(inputs) or len(inputs) != len(labels):
            raise ValueError(
                f"OML: got {len(inputs)} inputs and {len(labels)} labels; expected as many, and one at least"
            )
        return trainable_parameters("OML", self.prediction), self.representation(inputs)
