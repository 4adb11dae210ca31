"""One step of a contrastive model, in one process and in a group: what the tests of large batches compare."""

import copy
from functools import lru_cache

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from neucore_plugin.common import distributed
from neucore_plugin.models.base import with_others
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.training.grad_cache import GradCache, chunks, rows

WIDTH = 6


class Toy(nn.Module):
    """Queries against the targets of all processes; `rare` is used by some rows alone, `idle` by none."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.query, self.target, self.idle = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(2, 2)
        self.rare = nn.Parameter(torch.randn(5))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.to(dtype)

    def encode_pairs(self, samples: dict) -> dict:
        query = self.dropout(self.norm(self.query(samples["x"])).tanh())
        flags = torch.tensor(samples["flag"])
        if flags.any():
            query = query + flags[:, None] * self.rare
        return {"query": query, "target": self.target(samples["y"]), "loss_size": query.square().sum(1)}

    def losses(self, encoded: dict, samples: dict) -> dict:
        gallery = with_others({"target": encoded["target"]})["target"]
        logits = encoded["query"] @ gallery.T * self.temperature.exp()
        matching = F.cross_entropy(logits, torch.arange(len(logits)))
        size = encoded["loss_size"].mean()
        return {"loss": matching + 0.1 * size, "loss_matching": matching, "loss_size": size}

    def forward(self, samples: dict) -> dict:
        return self.losses(self.encode_pairs(samples), samples)


def toy_pairs(count: int, dtype: torch.dtype = torch.float64) -> dict:
    """Only the first pair has the flag: with several processes the others have `rare` idle."""
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, count, WIDTH, generator=generator).to(dtype)
    return {"x": x, "y": y, "flag": [number == 0 for number in range(count)], "epoch": 3}


TEXTS = ("make it blue", "the same but longer, in red", "square", "", "a zeppelin", "blue and red", "long", "it")


@lru_cache
def _neucore(kind: str, train_text: bool, **matching: bool) -> NeucoreModel:
    text = {"name": "minilm_l6", **({"freeze": False, "train_blocks": 1} if train_text else {})}
    still = {"image": 0.0, "text": 0.0}
    model = tiny.build(kind, backbone={**tiny.BACKBONE, "text": text}, matching=matching, query_dropout=still)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def neucore(
    dtype: torch.dtype = torch.float64, train_text: bool = False, kind: str = "neucore", **matching: bool
) -> NeucoreModel:
    """On the embedded encoders, without anything random in it; `matching`: settings of its loss."""
    return copy.deepcopy(_neucore(kind, train_text, **matching)).to(dtype)


def neucore_pairs(count: int, dtype: torch.dtype = torch.float64) -> dict:
    """Image features as from a cache. Targets come twice, answers are several, references are others' targets."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2, count, 4, 1280, generator=generator).to(dtype)
    keys = torch.arange(count)
    known = [[word for word in tiny.WORDS if word in text] for text in TEXTS]
    return {
        "reference_tokens": tokens[0],
        "target_tokens": tokens[1],
        "reference_pooled": tokens[0].mean(1),
        "target_pooled": tokens[1].mean(1),
        "text_input": [TEXTS[number % len(TEXTS)] for number in range(count)],
        "concept_words": [tuple(known[number % len(TEXTS)]) for number in range(count)],
        "reference_key": (keys + 3) % count,
        "target_key": keys // 2,
        "right_keys": [(number // 2, (number // 2 + 1) % count) for number in range(count)],
    }


class Images:
    """A cached training gallery: the images of the pairs, and more."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        self.keys, self.cached = torch.arange(14), True
        self._tokens = torch.randn(14, 4, 1280, generator=generator, dtype=torch.float64)

    def features(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        return self._tokens[rows] if name == "tokens" else self._tokens[rows].mean(1)


@lru_cache
def _beyond(kind: str, negatives: str | int) -> torch.nn.Module:
    lost = {"image": 0.3, "text": 0.3, "mode": "extra", "weight": 0.2}
    model = tiny.build(kind, matching={"negatives": negatives}, query_dropout=lost, feature_dropout=0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double()


def beyond(kind: str, negatives: str | int = "gallery") -> torch.nn.Module:
    """A model with negatives beyond the batch, queries without a part and dropout of features."""
    model = copy.deepcopy(_beyond(kind, negatives))
    model.use_gallery(Images(), 4)
    return model


def beyond_pairs(count: int, dtype: torch.dtype = torch.float64) -> dict:
    found = neucore_pairs(count, dtype)
    answers = [(*right, 12) for right in found["right_keys"]]
    noise = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(8))
    place = {"epoch": 1, "num_iters_per_epoch": 9, "iters": 4}
    return {**found, **place, "noise": noise, "text_keys": answers, "reference_keys": answers}


MODELS = {"toy": (Toy, toy_pairs), "neucore": (neucore, neucore_pairs), "beyond": (beyond, beyond_pairs)}


def part_of(samples: dict, rank: int, world: int) -> dict:
    """Every world-th row, as the loader deals them out."""
    return {
        key: value[rank::world] if isinstance(value, list | torch.Tensor) else value for key, value in samples.items()
    }


def step(kind: str, settings: dict, count: int, chunk: int | None = None, accumulate: int = 1) -> dict:
    """Losses and gradients of this process's part of `count` pairs, in `accumulate` batches; as the runner does it."""
    build, make = MODELS[kind]
    model = build(**settings).train()
    stepped = distributed.wrap_model(GradCache(model, chunk) if chunk else model, torch.device("cpu"))
    own = part_of(make(count, settings.get("dtype", torch.float64)), distributed.rank(), distributed.world_size())
    torch.manual_seed(9)
    losses: dict[str, float] = {}
    for samples in chunks(own, rows(own), rows(own) // accumulate):
        out = stepped(samples)
        (out["loss"] / accumulate).backward()
        for name, value in out.items():
            losses[name] = losses.get(name, 0.0) + value.item() / accumulate
    grads = {name: None if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()}
    return {"losses": losses, "grads": grads, "buffers": {name: b.numpy() for name, b in model.named_buffers()}}


def steps(calls: list[tuple]) -> list[dict]:
    """`step` of each call's arguments, in one process: to start a group takes longer than a step."""
    return [step(*call) for call in calls]


def assert_same_step(found: dict, expected: dict, tolerance: float) -> None:
    """Losses and every gradient, against its largest entry; a parameter without gradient has none in both."""
    # Some gradients are nothing but rounding, such as those of an attention's key bias.
    least = 0.01 * max(np.abs(wanted).max() for wanted in expected["grads"].values() if wanted is not None)
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=tolerance)
    for name, wanted in expected["grads"].items():
        given = found["grads"][name]
        assert (given is None) == (wanted is None), name
        if wanted is not None:
            scale = max(np.abs(wanted).max(), least)
            np.testing.assert_allclose(given / scale, wanted / scale, rtol=0, atol=tolerance, err_msg=name)


def assert_group_equals_one(parts: list[dict], one: dict, tolerance: float = 1e-9) -> None:
    """`parts`: the same step in each process of a group, `one`: in one process that has the whole batch."""
    losses = {name: sum(part["losses"][name] for part in parts) / len(parts) for name in one["losses"]}
    for part in parts:
        assert_same_step({**part, "losses": losses}, one, tolerance)
        for name, value in parts[0]["grads"].items():  # the same bits everywhere, or the weights would drift apart
            assert value is None or np.array_equal(part["grads"][name], value), name
