"""Whether concept maps lie where two pictures differ, on pictures whose difference is known."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.evaluation import landing
from neucore_plugin.evaluation.ranking import Evaluated, QueryRanks

SIDE, GRID = 32, (4, 4)


class Pixels:
    """Image processor: RGB in [0,1]."""

    fit, deterministic = "pad", True

    def __call__(self, image):
        return to_tensor(image)


class MapModel:
    """Its maps are `make(number of the query)`, a pair of [4,4]."""

    device = torch.device("cpu")

    def __init__(self, make):
        self.make = make

    def concept_maps(self, pixels, texts, candidates):
        assert pixels.shape == candidates.shape == (len(texts), 3, SIDE, SIDE)
        sides = [self.make(int(text)) for text in texts]
        return [[{"concept": "x", "reference": one, "candidate": other}] for one, other in sides]


@pytest.fixture
def found(tmp_path) -> Evaluated:
    """Query n: the n-th 8 by 8 square of the target is red where the reference is white; one query has no region."""
    paths = {"white": tmp_path / "white.png"}
    white = Image.new("RGB", (SIDE, SIDE), "white")
    white.save(paths["white"])
    for number in range(6):
        picture = white.copy()
        row, column = divmod(number, 4)
        picture.paste("red", (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
        paths[f"red-{number}"] = tmp_path / f"{number}.png"
        picture.save(paths[f"red-{number}"])
    triplets = [
        Triplet(f"q{n}", "white", str(n), (f"red-{n}",), change="tone" if n % 2 else "hair", in_place=n != 5)
        for n in range(6)
    ]
    dataset = TripletDataset("x", "val", triplets, Gallery.of(paths), ImageStore(paths, Pixels()))
    return Evaluated(dataset, {"neucore": [QueryRanks(1)] * 6})


def square(number: int) -> torch.Tensor:
    return torch.zeros(16).index_fill(0, torch.tensor([number]), 0.5).view(GRID)


def test_a_region_is_the_share_of_changed_pixels_of_each_cell():
    reference, target = torch.zeros(2, 3, 16, 16)
    target[1, 0:4, 0:2] = 1.0  # half of the first cell
    target[:, 8:16, 8:16] = 1.0  # the last four cells
    target[0, 4:8, 4:8] = 0.05  # too little to be seen
    expected = torch.zeros(4, 4)
    expected[0, 0], expected[2:, 2:] = 0.5, 1.0
    assert torch.equal(landing.changed_region(reference, target, GRID), expected)
    assert torch.equal(landing.changed_region(target, reference, GRID), expected)
    scaled = [4 * side - 7 for side in (reference, target)]  # another normalisation of the same pictures
    assert torch.equal(landing.changed_region(*scaled, GRID), expected)


def test_shares_by_loop_and_in_closed_form():
    torch.manual_seed(1)
    values, region = torch.rand(4, 4), torch.rand(4, 4)
    pairs = list(zip(values.flatten().tolist(), region.flatten().tolist(), strict=True))
    by_loop = sum(v * r for v, r in pairs) / sum(v for v, _ in pairs)
    assert landing.share_inside(values, region) == pytest.approx(by_loop)
    for flat in (torch.ones(4, 4), torch.zeros(4, 4)):
        assert landing.share_inside(flat, region) == pytest.approx(float(region.mean()))


def test_maps_on_the_spot_beside_it_and_everywhere(found):
    told = landing.landing(found, MapModel(lambda n: (square(n), torch.ones(GRID))))
    assert told == {
        change: {"queries": count, "uniform": pytest.approx(6.25), "reference": 100.0, "target": pytest.approx(6.25)}
        for change, count in (("hair", 3), ("tone", 2))
    }
    beside = landing.landing(found, MapModel(lambda n: (square(n + 8), square(n))))
    assert beside["tone"]["reference"] == 0.0 and beside["tone"]["target"] == 100.0


def test_what_has_no_map_or_no_region_is_left_out(found):
    alone = landing.landing(found, MapModel(lambda n: (square(n), None)))
    assert alone["tone"]["reference"] == 100.0 and "target" not in alone["tone"]
    found.dataset.triplets = [replace(t, in_place=False) for t in found.dataset.triplets]
    assert landing.landing(found, MapModel(lambda n: (square(n), square(n)))) == {}


def test_the_same_queries_are_taken_whatever_their_order(found, monkeypatch):
    monkeypatch.setattr(landing, "QUERIES", 1)
    first = {c: found.dataset.triplets[p[0]].query_id for c, p in landing.chosen_queries(found).items()}
    found.dataset.triplets.reverse()
    assert first == {c: found.dataset.triplets[p[0]].query_id for c, p in landing.chosen_queries(found).items()}
