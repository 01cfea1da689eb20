"""Masked autoencoders and the objectives of language models, against closed forms and transformers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor

from tlkernels.methods import finetune, pretrain


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- masks -----------------------------------------------------------------------------------------------------------


def vit_mae(**more: Any) -> Any:
    config = transformers.ViTMAEConfig(
        image_size=12, patch_size=3, num_channels=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=8, **more,
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(config).eval()


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.6, 0.0])
def test_mask_against_transformers(ratio: float) -> None:
    tokens, noise = torch.randn(3, 16, 8), torch.rand(3, 16)
    visible, mask, restore = vit_mae(mask_ratio=ratio).vit.embeddings.random_masking(tokens, noise)
    ours = pretrain.mask_patches(3, 16, ratio, noise=noise)
    assert torch.equal(ours.visible(tokens), visible) and torch.equal(ours.restore, restore)
    assert torch.equal(ours.mask, mask.bool()) and ours.mask.dtype == torch.bool


def test_every_mask_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = pretrain.mask_patches(6000, 5, 0.6, generator=generator)
    counts = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in drawn.mask)
    assert set(counts) == set(itertools.combinations(range(5), 3))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    again = pretrain.mask_patches(6000, 5, 0.6, generator=generator.manual_seed(5))
    assert torch.equal(again.restore, drawn.restore)


def test_masks_are_consistent() -> None:
    drawn = pretrain.mask_patches(4, 10, 0.9)  # 10 * (1 - 0.9) is 0.9999999999999998
    assert drawn.keep.shape == (4, 1) and drawn.mask.sum(1).tolist() == [9] * 4
    drawn = pretrain.mask_patches(4, 10, 0.7)
    assert not drawn.mask.gather(1, drawn.keep).any() and drawn.mask.sum(1).tolist() == [7] * 4
    tokens = torch.randn(4, 10, 3, dtype=torch.float64, requires_grad=True)
    token = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
    whole = pretrain.restore_patches(drawn.visible(tokens), token, drawn.restore)
    assert torch.equal(whole, torch.where(drawn.mask[..., None], token, tokens))
    weight = torch.randn_like(whole)
    (weight * whole).sum().backward()
    torch.testing.assert_close(tokens.grad, weight.masked_fill(drawn.mask[..., None], 0))
    torch.testing.assert_close(token.grad, (weight * drawn.mask[..., None]).sum((0, 1), keepdim=True))


def test_mask_wrong_calls() -> None:
    with pytest.raises(ValueError, match="mask_patches: mask_ratio is 1; expected 0 <= mask_ratio < 1"):
        pretrain.mask_patches(2, 4, 1)
    with pytest.raises(ValueError, match=r"mask_ratio is 0.9 of num_patches 4; expected one to stay visible"):
        pretrain.mask_patches(2, 4, 0.9)
    with pytest.raises(ValueError, match=r"mask_patches: noise has shape \(2, 5\); expected \(2, 4\)"):
        pretrain.mask_patches(2, 4, noise=torch.rand(2, 5))
    with pytest.raises(ValueError, match="mask_patches: num_samples is -1; expected >= 0"):
        pretrain.mask_patches(-1, 4)
    drawn, x = pretrain.mask_patches(2, 4), torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=r"PatchMask.visible: patches has shape \(2, 1, 3\); expected \(2, 4, D\)"):
        drawn.visible(x)
    with pytest.raises(ValueError, match=r"restore_patches: restore has dtype float32 and shape \(2, 4\); expected"):
        pretrain.restore_patches(x, x[0, 0], drawn.restore.float())
    with pytest.raises(ValueError, match=r"restore_patches: mask_token has shape \(2,\); expected 3 elements"):
        pretrain.restore_patches(x, x[0, 0, :2], drawn.restore)
    with pytest.raises(ValueError, match=r"restore_patches: visible has shape \(2, 1\)"):
        pretrain.restore_patches(x[..., 0], x[0, 0], drawn.restore)


# ---- patches and the loss --------------------------------------------------------------------------------------------


def test_patchify() -> None:
    images = torch.randn(2, 2, 12, 12)
    model = vit_mae()
    patches = pretrain.patchify(images, 3)
    assert torch.equal(patches, model.patchify(images))
    assert torch.equal(pretrain.unpatchify(patches, 3, 12), images)
    assert torch.equal(model.unpatchify(patches), images)
    wide = torch.randn(2, 3, 4, 15)
    patches = pretrain.patchify(wide, (2, 5))
    assert patches.shape == (2, 6, 30)
    for (row, column), (p, q), c in itertools.product(
        itertools.product(range(2), range(3)), itertools.product(range(2), range(5)), range(3)
    ):
        assert torch.equal(patches[:, row * 3 + column, (p * 5 + q) * 3 + c], wide[:, c, row * 2 + p, column * 5 + q])
    assert torch.equal(pretrain.unpatchify(patches, (2, 5), (4, 15)), wide)
    with pytest.raises(ValueError, match=r"patchify: images has shape \(2, 3, 4, 15\); expected .* W of 4"):
        pretrain.patchify(wide, 4)
    with pytest.raises(ValueError, match=r"unpatchify: patches has shape \(2, 6, 30\); expected \(N, 4, 9 C\)"):
        pretrain.unpatchify(patches, 3, 6)
    with pytest.raises(ValueError, match=r"unpatchify: image_size is \(7, 7\); expected multiples of \(3, 3\)"):
        pretrain.unpatchify(patches, 3, 7)
    with pytest.raises(ValueError, match="patchify: patch_size is 0; expected >= 1"):
        pretrain.patchify(wide, 0)


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_loss(normalize: bool) -> None:
    images = torch.randn(2, 2, 12, 12, dtype=torch.float64).mul_(3).add_(5)
    prediction = torch.randn(2, 16, 18, dtype=torch.float64, requires_grad=True)
    target, mask = pretrain.patchify(images, 3), pretrain.mask_patches(2, 16).mask

    total, number = prediction.new_zeros(()), 0
    for n, patch in mask.nonzero().tolist():
        wanted = target[n, patch]
        if normalize:
            wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
        total = total + ((prediction[n, patch] - wanted) ** 2).sum() / 18
        number += 1
    loss = pretrain.mae_loss(prediction, target, mask, normalize_patches=normalize)
    torch.testing.assert_close(loss, total / number)
    ours, theirs = (torch.autograd.grad(1.7 * v, prediction)[0] for v in (loss, total / number))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_whole_model_against_transformers(normalize: bool) -> None:
    """The same weights, images and noise: the loss that transformers' model gives."""
    model = vit_mae(norm_pix_loss=normalize, mask_ratio=0.75)
    images, noise = torch.randn(3, 2, 12, 12), torch.rand(3, 16)
    expected = model(images, noise=noise)
    drawn = pretrain.mask_patches(3, 16, 0.75, noise=noise)
    embeddings = model.vit.embeddings
    tokens = embeddings.patch_embeddings(images) + embeddings.position_embeddings[:, 1:]
    first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(3, -1, -1)
    hidden = torch.cat([first, drawn.visible(tokens)], 1)
    for layer in model.vit.layers:
        hidden = layer(hidden)
    hidden = model.decoder.decoder_embed(model.vit.layernorm(hidden))
    body = pretrain.restore_patches(hidden[:, 1:], model.decoder.mask_token, drawn.restore)
    hidden = torch.cat([hidden[:, :1], body], 1) + model.decoder.decoder_pos_embed
    for layer in model.decoder.decoder_layers:
        hidden = layer(hidden)
    prediction = model.decoder.decoder_pred(model.decoder.decoder_norm(hidden))[:, 1:]
    torch.testing.assert_close(prediction, expected.logits)
    loss = pretrain.mae_loss(prediction, pretrain.patchify(images, 3), drawn.mask, normalize_patches=normalize)
    torch.testing.assert_close(loss, expected.loss)


def test_mae_loss_of_low_precision_and_edges() -> None:
    target = torch.randn(2, 4, 64) * 3 + 200  # a mean far from 0
    prediction = torch.randn(2, 4, 64)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    exact = pretrain.mae_loss(prediction.double(), target.double(), mask)
    assert pretrain.mae_loss(prediction, target, mask).item() == pytest.approx(exact.item(), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert pretrain.mae_loss(prediction, target, mask).item() == pytest.approx(exact.item(), rel=1e-4)
    low = pretrain.mae_loss(prediction.bfloat16(), target, mask.bool())
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-2)
    assert pretrain.mae_loss(prediction, target, torch.zeros(2, 4)).item() == 0
    constant = pretrain.mae_loss(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 7.0), torch.ones(1, 1))
    assert constant.item() == 0  # a patch of one colour
    with pytest.raises(ValueError, match="mae_loss: target has patches of 1 value; expected at least 2, the variance"):
        pretrain.mae_loss(prediction[..., :1], target[..., :1], mask)
    with pytest.raises(ValueError, match=r"mae_loss: target has shape \(2, 4, 3\); expected \(2, 4, 64\), like"):
        pretrain.mae_loss(prediction, target[..., :3], mask)
    with pytest.raises(ValueError, match=r"mae_loss: mask has shape \(2, 3\); expected \(2, 4\)"):
        pretrain.mae_loss(prediction, target, mask[:, :3])
    with pytest.raises(TypeError, match="mae_loss: target has dtype int64; expected float32"):
        pretrain.mae_loss(prediction, target.long(), mask)
    with pytest.raises(ValueError, match="mae_loss: eps is -1; expected >= 0"):
        pretrain.mae_loss(prediction, target, mask, eps=-1)


# ---- language models -------------------------------------------------------------------------------------------------


def test_causal_lm_loss() -> None:
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (3, 8))
    labels = ids.masked_fill(torch.rand(3, 8) < 0.3, -100)
    out = model(ids, labels=labels)
    torch.testing.assert_close(pretrain.causal_lm_loss(out.logits, labels), out.loss)
    logits = torch.randn(3, 8, 11, dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    terms = [-p[n, t, labels[n, t + 1]] for n in range(3) for t in range(7) if labels[n, t + 1] >= 0]
    expected = torch.stack(terms).mean()
    loss = pretrain.causal_lm_loss(logits, labels)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(1.7 * v, logits, retain_graph=True)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        pretrain.causal_lm_loss(logits[0], labels[0]), torch.stack(terms[: int((labels[0, 1:] >= 0).sum())]).mean()
    )
    assert pretrain.causal_lm_loss(logits, torch.full_like(labels, -100)).item() == 0
    assert pretrain.causal_lm_loss(logits[:, :1], labels[:, :1]).item() == 0  # nothing follows
    low = pretrain.causal_lm_loss(logits.bfloat16(), labels)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(expected.item(), rel=1e-2)
    with pytest.raises(ValueError, match=r"causal_lm_loss: labels has dtype int64 and shape \(3, 7\), logits has"):
        pretrain.causal_lm_loss(logits, labels[:, 1:])


def documents() -> list[list[str]]:
    return [[f"{name}{i}" for i in range(n)] for name, n in (("a", 40), ("b", 1), ("c", 0), ("d", 25))]


def neighbours() -> list[tuple[str, str]]:
    return [pair for document in documents() for pair in itertools.pairwise(document)]


def test_next_sentence_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    replaced, seconds = 0, Counter[str]()
    for _ in range(60):
        pairs = pretrain.next_sentence_pairs(documents(), generator=generator)
        assert [p.first for p in pairs] == [first for first, _ in neighbours()]
        for pair, (_, second) in zip(pairs, neighbours(), strict=True):
            if pair.label == 0:
                assert pair.second == second
            else:
                assert pair.second[0] != pair.first[0]  # of another document
                replaced += 1
                if pair.first[0] == "a":
                    seconds[pair.second] += 1
    assert stats.binomtest(replaced, 60 * len(neighbours())).pvalue > 1e-3
    assert set(seconds) == {"b0", *(f"d{i}" for i in range(25))}
    assert stats.chisquare(list(seconds.values())).pvalue > 1e-3  # drawn uniformly
    with pytest.raises(ValueError, match="next_sentence_pairs: 2 segments are in one document; expected two documents"):
        pretrain.next_sentence_pairs([["x", "y"], []])


def test_sentence_order_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    swapped = 0
    for _ in range(40):
        pairs = pretrain.sentence_order_pairs(documents(), generator=generator)
        in_order = [(p.second, p.first) if p.label else (p.first, p.second) for p in pairs]
        assert in_order == neighbours()
        swapped += sum(p.label for p in pairs)
    assert stats.binomtest(swapped, 40 * len(neighbours())).pvalue > 1e-3
    assert pretrain.sentence_order_pairs([["x"], []]) == []


def test_replaced_tokens() -> None:
    ids = torch.randint(5, 50, (4, 30))
    masked = finetune.mask_tokens(ids, mask_token_id=4, vocab_size=50, mask_rate=0.4)
    logits = torch.full((4, 30, 50), -torch.inf)
    logits[..., 7], logits[..., 9] = math.log(0.75), math.log(0.25)
    out = pretrain.replace_tokens(masked.input_ids, masked.labels, logits.double())
    chosen = masked.labels >= 0
    assert torch.equal(out.input_ids[~chosen], masked.input_ids[~chosen]) and torch.equal(
        masked.labels[chosen], ids[chosen]
    )
    assert set(out.input_ids[chosen].tolist()) == {7, 9}
    assert torch.equal(out.replaced, chosen & (out.input_ids != ids))
    lucky = ids.clone().fill_(7)  # where the sample is the original
    out = pretrain.replace_tokens(torch.full_like(ids, 4), lucky, logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out.replaced, out.input_ids == 9)
    assert stats.binomtest(int(out.replaced.sum()), ids.numel(), 0.25).pvalue > 1e-3
    nothing = torch.full_like(ids, -100)
    out = pretrain.replace_tokens(ids, nothing, logits)
    assert torch.equal(out.input_ids, ids) and not out.replaced.any()
    with pytest.raises(ValueError, match=r"replace_tokens: logits has shape \(4, 29, 50\); expected \(4, 30, 'V'\)"):
        pretrain.replace_tokens(ids, nothing, logits[:, 1:])
    with pytest.raises(ValueError, match=r"replace_tokens: labels has dtype int64 and shape \(4, 29\); expected"):
        pretrain.replace_tokens(ids, nothing[:, 1:], logits)


def test_replaced_token_loss() -> None:
    config = transformers.ElectraConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.ElectraForPreTraining(config).eval()
    ids, replaced = torch.randint(20, (3, 8)), torch.rand(3, 8) < 0.4
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    out = model(ids, attention_mask=mask, labels=replaced.long())
    torch.testing.assert_close(pretrain.replaced_token_loss(out.logits, replaced, mask), out.loss)
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def formula(d: Tensor) -> Tensor:
        p = torch.sigmoid(d)[mask.bool()]
        return -torch.where(replaced[mask.bool()], p.log(), (1 - p).log()).mean()

    ours, theirs = pretrain.replaced_token_loss(logits, replaced, mask), formula(logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(1.7 * v, logits)[0] for v in (ours, theirs)))
    assert pretrain.replaced_token_loss(logits, replaced, torch.zeros(3, 8)).item() == 0
    torch.testing.assert_close(
        pretrain.replaced_token_loss(torch.tensor([200.0, -200.0]), torch.tensor([0, 1])), torch.tensor(200.0)
    )
    with pytest.raises(ValueError, match=r"replaced_token_loss: replaced has shape \(3, 7\); expected \(3, 8\), like"):
        pretrain.replaced_token_loss(logits, replaced[:, 1:])
