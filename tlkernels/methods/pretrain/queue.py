"""A queue of features: the negatives of MoCo, the past samples of SwAV."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tlkernels.methods._common import check_tensor
from tlkernels.ops._common import name_of

__all__ = ["FeatureQueue"]


class FeatureQueue(nn.Module):
    r"""The last K features, in a ring: row ``written mod K`` is the next to be overwritten.

    Parameters
    ----------
    num_features : int
        D.
    size : int
        K.
    start : {"random", "empty"}
        Random unit vectors, as in MoCo, or nothing: `features` then has fewer than K rows until K were written.
    dtype : torch.dtype
        Of the stored features.
    generator : torch.Generator, optional
        On the CPU, for the random start.

    Attributes
    ----------
    storage : Tensor [K, D]
        A buffer.
    written : Tensor
        int64, 0-d, a buffer: the number of rows ever written. Both are in the ``state_dict``, so that training goes on
        from the middle of an epoch as if it had not stopped.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    A batch need not divide K: rows go round the end one by one. With ``start="random"`` nothing here waits for a
    device. Across processes, enqueue the gathered features, the same on each.

    References
    ----------
    He et al., MoCo, CVPR 2020, arXiv:1911.05722.

    Examples
    --------
    >>> import torch
    >>> queue = FeatureQueue(1, 3, start="empty")
    >>> queue.enqueue(torch.tensor([[1.0], [2.0]]))
    >>> queue.enqueue(torch.tensor([[3.0], [4.0]]))
    >>> queue.features().flatten()  # 4 took the place of 1
    tensor([4., 2., 3.])
    """

    storage: Tensor
    written: Tensor

    def __init__(
        self, num_features: int, size: int, *, start: Literal["random", "empty"] = "random",
        dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("num_features", num_features), ("size", size)):
            if value < 1:
                raise ValueError(f"FeatureQueue: {name} is {value}; expected >= 1")
        if start not in ("random", "empty"):
            raise ValueError(f"FeatureQueue: start is {start!r}; expected 'random' or 'empty'")
        self.size, self.start = size, start
        storage = torch.zeros(size, num_features)
        if start == "random":
            storage = nn.functional.normalize(torch.randn(size, num_features, generator=generator), dim=1)
        self.register_buffer("storage", storage.to(dtype))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def features(self) -> Tensor:
        """The features held, ``[K, D]``, in the order of the ring; fewer while an "empty" one fills.

        A view: `enqueue` writes into it. Clone it where a backward pass still needs it.
        """
        if self.start == "random":
            return self.storage
        return self.storage[: min(int(self.written), self.size)]

    @property
    def full(self) -> bool:
        """Whether K rows have been written."""
        return int(self.written) >= self.size

    def check(self, features: Tensor) -> None:
        """Raise as `enqueue` would, and write nothing."""
        check_tensor("FeatureQueue.enqueue", features=features)
        if features.dim() != 2 or features.shape[1] != self.storage.shape[1] or not features.is_floating_point():
            raise ValueError(
                f"FeatureQueue.enqueue: features has dtype {name_of(features.dtype)} and shape "
                f"{tuple(features.shape)}; expected floating point (N, {self.storage.shape[1]})"
            )
        if features.shape[0] > self.size:
            raise ValueError(
                f"FeatureQueue.enqueue: features has {features.shape[0]} rows, more than the queue's size; "
                f"expected at most {self.size}"
            )

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Overwrite the oldest rows.

        Parameters
        ----------
        features : Tensor [N, D]
            N <= K; of any floating dtype, detached and rounded to the queue's.

        Raises
        ------
        ValueError
            If `features` is not as stated; the queue is as it was then.
        """
        self.check(features)
        rows = (self.written + torch.arange(features.shape[0], device=self.storage.device)) % self.size
        self.storage.index_copy_(0, rows, features.detach().to(self.storage))
        self.written += features.shape[0]
