"""Progressive fusion: against loops, closed forms and numerical gradients; padding and batch-mates; bad inputs."""

import pytest
import reference
import tiny
import torch
from tiny import exact, rand

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import masked_softmax
from neucore_plugin.models.progressive_fusion import (
    AdaptiveInstanceNorm,
    AttendedEntities,
    Executor,
    InstructionWeights,
    ProgressiveFusion,
)

B, N, K, L, D, S = 3, 4, 2, 5, 6, 3
WORDS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
CONCEPTS = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)  # of an executor's tokens
FORMS = {"progressive": {}, "two layers": {"layers": 2, "module_depth": 2}, "mixture": {"mode": "mixture", "layers": 2}}


def fusion(**changes: object) -> ProgressiveFusion:
    return exact(ProgressiveFusion, dim=D, **{**tiny.FUSION, "steps": S, **changes})


def executor(**changes: object) -> Executor:
    settings = {"dim": D, "entity_dim": 5, "depth": 1, "heads": 2, "head_dim": 4, "mlp_ratio": 2.0, "dropout": 0.0}
    return exact(Executor, **{**settings, "released": False, "linears": 2, **changes})


def instructions(**changes: object) -> InstructionWeights:
    return exact(InstructionWeights, **{"dim": D, "layers": 2, "steps": S, "gumbel": False, "linears": 2, **changes})


def batch() -> dict[str, torch.Tensor]:
    return {
        "reference_tokens": rand(B, N, D),
        "reference_fg": rand(B, D),
        "concepts": rand(B, K, D),
        "concept_mask": CONCEPTS,
        "words": rand(B, L, D),
        "word_mask": WORDS,
        "sentence": rand(B, D),
    }


def beginning(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first executor's tokens, and which of them are valid."""
    x = torch.cat([inputs["reference_fg"][:, None], inputs["reference_tokens"], inputs["concepts"]], dim=1)
    return x, torch.cat([torch.ones(B, 1 + N, dtype=torch.bool), CONCEPTS], dim=1)


def pair(linear: torch.nn.Linear) -> tuple[list, list]:
    return linear.weight.tolist(), linear.bias.tolist()


def test_masked_softmax_takes_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 5.0], [1e30, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, False], [False, True, True]])
    assert masked_softmax(logits, mask).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]


# --- attended entities


def test_attended_entities_equal_loops() -> None:
    module, m, words = exact(AttendedEntities, dim=D, steps=S), rand(B, D), rand(B, L, D)
    entities, weights = module(m, words, WORDS)
    for b in range(B):
        expected = reference.attended_entities(
            m[b].tolist(),
            words[b].tolist(),
            WORDS[b].tolist(),
            [pair(query) for query in module.query],
            *(pair(getattr(module, name)) for name in ("guide", "key", "feature", "alpha")),
        )
        torch.testing.assert_close(entities[b], torch.tensor(expected[0], dtype=torch.float64))
        torch.testing.assert_close(weights[b], torch.tensor(expected[1], dtype=torch.float64))


def test_attended_entities_in_closed_form() -> None:
    module, m, words = exact(AttendedEntities, dim=D, steps=S), rand(B, D), rand(B, L, D)
    entities, weights = module(m, words[:, :1], WORDS[:1, :1].expand(B, 1))  # one word: it is the entity of every step
    torch.testing.assert_close(entities, words[:, :1].expand(-1, S, -1))
    assert (weights == 1).all()
    torch.nn.init.zeros_(module.alpha.weight)  # equal scores: the mean of the valid words
    entities, _ = module(m, words, WORDS)
    torch.testing.assert_close(entities[0, 0], words[0].mean(dim=0))
    torch.testing.assert_close(entities[1, 2], words[1, :2].mean(dim=0))


def test_attended_entities_without_words_are_zero_and_train() -> None:
    module, words = exact(AttendedEntities, dim=D, steps=S), rand(B, L, D).requires_grad_()
    entities, weights = module(rand(B, D), words, WORDS)
    assert not entities[2].any()
    assert not weights[2].any()
    entities.square().sum().backward()
    assert torch.isfinite(words.grad).all()
    assert not words.grad[~WORDS].any()
    empty, none = module(rand(B, D), rand(B, 0, D), torch.ones(B, 0, dtype=torch.bool))
    assert empty.shape == (B, S, D)
    assert not empty.any()
    assert none.shape == (B, S, 0)


# --- instructions


def test_instruction_weights_are_distributions_without_gradient_to_the_sentence() -> None:
    module, sentence = instructions(), rand(B, D).requires_grad_()
    weights = module(sentence)
    assert weights.shape == (B, 2, S)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, 2, dtype=torch.float64))
    weights.square().sum().backward()
    assert sentence.grad is None
    assert module.mlp[0].weight.grad is not None


def test_gumbel_noise_in_training_only() -> None:
    noisy, sentence = instructions(layers=1, gumbel=True).train(), rand(B, D)
    assert not torch.equal(noisy(sentence), noisy(sentence))
    noisy.eval()
    assert torch.equal(noisy(sentence), noisy(sentence))
    silent = instructions().train()
    assert torch.equal(silent(sentence), silent(sentence))
    # argmax of logits plus Gumbel noise is a draw from their softmax
    torch.nn.init.zeros_(noisy.mlp[2].weight)
    with torch.no_grad():
        noisy.mlp[2].bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
        drawn = noisy.train()(torch.zeros(20000, D).double()).argmax(dim=-1).flatten().bincount(minlength=S) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


# --- executors


def test_norm_equals_instance_norm_of_torch_without_padding() -> None:
    x, scale, shift = rand(B, N, D), rand(B, D), rand(B, D)
    expected = torch.nn.functional.instance_norm(x.transpose(1, 2), eps=1e-6).transpose(1, 2)
    expected = expected * scale[:, None] + shift[:, None]
    torch.testing.assert_close(AdaptiveInstanceNorm()(x, scale, shift, None), expected)


def test_norm_of_valid_tokens_equals_loops() -> None:
    x, scale, shift = rand(B, N, D), rand(B, D), rand(B, D)
    out = AdaptiveInstanceNorm()(x, scale, shift, VALID)
    for b in range(2):
        expected = reference.adaptive_norm(x[b].tolist(), scale[b].tolist(), shift[b].tolist(), VALID[b].tolist())
        torch.testing.assert_close(out[b], torch.tensor(expected, dtype=torch.float64))
    assert torch.isfinite(out).all()
    single = AdaptiveInstanceNorm()(x[:, :1], scale, shift, VALID[:, :1])  # no variance: the shift is left
    torch.testing.assert_close(single[0], shift[:1])


@pytest.mark.parametrize("depth", [1, 2])
def test_executor_equals_loops(depth: int) -> None:
    module, x, entity = executor(depth=depth), rand(B, N, D), rand(B, 5)
    torch.nn.init.normal_(module.generator[2].bias)
    mask = VALID.clone()
    mask[2, 1] = True
    out = module(x, entity, mask)
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    parts = ("attention.{}.qkv", "attention.{}.proj", "mlp.{}.fc1", "mlp.{}.fc2")
    layers = [[part.format(i) for part in parts] for i in range(depth)]
    for b in range(B):
        inputs = (x[b].tolist(), entity[b].tolist(), mask[b].tolist())
        expected = reference.executor(*inputs, weights, ("generator.0", "generator.2"), layers, 2, 4)
        torch.testing.assert_close(out[b], torch.tensor(expected, dtype=torch.float64))


def test_executor_starts_near_scale_one_and_shift_zero() -> None:
    parameters = executor(dim=64, entity_dim=64, depth=2).instantiate(rand(B, 64))
    assert parameters.shape == (B, 4, 2, 64)
    assert parameters[:, :, 0].abs().mean() < 0.3
    assert (parameters[:, :, 1] - 1).abs().mean() < 0.3
    assert parameters.std(dim=0).min() > 0  # but the entity matters from the first step on


def test_gradients_of_entities_and_executor() -> None:
    attend, execute = exact(AttendedEntities, dim=D, steps=2), executor(entity_dim=D, head_dim=3)
    assert torch.autograd.gradcheck(
        lambda m, w: attend(m, w, WORDS), (rand(B, D).requires_grad_(), rand(B, L, D).requires_grad_())
    )
    assert torch.autograd.gradcheck(
        lambda x, e: execute(x, e, VALID), (rand(B, N, D).requires_grad_(), rand(B, D).requires_grad_())
    )


# --- the whole


def test_chain_feeds_each_step_with_the_output_of_the_one_before() -> None:
    model, inputs = fusion(layers=2), batch()
    entities, _ = model.attend(inputs["sentence"], inputs["words"], WORDS)
    x, mask = beginning(inputs)
    for layer in range(2):
        for step in range(S):
            x = model.executors[layer][step](x, entities[:, step], mask)
    expected = model.output(x[:, 1 : 1 + N].mean(dim=1))
    torch.testing.assert_close(model(**inputs)["fused"], expected)


def test_mixture_sums_executors_by_instruction_weights() -> None:
    model, inputs = fusion(mode="mixture", layers=2), batch()
    out = model(**inputs)
    x, mask = beginning(inputs)
    for layer in range(2):
        total = torch.zeros_like(x)
        for step in range(S):
            weight = out["instruction_weights"][:, layer, step, None, None]
            total += weight * model.executors[layer][step](x, out["entities"][:, step], mask)
        x = total
    torch.testing.assert_close(out["fused"], model.output(x[:, 1 : 1 + N].mean(dim=1)))


@pytest.mark.parametrize("form", FORMS)
def test_padding_and_batch_mates_do_not_matter(form: str) -> None:
    model, inputs = fusion(**FORMS[form]), batch()
    spoiled = dict(inputs)  # with NaN at padding: nothing may read it
    for key, mask in (("concepts", CONCEPTS), ("words", WORDS)):
        spoiled[key] = inputs[key].masked_fill(~mask[..., None], float("nan"))
    together = model(**spoiled)
    for b, (k, w) in enumerate([(2, 5), (1, 2), (0, 0)]):
        one = {key: value[b : b + 1] for key, value in inputs.items()}
        cut = {"concepts": k, "concept_mask": k, "words": w, "word_mask": w}
        one.update({key: one[key][:, :size] for key, size in cut.items()})
        alone = model(**one)
        torch.testing.assert_close(together["fused"][b : b + 1], alone["fused"])
        torch.testing.assert_close(together["entities"][b : b + 1], alone["entities"])
        torch.testing.assert_close(together["word_weights"][b : b + 1, :, :w], alone["word_weights"])
        assert torch.isfinite(alone["fused"]).all()


def test_released_form_reads_padded_concepts() -> None:
    """What the default mends: there, more padding changes the result."""
    inputs = batch()
    wider = {
        **inputs,
        "concepts": torch.nn.functional.pad(inputs["concepts"], (0, 0, 0, 3)),
        "concept_mask": torch.nn.functional.pad(CONCEPTS, (0, 3)),
    }
    released, mended = fusion(mode="mixture", released=True), fusion(mode="mixture")
    assert not torch.allclose(released(**inputs)["fused"], released(**wider)["fused"])
    torch.testing.assert_close(mended(**inputs)["fused"], mended(**wider)["fused"])
    torch.testing.assert_close(released(**inputs, alone=True)["fused"], released(**wider, alone=True)["fused"])


@pytest.mark.parametrize("released", [False, True])
def test_gradient_to_concepts_flows_but_in_the_released_form(released: bool) -> None:
    model = fusion(mode="mixture", released=released)
    inputs = batch()
    inputs["concepts"].requires_grad_()
    model(**inputs)["fused"].sum().backward()
    assert (inputs["concepts"].grad is None) == released


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_finite_gradient(form: str) -> None:
    model, inputs = fusion(**FORMS[form]).train(), batch()
    model(**inputs)["fused"].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_is_deterministic(form: str) -> None:
    model, inputs = fusion(**FORMS[form], dropout=0.3), batch()
    assert torch.equal(model(**inputs)["fused"], model(**inputs)["fused"])
    model.train()
    assert not torch.equal(model(**inputs)["fused"], model(**inputs)["fused"])


BAD = {
    "reference_tokens": (torch.zeros(B, D), r"reference tokens \[B,N,D\] has shape \[3, 6\]"),
    "reference_fg": (torch.zeros(B, D + 1), r"reference foreground \[B,D\] has shape \[3, 7\], expected \[3, 6\]"),
    "concepts": (torch.zeros(B, K, D + 1), r"concepts \[B,K,D\] has shape \[3, 2, 7\]"),
    "concept_mask": (torch.zeros(B, K + 1), r"concept mask \[B,K\] has shape \[3, 3\], expected \[3, 2\]"),
    "words": (torch.zeros(B + 1, L, D), r"word vectors \[B,L,D\] has shape \[4, 5, 6\], expected \[3, any, 6\]"),
    "word_mask": (torch.zeros(B, L + 1), r"word mask \[B,L\] has shape \[3, 6\]"),
    "sentence": (torch.zeros(B + 1, D), r"sentence vectors \[B,D\] has shape \[4, 6\]"),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_input(key: str) -> None:
    value, message = BAD[key]
    with pytest.raises(ValueError, match=message):
        fusion()(**{**batch(), key: value.double()})


@pytest.mark.parametrize(
    ("x", "entity", "mask", "message"),
    [
        ((B, N, D), (B, D), (B, N), r"entity \[B,E\] has shape \[3, 6\], expected \[any, 5\]"),
        ((B, N, D + 1), (B, 5), (B, N), r"executor input \[B,M,D\] has shape \[3, 4, 7\]"),
        ((B, N, D), (B, 5), (B, N + 1), r"executor mask \[B,M\] has shape \[3, 5\]"),
    ],
)
def test_bad_executor_input(x: tuple, entity: tuple, mask: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        executor()(rand(*x), rand(*entity), torch.ones(mask))


BAD_SETTINGS = {
    "mode": ({"mode": "chain"}, "'chain', expected one of: progressive, mixture"),
    "released chain": ({"released": True}, 'released form needs "mixture"'),
    "no steps": ({"steps": 0}, "steps is 0, expected a whole number of at least 1"),
    "half a layer": ({"layers": 0.5}, "layers is 0.5"),
    "no depth": ({"module_depth": 0}, "module_depth is 0"),
    "heads": ({"heads": True}, "heads is True"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting(name: str) -> None:
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        fusion(**settings)
