r"""Classes from their names: a text for each class becomes the weight of a linear classifier.

With prompts :math:`p_{c1}, \dots, p_{cK}` for class c, such as "a photo of a dog.", and a text encoder g,

.. math::
    w_c = \frac{\bar w_c}{\lVert \bar w_c \rVert}, \qquad
    \bar w_c = \frac1K \sum_k \frac{g(p_{ck})}{\lVert g(p_{ck}) \rVert}, \qquad
    \hat y(x) = \arg\max_c \, s \, \frac{x}{\lVert x \rVert} \cdot w_c .

Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021,
arXiv:2103.00020, section 3.1. Sarah Pratt, Ian Covert, Rosanne Liu, Ali Farhadi. *What does a platypus look like?
Generating customized prompts for zero-shot image classification.* ICCV 2023, arXiv:2209.03320 (prompts by class).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tlkernels.methods._common import accumulator, check_float, check_tensor, normalized, wide
from tlkernels.ops._common import name_of, no_autocast

__all__ = ["Prediction", "ZeroShotClassifier", "ensemble_embeddings", "prompt_ensemble"]

Template = str | Callable[[str], str]


def prompt_ensemble(
    class_names: Sequence[str], templates: Sequence[Template] = ("a photo of a {}.",)
) -> dict[str, list[str]]:  # fmt: skip
    """Write each class name into each template.

    Parameters
    ----------
    class_names : sequence of str
        Distinct.
    templates : sequence of str or callable
        With a ``{}`` for the name, or functions of the name.

    Returns
    -------
    dict of str to list of str
        The prompts of each class, in the order of the templates.

    Raises
    ------
    TypeError, ValueError
        If there are no classes or templates, one is a plain string, a name occurs twice, or a template has no place
        for the name.

    Examples
    --------
    >>> prompt_ensemble(["cat"], ["a photo of a {}.", str.upper])
    {'cat': ['a photo of a cat.', 'CAT']}
    """
    op = "prompt_ensemble"
    for name, given in (("class_names", class_names), ("templates", templates)):
        if isinstance(given, str):
            raise TypeError(f"{op}: {name} is the string {given!r}; expected a sequence of them")
        if not len(given):
            raise ValueError(f"{op}: {name} is empty; expected at least one")
    _check_distinct(op, class_names)
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"{op}: the template {template!r} has no {{}}; expected a place for the class name")
    return {c: [t.replace("{}", c) if isinstance(t, str) else t(c) for t in templates] for c in class_names}


def _check_distinct(op: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{op}: class_names has {name!r} twice; expected distinct names")
        seen.add(name)


def ensemble_embeddings(embeddings: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    r"""The mean direction of each class's embeddings.

    .. math:: w_c = \frac{\bar w_c}{\lVert \bar w_c \rVert}, \qquad
        \bar w_c = \frac{1}{K_c} \sum_{k : c_k = c} \frac{e_k}{\lVert e_k \rVert}

    Parameters
    ----------
    embeddings : Tensor [K, D], float32, bfloat16, float16 or float64
    classes : int64 Tensor [K]
        :math:`c_k`; each class has at least one.
    num_classes : int
        C.

    Returns
    -------
    Tensor [C, D]
        Of the embeddings' dtype; differentiable.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Radford et al., ICML 2021, arXiv:2103.00020, section 3.1.4.
    """
    op = "ensemble_embeddings"
    check_float(op, embeddings=embeddings)
    if embeddings.dim() != 2:
        raise ValueError(f"{op}: embeddings has shape {tuple(embeddings.shape)}; expected (K, D)")
    check_tensor(op, classes=classes)
    if classes.dtype != torch.int64 or classes.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{op}: classes has dtype {name_of(classes.dtype)} and shape {tuple(classes.shape)}; expected int64 "
            f"({embeddings.shape[0]},)"
        )
    inside = bool(((classes >= 0) & (classes < num_classes)).all())
    if num_classes < 1 or not inside or not bool(torch.bincount(classes, minlength=num_classes).all()):
        raise ValueError(f"{op}: classes has not each of 0 to {num_classes - 1}, and only these; expected that")
    directions = normalized(wide(embeddings))
    sums = directions.new_zeros(num_classes, directions.shape[1]).index_add(0, classes, directions)
    return normalized(sums).to(embeddings.dtype)  # of the mean the direction is the same


class Prediction(NamedTuple):
    """What `ZeroShotClassifier.predict` returns; the first column is the best."""

    #: int64 [N, k]
    classes: Tensor
    #: float [N, k], the softmax over all classes
    probabilities: Tensor


class ZeroShotClassifier(nn.Module):
    r"""A linear classifier on normalized image embeddings, whose weights were texts.

    Parameters
    ----------
    weight : Tensor [C, D]
        Normalized here.
    class_names : sequence of str
        C distinct ones.
    logit_scale : float or Tensor of one element
        s, which only the probabilities depend on.

    Attributes
    ----------
    weight : Tensor [C, D]
    logit_scale : Tensor
        Buffers: nothing here is trained. ``torch.nn.Linear`` with ``logit_scale * weight`` is the start of a
        fine-tuned head.
    class_names : tuple of str

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    `from_prompts` makes the weights.

    References
    ----------
    Radford et al., ICML 2021, arXiv:2103.00020, section 3.1.

    Examples
    --------
    >>> import torch
    >>> vectors = {"a photo of a cat.": [1.0, 0.0], "a photo of a dog.": [0.0, 1.0]}
    >>> def encode(texts):
    ...     return torch.tensor([vectors[text] for text in texts])
    >>> classifier = ZeroShotClassifier.from_prompts(prompt_ensemble(["cat", "dog"]), encode, logit_scale=100.0)
    >>> classifier.names(torch.tensor([[0.2, 0.9]]))
    ['dog']
    """

    weight: Tensor
    logit_scale: Tensor

    def __init__(self, weight: Tensor, class_names: Sequence[str], logit_scale: float | Tensor = 100.0) -> None:
        own = type(self).__name__
        check_float(own, weight=weight)
        if isinstance(class_names, str):
            raise TypeError(f"{own}: class_names is the string {class_names!r}; expected a sequence of them")
        if weight.dim() != 2 or weight.shape[0] != len(class_names):
            raise ValueError(f"{own}: weight has shape {tuple(weight.shape)}; expected ({len(class_names)}, D)")
        _check_distinct(own, class_names)
        super().__init__()
        self.class_names = tuple(class_names)
        scale = torch.as_tensor(logit_scale, dtype=accumulator(weight.dtype), device=weight.device).detach()
        if scale.numel() != 1 or not scale.item() > 0:
            raise ValueError(f"{own}: logit_scale is {logit_scale}; expected one number > 0")
        self.register_buffer("weight", normalized(weight.detach()))
        self.register_buffer("logit_scale", scale.reshape(()).clone())

    @classmethod
    @torch.no_grad()
    def from_prompts(
        cls, prompts: Mapping[str, Sequence[str]], encode: Callable[[Any], Tensor], *,
        tokenize: Callable[[list[str]], Any] | None = None, logit_scale: float | Tensor = 100.0, batch_size: int = 256,
    ) -> ZeroShotClassifier:  # fmt: skip
        """Encode the prompts of each class, and take their mean directions.

        Parameters
        ----------
        prompts : mapping of str to sequence of str
            Of `prompt_ensemble`, or written for each class (CuPL); at least one each.
        encode : callable
            From what `tokenize` returns to embeddings ``[K, D]``, e.g. ``model.encode_text`` of a `TwoTower` in
            evaluation mode.
        tokenize : callable, optional
            From a list of str to the encoder's input. Without it `encode` gets the list.
        logit_scale : float or Tensor of one element
        batch_size : int
            Prompts at a time, across classes.

        Returns
        -------
        ZeroShotClassifier

        Raises
        ------
        TypeError, ValueError
            If an argument is not as stated, or `encode` returns something else.
        """
        op = f"{cls.__name__}.from_prompts"
        if not prompts:
            raise ValueError(f"{op}: prompts is empty; expected at least one class")
        if batch_size < 1:
            raise ValueError(f"{op}: batch_size is {batch_size}; expected >= 1")
        for name, texts in prompts.items():
            if isinstance(texts, str):
                raise TypeError(f"{op}: prompts[{name!r}] is the string {texts!r}; expected a sequence of them")
            if not len(texts):
                raise ValueError(f"{op}: prompts[{name!r}] is empty; expected at least one")
        flat = [text for texts in prompts.values() for text in texts]
        embeddings = []
        for start in range(0, len(flat), batch_size):
            batch = flat[start : start + batch_size]
            out = encode(batch if tokenize is None else tokenize(batch))
            if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != len(batch):
                got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(f"{op}: encode returns {got} for {len(batch)} texts; expected ({len(batch)}, D)")
            embeddings.append(out)
        every = torch.cat(embeddings)
        sizes = torch.tensor([len(texts) for texts in prompts.values()])
        classes = torch.arange(len(prompts)).repeat_interleave(sizes).to(every.device)
        return cls(ensemble_embeddings(every, classes, len(prompts)), list(prompts), logit_scale)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """The logits ``[N, C]`` of image embeddings ``[N, D]``, which are normalized here; float32 or float64."""
        own = type(self).__name__
        check_float(own, image_embeds=image_embeds)
        if image_embeds.dim() != 2 or image_embeds.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{own}: image_embeds has shape {tuple(image_embeds.shape)}; expected (N, {self.weight.shape[1]})"
            )
        acc = accumulator(torch.promote_types(image_embeds.dtype, self.weight.dtype))
        with no_autocast(image_embeds.device):
            return self.logit_scale.to(acc) * (normalized(image_embeds.to(acc)) @ self.weight.to(acc).T)

    def predict(self, image_embeds: Tensor, k: int = 1) -> Prediction:
        """The k best classes of each image, and their probabilities.

        Parameters
        ----------
        image_embeds : Tensor [N, D]
        k : int
            1 to C.

        Raises
        ------
        ValueError
            If k is not as stated.
        """
        if not 1 <= k <= len(self.class_names):
            raise ValueError(f"{type(self).__name__}.predict: k is {k}; expected 1 <= k <= {len(self.class_names)}")
        probabilities, classes = self(image_embeds).softmax(1).topk(k)
        return Prediction(classes, probabilities)

    def names(self, image_embeds: Tensor) -> list[str]:
        """The name of each image's best class."""
        return [self.class_names[c] for c in self.predict(image_embeds).classes[:, 0].tolist()]

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the classifier."""
        return f"classes={len(self.class_names)}, embed_dim={self.weight.shape[1]}"
