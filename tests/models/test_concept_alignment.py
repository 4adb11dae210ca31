"""Concept alignment: against loops, closed forms and numerical gradients; batch-mates; bad inputs."""

import math

import pytest
import reference
import tiny
import torch
from tiny import exact, rand

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.concept_alignment import ConceptAlignment, ConceptClassifier, ConceptEncoder, MILPooling

B, N, D, DW, C = 3, 5, 8, 6, 7
ENCODER = {"dim": D, "heads": 2, "mlp_ratio": 4.0, "dropout": 0.0, "class_token": False}
FORMS = [{"bag": "union"}, {"bag": "joint"}, {"bag": "joint", "released": True}]


def encoder_of(depth: int, **changes: object) -> ConceptEncoder:
    return exact(ConceptEncoder, **{**ENCODER, "depth": depth, **changes})


def alignment_of(**changes: object) -> ConceptAlignment:
    return exact(ConceptAlignment, dim=D, word_dim=DW, **{**tiny.ALIGNMENT, **changes})


# --- pooling


def test_mil_pooling_equals_loops() -> None:
    pool, x = exact(MILPooling, dim=D, hidden=3), rand(B, N, D)
    pooled, weights = pool(x)
    v, u = pool.attention[0], pool.attention[2]
    for b in range(B):
        expected, expected_weights = reference.mil_pooling(
            x[b].tolist(), v.weight.tolist(), v.bias.tolist(), u.weight[0].tolist(), u.bias.item()
        )
        torch.testing.assert_close(pooled[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(weights[b], torch.tensor(expected_weights, dtype=torch.float64))
    assert torch.autograd.gradcheck(pool, rand(B, N, D).requires_grad_())


def test_mil_pooling_of_equal_scores_is_the_mean_of_the_tokens() -> None:
    pool, x = exact(MILPooling, dim=D, hidden=4), rand(B, N, D)
    torch.nn.init.zeros_(pool.attention[2].weight)
    torch.testing.assert_close(pool(x)[0], x.mean(dim=1))


def test_mil_pooling_finds_the_one_token_with_a_high_score() -> None:
    pool = exact(MILPooling, dim=2, hidden=1)
    with torch.no_grad():
        pool.attention[0].weight.copy_(torch.tensor([[100.0, 0.0]]))
        pool.attention[0].bias.zero_()
        pool.attention[2].weight.fill_(math.log(3.0) / 2)  # tanh is +1 or -1: scores differ by log 3
    x = torch.tensor([[[1.0, 5.0], [-1.0, 1.0]]], dtype=torch.float64)
    pooled, weights = pool(x)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(pooled, torch.tensor([[0.5, 4.0]], dtype=torch.float64))


# --- encoder


def test_encoder_equals_a_transformer_layer_of_torch() -> None:
    encoder = encoder_of(1)
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
    torch.testing.assert_close(encoder(x), encoder.norm(layer(x)))


def test_encoder_without_positions_does_not_see_order() -> None:
    encoder, x, order = encoder_of(2), rand(B, N, D), torch.randperm(N)
    torch.testing.assert_close(encoder(x)[:, order], encoder(x[:, order]))


def test_encoder_of_depth_zero_is_a_norm() -> None:
    x = rand(B, N, D)
    torch.testing.assert_close(encoder_of(0)(x), torch.nn.functional.layer_norm(x, (D,), eps=1e-6))


def test_released_encoder_takes_195_tokens_and_no_more() -> None:
    encoder = encoder_of(1, class_token=True)
    assert encoder(rand(1, 195, D)).shape == (1, 195, D)
    with pytest.raises(ValueError, match=r"196 image tokens are too many .* ends at 195"):
        encoder(rand(1, 196, D))
    assert encoder_of(1)(rand(1, 577, D)).shape == (1, 577, D)


# --- alignment


@pytest.mark.parametrize("form", FORMS)
def test_alignment_is_that_of_single_images_and_pairs(form: dict) -> None:
    """Neither batch-mates nor the other image matter to `encode`; the bag is pooled from both."""
    model, reference_, target, vocabulary = alignment_of(**form), rand(B, N, D), rand(B, N, D), rand(C, DW)
    r, t, logits = model(reference_, target, vocabulary)
    for b in range(B):
        one = slice(b, b + 1)
        for found, raw in ((r, reference_), (t, target)):
            for name, value in model.encode(raw[one]).items():
                torch.testing.assert_close(found[name][one], value)
        alone = model(reference_[one], target[one], vocabulary)[2]
        torch.testing.assert_close(logits[one], alone)
    _, weights = model.pool_bag(r, t)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, dtype=torch.float64))
    assert weights.shape == (B, 2 * N)


def test_the_bag_is_pooled_from_both_images_and_tells_them_apart() -> None:
    for bag in ("union", "joint"):
        model = alignment_of(bag=bag)
        r, t = model.encode(rand(B, N, D)), model.encode(rand(B, N, D))
        parts = [side["tokens" if bag == "union" else "raw"] for side in (r, t)]
        both = torch.cat([parts[0] + model.segments[0], parts[1] + model.segments[1]], 1)
        expected = model.fg_pool(both if bag == "union" else model.encoder(both))
        for found, wanted in zip(model.pool_bag(r, t), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        assert not torch.allclose(expected[0], model.pool_bag(t, r)[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient(form: dict) -> None:
    model = alignment_of(**form)
    r, _, logits = model(rand(B, N, D), rand(B, N, D), rand(C, DW))
    (logits.square().sum() + r["bg"].sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_classifier_is_a_product_with_projected_embeddings() -> None:
    classifier, pooled, vocabulary = exact(ConceptClassifier, word_dim=DW, dim=D), rand(B, D), rand(C, DW)
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
    encoder, x = encoder_of(2, dropout=0.5).train(), rand(B, N, D)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


BAD = {
    "two dimensions": (lambda: encoder_of(1)(rand(B, D)), r"image tokens \[B,N,D\] has shape \[3, 8\]"),
    "other width": (lambda: encoder_of(1)(rand(B, N, 9)), r"expected \[any, any, 8\]"),
    "instances": (lambda: exact(MILPooling, dim=D, hidden=4)(rand(B, N, 9)), r"instances .* \[3, 5, 9\]"),
    "embedding width": (lambda: alignment_of().classifier.project(rand(2, 5)), "width 5, expected 6"),
    "vocabulary": (lambda: alignment_of().classifier(rand(B, D), rand(DW)), r"concept vocabulary"),
    "batches differ": (
        lambda: alignment_of()(rand(2, N, D), rand(3, N, D), rand(C, DW)),
        r"target tokens \[B,N,D\] has shape \[3, 5, 8\], expected \[2, 5, 8\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


BAD_SETTINGS = {
    "heads": (lambda: encoder_of(1, heads=3), "width 8 is not a multiple of 3 heads"),
    "no heads": (lambda: encoder_of(1, heads=0), "heads is 0"),
    "depth": (lambda: encoder_of(-1), "depth is -1"),
    "bag": (lambda: alignment_of(bag="both"), "'both', expected one of: union, joint"),
    "released union": (lambda: alignment_of(released=True), 'released form needs "joint"'),
    "width": (lambda: MILPooling(dim=0, hidden=1), "dim is 0, expected a whole number"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting(name: str) -> None:
    call, message = BAD_SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        call()
