r"""Visual contrastive decoding (VCD): what a model says without seeing the image well is taken from what it says.

.. math:: \log p(y) \propto (1 + \alpha) \, \ell(y \mid v) - \alpha \, \ell(y \mid v'), \qquad
    y \in \{ y : p(y \mid v) \ge \beta \max_w p(w \mid v) \},

with the logits :math:`\ell` for the image v and for the same image drowned in noise, :math:`v'`. Other tokens have
probability 0.

Leng et al., Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding, CVPR
2024, arXiv:2311.16922. The constraint is that of Li et al., Contrastive Decoding, ACL 2023, arXiv:2210.15097.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tlkernels.methods._common import check_float, check_tensor, wide

__all__ = ["ContrastiveDecoder", "contrastive_logits", "diffusion_noise", "plausible_tokens"]

State = TypeVar("State")


def plausible_tokens(logits: Tensor, beta: float = 0.1) -> Tensor:
    r"""The tokens whose probability is at least a share of the likeliest one's.

    Parameters
    ----------
    logits : Tensor
        ``[..., vocabulary]``, floating point.
    beta : float
        The share, from 0 (all tokens) to 1 (the likeliest alone).

    Returns
    -------
    bool Tensor
        Of logits' shape. A logit of -inf is never plausible.

    Raises
    ------
    TypeError, ValueError
        If the dtype does not fit, or `beta` is out of range.

    Notes
    -----
    .. math:: p(y) \ge \beta \max_w p(w) \iff \ell(y) \ge \max_w \ell(w) + \log \beta
    """
    check_float("plausible_tokens", logits=logits)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"plausible_tokens: beta is {beta}; expected 0 <= beta <= 1")
    possible = logits > -torch.inf
    if beta == 0.0:
        return possible
    logits = wide(logits)
    return possible & (logits >= logits.amax(-1, keepdim=True) + math.log(beta))


def contrastive_logits(logits: Tensor, distorted_logits: Tensor, *, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    r"""The logits of visual contrastive decoding.

    Parameters
    ----------
    logits : Tensor
        ``[..., vocabulary]``, float32, bfloat16, float16 or float64: the model's, for the image. Before temperature,
        top-k and the like, which are for the result.
    distorted_logits : Tensor
        The same for the distorted image, or none; finite wherever `logits` is.
    alpha : float
        How much of the second is taken off, >= 0.
    beta : float
        Of `plausible_tokens`, by `logits` alone.

    Returns
    -------
    Tensor
        Of their shape, float32 (float64 for float64), -inf for tokens that are not plausible. Differentiable.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not fit, or `alpha` or `beta` is out of range.

    Notes
    -----
    .. math:: (1 + \alpha) \, \ell - \alpha \, \ell'

    References
    ----------
    Leng 2024.
    """
    op = "contrastive_logits"
    check_float(op, logits=logits, distorted_logits=distorted_logits)
    if logits.dim() < 1 or distorted_logits.shape != logits.shape:
        got, want = tuple(distorted_logits.shape), tuple(logits.shape)
        raise ValueError(f"{op}: distorted_logits has shape {got}; expected {want}, like logits")
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"{op}: alpha is {alpha}; expected >= 0")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{op}: beta is {beta}; expected 0 <= beta <= 1")
    plausible = plausible_tokens(logits.detach(), beta)
    acc = torch.promote_types(torch.promote_types(logits.dtype, distorted_logits.dtype), torch.float32)
    # infinities leave before the difference, whose gradient they would turn into NaN
    original = logits.to(acc).masked_fill(~plausible, 0.0)
    other = distorted_logits.to(acc).masked_fill(~plausible, 0.0)
    return ((1.0 + alpha) * original - alpha * other).masked_fill(~plausible, -torch.inf)


def diffusion_noise(
    images: Tensor, step: int = 500, *, num_steps: int = 1000, generator: torch.Generator | None = None
) -> Tensor:  # fmt: skip
    r"""Drown images in Gaussian noise, as the forward process of a diffusion model does.

    Parameters
    ----------
    images : Tensor
        Any shape, floating point, normalized as the model takes them.
    step : int
        From 0 (nearly the image) to ``num_steps - 1`` (nearly noise). The paper takes 500 and 999 of 1000.
    num_steps : int
    generator : torch.Generator, optional
        On the images' device.

    Returns
    -------
    Tensor
        Of images' shape and dtype.

    Raises
    ------
    TypeError, ValueError
        If the dtype does not fit, or `step` is out of range.

    Notes
    -----
    .. math:: v' = \sqrt{\bar a_s} \, v + \sqrt{1 - \bar a_s} \, \epsilon, \quad
        \bar a_s = \prod_{i \le s} (1 - b_i), \quad b_i = 10^{-5} + (0.005 - 10^{-5}) \, \sigma(u_i)

    with the u evenly from -6 to 6.

    References
    ----------
    Leng 2024, with the noise schedule of its code. Ho et al., Denoising Diffusion Probabilistic Models,
    NeurIPS 2020, arXiv:2006.11239.
    """
    op = "diffusion_noise"
    check_float(op, images=images)
    if num_steps < 1 or not 0 <= step < num_steps:
        raise ValueError(f"{op}: step is {step} of num_steps {num_steps}; expected 0 <= step < num_steps")
    b = torch.sigmoid(torch.linspace(-6, 6, num_steps, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1.0 - b[: step + 1]).prod())
    clean = wide(images)
    noise = torch.empty_like(clean).normal_(generator=generator)
    return (math.sqrt(kept) * clean + math.sqrt(1.0 - kept) * noise).to(images.dtype)


class ContrastiveDecoder(Generic[State]):
    r"""Contrastive decoding, token by token, with the state of both branches: image and distorted image.

    Parameters
    ----------
    step : callable
        ``step(tokens, state) -> (logits, state)``: ``[batch, n]`` new tokens and what the branch remembers (its image,
        its cache of keys and values) to the logits ``[batch, vocabulary]`` of the next token and what it remembers
        then. A state that is changed in place must be another one for each branch.
    state, distorted_state : object
        Of the branches at the start.
    alpha, beta : float
        As for `contrastive_logits`.
    temperature : float
        > 0, of the contrasted logits.
    greedy : bool
        Take the likeliest token instead of a sample.
    generator : torch.Generator, optional
        For samples, on the logits' device.

    Attributes
    ----------
    logits : Tensor or None
        The contrasted logits ``[batch, vocabulary]`` of the last token.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Leng 2024.

    Examples
    --------
    >>> import torch
    >>> table = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    >>> def step(tokens, image):
    ...     return table[tokens[:, -1]] + image, image
    >>> seen, distorted = torch.tensor([0.0, 0.75, 0.0]), torch.zeros(3)
    >>> decoder = ContrastiveDecoder(step, seen, distorted, greedy=True)
    >>> decoder.generate(torch.tensor([[0]]), max_new_tokens=3)
    tensor([[1, 0, 1]])
    """

    def __init__(
        self, step: Callable[[Tensor, State], tuple[Tensor, State]], state: State, distorted_state: State, *,
        alpha: float = 1.0, beta: float = 0.1, temperature: float = 1.0, greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        op = "ContrastiveDecoder"
        if not 0.0 <= alpha < math.inf:
            raise ValueError(f"{op}: alpha is {alpha}; expected >= 0")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"{op}: beta is {beta}; expected 0 <= beta <= 1")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"{op}: temperature is {temperature}; expected > 0")
        self.step, self.alpha, self.beta, self.temperature = step, alpha, beta, temperature
        self.greedy, self.generator = greedy, generator
        self._states = (state, distorted_state)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def next(self, tokens: Tensor) -> Tensor:
        """The token after these.

        Parameters
        ----------
        tokens : Tensor
            int64 ``[batch, n]``, what is new since the last call: the prompt first, then one token at a time.

        Returns
        -------
        Tensor
            int64 ``[batch]``.

        Raises
        ------
        ValueError
            If `tokens` is no matrix of integers, or the logits do not fit. An error leaves the states as they were,
            as far as `step` does not change them in place.
        """
        check_tensor("ContrastiveDecoder", tokens=tokens)
        if tokens.dim() != 2 or tokens.shape[1] < 1 or tokens.is_floating_point():
            got = f"dtype {tokens.dtype} and shape {tuple(tokens.shape)}"
            raise ValueError(f"ContrastiveDecoder: tokens has {got}; expected int64 (batch, 1 or more)")
        logits, state = self.step(tokens, self._states[0])
        distorted_logits, distorted_state = self.step(tokens, self._states[1])
        check_tensor("ContrastiveDecoder", logits=logits)
        if logits.dim() != 2 or logits.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"ContrastiveDecoder: step returns logits of shape {tuple(logits.shape)}; expected "
                f"({tokens.shape[0]}, vocabulary), of the next token alone"
            )
        contrasted = contrastive_logits(logits, distorted_logits, alpha=self.alpha, beta=self.beta)
        if self.greedy:
            chosen = contrasted.argmax(-1)
        else:
            probabilities = (contrasted / self.temperature).softmax(-1)
            chosen = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        self._states, self.logits = (state, distorted_state), contrasted
        return chosen

    def generate(self, tokens: Tensor, max_new_tokens: int, *, eos_token_id: int | None = None) -> Tensor:
        """Go on from a prompt.

        Parameters
        ----------
        tokens : Tensor
            int64 ``[batch, n]``.
        max_new_tokens : int
            1 or more.
        eos_token_id : int, optional
            Ends a sequence, which is filled up with it. All ended, so is the generation.

        Returns
        -------
        Tensor
            int64 ``[batch, m]``, the new tokens, m <= max_new_tokens.

        Raises
        ------
        ValueError
            As `next`; or if `max_new_tokens` is below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"ContrastiveDecoder: max_new_tokens is {max_new_tokens}; expected 1 or more")
        new: list[Tensor] = []
        ended: Tensor | None = None
        for _ in range(max_new_tokens):
            chosen = self.next(tokens)
            if eos_token_id is not None:
                chosen = chosen if ended is None else chosen.masked_fill(ended, eos_token_id)
                ended = chosen == eos_token_id
            new.append(chosen)
            tokens = chosen[:, None]
            if ended is not None and bool(ended.all()):
                break
        return torch.stack(new, dim=1)
