"""Reading images from a folder, from its shards by place, and as a stream: images a second, files opened, memory.

    python benchmarks/data.py                  # 4,000 generated JPEGs of 320 x 240; about two minutes
    python benchmarks/data.py --images 500     # seconds

All forms read every image once: folder and shards in the same shuffled order, the stream in its own. "raw" leaves the
decoding out. The forms take turns in one process, with as many workers as the row says; of several rounds the fastest
counts. On a busy machine wall times say little; the ratios of processor times, workers included, are the steadier
figure. The files lie in the page cache, so nothing here shows what a disk or a network drive asks for each file that
is opened; the number of files does.

Files opened and memory are taken without workers, in a process of its own for each form: files below the data's folder
that the process opened, and how far its peak resident size grew from just before the data set was opened.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from neucore_plugin.common.images import load_image
from neucore_plugin.datasets.shards import reader, writer
from neucore_plugin.datasets.triplets import Gallery, Triplet

FORMS = ("folder", "shards", "stream")
SIZE = (320, 240)
BATCH = 32


class Images(Dataset):
    """Images by place in a list of sources: paths, or images of shards."""

    def __init__(self, sources: list, decode: bool) -> None:
        self.sources, self.decode = sources, decode

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: int) -> int:
        source = self.sources[place]
        if self.decode:
            return load_image(source).size[0]
        return len(source.read_bytes() if isinstance(source, Path) else source.read())


def _width(sample: dict) -> int:
    return load_image(sample["bytes"]).size[0]


def _length(sample: dict) -> int:
    return len(sample["bytes"])


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


def open_form(form: str, root: Path, decode: bool) -> Iterable:
    """The data set of a form, as training (folder, shards) or encoding a gallery (stream) opens it."""
    if form == "stream":
        return reader.stream(root / "shards").compose(webdataset.map(_width if decode else _length))
    if form == "shards":
        sources = list(reader.read_shards(root / "shards")[0].values())
    else:
        sources = sorted((root / "images").iterdir())
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(1)).tolist()
    return Images([sources[place] for place in order], decode)


def seconds(dataset: Iterable, workers: int, count: int) -> tuple[float, float]:
    """Wall time and processor time, workers included, of reading everything once."""
    wall, cpu = time.perf_counter(), _processor()
    found = sum(len(batch) for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers))
    assert found == count, f"{found} images instead of {count}"
    return time.perf_counter() - wall, _processor() - cpu


def _processor() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
    dataset = open_form(form, root, decode=True)
    ready = time.perf_counter() - begun
    for _ in DataLoader(dataset, batch_size=BATCH):
        pass
    return {"files": len(opened), "times": times, "memory": _peak() - before, "ready": ready}


def cost_in_its_own_process(form: str, root: Path) -> dict[str, float] | None:
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "--cost", form, str(root)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout)


def report(root: Path, count: int, rounds: int) -> None:
    print(f"\n{'images a second, ratios to the folder':<40}" + "".join(f"{form:>10}" for form in FORMS), flush=True)
    for decode in (False, True):
        datasets = {form: open_form(form, root, decode) for form in FORMS}
        for workers in (0, 2):
            best = dict.fromkeys(FORMS, (float("inf"), float("inf")))
            for turn in range(rounds + 1):
                for form, dataset in datasets.items():
                    found = seconds(dataset, workers, count)
                    if turn:  # the first round warms the page cache
                        best[form] = tuple(map(min, best[form], found))
            title = f"{'decoded' if decode else 'raw bytes'}, {workers} workers"
            print(f"{title:<40}" + "".join(f"{count / best[form][0]:>10,.0f}" for form in FORMS))
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
        names = list(paths)
        split = ([Triplet("1", names[0], "x", (names[1],))], Gallery(tuple(paths), tuple(paths.values())))
        begun = time.perf_counter()
        writer.write_shards(root / "shards", "benchmark", paths, {"train": split}, max_bytes=32 << 20, progress=False)
        written = time.perf_counter() - begun
        total = sum(path.stat().st_size for path in paths.values())
        size = sum(path.stat().st_size for path in (root / "shards").iterdir())
        tars = len(list((root / "shards").glob("*.tar")))
        print(f"{len(paths):,} images, {total / 1e6:.1f} MB")
        print(f"as {tars} shards with their index {size / 1e6:.1f} MB, written in {written:.1f} s")
        print(f"\n{'without workers, decoded':<40}" + "".join(f"{form:>10}" for form in FORMS))
        costs = {form: cost_in_its_own_process(form, root) for form in FORMS}
        for key, title, form_of in (
            ("files", "files opened", lambda value: f"{value:,}"),
            ("times", "times a file was opened", lambda value: f"{value:,}"),
            ("memory", "growth of the peak memory, MB", lambda value: f"{value / 1e6:.1f}"),
            ("ready", "seconds until ready", lambda value: f"{value:.2f}"),
        ):
            row = "".join(f"{'unknown' if costs[f] is None else form_of(costs[f][key]):>10}" for f in FORMS)
            print(f"{title:<40}{row}", flush=True)
        report(root, len(paths), arguments.rounds)


if __name__ == "__main__":
    main()
