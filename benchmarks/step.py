"""A training step from cached features: NEUCORE's default type against ARTEMIS, the released form and the paper's.

    python benchmarks/step.py                     # batch 64, 16 tokens of 1280, the default's width; a minute
    python benchmarks/step.py --batch 32 --rounds 3 --profile default

Forward, backward, clipping and a step of AdamW, on random features of the default encoders' shapes and of the main
job's sizes: as many training images, concepts, words, right answers, and captions of two clauses as rare. The default,
ARTEMIS and "paper" (type embedded_paper, `form: default`) have the recipe of projects/neucore/train_emoji.yaml
(negatives, query dropout, feature dropout); the released form has its own settings, encoder of depth 4 and mixture of
modules, which ask for less: no further negatives or rows. All have the default's width but for "paper", which has its
own (--width sets it for all). The forms take turns in one process; of several rounds the fastest counts, of wall and of
processor time. "share" is the arithmetic of the step's matrix products over its processor time, as a share of the rate
that one large product reaches here in the same run.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import Row, peak, product_rate, table
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neucore_plugin

neucore_plugin.register()

from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.config.loading import model_defaults  # noqa: E402
from neucore_plugin.models.backbones import Backbone  # noqa: E402
from neucore_plugin.models.base import CirModel  # noqa: E402
from neucore_plugin.models.baseline import CirBaseline  # noqa: E402
from neucore_plugin.models.inputs import partial_rows  # noqa: E402
from neucore_plugin.models.neucore import NeucoreModel  # noqa: E402

JOB = Path(__file__).resolve().parent.parent / "projects" / "neucore" / "train_emoji.yaml"
IMAGE_WIDTH, WORD_WIDTH, LENGTH, CLIP = 1280, 384, 11, 1.0
# {form: its `model` section, whether it has the main job's recipe}
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "default": ({"arch": "neucore"}, True),
    "artemis": ({"arch": "cir_baseline", "method": "artemis"}, True),
    "released": ({"arch": "neucore", "model_type": "official_cirr"}, False),
    "paper": ({"arch": "neucore", "model_type": "embedded_paper"}, True),
}


@dataclass(frozen=True)
class Sizes:
    """Pairs of a batch, training images, concepts of the vocabulary, tokens of an image; those of the main job."""

    batch: int = 64
    gallery: int = 1452
    concepts: int = 356
    tokens: int = 16
    width: int | None = None


@dataclass
class Measured:
    """Of one form: the least wall and processor seconds of a step, and the operations of its matrix products."""

    step: Callable[[], None]
    operations: float
    wall: float = field(default=float("inf"))
    cpu: float = field(default=float("inf"))

    def measure(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.cpu = min(self.cpu, time.process_time() - cpu)


class Image(nn.Module):
    """What a head asks of an image encoder whose features are cached."""

    width = pooled_width = IMAGE_WIDTH
    image_size, fingerprint = 224, "image"

    def __init__(self, tokens: int) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        self.num_tokens, self.grid = tokens, (side, side) if side * side == tokens else (1, tokens)


class Text(nn.Module):
    """The same of a text encoder."""

    fingerprint = "text"

    def __init__(self, width: int, word_width: int, words: Sequence[str]) -> None:
        super().__init__()
        self.width, self.word_width = width, word_width
        self.rows = {word: row for row, word in enumerate(words)}
        self.register_buffer("table", torch.randn(len(words), word_width))

    def embed_words(self, words: Any) -> Tensor:
        return self.table[[self.rows[word] for word in words]]


class Gallery:
    """The training images, whose features are cached; of their tokens a few hundred are all."""

    cached = True

    def __init__(self, sizes: Sizes) -> None:
        self.keys, self._sizes = torch.arange(sizes.gallery), sizes
        self._features: dict[str, Tensor] = {}

    def features(self, rows: Tensor, name: str) -> Tensor:
        if name not in self._features:
            shape = {"pooled": (len(self.keys),), "tokens": (min(len(self.keys), 256), self._sizes.tokens)}[name]
            self._features[name] = torch.randn(*shape, IMAGE_WIDTH)
        return self._features[name][rows % len(self._features[name])]


def concepts(sizes: Sizes) -> list[str]:
    return [f"concept{number}" for number in range(sizes.concepts)]


def build(form: str, sizes: Sizes) -> CirModel:
    """A model in training, with the main job's recipe where the form has it, and its negatives."""
    torch.manual_seed(0)
    section, with_recipe = FORMS[form]
    if with_recipe:
        recipe: Any = OmegaConf.to_container(OmegaConf.load(JOB)["model"])
        section = {**{name: value for name, value in recipe.items() if name not in ("arch", "model_type")}, **section}
    section = model_defaults(section)
    default_width = model_defaults(FORMS["default"][0])["embed_dim"]
    section["embed_dim"] = width = sizes.width or (section["embed_dim"] if form == "paper" else default_width)
    released = section.get("form") == "released"  # reads words as wide as itself, concepts by their word vectors
    text = Text(width if released else WORD_WIDTH, 300 if released else WORD_WIDTH, concepts(sizes))
    kind = CirBaseline if section["arch"] == "cir_baseline" else NeucoreModel
    model = kind.from_section(Backbone(Image(sizes.tokens), text), ConceptVocabulary(concepts(sizes)), section).train()
    model.use_gallery(Gallery(sizes), 1)
    return model


def pairs(model: CirModel, sizes: Sizes) -> dict[str, Any]:
    """A batch as the data set gives it from caches."""
    draw, batch = torch.Generator().manual_seed(1), sizes.batch

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def keys(count: int) -> list[tuple[int, ...]]:
        return [tuple(row) for row in torch.randint(sizes.gallery, (batch, count), generator=draw).tolist()]

    lengths = torch.randint(2, 8, (batch,), generator=draw)
    lengths[0] = LENGTH
    mask = torch.arange(LENGTH) < lengths[:, None]
    words = numbers(batch, LENGTH, model.backbone.text.width) * mask[..., None]
    text = {"words": words, "word_mask": mask, "sentence": numbers(batch, model.backbone.text.width)}
    if model.clauses > 1:  # one caption in 64 has two
        two = torch.arange(batch) % 64 == 0
        text["clause"] = ((torch.arange(LENGTH) > LENGTH // 2) & two[:, None]).long()
        second = numbers(batch, model.backbone.text.width) * two[:, None]
        text["sentence"] = torch.stack([text["sentence"], second], dim=1)
    target = keys(1)
    names = concepts(sizes)
    spoken = torch.randint(sizes.concepts, (batch, 2), generator=draw).tolist()
    return {
        **{f"{side}_tokens": numbers(batch, sizes.tokens, IMAGE_WIDTH) for side in ("reference", "target")},
        **{f"{side}_pooled": numbers(batch, IMAGE_WIDTH) for side in ("reference", "target")},
        **text,
        "text_input": ["the same but red"] * batch,
        "concept_words": [tuple(names[n] for n in dict.fromkeys(row)) for row in spoken],
        "reference_key": torch.tensor(keys(1)).flatten(),
        "target_key": torch.tensor(target).flatten(),
        "right_keys": target,
        "reference_keys": [own + more for own, more in zip(target, keys(18), strict=True)],
        "text_keys": [own + more for own, more in zip(target, keys(49), strict=True)],
        "noise": noise(model, batch),
    }


def noise(model: CirModel, batch: int) -> Tensor:
    """The samples' noise [B], of which as many rows follow without image or text as query dropout takes on average."""
    pool = torch.randint(2**62, (40 * batch,), generator=torch.Generator().manual_seed(2))
    lost = torch.zeros(len(pool), dtype=torch.bool)
    lost[partial_rows(model.query_dropout, pool)[0]] = True
    count = round(batch * sum(model.query_dropout.values()))
    return torch.cat([pool[lost][:count], pool[~lost][: batch - count]])


def stepper(form: str, sizes: Sizes) -> Measured:
    """A form's training step, taken once and ready to be measured."""
    model = build(form, sizes)
    samples, weights = pairs(model, sizes), [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        model(samples)["loss"].backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimiser.step()

    step()  # what is made once for a training
    with FlopCounterMode(display=False) as counter:
        step()
    return Measured(step, float(counter.get_total_flops()))


def measure(sizes: Sizes, rounds: int, forms: Sequence[str] = tuple(FORMS)) -> dict[str, Measured]:
    """Each form's step; they take turns."""
    found = {form: stepper(form, sizes) for form in forms}
    for _ in range(rounds):
        for measured in found.values():
            measured.measure()
    return found


def rows(quick: bool, batch: int = 64) -> list[Row]:
    """Of the table of all benchmarks."""
    found = measure(Sizes(batch), 5 if quick else 20)
    ours = found["default"]
    share = ours.operations / ours.cpu / product_rate()[1]
    what = f"training step, default type, batch {batch}"
    others = {"artemis": "ARTEMIS", "released": "released form", "paper": "embedded_paper"}
    return [Row(what, ours.cpu, name, found[form].cpu, peak(), share, "products") for form, name in others.items()]


def profiled(form: str, sizes: Sizes) -> str:
    """What the operators of three steps take, the dearest first."""
    step = stepper(form, sizes).step
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(3):
            step()
    averages = profile.key_averages(group_by_input_shape=True)
    return averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=None, help="of all forms, instead of their own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", choices=FORMS, help="instead: where this form's time goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = Sizes(given.batch, width=given.width)
    if given.profile:
        print(profiled(given.profile, sizes))
        return
    found = measure(sizes, given.rounds)
    _, rate = product_rate()
    print(f"batch {given.batch}, {given.threads} threads, matrix products {rate / 1e9:.0f} GFLOP/s")
    lines = [["form", "ms cpu", "ms wall", "to artemis", "to default", "GFLOP", "share"]]
    for form, own in found.items():
        times = f"{own.cpu * 1e3:.1f}", f"{own.wall * 1e3:.1f}"
        ratios = (f"{own.cpu / found[other].cpu:.2f}" for other in ("artemis", "default"))
        lines.append([form, *times, *ratios, f"{own.operations / 1e9:.2f}", f"{own.operations / own.cpu / rate:.0%}"])
    print(table(lines))


if __name__ == "__main__":
    main()
