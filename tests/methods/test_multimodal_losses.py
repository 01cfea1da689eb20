"""Losses and models for images and texts, against closed forms in float64, open_clip, transformers and others."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import pytorch_metric_learning.reducers as pml_reducers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bench.peers import submodule
from tlkernels import ops
from tlkernels.methods import multimodal as mm
from tlkernels.methods.multimodal import itm, queue, variants
from tlkernels.methods.pretrain import simsiam_loss
from tlkernels.methods.pretrain.momentum import MomentumEncoder


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def pairs(number: int = 7, features: int = 5, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leaves that require gradients, of length 1, near each other where the noise is small."""
    x = unit(number, features, seed=seed)
    y = functional.normalize(x + noise * unit(number, features, seed=seed + 1), dim=1)
    return x.requires_grad_(), y.requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_same(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], *leaves: Tensor, rtol: float = 1e-10
) -> None:  # fmt: skip
    """The values, and the gradients of every leaf for a grad_output that is neither uniform nor 1."""
    out, want = ours(*leaves), formula(*leaves)
    torch.testing.assert_close(out, want, rtol=rtol, atol=1e-12)
    grad = torch.linspace(-0.7, 1.9, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = [torch.autograd.grad(t, leaves, grad, allow_unused=True, retain_graph=True) for t in (out, want)]
    for g, w in zip(*grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=rtol, atol=1e-12)


def clip_formula(x: Tensor, y: Tensor, scale: Tensor | float, **options: Any) -> Tensor:
    z, itself = scale * x @ y.T, torch.arange(len(x))
    return 0.5 * sum(functional.cross_entropy(one, itself, **options) for one in (z, z.T))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("name", ["clip", "itm", "qformer", "queue", "tokenwise", "variants", "zero_shot"])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"tlkernels.methods.multimodal.{name}")).failed == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: sum(mm.cyclic_consistency(x, y)),
        lambda x, y: mm.vse_loss(x, y),
        lambda x, y: mm.vse_loss(x, y, hardest=False),
        lambda x, y: mm.token_similarities(x.view(64, 8, 8), y.view(64, 8, 8), block_size=4096).xy.sum(),
        lambda x, y: mm.nearest_neighbors(x, y).sum() + 0 * x.sum(),
        lambda x, y: 0 * x.sum() * mm.hard_negatives(x, y, block_size=4096).texts[0],
        lambda x, y: mm.momentum_distillation_loss(x, y, y, x, 9.0, alpha=1.0),
    ],
)
def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Tensor]) -> None:
    """Beyond N D, blocks alone: a matrix of 512 x 512 would be 262144."""
    monkeypatch.setattr(variants, "_BLOCK", 4096)
    monkeypatch.setattr(queue, "_BLOCK", 4096)
    # what the ops do inside is theirs to test
    monkeypatch.setattr(ops, "sim_lse", lambda x, *_, **__: ops.SimLSE(*[x.sum(1)] * 4))
    x, y = pairs(512, 8)
    with Largest() as largest:
        loss(x, y).backward()
    assert largest.numel <= 8192


# ---- two towers ------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A text encoder whose output is no tensor."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(50, features)

    def forward(self, ids: Tensor, offset: int = 0) -> Any:
        return transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=self.embedding(ids) + offset)


def towers(cls: Callable[..., mm.TwoTower] = mm.TwoTower, **options: Any) -> mm.TwoTower:
    return cls(
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh()), Words(5),
        image_projection=mm.linear_projection(6, 4), text_projection=mm.linear_projection(5, 4), **options,
    )  # fmt: skip


BATCH = (torch.randn(6, 8, generator=torch.Generator().manual_seed(3)), torch.arange(24).view(6, 4) % 13)


def test_clip_start() -> None:
    model = towers()
    assert model.logit_scale is not None
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)
    output = model(*BATCH)
    assert output.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6) and output.logit_bias is None
    torch.testing.assert_close(output.image_embeds.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(output.text_embeds.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.loss(output), clip_formula(*output[:3]))
    torch.testing.assert_close(model.logits(output), output.logit_scale * output.image_embeds @ output.text_embeds.T)


def test_towers_that_end_in_different_dtypes() -> None:
    model = towers()
    output = model(*BATCH)
    mixed = output._replace(image_embeds=output.image_embeds.bfloat16())
    same = mixed._replace(image_embeds=mixed.image_embeds.float())
    assert torch.equal(model.loss(mixed), model.loss(same)) and torch.equal(model.logits(mixed), model.logits(same))


def test_parameters_learn_through_the_loss() -> None:
    model = towers().double()
    image, ids = BATCH[0].double(), BATCH[1]
    model.loss(model(image, ids)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    x = functional.normalize(model.image_projection(model.image_encoder(image)), dim=1)
    y = functional.normalize(model.text_projection(model.text_encoder(ids).pooler_output), dim=1)
    clip_formula(x, y, model.logit_scale.exp()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)


def test_inputs_may_be_mappings_and_tuples() -> None:
    model = towers().eval()
    want = model.encode_text(BATCH[1])
    torch.testing.assert_close(model.encode_text({"ids": BATCH[1], "offset": 0}), want)
    assert not torch.allclose(model.encode_text((BATCH[1], 1)), want)


def test_normalization_can_be_left_out() -> None:
    model = towers(normalize=False).eval()
    torch.testing.assert_close(
        model.encode_image(BATCH[0]), functional.linear(model.image_encoder(BATCH[0]), model.image_projection.weight)
    )


def test_linear_projection() -> None:
    layer = mm.linear_projection(400, 300, dtype=torch.float64)
    assert layer.bias is None and layer.weight.dtype == torch.float64
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)


@pytest.mark.parametrize(("learn", "name"), [("log_scale", "logit_scale"), ("temperature", "temperature")])
def test_clamp_changes_the_parameter_not_the_forward_pass(learn: str, name: str) -> None:
    model = towers(learn=learn, logit_scale=90.0)
    parameter = getattr(model, name)
    with torch.no_grad():
        parameter.add_(1.0 if learn == "log_scale" else -0.005)
    grown = model.scale()
    assert grown.item() > 150  # the forward pass does not know the bound
    grown.backward()
    assert parameter.grad.item() != 0
    model.clamp_logit_scale()
    assert model.scale().item() == pytest.approx(100.0, rel=1e-5)
    model.clamp_logit_scale()  # what is inside stays
    assert model.scale().item() == pytest.approx(100.0, rel=1e-5)
    with torch.no_grad():
        parameter.fill_(math.log(0.5) if learn == "log_scale" else 2.0)
    model.clamp_logit_scale()
    assert model.scale().item() == pytest.approx(0.5, rel=1e-6)  # no bound below


def test_clamp_after_every_step() -> None:
    model = towers(logit_scale=100.0)
    optimizer = torch.optim.SGD([model.logit_scale], lr=1.0)
    handle = model.clamp_after(optimizer)
    model.logit_scale.grad = torch.tensor(-1.0)
    optimizer.step()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    handle.remove()
    optimizer.step()
    assert model.logit_scale.item() == pytest.approx(math.log(100) + 1)


def test_no_bound() -> None:
    model = towers(max_logit_scale=None)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 9.0


def test_decoupled_and_negatives() -> None:
    model = towers(decoupled=True).double()
    output = model(BATCH[0].double(), BATCH[1])
    more_x, more_y = unit(3, 4, seed=5), unit(3, 4, seed=6)
    x, y, s, _ = output
    z = s * x @ y.T
    rows = torch.cat([z, s * x @ more_y.T], 1)
    cols = torch.cat([z.T, s * y @ more_x.T], 1)
    eye = torch.eye(6, dtype=torch.bool)
    mask = torch.cat([eye, torch.zeros(6, 3, dtype=torch.bool)], 1)
    want = 0.5 * sum((one.masked_fill(mask, -torch.inf).logsumexp(1) - z.diagonal()).mean() for one in (rows, cols))
    torch.testing.assert_close(model.loss(output, image_negatives=more_x, text_negatives=more_y), want)


def test_as_clip_of_transformers() -> None:
    kind = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=kind | {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39},
        vision_config=kind | {"image_size": 8, "patch_size": 4}, projection_dim=12,
    )  # fmt: skip
    theirs = transformers.CLIPModel(config).double().eval()
    ours = mm.TwoTower.clip(
        theirs.vision_model, theirs.text_model, image_projection=theirs.visual_projection,
        text_projection=theirs.text_projection,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        ours.logit_scale.copy_(theirs.logit_scale)
    pixels, ids = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(0, 39, (5, 6))
    ids[:, -1] = 39
    want = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
    output = ours(pixels, {"input_ids": ids})
    torch.testing.assert_close(ours.logits(output), want.logits_per_image)
    torch.testing.assert_close(ours.loss(output), want.loss)


def test_siglip_start_and_oracle() -> None:
    model = towers(mm.TwoTower.siglip).double()
    assert model.logit_scale.item() == pytest.approx(math.log(10.0)) and model.logit_bias.item() == -10.0
    assert model.max_logit_scale is None
    output = model(BATCH[0].double(), BATCH[1])
    want = submodule("open_clip.loss").SigLipLoss()(*output)
    assert_same(lambda *_: model.loss(output), lambda *_: want, model.logit_scale, model.logit_bias)
    torch.testing.assert_close(
        model.logits(output), output.logit_scale * output.image_embeds @ output.text_embeds.T - 10.0
    )


def test_align_start_and_oracle() -> None:
    model = towers(mm.TwoTower.align).double()
    assert model.temperature.item() == 1.0 and model.logit_scale is None
    with torch.no_grad():
        model.temperature.fill_(0.3)
    output = model(BATCH[0].double(), BATCH[1])
    loss = model.loss(output)
    want = clip_formula(output.image_embeds, output.text_embeds, 1 / model.temperature, label_smoothing=0.1)
    assert_same(lambda *_: loss, lambda *_: want, model.temperature)
    logits = (output.text_embeds @ output.image_embeds.T / model.temperature).detach()
    theirs = transformers.models.align.modeling_align.align_loss(logits)
    torch.testing.assert_close(loss.detach(), theirs)


def test_labels_and_reduction_reach_the_op() -> None:
    for cls in (mm.TwoTower.clip, mm.TwoTower.siglip):
        model = towers(cls)
        output = model(*BATCH)
        labels = torch.tensor([2, 0, -100, 1, 3, 5])
        loss = model.loss(output, labels=labels, reduction="none")
        assert loss.shape == (6,)
        assert not torch.allclose(loss, model.loss(output, reduction="none"))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.net[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_locked_tower() -> None:
    tower = mm.LockedTower(Dropping())
    model = mm.TwoTower(tower, nn.Linear(3, 4)).train()
    assert model.training and tower.training and not any(m.training for m in tower.module.modules())
    before = copy.deepcopy(tower.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    image, text = torch.randn(5, 8), torch.randn(5, 3)
    first = model(image, text)
    assert not first.image_embeds.requires_grad and first.text_embeds.requires_grad
    model.loss(first).backward()
    optimizer.step()
    second = model(image, text)
    assert torch.equal(first.image_embeds, second.image_embeds)
    assert not torch.allclose(first.text_embeds, second.text_embeds)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch norm's statistics, too
    module = tower.unlock()
    assert module.training and module.net[2].training
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]
    tower.eval()
    assert not tower.training
    frozen = mm.LockedTower(nn.Linear(8, 4))
    assert not frozen(torch.ones(1, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hinge"}, "objective is 'hinge'; expected 'softmax' or 'sigmoid'"),
        ({"learn": "scale"}, "learn is 'scale'; expected 'log_scale' or 'temperature'"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; expected > 0"),
        ({"max_logit_scale": 2.0}, "max_logit_scale is 2.0; expected at least logit_scale"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected 0 <="),
        ({"objective": "sigmoid"}, "logit_bias is None with objective 'sigmoid'"),
        ({"objective": "sigmoid", "logit_bias": 0.0, "decoupled": True}, "decoupled is set with objective 'sigmoid'"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        towers(**options)


def test_wrong_towers() -> None:
    linear = nn.Linear(3, 4)
    with pytest.raises(TypeError, match="text_encoder is a function; expected"):
        mm.TwoTower(linear, lambda x: x)
    with pytest.raises(TypeError, match="text_projection is a int"):
        mm.TwoTower(linear, linear, text_projection=4)
    with pytest.raises(TypeError, match="image_encoder returns a tuple; expected a tensor, or an object with a pooler"):
        mm.TwoTower(nn.LSTM(3, 4), linear).encode_image(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"the text embeddings have shape \(2, 5, 4\); expected \(N, D\)"):
        mm.TwoTower(linear, linear).encode_text(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match="LockedTower: module is a int"):
        mm.LockedTower(3)
    with pytest.raises(ValueError, match="linear_projection: embed_dim is 0; expected >= 1"):
        mm.linear_projection(3, 0)
    model = towers(mm.TwoTower.siglip)
    with pytest.raises(ValueError, match="negatives are given with objective 'sigmoid'"):
        model.loss(model(*BATCH), text_negatives=torch.zeros(1, 4))


# ---- CyCLIP ----------------------------------------------------------------------------------------------------------


def cyclic_formula(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    cross, n = x @ y.T, len(x)
    return (cross - cross.T).square().sum() / n, (x @ x.T - y @ y.T).square().sum() / n


@pytest.mark.parametrize(("number", "features"), [(5, 9), (9, 5), (7, 7), (1, 4), (33, 1)])
def test_cyclic_consistency(number: int, features: int) -> None:
    x, y = pairs(number, features)
    for part in (0, 1):
        assert_same(
            lambda a, b, part=part: mm.cyclic_consistency(a, b)[part],
            lambda a, b, part=part: cyclic_formula(a, b)[part], x, y, rtol=1e-8,
        )  # fmt: skip


@pytest.mark.parametrize("number", [16, 400])
def test_cyclic_consistency_near_agreement(number: int) -> None:
    """In float32, where products of x and y alone would leave nothing but rounding."""
    x, y = pairs(number, 64, noise=1e-3)
    x32, y32 = x.detach().float(), y.detach().float()
    for out, want in zip(mm.cyclic_consistency(x32, y32), cyclic_formula(x32.double(), y32.double()), strict=True):
        assert out.dtype == torch.float32
        assert out.item() == pytest.approx(want.item(), rel=1e-4)
    gram = x32.T @ x32, y32.T @ y32, x32.T @ y32
    naive = (gram[0].square().sum() + gram[1].square().sum() - 2 * gram[2].square().sum()) / number
    assert abs(naive / cyclic_formula(x32.double(), y32.double())[1] - 1) > 0.01


def test_cyclic_consistency_of_nothing_and_in_16_bits() -> None:
    assert [t.item() for t in mm.cyclic_consistency(torch.zeros(0, 3), torch.zeros(0, 3))] == [0.0, 0.0]
    x, y = (t.detach().bfloat16() for t in pairs(30, 8))
    for out, want in zip(mm.cyclic_consistency(x, y), cyclic_formula(x.double(), y.double()), strict=True):
        assert out.dtype == torch.float32 and out.item() == pytest.approx(want.item(), rel=1e-5)


def test_cyclip_loss() -> None:
    x, y = pairs()
    s = scalar(14.0)
    out = mm.cyclip_loss(x, y, s, cross_weight=0.3, in_weight=0.7)
    cross, within = cyclic_formula(x, y)
    torch.testing.assert_close(out.loss, clip_formula(x, y, s) + 0.7 * within + 0.3 * cross)
    torch.testing.assert_close(out.cross_modal, cross)
    torch.testing.assert_close(out.in_modal, within)
    assert_same(
        lambda a, b, t: mm.cyclip_loss(a, b, t, label_smoothing=0.1).loss,
        lambda a, b, t: clip_formula(a, b, t, label_smoothing=0.1) + 0.25 * sum(cyclic_formula(a, b)), x, y, s,
        rtol=1e-8,
    )  # fmt: skip


# ---- SLIP, DeCLIP, CoCa ----------------------------------------------------------------------------------------------


def nt_xent_formula(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z = functional.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return functional.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def test_slip_loss() -> None:
    x, y = pairs()
    s = scalar(9.0)
    views = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_same(
        lambda a, b, t, u, v: mm.slip_loss(a, b, t, u, v, weight=0.6, temperature=0.2).loss,
        lambda a, b, t, u, v: clip_formula(a, b, t) + 0.6 * nt_xent_formula(u, v, 0.2), x, y, s, *views,
    )  # fmt: skip
    out = mm.slip_loss(x, y, s, *views)
    theirs = pml_losses.SelfSupervisedLoss(pml_losses.NTXentLoss(temperature=0.1))(*views)
    torch.testing.assert_close(out.self_supervised, theirs)
    torch.testing.assert_close(out.loss, out.contrastive + theirs)


def test_declip_loss() -> None:
    x, y = pairs(seed=0)
    x2, y2 = pairs(seed=10)
    s = scalar(9.0)
    near = mm.nearest_neighbors(y, unit(20, 5, seed=9))
    p, z = unit(7, 3, seed=4).requires_grad_(), unit(7, 3, seed=5)
    image_loss, text_loss = simsiam_loss(p, p, z, z), scalar(2.0)

    def formula(x: Tensor, x2: Tensor, y: Tensor, y2: Tensor, s: Tensor, p: Tensor, text: Tensor) -> Tensor:
        own = -(functional.normalize(p, dim=1) * z).sum(1).mean() + text
        views = (clip_formula(x2, y, s) + clip_formula(x, y2, s) + clip_formula(x2, y2, s)) / 3
        neighbour = (clip_formula(x, near, s) + clip_formula(x2, near, s)) / 2
        return 0.45 * clip_formula(x, y, s) + 0.1 * own + 0.15 * views + 0.3 * neighbour

    def ours(x: Tensor, x2: Tensor, y: Tensor, y2: Tensor, s: Tensor, *_: Tensor) -> Tensor:
        return mm.declip_loss(
            (x, x2), (y, y2), s, image_loss=image_loss, text_loss=text_loss, neighbors=near, self_weight=0.1,
            view_weight=0.15, neighbor_weight=0.3,
        ).loss  # fmt: skip

    assert_same(ours, formula, x, x2, y, y2, s, p, text_loss)


def test_declip_parts_that_are_not_given() -> None:
    x, y = pairs()
    out = mm.declip_loss((x, y), (y, x), 5.0)
    assert out.self_supervised.item() == out.nearest_neighbor.item() == 0.0
    torch.testing.assert_close(out.loss, 0.4 * out.contrastive + 0.2 * out.multi_view)
    with pytest.raises(ValueError, match=r"self_weight \+ view_weight \+ neighbor_weight is 1.2"):
        mm.declip_loss((x, x), (y, y), 5.0, self_weight=0.8)
    with pytest.raises(TypeError, match="y is a Tensor; expected a pair of tensors"):
        mm.declip_loss((x, x), y, 5.0)
    with pytest.raises(ValueError, match=r"neighbors has shape \(2, 5\); expected \(7, 5\), like x\[0\]"):
        mm.declip_loss((x, x), (y, y), 5.0, neighbors=unit(2, 5))


def test_coca_as_open_clip() -> None:
    x, y = pairs()
    s = scalar(9.0)
    logits = torch.randn(7, 6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (7, 6))
    labels[:, 4:] = 0
    theirs = submodule("open_clip.loss").CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    assert_same(
        lambda a, b, t, z: mm.coca_loss(a, b, t, z, labels, ignore_index=0).loss,
        lambda a, b, t, z: sum(theirs(a, b, z, labels, t)), x, y, s, logits,
    )  # fmt: skip
    out = mm.coca_loss(x, y, s, logits, labels, contrastive_weight=0.5, caption_weight=3.0, ignore_index=0)
    torch.testing.assert_close(out.loss, 0.5 * clip_formula(x, y, s) + 1.5 * theirs(x, y, logits, labels, s)[1])
    nothing = mm.coca_loss(x, y, s, logits, torch.full_like(labels, -100))
    assert nothing.caption.item() == 0.0
    with pytest.raises(ValueError, match=r"caption_labels has dtype int64 and shape \(7, 5\); expected int64 \(7, 6\)"):
        mm.coca_loss(x, y, s, logits, labels[:, :5])
    with pytest.raises(ValueError, match=r"caption_logits has shape \(42, 11\); expected \(N, L, V\)"):
        mm.coca_loss(x, y, s, logits.flatten(0, 1), labels)
    with pytest.raises(ValueError, match="caption_weight is -1; expected >= 0"):
        mm.coca_loss(x, y, s, logits, labels, caption_weight=-1)


# ---- FILIP -----------------------------------------------------------------------------------------------------------


def tokens(number: int, length: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(length) < torch.randint(1, length + 1, (number, 1), generator=torch.Generator().manual_seed(1))
    return unit(number, length, features, seed=seed).requires_grad_(), mask


def token_formula(x: Tensor, y: Tensor, xm: Tensor, ym: Tensor) -> tuple[Tensor, Tensor]:
    xy, yx = [], []
    for i in range(len(x)):
        for j in range(len(y)):
            z = x[i][xm[i]] @ y[j][ym[j]].T
            xy.append(z.max(1).values.mean())
            yx.append(z.max(0).values.mean())
    return torch.stack(xy).view(len(x), len(y)), torch.stack(yx).view(len(x), len(y))


@pytest.mark.parametrize("block_size", [1, 90, 300, 2**22])
@pytest.mark.parametrize("masked", [False, True])
def test_token_similarities(block_size: int, masked: bool) -> None:
    (x, xm), (y, ym) = tokens(5, 4, 6, 0), tokens(7, 3, 6, 1)
    if not masked:
        xm, ym = torch.ones_like(xm), torch.ones_like(ym)
    masks = (xm, ym) if masked else (None, None)
    for part in (0, 1):
        assert_same(
            lambda a, b, part=part: mm.token_similarities(a, b, *masks, block_size=block_size)[part],
            lambda a, b, part=part: token_formula(a, b, xm, ym)[part], x, y,
        )  # fmt: skip
    assert_same(
        lambda a, b: torch.cat(mm.token_similarities(a, b, *masks, block_size=block_size), 1),
        lambda a, b: torch.cat(token_formula(a, b, xm, ym), 1), x, y,
    )  # fmt: skip


def test_token_similarities_of_one_side_and_of_nothing() -> None:
    (x, _), (y, _) = tokens(3, 4, 6, 0), tokens(2, 5, 6, 1)
    out = mm.token_similarities(x.detach(), y)
    out.xy.sum().backward()
    assert y.grad is not None and x.grad is None
    assert mm.token_similarities(x[:0], y).yx.shape == (0, 2)
    half = mm.token_similarities(x.detach().half(), y.detach().half())
    assert half.xy.dtype == torch.float32
    exact = mm.token_similarities(x.detach().half().double(), y.detach().half().double())
    torch.testing.assert_close(half.xy.double(), exact.xy, rtol=1e-6, atol=1e-6)


def test_token_similarities_twice_differentiable() -> None:
    (x, xm), (y, ym) = tokens(3, 4, 3, 0), tokens(2, 5, 3, 1)
    assert torch.autograd.gradgradcheck(lambda a, b: mm.token_similarities(a, b, xm, ym, block_size=20), (x, y))


def test_filip_loss() -> None:
    (x, xm), (y, ym) = tokens(5, 4, 6, 0), tokens(5, 3, 6, 1)
    s = scalar(7.0)

    def formula(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        xy, yx = token_formula(x, y, xm, ym)
        return 0.5 * (
            (s * xy).logsumexp(1) - s * xy.diagonal() + (s * yx).logsumexp(0) - s * yx.diagonal()
        )  # fmt: skip

    assert_same(lambda a, b, t: mm.filip_loss(a, b, t, xm, ym, reduction="none"), formula, x, y, s)
    torch.testing.assert_close(mm.filip_loss(x, y, s, xm, ym), formula(x, y, s).mean())
    torch.testing.assert_close(mm.filip_loss(x, y, s, xm, ym, reduction="sum"), formula(x, y, s).sum())
    # with one token each it is CLIP's loss
    a, b = pairs()
    torch.testing.assert_close(
        mm.filip_loss(a[:, None], b[:, None], s, label_smoothing=0.2), clip_formula(a, b, s, label_smoothing=0.2)
    )


def test_wrong_tokens() -> None:
    x, y = torch.zeros(3, 4, 6), torch.zeros(2, 5, 6)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="x_mask has no token in row 1"):
        mm.token_similarities(x, y, mask)
    with pytest.raises(ValueError, match=r"y_mask has dtype float32 and shape \(2, 5\); expected bool \(2, 5\)"):
        mm.token_similarities(x, y, None, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"y has shape \(2, 5, 7\); expected \(M, T, 6\)"):
        mm.token_similarities(x, torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"x has shape \(3, 6\); expected \(N, P, D\)"):
        mm.token_similarities(x[:, 0], y)
    with pytest.raises(TypeError, match="y has dtype float64; expected float32"):
        mm.token_similarities(x, y.double())
    with pytest.raises(ValueError, match="block_size is 0"):
        mm.token_similarities(x, y, block_size=0)
    with pytest.raises(ValueError, match=r"y has shape \(2, 5, 6\); expected \(3, tokens, 6\), like x"):
        mm.filip_loss(x, y, 1.0)


# ---- queues and momentum ---------------------------------------------------------------------------------------------


def test_queue_is_first_in_first_out() -> None:
    pair, kept = mm.PairQueue(2, 5), []
    number = 0
    for batch in (2, 2, 3, 0, 5, 1):
        rows = torch.arange(number, number + batch, dtype=torch.float32)
        pair.enqueue(rows[:, None].expand(-1, 2), -rows[:, None].expand(-1, 2))
        kept = (kept + rows.tolist())[-5:]
        number += batch
        images, texts = pair.negatives()
        assert sorted(images[:, 0].tolist()) == kept and len(pair) == len(kept)
        assert torch.equal(texts, -images)  # row i of both is one pair


def test_queue_state_goes_on_exactly() -> None:
    one, other = mm.PairQueue(3, 4), mm.PairQueue(3, 4)
    one.enqueue(unit(3, 3), unit(3, 3, seed=1))
    other.load_state_dict(one.state_dict())
    for pair in (one, other):
        pair.enqueue(unit(3, 3, seed=2), unit(3, 3, seed=3))
    for a, b in zip(one.negatives(), other.negatives(), strict=True):
        assert torch.equal(a, b) and a.shape == (4, 3)


def test_queue_in_a_graph_across_enqueue() -> None:
    pair = mm.PairQueue(4, 6, dtype=torch.float64)
    pair.enqueue(unit(6, 4), unit(6, 4, seed=1))
    x, y = pairs(5, 4)
    images, texts = pair.negatives()
    loss = ops.info_nce(x, y, 5.0, x_negatives=images, y_negatives=texts)
    pair.enqueue(x, y)
    assert not pair.images.features().requires_grad
    grads = torch.autograd.grad(loss, [x, y])
    z = 5.0 * x @ y.T
    rows, cols = torch.cat([z, 5.0 * x @ texts.T], 1), torch.cat([z.T, 5.0 * y @ images.T], 1)
    want = 0.5 * sum(functional.cross_entropy(one, torch.arange(5)) for one in (rows, cols))
    for g, w in zip(grads, torch.autograd.grad(want, [x, y]), strict=True):
        torch.testing.assert_close(g, w)


def test_wrong_queue() -> None:
    pair = mm.PairQueue(2, 3)
    pair.enqueue(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"features has 4 rows, more than the queue's size"):
        pair.enqueue(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"text_embeds has shape \(1, 2\); expected \(2, 2\), like image_embeds"):
        pair.enqueue(torch.zeros(2, 2), torch.zeros(1, 2))
    assert len(pair) == 2 and all(bool((t == 1).all()) for t in pair.negatives())
    with pytest.raises(ValueError, match="PairQueue: size is 0; expected >= 1"):
        mm.PairQueue(2, 0)


@pytest.mark.parametrize("block", [1, 40, 2**22])
def test_nearest_neighbors(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(queue, "_BLOCK", block)
    queries, candidates = unit(6, 4), unit(20, 4, seed=1)
    want = candidates[torch.cdist(queries, candidates).argmin(1)]
    assert torch.equal(mm.nearest_neighbors(queries, candidates), want)
    with pytest.raises(ValueError, match=r"candidates has shape \(0, 4\); expected \(K, 4\) with K >= 1"):
        mm.nearest_neighbors(queries, candidates[:0])
    with pytest.raises(TypeError, match="candidates has dtype float32; expected float64"):
        mm.nearest_neighbors(queries, candidates.float())


def distillation_formula(
    x: Tensor, y: Tensor, xm: Tensor, ym: Tensor, s: Tensor, xq: Tensor, yq: Tensor, alpha: float
) -> Tensor:  # fmt: skip
    losses = []
    for a, am, bm, bq in ((x, xm, ym, yq), (y, ym, xm, xq)):
        every = torch.cat([bm, bq]).detach()
        targets = alpha * (s * am @ every.T).softmax(1) + (1 - alpha) * torch.eye(len(a), len(every), dtype=a.dtype)
        losses.append(-((s * a @ every.T).log_softmax(1) * targets.detach()).sum(1))
    return 0.5 * (losses[0] + losses[1])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queued", [0, 9])
def test_momentum_distillation(alpha: float, queued: int) -> None:
    x, y = pairs()
    xm, ym = (t.detach() for t in pairs(seed=5))
    xq, yq = unit(queued, 5, seed=6), unit(queued, 5, seed=7)
    queues = {"x_queue": xq, "y_queue": yq} if queued else {}
    assert_same(
        lambda a, b, t: mm.momentum_distillation_loss(a, b, xm, ym, t, alpha=alpha, reduction="none", **queues),
        lambda a, b, t: distillation_formula(a, b, xm, ym, t, xq, yq, alpha), x, y, scalar(8.0),
    )  # fmt: skip


def test_momentum_distillation_in_training() -> None:
    model = towers().double()
    slow = MomentumEncoder(model, momentum=0.9)
    pair = mm.PairQueue(4, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    image, ids = BATCH[0].double(), BATCH[1]
    losses = []
    for _ in range(12):
        out, target = model(image, ids), slow(image, ids)
        images, texts = pair.negatives()
        loss = mm.momentum_distillation_loss(
            *out[:2], *target[:2], out.logit_scale, x_queue=images, y_queue=texts, alpha=0.2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = [p.clone() for p in slow.parameters()]
        slow.update(model)
        for old, new, fast in zip(before, slow.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * fast)
            assert new.grad is None
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    pair.enqueue(*target[:2])
    assert len(pair) == 6


def test_wrong_distillation() -> None:
    x, y = pairs()
    with pytest.raises(ValueError, match="alpha is 2; expected 0 <= alpha <= 1"):
        mm.momentum_distillation_loss(x, y, x, y, 1.0, alpha=2)
    with pytest.raises(ValueError, match="one of x_queue and y_queue is None"):
        mm.momentum_distillation_loss(x, y, x, y, 1.0, x_queue=x)
    with pytest.raises(ValueError, match=r"y_queue has dtype float32 and shape \(7, 5\); expected float64 \(K, 5\)"):
        mm.momentum_distillation_loss(x, y, x, y, 1.0, x_queue=x, y_queue=y.float())
    with pytest.raises(ValueError, match="reduction is 'max'"):
        mm.momentum_distillation_loss(x, y, x, y, 1.0, reduction="max")


# ---- VSE++ -----------------------------------------------------------------------------------------------------------


def vse_formula(x: Tensor, y: Tensor, margin: float, hardest: bool) -> Tensor:
    z, eye = x @ y.T, torch.eye(len(x), dtype=torch.bool)
    own = z.diagonal()
    to_text = (margin - own[:, None] + z).relu().masked_fill(eye, 0.0)
    to_image = (margin - own + z).relu().masked_fill(eye, 0.0)
    if hardest:
        return to_text.max(1).values + to_image.max(0).values
    return to_text.sum(1) + to_image.sum(0)


@pytest.mark.parametrize("block", [1, 30, 2**22])
@pytest.mark.parametrize("hardest", [True, False])
def test_vse_loss(monkeypatch: pytest.MonkeyPatch, block: int, hardest: bool) -> None:
    monkeypatch.setattr(variants, "_BLOCK", block)
    x, y = pairs(11, 4, noise=0.7)
    want = vse_formula(x, y, 0.3, hardest)
    assert ((want > 0).any() and (want == 0).any()) or not hardest
    assert_same(
        lambda a, b: mm.vse_loss(a, b, margin=0.3, hardest=hardest, reduction="none"),
        lambda a, b: vse_formula(a, b, 0.3, hardest), x, y,
    )  # fmt: skip
    torch.testing.assert_close(mm.vse_loss(x, y, margin=0.3, hardest=hardest), want.mean())
    torch.testing.assert_close(mm.vse_loss(x, y, margin=0.3, hardest=hardest, reduction="sum"), want.sum())


def test_vse_as_pytorch_metric_learning() -> None:
    x, y = pairs(11, 4)
    itself, other = torch.arange(11), torch.arange(11)  # the same tensor would mean the same features there
    miner = pml_miners.BatchHardMiner(distance=pml_distances.CosineSimilarity())
    loss = pml_losses.TripletMarginLoss(
        margin=0.2, distance=pml_distances.CosineSimilarity(), reducer=pml_reducers.SumReducer()
    )
    want = loss(x, itself, miner(x, itself, y, other), y, other)
    want = want + loss(y, itself, miner(y, itself, x, other), x, other)
    torch.testing.assert_close(mm.vse_loss(x, y, reduction="sum"), want)


@pytest.mark.parametrize("hardest", [True, False])
def test_vse_of_one_pair(hardest: bool) -> None:
    x, y = pairs(1, 4)
    loss = mm.vse_loss(x, y, hardest=hardest)
    loss.backward()
    assert loss.item() == 0.0 and x.grad is not None and not x.grad.any()
    with pytest.raises(ValueError, match=r"vse_loss: margin is -0.1; expected >= 0"):
        mm.vse_loss(x, y, margin=-0.1)
    with pytest.raises(ValueError, match=r"vse_loss: y has shape \(1, 3\); expected \(1, 4\), like x"):
        mm.vse_loss(x, y[:, :3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_in_few_bits(dtype: torch.dtype) -> None:
    """Of the rounded input the value in float32; each gradient is rounded once, where a loss has two parts, twice."""
    x, y = (t.detach().to(dtype).requires_grad_() for t in pairs(11, 8, noise=0.7))
    xw, yw = (t.detach().double().requires_grad_() for t in (x, y))
    cases = [
        (1, lambda a, b: mm.vse_loss(a, b, margin=0.3), lambda a, b: vse_formula(a, b, 0.3, True).mean()),
        (1, lambda a, b: mm.vse_loss(a, b, hardest=False), lambda a, b: vse_formula(a, b, 0.2, False).mean()),
        (  # two parts that are nearly the same where student and teacher are
            16,
            lambda a, b: mm.momentum_distillation_loss(a, b, y, x, 8.0),
            lambda a, b: distillation_formula(a, b, yw, xw, 8.0, xw[:0], yw[:0], 0.4).mean(),
        ),
        (1, lambda a, b: mm.cyclip_loss(a, b, 8.0).in_modal, lambda a, b: cyclic_formula(a, b)[1]),
    ]
    for parts, ours, formula in cases:
        out, want = ours(x, y), formula(xw, yw)
        assert out.dtype == torch.float32
        assert out.item() == pytest.approx(want.item(), rel=1e-5)
        for g, w in zip(torch.autograd.grad(out, [x, y]), torch.autograd.grad(want, [xw, yw]), strict=True):
            assert g.dtype == dtype
            assert (g.double() - w).norm() <= parts * 0.5 * torch.finfo(dtype).eps * w.norm() + 1e-6


# ---- matching --------------------------------------------------------------------------------------------------------


def test_hard_negatives_are_drawn_by_the_softmax() -> None:
    """Frequencies over many draws, within 5 standard deviations of each."""
    x, y = (t.detach() for t in pairs(5, 3))
    generator, draws = torch.Generator().manual_seed(0), 2500
    z = (3.0 * x @ y.T).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    counts = torch.zeros(2, 5, 5, dtype=torch.float64)
    rows = torch.arange(5)
    for _ in range(draws):
        drawn = mm.hard_negatives(x, y, 3.0, generator=generator)
        counts[0, rows, drawn.texts] += 1
        counts[1, drawn.images, rows] += 1
    for count, p in zip(counts, (z.softmax(1), z.softmax(0)), strict=True):
        assert not count.diagonal().any()
        assert ((count / draws - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


@pytest.mark.parametrize("queries", [None, 3])
def test_hard_negatives_do_not_depend_on_blocks(queries: int | None) -> None:
    x = unit(9, 4) if queries is None else unit(9, queries, 4)
    y = unit(9, 4, seed=1)
    drawn = [
        mm.hard_negatives(x, y, 2.0, generator=torch.Generator().manual_seed(7), block_size=size)
        for size in (1, 50, 2**22)
    ]
    for other in drawn[1:]:
        assert torch.equal(other.texts, drawn[0].texts) and torch.equal(other.images, drawn[0].images)
    again = mm.hard_negatives(x, y, 2.0, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(again.texts, drawn[0].texts)


def test_hard_negatives_of_a_large_scale_are_the_hardest() -> None:
    """Where every other logit's softmax underflows, also without the diagonal."""
    x = unit(6, 4)
    sim = (x @ x.T).fill_diagonal_(-torch.inf)
    drawn = mm.hard_negatives(x, x, torch.tensor(1e5))
    assert torch.equal(drawn.texts, sim.argmax(1)) and torch.equal(drawn.images, sim.argmax(0))
    tokens_ = torch.stack([x, -x], 1)  # of each image's two the more similar counts
    sim = (x @ x.T).abs().fill_diagonal_(-torch.inf)
    drawn = mm.hard_negatives(tokens_, x, 1e5)
    assert torch.equal(drawn.texts, sim.argmax(1)) and torch.equal(drawn.images, sim.argmax(0))


def test_hard_negatives_of_other_groups() -> None:
    groups = torch.tensor([4, 4, 7, 7, 7])
    x, y = unit(5, 3), unit(5, 3, seed=1)
    for seed in range(20):
        drawn = mm.hard_negatives(x, y, groups=groups, generator=torch.Generator().manual_seed(seed))
        assert (groups[drawn.texts] != groups).all() and (groups[drawn.images] != groups).all()
    with pytest.raises(ValueError, match="pair 0 has no negative among 5 pairs"):
        mm.hard_negatives(x, y, groups=torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="pair 0 has no negative among 1 pairs"):
        mm.hard_negatives(x[:1], y[:1])
    with pytest.raises(ValueError, match=r"groups has dtype float32 and shape \(5,\); expected int64 \(5,\)"):
        mm.hard_negatives(x, y, groups=torch.ones(5))
    with pytest.raises(ValueError, match=r"y has shape \(4, 3\); expected \(5, 3\), like x"):
        mm.hard_negatives(x, y[:4])
    with pytest.raises(TypeError, match="y has dtype float32; expected float64"):
        mm.hard_negatives(x, y.float())
    assert mm.hard_negatives(x[:0], y[:0]).texts.shape == (0,)


def test_itm_loss() -> None:
    logits = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    matched = torch.tensor([True, False, True, True, False, False])

    def formula(z: Tensor) -> Tensor:  # of the difference alone, as binary cross-entropy has it
        return functional.binary_cross_entropy_with_logits(z[:, 1] - z[:, 0], matched.double(), reduction="none")

    assert_same(lambda z: mm.itm_loss(z, matched, reduction="none"), formula, logits)
    torch.testing.assert_close(mm.itm_loss(logits, matched), formula(logits).mean())
    with pytest.raises(ValueError, match=r"matched has dtype int64 and shape \(6,\); expected bool \(6,\)"):
        mm.itm_loss(logits, matched.long())
    with pytest.raises(ValueError, match=r"logits has shape \(6, 1\); expected \(B, 2\)"):
        mm.itm_loss(logits[:, :1], matched)


def test_matching_head() -> None:
    head = mm.ImageTextMatchingHead(4)
    states = torch.randn(3, 5, 4)
    torch.testing.assert_close(head(states), functional.linear(states, head.linear.weight, head.linear.bias).mean(1))
    torch.testing.assert_close(
        head(states[:, 0]), functional.linear(states[:, 0], head.linear.weight, head.linear.bias)
    )
    with pytest.raises(ValueError, match="hidden_size is 0"):
        itm.ImageTextMatchingHead(0)


# ---- the Q-Former ----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}


def qformer(dropout: float = 0.0, **options: Any) -> mm.QFormer:
    return mm.QFormer(
        **{"image_size": 10, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 24,
           "num_queries": 4, "vocab_size": 30, "max_positions": 12, "dropout": dropout} | options
    )  # fmt: skip


@pytest.fixture(scope="module")
def blip2() -> Any:
    torch.manual_seed(5)
    config = transformers.Blip2Config(
        qformer_config=SIZES | {
            "num_hidden_layers": 3, "encoder_hidden_size": 10, "use_qformer_text_input": True,
            "max_position_embeddings": 12,
        },
        vision_config={
            "hidden_size": 10, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        num_query_tokens=4, image_text_hidden_size=6,
    )  # fmt: skip
    model = transformers.Blip2ForImageTextRetrieval(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # theirs begins with queries of 0 and weights of 0.02
            p.copy_(0.3 * torch.randn(p.shape, dtype=torch.float64))
    return model


@pytest.fixture
def ours(blip2: Any) -> mm.QFormer:
    model = qformer().double().eval()
    model.load_blip2(blip2.state_dict())
    return model


def text_batch() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return torch.randint(0, 30, (3, 5), generator=torch.Generator().manual_seed(1)), mask


def their_states(blip2: Any, image: Tensor | None, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Of queries and text in one pass, with a mask [B, 1, L, L] (or [B, L]) of what is seen."""
    queries = None if image is None else blip2.query_tokens.expand(len(image), -1, -1)
    embeds = queries if ids is None else blip2.embeddings(input_ids=ids, query_embeds=queries)
    return blip2.qformer(
        query_embeds=embeds, query_length=0 if image is None else 4, attention_mask=mask, encoder_hidden_states=image
    ).last_hidden_state


def test_qformer_as_transformers(blip2: Any, ours: mm.QFormer) -> None:
    image = torch.randn(3, 7, 10, dtype=torch.float64)
    ids, mask = text_batch()
    real = mask.bool()
    torch.testing.assert_close(ours(image).queries, their_states(blip2, image, None, None))
    torch.testing.assert_close(ours(None, ids, text_mask=mask).text[real], their_states(blip2, None, ids, mask)[real])
    both = torch.cat([torch.ones(3, 4), mask], 1)
    want = their_states(blip2, image, ids, both)
    out = ours(image, ids, text_mask=mask, mode="itm")
    torch.testing.assert_close(out.queries, want[:, :4])
    torch.testing.assert_close(out.text[real], want[:, 4:][real])
    assert out.query_states is None


def seen_by(mode: str, mask: Tensor) -> Tensor:
    """[B, 1, 4 + T, 4 + T]: the table at the top of the module."""
    length = mask.shape[1]
    seen = torch.zeros(len(mask), 4 + length, 4 + length, dtype=torch.bool)
    seen[:, :4, :4] = True
    seen[:, :4, 4:] = mode == "itm"
    seen[:, 4:, :4] = mode != "itc"
    seen[:, 4:, 4:] = torch.ones(length, length).tril().bool() if mode == "itg" else True
    seen[:, :, 4:] &= mask.bool()[:, None]
    return seen[:, None]


@pytest.mark.parametrize("mode", ["itc", "itm", "itg"])
@pytest.mark.parametrize("padded", [False, True])
def test_modes_as_masks_of_transformers(blip2: Any, ours: mm.QFormer, mode: Any, padded: bool) -> None:
    image = torch.randn(3, 7, 10, dtype=torch.float64)
    ids, mask = text_batch()
    mask = mask if padded else torch.ones_like(mask)
    want = their_states(blip2, image, ids, seen_by(mode, mask))
    out = ours(image, ids, text_mask=mask if padded else None, mode=mode)
    torch.testing.assert_close(out.queries, want[:, :4])
    torch.testing.assert_close(out.text[mask.bool()], want[:, 4:][mask.bool()])


def test_gradients_as_transformers(blip2: Any, ours: mm.QFormer) -> None:
    image = torch.randn(3, 7, 10, dtype=torch.float64, requires_grad=True)
    ids, mask = text_batch()
    want = their_states(blip2, image, ids, seen_by("itg", mask))
    out = ours(image, ids, text_mask=mask, mode="itg")
    weight = torch.randn(want.shape, dtype=torch.float64) * torch.cat([torch.ones(3, 4), mask], 1)[..., None]
    got = torch.autograd.grad((torch.cat([out.queries, out.text], 1) * weight).sum(), [image, ours.queries])
    theirs = torch.autograd.grad((want * weight).sum(), [image, blip2.query_tokens])
    torch.testing.assert_close(got[0], theirs[0])
    torch.testing.assert_close(got[1], theirs[1][0])


def test_image_mask_hides_tokens(ours: mm.QFormer) -> None:
    image = torch.randn(2, 7, 10, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    out = ours(image, image_mask=mask).queries
    torch.testing.assert_close(out[1:], ours(image[1:, :4]).queries)
    torch.testing.assert_close(out[:1], ours(image[:1]).queries)


def test_load_blip2_from_the_bare_model_and_failing(blip2: Any, ours: mm.QFormer) -> None:
    model = qformer().double()
    start = model.queries.clone()
    model.load_blip2(blip2.qformer.state_dict())
    assert torch.equal(model.queries, start)
    torch.testing.assert_close(model.layers[2].attention.qkv.weight, ours.layers[2].attention.qkv.weight)
    before = copy.deepcopy(model.state_dict())
    state = dict(blip2.state_dict())
    del state["qformer.encoder.layer.2.output_query.LayerNorm.bias"]
    with pytest.raises(ValueError, match=r"state has no qformer\.encoder\.layer\.2\.output_query\.LayerNorm\.bias"):
        model.load_blip2(state)
    wrong = qformer(image_size=11).double()
    with pytest.raises(ValueError, match=r"crossattention.attention.key.weight gives shape \(32, 10\); expected \(32,"):
        wrong.load_blip2(blip2.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_qformer_without_text() -> None:
    model = qformer(vocab_size=None)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in qformer().parameters())
    config = transformers.Blip2QFormerConfig(**SIZES, num_hidden_layers=3, encoder_hidden_size=10)
    theirs = transformers.Blip2QFormerModel(config).eval()
    model.load_blip2(theirs.state_dict())
    image = torch.randn(2, 5, 10)
    want = theirs(model.queries.expand(2, -1, -1), encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(model(image).queries, want)
    with pytest.raises(ValueError, match="input_ids is given, and vocab_size was None"):
        model(image, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i, t: m(), "image and input_ids are None"),
        (lambda m, i, t: m(i, t, mode="all"), "mode is 'all'"),
        (lambda m, i, t: m(i, mode="itg"), "input_ids is None with mode 'itg'"),
        (lambda m, i, t: m(i[..., :9]), r"image has shape \(3, 7, 9\); expected \(B, P, 10\)"),
        (lambda m, i, t: m(i, t[:2]), "input_ids has 2 rows; expected 3, like image"),
        (lambda m, i, t: m(i, t.int()), "input_ids has dtype int32"),
        (lambda m, i, t: m(i, torch.zeros(3, 13, dtype=torch.int64)), "13 tokens; expected at most max_positions, 12"),
        (lambda m, i, t: m(i, t, text_mask=torch.zeros(3, 5)), "text_mask has dtype float32"),
        (lambda m, i, t: m(i, t, text_mask=torch.zeros(3, 5).bool()), "text_mask has no token in row 0"),
        (lambda m, i, t: m(None, t, image_mask=torch.ones(3, 7).bool()), "image_mask is given without image"),
        (lambda m, i, t: m.text_given(m(i[:2]).query_states, t), "input_ids 3 rows; expected 3 layers"),
        (lambda m, i, t: qformer(hidden_size=15), "hidden_size is 15; expected a multiple of num_heads, 2"),
        (lambda m, i, t: qformer(num_queries=0), "num_queries is 0; expected >= 1"),
        (lambda m, i, t: qformer(1.0), "dropout is 1.0"),
    ],
)
def test_wrong_qformer(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(qformer(), torch.zeros(3, 7, 10), text_batch()[0])


def pretraining(blip2: Any, ours: mm.QFormer, **options: Any) -> mm.QFormerPretraining:
    model = mm.QFormerPretraining(ours, 29, embed_dim=6, **options).double()
    model.image_projection.load_state_dict(blip2.vision_projection.state_dict())
    model.text_projection.load_state_dict(blip2.text_projection.state_dict())
    model.matching_head.linear.load_state_dict(blip2.itm_head.state_dict())
    return model


def test_scores_as_transformers(blip2: Any, ours: mm.QFormer) -> None:
    model = pretraining(blip2, ours)
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    ids, mask = text_batch()
    image = blip2.vision_model(pixels).last_hidden_state
    want = blip2(pixels, ids, attention_mask=mask, use_image_text_matching_head=True)
    torch.testing.assert_close(model.match(image, ids, text_mask=mask), want.logits_per_image)
    want = blip2(pixels, ids, attention_mask=mask)
    x, y = model.encode_image(image), model.encode_text(ids, mask)
    torch.testing.assert_close(x, want.image_embeds)
    torch.testing.assert_close(y, want.text_embeds)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pretraining_losses(blip2: Any, ours: mm.QFormer, smoothing: float) -> None:
    """Each part from transformers' states, with the formulas of the paper."""
    model = pretraining(blip2, ours, label_smoothing=smoothing)
    image = torch.randn(3, 7, 10, dtype=torch.float64)
    ids, mask = text_batch()
    losses = model(image, ids, text_mask=mask, generator=torch.Generator().manual_seed(2))

    x = functional.normalize(blip2.vision_projection(their_states(blip2, image, None, None)), dim=-1)
    y = functional.normalize(blip2.text_projection(their_states(blip2, None, ids, mask)[:, 0]), dim=-1)
    z = torch.einsum("iqd,jd->ijq", x, y).amax(2) / 0.07
    itself = torch.arange(3)
    contrastive = 0.5 * sum(functional.cross_entropy(one, itself, label_smoothing=smoothing) for one in (z, z.T))
    torch.testing.assert_close(losses.contrastive, contrastive, rtol=1e-6, atol=1e-7)  # the temperature is float32

    wrong = mm.hard_negatives(x, y, 1 / model.temperature, generator=torch.Generator().manual_seed(2))
    cases = [
        (image, ids, mask, 1),
        (image[wrong.images], ids, mask, 0),
        (image, ids[wrong.texts], mask[wrong.texts], 0),
    ]
    nll = []
    for i, t, m, label in cases:
        states = their_states(blip2, i, t, torch.cat([torch.ones(3, 4), m], 1))[:, :4]
        nll.append(-blip2.itm_head(states).mean(1).log_softmax(1)[:, label])
    torch.testing.assert_close(losses.matching, torch.cat(nll).mean())

    given = torch.cat([torch.full((3, 1), 29), ids[:, 1:]], 1)
    states = their_states(blip2, image, given, seen_by("itg", mask))[:, 4:]
    head = model.language_head
    logits = head.norm(functional.gelu(head.transform(states))) @ ours.words.weight.T + head.bias
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    generation = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=smoothing
    )
    torch.testing.assert_close(losses.generation, generation)
    torch.testing.assert_close(losses.loss, losses.contrastive + losses.matching + losses.generation)


def test_pretraining_learns() -> None:
    torch.manual_seed(1)
    model = mm.QFormerPretraining(qformer(), 29, embed_dim=8)
    image, ids = torch.randn(4, 5, 10), torch.randint(1, 29, (4, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(40):
        losses = model(image, ids)
        optimizer.zero_grad()
        losses.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        first = first or losses
    assert losses.contrastive < first.contrastive and losses.generation < 0.5 * first.generation


def test_text_of_one_token_generates_nothing() -> None:
    model = mm.QFormerPretraining(qformer(), 29, embed_dim=8)
    losses = model(torch.randn(2, 5, 10), torch.tensor([[3], [4]]))
    assert losses.generation.item() == 0.0 and losses.loss.isfinite()


def test_wrong_pretraining() -> None:
    with pytest.raises(ValueError, match="bos_token_id is 30; expected 0 <= bos_token_id < 30"):
        mm.QFormerPretraining(qformer(), 30)
    with pytest.raises(ValueError, match="qformer was made with vocab_size None"):
        mm.QFormerPretraining(qformer(vocab_size=None), 1)
    with pytest.raises(TypeError, match="qformer is a Linear; expected a QFormer"):
        mm.QFormerPretraining(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="temperature is 0; expected > 0"):
        mm.QFormerPretraining(qformer(), 1, temperature=0)


# ---- zero-shot -------------------------------------------------------------------------------------------------------


class Spelling(nn.Module):
    """A text encoder that reads letters; `encode_text` with the argument that open_clip gives."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.EmbeddingBag(128, 6, dtype=torch.float64)

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        out = self.letters(ids)
        return functional.normalize(out, dim=-1) if normalize else out


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(c) for c in text.ljust(24)[:24]] for text in texts])


NAMES = ["cat", "dog", "horse", "owl", "whale"]
TEMPLATES = ["a photo of a {}.", "art of the {}.", lambda name: f"my {name}"]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_zero_shot_as_open_clip(batch_size: int) -> None:
    model = Spelling()
    prompts = mm.prompt_ensemble(NAMES, TEMPLATES[:2])
    ours = mm.ZeroShotClassifier.from_prompts(
        prompts, model.encode_text, tokenize=tokenize, logit_scale=torch.tensor(20.0), batch_size=batch_size
    )
    theirs = submodule("open_clip.zero_shot_classifier").build_zero_shot_classifier(
        model, tokenize, NAMES, TEMPLATES[:2], num_classes_per_batch=2
    )
    torch.testing.assert_close(ours.weight, theirs.T)
    image = 3 * torch.randn(4, 6, dtype=torch.float64)
    logits = 20.0 * functional.normalize(image, dim=1) @ theirs
    torch.testing.assert_close(ours(image), logits)
    top = ours.predict(image, k=2)
    torch.testing.assert_close(top.probabilities, logits.softmax(1).topk(2).values)
    assert torch.equal(top.classes, logits.topk(2).indices)
    assert ours.names(image) == [NAMES[c] for c in logits.argmax(1)]
    assert not ours.weight.requires_grad and not list(ours.parameters())


def test_prompts_of_different_number() -> None:
    model = Spelling()
    prompts = {"cat": ["purrs", "has whiskers", "sleeps"], "dog": ["barks"]}
    ours = mm.ZeroShotClassifier.from_prompts(prompts, lambda texts: model.encode_text(tokenize(texts)), batch_size=2)
    for c, texts in enumerate(prompts.values()):
        mean = model.encode_text(tokenize(texts), normalize=True).mean(0)
        torch.testing.assert_close(ours.weight[c], functional.normalize(mean, dim=0).detach())


def test_prompt_ensemble() -> None:
    assert mm.prompt_ensemble(["ant", "bee"], TEMPLATES) == {
        "ant": ["a photo of a ant.", "art of the ant.", "my ant"],
        "bee": ["a photo of a bee.", "art of the bee.", "my bee"],
    }
    with pytest.raises(ValueError, match=r"the template 'a photo' has no \{\}"):
        mm.prompt_ensemble(["ant"], ["a photo"])
    with pytest.raises(ValueError, match="class_names has 'ant' twice"):
        mm.prompt_ensemble(["ant", "ant"])
    with pytest.raises(TypeError, match="templates is the string"):
        mm.prompt_ensemble(["ant"], "a {}")
    with pytest.raises(ValueError, match="class_names is empty"):
        mm.prompt_ensemble([])


def test_ensemble_embeddings() -> None:
    embeddings = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([2, 0, 1, 0, 2, 2, 1])

    def formula(e: Tensor) -> Tensor:
        rows = [functional.normalize(e[classes == c], dim=1).mean(0) for c in range(3)]
        return functional.normalize(torch.stack(rows), dim=1)

    assert_same(lambda e: mm.ensemble_embeddings(e, classes, 3), formula, embeddings)
    for number in (2, 4):
        with pytest.raises(ValueError, match=f"classes has not each of 0 to {number - 1}"):
            mm.ensemble_embeddings(embeddings, classes, number)
    half = mm.ensemble_embeddings(embeddings.detach().bfloat16(), classes, 3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), formula(embeddings.detach().bfloat16().double()), rtol=0.01, atol=0.01)


def test_zero_shot_state_and_errors() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    classifier = mm.ZeroShotClassifier(weight, ["a", "b"], 10.0)
    torch.testing.assert_close(classifier.weight, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    other = mm.ZeroShotClassifier(torch.ones(2, 2), ["a", "b"], 1.0)
    other.load_state_dict(classifier.state_dict())
    image = torch.randn(3, 2)
    torch.testing.assert_close(other(image), classifier(image))
    assert classifier(image.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"weight has shape \(2, 2\); expected \(3, D\)"):
        mm.ZeroShotClassifier(weight, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"logit_scale is -1\.0; expected one number > 0"):
        mm.ZeroShotClassifier(weight, ["a", "b"], -1.0)
    with pytest.raises(ValueError, match="k is 3; expected 1 <= k <= 2"):
        classifier.predict(image, 3)
    with pytest.raises(ValueError, match=r"image_embeds has shape \(3, 1\); expected \(N, 2\)"):
        classifier(image[:, :1])
    with pytest.raises(ValueError, match=r"encode returns shape \(1, 2\) for 2 texts"):
        mm.ZeroShotClassifier.from_prompts({"a": ["x", "y"]}, lambda t: torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"prompts\['a'\] is the string 'x'"):
        mm.ZeroShotClassifier.from_prompts({"a": "x"}, lambda t: torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"prompts\['a'\] is empty"):
        mm.ZeroShotClassifier.from_prompts({"a": []}, lambda t: torch.zeros(1, 2))


# ---- 16 bits, autocast, and arguments that would broadcast -----------------------------------------------------------


def test_logits_are_float32_under_autocast() -> None:
    x, y = unit(6, 5, dtype=torch.float32), unit(6, 5, seed=1, dtype=torch.float32)
    classifier = mm.ZeroShotClassifier(y, list("abcdef"))
    model = mm.TwoTower(nn.Identity(), nn.Identity(), logit_scale=100.0)
    labels = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        zero_shot, logits = classifier(x), model.logits(model(x, y))
        masked = mm.flyp_loss(x, y, 100.0, labels, collisions="mask")
    want = 100.0 * x.double() @ y.double().T
    for out in (zero_shot, logits.detach()):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    wanted = 0.5 * (functional.cross_entropy(want, labels) + functional.cross_entropy(want.T, labels))
    torch.testing.assert_close(masked.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_neighbors_of_16_bits_are_those_of_the_numbers(autocast: bool) -> None:
    # inner products 1 + k / 1024 for k = 0, 1, 2, ... would be one number in bfloat16
    candidates = torch.stack([torch.ones(8), torch.arange(8) / 1024], 1)
    queries = torch.ones(1, 2)
    if not autocast:
        candidates, queries = candidates.bfloat16(), queries.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(queue.nearest_neighbors(queries, candidates), candidates[7:])
    large = torch.tensor([[300.0], [400.0]], dtype=torch.float16)  # whose products are infinite in float16
    assert torch.equal(queue.nearest_neighbors(large, large), large[[1, 1]])


def test_negatives_of_another_dtype() -> None:
    model = mm.TwoTower(nn.Identity(), nn.Identity())
    x, y = unit(4, 5, dtype=torch.bfloat16), unit(4, 5, seed=1, dtype=torch.bfloat16)
    more = unit(6, 5, seed=2, dtype=torch.float32), unit(6, 5, seed=3, dtype=torch.float32)
    loss = model.loss(model(x, y), image_negatives=more[0], text_negatives=more[1])
    rounded = [t.bfloat16() for t in more]
    torch.testing.assert_close(
        loss, model.loss(model(x, y), image_negatives=rounded[0], text_negatives=rounded[1]), rtol=0, atol=0
    )


def test_no_loss_broadcasts_with_another() -> None:
    x, y = unit(6, 5), unit(6, 5, seed=1)
    tokens, scales = torch.zeros(6, 3, 7, dtype=torch.float64), torch.arange(1.0, 7.0)
    ids = torch.zeros(6, 3, dtype=torch.int64)
    for name, call in {
        "cyclip_loss": lambda **more: mm.cyclip_loss(x, y, 1.0, **more),
        "slip_loss": lambda **more: mm.slip_loss(x, y, 1.0, x, y, **more),
        "declip_loss": lambda **more: mm.declip_loss((x, x), (y, y), 1.0, **more),
        "coca_loss": lambda **more: mm.coca_loss(x, y, 1.0, tokens, ids, **more),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: reduction is 'none'; expected a loss that is one number"):
            call(reduction="none")
        with pytest.raises(ValueError, match=f"{name}: return_lse is True; expected a loss that is one number"):
            call(return_lse=True)
        assert call(reduction="sum").loss.dim() == 0
    with pytest.raises(ValueError, match=r"declip_loss: image_loss has shape \(6,\); expected 0-d"):
        mm.declip_loss((x, x), (y, y), 1.0, image_loss=torch.ones(6))
    for name, scaled in {
        "hard_negatives": lambda scale: mm.hard_negatives(x, y, scale),
        "filip_loss": lambda scale: mm.filip_loss(x[:, None], y[:, None], scale),
        "flyp_loss": lambda scale: mm.flyp_loss(x, y, scale, torch.arange(6), collisions="mask"),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: logit_scale has shape \(6,\); expected one element"):
            scaled(scales)
        with pytest.raises(TypeError, match=f"{name}: logit_scale is a str; expected a number or a tensor"):
            scaled("3")
    one = torch.tensor([3.0])  # of one element, whatever the dimensions
    torch.testing.assert_close(
        mm.filip_loss(x[:, None], y[:, None], one), mm.filip_loss(x[:, None], y[:, None], 3.0), check_dtype=False
    )


def test_what_is_no_tensor_is_told_so() -> None:
    x = unit(4, 5)
    for call, message in (
        (lambda: mm.vse_loss(x.tolist(), x), "vse_loss: x is a list; expected a tensor"),
        (lambda: mm.cyclip_loss(x, None, 1.0), "cyclic_consistency: y is a NoneType; expected a tensor"),
        (lambda: mm.hard_negatives(x, None), "hard_negatives: y is a NoneType; expected a tensor"),
        (lambda: mm.itm_loss(torch.zeros(1, 2), [True]), "itm_loss: matched is a list; expected a tensor"),
        (lambda: mm.nearest_neighbors(x, None), "nearest_neighbors: candidates is a NoneType; expected a tensor"),
        (lambda: mm.ensemble_embeddings(x, [0, 0, 1, 1], 2), "ensemble_embeddings: classes is a list"),
        (lambda: mm.modality_gap(x, None), "modality_gap: y is a NoneType; expected a tensor"),
        (lambda: mm.retrieval_metrics([[1.0]]), "retrieval_metrics: queries is a list; expected a tensor"),
        (lambda: mm.cca(x, None), "cca: y is a NoneType; expected a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_negative_classes_of_an_ensemble() -> None:
    with pytest.raises(ValueError, match="ensemble_embeddings: classes has not each of 0 to 1, and only these"):
        mm.ensemble_embeddings(unit(3, 5), torch.tensor([-1, 0, 1]), 2)


def test_a_similarity_that_is_nan_draws_nothing() -> None:
    x, y = unit(5, 3), unit(5, 3, seed=1)
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match="hard_negatives: pair 3 has a similarity that is NaN"):
        mm.hard_negatives(x, y)


def test_itm_loss_of_no_pairs() -> None:
    assert mm.itm_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool)).item() == 0.0
