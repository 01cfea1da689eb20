r"""L2P: a pool of prompts for a frozen model, of which each sample takes those whose keys match it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PromptPool"]


class PromptPool(nn.Module):
    r"""Prompts with learned keys; those nearest to a sample's query go before its embedded input.

    Parameters
    ----------
    pool_size : int
        M, >= 1.
    length : int
        Positions of a prompt, >= 1.
    features : int
        Of the embedded input, >= 1.
    top_k : int
        Prompts that a sample takes, 1 to `pool_size`. Default 5, at most `pool_size`.
    query_features : int, optional
        Of queries and keys; `features` by default.
    diversify : bool
        Whether, in training, prompts that earlier tasks took often count as farther. Default False.
    generator : torch.Generator, optional
        CPU. For prompts and keys, uniform in [-1, 1]; seed 0 by default.
    dtype : torch.dtype
        Of prompts and keys. Default float32.

    Attributes
    ----------
    prompts : torch.nn.Parameter
        ``[pool_size, length, features]``.
    keys : torch.nn.Parameter
        ``[pool_size, query_features]``.
    counts : Tensor
        ``[pool_size]``, int64: how often the running task took each prompt in training.
    earlier : Tensor
        ``[pool_size]``, int64: the same of the tasks before.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its range.

    Notes
    -----
    With the query q, such as the frozen model's class token, the prompts K of a sample are

    .. math:: K = \arg\min_{|K| = N} \sum_{s \in K} \gamma(q, k_s) \, h_s, \qquad
        \gamma(q, k) = 1 - \frac{q^T k}{\|q\| \|k\|},

    where h is 1, or with `diversify`, in training and after the first task, the share of the earlier tasks' choices
    that fell on the prompt. The loss to add, times the paper's :math:`\lambda = 0.5`, pulls the keys to the queries:
    :math:`\sum_{s \in K} \gamma(q, k_s)`, the mean over the batch. Queries get no gradient. Of equal distances the
    first prompts win. A query or key of zeros has :math:`\gamma = 1`.

    References
    ----------
    Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, arXiv:2112.08654.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.methods.continual.prompts import PromptPool
    >>> pool = PromptPool(10, 4, 16, top_k=2)
    >>> tokens, pull = pool(torch.randn(3, 7, 16), torch.randn(3, 16))
    >>> tokens.shape, pull.shape
    (torch.Size([3, 15, 16]), torch.Size([]))
    """

    counts: Tensor
    earlier: Tensor

    def __init__(
        self, pool_size: int, length: int, features: int, *, top_k: int | None = None,
        query_features: int | None = None, diversify: bool = False, generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        query_features = features if query_features is None else query_features
        sizes = {"pool_size": pool_size, "length": length, "features": features, "query_features": query_features}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"PromptPool: {name} is {size!r}; expected a whole number >= 1")
        top_k = min(5, pool_size) if top_k is None else top_k
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= pool_size:
            raise ValueError(f"PromptPool: top_k is {top_k!r}; expected 1 to pool_size, which is {pool_size}")
        if not dtype.is_floating_point:
            raise TypeError(f"PromptPool: dtype is {dtype}; expected a floating-point one")
        gen = torch.Generator().manual_seed(0) if generator is None else generator
        self.top_k, self.diversify = top_k, diversify
        self.prompts = nn.Parameter(
            (2 * torch.rand(pool_size, length, features, generator=gen, dtype=torch.float64) - 1).to(dtype)
        )
        self.keys = nn.Parameter(
            (2 * torch.rand(pool_size, query_features, generator=gen, dtype=torch.float64) - 1).to(dtype)
        )
        self.register_buffer("counts", torch.zeros(pool_size, dtype=torch.int64))
        self.register_buffer("earlier", torch.zeros(pool_size, dtype=torch.int64))

    def distances(self, query: Tensor) -> Tensor:
        """Return the cosine distances ``[N, pool_size]`` of queries ``[N, query_features]``, which get no gradient.

        Raises
        ------
        TypeError, ValueError
            If `query` is no floating-point tensor, of another shape, or not finite.
        """
        if not isinstance(query, Tensor) or not query.is_floating_point():
            got = query.dtype if isinstance(query, Tensor) else type(query).__name__
            raise TypeError(f"PromptPool: query is a {got}; expected a floating-point tensor")
        if query.dim() != 2 or query.shape[1] != self.keys.shape[1]:
            raise ValueError(
                f"PromptPool: query has shape {tuple(query.shape)}; expected [N, query_features], with "
                f"{self.keys.shape[1]} of these"
            )
        if not query.isfinite().all():
            raise ValueError("PromptPool: query is not finite; expected finite values")
        q = functional.normalize(query.detach().to(self.keys.dtype), dim=1)
        return 1 - q @ functional.normalize(self.keys, dim=1).T

    def select(self, query: Tensor) -> Tensor:
        """Return the indices ``[N, top_k]`` of the prompts of each query, the nearest first.

        Raises
        ------
        TypeError, ValueError
            As `distances`.
        """
        return self._nearest(self.distances(query).detach())

    def _nearest(self, distances: Tensor) -> Tensor:
        total = self.earlier.sum()
        if self.diversify and self.training and total > 0:
            distances = distances * (self.earlier / total).to(distances.dtype)
        return distances.sort(dim=1, stable=True).indices[:, : self.top_k]

    def forward(self, embedded: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prompts before the input; in training, count the choices.

        Parameters
        ----------
        embedded : Tensor
            ``[N, T, features]``.
        query : Tensor
            ``[N, query_features]``.

        Returns
        -------
        (Tensor, Tensor)
            ``[N, top_k * length + T, features]`` of the dtype of `embedded`, and the loss of the keys, a scalar, 0 of
            no samples.

        Raises
        ------
        TypeError, ValueError
            As `distances`; if `embedded` has another shape. Nothing is counted then.
        """
        features = self.prompts.shape[2]
        if embedded.dim() != 3 or embedded.shape[2] != features or len(embedded) != len(query):
            raise ValueError(
                f"PromptPool: embedded has shape {tuple(embedded.shape)}; expected [{len(query)}, T, {features}]"
            )
        distances = self.distances(query)
        chosen = self._nearest(distances.detach())
        if self.training:
            self.counts += torch.bincount(chosen.flatten(), minlength=len(self.counts))
        pull = distances.gather(1, chosen).sum() / max(1, len(query))
        prompts = self.prompts[chosen].flatten(1, 2).to(embedded.dtype)
        return torch.cat([prompts, embedded], 1), pull

    def after_task(self) -> None:
        """Add the running task's choices to those of the earlier ones."""
        self.earlier += self.counts
        self.counts.zero_()

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the module."""
        size, length, features = self.prompts.shape
        return f"pool_size={size}, length={length}, features={features}, top_k={self.top_k}"
