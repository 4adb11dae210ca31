"""A training step on a GPU: NEUCORE on BLIP ViT-B/16 and CLIP ViT-B/32, encoders frozen and trained, float32 and bf16.

    python benchmarks/train_gpu.py                     # batch 64; two minutes on a data-centre GPU
    python benchmarks/train_gpu.py --types clip_vitb32 --batch 256 --out gpu.json
    python benchmarks/train_gpu.py --device cpu --batch 4 --steps 2     # tries the script itself

Random weights (time does not depend on them) and random pictures, read by the encoders in every step as in a training
without a feature cache; captions of one change each. Forward, backward, clipping and AdamW, by the project's own
`Optimisation`. "pairs/s" counts pairs of reference and target; "head" is the share of a step that is left when the
features are given, so what concept alignment, fusion, matching and their gradients take; "memory" is the most that
torch had allocated. float32 products run in full precision, as torch's own default is.

Afterwards one process joins nccl and averages the gradients of a step over its group of one, as DistributedDataParallel
does: what is left to show with one GPU. Between several GPUs nothing was measured.
"""

import argparse
import json
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import table
from torch import Tensor

import neucore_plugin

neucore_plugin.register()

from neucore_plugin.concepts import ConceptVocabulary  # noqa: E402
from neucore_plugin.config.run import RunSchema  # noqa: E402
from neucore_plugin.models.base import CirModel  # noqa: E402
from neucore_plugin.models.neucore import NeucoreModel  # noqa: E402
from neucore_plugin.training.optimisation import Optimisation  # noqa: E402

TYPES = ("clip_vitb32", "blip")
CONCEPTS = ("dress", "long", "red", "short", "sleeve")
CAPTION = "the same dress but longer, in red, with short sleeves"


def build(model_type: str, frozen: bool, device: torch.device) -> CirModel:
    torch.manual_seed(0)
    side = {"pretrained": "none", "freeze": frozen}
    section = {"arch": "neucore", "model_type": model_type, "backbone": {"image": side, "text": dict(side)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NeucoreModel.from_config(section, ConceptVocabulary(CONCEPTS)).to(device).train()


def pairs(model: CirModel, batch: int) -> dict[str, Any]:
    """A batch as the data set gives it without a feature cache, its tensors on the model's device."""
    side = model.backbone.image.image_size
    pixels = torch.randn(2, batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(model.device)
    given = {
        "reference_image": pixels[0],
        "target_image": pixels[1],
        "text_input": [CAPTION] * batch,
        "concept_words": [CONCEPTS] * batch,
        "reference_key": torch.arange(batch, 2 * batch),
        "target_key": torch.arange(batch),
        "right_keys": [(number,) for number in range(batch)],
        "noise": torch.randint(2**62, (batch,), generator=torch.Generator().manual_seed(2)),
        "iters": 0,
        "epoch": 0,
        "num_iters_per_epoch": 1,
    }
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in given.items()}


@torch.no_grad()
def read(model: CirModel, samples: dict[str, Any]) -> dict[str, Any]:
    """The samples with the encoders' features in place of pixels: what a feature cache would give."""
    given = {name: value for name, value in samples.items() if not name.endswith("_image")}
    for side in ("reference", "target"):
        features = model.backbone.image(samples[f"{side}_image"])
        given |= {f"{side}_{name}": features[name] for name in ("tokens", "pooled") if name in features}
    text = model.backbone.text(samples["text_input"])
    return given | {"words": text["words"], "word_mask": text["mask"], "sentence": text["sentence"]}


def stepper(model: CirModel, samples: dict[str, Any], optimisation: Optimisation) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with optimisation.precision.autocast():
            loss = model(samples)["loss"]
        optimisation.precision.backward(loss)
        optimisation.step()
        return loss.detach()

    return step


def milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """The median of `steps`, after three that are not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for number in range(3 + steps):
        wait()
        begun = time.perf_counter()
        step()
        wait()
        if number >= 3:
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(model_type: str, frozen: bool, amp: bool | str, batch: int, steps: int, device: torch.device) -> dict:
    """One line of the table. Raises RuntimeError where the loss is not finite."""
    model = build(model_type, frozen, device)
    run = RunSchema(max_epoch=1, amp=amp, init_lr=1e-5, clip_grad_norm=1.0)
    samples, optimisation = pairs(model, batch), Optimisation(model, run, device, steps, steps)
    whole, head = (stepper(model, given, optimisation) for given in (samples, read(model, samples)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = milliseconds(whole, steps, device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    loss = float(whole())
    if not loss < float("inf"):
        raise RuntimeError(f"{model_type}, amp {amp}: the loss is {loss}")
    return {
        "type": model_type,
        "encoders": "frozen" if frozen else "trained",
        "format": "bf16" if amp else "float32",
        "batch": batch,
        "ms": took,
        "pairs/s": 1000 * batch / took,
        "head": milliseconds(head, steps, device) / took,
        "memory": memory,
        "trained weights": sum(weights.numel() for weights in model.parameters() if weights.requires_grad),
    }


def by_nccl(batch: int, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step of CLIP ViT-B/32 trained whole in bf16: alone, and with its gradients through nccl."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1)
    try:
        found = {}
        for name in ("alone", "joined"):
            model = build("clip_vitb32", False, device)
            run = RunSchema(max_epoch=1, amp="bf16", init_lr=1e-5, clip_grad_norm=1.0)
            samples, optimisation = pairs(model, batch), Optimisation(model, run, device, steps, steps)
            run_as = model
            if name == "joined":
                devices = [device.index or 0] if device.type == "cuda" else None
                run_as = torch.nn.parallel.DistributedDataParallel(model, devices, find_unused_parameters=True)
            found[name] = milliseconds(stepper(run_as, samples, optimisation), steps, device)
        return {"backend": backend, **found}
    finally:
        torch.distributed.destroy_process_group()


def shown(lines: list[dict[str, Any]]) -> str:
    """The table, float32 against bf16 of the same in the last column."""
    titles = ["type", "encoders", "format", "batch", "ms a step", "pairs/s", "head", "memory", "to float32"]
    rows, plain = [titles], {}
    for line in lines:
        key = line["type"], line["encoders"]
        plain.setdefault(key, line["ms"])
        row = [line["type"], line["encoders"], line["format"], str(line["batch"]), f"{line['ms']:.1f}"]
        row += [f"{line['pairs/s']:,.0f}", f"{line['head']:.0%}", f"{line['memory'] / 1e9:.1f} GB"]
        rows.append([*row, f"{plain[key] / line['ms']:.1f} times"])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each line (20)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there as well")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu tries the script itself")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    lines: list[dict[str, Any]] = []
    for model_type in given.types:
        for frozen in (True, False):
            for amp in (False, "bf16"):
                lines.append(measure(model_type, frozen, amp, given.batch, given.steps, device))
                print(shown(lines[-1:]).splitlines()[1], flush=True)
    joined = by_nccl(given.batch, given.steps, device)
    print("\n" + shown(lines))
    print(
        f"\nCLIP ViT-B/32, trained, bf16: {joined['alone']:.1f} ms a step alone, {joined['joined']:.1f} with its "
        f"gradients averaged by {joined['backend']} in a group of one"
    )
    if given.out:
        known = {"device": name, "torch": torch.__version__, "lines": lines, "joined": joined}
        given.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
