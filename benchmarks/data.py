"""Reading training images from a folder and from its shards: images a second, bytes opened, memory.

    python benchmarks/data.py                  # 4,000 generated JPEGs of 320 x 240
    python benchmarks/data.py --images 500     # seconds

Each form reads and decodes every image once, in the same shuffled order (the stream in its own), with the same number
of workers (0 and 2). "raw" leaves the decoding out. Files lie in the page cache: a disk or a network drive adds the
cost of one file an image to the folder's side, which is what shards are for. One run a form after a warm-up; ratios
to the folder of the same run.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from neucore_plugin.datasets import shards
from neucore_plugin.datasets.triplets import Gallery, Triplet
from neucore_plugin.images import load_image


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


def generate(folder: Path, count: int) -> dict[str, Path]:
    """Photographs stand-ins: smooth noise, which JPEG compresses about as a photograph."""
    draw = torch.Generator().manual_seed(0)
    folder.mkdir()
    paths = {}
    for number in range(count):
        small = torch.randint(0, 256, (30, 40, 3), generator=draw, dtype=torch.uint8).numpy()
        path = folder / f"{number:06d}.jpg"
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
        paths[path.stem] = path
    return paths


def measure(dataset, workers: int) -> float:
    """Images a second."""
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    begun, count = time.perf_counter(), 0
    for _ in loader:
        count += 1
    return count / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = generate(root / "images", arguments.images)
        names = list(paths)
        split = ([Triplet("1", names[0], "x", (names[1],))], Gallery(tuple(paths), tuple(paths.values())))
        begun = time.perf_counter()
        shards.write_shards(root / "shards", "benchmark", paths, {"train": split}, max_bytes=32 << 20, progress=False)
        seconds = time.perf_counter() - begun
        total = sum(path.stat().st_size for path in paths.values())
        files = len(list((root / "shards").glob("*.tar")))
        print(f"{len(paths):,} images, {total / 1e6:.0f} MB, written as {files} shards in {seconds:.1f} s")
        begun = time.perf_counter()
        images, _ = shards.read_shards(root / "shards")
        print(f"opening the shards: {time.perf_counter() - begun:.2f} s; files to open: {len(paths):,} against {files}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()
        print(f"{'images a second':<34}{'folder':>10}{'shards':>10}{'ratio':>8}{'stream':>10}{'ratio':>8}")
        for decode in (False, True):
            by_path = Images([paths[names[place]] for place in order], decode)
            by_place = Images([images[names[place]] for place in order], decode)
            for workers in (0, 2):
                measure(by_path, workers)  # warms the page cache and the workers' imports
                folder, shard = measure(by_path, workers), measure(by_place, workers)
                stream = shards.stream(root / "shards")
                if decode:
                    stream.append(webdataset.map(lambda sample: load_image(sample["bytes"]).size[0]))
                streamed = measure(stream, workers)
                title = f"{'decoded' if decode else 'raw bytes'}, {workers} workers"
                row = (
                    f"{folder:>10,.0f}{shard:>10,.0f}{shard / folder:>8.2f}{streamed:>10,.0f}{streamed / folder:>8.2f}"
                )
                print(f"{title:<34}{row}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak of the main process {peak:,.0f} MB")


if __name__ == "__main__":
    main()
