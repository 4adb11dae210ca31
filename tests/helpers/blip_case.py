"""Checks that the adapters of BLIP, ALBEF and BLIP-2 have in common, and the host's own models, tiny and scrambled."""

import json
import urllib.error

import torch
from encoder_case import check_alone
from torch import nn

from neucore_plugin.models.backbones.bert_words import bert_tokenizer

IMAGE = {"width": 12, "depth": 2, "heads": 2}
TEXT = {"width": 12, "layers": 2, "heads": 2}
TEXTS = ["a red dress", "", "with longer sleeves and an unbelievably floral, 1970s-ish pattern", "is it [SEP] blue?"]
CLOSE = {"atol": 1e-5, "rtol": 0}


def scrambled(module, seed=0):
    """`module` in eval mode with random weights everywhere: no norm is neutral, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return module.eval()


def images(size, count=3, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokenizer(*names):
    """What the host's `init_tokenizer` gives, without a network."""
    made = bert_tokenizer()
    made.add_special_tokens(dict(zip(("bos_token",), names[:1], strict=False)))
    made.add_special_tokens({"additional_special_tokens": list(names[1:])})
    return made


def med_config(folder, **changes):
    """The host's file of a BERT's settings, tiny."""
    settings = {
        "hidden_size": TEXT["width"],
        "num_hidden_layers": TEXT["layers"],
        "num_attention_heads": TEXT["heads"],
        "intermediate_size": 4 * TEXT["width"],
        "layer_norm_eps": 1e-12,
        "add_type_embeddings": False,
        "vocab_size": 30524,
        "encoder_width": IMAGE["width"],
        "add_cross_attention": True,
        **changes,
    }
    path = folder / "med.json"
    path.write_text(json.dumps(settings))
    return path


def save(module, path, **more):
    """A checkpoint as the authors publish them, with entries that no encoder takes."""
    state = {**module.state_dict(), "temp_m": torch.ones(2), "text_encoder_m.cls": torch.ones(3), **more}
    torch.save({"model": state, "epoch": 3, "config": {"lr": 1e-4}}, path)
    return path


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route")


def seeded_sum(*parts):
    """A loss that any change of any element moves."""
    generator = torch.Generator().manual_seed(1)
    return sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)


def with_gradient(*modules):
    """Names of parameters that have a gradient that is not zero, and of all that require one."""
    named = {f"{place}.{name}": p for place, module in enumerate(modules) for name, p in module.named_parameters()}
    return {name for name, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}, set(named)


@torch.no_grad()
def check_image(encoder):
    """Shapes, place of the tokens, and independence of batch-mates."""
    out = check_alone(encoder, images(encoder.image_size))
    assert out["tokens"].shape == (3, encoder.num_tokens, encoder.width)
    assert out["pooled"].shape == (3, encoder.pooled_width)


@torch.no_grad()
def check_text(encoder):
    """Shapes, masks, empty texts, truncation and independence of batch-mates and padding."""
    out = check_alone(encoder, TEXTS)
    counts = [len(encoder.tokenizer.tokenize(text)) for text in TEXTS]
    assert out["words"].shape == (4, max(counts), encoder.width) and out["sentence"].shape == (4, encoder.width)
    assert out["mask"].dtype == torch.bool and out["mask"].sum(1).tolist() == counts
    assert not out["words"][~out["mask"]].any() and out["words"][out["mask"]].abs().sum(1).min() > 0
    assert not out["sentence"][1].any() and out["sentence"][[0, 2, 3]].abs().sum(1).min() > 0
    assert encoder([""])["words"].shape == (1, 0, encoder.width)
    assert encoder([])["words"].shape == (0, 0, encoder.width) and encoder([])["sentence"].shape == (0, encoder.width)
    _check_truncation(encoder)
    _check_words(encoder)


def _check_truncation(encoder):
    kept = " ".join(["red"] * encoder.max_words)
    cut, other, early = encoder([kept + " blue shirt"]), encoder([kept + " green"]), encoder(["blue " + kept])
    exact = encoder([kept])  # its end token stands where a longer text's must stand too
    assert cut["mask"].sum() == encoder.max_words
    for key in ("words", "sentence"):
        torch.testing.assert_close(cut[key], other[key])
        torch.testing.assert_close(cut[key], exact[key])
        assert (cut[key] - early[key]).abs().max() > 1e-3


def _check_words(encoder):
    table = encoder.word_embeddings.weight
    vectors = encoder.embed_words(["red", "floralish", "red", ""])
    pieces = encoder.tokenizer.convert_tokens_to_ids(encoder.tokenizer.tokenize("floralish"))
    assert len(pieces) > 1 and encoder.word_width == table.shape[1]
    torch.testing.assert_close(vectors[0], table[encoder.tokenizer.convert_tokens_to_ids("red")])
    torch.testing.assert_close(vectors[1], table[pieces].mean(0))
    torch.testing.assert_close(vectors[2], vectors[0])
    assert not vectors[3].any() and encoder.embed_words([]).shape == (0, encoder.word_width)
    table += 1  # nothing is remembered of the vectors
    torch.testing.assert_close(encoder.embed_words(["red"])[0], vectors[0] + 1)
    table -= 1


def check_fingerprint(encoder):
    """Every weight counts, and nothing else does."""
    before = encoder.fingerprint
    assert encoder.fingerprint == before
    for name, parameter in encoder.named_parameters():
        spot = parameter.data.view(-1)[-1:]
        old = spot.clone()
        spot += 1
        assert encoder.fingerprint != before, name
        spot.copy_(old)
    assert encoder.fingerprint == before


def check_adapters(encoder):
    """Every block has linear layers that low-rank adapters can sit beside, and their forward is really called."""
    called = set()
    targets = {}
    for place, block in enumerate(encoder.blocks):
        for name, part in block.named_modules():
            if name.rpartition(".")[2] in encoder.lora_targets:
                assert isinstance(part, nn.Linear)
                targets[f"{place}.{name}"] = part
    assert {name.split(".")[0] for name in targets} == {str(place) for place in range(len(encoder.blocks))}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.add(name), always_call=True)
        for name, part in targets.items()
    ]
    with torch.no_grad():
        encoder(images(encoder.image_size) if hasattr(encoder, "image_size") else TEXTS)
    for hook in hooks:
        hook.remove()
    assert called == set(targets)
