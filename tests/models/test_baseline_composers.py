"""The composers of the baselines against plain loops; ARTEMIS in matrix products against the broadcast."""

import math

import pytest
import reference
import tiny
import torch

from neucore_plugin.models.composers import COMPOSERS

D = 6


def composer(method: str):
    torch.manual_seed(1)
    made = COMPOSERS[method](dim=D, **tiny.COMPOSER.get(method, {})).double().eval()
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm1d):  # statistics and scales that a training might leave
            for value in (part.running_mean, part.weight.data, part.bias.data):
                value.normal_()
            part.running_var.uniform_(0.5, 2)
    w = {name: value.tolist() for name, value in made.state_dict().items()}
    return made, w


def layer(x, w, name):
    return reference.linear(x, *reference.both(w, name))


def two_layers(x, w, name, first=0, second=2):
    return reference.two_layers(x, w, f"{name}.{first}", f"{name}.{second}")


def normed(x, w, name):
    """ReLU of a batch norm by its running statistics."""
    mean, variance, scale, shift = (w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    rows = zip(x, mean, variance, scale, shift, strict=True)
    return reference.relu([(a - m) / math.sqrt(v + 1e-5) * s + b for a, m, v, s, b in rows])


def unit(x):
    length = math.sqrt(sum(value * value for value in x))
    return [value / length for value in x]


def by_loop(method, w, x, t):
    """One query of a pooled method: image vector x, sentence t."""
    if method == "image_only":
        return list(x)
    if method == "text_only":
        return list(t)
    if method == "sum":
        return [a + b for a, b in zip(x, t, strict=True)]
    if method == "tirg":
        gate = layer(normed([*x, *t], w, "gate.0"), w, "gate.2")
        residual = two_layers(normed([*x, *t], w, "residual.0"), w, "residual", 2, 4)
        kept = [reference.sigmoid(g) * a for g, a in zip(gate, x, strict=True)]
        return [w["gate_weight"] * k + w["residual_weight"] * r for k, r in zip(kept, residual, strict=True)]
    both = reference.relu(layer(t, w, "text.0")) + reference.relu(layer(x, w, "image.0"))
    mixed = layer(reference.relu(layer(both, w, "mix.0.0")), w, "mix.1")
    share = reference.sigmoid(layer(reference.relu(layer(both, w, "share.0.0")), w, "share.1")[0])
    summed = [m + share * b + (1 - share) * a for m, a, b in zip(mixed, x, t, strict=True)]
    length = math.sqrt(sum(value * value for value in summed))
    return [value / length for value in summed]


@pytest.mark.parametrize("method", ["image_only", "text_only", "sum", "tirg", "combiner"])
def test_pooled_composers_are_their_formulas(method):
    made, w = composer(method)
    vectors = {"pooled": torch.randn(4, D).double(), "sentence": torch.randn(4, D).double()}
    found = made(**{name: vectors[name] for name in made.reads})
    for row in range(4):
        expected = by_loop(method, w, vectors["pooled"][row].tolist(), vectors["sentence"][row].tolist())
        assert found[row].tolist() == pytest.approx(expected, rel=1e-9)
    if method == "tirg":
        assert (w["gate_weight"], w["residual_weight"]) == (1.0, 10.0)
        assert {name: len(w[f"{name}.weight"]) for name in ("gate.2", "residual.2", "residual.4")} == {
            "gate.2": D,
            "residual.2": 2 * D,
            "residual.4": D,
        }
    if method == "combiner":
        assert [tuple(made.mix[0][0].weight.shape), made.share[1].out_features] == [(8 * D, 8 * D), 1]


def test_tirgs_batch_norms():
    """In training by the batch, one pair alone by the running statistics; afterwards each query by itself."""
    made, _ = composer("tirg")
    x, t = torch.randn(2, 5, D).double()
    together = made(x, t)
    for row in range(5):
        torch.testing.assert_close(made(x[row : row + 1], t[row : row + 1])[0], together[row])
    alone = made.train()(x[:1], t[:1])
    torch.testing.assert_close(alone[0], together[0])
    both = torch.cat([x, t], dim=1)
    norm = made.gate[0]
    by_batch = (both - both.mean(0)) / (both.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    gate = torch.sigmoid(by_batch.relu() @ made.gate[2].weight.T + made.gate[2].bias)
    made.residual_weight.data.zero_()
    before = norm.running_mean.clone()
    torch.testing.assert_close(made(x, t), gate * x)
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * both.mean(0))


def test_cross_attention_is_a_transformer_whose_first_output_counts():
    """The loops see the words alone, without padding."""
    made, w = composer("cross_attention")
    tokens, words = torch.randn(2, 3, D).double(), torch.randn(2, 4, D).double()
    lengths = [4, 2]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    found = made(tokens=tokens, words=words, word_mask=mask)
    for row, length in enumerate(lengths):
        x = [w["first"]]
        x += [reference.add(token, w["segments"][0]) for token in tokens[row].tolist()]
        x += [reference.add(word, w["segments"][1]) for word in words[row, :length].tolist()]
        for block in ("blocks.0", "blocks.1"):
            parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            x = reference.encoder_block(x, w, *(f"{block}.{part}" for part in parts), 2)
        assert found[row].tolist() == pytest.approx(
            reference.layer_norm(x[0], *reference.both(w, "norm"), 1e-5), rel=1e-8
        )


# ---- ARTEMIS -------------------------------------------------------------------------------------------------------


@pytest.fixture
def artemis():
    made, w = composer("artemis")
    r, m, t = (torch.randn(count, D).double() for count in (4, 4, 7))
    r[1] = t[2] = 0.0  # a zero vector scores 0, not NaN
    return made, w, r, m, t


def test_artemis_is_its_formula(artemis):
    made, w, r, m, t = artemis
    with torch.no_grad():
        scores = made.score(made(pooled=r, sentence=m), {"fg": t})
        terms = made.score_terms(made(pooled=r, sentence=m), {"fg": t})
    for q in range(4):
        sentence = unit(m[q].tolist())
        explicit = reference.softmax(two_layers(sentence, w, "attention"))
        implicit = reference.softmax(two_layers(sentence, w, "implicit_attention"))
        seen = [a * b for a, b in zip(implicit, r[q].tolist(), strict=True)]
        for g in range(7):
            target = t[g].tolist()
            expected = reference.explicit_score(layer(sentence, w, "transform"), explicit, target)
            expected += reference.explicit_score(seen, implicit, target)
            assert scores[q, g].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            other = reference.explicit_score(seen, implicit, target)
            assert terms["implicit"][q, g].item() == pytest.approx(other, rel=1e-9, abs=1e-12)
            assert terms["explicit"][q, g].item() == pytest.approx(expected - other, rel=1e-9, abs=1e-12)
    asked, images = made.query_factors(made(pooled=r, sentence=m)), made.gallery_factors({"fg": t})
    assert "cosines" not in asked and asked["weighted"].shape == (4, 2, D)
    upper, lower = (torch.einsum("qtd,gd->qtg", asked[key], images[key]) for key in ("weighted", "squares"))
    torch.testing.assert_close((upper / lower.clamp(min=1e-24).sqrt()).sum(1), scores)


@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_artemis_knows_no_length_of_its_inputs(artemis, factor):
    made, _, r, m, t = artemis
    with torch.no_grad():
        scores = made.score(made(pooled=r, sentence=m), {"fg": t})
        other = made.score(made(pooled=factor * r, sentence=factor * m), {"fg": t / factor})
    torch.testing.assert_close(other, scores)


def test_artemis_in_products_equals_the_broadcast(artemis):
    """In place, with gradient, one query alone, and in chunks."""
    made, _, r, m, t = artemis
    query = made(pooled=r, sentence=m)
    cosine = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        explicit = cosine(query["text"][:, None], query["attention"][:, None] * t[None], dim=-1, eps=1e-12)
        weights = query["image_attention"][:, None]
        naive = explicit + cosine(weights * r[:, None], weights * t[None], dim=-1, eps=1e-12)
        stored = {name: value.detach() for name, value in query.items()}
        for found in (made.score(stored, {"fg": t}), made.score(stored, {"fg": t}, chunk=3)):
            torch.testing.assert_close(found, naive)
        one = {name: value[2:3] for name, value in stored.items()}
        torch.testing.assert_close(made.score(one, {"fg": t}), naive[2:3])
    torch.testing.assert_close(made.score(query, {"fg": t}), naive)  # the differentiable way
    values = [x.clone().requires_grad_() for x in (r[2:], m[2:], t[3:5])]
    assert torch.autograd.gradcheck(lambda r, m, t: made.score(made(pooled=r, sentence=m), {"fg": t}), values)


def test_where_cross_attention_looks_is_what_its_last_block_mixes():
    made, _ = composer("cross_attention")
    tokens, words = torch.randn(2, 4, D).double(), torch.randn(2, 3, D).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    looks, inputs = made.looks_at(tokens, words, mask), []
    made.blocks[-1].attn.register_forward_hook(lambda part, given, out: inputs.append((*given, out)))
    made(tokens, words, mask)
    x, valid, out = inputs[0]
    attn, (batch, count, _) = made.blocks[-1].attn, x.shape
    weights = attn.weights(x, valid)
    assert torch.allclose(weights.sum(-1), torch.ones(batch, attn.heads, count).double())
    values = attn.qkv(x).view(batch, count, 3, attn.heads, attn.head_dim)[:, :, 2].transpose(1, 2)
    mixed = attn.proj((weights @ values).transpose(1, 2).reshape(batch, count, -1))
    assert torch.allclose(mixed[valid], out[valid])
    assert torch.allclose(looks, weights.mean(1)[:, 0, 1:5]) and not weights[0, :, :, 7].any()
