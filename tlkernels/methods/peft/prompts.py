r"""Learned context for a frozen language model: prompts before the input, prefixes in every layer.

Prompt tuning and P-tuning put n learned vectors before the embedded input, :math:`[P; E(x)]`, with

.. math:: P = \text{a parameter (Lester)}, \qquad P = \mathrm{MLP}(P') \text{ or } \mathrm{MLP}(\mathrm{BiLSTM}(P'))
    \text{ (P-tuning v1)} .

Prefix tuning and P-tuning v2 put n learned keys and values before those of every layer l,

.. math:: \mathrm{softmax}\big( q_l [P^K_l; K_l]^T / \sqrt{d_h} \big) [P^V_l; V_l], \qquad
    P = \mathrm{MLP}_\theta(P') \text{ (Li and Liang)}, \quad P = \text{a parameter (P-tuning v2)} .

The models are those of transformers. Prompts go in through ``inputs_embeds``, prefixes through ``past_key_values``.

Brian Lester, Rami Al-Rfou, Noah Constant. *The Power of Scale for Parameter-Efficient Prompt Tuning.* EMNLP 2021,
arXiv:2104.08691. Xiang Lisa Li, Percy Liang. *Prefix-Tuning: Optimizing Continuous Prompts for Generation.* ACL 2021,
arXiv:2101.00190. Xiao Liu et al. *GPT Understands, Too.* 2021, arXiv:2103.10385. Xiao Liu et al. *P-Tuning v2.* ACL
2022, arXiv:2110.07602.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.methods.peft._tuner import has_suffix

__all__ = ["PrefixTuning", "PromptTuning"]


class _Prompted(nn.Module):
    """A frozen transformers model and the n positions that are put before its input."""

    num_virtual_tokens: int

    def __init__(self, model: nn.Module, num_virtual_tokens: int, modules_to_save: Sequence[str]) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(model, nn.Module) or not callable(getattr(model, "get_input_embeddings", None)):
            raise TypeError(f"{name}: model is a {type(model).__name__}; expected a model of transformers")
        if num_virtual_tokens < 1:
            raise ValueError(f"{name}: num_virtual_tokens is {num_virtual_tokens}; expected 1 or more")
        if isinstance(modules_to_save, str):
            raise TypeError(f"{name}: modules_to_save is {modules_to_save!r}; expected a sequence of names")
        modules = [module for module, _ in model.named_modules()]
        unknown = [saved for saved in modules_to_save if not any(has_suffix(module, [saved]) for module in modules)]
        if unknown:
            raise ValueError(f"{name}: modules_to_save has {unknown[0]!r}, which is no module of the model")
        self.num_virtual_tokens, self.modules_to_save = num_virtual_tokens, tuple(modules_to_save)

    def _freeze(self, model: nn.Module) -> None:
        """Take the model in: the last step of a constructor, as it changes the model."""
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if has_suffix(name, self.modules_to_save):
                module.requires_grad_(True)
        self.model = model

    def restore(self) -> nn.Module:
        """Return the model, with the ``requires_grad`` flags that it had."""
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags[name])
        return self.model

    def prompt_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained beside `modules_to_save`, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("model.")}

    def _lengthened(self, mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """The attention mask ``[batch, n + length]``: virtual tokens are always seen."""
        name = type(self).__name__
        if mask is None:
            return torch.ones(batch, self.num_virtual_tokens + length, dtype=torch.long, device=device)
        if tuple(mask.shape) != (batch, length):
            got = tuple(mask.shape)
            raise ValueError(f"{name}: attention_mask has shape {got}; expected ({batch}, {length}), like the input")
        return torch.cat([mask.new_ones(batch, self.num_virtual_tokens), mask], dim=1)

    def _input_shape(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: expected input_ids or inputs_embeds, and not both")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        return given.shape[0], given.shape[1], given.device

    def extra_repr(self) -> str:
        """Return what ``repr`` says of the module."""
        return f"num_virtual_tokens={self.num_virtual_tokens}"


class PromptTuning(_Prompted):
    r"""A frozen model that reads n learned vectors before its input.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With ``inputs_embeds`` and ``attention_mask`` in its call: BERT, GPT-2, Llama and their like, with any head.
        Frozen here; `restore` gives back its ``requires_grad`` flags. Not an encoder-decoder model.
    num_virtual_tokens : int
        n, >= 1.
    init : str or Tensor
        ``"random"``: normal, with the mean and standard deviation of the embedding table. ``"vocab"``: the embeddings
        of n tokens drawn at random. An integer tensor ``[any]``: the embeddings of these tokens (of a text), repeated
        or cut to n. A floating-point tensor ``[n, features]``: these values.
    encoder : str or None
        None: the vectors are the parameter (prompt tuning). ``"mlp"``, ``"lstm"``: they come out of a network whose
        input is the parameter (P-tuning v1).
    encoder_hidden_size : int, optional
        Of that network; the embedding size by default.
    modules_to_save : sequence of str
        Modules of the model to train as they are, by name or last part of it, such as ``["classifier"]``.
    generator : torch.Generator, optional
        For the initial values.

    Attributes
    ----------
    prompt : torch.nn.Parameter
        ``[n, features]``, float32 (float64 for models in it).
    encoder : torch.nn.Module or None
    model : torch.nn.Module

    Raises
    ------
    TypeError
        If `model` is none of transformers.
    ValueError
        If an argument is out of range; if the model is an encoder-decoder.

    Notes
    -----
    Outputs have n positions more than the input, at the front. Heads that read the first position, BERT's pooler for
    one, read the first virtual token.

    References
    ----------
    Lester et al., EMNLP 2021, arXiv:2104.08691. Liu et al., GPT Understands, Too, 2021, arXiv:2103.10385.
    """

    def __init__(
        self, model: nn.Module, num_virtual_tokens: int, *, init: str | Tensor = "random", encoder: str | None = None,
        encoder_hidden_size: int | None = None, modules_to_save: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, num_virtual_tokens, modules_to_save)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError("PromptTuning: model is an encoder-decoder; expected an encoder or a decoder")
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        values = _initial_prompt(table, num_virtual_tokens, init, generator)
        if encoder not in (None, "mlp", "lstm"):
            raise ValueError(f"PromptTuning: encoder is {encoder!r}; expected 'mlp', 'lstm' or None")
        self.prompt = nn.Parameter(values)
        hidden = values.shape[1] if encoder_hidden_size is None else encoder_hidden_size
        if hidden < 1:
            raise ValueError(f"PromptTuning: encoder_hidden_size is {hidden}; expected 1 or more")
        self.encoder = None if encoder is None else _PromptEncoder(values.shape[1], hidden, encoder == "lstm")
        if self.encoder is not None:
            self.encoder.to(values.device, values.dtype)
        self._freeze(model)

    def virtual_tokens(self) -> Tensor:
        """The vectors that are put before the input, ``[n, features]``, differentiable."""
        return self.prompt if self.encoder is None else self.encoder(self.prompt)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Call the model on the virtual tokens and the input.

        Parameters
        ----------
        input_ids : Tensor
            ``[batch, length]``, or `inputs_embeds`, ``[batch, length, features]``.
        attention_mask : Tensor, optional
            ``[batch, length]``, 1 for what is seen.
        labels : Tensor, optional
            Handed on; integers of the shape ``[batch, length]`` are labels of tokens: -100, which losses pass over,
            is put before them.
        token_type_ids : Tensor, optional
            ``[batch, length]``. Virtual tokens are of type 0.
        **kwargs
            Handed on.

        Returns
        -------
        What the model returns.

        Raises
        ------
        ValueError
            If shapes do not fit, or ``position_ids`` is among the arguments: the model counts them itself.
        """
        embeds, mask = self._inputs(input_ids, attention_mask, inputs_embeds)
        if kwargs.get("position_ids") is not None:
            raise ValueError("PromptTuning: position_ids is given; expected None: the virtual tokens come first")
        batch, length = embeds.shape[0], embeds.shape[1] - self.num_virtual_tokens
        if labels is not None and labels.shape == (batch, length) and not labels.is_floating_point():
            labels = torch.cat([labels.new_full((batch, self.num_virtual_tokens), -100), labels], dim=1)
        if labels is not None:
            kwargs["labels"] = labels
        if token_type_ids is not None:
            front = token_type_ids.new_zeros(batch, self.num_virtual_tokens)
            kwargs["token_type_ids"] = torch.cat([front, token_type_ids], dim=1)
        return self.model(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue the input, as the model's ``generate`` does; the ids that it returns are the new ones alone."""
        embeds, mask = self._inputs(input_ids, attention_mask, None)
        return _generate(self)(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def _inputs(self, input_ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, device = self._input_shape(input_ids, embeds)
        mask = self._lengthened(mask, batch, length, device)
        if embeds is None:
            embeds = self.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        prompt = self.virtual_tokens().to(embeds.dtype).expand(batch, -1, -1)
        return torch.cat([prompt, embeds], dim=1), mask


class _PromptEncoder(nn.Module):
    """P-tuning's network from vectors to virtual tokens."""

    def __init__(self, features: int, hidden: int, lstm: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, bidirectional=True, batch_first=True) if lstm else None
        sizes = [2 * hidden, 2 * hidden, features] if lstm else [features, hidden, hidden, features]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, prompt: Tensor) -> Tensor:
        if self.lstm is not None:
            prompt = self.lstm(prompt[None])[0][0]
        return self.mlp(prompt)


def _initial_prompt(table: Tensor, n: int, init: str | Tensor, generator: torch.Generator | None) -> Tensor:
    dtype = torch.promote_types(table.dtype, torch.float32)
    if not table.is_floating_point():
        raise TypeError(f"PromptTuning: the model's embedding table has dtype {table.dtype}; expected floating point")
    rows = table.detach().to(dtype)
    if isinstance(init, Tensor) and init.is_floating_point():
        if tuple(init.shape) != (n, table.shape[1]):
            got = tuple(init.shape)
            raise ValueError(f"PromptTuning: init has shape {got}; expected ({n}, {table.shape[1]})")
        return init.detach().to(table.device, dtype).clone()
    if isinstance(init, Tensor):
        ids = init.detach().flatten().to(table.device)
        if ids.numel() == 0 or bool(((ids < 0) | (ids >= len(table))).any()):
            want = f"at least one, all from 0 to {len(table) - 1}"
            raise ValueError(f"PromptTuning: init has {ids.numel()} ids; expected {want}")
        return rows[ids.repeat(-(-n // ids.numel()))[:n]].clone()
    if init == "vocab":
        return rows[torch.randint(len(table), (n,), generator=generator).to(table.device)].clone()
    if init == "random":
        normal = torch.randn(n, table.shape[1], generator=generator, dtype=dtype)
        return normal.to(table.device) * rows.std() + rows.mean()
    raise ValueError(f"PromptTuning: init is {init!r}; expected 'random', 'vocab' or a tensor")


class PrefixTuning(_Prompted):
    r"""A frozen model with n learned keys and values before those of every layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With ``past_key_values`` in its call or in that of the model under its head: decoders (GPT-2, Llama and their
        like) and encoders such as BERT. Frozen here; `restore` gives back its ``requires_grad`` flags. Not an
        encoder-decoder model.
    num_virtual_tokens : int
        n, >= 1.
    projection_size : int or None
        The hidden size of the network that the prefix comes out of while it is trained (Li and Liang). None: the
        prefix is the parameter (P-tuning v2).
    modules_to_save : sequence of str
        Modules of the model to train as they are, by name or last part of it, such as ``["classifier"]``.
    generator : torch.Generator, optional
        For the initial values: standard normal.

    Attributes
    ----------
    prefix : torch.nn.Parameter
        Without a network ``[n, layers * 2 * kv_features]``: layer by layer, keys before values. With it,
        ``[n, kv_features]``, its input. Here kv_features is the number of key and value heads times their size.
    projection : torch.nn.Sequential or None
        Linear, tanh, Linear.
    model : torch.nn.Module

    Raises
    ------
    TypeError
        If `model` is none of transformers.
    ValueError
        If an argument is out of range, or the model cannot take a prefix.

    Notes
    -----
    Outputs have as many positions as the input. Positions are counted from n on, as the model counts them after a
    cache; the prefix's keys are used as they are, without a rotation for their position. Layers with a sliding window
    see the prefix as long as it is in the window. Gradient checkpointing cannot be used: it would call layers anew on
    a cache that has grown.

    Encoders are given a mask of four dimensions, which the attention implementations "eager" and "sdpa" take.

    Parameters laid out in this way are those of the PEFT library's prefix tuning.

    References
    ----------
    Li and Liang, ACL 2021, arXiv:2101.00190. Liu et al., P-Tuning v2, ACL 2022, arXiv:2110.07602.
    """

    def __init__(
        self, model: nn.Module, num_virtual_tokens: int, *, projection_size: int | None = None,
        modules_to_save: Sequence[str] = (), generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, num_virtual_tokens, modules_to_save)
        config: Any = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            raise ValueError("PrefixTuning: model is an encoder-decoder or has no config; expected encoder or decoder")
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        if "past_key_values" not in inspect.signature(base.forward).parameters:
            raise ValueError(
                f"PrefixTuning: {type(base).__name__} takes no past_key_values; expected a model that does"
            )
        if projection_size is not None and projection_size < 1:
            raise ValueError(f"PrefixTuning: projection_size is {projection_size}; expected 1 or more, or None")
        text = config.get_text_config()
        heads: int = text.num_attention_heads
        self._layers: int = text.num_hidden_layers
        self._kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
        self._head_size: int = getattr(text, "head_dim", None) or text.hidden_size // heads
        # A decoder's own mask counts the cache in; that of an encoder, whose attention says that it is not causal, has
        # to be made here.
        causal = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
        self._is_encoder = bool(causal) and not any(causal)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        where: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        features = self._kv_heads * self._head_size
        whole = self._layers * 2 * features
        size = whole if projection_size is None else features
        self.prefix = nn.Parameter(torch.randn(num_virtual_tokens, size, generator=generator).to(**where))
        self.projection = None if projection_size is None else nn.Sequential(
            nn.Linear(features, projection_size, **where), nn.Tanh(), nn.Linear(projection_size, whole, **where)
        )  # fmt: skip
        self._freeze(model)

    def virtual_prefix(self) -> Tensor:
        """The prefix of every layer, ``[layers, 2, kv_heads, n, head_size]``, differentiable; keys before values."""
        prefix = self.prefix if self.projection is None else self.projection(self.prefix)
        shape = self.num_virtual_tokens, self._layers, 2, self._kv_heads, self._head_size
        return prefix.view(shape).permute(1, 2, 3, 0, 4)

    @torch.no_grad()
    def fold_(self) -> PrefixTuning:
        """Replace the network by the prefix that comes out of it, as Li and Liang do after training."""
        if self.projection is not None:
            self.prefix, self.projection = nn.Parameter(self.projection(self.prefix)), None
        return self

    def cache(self, batch: int, dtype: torch.dtype | None = None) -> Any:
        """A new cache of transformers that begins with the prefix, for a batch of this size.

        Raises
        ------
        ImportError
            Without transformers.
        """
        try:
            from transformers import DynamicCache
        except ImportError as error:
            raise ImportError("PrefixTuning needs transformers: pip install transformers") from error
        cache = DynamicCache(config=self.model.config.get_text_config())  # type: ignore[operator,union-attr]
        for layer, (key, value) in enumerate(self.virtual_prefix().to(dtype).unbind()):
            cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
        return cache

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Call the model on the input, with the prefix in its cache.

        Parameters
        ----------
        input_ids : Tensor
            ``[batch, length]``, or `inputs_embeds`, ``[batch, length, features]``.
        attention_mask : Tensor, optional
            ``[batch, length]``, 1 for what is seen.
        **kwargs
            Handed on. ``position_ids``, where given, are those of the input alone: n is added to them.

        Returns
        -------
        What the model returns.

        Raises
        ------
        ValueError
            If shapes do not fit, or ``past_key_values`` is among the arguments.
        RuntimeError
            With gradient checkpointing.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("PrefixTuning: past_key_values is given; expected None: the prefix takes its place")
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise RuntimeError("PrefixTuning: the model uses gradient checkpointing, which would grow its cache twice")
        batch, length, device = self._input_shape(input_ids, inputs_embeds)
        mask, dtype = self._lengthened(attention_mask, batch, length, device), self._dtype()
        if self._is_encoder:
            hidden = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(mask == 0, torch.finfo(dtype).min)
            mask = hidden[:, None, None, :].expand(-1, 1, length, -1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.num_virtual_tokens
        given: dict[str, Any] = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return self.model(**given, attention_mask=mask, past_key_values=self.cache(batch, dtype), **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue the input, as the model's ``generate`` does; the ids that it returns are the new ones alone."""
        batch, length, device = self._input_shape(input_ids, None)
        mask = self._lengthened(attention_mask, batch, length, device)
        # The model passes over as many ids as its cache holds. These stand for the prefix, and are never read.
        ids = torch.cat([input_ids.new_zeros(batch, self.num_virtual_tokens), input_ids], dim=1)
        generate = _generate(self)
        settings = kwargs.get("generation_config") or self.model.generation_config
        sizes = [kwargs.get(name) or getattr(settings, name, None) for name in ("num_beams", "num_return_sequences")]
        cache = self.cache(batch * max(size or 1 for size in sizes), self._dtype())
        output = generate(ids, attention_mask=mask, past_key_values=cache, **kwargs)
        if not isinstance(output, Tensor):
            output.sequences = output.sequences[:, ids.shape[1] :]
            return output
        return output[:, ids.shape[1] :]

    def _dtype(self) -> torch.dtype:
        """What the model computes keys in."""
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.dtype


def _generate(prompted: _Prompted) -> Callable[..., Any]:
    generate = getattr(prompted.model, "generate", None)
    if not callable(generate):
        name = type(prompted.model).__name__
        raise TypeError(f"{type(prompted).__name__}.generate: model is a {name}; expected a causal language model")
    return generate
