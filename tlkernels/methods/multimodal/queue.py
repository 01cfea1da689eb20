r"""Embeddings of past batches, of both modalities: more negatives than a batch has, and neighbours.

The encoders move between batches, so what is queued comes from slow copies of them, `pretrain.MomentumEncoder`.

Kaiming He et al. *Momentum Contrast for Unsupervised Visual Representation Learning.* CVPR 2020, arXiv:1911.05722.
Junnan Li et al. *Align before Fuse: Vision and Language Representation Learning with Momentum Distillation.* NeurIPS
2021, arXiv:2107.07651 (queues of both modalities). Debidatta Dwibedi et al. *With a Little Help from My Friends:
Nearest-Neighbor Contrastive Learning of Visual Representations.* ICCV 2021, arXiv:2104.14548 (neighbours in a queue).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlkernels.methods._common import check_float, wide
from tlkernels.methods.multimodal._checks import check_pairs
from tlkernels.methods.pretrain.queue import FeatureQueue
from tlkernels.ops._common import name_of, no_autocast

__all__ = ["PairQueue", "nearest_neighbors"]

_BLOCK = 2**22  # similarities at a time where a neighbour is looked for


class PairQueue(nn.Module):
    """The last pairs of embeddings, first in, first out: row i of both queues is one pair.

    Parameters
    ----------
    embed_dim : int
        D; >= 1.
    size : int
        Pairs; >= 1.
    dtype : torch.dtype
        Of the stored embeddings.

    Attributes
    ----------
    images, texts : pretrain.FeatureQueue
        Empty at first. Their rows and counts are buffers, so that a saved state goes on exactly where it was.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    A batch need not divide `size`. Across processes, enqueue the gathered embeddings, the same on each.

    References
    ----------
    He et al., MoCo, CVPR 2020, arXiv:1911.05722; Li et al., ALBEF, NeurIPS 2021, arXiv:2107.07651.

    Examples
    --------
    >>> import torch
    >>> queue = PairQueue(1, 3)
    >>> queue.enqueue(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]]))
    >>> queue.enqueue(torch.tensor([[3.0], [4.0]]), torch.tensor([[30.0], [40.0]]))
    >>> [rows.flatten().tolist() for rows in queue.negatives()]  # 4 took the place of 1
    [[4.0, 2.0, 3.0], [40.0, 20.0, 30.0]]
    """

    def __init__(self, embed_dim: int, size: int, *, dtype: torch.dtype = torch.float32) -> None:
        for name, value in (("embed_dim", embed_dim), ("size", size)):
            if value < 1:
                raise ValueError(f"PairQueue: {name} is {value}; expected >= 1")
        super().__init__()
        self.images = FeatureQueue(embed_dim, size, start="empty", dtype=dtype)
        self.texts = FeatureQueue(embed_dim, size, start="empty", dtype=dtype)

    def __len__(self) -> int:
        return self.images.features().shape[0]

    def enqueue(self, image_embeds: Tensor, text_embeds: Tensor) -> None:
        """Put a batch of pairs in, and drop as many of the oldest as there is no room for.

        Parameters
        ----------
        image_embeds, text_embeds : Tensor [N, D]
            N <= size; detached, and rounded to the queue's dtype.

        Raises
        ------
        TypeError, ValueError
            If they are not as stated; the queue is as it was then.
        """
        check_pairs("PairQueue.enqueue", image_embeds=image_embeds, text_embeds=text_embeds)
        self.images.check(image_embeds)
        self.texts.check(text_embeds)
        self.images.enqueue(image_embeds)
        self.texts.enqueue(text_embeds)

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Copies of the embeddings that are there, images and texts, ``[count, D]`` each: safe across `enqueue`."""
        return self.images.features().clone(), self.texts.features().clone()


@torch.no_grad()
def nearest_neighbors(queries: Tensor, candidates: Tensor) -> Tensor:
    """Of each query the candidate with the largest inner product, for normalized rows the nearest.

    Parameters
    ----------
    queries : Tensor [N, D], float32, bfloat16, float16 or float64
    candidates : Tensor [K, D] of the queries' dtype
        K >= 1, e.g. ``queue.texts.features()`` of a `PairQueue`.

    Returns
    -------
    Tensor [N, D]
        Rows of `candidates`, a copy without graph. The products are made in blocks, in float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Dwibedi et al., NNCLR, ICCV 2021, arXiv:2104.14548.
    """
    op = "nearest_neighbors"
    check_float(op, queries=queries, candidates=candidates)
    if candidates.dtype != queries.dtype:
        raise TypeError(
            f"{op}: candidates has dtype {name_of(candidates.dtype)}; expected {name_of(queries.dtype)}, like queries"
        )
    if queries.dim() != 2:
        raise ValueError(f"{op}: queries has shape {tuple(queries.shape)}; expected (N, D)")
    if candidates.dim() != 2 or candidates.shape[1] != queries.shape[1] or not candidates.shape[0]:
        raise ValueError(
            f"{op}: candidates has shape {tuple(candidates.shape)}; expected (K, {queries.shape[1]}) with K >= 1"
        )
    step = max(1, _BLOCK // candidates.shape[0])
    with no_autocast(queries.device):
        keys = wide(candidates).T  # products of 16 bits would make ties of near neighbours, or infinities
        index = [(wide(block) @ keys).argmax(1) for block in queries.split(step)]
    return candidates[torch.cat(index)]
