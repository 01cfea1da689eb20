"""Fusion of modalities, against the papers' formulas in float64, torch's attention, and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.multimodal import fusion

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).requires_grad_(grad)


def double(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64, with parameters that are all random: biases and gates too."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DOUBLE) * 0.4)
    return module


def assert_same(out: Tensor, want: Tensor, variables: list[Tensor], rtol: float = 1e-10) -> None:
    """Equal, with equal gradients for a non-uniform grad_output."""
    torch.testing.assert_close(out, want, rtol=rtol, atol=1e-10)
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    got = torch.autograd.grad(out, variables, weights, retain_graph=True)
    wanted = torch.autograd.grad(want, variables, weights, retain_graph=True)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-10)


# ---- vectors --------------------------------------------------------------------------------------------------------


def test_early_fusion() -> None:
    a, b = randn(3, 2, 4, grad=True), randn(3, 2, 5, grad=True)
    layer = double(fusion.EarlyFusion([4, 5], 6))
    weight, bias = layer.network[0].weight, layer.network[0].bias
    # a linear layer on the concatenation is a sum of one for each modality
    assert_same(layer([a, b]), a @ weight[:, :4].T + b @ weight[:, 4:].T + bias, [a, b, weight, bias])
    deep = double(fusion.EarlyFusion([4, 5], 2, [7, 3]))
    first, second, third = (m for m in deep.network if isinstance(m, nn.Linear))
    want = third(functional.relu(second(functional.relu(first(torch.cat([a, b], -1))))))
    assert_same(deep([a, b]), want, [a, b, first.weight])
    dropped = fusion.EarlyFusion([4], 2, [5], dropout=0.25)
    assert [m.p for m in dropped.network if isinstance(m, nn.Dropout)] == [0.25]


def test_late_fusion() -> None:
    logits = [randn(4, 3, seed=m, grad=True) for m in range(3)]
    mean = fusion.LateFusion(3).double()
    assert_same(mean(logits), (logits[0] + logits[1] + logits[2]) / 3, logits)
    weighted = fusion.LateFusion(3, weights=[1, 2, 5], space="probabilities").double()
    p = [x.softmax(1) for x in logits]
    assert_same(weighted(logits), ((p[0] + 2 * p[1] + 5 * p[2]) / 8).log(), logits)
    learned = fusion.LateFusion(3, weights="learned").double()
    assert learned(logits).allclose(mean(logits))
    learned = double(learned)
    w = learned.weight_logits.exp() / learned.weight_logits.exp().sum()
    assert_same(
        learned(logits), w[0] * logits[0] + w[1] * logits[1] + w[2] * logits[2], [*logits, learned.weight_logits]
    )


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_late_fusion_of_what_is_present(space: Any) -> None:
    logits = [randn(3, 4, seed=m) for m in range(3)]
    present = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    logits[1] = logits[1].index_fill(0, torch.tensor([0]), math.nan).requires_grad_()
    layer = double(fusion.LateFusion(3, weights="learned", space=space))
    out = layer(logits, present)
    w = layer.weight_logits.softmax(0)
    f = (lambda x: x) if space == "logits" else (lambda x: x.softmax(-1))
    rows = [(w[0] * f(logits[0][0]) + w[2] * f(logits[2][0])) / (w[0] + w[2]), f(logits[1][1])]
    rows.append(sum(w[m] * f(logits[m][2]) for m in range(3)))
    want = torch.stack(rows)
    torch.testing.assert_close(out, want if space == "logits" else want.log())
    torch.testing.assert_close(
        torch.autograd.grad(out[:, 1].sum(), layer.weight_logits, retain_graph=True)[0],
        torch.autograd.grad((want if space == "logits" else want.log())[:, 1].sum(), layer.weight_logits)[0],
    )
    out[:, 1].sum().backward()
    assert logits[1].grad is not None and logits[1].grad.isfinite().all() and not logits[1].grad[0].any()


def test_gated_fusion() -> None:
    a, b, c = randn(2, 5, 4, grad=True), randn(2, 5, 3, grad=True), randn(2, 5, 2, grad=True)
    two = double(fusion.GatedFusion([4, 3], 6))
    assert len(two.gates) == 1 and two.hidden[0].bias is None
    z = torch.sigmoid(torch.cat([a, b], -1) @ two.gates[0].weight.T)
    want = z * torch.tanh(a @ two.hidden[0].weight.T) + (1 - z) * torch.tanh(b @ two.hidden[1].weight.T)
    assert_same(two([a, b]), want, [a, b, *two.parameters()])
    three = double(fusion.GatedFusion([4, 3, 2], 6, bias=True))
    together = torch.cat([a, b, c], -1)
    want = sum(torch.sigmoid(g(together)) * torch.tanh(h(x))
               for g, h, x in zip(three.gates, three.hidden, (a, b, c), strict=True))  # fmt: skip
    assert_same(three([a, b, c]), want, [a, b, c, *three.parameters()])


def test_tensor_fusion() -> None:
    a, b, c = randn(5, 2, grad=True), randn(5, 3, grad=True), randn(5, 4, grad=True)
    layer = double(fusion.TensorFusion([2, 3, 4], 6))
    ones = torch.ones(5, 1, dtype=DOUBLE)
    tensor = torch.einsum("bi,bj,bk->bijk", *(torch.cat([x, ones], 1) for x in (a, b, c)))
    want = torch.einsum("oijk,bijk->bo", layer.linear.weight.view(6, 3, 4, 5), tensor) + layer.linear.bias
    assert_same(layer([a, b, c]), want, [a, b, c, *layer.parameters()])


@pytest.mark.parametrize(("widths", "rank"), [([2, 3, 4], 3), ([5, 2], 1), ([3], 2), ([2, 1, 3, 2], 4)])
def test_low_rank_fusion_is_tensor_fusion(widths: list[int], rank: int) -> None:
    features = [randn(2, 3, width, seed=m, grad=True) for m, width in enumerate(widths)]
    low = double(fusion.LowRankFusion(widths, 5, rank))
    weight = low.weight()
    assert weight.shape == (5, math.prod(w + 1 for w in widths))
    full = fusion.TensorFusion(widths, 5).double()
    want = torch.func.functional_call(full, {"linear.weight": weight, "linear.bias": low.bias}, (features,))
    assert_same(low(features), want, [*features, *low.parameters()])


def test_low_rank_fusion_starts_at_variance_one() -> None:
    torch.manual_seed(0)
    layer = fusion.LowRankFusion([64, 32], 2000, 4, bias=False)
    with torch.no_grad():
        out = layer([torch.randn(20, 64), torch.randn(20, 32)])
    assert 0.8 < float(out.var()) < 1.25
    assert layer.bias is None


# ---- attention ------------------------------------------------------------------------------------------------------


def torch_attention(ours: Any) -> nn.MultiheadAttention:
    """`torch.nn.MultiheadAttention` with the weights of a CrossAttention."""
    theirs = nn.MultiheadAttention(
        ours.features, ours.num_heads, bias=ours.q_proj.bias is not None, kdim=ours.context_features,
        vdim=ours.context_features, batch_first=True, dtype=DOUBLE,
    )  # fmt: skip
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    state = {"out_proj.weight": ours.out_proj.weight}
    if ours.q_proj.bias is not None:
        state |= {"in_proj_bias": torch.cat([p.bias for p in parts]), "out_proj.bias": ours.out_proj.bias}
    if ours.features == ours.context_features:
        state["in_proj_weight"] = torch.cat([p.weight for p in parts])
    else:
        state |= {f"{n}_proj_weight": p.weight for n, p in zip("qkv", parts, strict=True)}
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("context_features", [8, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_as_torch(context_features: int, bias: bool) -> None:
    ours = double(fusion.CrossAttention(8, 2, context_features=context_features, bias=bias))
    theirs = torch_attention(ours)
    x, context = randn(3, 4, 8, grad=True), randn(3, 6, context_features, seed=1, grad=True)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = padding[2, 1:] = True
    attn_mask = torch.ones(4, 6, dtype=torch.bool).triu(3)
    for mask, hidden in ((None, None), (padding, None), (None, attn_mask), (padding, attn_mask)):
        want, _ = theirs(x, context, context, key_padding_mask=mask, attn_mask=hidden, need_weights=False)
        assert_same(ours(x, context, mask, hidden), want, [x, context])
    by_sample = attn_mask.expand(3, -1, -1) | padding[:, None]
    torch.testing.assert_close(ours(x, context, attn_mask=by_sample), ours(x, context, padding, attn_mask))
    # what is padding does not matter
    other = torch.where(padding[:, :, None], 100.0, context)
    torch.testing.assert_close(ours(x, other, padding), ours(x, context, padding))


def test_cross_attention_that_sees_nothing() -> None:
    ours = double(fusion.CrossAttention(8, 2))
    x, context = randn(2, 3, 8, grad=True), randn(2, 4, 8, seed=1, grad=True)
    padding = torch.tensor([[False] * 4, [True] * 4])
    out = ours(x, context, padding)
    torch.testing.assert_close(out[0], ours(x[:1], context[:1])[0])
    assert not out[1].any()
    out.sum().backward()
    for t in (x, context):
        assert t.grad is not None and t.grad.isfinite().all() and t.grad[0].any() and not t.grad[1].any()
    assert not ours(x, context[:, :0]).any()


def test_cross_attention_dropout() -> None:
    ours = fusion.CrossAttention(8, 2, dropout=0.5)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    torch.manual_seed(0)
    assert not torch.equal(ours(x, context), ours(x, context))
    ours.eval()
    assert torch.equal(ours(x, context), ours(x, context))


def test_co_attention() -> None:
    block = double(fusion.CoAttentionBlock(8, 6, 2, y_hidden_features=5))
    x, y = randn(3, 4, 8, grad=True), randn(3, 7, 6, seed=1, grad=True)
    x_padding, y_padding = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
    x_padding[1, 2:] = y_padding[2, 5:] = True

    def stream(s: Any, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        q, k, v = s.attention.q_proj(a), s.attention.k_proj(b), s.attention.v_proj(b)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = q[..., h] @ k[..., h].mT / 2.0
            heads.append(scores.masked_fill(mask[:, None], -math.inf).softmax(-1) @ v[..., h])
        a = s.norm1(a + s.attention.out_proj(torch.cat(heads, -1)))
        return s.norm2(a + s.feed_forward.linear2(functional.gelu(s.feed_forward.linear1(a))))

    got_x, got_y = block(x, y, x_padding, y_padding)
    assert_same(got_x, stream(block.x_stream, x, y, y_padding), [x, y, *block.x_stream.parameters()])
    # the second stream sees the first as it was before the block
    assert_same(got_y, stream(block.y_stream, y, x, x_padding), [x, y])
    assert block.y_stream.feed_forward.linear1.weight.shape == (5, 6)


def test_co_attention_as_lxmert() -> None:
    """LXMERT's cross-attention with its residual and norm, in transformers, is the first half of each stream."""
    modeling = pytest.importorskip("transformers.models.lxmert.modeling_lxmert")
    from transformers import LxmertConfig

    config = LxmertConfig(hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.0,
                          hidden_dropout_prob=0.0)  # fmt: skip
    theirs = double(modeling.LxmertCrossAttentionLayer(config))
    block = fusion.CoAttentionBlock(8, 8, 2).double()
    ours = block.x_stream
    for mine, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        getattr(ours.attention, mine).load_state_dict(getattr(theirs.att, other).state_dict())
    ours.attention.out_proj.load_state_dict(theirs.output.dense.state_dict())
    ours.norm1.load_state_dict(theirs.output.LayerNorm.state_dict())
    x, y = randn(2, 3, 8, grad=True), randn(2, 5, 8, seed=1, grad=True)
    got = ours.norm1(x + ours.attention(x, y))
    assert_same(got, theirs(x, y)[0], [x, y])


@pytest.mark.parametrize("update", ["mean", "sequential"])
def test_bottleneck_fusion(update: Any) -> None:
    layer = double(fusion.BottleneckFusion(8, 2, 2, num_modalities=3, num_bottlenecks=2, update=update))
    tokens = [randn(2, n, 8, seed=n, grad=True) for n in (3, 4, 5)]
    masks: list[Tensor | None] = [None, torch.tensor([[False] * 4, [False, False, True, True]]), None]
    streams, shared = layer(tokens, masks)

    def attend(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """A transformer layer with norms first, by hand."""
        normed = block.norm1(x)
        q, k, v = (normed @ block.self_attn.in_proj_weight.T + block.self_attn.in_proj_bias).split(8, -1)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = q[..., h] @ k[..., h].mT / 2.0
            if mask is not None:
                scores = scores.masked_fill(mask[:, None], -math.inf)
            heads.append(scores.softmax(-1) @ v[..., h])
        x = x + block.self_attn.out_proj(torch.cat(heads, -1))
        return x + block.linear2(functional.gelu(block.linear1(block.norm2(x))))

    z, b = list(tokens), layer.bottlenecks.expand(2, 2, 8)
    for blocks in layer.layers:
        temporary = []
        for m, block in enumerate(blocks):
            mask = None if masks[m] is None else torch.cat([masks[m], torch.zeros(2, 2, dtype=torch.bool)], 1)
            out = attend(block, torch.cat([z[m], b if not temporary or update == "mean" else temporary[-1]], 1), mask)
            z[m], after = out[:, :-2], out[:, -2:]
            temporary.append(after)
        b = (temporary[0] + temporary[1] + temporary[2]) / 3 if update == "mean" else temporary[-1]
    variables = [*tokens, layer.bottlenecks]
    assert_same(shared, b, variables)
    for got, want in zip(streams, z, strict=True):
        assert_same(got, want, variables)


def test_bottleneck_fusion_in_inference() -> None:
    """Torch has another kernel for its layers in eval mode without gradients."""
    layer = double(fusion.BottleneckFusion(8, 2, 2))
    tokens = [randn(2, 3, 8), randn(2, 5, 8)]
    masks = [torch.tensor([[False, False, True], [False] * 3]), torch.tensor([[False] * 5, [False, True] + [True] * 3])]
    want, shared = layer(tokens, masks)
    layer.eval()
    with torch.no_grad():
        streams, got = layer(tokens, masks)
    torch.testing.assert_close(got, shared)
    for a, b, mask in zip(streams, want, masks, strict=True):
        torch.testing.assert_close(a[~mask], b[~mask])


def test_bottleneck_is_the_only_way() -> None:
    """After one layer no modality knows of another; after two they do, through the shared tokens."""
    tokens = [randn(1, 3, 8, seed=1, grad=True), randn(1, 4, 8, seed=2, grad=True)]
    for layers, knows in ((1, False), (2, True)):
        streams, _ = double(fusion.BottleneckFusion(8, 2, layers))(tokens)
        other = torch.autograd.grad(streams[0].square().sum(), tokens[1], allow_unused=True)[0]
        assert (other is not None and bool(other.any())) is knows


# ---- language models ------------------------------------------------------------------------------------------------


def test_gated_cross_attention_block() -> None:
    block = fusion.GatedCrossAttentionBlock(8, 2, media_features=6, hidden_features=5)
    x, media = randn(2, 4, 8, grad=True), randn(2, 6, 6, seed=1, grad=True)
    # the identity at the start, and the gates learn first
    start = block.double()(x, media)
    assert torch.equal(start, x)
    grads = torch.autograd.grad(start.square().sum(), [block.attention_gate, block.feed_forward_gate, media])
    assert grads[0].any() and grads[1].any() and not grads[2].any()
    double(block)
    assert not [name for name, _ in block.named_parameters() if "bias" in name and "norm" not in name]
    mask = fusion.media_attention_mask(torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool(), 2, 3)
    theirs = torch_attention(block.attention)
    normed = block.attention_norm(x)
    attended = torch.cat([theirs(normed, media, media, attn_mask=mask.repeat_interleave(2, 0), need_weights=False)[0]])
    attended = torch.where(mask.all(-1, keepdim=True), 0.0, attended)
    h = x + torch.tanh(block.attention_gate) * attended
    inner = functional.relu(block.feed_forward_norm(h) @ block.feed_forward.linear1.weight.T) ** 2
    want = h + torch.tanh(block.feed_forward_gate) * (inner @ block.feed_forward.linear2.weight.T)
    got = block(x, media, mask)
    assert got.isfinite().all()
    copied = {id(p) for p in block.attention.parameters()}
    assert_same(got[1], want[1], [x, media, *(p for p in block.parameters() if id(p) not in copied)])
    torch.testing.assert_close(got[0], want[0])


def test_media_attention_mask() -> None:
    locations = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    seen = [[[], [0], [0], [1], [1]], [[0]] * 5]
    for only_last in (True, False):
        mask = fusion.media_attention_mask(locations, 3, 2, only_last=only_last)
        for b in range(2):
            for t in range(5):
                images = seen[b][t] if only_last else list(range(max(seen[b][t], default=-1) + 1))
                assert (~mask[b, t]).nonzero().flatten().tolist() == [2 * i + k for i in images for k in range(2)]
    with pytest.raises(ValueError, match="media_locations has 2 tags in a text; expected at most num_media, 1"):
        fusion.media_attention_mask(locations, 1, 2)
    with pytest.raises(ValueError, match=r"media_locations has dtype torch.int64 and shape \(2, 5\)"):
        fusion.media_attention_mask(locations.long(), 3, 2)


def test_llava_connector_as_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llava.modeling_llava")
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=6, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=8, num_attention_heads=2),
    )
    theirs = double(modeling.LlavaMultiModalProjector(config))
    ours = fusion.LLaVAConnector(6, 8).double()
    ours.network[0].load_state_dict(theirs.linear_1.state_dict())
    ours.network[2].load_state_dict(theirs.linear_2.state_dict())
    x = randn(2, 5, 6, grad=True)
    assert_same(ours(x), theirs(x), [x])
    ours.drop_class_token = True
    assert torch.equal(ours(x), theirs(x[:, 1:]))
    assert [type(m) for m in fusion.LLaVAConnector(6, 8, depth=3).network] == [nn.Linear, nn.GELU] * 2 + [nn.Linear]
    linear = double(fusion.LLaVAConnector(6, 8, depth=1))
    torch.testing.assert_close(linear(x), x @ linear.network[0].weight.T + linear.network[0].bias)


def test_insert_image_features() -> None:
    ids = torch.tensor([[5, 9, 9, 1], [9, 2, 9, 9]])
    embeds, images = randn(2, 4, 3, grad=True), randn(1, 5, 3, seed=1, grad=True)
    out = fusion.insert_image_features(embeds, ids, images, 9)
    want = torch.stack([
        torch.stack([embeds[0, 0], images[0, 0], images[0, 1], embeds[0, 3]]),
        torch.stack([images[0, 2], embeds[1, 1], images[0, 3], images[0, 4]]),
    ])  # fmt: skip
    assert_same(out, want, [embeds, images])
    with pytest.raises(ValueError, match="input_ids has the image token 5 times; expected 4 times"):
        fusion.insert_image_features(embeds, ids, images[:, :4], 9)
    with pytest.raises(ValueError, match=r"image_features has shape \(1, 5, 2\)"):
        fusion.insert_image_features(embeds, ids, images[..., :2], 9)
    with pytest.raises(ValueError, match=r"and input_ids \(2, 3\)"):
        fusion.insert_image_features(embeds, ids[:, :3], images, 9)


# ---- balance --------------------------------------------------------------------------------------------------------


def test_modality_dropout() -> None:
    layer = fusion.ModalityDropout(3, [0.2, 0.5, 0.9], keep_one=False, generator=torch.Generator().manual_seed(0))
    features = [torch.ones(20000, 2), torch.ones(20000, 4, 3), torch.ones(20000)]
    out, kept = layer(features)
    rates = (~kept).double().mean(0)
    for m, p in enumerate((0.2, 0.5, 0.9)):
        assert abs(float(rates[m]) - p) < 4.5 * (p * (1 - p) / 20000) ** 0.5
        # whole modalities, by sample
        assert torch.equal(out[m], features[m] * kept[:, m].view(-1, *[1] * (features[m].dim() - 1)))
    # independent: all three go as often as their product says
    assert abs(float((~kept).all(1).double().mean()) - 0.09) < 4.5 * (0.09 * 0.91 / 20000) ** 0.5
    layer.eval()
    out, kept = layer(features)
    assert kept.all() and all(torch.equal(a, b) for a, b in zip(out, features, strict=True))


def test_modality_dropout_keeps_one() -> None:
    layer = fusion.ModalityDropout(3, 0.6, generator=torch.Generator().manual_seed(0))
    _, kept = layer([torch.ones(40000, 1)] * 3)
    assert kept.any(1).all()
    want = 0.6 - 0.6**3 / 3
    assert ((~kept).double().mean(0) - want).abs().max() < 4.5 * (want * (1 - want) / 40000) ** 0.5
    # only what a sample has can be kept
    present = torch.tensor([[True, False, False], [False, True, True], [False, False, False]]).repeat(500, 1)
    _, kept = fusion.ModalityDropout(3, 0.95)([torch.ones(1500, 1)] * 3, present)
    assert not (kept & ~present).any() and torch.equal(kept.any(1), present.any(1))
    assert 0.4 < float(kept[1::3, 1].double().mean()) < 0.65
    _, kept = fusion.ModalityDropout(3, 1.0)([torch.ones(8, 1)] * 3)
    assert (kept.sum(1) == 1).all()


def test_modality_dropout_learned() -> None:
    layer = fusion.ModalityDropout(2, 0.5, learned=[3, 2], generator=torch.Generator().manual_seed(1)).double()
    layer = double(layer)
    a, b = randn(6, 5, 3, grad=True), randn(6, 2, grad=True)
    out, kept = layer([a, b])
    assert not kept.all() and kept.any()
    want = torch.stack([a[i] if kept[i, 0] else layer.missing[0].expand(5, 3) for i in range(6)])
    assert_same(out[0], want, [a, layer.missing[0]])
    present = torch.tensor([[True, False]] * 6)
    out, kept = layer.eval()([a, b], present)
    assert torch.equal(kept, present) and torch.equal(out[1], layer.missing[1].expand(6, 2))


class TwoModal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        self.head = nn.Linear(7, 6)

    def logits(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fa, fb = self.a(x), self.b(y)
        weight, half = self.head.weight, self.head.bias / 2
        alone = {"a": fa @ weight[:, :5].T + half, "b": fb @ weight[:, 5:].T + half}
        return self.head(torch.cat([fa, fb], 1)), alone


def test_ogm_ge() -> None:
    model = double(TwoModal())
    x, y, labels = randn(9, 4), randn(9, 3), torch.arange(9) % 6
    out, alone = model.logits(x, y)
    torch.testing.assert_close(alone["a"] + alone["b"], out)
    functional.cross_entropy(out, labels).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    score = {m: sum(alone[m][i].softmax(0)[labels[i]].item() for i in range(9)) for m in "ab"}
    ahead, behind = ("a", "b") if score["a"] > score["b"] else ("b", "a")
    rho = score[ahead] / score[behind]
    k = {ahead: 1 - math.tanh(0.7 * rho), behind: 1.0}

    plain = fusion.OGMGE({"a": model.a, "b": model.b}, 0.7, noise=False)
    assert plain.step(alone, labels) == pytest.approx(k)
    assert plain.ratios == pytest.approx({ahead: rho, behind: 1 / rho})
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * k.get(name[0], 1.0) if name[0] in "ab" else before[name])

    for name, p in model.named_parameters():
        p.grad = before[name].clone()
    noisy = fusion.OGMGE({"b": model.b, "a": model.a}, 0.7, min_dim=2, generator=torch.Generator().manual_seed(3))
    noisy.step(alone, labels)
    draws = torch.Generator().manual_seed(3)
    for m in "ba":  # in the order of the encoders
        weight, bias = getattr(model, m)[0].weight, getattr(model, m)[0].bias
        g = before[f"{m}.0.weight"]
        noise = torch.empty_like(g).normal_(generator=draws) * g.std()
        torch.testing.assert_close(weight.grad, k[m] * g + noise)
        assert torch.equal(bias.grad, before[f"{m}.0.bias"])  # of one dimension


def test_ogm_ge_noise_has_the_gradients_deviation() -> None:
    layers = {"a": nn.Linear(300, 200, bias=False), "b": nn.Linear(2, 2)}
    g = torch.randn(200, 300) * 0.01 + 0.02
    layers["a"].weight.grad = g.clone()
    layers["b"].bias.grad = torch.ones(2)
    logits = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}
    step = fusion.OGMGE(layers, 0.5).step(logits, torch.tensor([0, 1, 2]))
    assert step == {"a": 1.0, "b": 1.0}  # neither is ahead
    noise = layers["a"].weight.grad - g
    assert float(noise.std()) == pytest.approx(float(g.std()), rel=0.02) and abs(float(noise.mean())) < 2e-4
    assert torch.equal(layers["b"].bias.grad, torch.ones(2))  # deviation 0, and no gradient where there was none
    assert layers["b"].weight.grad is None


# ---- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fusion.EarlyFusion([3, 0], 2), r"EarlyFusion: in_features is \(3, 0\); expected 1 or more sizes"),
        (lambda: fusion.EarlyFusion([3], 2, [4, 0]), "EarlyFusion: hidden_features is 0; expected 1 or more"),
        (lambda: fusion.EarlyFusion([3], 2, dropout=1.0), "EarlyFusion: dropout is 1.0; expected 0 <= dropout < 1"),
        (lambda: fusion.LateFusion(2, space="odds"), "LateFusion: space is 'odds'; expected 'logits' or"),
        (lambda: fusion.LateFusion(2, weights="all"), "LateFusion: weights is 'all'; expected numbers"),
        (lambda: fusion.LateFusion(2, weights=[1, -1]), r"LateFusion: weights is \[1.0, -1.0\]; expected 2 numbers"),
        (lambda: fusion.GatedFusion([3], 2), r"GatedFusion: in_features is \(3,\); expected 2 or more sizes"),
        (lambda: fusion.TensorFusion([3], 0), "TensorFusion: out_features is 0; expected 1 or more"),
        (lambda: fusion.LowRankFusion([3], 2, 0), "LowRankFusion: rank is 0; expected 1 or more"),
        (lambda: fusion.CrossAttention(8, 3), "CrossAttention: attention_features is 8; expected a multiple of 3"),
        (lambda: fusion.BottleneckFusion(8, 2, 1, num_modalities=1), "num_modalities is 1; expected 2 or more"),
        (lambda: fusion.BottleneckFusion(8, 3, 1), "BottleneckFusion: features is 8; expected a multiple of 3 heads"),
        (lambda: fusion.BottleneckFusion(8, 2, 1, update="max"), "update is 'max'; expected 'mean' or"),
        (lambda: fusion.LLaVAConnector(4, 4, 0), "LLaVAConnector: depth is 0; expected 1 or more"),
        (lambda: fusion.ModalityDropout(2, 1.5), "ModalityDropout: p is 1.5; expected one or 2 numbers from 0 to 1"),
        (lambda: fusion.ModalityDropout(2, learned=[3]), "ModalityDropout: learned has 1 widths; expected 2"),
        (lambda: fusion.OGMGE({"a": nn.Linear(2, 2)}), "OGMGE: encoders has 1 entries; expected 2 modalities"),
        (lambda: fusion.OGMGE({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, 0.0), "OGMGE: alpha is 0.0; expected > 0"),
    ],
)  # fmt: skip
def test_wrong_constructions(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fusion.EarlyFusion([3, 4], 2)([torch.ones(2, 3)]), "features is 1 tensors; expected a list of 2"),
        (lambda: fusion.TensorFusion([3, 4], 2)(torch.ones(2, 7)), "features is a Tensor; expected a list of 2"),
        (lambda: fusion.LowRankFusion([3, 4], 2, 1)([torch.ones(2, 3), torch.ones(2, 5)]),
         r"LowRankFusion: features\[1\] has shape \(2, 5\); expected \(2, 4\)"),
        (lambda: fusion.LateFusion(2)([torch.ones(2, 3), torch.ones(2, 4)]),
         r"LateFusion: logits\[1\] has shape \(2, 4\); expected \(2, 3\), like the first"),
        (lambda: fusion.LateFusion(2)([torch.ones(2, 3)] * 2, torch.tensor([[True, False], [False, False]])),
         "LateFusion: sample 1 has no modality"),
        (lambda: fusion.LateFusion(2)([torch.ones(2, 3)] * 2, torch.ones(2, 2)), "present has dtype torch.float32"),
        (lambda: fusion.CrossAttention(4, 2)(torch.ones(2, 3, 4), torch.ones(1, 3, 4)),
         r"context has shape \(1, 3, 4\); expected \(2, tokens, 4\)"),
        (lambda: fusion.CrossAttention(4, 2)(torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5)),
         r"key_padding_mask has dtype torch.float32 and shape \(2, 5\); expected torch.bool \(2, 5\)"),
        (lambda: fusion.BottleneckFusion(4, 2, 1)([torch.ones(2, 3, 4), torch.ones(2, 3, 5)]),
         r"BottleneckFusion: tokens\[1\] has shape \(2, 3, 5\); expected \(2, tokens, 4\)"),
        (lambda: fusion.BottleneckFusion(4, 2, 1)([torch.ones(2, 3, 4)] * 2, [None]),
         "key_padding_masks has 1 entries; expected 2"),
        (lambda: fusion.LLaVAConnector(4, 4)(torch.ones(2, 4)), r"image_features has shape \(2, 4\)"),
        (lambda: fusion.ModalityDropout(2)([torch.ones(2, 1), torch.ones(3, 1)]), r"features\[1\] has shape \(3, 1\)"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_ogm_ge_wrong_calls() -> None:
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="OGMGE: encoders share a parameter"):
        fusion.OGMGE({"a": shared, "b": nn.Sequential(shared)})
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    a.weight.grad = torch.ones(2, 2)
    modulation = fusion.OGMGE({"a": a, "b": b})
    logits = torch.ones(3, 2)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"OGMGE: logits is of \['a'\]; expected \['a', 'b'\]"):
        modulation.step({"a": logits}, labels)
    with pytest.raises(ValueError, match=r"logits\['b'\] has shape \(2, 2\) and labels \(3,\)"):
        modulation.step({"a": logits, "b": logits[:2]}, labels)
    with pytest.raises(ValueError, match=r"logits\['b'\] give the labels nan"):
        modulation.step({"a": logits, "b": logits * math.nan}, labels)
    assert torch.equal(a.weight.grad, torch.ones(2, 2)) and modulation.ratios == {}


def test_a_hidden_width_of_zero_is_no_default() -> None:
    with pytest.raises(ValueError, match="CoAttentionBlock: x_hidden_features is 0; expected 1 or more"):
        fusion.CoAttentionBlock(4, 4, 2, x_hidden_features=0)
    with pytest.raises(ValueError, match="CoAttentionBlock: y_hidden_features is 0; expected 1 or more"):
        fusion.CoAttentionBlock(4, 4, 2, y_hidden_features=0)


def test_one_image_token_without_leading_dimensions() -> None:
    out = fusion.insert_image_features(torch.zeros(1, 2, 3), torch.tensor([[7, 9]]), torch.arange(3.0), 9)
    assert out.tolist() == [[[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]]
