"""Further wordings and near-twins, against loops over the ranking."""

import statistics

import pytest
import torch
from torch.utils.data import DataLoader

from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.evaluation.evaluator import Evaluator
from neucore_plugin.evaluation.robustness import robustness

NAMES = tuple(f"image-{number}" for number in range(12))
QUERIES = 8


class TextModel:
    """The score of an image hangs on the text, a number, alone."""

    title, device = "neucore", torch.device("cpu")
    table = torch.rand(40, len(NAMES), generator=torch.Generator().manual_seed(3))

    def eval(self):
        return self

    def fingerprint(self) -> str:
        return "x"

    def encode_image(self, pixels, **_):
        return {"number": pixels[:, 0].long()}

    def encode_query(self, pixels=None, texts=None, concept_words=None, **_):
        if texts is None:
            return {"rows": torch.zeros(len(pixels), len(NAMES))}
        assert concept_words == [(f"c{text}",) for text in texts]  # a wording comes with its own concepts
        return {"rows": self.table[[int(text) for text in texts]]}

    def score(self, query, gallery, chunk):
        return query["rows"][:, gallery["number"]]


class Number:
    fit = "pad"

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[:1])


@pytest.fixture
def dataset(tmp_path):
    from PIL import Image

    paths = {}
    for number, name in enumerate(NAMES):
        paths[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(paths[name])
    triplets = [
        Triplet(
            *(f"q{n}", NAMES[n], str(n), (NAMES[11 - n],)),
            wordings=(str(10 + n), str(20 + n)),
            near_twins=(NAMES[(n + 2) % 12], NAMES[(n + 3) % 12], "gone") if n % 2 else (),
        )
        for n in range(QUERIES)
    ]
    found = TripletDataset("x", "val", triplets, Gallery.of(paths), ImageStore(paths, Number()))
    found.concepts = [(f"c{text}",) for text in found.texts]
    found.wording_concepts = [tuple((f"c{text}",) for text in texts) for texts in found.wordings]
    return found


def order(dataset, query: int, text: str) -> list[str]:
    scores = dict(zip(NAMES, TextModel.table[int(text)].tolist(), strict=True))
    del scores[dataset.triplets[query].reference]
    return sorted(scores, key=lambda name: (-scores[name], NAMES.index(name)))


def evaluate(dataset):
    loader = DataLoader(dataset, batch_size=3, collate_fn=dataset.collater)
    return Evaluator(256, 64).evaluate(TextModel(), loader, partial=True)


def test_wordings_and_near_twins_by_loop(dataset):
    found = evaluate(dataset)
    assert list(found.table) == ["neucore", "text_only", "image_only"]
    told = robustness(found)
    rankings = [[order(dataset, n, str(start + n)) for n in range(QUERIES)] for start in (0, 10, 20)]
    targets = [t.targets[0] for t in dataset.triplets]
    recalls = [100 * sum(r[0] == t for r, t in zip(rows, targets, strict=True)) / QUERIES for rows in rankings]
    changed = sum(len({rows[n][0] for rows in rankings}) > 1 for n in range(QUERIES))
    assert told["wordings"] == {
        "R@1": recalls,
        "spread": pytest.approx(statistics.stdev(recalls)),
        "changed": 100 * changed / QUERIES,
        "queries": QUERIES,
    }
    held = ahead = 0
    for n in range(1, QUERIES, 2):
        best = min(rankings[0][n].index(name) for name in dataset.triplets[n].near_twins[:2])
        held += best < 5
        ahead += best < min(5, rankings[0][n].index(targets[n]))
    assert told["near_twins"] == {"among_5": 25 * held, "ahead": 25 * ahead, "queries": 4}
    assert held > 0 and changed


def test_what_a_data_set_does_not_offer_is_not_told(dataset):
    dataset.wordings = [()] * QUERIES
    dataset.triplets = [Triplet(t.query_id, t.reference, t.caption, t.targets) for t in dataset.triplets]
    assert robustness(evaluate(dataset)) == {}
