"""Searching a saved index: building, opening, exact and two-stage search, against plain rivals, in one run.

    python benchmarks/search.py --images 50000                      # a minute; 1 GB of memory, 0.1 GB of disk
    python benchmarks/search.py --images 10000 200000 1000000       # two-stage alone takes an hour at 1,000,000
    python benchmarks/search.py --images 1000000 --no-two-stage
    python benchmarks/search.py --images 50000 --like INDEX         # features like those of an index of one's own

The index lies in a temporary folder (TMPDIR), which is removed; float16, D 512: 2,048 bytes of encodings an image. Its
features are made up: a mean and a covariance of few large directions, fg and bg alike, clusters of near-twins. The
numbers are those of the emoji model's gallery (TWINS is a guess); with --like, mean and covariance are taken from
an index. Queries lie near images, half noise, with attention drawn as the trained model's is spread.

  build      images a second from encodings to units on the disk: without the encoder, which costs far more
  open       GalleryIndex.open in this process, files in the page cache
  exact      GalleryIndex.scores of one query and its top 50; GB/s are the encodings' bytes over the time, "share" of
             what a sum of float32 numbers reads a second here, with as many threads
  two-stage  candidates from the first stage, scored exactly; recall of the exact top 50 among its 50
  broadcast  the formula as written, float32 held in memory, 16,384 images at a time
  faiss      IndexFlatIP, float32 held in memory, on the plain part: inner products of the first-order vectors. It does
             less: the score is not computed

Each number is the median (p50) or 99 % quantile (p99) over queries, wall time; cpu is the median of processor times,
which other work on the machine disturbs less: ratios and shares are given by both. Every size runs in a process of its
own, so that its peak of memory is its own.
"""

import argparse
import functools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import Row, bandwidth, own_process, peak, table
from torch import Tensor

from neucore_plugin.models.matching import Matching
from neucore_plugin.retrieval import GalleryIndex, units
from neucore_plugin.retrieval.nearest import FirstOrder
from neucore_plugin.retrieval.qdrant_edge import CANDIDATES, EdgeCache
from neucore_plugin.retrieval.rows import Row as Picture

WIDTH, TOP, UNIT, BLOCK = 512, 50, 1 << 16, 1 << 14
MEAN = 0.4  # of the squared length of an encoding, what the mean of all is
SPECTRUM = 1.5  # the n-th direction of the covariance has the variance n^-SPECTRUM
TWINS = 8  # images of a cluster, on average; half of an image's variance is its cluster's
SHARPNESS = 0.6  # deviation of the attention's logits


class Scorer:
    """The part of a model that a search needs: its score."""

    device, scores_half = torch.device("cpu"), True

    def __init__(self, width: int):
        settings = {"temperature": 0.0, "learn_temperature": False, "released": False}
        terms = ("fused", "explicit", "background")
        self.matching = Matching(dim=width, terms=terms, **settings).requires_grad_(False)
        self.score = self.matching.score
        self.query_factors, self.gallery_factors = self.matching.query_factors, self.matching.gallery_factors


class Features:
    """Encodings {fg, bg: [n,D]} with the statistics above, and queries near them; the same for the same seed."""

    def __init__(self, images: int, like: str | None = None):
        self.draw = torch.Generator().manual_seed(0)
        if like:
            known = GalleryIndex.open(like).encodings
            joint = torch.cat([known["fg"].float(), known["bg"].float()], dim=1)
            self.mean = joint.mean(dim=0)
            _, values, directions = torch.linalg.svd(joint - self.mean, full_matrices=False)
            self.factor = (values / len(joint) ** 0.5)[:, None] * directions  # [rank, 2D]
        else:
            size = 2 * WIDTH
            spread = torch.arange(1, size + 1) ** (-SPECTRUM / 2)
            directions = torch.linalg.qr(torch.randn(size, size, generator=self.draw)).Q
            self.factor = (spread / spread.norm() * (1 - MEAN) ** 0.5)[:, None] * directions
            self.mean = F.normalize(torch.randn(size, generator=self.draw), dim=0) * MEAN**0.5
        self.width = self.mean.numel() // 2
        self.centres = torch.randn(max(1, images // TWINS), len(self.factor), generator=self.draw).half()

    def blocks(self, images: int, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, images, size):
            yield self._split(
                torch.cat([self._some(min(BLOCK, images - s)) for s in range(start, min(start + size, images), BLOCK)])
            )

    def _some(self, count: int) -> Tensor:
        centres = self.centres[torch.randint(len(self.centres), (count,), generator=self.draw)].float()
        own = torch.randn(centres.shape, generator=self.draw)
        return (((centres + own) / 2**0.5) @ self.factor + self.mean).half()

    def _split(self, joint: Tensor) -> dict[str, Tensor]:
        return {"fg": joint[:, : self.width].contiguous(), "bg": joint[:, self.width :].contiguous()}

    def queries(self, gallery: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Encoded queries of one row each, one near each image given."""
        fg, bg = gallery["fg"], gallery["bg"]

        def near(x: Tensor, part: int) -> Tensor:
            noise = torch.randn(len(x), len(self.factor), generator=self.draw) @ self.factor
            return x + noise[:, part * self.width : (part + 1) * self.width]

        attention = (SHARPNESS * torch.randn(fg.shape, generator=self.draw)).softmax(dim=1)
        found = {"fused": near(fg, 0), "background": near(bg, 1), "text": near(fg, 0), "attention": attention}
        return [{key: value[row : row + 1] for key, value in found.items()} for row in range(len(fg))]


def build(folder: Path, features: Features, images: int) -> float:
    """An index of made-up encodings; seconds of writing it."""
    shapes = {"fg": (features.width,), "bg": (features.width,)}
    manifest, spent, start = units.Manifest(units.new_id(), None, None, None, "float16", shapes), 0.0, 0
    folder.mkdir()
    units.write_manifest(folder, manifest)
    for arrays in features.blocks(images, UNIT):
        begun = time.perf_counter()
        rows = [Picture(name, name) for name in (f"{n:07d}.jpg" for n in range(start, start + len(arrays["fg"])))]
        with units.writing(folder):
            units.put(folder, units.next_name(folder), units.Facts(manifest.id, None), arrays, rows)
        start += len(rows)
        spent += time.perf_counter() - begun
    return spent


def broadcast(gallery: dict[str, Tensor], query: dict[str, Tensor]) -> Tensor:
    """The formula as written."""
    parts = []
    for start in range(0, len(gallery["fg"]), BLOCK):
        fg, bg = (gallery[key][start : start + BLOCK] for key in ("fg", "bg"))
        parts.append(
            F.cosine_similarity(query["fused"], fg, dim=-1)
            + F.cosine_similarity(query["text"], query["attention"] * fg, dim=-1)
            + F.cosine_similarity(query["background"], bg, dim=-1)
        )
    return torch.cat(parts)[None]


def timed(run: Callable[[Any], Any], asked: list[Any]) -> tuple[dict[str, float], list[Any]]:
    """{p50, p99, cpu} in seconds over the queries, after the first by itself; and the answers."""
    run(asked[0])
    walls, cpus, answers = [], [], []
    for one in asked:
        wall, cpu = time.perf_counter(), time.process_time()
        answers.append(run(one))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    wall, cpu = torch.tensor(walls, dtype=torch.float64), torch.tensor(cpus, dtype=torch.float64)
    return {"p50": wall.median().item(), "p99": wall.quantile(0.99).item(), "cpu": cpu.median().item()}, answers


def measure(images: int, queries: int, like: str | None, two_stage: bool, place: str) -> dict[str, Any]:
    """All figures of one size; the index is made in the folder `place`."""
    found: dict[str, Any] = {"images": images, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        folder, features = Path(place) / "index", Features(images, like)
        found["build"] = images / build(folder, features, images)
        found["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / images
        model, opening = Scorer(features.width), []
        for _ in range(5):
            begun = time.perf_counter()
            index = GalleryIndex.open(folder, model)
            opening.append(time.perf_counter() - begun)
        found["open"], found["open, first"] = sorted(opening)[2], opening[0]
        some = torch.linspace(0, images - 1, queries).long()
        asked = features.queries(index.candidates(some))
        rate = bandwidth()
        found["bandwidth"] = {"wall": rate[0], "cpu": rate[1]}
        before = peak()
        found["exact"], best = timed(lambda query: index.scores(query)[0].topk(TOP).indices, asked)
        found["memory, exact"] = peak() - before
        encodings = images * 2 * features.width * 2
        found["share"] = {
            "wall": encodings / found["exact"]["p50"] / rate[0], "cpu": encodings / found["exact"]["cpu"] / rate[1]
        }  # fmt: skip
        if two_stage:
            _two_stage(index, asked, best, found)
        found["memory"] = peak()
        _rivals(index, asked, found)
    return found


def _two_stage(index: GalleryIndex, asked: list[Any], best: list[Tensor], found: dict[str, Any]) -> None:
    try:
        import qdrant_edge  # noqa: F401
    except ImportError as error:
        found["two-stage"] = f"skipped: {error}"
        return
    begun = time.perf_counter()
    EdgeCache.build(index, progress=False)
    found["first stage, build"] = len(index) / (time.perf_counter() - begun)
    with EdgeCache.open(index) as cache:

        def search(query: dict[str, Tensor]) -> Tensor:
            near = cache.nearest([(1.0, index.model.query_factors(query))], CANDIDATES)
            return near[index.model.score(query, index.candidates(near))[0].topk(TOP).indices]

        found["two-stage"], answers = timed(search, asked)
    kept = [torch.isin(true, given).float().mean() for true, given in zip(best, answers, strict=True)]
    found["recall"] = torch.stack(kept).mean().item()


def _rivals(index: GalleryIndex, asked: list[Any], found: dict[str, Any]) -> None:
    need, free = len(index) * 1024 * 4, _free()
    if free is not None and need * 2 > free:
        found["skipped"] = f"broadcast, faiss: they hold {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return
    gallery = {key: value.float() for key, value in index.encodings.items()}
    few = asked[: max(3, len(asked) // 10)]
    found["broadcast"], answers = timed(functools.partial(broadcast, gallery), few)
    found["difference"] = (answers[0] - index.scores(asked[0])).abs().max().item()
    del gallery
    try:
        import faiss
    except ImportError as error:
        found["faiss"] = f"skipped: {error}"
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    order, flat = None, None
    for _, block in index.blocks(BLOCK):
        factors = index.model.gallery_factors(block)
        order = order or FirstOrder.of(factors)
        vectors = order.gallery(factors)
        flat = flat or faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors.numpy())
    plain = [order.query([(1.0, index.model.query_factors(query))])[None].numpy() for query in asked]
    found["faiss"], _ = timed(lambda query: flat.search(query, TOP), plain)


def _free() -> int | None:
    """Bytes of memory that are free for use."""
    if not Path("/proc/meminfo").exists():
        return None
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def shown(results: list[dict[str, Any]]) -> str:
    """One column a size."""

    def times(of: Any) -> str:
        return (
            of if isinstance(of, str) else "-" if of is None else f"{of['p50'] * 1e3:,.1f} / {of['p99'] * 1e3:,.1f} ms"
        )

    def ratio(result: dict[str, Any], name: str) -> str:
        rival, ours = result.get(name), result["exact"]
        return (
            "-"
            if not isinstance(rival, dict)
            else f"{rival['p50'] / ours['p50']:.1f} ({rival['cpu'] / ours['cpu']:.1f})"
        )

    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "images": lambda r: f"{r['images']:,}",
        "build, images a second": lambda r: f"{r['build']:,.0f}",
        "bytes an image": lambda r: f"{r['bytes']:,.0f}",
        "open": lambda r: f"{r['open'] * 1e3:.1f} ms",
        "exact, p50 / p99": lambda r: times(r["exact"]),
        "exact, cpu": lambda r: f"{r['exact']['cpu'] * 1e3:,.1f} ms",
        "memory bandwidth (cpu)": lambda r: (
            f"{r['bandwidth']['wall'] / 1e9:.1f} ({r['bandwidth']['cpu'] / 1e9:.1f}) GB/s"
        ),
        "exact, share of it (cpu)": lambda r: f"{r['share']['wall']:.0%} ({r['share']['cpu']:.0%})",
        "broadcast float32, p50 / p99": lambda r: times(r.get("broadcast")),
        "  / exact (cpu)": lambda r: ratio(r, "broadcast"),
        "  largest difference": lambda r: f"{r['difference']:.0e}" if "difference" in r else "-",
        "faiss flat, p50 / p99": lambda r: times(r.get("faiss")),
        "  / exact (cpu) ": lambda r: ratio(r, "faiss"),
        "two-stage, p50 / p99": lambda r: times(r.get("two-stage")),
        "  recall of the exact top 50": lambda r: f"{r['recall']:.4f}" if "recall" in r else "-",
        "  its build, images a second": lambda r: f"{r['first stage, build']:,.0f}" if "recall" in r else "-",
        "peak memory, mapped files included": lambda r: f"{r['memory'] / 1e6:,.0f} MB",
    }
    notes = [f"{r['images']:,} images: skipped {r['skipped']}" for r in results if "skipped" in r]
    return "\n".join([table([[title, *map(cell, results)] for title, cell in lines.items()]), *notes])


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks; the first stage, whose build takes longest, in the full run alone."""
    images = 20_000 if quick else 200_000
    with tempfile.TemporaryDirectory() as place:
        found = measure(images, 20 if quick else 50, None, not quick, place)
    ours, memory, what = found["exact"]["cpu"], found["memory"], f"one query x {images:,} images on disk"
    share = found["share"]["cpu"]
    made = [
        Row(what, ours, other, found[form]["cpu"], memory, share, "memory")
        for form, other in (("broadcast", "broadcast float32"), ("faiss", "faiss flat, plain part"))
        if isinstance(found.get(form), dict)
    ]
    if isinstance(found.get("two-stage"), dict):
        made.append(Row(f"two-stage, {images:,} images", found["two-stage"]["cpu"], "exact", ours, memory))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 200_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=50, help="queries of each size (default 50)")
    parser.add_argument("--like", default=None, metavar="INDEX", help="take mean and covariance from this index")
    parser.add_argument(
        "--no-two-stage", action="store_true", help="leave the first stage out: its build takes longest"
    )
    parser.add_argument("--threads", type=int, default=None, help="threads of all forms (torch's own choice otherwise)")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write all figures there as well")
    parser.add_argument("--measure", type=json.loads, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folders are removed
    results = []
    for images in given.images:
        with tempfile.TemporaryDirectory() as place:
            how = json.dumps([images, given.queries, given.like, not given.no_two_stage, place])
            results.append(json.loads(own_process(__file__, "--measure", how)))
        print(f"{images:,} images done", flush=True)
    print(f"\n{torch.get_num_threads()} threads\n{shown(results)}")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
