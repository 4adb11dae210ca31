"""A training step from cached features: NEUCORE's default head against ARTEMIS and the released form.

    python benchmarks/step.py                     # batch 64, 16 tokens of 1280, width 256; a minute
    python benchmarks/step.py --batch 32 --rounds 3

Forward, backward and a step of AdamW, on random features of the default encoders' shapes; the released form with its
own settings (encoder of depth 4, mixture of modules), the same width, batch and tokens. The forms take turns in one
process; the fastest of several rounds counts, by processor time. "share" is the arithmetic of the step's matrix
products over its time, as a share of the rate that one large product reaches here in the same run.
"""

import argparse
import time
from typing import Any

import torch
from machine import Row, peak, product_rate, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neucore_plugin

neucore_plugin.register()

from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.config.loading import model_defaults  # noqa: E402
from neucore_plugin.models.backbones import Backbone  # noqa: E402
from neucore_plugin.models.base import CirModel  # noqa: E402
from neucore_plugin.models.baseline import CirBaseline  # noqa: E402
from neucore_plugin.models.neucore import NeucoreModel  # noqa: E402

WIDTH, TOKENS, IMAGE_WIDTH, LENGTH = 256, 16, 1280, 12
CONCEPTS = [f"concept{number}" for number in range(300)]
# {form: its `model` section, width of the words, width of a word's embedding}
FORMS: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"arch": "neucore"}, 384, 384),
    "artemis": ({"arch": "cir_baseline", "method": "artemis"}, 384, 384),
    "released": ({"arch": "neucore", "model_type": "official_cirr"}, WIDTH, 300),
}


class Image(nn.Module):
    """What a head asks of an image encoder whose features are cached."""

    width = pooled_width = IMAGE_WIDTH
    num_tokens, grid, image_size, fingerprint = TOKENS, (4, 4), 224, "image"


class Text(nn.Module):
    """The same of a text encoder."""

    fingerprint = "text"

    def __init__(self, width: int, word_width: int) -> None:
        super().__init__()
        self.width, self.word_width = width, word_width
        self.register_buffer("table", torch.randn(len(CONCEPTS), word_width))

    def embed_words(self, words: Any) -> Tensor:
        return self.table[[CONCEPTS.index(word) for word in words]]


def build(form: str) -> CirModel:
    torch.manual_seed(0)
    section, width, word_width = FORMS[form]
    kind = CirBaseline if section["arch"] == "cir_baseline" else NeucoreModel
    backbone = Backbone(Image(), Text(width, word_width))
    section = {**model_defaults(section), "embed_dim": WIDTH}
    return kind.from_section(backbone, ConceptVocabulary(CONCEPTS), section).train()


def pairs(batch: int, width: int) -> dict[str, Any]:
    """A batch as the data set gives it from caches."""
    draw = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    concepts = torch.randint(len(CONCEPTS), (batch, 3), generator=draw).tolist()
    return {
        **{f"{side}_tokens": numbers(batch, TOKENS, IMAGE_WIDTH) for side in ("reference", "target")},
        **{f"{side}_pooled": numbers(batch, IMAGE_WIDTH) for side in ("reference", "target")},
        "words": numbers(batch, LENGTH, width),
        "word_mask": torch.ones(batch, LENGTH, dtype=torch.bool),
        "sentence": numbers(batch, width),
        "text_input": ["the same but red"] * batch,
        "concept_words": [tuple(CONCEPTS[n] for n in dict.fromkeys(row)) for row in concepts],
        "reference_key": torch.arange(batch, 2 * batch),
        "target_key": torch.arange(batch),
        "right_keys": [(number,) for number in range(batch)],
        "noise": torch.randint(2**62, (batch,), generator=draw),
    }


def measure(batch: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Processor seconds of a step of each form, the least of `rounds`; operations of its matrix products."""
    steps, operations = {}, {}
    for form, (_, width, _) in FORMS.items():
        model, samples = build(form), pairs(batch, width)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(model: CirModel = model, samples: Any = samples, optimiser: Any = optimiser) -> None:
            optimiser.zero_grad(set_to_none=True)
            model(samples)["loss"].backward()
            optimiser.step()

        with FlopCounterMode(display=False) as counter:
            step()
        steps[form], operations[form] = step, float(counter.get_total_flops())
    best = dict.fromkeys(FORMS, float("inf"))
    for _ in range(rounds):
        for form, step in steps.items():
            begun = time.process_time()
            step()
            best[form] = min(best[form], time.process_time() - begun)
    return best, operations


def rows(quick: bool, batch: int = 64) -> list[Row]:
    """Of the table of all benchmarks."""
    best, operations = measure(batch, 5 if quick else 20)
    share = operations["default"] / best["default"] / product_rate()[1]
    what = f"training step, default head, batch {batch}"
    return [
        Row(what, best["default"], other, best[form], peak(), share, "products")
        for form, other in (("artemis", "ARTEMIS"), ("released", "released form"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    best, operations = measure(given.batch, given.rounds)
    _, rate = product_rate()
    print(f"batch {given.batch}, {given.threads} threads, matrix products {rate / 1e9:.0f} GFLOP/s")
    lines = [["form", "ms", "to artemis", "GFLOP", "share"]]
    for form, seconds in best.items():
        lines.append(
            [form, f"{seconds * 1e3:.1f}", f"{seconds / best['artemis']:.2f}", f"{operations[form] / 1e9:.2f}",
             f"{operations[form] / seconds / rate:.0%}"]
        )  # fmt: skip
    print(table(lines))


if __name__ == "__main__":
    main()
