r"""Masked autoencoders: images as patches, random masks, the loss on what was masked.

He et al. *Masked Autoencoders Are Scalable Vision Learners.* CVPR 2022, arXiv:2111.06377.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels.methods._common import check_float, check_not_negative, check_tensor, wide
from tlkernels.ops._common import name_of

__all__ = ["PatchMask", "mae_loss", "mask_patches", "patchify", "restore_patches", "unpatchify"]


class PatchMask(NamedTuple):
    """What `mask_patches` makes, for N samples of L patches of which V stay visible."""

    #: int64 [N, V]: the visible patches in the order in which the encoder gets them
    keep: Tensor
    #: bool [N, L]: true where a patch is masked
    mask: Tensor
    #: int64 [N, L]: the place of each patch in (visible patches, then masked ones)
    restore: Tensor

    def visible(self, patches: Tensor) -> Tensor:
        """The visible ones of `patches` ``[N, L, D]``, ``[N, V, D]``: the encoder's input.

        Add position embeddings before: the order is lost here.
        """
        if patches.dim() != 3 or patches.shape[:2] != self.mask.shape:
            raise ValueError(
                f"PatchMask.visible: patches has shape {tuple(patches.shape)}; "
                f"expected ({self.mask.shape[0]}, {self.mask.shape[1]}, D)"
            )
        return patches.gather(1, self.keep[:, :, None].expand(-1, -1, patches.shape[2]))


def mask_patches(
    num_samples: int, num_patches: int, mask_ratio: float = 0.75, *, noise: Tensor | None = None,
    generator: torch.Generator | None = None, device: torch.device | str | None = None,
) -> PatchMask:  # fmt: skip
    r"""Choose which patches to hide, for each sample on its own, every choice equally likely.

    Patches are sorted by random numbers; the first :math:`\lfloor L (1 - r) \rfloor` stay visible.

    Parameters
    ----------
    num_samples, num_patches : int
        N and L.
    mask_ratio : float
        r in [0, 1); at least one patch stays visible.
    noise : Tensor [N, L], optional
        The random numbers, instead of drawing them.
    generator : torch.Generator, optional
        On `device`.
    device : torch.device or str, optional
        By default that of `noise`, else the default device.

    Returns
    -------
    PatchMask

    Raises
    ------
    ValueError
        If an argument is not as stated, or no patch would stay visible.

    References
    ----------
    He et al., MAE, CVPR 2022, arXiv:2111.06377, section 3.

    Examples
    --------
    >>> import torch
    >>> chosen = mask_patches(1, 4, 0.5, noise=torch.tensor([[0.4, 0.1, 0.3, 0.2]]))
    >>> chosen.keep.tolist(), chosen.mask.tolist(), chosen.restore.tolist()
    ([[1, 3]], [[True, False, True, False]], [[3, 0, 2, 1]])
    """
    op = "mask_patches"
    if num_samples < 0:
        raise ValueError(f"{op}: num_samples is {num_samples}; expected >= 0")
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"{op}: mask_ratio is {mask_ratio}; expected 0 <= mask_ratio < 1")
    visible = int(num_patches * (1 - mask_ratio) + 1e-6)  # 10 * (1 - 0.9) is a little less than 1
    if visible < 1:
        raise ValueError(f"{op}: mask_ratio is {mask_ratio} of num_patches {num_patches}; expected one to stay visible")
    if noise is None:
        noise = torch.rand(num_samples, num_patches, generator=generator, device=device)
    elif tuple(noise.shape) != (num_samples, num_patches):
        raise ValueError(f"{op}: noise has shape {tuple(noise.shape)}; expected ({num_samples}, {num_patches})")
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    return PatchMask(shuffle[:, :visible], restore >= visible, restore)


def restore_patches(visible: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """Put tokens back in their places, with the mask token in those of the masked ones: the decoder's input.

    Parameters
    ----------
    visible : Tensor [N, V, D]
        The encoder's output, without a class token.
    mask_token : Tensor of D elements
    restore : int64 Tensor [N, L]
        From `mask_patches`.

    Returns
    -------
    Tensor [N, L, D] of visible's dtype
        Differentiable with respect to `visible` and `mask_token`.

    Raises
    ------
    ValueError
        If an argument is not as stated.
    """
    op = "restore_patches"
    if visible.dim() != 3:
        raise ValueError(f"{op}: visible has shape {tuple(visible.shape)}; expected (N, V, D)")
    samples, number, features = visible.shape
    if restore.dim() != 2 or restore.shape[0] != samples or restore.shape[1] < number or restore.dtype != torch.int64:
        raise ValueError(
            f"{op}: restore has dtype {name_of(restore.dtype)} and shape {tuple(restore.shape)}; "
            f"expected int64 ({samples}, L) with L >= {number}"
        )
    if mask_token.numel() != features:
        raise ValueError(f"{op}: mask_token has shape {tuple(mask_token.shape)}; expected {features} elements")
    masked = mask_token.to(visible.dtype).reshape(1, 1, features).expand(samples, restore.shape[1] - number, features)
    return torch.cat([visible, masked], 1).gather(1, restore[:, :, None].expand(-1, -1, features))


def patchify(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row; in each, the channels of a pixel stand together.

    Parameters
    ----------
    images : Tensor [N, C, H, W]
    patch_size : int or (int, int)
        (P, Q), which divide H and W.

    Returns
    -------
    Tensor [N, (H / P) (W / Q), P Q C]

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    The layout is that of the authors' code: entry :math:`(p Q + q) C + c` of a patch is pixel (p, q) of channel c.
    """
    op = "patchify"
    height, width = _patch_size(op, patch_size)
    if images.dim() != 4 or images.shape[2] % height or images.shape[3] % width:
        raise ValueError(
            f"{op}: images has shape {tuple(images.shape)}; expected (N, C, H, W), H a multiple of {height}, "
            f"W of {width}"
        )
    cut = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # N C h P w Q
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int | tuple[int, int], image_size: int | tuple[int, int]) -> Tensor:
    """Put images together from patches: the inverse of `patchify`.

    Parameters
    ----------
    patches : Tensor [N, (H / P) (W / Q), P Q C]
    patch_size : int or (int, int)
        (P, Q).
    image_size : int or (int, int)
        (H, W).

    Returns
    -------
    Tensor [N, C, H, W]

    Raises
    ------
    ValueError
        If an argument is not as stated.
    """
    op = "unpatchify"
    height, width = _patch_size(op, patch_size)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = size[0] // height, size[1] // width
    if size[0] % height or size[1] % width:
        raise ValueError(f"{op}: image_size is {size}; expected multiples of {(height, width)}")
    if patches.dim() != 3 or patches.shape[1] != rows * columns or patches.shape[2] % (height * width):
        raise ValueError(
            f"{op}: patches has shape {tuple(patches.shape)}; expected (N, {rows * columns}, {height * width} C)"
        )
    cut = patches.unflatten(2, (height, width, -1)).unflatten(1, (rows, columns))  # N h w P Q C
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _patch_size(op: str, patch_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height < 1 or width < 1:
        raise ValueError(f"{op}: patch_size is {patch_size}; expected >= 1")
    return height, width


def mae_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, *, normalize_patches: bool = True, eps: float = 1e-6
) -> Tensor:  # fmt: skip
    r"""Mean squared error on the masked patches.

    .. math:: L = \frac{1}{|M|} \sum_{(n, l) \in M} \frac1D \sum_d (\hat x_{nld} - \tilde x_{nld})^2, \qquad
        \tilde x_{nl} = \frac{x_{nl} - \mathrm{mean}(x_{nl})}{\sqrt{\mathrm{var}(x_{nl}) + \epsilon}}

    Parameters
    ----------
    prediction : Tensor [N, L, D], float32, bfloat16, float16 or float64
        The decoder's output.
    target : Tensor [N, L, D], floating point
        The image's patches, from `patchify`; no gradient flows into it.
    mask : Tensor [N, L]
        Bool, or 0 and 1: true where a patch was masked. Of none the loss is 0.
    normalize_patches : bool
        Predict each patch relative to its own mean and variance (divided by D - 1), which is better for
        representations; needs D >= 2.
    eps : float >= 0
        :math:`\epsilon`.

    Returns
    -------
    Tensor
        0-d, float32 (float64 if prediction is).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    He et al., MAE, CVPR 2022, arXiv:2111.06377, section 3 and its appendix.
    """
    op = "mae_loss"
    check_float(op, prediction=prediction, target=target)
    check_tensor(op, mask=mask)
    check_not_negative(op, eps=eps)
    if prediction.dim() != 3:
        raise ValueError(f"{op}: prediction has shape {tuple(prediction.shape)}; expected (N, L, D)")
    if target.shape != prediction.shape:
        raise ValueError(
            f"{op}: target has shape {tuple(target.shape)}; expected {tuple(prediction.shape)}, like prediction"
        )
    if mask.shape != prediction.shape[:2]:
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; expected {tuple(prediction.shape[:2])}")
    if normalize_patches and prediction.shape[2] < 2:
        raise ValueError(f"{op}: target has patches of 1 value; expected at least 2, the variance is undefined")
    wanted = wide(target.detach()).to(wide(prediction).dtype)
    if normalize_patches:
        variance, mean = torch.var_mean(wanted, -1, keepdim=True)
        wanted = (wanted - mean) * (variance + eps).rsqrt()
    of_patch = (wide(prediction) - wanted).square().mean(-1)
    share = mask.to(of_patch.dtype)
    return (of_patch * share).sum() / share.sum().clamp(min=1)
