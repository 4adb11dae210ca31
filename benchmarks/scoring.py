"""Scores in matrix products against the naive broadcast form: time ratio, memory beyond the result, largest difference.

    python benchmarks/scoring.py            # 4,181 queries x 2,297 images, and 1 x 200,000 (width 512); some minutes
    python benchmarks/scoring.py --quick    # a tenth of the size, seconds

The naive form builds a * t_fg for every pair, [Q,G,D], in blocks that fit into memory. Both run in float32 with the
same number of threads, one after the other; of several runs the fastest counts (all queries, naive: a single run).
On a busy machine wall times say little; the ratio of processor times is the steadier figure.

Memory is the peak of the resident size above its level before the call, less the result. Each form is measured in a
process of its own whose allocator returns freed blocks to the system at once, so that nothing freed earlier hides a
new allocation; the naive form with 64 queries, since its blocks are what it holds.

Differences are against float64: of the same matrix products over all pairs ("float32") and, on a sample of queries,
between products and naive form, both in float64 ("float64").
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import Row, bandwidth, fastest, peak, product_rate

from neucore_plugin.models.matching import Matching

WIDTH = 512
SIZES = {"all queries": (4181, 2297), "one query": (1, 200_000)}
PAIRS_IN_A_BLOCK = 20_000  # the naive form's tensors [pairs, width] take 40 MB each at width 512
SAMPLE = 16
Encodings = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def encodings(queries: int, images: int, width: int, dtype: torch.dtype = torch.float32) -> Encodings:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    query = {name: draw(queries) for name in ("fused", "text", "background")}
    query["attention"] = draw(queries).softmax(dim=-1)
    gallery = {"fg": draw(images), "bg": draw(images)}
    return tuple({key: value.to(dtype) for key, value in side.items()} for side in (query, gallery))


def naive(query: dict[str, torch.Tensor], gallery: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula as written, one vector per pair."""
    queries, images = len(query["fused"]), len(gallery["fg"])
    out = torch.empty(queries, images, dtype=gallery["fg"].dtype)
    g_step = min(images, PAIRS_IN_A_BLOCK)
    q_step = max(1, PAIRS_IN_A_BLOCK // g_step)
    for q in range(0, queries, q_step):
        f, u, a, r = (query[key][q : q + q_step, None] for key in ("fused", "text", "attention", "background"))
        for g in range(0, images, g_step):
            fg, bg = (gallery[key][None, g : g + g_step] for key in ("fg", "bg"))
            out[q : q + q_step, g : g + g_step] = (
                F.cosine_similarity(f, fg, dim=-1)
                + F.cosine_similarity(u, a * fg, dim=-1)
                + F.cosine_similarity(r, bg, dim=-1)
            )
    return out


@functools.cache
def matching(width: int) -> Matching:
    terms = ["fused", "explicit", "background"]
    return Matching(dim=width, terms=terms, temperature=0.0, learn_temperature=False, released=False)


def products(query: dict[str, torch.Tensor], gallery: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return matching(gallery["fg"].shape[1]).score(query, gallery)


FORMS: dict[str, Callable[..., torch.Tensor]] = {"products": products, "naive": naive}


def differences(queries: int, images: int, width: int = WIDTH) -> dict[str, float]:
    """Largest differences, see above."""
    exact = encodings(queries, images, width, torch.float64)
    reference = products(*exact)
    single = products(*encodings(queries, images, width))
    sample = {key: value[:SAMPLE] for key, value in exact[0].items()}
    return {
        "float64": (naive(sample, exact[1]) - reference[:SAMPLE]).abs().max().item(),
        "float32": (single.double() - reference).abs().max().item(),
    }


def resident() -> int:
    """Bytes of memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(form: str, queries: int, images: int) -> int:
    """Peak bytes beyond the result, sampled every half millisecond in this process."""
    inputs = encodings(queries, images, WIDTH)
    FORMS[form](*encodings(min(queries, 2), 64, WIDTH))  # threads and libraries set up
    peak, done = [before := resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = FORMS[form](*inputs)
    done.set()
    watcher.join()
    return peak[0] - before - result.nbytes


def memory_in_its_own_process(form: str, queries: int, images: int) -> int | None:
    if not os.path.exists("/proc/self/statm"):
        return None
    command = [sys.executable, __file__, "--memory", json.dumps([form, queries, images])]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return int(done.stdout)


def seconds(form: str, inputs: Encodings, runs: int) -> tuple[float, float]:
    """Wall time and processor time of the fastest run."""
    return fastest(lambda: FORMS[form](*inputs), runs)


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks."""
    made = []
    for name, (queries, images) in SIZES.items():
        if quick:
            queries, images = max(1, queries // 10), images // 10
        inputs = encodings(queries, images, WIDTH)
        seconds("products", inputs, 1)
        ours = seconds("products", inputs, 5)[1]
        if queries > 1:  # the matrix products alone
            share, of = 2 * queries * images * 4 * WIDTH / ours / product_rate()[1], "products"
        else:
            share, of = images * 2 * WIDTH * 4 / ours / bandwidth()[1], "memory"
        memory = peak()
        theirs = seconds("naive", inputs, 1 if queries > 1 else 3)[1]
        made.append(Row(f"score {queries:,} x {images:,}, {name}", ours, "broadcast", theirs, memory, share, of))
    return made


def report(name: str, queries: int, images: int) -> None:
    print(f"{name}: {queries:,} x {images:,}, width {WIDTH}, {torch.get_num_threads()} threads", flush=True)
    inputs = encodings(queries, images, WIDTH)
    seconds("products", inputs, 1)
    fast = seconds("products", inputs, 5)
    print(f"  products   {fast[0]:8.3f} s wall {fast[1]:8.3f} s cpu", flush=True)
    slow = seconds("naive", inputs, 1 if queries > 1 else 3)
    print(f"  naive      {slow[0]:8.3f} s wall {slow[1]:8.3f} s cpu", flush=True)
    print(f"  naive / products   wall {slow[0] / fast[0]:.1f}   cpu {slow[1] / fast[1]:.1f}", flush=True)
    for form in FORMS:
        # One block of queries shows what the naive form holds; all of them would only take longer.
        size = (min(queries, 64) if form == "naive" else queries, images)
        beyond = memory_in_its_own_process(form, *size)
        print(
            f"  memory beyond the result, {form}: " + ("unknown here" if beyond is None else f"{beyond / 1e6:.1f} MB")
        )
    found = differences(queries, images)
    print(f"  largest difference   products and naive, float64: {found['float64']:.1e}", end="")
    print(f"   float32 products from float64: {found['float32']:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries and images")
    parser.add_argument(
        "--threads", type=int, default=None, help="threads for both forms (torch's own choice otherwise)"
    )
    parser.add_argument("--memory", type=json.loads, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory(*arguments.memory))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name, (queries, images) in SIZES.items():
        if arguments.quick:
            queries, images = max(1, queries // 10), images // 10
        report(name, queries, images)


if __name__ == "__main__":
    main()
