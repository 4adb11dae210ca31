"""Gradient caching against the plain step: time ratio, memory ratio, largest relative difference of the gradients.

    python benchmarks/grad_cache.py                       # a batch of 64 pairs, in chunks of 8: about a minute
    python benchmarks/grad_cache.py --batch 128 --chunk 16 --depth 12

NEUCORE's head over a vision transformer (BLIP's shape, smaller: patches of 16 pixels, 96 pixels a side) and a text
transformer of the same width, both of random weights and trained, on random pixels and words, in float32, without
dropout. Each form runs in processes of its own; of several steps the fastest counts. Memory is the peak of the resident
size above that of a step of two pairs (weights, gradients and inputs are in both), of one step in a process whose
allocator returns freed blocks to the system at once. On a busy machine wall times say little: the ratio of processor
times is steadier.

The gradients' difference is given against their largest entry, and as a norm over all weights against theirs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence

import torch
from machine import Row, own_process, peak
from torch import Tensor, nn

import neucore_plugin

neucore_plugin.register()

from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.config.loading import model_defaults  # noqa: E402
from neucore_plugin.models.backbones import Backbone  # noqa: E402
from neucore_plugin.models.backbones.tuning import Tuning  # noqa: E402
from neucore_plugin.models.neucore import NeucoreModel  # noqa: E402
from neucore_plugin.training.grad_cache import GradCache  # noqa: E402

SIDE, PATCH, WIDTH, HEADS, LENGTH, WORDS = 96, 16, 192, 3, 12, 500
STEPS = 5


def transformer(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class Vision(nn.Module):
    """pixels [B,3,96,96] -> class token and 36 patch tokens."""

    width, image_size, mean, std = WIDTH, SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    grid, num_tokens = (SIDE // PATCH, SIDE // PATCH), 1 + (SIDE // PATCH) ** 2
    fingerprint = "vision"

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches, self.layers = nn.Conv2d(3, WIDTH, PATCH, PATCH), transformer(depth)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.places = nn.Parameter(torch.randn(1, self.num_tokens, WIDTH) * 0.02)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = self.layers(torch.cat([self.first.expand(len(tokens), -1, -1), tokens], dim=1) + self.places)
        return {"tokens": tokens, "pooled": tokens[:, 0]}


class Text(nn.Module):
    """Texts of twelve numbers each -> words and their mean."""

    width = word_width = WIDTH
    fingerprint = "text"

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(WORDS, WIDTH), transformer(depth)

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        words = self.layers(self.table(torch.tensor([[int(word) for word in text.split()] for text in texts])))
        return {"words": words, "mask": torch.ones(words.shape[:2], dtype=torch.bool), "sentence": words.mean(1)}

    def embed_words(self, words: Sequence[str]) -> Tensor:
        return self.table.weight.detach()[[int(word) for word in words]]


def model(depth: int) -> NeucoreModel:
    torch.manual_seed(0)
    trained = Tuning(freeze=False)
    section = {"arch": "neucore", "model_type": "embedded_paper", "embed_dim": WIDTH}
    section |= {"query_dropout": {"image": 0.0, "text": 0.0}}
    section |= {"concept_alignment": {"depth": 2, "heads": HEADS}, "fusion": {"steps": 2, "heads": HEADS}}
    return NeucoreModel.from_section(
        Backbone(Vision(depth), Text(depth), trained, trained),
        ConceptVocabulary([str(number) for number in range(100)]),
        model_defaults(section),
    ).train()


def pairs(count: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, WORDS, (count, LENGTH), generator=generator).tolist()
    pixels = torch.randn(2, count, 3, SIDE, SIDE, generator=generator)
    return {
        "reference_image": pixels[0],
        "target_image": pixels[1],
        "text_input": [" ".join(map(str, row)) for row in numbers],
        "concept_words": [tuple(str(number) for number in row[:4] if number < 100) for row in numbers],
        "reference_key": torch.arange(count, 2 * count),
        "target_key": torch.arange(count),
        "right_keys": [(number,) for number in range(count)],
    }


def measure(batch: int, chunk: int | None, depth: int, path: str, steps: int) -> dict[str, float]:
    """Seconds of the fastest step and bytes beyond what was there before; the gradients go to `path`."""
    bare, samples = model(depth), pairs(batch)
    stepped = GradCache(bare, chunk) if chunk else bare
    stepped(pairs(2))["loss"].backward()  # threads and libraries set up
    bare.zero_grad(set_to_none=True)
    before, best = peak(), (float("inf"), float("inf"))
    for _ in range(steps):
        bare.zero_grad(set_to_none=True)
        wall, cpu = time.perf_counter(), time.process_time()
        stepped(samples)["loss"].backward()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    torch.save({name: p.grad for name, p in bare.named_parameters() if p.grad is not None}, path)
    return {"wall": best[0], "cpu": best[1], "bytes": peak() - before}


def in_its_own_process(batch: int, chunk: int | None, depth: int, path: str, threads: int) -> dict[str, float]:
    def run(steps: int, **settings: str) -> dict[str, float]:
        how = json.dumps([batch, chunk, depth, path, steps])
        return json.loads(own_process(__file__, "--measure", how, threads=threads, **settings))

    return {**run(STEPS), "bytes": run(1, MALLOC_MMAP_THRESHOLD_="65536")["bytes"]}


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks."""
    batch, chunk, depth = (32, 8, 2) if quick else (64, 8, 6)
    with tempfile.TemporaryDirectory() as folder:
        path, threads = os.path.join(folder, "gradients"), torch.get_num_threads()
        cached, plain = (in_its_own_process(batch, size, depth, path, threads) for size in (chunk, None))
    what = f"step of {batch} pairs in chunks of {chunk} (memory beyond two pairs)"
    other = f"whole batch, {plain['bytes'] / 1e6:,.0f} MB"
    return [Row(what, cached["cpu"], other, plain["cpu"], int(cached["bytes"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a batch (64)")
    parser.add_argument("--chunk", type=int, default=8, help="pairs encoded at a time (8)")
    parser.add_argument("--depth", type=int, default=6, help="layers of each encoder (6)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both forms (1)")
    parser.add_argument("--measure", type=json.loads, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    count = sum(p.numel() for p in model(given.depth).parameters())
    print(f"{count / 1e6:.1f} M weights, {given.batch} pairs, {given.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, chunk in (("plain", None), ("cached", given.chunk)):
            path = os.path.join(folder, name)
            found[name] = in_its_own_process(given.batch, chunk, given.depth, path, given.threads)
            shown = "" if chunk is None else f" in chunks of {chunk}"
            print(
                f"  {name:7}{found[name]['wall']:7.2f} s wall {found[name]['cpu']:7.2f} s cpu "
                f"{found[name]['bytes'] / 1e6:8.1f} MB{shown}",
                flush=True,
            )
        plain, cached = (torch.load(os.path.join(folder, name), weights_only=True) for name in found)
    ratio = {key: found["cached"][key] / found["plain"][key] for key in found["plain"]}
    print(f"  cached / plain   wall {ratio['wall']:.2f}   cpu {ratio['cpu']:.2f}   memory {ratio['bytes']:.2f}")
    one, other = (torch.cat([grads[name].flatten().double() for name in plain]) for grads in (plain, cached))
    largest, norm = (one - other).abs().max() / one.abs().max(), (one - other).norm() / one.norm()
    print(f"  gradients, largest relative difference {largest:.1e}, of the norm {norm:.1e}")


if __name__ == "__main__":
    main()
