"""Gradient caching: losses and gradients of the plain step, whatever the chunk; less memory; all at once."""

import json
import logging

import batch_case as case
import numpy as np
import pytest
import runner_case
import torch
from torch import nn

from neucore_plugin import launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.training.grad_cache import GradCache, chunks, rows
from neucore_plugin.weights import checkpoint

COUNT = 12
CHUNKS = [1, 3, 5, 8, 11, 12, 40]  # divisors of 12 and others, the batch itself, more than the batch


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_plain_step(chunk, accumulate):
    plain = case.step("toy", {}, COUNT, accumulate=accumulate)
    case.assert_same_step(case.step("toy", {}, COUNT, chunk, accumulate), plain, 1e-9)


@pytest.mark.parametrize(
    ("settings", "chunk", "tolerance"),
    [
        ({"reference_negatives": True}, 2, 1e-9),
        ({"reference_negatives": False}, 3, 1e-9),
        ({"dtype": torch.float32, "train_text": True}, 3, 1e-5),
        ({"kind": "clauses", "train_text": True}, 3, 1e-9),
    ],
)
def test_equals_the_plain_step_of_neucore(settings, chunk, tolerance):
    case.assert_same_step(case.step("neucore", settings, 8, chunk), case.step("neucore", settings, 8), tolerance)


def test_two_processes_equal_one(tmp_path):
    """The rows of a process are cut into chunks, the loss sees those of both."""
    calls = [(kind, {}, 8, chunk) for kind in ("toy", "neucore") for chunk in (2, 3)]
    accumulated = [("toy", {}, 8, chunk, 2) for chunk in (None, 2, 3)]
    *cached, wanted, two, three = zip(*runner_case.in_group(tmp_path, case.steps, calls + accumulated), strict=True)
    for (kind, *_), parts in zip(calls, cached, strict=True):
        case.assert_group_equals_one(list(parts), case.step(kind, {}, 8))
    for rank in range(2):
        case.assert_same_step(two[rank], wanted[rank], 1e-9)
        case.assert_same_step(three[rank], wanted[rank], 1e-9)


def in_chunks(model: nn.Module, samples: dict, chunk: int) -> dict:
    """The chunks in one graph: what has to come out where a forward pass draws random numbers."""
    parts = [model.encode_pairs(part) for part in chunks(samples, rows(samples), chunk)]
    return model.losses({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, samples)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"norm": True}, {"dropout": 0.3, "norm": True}])
def test_both_passes_draw_the_same_and_statistics_move_once(settings, caplog):
    samples, found = case.toy_pairs(COUNT), []
    for wrapped in (True, False):
        model = case.Toy(**settings).train()
        with caplog.at_level(logging.WARNING):
            stepped = GradCache(model, 5) if wrapped else None
        torch.manual_seed(1)
        out = stepped(samples) if wrapped else in_chunks(model, samples, 5)
        after = torch.rand(3)
        out["loss"].backward()
        assert torch.equal(torch.rand(3), after) is False
        found.append((out, after, torch.rand(3), model))
    (one, first, then, cached), (other, first_again, then_again, plain) = found
    assert torch.equal(first, first_again) and torch.equal(then, then_again)  # the generator is where it would be
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=0)
    for (name, value), wanted in zip(cached.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)
    for value, wanted in zip(cached.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    assert ("norm and 0 other batch norms take their statistics from chunks of 5" in caplog.text) == bool(
        settings.get("norm")
    )


def test_query_dropout_of_neucore_is_the_same_in_both_passes():
    grads = []
    for wrapped in (True, False):
        model = case.neucore().train()
        model.query_dropout = {"image": 0.4, "text": 0.4}
        samples = case.neucore_pairs(8)
        torch.manual_seed(2)
        out = GradCache(model, 3)(samples) if wrapped else in_chunks(model, samples, 3)
        out["loss"].backward()
        grads.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad})
    assert np.abs(grads[1]["absent_image"]).max() > 0 and np.abs(grads[1]["absent_word"]).max() > 0
    for name, wanted in grads[1].items():
        np.testing.assert_allclose(grads[0][name], wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max(), err_msg=name)


def test_in_bfloat16_weights_still_get_their_gradients():
    """Autocast remembers converted weights; those of a pass without graph would carry no gradient."""
    found = []
    for chunk in (None, 3):
        model = case.Toy(dtype=torch.float32).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = (GradCache(model, chunk) if chunk else model)(case.toy_pairs(COUNT, torch.float32))
        out["loss"].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(value.abs().max().item() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0.02 * largest, msg=name)
        assert value.abs().max() > 0 and found[1][name].abs().max() > 0


def kept_bytes(stepped: nn.Module, samples: dict) -> int:
    """Most bytes of tensors that autograd holds for the backward pass, weights left out, of a whole step."""
    weights = {p.untyped_storage().data_ptr() for p in stepped.parameters()}
    held, most = [0], [0]

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            own = tensor.untyped_storage().data_ptr() not in weights
            self.tensor, self.bytes = tensor, tensor.nbytes if own else 0
            held[0] += self.bytes
            most[0] = max(most[0], held[0])

        def __del__(self) -> None:
            held[0] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        loss = stepped(samples)["loss"]
        plain = most[0]
    del loss
    return plain


def test_fewer_activations_are_kept():
    class Deep(case.Toy):
        def __init__(self) -> None:
            super().__init__()
            layers = [layer for _ in range(20) for layer in (nn.Linear(case.WIDTH, case.WIDTH), nn.Tanh())]
            self.deep = nn.Sequential(*layers).double()

        def encode_pairs(self, samples: dict) -> dict:
            return super().encode_pairs({**samples, "x": self.deep(samples["x"])})

    samples = case.toy_pairs(64)
    model = Deep().train()
    assert kept_bytes(GradCache(model, 8), samples) < kept_bytes(model, samples) / 2


def test_neucore_through_the_host_in_bfloat16(tiny_config):
    """Plain, and with everything at once: losses near those of float32, weights kept in float32."""
    losses = {}
    bf16 = {"amp": "bf16"}
    everything = {**bf16, "grad_cache_chunk": 5, "ema_decay": 0.9, "accum_grad_iters": 2}
    for name, run in {"float32": {}, "bf16": bf16, "everything": everything}.items():

        def change(config: dict, run=run, name=name) -> None:
            config["model"]["query_dropout"] = {"image": 0.0, "text": 0.0}
            config["run"].update(max_epoch=1, report=False, output_dir=config["run"]["output_dir"] + name, **run)
            config["run"].update(valid_splits=[], test_splits=["val"])

        path = tiny_config(change, f"{name}.yaml")
        metrics = launch.run(path)
        assert 0 < metrics["val"]["R@10"] <= 100
        (last,) = path.parent.glob(f"output{name}/*/checkpoint_last.pth")
        stored = checkpoint.load(last)
        assert {v.dtype for v in stored["model"].values() if v.is_floating_point()} == {torch.float32}
        lines = (last.parent / "log.txt").read_text().splitlines()
        losses[name] = next(line for line in map(json.loads, lines) if "train_loss" in line)
    for name in ("train_loss", "train_loss_matching", "train_loss_concept"):
        assert losses["bf16"][name] != losses["float32"][name]  # it does act
        assert losses["bf16"][name] == pytest.approx(losses["float32"][name], rel=0.02)
        assert np.isfinite(losses["everything"][name])


# ---- bad input ------------------------------------------------------------------------------


def test_a_model_that_cannot_is_refused(tmp_path):
    class Whole(runner_case.TinyModel):
        encode_pairs = None

    with pytest.raises(ConfigError, match="grad_cache_chunk is 2, but Whole has no encode_pairs.*accum_grad_iters"):
        runner_case.make_runner(tmp_path, model=Whole(), grad_cache_chunk=2).train()


def test_batches_that_cannot_be_cut_are_refused():
    stepped = GradCache(case.Toy(), 2)
    with pytest.raises(DataError, match=r"one row a pair.*'x': 4.*'more': 3"):
        stepped({**case.toy_pairs(4), "more": [1, 2, 3]})
    with pytest.raises(DataError, match="one row a pair"):
        stepped({"epoch": 1})
