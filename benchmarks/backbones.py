"""What NEUCORE's head costs beside a frozen encoder, on a CPU: seconds, and its share of the encoder's forward pass.

    python benchmarks/backbones.py                 # BLIP-base and CLIP ViT-B/32, full size; some three minutes
    python benchmarks/backbones.py --types blip --batch 4

Random weights: time does not depend on them. Encoder and head take turns in one process and the fastest of several
rounds counts; processor time, since machines are shared. "image" is what a gallery image costs; "query" a reference
image with its text. `embedded` is the default model with its real weights.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from machine import Row, peak

import neucore_plugin

neucore_plugin.register()

from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.models.neucore import NeucoreModel  # noqa: E402

TEXT = "the same dress but longer, in red, with short sleeves"
CONCEPTS = ("dress", "long", "red", "short", "sleeve")
RANDOM = {"image": {"pretrained": "none"}, "text": {"pretrained": "none"}}
TYPES = {"blip": RANDOM, "clip_vitb32": RANDOM, "embedded": {}}


def fastest(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of each part, the least of `rounds` after a first one."""
    best = dict.fromkeys(parts, float("inf"))
    for turn in range(rounds + 1):
        for name, part in parts.items():
            begun = time.process_time()
            part()
            if turn:
                best[name] = min(best[name], time.process_time() - begun)
    return best


@torch.inference_mode()
def measure(model_type: str, batch: int, rounds: int) -> dict[str, float]:
    """Prints and gives processor milliseconds a picture of each part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NeucoreModel.from_config(
            {"arch": "neucore", "model_type": model_type, "backbone": TYPES[model_type]}, ConceptVocabulary(CONCEPTS)
        ).eval()
    image, text = model.backbone.image, model.backbone.text
    pixels = torch.rand(batch, 3, image.image_size, image.image_size)
    texts, concepts = [TEXT] * batch, [CONCEPTS] * batch
    seen, words = image(pixels), text(texts)
    features = {name: seen[name] for name in ("tokens", "pooled") if name in seen}
    cached = {"words": words["words"], "word_mask": words["mask"], "sentence": words["sentence"]}
    parts = {
        "image encoder": lambda: image(pixels),
        "text encoder": lambda: text(texts),
        "head, image": lambda: model.encode_image(**features),
        "head, query": lambda: model.encode_query(
            **features, texts=texts, text_features=cached, concept_words=concepts
        ),
    }
    found = {name: 1000 * seconds / batch for name, seconds in fastest(parts, rounds).items()}
    encoders = found["image encoder"] + found["text encoder"]
    head = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{model_type}: {image.num_tokens} tokens of width {image.width}, head {head / 1e6:.1f} M parameters")
    print("  CPU-ms a picture:  " + "  ".join(f"{name} {value:.1f}" for name, value in found.items()))
    print(
        f"  head / encoder:    image {found['head, image'] / found['image encoder']:.1%}   "
        f"query {found['head, query'] / encoders:.1%}",
        flush=True,
    )
    return found


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks."""
    made = []
    for model_type in ("embedded",) if quick else TYPES:
        found = {name: value / 1000 for name, value in measure(model_type, 8, 3 if quick else 5).items()}
        encoders = found["image encoder"] + found["text encoder"]
        made.append(Row(f"head for a query, {model_type}", found["head, query"], "its encoders", encoders, peak()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for model_type in arguments.types:
        measure(model_type, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
