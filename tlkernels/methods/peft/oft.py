r"""Orthogonal fine-tuning: a frozen weight, its rows rotated by a learned block-diagonal matrix.

.. math::
    y = (W R) x + b, \qquad R = \mathrm{diag}(R_1, \dots, R_k), \qquad
    R_i = (I + Q_i)(I - Q_i)^{-1}, \quad Q_i^T = -Q_i .

The Cayley transform of a skew-symmetric matrix is orthogonal, with determinant 1, so the angles between the rows of W
and their lengths stay what they were. The entries of Q above the diagonal are trained; at zero R is the identity.

Zeju Qiu et al. *Controlling Text-to-Image Diffusion by Orthogonal Finetuning.* NeurIPS 2023, arXiv:2306.07280.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._dense import DenseTuner, adapter_dtype, device_of
from tlkernels.methods.peft._tuner import TunerConfig

__all__ = ["OFTConfig", "OFTLinear", "cayley"]


def cayley(upper: Tensor) -> Tensor:
    r"""Rotations from the entries of skew-symmetric matrices above the diagonal.

    .. math:: R = (I + Q)(I - Q)^{-1}, \qquad Q_{ij} = -Q_{ji} = u_{ij} \text{ for } i < j .

    Parameters
    ----------
    upper : Tensor
        ``[..., b (b - 1) / 2]``, floating point, row by row.

    Returns
    -------
    Tensor
        ``[..., b, b]``, orthogonal with determinant 1: in float32 for 16-bit dtypes, else of upper's dtype.

    Raises
    ------
    TypeError
        If `upper` is not floating point.
    ValueError
        If its last size is not b (b - 1) / 2 for a b >= 2.

    Notes
    -----
    :math:`I - Q` is never singular: the eigenvalues of Q are imaginary. Rotations by exactly half a turn are limits
    only.

    Examples
    --------
    >>> import torch
    >>> cayley(torch.tensor([1.0]))  # a quarter turn
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    if not upper.is_floating_point():
        raise TypeError(f"cayley: upper has dtype {upper.dtype}; expected a floating-point dtype")
    count = upper.shape[-1] if upper.dim() else 0
    b = round((1 + (1 + 8 * count) ** 0.5) / 2)
    if b < 2 or b * (b - 1) // 2 != count:
        raise ValueError(f"cayley: upper has {count} elements in its last dimension; expected b (b - 1) / 2, b >= 2")
    u = upper.to(torch.promote_types(upper.dtype, torch.float32))
    rows, cols = torch.triu_indices(b, b, 1, device=u.device)
    q = u.new_zeros(*u.shape[:-1], b, b)
    q[..., rows, cols] = u
    q = q - q.mT
    eye = torch.eye(b, dtype=u.dtype, device=u.device)
    return torch.linalg.solve(eye - q, eye + q)  # the two factors commute


class OFTLinear(DenseTuner):
    r"""A frozen linear layer behind a learned rotation of its input: :math:`y = W (R x) + b`.

    Parameters
    ----------
    base_layer : torch.nn.Module
        A linear layer.
    block_size : int
        Of the rotations: 2 or more, a divisor of ``in_features``.
    block_share : bool
        One rotation for all blocks.

    Attributes
    ----------
    rotation : torch.nn.Parameter
        The entries of Q above the diagonal: ``[in_features / block_size, block_size (block_size - 1) / 2]``, or one
        row for all blocks; zeros at first. Of the layer's dtype, float32 for layers in 16 bits or less.

    Raises
    ------
    TypeError
        If `base_layer` is no linear layer.
    ValueError
        If `block_size` does not divide ``in_features``.

    Notes
    -----
    The same function of the same numbers as the PEFT library's OFT with ``use_cayley_neumann=False``. Its default, a
    series in place of the inverse, has the transposed rotation, that of :math:`-Q`, and is orthogonal only
    approximately.

    References
    ----------
    Qiu et al., NeurIPS 2023, arXiv:2306.07280.
    """

    def __init__(self, base_layer: nn.Module, *, block_size: int = 32, block_share: bool = False) -> None:
        super().__init__(base_layer)
        if block_size < 2 or self.in_features % block_size:
            raise ValueError(
                f"OFTLinear: block_size is {block_size}; expected 2 or more, a divisor of in_features = "
                f"{self.in_features}"
            )
        self.block_size, self.block_share = block_size, block_share
        blocks = 1 if block_share else self.in_features // block_size
        self.rotation = nn.Parameter(
            torch.zeros(blocks, block_size * (block_size - 1) // 2,
                        dtype=adapter_dtype(base_layer), device=device_of(base_layer))
        )  # fmt: skip

    def rotations(self) -> Tensor:
        """The blocks of R, ``[blocks, block_size, block_size]``."""
        return cayley(self.rotation)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, of the base layer's dtype."""
        if self.merged:
            return self.base_layer(input)
        return self.base_layer(self._rotated(input, self.rotations().to(input.dtype)).to(input.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight times R."""
        return self._rotated(weight, self.rotations().mT.to(weight.dtype))

    def _rotated(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Every block of the last dimension, as a column, times its matrix."""
        parts = x.unflatten(-1, (-1, self.block_size))
        if self.block_share:
            return (parts @ blocks[0].mT).flatten(-2)
        return torch.einsum("...bk,bck->...bc", parts, blocks).flatten(-2)

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the layer."""
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}, block_share={self.block_share}"


@dataclass(frozen=True, kw_only=True)
class OFTConfig(TunerConfig):
    """What orthogonal fine-tuning does with a model.

    Attributes
    ----------
    target_modules : str or sequence of str
        As for `TunerConfig`: linear layers.
    oft_block_size : int
        `OFTLinear`'s block_size; it must divide the ``in_features`` of each of them.
    block_share : bool
        As for `OFTLinear`.

    References
    ----------
    Qiu et al., NeurIPS 2023, arXiv:2306.07280.
    """

    oft_block_size: int = 32
    block_share: bool = False

    def check(self) -> None:
        """Raise if a field has a value that it cannot have."""
        super().check()
        if self.oft_block_size < 2:
            self._fail("oft_block_size", "2 or more")

    def wrap(self, name: str, module: nn.Module) -> OFTLinear:
        """Build the `OFTLinear` for a linear layer.

        Raises
        ------
        TypeError, ValueError
            If it is none, or `oft_block_size` does not divide its ``in_features``.
        """
        try:
            return OFTLinear(module, block_size=self.oft_block_size, block_share=self.block_share)
        except (TypeError, ValueError) as error:
            raise type(error)(f"OFTConfig: {name}: {error}") from error
