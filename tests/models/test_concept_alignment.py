"""Concept alignment: against loops, closed forms and numerical gradients; padding and batch-mates; bad inputs."""

import math

import pytest
import reference
import torch

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.concept_alignment import (
    ConceptAlignment,
    ConceptAlignmentLoss,
    ConceptClassifier,
    ConceptEncoder,
    MILPooling,
    focal_concept_loss,
)
from neucore_plugin.models.layers import masked_softmax

B, N, D, DW, C = 3, 5, 8, 6, 7
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def build(cls: type, *args: object, **kwargs: object) -> torch.nn.Module:
    return cls(*args, **kwargs).double().eval()


def spoiled(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same with NaN at padding: nothing may read it."""
    return x.masked_fill(~mask[..., None], float("nan"))


# --- pooling


def test_mil_pooling_equals_loops() -> None:
    pool, x = build(MILPooling, D, 3), rand(B, N, D)
    pooled, weights = pool(x, MASK)
    v, u = pool.attention[0], pool.attention[2]
    for b in range(B):
        expected, expected_weights = reference.mil_pooling(
            x[b].tolist(), v.weight.tolist(), v.bias.tolist(), u.weight[0].tolist(), u.bias.item(), MASK[b].tolist()
        )
        torch.testing.assert_close(pooled[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(weights[b], torch.tensor(expected_weights, dtype=torch.float64))


def test_mil_pooling_of_equal_scores_is_the_mean_of_valid_tokens() -> None:
    pool, x = build(MILPooling, D), rand(B, N, D)
    torch.nn.init.zeros_(pool.attention[2].weight)
    pooled, _ = pool(x, MASK)
    for b in range(B):
        torch.testing.assert_close(pooled[b], x[b, MASK[b]].mean(dim=0))
    torch.testing.assert_close(pool(x)[0], x.mean(dim=1))


def test_mil_pooling_finds_the_one_token_with_a_high_score() -> None:
    pool = build(MILPooling, 2, 1)
    with torch.no_grad():
        pool.attention[0].weight.copy_(torch.tensor([[100.0, 0.0]]))
        pool.attention[0].bias.zero_()
        pool.attention[2].weight.fill_(math.log(3.0) / 2)  # tanh is +1 or -1: scores differ by log 3
    x = torch.tensor([[[1.0, 5.0], [-1.0, 1.0]]], dtype=torch.float64)
    pooled, weights = pool(x)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(pooled, torch.tensor([[0.5, 4.0]], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_an_empty_bag_is_zero_and_trains() -> None:
    pool = MILPooling(D).double()
    x, mask = rand(2, N, D).requires_grad_(), torch.tensor([[True] * N, [False] * N])
    pooled, weights = pool(x, mask)
    assert not pooled[1].any()
    assert not weights[1].any()
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        pool(x, mask)[0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in pool.parameters())


def test_masked_softmax_takes_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 5.0], [1e30, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, False], [False, True, True]])
    assert masked_softmax(logits, mask).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]


# --- loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 1.0), (0.25, 2.0), (0.9, 0.0), (0.5, 0.5)])
def test_focal_loss_equals_loops(alpha: float, gamma: float) -> None:
    logits, labels = 3 * rand(B, C), (torch.rand(B, C) > 0.6).long()
    expected = reference.focal_loss(logits.tolist(), labels.tolist(), alpha, gamma)
    assert focal_concept_loss(logits, labels, alpha, gamma).item() == pytest.approx(expected, rel=1e-12)


def test_focal_loss_in_closed_form() -> None:
    zeros, labels = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0]])
    assert focal_concept_loss(zeros, labels).item() == pytest.approx(0.25 * math.log(2))
    assert ConceptAlignmentLoss()(zeros, labels).item() == pytest.approx(50 * math.log(2))
    one = torch.full((1, 1), math.log(3.0), dtype=torch.float64)  # p = 3/4
    assert focal_concept_loss(one, torch.ones(1, 1)).item() == pytest.approx(-0.5 * 0.25 * math.log(0.75))
    assert focal_concept_loss(one, torch.zeros(1, 1)).item() == pytest.approx(-0.5 * 0.75 * math.log(0.25))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_is_finite_at_extreme_logits(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 1, 1]])
    loss = focal_concept_loss(logits, labels, gamma=gamma)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(2 * 0.5 * 1e4 / 5, rel=1e-3)  # only the two wrong ones cost much


def test_gradients_of_loss_and_pooling() -> None:
    labels = (torch.rand(B, C) > 0.5).double()
    for gamma in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda z, gamma=gamma: focal_concept_loss(z, labels, gamma=gamma), rand(B, C).requires_grad_()
        )
    pool = build(MILPooling, D)
    assert torch.autograd.gradcheck(lambda x: pool(x, MASK), rand(B, N, D).requires_grad_())


# --- encoder


def test_encoder_equals_a_transformer_layer_of_torch() -> None:
    encoder = build(ConceptEncoder, D, 1, 2)
    layer = torch.nn.TransformerEncoderLayer(
        D, 2, 4 * D, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    block = encoder.blocks[0]
    pairs = {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.proj.weight,
        "self_attn.out_proj.bias": block.attn.proj.bias,
        **{f"linear{i}.{k}": getattr(getattr(block.mlp, f"fc{i}"), k) for i in (1, 2) for k in ("weight", "bias")},
        **{f"norm{i}.{k}": getattr(getattr(block, f"norm{i}"), k) for i in (1, 2) for k in ("weight", "bias")},
    }
    layer.load_state_dict(pairs)
    x = rand(B, N, D)
    expected = encoder.norm(layer(x, src_key_padding_mask=~MASK))
    actual = encoder(x, MASK)
    torch.testing.assert_close(actual[MASK], expected[MASK])
    assert not actual[~MASK].any()


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_encoder_ignores_padding_and_batch_mates(class_token: bool, depth: int) -> None:
    encoder, x = build(ConceptEncoder, D, depth, 2, class_token=class_token), rand(B, N, D)
    out = encoder(spoiled(x, MASK), MASK)
    alone = torch.cat([encoder(x[b : b + 1], MASK[b : b + 1]) for b in range(B)])
    torch.testing.assert_close(out, alone)
    if not class_token:  # the released form's position row depends on the number of tokens, padding included
        torch.testing.assert_close(out[1:2, :3], encoder(x[1:2, :3]))
    torch.testing.assert_close(encoder(x), encoder(x, torch.ones(B, N, dtype=torch.bool)))


def test_encoder_without_positions_does_not_see_order() -> None:
    encoder, x, order = build(ConceptEncoder, D, 2, 2), rand(B, N, D), torch.randperm(N)
    torch.testing.assert_close(encoder(x)[:, order], encoder(x[:, order]))


def test_encoder_of_depth_zero_is_a_norm() -> None:
    encoder, x = build(ConceptEncoder, D, 0, 2), rand(B, N, D)
    torch.testing.assert_close(encoder(x), torch.nn.functional.layer_norm(x, (D,), eps=1e-6))


def test_released_encoder_takes_195_tokens_and_no_more() -> None:
    encoder = build(ConceptEncoder, D, 1, 2, class_token=True)
    assert encoder(rand(1, 195, D)).shape == (1, 195, D)
    with pytest.raises(ValueError, match=r"196 image tokens are too many .* ends at 195"):
        encoder(rand(1, 196, D))
    assert build(ConceptEncoder, D, 1, 2)(rand(1, 577, D)).shape == (1, 577, D)


def test_sample_without_any_token_is_zero_and_trains() -> None:
    encoder = ConceptEncoder(D, 2, 2).double()
    x, mask = rand(2, N, D).requires_grad_(), torch.tensor([[True] * N, [False] * N])
    out = encoder(x, mask)
    assert not out[1].any()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[1].any()


# --- alignment


@pytest.mark.parametrize(("bag", "released"), [("union", False), ("joint", False), ("joint", True)])
def test_alignment_ignores_padding_and_batch_mates(bag: str, released: bool) -> None:
    model = build(ConceptAlignment, D, DW, 2, 2, bag=bag, released=released)
    r, t, r_mask, t_mask = rand(B, N, D), rand(B, N, D), MASK, MASK.flip(0)

    def run(part: slice, spoil: bool) -> dict[str, torch.Tensor]:
        raw = [spoiled(x[part], m[part]) if spoil else x[part] for x, m in ((r, r_mask), (t, t_mask))]
        masks = (r_mask[part], t_mask[part])
        encodings = [model.encode(x, m) for x, m in zip(raw, masks, strict=True)]
        return {**encodings[0], **model.align(*encodings, *raw, masks)}

    together = run(slice(None), spoil=True)
    for b in range(B):
        for key, value in run(slice(b, b + 1), spoil=False).items():
            torch.testing.assert_close(together[key][b : b + 1], value, msg=lambda text, key=key: f"{key}: {text}")
    assert together["weights"].shape == (B, 2 * N)
    torch.testing.assert_close(together["weights"].sum(dim=1), torch.ones(B, dtype=torch.float64))
    assert not together["weights"][~torch.cat([r_mask, t_mask], dim=1)].any()


def test_union_pools_both_encodings_and_tells_them_apart() -> None:
    model = build(ConceptAlignment, D, DW, 1, 2)
    r, t = model.encode(rand(B, N, D)), model.encode(rand(B, N + 1, D))
    out = model.align(r, t)
    expected, weights = model.fg_pool(torch.cat([r["tokens"] + model.segments[0], t["tokens"] + model.segments[1]], 1))
    torch.testing.assert_close(out["pooled"], expected)
    torch.testing.assert_close(out["weights"], weights)
    assert not torch.allclose(out["pooled"], model.align(t, r)["pooled"])
    one_mask = model.align(r, t, masks=(MASK, None))
    assert one_mask["weights"].shape == (B, 2 * N + 1)
    assert not one_mask["weights"][:, :N][~MASK].any()


def test_every_parameter_gets_a_gradient() -> None:
    for bag, released in (("union", False), ("joint", False), ("joint", True)):
        model = ConceptAlignment(D, DW, 1, 2, bag=bag, released=released)
        raw = torch.randn(2, B, N, D)
        r, t = model.encode(raw[0]), model.encode(raw[1])
        logits = model.classifier(model.align(r, t, *raw)["pooled"], torch.randn(C, DW))
        (ConceptAlignmentLoss()(logits, torch.zeros(B, C)) + r["bg"].sum()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_classifier_is_a_product_with_projected_embeddings() -> None:
    classifier, pooled, vocabulary = build(ConceptClassifier, DW, D), rand(B, D), rand(C, DW)
    logits = classifier(pooled, vocabulary)
    for b in range(B):
        for c in range(C):
            concept = reference.linear(
                vocabulary[c].tolist(), classifier.projection.weight.tolist(), classifier.projection.bias.tolist()
            )
            expected = sum(x * y for x, y in zip(concept, pooled[b].tolist(), strict=True))
            assert logits[b, c].item() == pytest.approx(expected)
    assert classifier.project(rand(B, 4, DW)).shape == (B, 4, D)


def test_dropout_acts_in_training_only() -> None:
    encoder, x = ConceptEncoder(D, 2, 2, dropout=0.5), torch.randn(B, N, D)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


BAD = {
    "two dimensions": (
        lambda: ConceptEncoder(D, 1, 2)(torch.zeros(B, D)),
        r"image tokens \[B,N,D\] has shape \[3, 8\]",
    ),
    "other width": (lambda: ConceptEncoder(D, 1, 2)(torch.zeros(B, N, 9)), r"expected \[any, any, 8\]"),
    "mask of other length": (
        lambda: ConceptEncoder(D, 1, 2)(torch.zeros(B, N, D), torch.ones(B, N + 1)),
        r"image token mask \[B,N\] has shape \[3, 6\], expected \[3, 5\]",
    ),
    "pooling mask": (lambda: MILPooling(D)(torch.zeros(B, N, D), torch.ones(B, 1)), r"instance mask .* \[3, 1\]"),
    "embedding width": (lambda: ConceptClassifier(DW, D).project(torch.zeros(2, 5)), "width 5, expected 6"),
    "vocabulary": (lambda: ConceptClassifier(DW, D)(torch.zeros(B, D), torch.zeros(DW)), r"concept vocabulary"),
    "labels": (lambda: focal_concept_loss(torch.zeros(B, C), torch.zeros(B, C + 1)), r"labels .* \[3, 8\]"),
    "no concepts": (lambda: focal_concept_loss(torch.zeros(B, 0), torch.zeros(B, 0)), "empty batch or vocabulary"),
    "batches differ": (
        lambda: ConceptAlignment(D, DW, 0, 2).align({"tokens": torch.zeros(2, N, D)}, {"tokens": torch.zeros(3, N, D)}),
        r"target tokens \[B,N,D\] has shape \[3, 5, 8\], expected \[2, any, 8\]",
    ),
    "joint without raw tokens": (
        lambda: ConceptAlignment(D, DW, 0, 2, bag="joint").align({}, {}),
        r"joint bag encodes the raw tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


BAD_SETTINGS = {
    "heads": (lambda: ConceptEncoder(D, 1, 3), "width 8 is not a multiple of 3 heads"),
    "no heads": (lambda: ConceptEncoder(D, 1, 0), "heads is 0"),
    "depth": (lambda: ConceptEncoder(D, -1, 2), "depth is -1"),
    "bag": (lambda: ConceptAlignment(D, DW, bag="both"), "'both', expected one of: union, joint"),
    "released union": (lambda: ConceptAlignment(D, DW, released=True), 'released form needs "joint"'),
    "alpha": (lambda: ConceptAlignmentLoss(alpha=2.0), "alpha must lie in 0..1"),
    "width": (lambda: MILPooling(0), "dim is 0, expected a whole number"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting(name: str) -> None:
    call, message = BAD_SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        call()
