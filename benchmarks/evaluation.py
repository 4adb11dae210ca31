"""Encoding and ranking CIRR val with the released form: in batches, against one query at a time as released.

    python benchmarks/evaluation.py                               # 4,181 queries x 2,297 images, D 512; minutes
    python benchmarks/evaluation.py --queries 200 --images 110    # a slice in the same proportion; seconds

Random weights and features; settings of CIRR (S 3, depth 1, T 1, 4 blocks in the concept encoder, 49 tokens).
One query at a time: its reference goes through the concept encoder again, the whole concept vocabulary through its
projection again, and each term is written once for every image. In batches: every image is encoded once, references are
looked up, concepts are projected once; queries with equally many concepts go together, because the released
normalisation counts padding. Image features and word vectors are given; the CNN and the GRU are the same in both.

"share" is the arithmetic of the batched form (its large matrix products) over its time, as a share of the rate that one
matrix product of 2048 x 2048 x 2048 reaches on this machine in the same run.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from machine import Row, peak, product_rate

from neucore_plugin.models.concept_alignment import ConceptAlignment
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.progressive_fusion import ProgressiveFusion

WIDTH, WORD_WIDTH, TOKENS, TYPES, DEPTH = 512, 300, 49, 3, 1
BATCH = 32
Item = dict[str, torch.Tensor]


class Released(torch.nn.Module):
    """The parts of the released form that encode and rank, with random weights."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        block = {"dim": WIDTH, "heads": 8, "mlp_ratio": 4.0, "dropout": 0.0, "released": True}
        self.alignment = ConceptAlignment(**block, word_dim=WORD_WIDTH, depth=4, bag="joint")
        self.fusion = ProgressiveFusion(
            **block,
            mode="mixture",
            steps=TYPES,
            layers=1,
            module_depth=DEPTH,
            head_dim=64,
            gumbel=False,
            generator_linears=2,
            instruction_linears=2,
            attend_padding=False,
        )
        self.matching = Matching(
            dim=WIDTH,
            terms=("fused", "explicit", "background"),
            temperature=0.0,
            learn_temperature=False,
            released=True,
        )
        self.embeddings = torch.nn.Embedding(vocabulary, WORD_WIDTH)


def data(queries: int, images: int, vocabulary: int) -> tuple[torch.Tensor, list[Item]]:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(images, TOKENS, WIDTH, generator=draw)
    asked = []
    for _ in range(queries):
        words, concepts = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((6, 18), (1, 7)))
        sentence = torch.randn(1, WIDTH, generator=draw)
        asked.append(
            {
                "reference": torch.randint(images, (1,), generator=draw),
                "words": torch.randn(1, words, WIDTH, generator=draw),
                "sentence": sentence / sentence.norm(),
                "concepts": torch.randint(vocabulary, (1, concepts), generator=draw),
            }
        )
    return features, asked


def fuse(model: Released, encoded: Item, concepts: torch.Tensor, words: torch.Tensor, mask, sentence: torch.Tensor):
    mask = torch.ones(words.shape[:2], dtype=torch.bool) if mask is None else mask
    present = torch.ones(concepts.shape[:2], dtype=torch.bool)
    return model.fusion(encoded["tokens"], encoded["fg"], concepts, present, words, mask, sentence)["fused"]


def one_at_a_time(model: Released, features: torch.Tensor, asked: list[Item]) -> torch.Tensor:
    """Ranking of the gallery for each query, each done from the start; the gallery alone is encoded ahead."""
    parts = [model.alignment.encode(part) for part in features.split(BATCH)]
    gallery = {key: torch.cat([part[key] for part in parts]) for key in ("fg", "bg")}
    ranks = []
    for query in asked:
        encoded = model.alignment.encode(features[query["reference"]])
        project = model.alignment.classifier.project
        project(model.embeddings.weight)  # the released forward pass projects the whole vocabulary
        concepts = project(model.embeddings(query["concepts"]))
        fused = fuse(model, encoded, concepts, query["words"], None, query["sentence"])
        side = model.matching.query(fused, query["sentence"], encoded["bg"])
        scores = (
            F.cosine_similarity(side["fused"], gallery["fg"], dim=-1)
            + F.cosine_similarity(side["text"], side["attention"] * gallery["fg"], dim=-1)
            + F.cosine_similarity(side["background"], gallery["bg"], dim=-1)
        )
        ranks.append(scores)
    return torch.stack(ranks)


def in_batches(model: Released, features: torch.Tensor, asked: list[Item]) -> torch.Tensor:
    """The same: images encoded once, queries of equally many concepts together, scores in matrix products."""
    encoded: Item = {}
    for start in range(0, len(features), BATCH):
        part = model.alignment.encode(features[start : start + BATCH])
        for key in ("tokens", "fg", "bg"):
            if key not in encoded:
                encoded[key] = part[key].new_empty(len(features), *part[key].shape[1:])
            encoded[key][start : start + BATCH] = part[key]
    gallery = model.matching.gallery(encoded["fg"], encoded["bg"])
    table = model.alignment.classifier.project(model.embeddings.weight)
    order = sorted(range(len(asked)), key=lambda n: (asked[n]["concepts"].shape[1], asked[n]["words"].shape[1]))
    scores = features.new_empty(len(asked), len(features))
    start = 0
    while start < len(order):
        count = asked[order[start]]["concepts"].shape[1]
        group = [n for n in order[start : start + BATCH] if asked[n]["concepts"].shape[1] == count]
        start += len(group)
        items = [asked[n] for n in group]
        words = torch.nn.utils.rnn.pad_sequence([item["words"][0] for item in items], batch_first=True)
        lengths = torch.tensor([item["words"].shape[1] for item in items])
        mask = torch.arange(words.shape[1])[None] < lengths[:, None]
        places = torch.cat([item["reference"] for item in items])
        reference = {key: encoded[key][places] for key in ("tokens", "fg", "bg")}
        concepts = table[torch.cat([item["concepts"] for item in items])]
        sentence = torch.cat([item["sentence"] for item in items])
        fused = fuse(model, reference, concepts, words, mask, sentence)
        scores[group] = model.matching.score(model.matching.query(fused, sentence, reference["bg"]), gallery)
    return scores


def arithmetic(asked: list[Item], images: int) -> float:
    """Operations of the batched form's large matrix products: linear layers and attention of encoder and executors."""

    def block(tokens: int, inner: int, mlp: int) -> float:
        return 2.0 * tokens * (4 * WIDTH * inner + 2 * WIDTH * mlp) + 4.0 * tokens * tokens * inner

    encoder = images * 4 * block(TOKENS + 1, WIDTH, 4 * WIDTH)
    hyper = TYPES * 2.0 * (WIDTH * 4 * WIDTH + 4 * WIDTH * 4 * DEPTH * WIDTH)
    executors = sum(
        TYPES * DEPTH * block(1 + TOKENS + item["concepts"].shape[1], 512, 4 * WIDTH) + hyper for item in asked
    )
    return encoder + executors + 2.0 * len(asked) * images * 4 * WIDTH


def rows(quick: bool) -> list[Row]:
    """Of the table of all benchmarks."""
    queries, images, vocabulary = (200, 110, 4000) if quick else (4181, 2297, 4000)
    torch.manual_seed(0)
    model = Released(vocabulary).eval()
    features, asked = data(queries, images, vocabulary)
    spent, memory = [], 0
    for form in (in_batches, one_at_a_time):
        used = time.process_time()
        with torch.inference_mode():
            form(model, features, asked)
        spent.append(time.process_time() - used)
        memory = memory or peak()
    share = arithmetic(asked, images) / spent[0] / product_rate()[1]
    what = f"encode and rank {queries:,} x {images:,}, released form"
    return [Row(what, spent[0], "one query at a time", spent[1], memory, share, "products")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=4181)
    parser.add_argument("--images", type=int, default=2297)
    parser.add_argument("--vocabulary", type=int, default=4000, help="concepts of the training captions (default 4000)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Released(arguments.vocabulary).eval()
    features, asked = data(arguments.queries, arguments.images, arguments.vocabulary)
    rate, _ = product_rate()
    results = {}
    for name, form in (("in batches", in_batches), ("one at a time", one_at_a_time)):
        begun, used = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            results[name] = form(model, features, asked)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used
        held = peak() / 1e6
        results[name, "seconds"], results[name, "cpu"] = seconds, cpu
        print(f"{name:<14} {seconds:8.1f} s  {cpu:8.1f} s of processor time, peak so far {held:,.0f} MB", flush=True)
    fast, slow = results["in batches"], results["one at a time"]
    print(f"ratio {results['one at a time', 'seconds'] / results['in batches', 'seconds']:.2f} by time, ", end="")
    print(f"{results['one at a time', 'cpu'] / results['in batches', 'cpu']:.2f} by processor time")
    same = (fast.argsort(dim=1, descending=True, stable=True) == slow.argsort(dim=1, descending=True, stable=True)).all(
        1
    )
    print(f"largest difference of a score {float((fast - slow).abs().max()):.1e}; ", end="")
    print(f"whole ranking the same for {int(same.sum())} of {len(same)} queries")
    target = torch.arange(len(asked)) % arguments.images
    ranks = [(scores > scores.gather(1, target[:, None])).sum(1) for scores in (fast, slow)]
    print(f"rank of a given image the same for {int((ranks[0] == ranks[1]).sum())} of {len(asked)}")
    operations = arithmetic(asked, arguments.images)
    share = operations / results["in batches", "seconds"] / rate
    print(f"matrix products {rate / 1e9:.0f} GFLOP/s; the batched form reaches {100 * share:.0f} % of it")
    print(f"threads: {torch.get_num_threads()}")


if __name__ == "__main__":
    main()
