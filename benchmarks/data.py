"""Training pairs from a folder, shards by place, a stream, and cached features: pairs a second, files opened, memory.

    python benchmarks/data.py                  # 4,000 generated JPEGs of 320 x 240; some minutes
    python benchmarks/data.py --images 500     # seconds

An epoch of batches of 32 pairs by the loaders of a training: each image is a reference and a target once. Folder,
shards and stream decode both pictures and make them 224 x 224; cached features (49 tokens of 320 numbers an image) are
read from disk. The forms take turns in one process, with as many workers as the row says; of
several rounds the fastest counts. On a busy machine wall times say little; the ratios of processor times, workers
included, are the steadier figure. The files lie in the page cache, so nothing here shows what a disk or a network drive
asks for each file that is opened; the number of files does.

Files opened and memory are taken without workers, in a process of its own for each form: files below the data's folder
that the process opened, and how far its peak resident size grew from just before the data set was opened.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import Row, own_process
from PIL import Image

from neucore_plugin.common.images import load_image
from neucore_plugin.datasets.feature_cache import build_cache
from neucore_plugin.datasets.shards import reader, stream, writer
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.processors import ImageProcessor
from neucore_plugin.training.loaders import BatchLoader, StreamLoader

FORMS = ("folder", "shards", "stream", "cached")
SIZE = (320, 240)
TOKENS = (49, 320)
BATCH = 32


def generate(folder: Path, count: int) -> dict[str, Path]:
    """Stand-ins for photographs: smooth noise, which JPEG compresses about as a photograph."""
    draw = torch.Generator().manual_seed(0)
    folder.mkdir()
    paths = {}
    for number in range(count):
        small = torch.randint(0, 256, (30, 40, 3), generator=draw, dtype=torch.uint8).numpy()
        path = folder / f"{number:06d}.jpg"
        Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        paths[path.stem] = path
    return paths


def pairs(paths: dict[str, Path]) -> tuple[list[Triplet], Gallery]:
    """Each image once as reference, with the next one as target."""
    names = list(paths)
    targets = [*names[1:], names[0]]
    triplets = [Triplet(str(n), a, "x", (b,)) for n, (a, b) in enumerate(zip(names, targets, strict=True))]
    return triplets, Gallery(tuple(paths), tuple(paths.values()))


def write_forms(root: Path, paths: dict[str, Path], max_bytes: int) -> None:
    """Shards by place, shards of whole samples, and features of as many numbers as an encoder gives."""
    splits = {"train": pairs(paths)}
    writer.write_shards(root / "shards", "benchmark", paths, splits, max_bytes=max_bytes, progress=False)
    writer.write_stream(root / "samples", "benchmark", paths, splits, max_bytes=max_bytes, progress=False)
    _cache(root, list(paths))


def _cache(root: Path, names: list[str]):
    draw = np.random.default_rng(0)

    def encode(part: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from ((draw.standard_normal(TOKENS, np.float32), draw.standard_normal(1280, np.float32)) for _ in part)

    return build_cache(root / "features", "images", "benchmark", names, names, encode, batch_size=64)


def open_form(form: str, root: Path, workers: int = 0) -> BatchLoader | StreamLoader:
    """The loader of a form, as training opens it."""
    processor = ImageProcessor(image_size=224)
    options = {"seed": 1, "num_workers": workers}
    if form == "stream":
        triplets, files = stream.open_stream(str(root / "samples")).train["train"]
        store = ImageStore(dict.fromkeys(t.reference for t in triplets), processor)
        numbers = {t.query_id: number for number, t in enumerate(triplets)}
        settings = {"written": triplets, "numbers": numbers, "shards": files, "buffer": 256}
        place = ("benchmark", "train", triplets, Gallery((), ()), store)
        return StreamLoader(stream.TripletStream(*place, train=True, **settings), BATCH, **options)
    if form == "shards":
        images, splits, _ = reader.read_shards(root / "shards")
        triplets, gallery = splits["train"]
    else:
        images = {path.stem: path for path in sorted((root / "images").iterdir())}
        triplets, gallery = pairs(images)
    store = ImageStore(images, processor)
    if form == "cached":
        store.cache = _cache(root, list(images))
    dataset = TripletDataset("benchmark", "train", triplets, gallery, store, train=True)
    return BatchLoader(dataset, BATCH, shuffle=True, **options)


class Plain(torch.utils.data.Dataset):
    """What one would write without this package: both pictures of a pair opened by Pillow, 224 x 224, normalised."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted((root / "images").iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        places = (self.paths[number], self.paths[(number + 1) % len(self.paths)])
        pictures = [Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for path in places]
        arrays = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in pictures]
        reference, target = ((array - 0.45) / 0.22 for array in arrays)
        return {"index": number, "reference_image": reference, "target_image": target, "text_input": "x"}


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks: an epoch without workers."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        paths = generate(root / "images", 300 if quick else 2000)
        write_forms(root, paths, 32 << 20)
        loaders = {form: open_form(form, root) for form in FORMS}
        plain = torch.utils.data.DataLoader(Plain(root), BATCH, shuffle=True)
        spent = dict.fromkeys((*FORMS, "plain"), float("inf"))
        for turn in range(3):
            for form, loader in loaders.items():
                spent[form] = min(spent[form], seconds(loader, turn)[1])
            begun = _processor()
            for _ in plain:
                pass
            spent["plain"] = min(spent["plain"], _processor() - begun)
        memory = {form: cost_in_its_own_process(form, root) for form in FORMS}
        for form in FORMS:
            grown = 0 if memory[form] is None else int(memory[form]["memory"])
            what = f"an epoch of {len(paths)} pairs, {form} (memory beyond start)"
            made.append(Row(what, spent[form], "plain PIL data set", spent["plain"], grown))
    return made


def seconds(loader: BatchLoader | StreamLoader, epoch: int) -> tuple[float, float, int]:
    """Wall time and processor time, workers included, of an epoch; its pairs."""
    wall, cpu = time.perf_counter(), _processor()
    loader.set_position(epoch)
    found = sum(len(batch["index"]) for batch in loader)
    return time.perf_counter() - wall, _processor() - cpu, found


def _processor() -> float:
    """Of this process and its children, which may still live, so that the system does not count them to it yet."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _peak() -> int:
    """The largest resident size of this process so far, in bytes; a child does not inherit its parent's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def cost(form: str, root: Path) -> dict[str, float]:
    """Files opened, peak memory and seconds to open the data set, in this process."""
    load_image(next((root / "images").iterdir()))  # Pillow's own set-up
    opened: set[str] = set()
    times = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal times
        if event == "open" and str(arguments[0]).startswith(str(root)):
            times += 1
            opened.add(str(arguments[0]))

    before = _peak()
    sys.addaudithook(hook)
    begun = time.perf_counter()
    loader = open_form(form, root)
    ready = time.perf_counter() - begun
    for _ in loader:
        pass
    return {"files": len(opened), "times": times, "memory": _peak() - before, "ready": ready}


def cost_in_its_own_process(form: str, root: Path) -> dict[str, float] | None:
    if not Path("/proc/self/status").exists():
        return None
    return json.loads(own_process(__file__, "--cost", form, str(root)))


def report(root: Path, rounds: int) -> None:
    print(f"\n{'pairs a second, ratios to the folder':<40}" + "".join(f"{form:>10}" for form in FORMS), flush=True)
    for workers in (0, 2):
        loaders = {form: open_form(form, root, workers) for form in FORMS}
        best = dict.fromkeys(FORMS, (float("inf"), float("inf")))  # seconds of a pair
        for turn in range(rounds + 1):
            for form, loader in loaders.items():
                wall, cpu, found = seconds(loader, turn)
                if turn:  # the first round warms the page cache, and starts the workers
                    best[form] = tuple(map(min, best[form], (wall / found, cpu / found)))
        print(f"{f'{workers} workers':<40}" + "".join(f"{1 / best[form][0]:>10,.0f}" for form in FORMS))
        for place, name in enumerate(("wall", "processor")):
            ratios = "".join(f"{best['folder'][place] / best[form][place]:>10.2f}" for form in FORMS)
            print(f"{f'  folder / form, {name} time':<40}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured after the first (default 3)")
    parser.add_argument("--cost", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost:
        form, root = arguments.cost
        print(json.dumps(cost(form, Path(root))))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        paths = generate(root / "images", arguments.images)
        begun = time.perf_counter()
        write_forms(root, paths, 32 << 20)
        written = time.perf_counter() - begun
        print(f"{len(paths):,} images, {sum(path.stat().st_size for path in paths.values()) / 1e6:.1f} MB")
        for kind in ("shards", "samples", "features"):
            files = [path for path in (root / kind).rglob("*") if path.is_file()]
            print(f"{kind}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        print(f"written in {written:.1f} s")
        print(f"\n{'an epoch without workers':<40}" + "".join(f"{form:>10}" for form in FORMS))
        costs = {form: cost_in_its_own_process(form, root) for form in FORMS}
        for key, title, form_of in (
            ("files", "files opened", lambda value: f"{value:,}"),
            ("times", "times a file was opened", lambda value: f"{value:,}"),
            ("memory", "growth of the peak memory, MB", lambda value: f"{value / 1e6:.1f}"),
            ("ready", "seconds until ready", lambda value: f"{value:.2f}"),
        ):
            row = "".join(f"{'unknown' if costs[f] is None else form_of(costs[f][key]):>10}" for f in FORMS)
            print(f"{title:<40}{row}", flush=True)
        report(root, arguments.rounds)


if __name__ == "__main__":
    main()
