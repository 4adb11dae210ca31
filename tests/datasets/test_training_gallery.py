"""Images of the training as negatives: which, their features, their numbers; answers of queries without a part."""

from pathlib import Path

import numpy as np
import pytest
import torch

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.datasets.feature_cache import build_cache
from neucore_plugin.datasets.training_gallery import TrainingGallery
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset

NAMES = [f"{letter}.png" for letter in "abcdefgh"]


def features_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [2,3] and pooled [4], which follow from the name."""
    number = ord(name[0])
    return np.full((2, 3), number, np.float32) + np.arange(2)[:, None], np.full(4, number / 2, np.float32)


def dataset(
    tmp_path: Path, triplets: list[Triplet], names=NAMES, cached=True, train=True, label="set"
) -> TripletDataset:
    store = ImageStore({name: tmp_path / name for name in names}, None)
    if cached:
        contents = [f"{label} {name}" for name in names]
        store.cache = build_cache(tmp_path, "images", "e", names, contents, lambda part: map(features_of, part), 4)
    return TripletDataset(label, "train", triplets, Gallery.of(store.paths), store, train=train)


TRIPLETS = [
    Triplet("1", "g.png", "red", ("b.png", "c.png")),
    Triplet("2", "g.png", "blue", ("c.png",), members=("e.png", "g.png")),
    Triplet("3", "d.png", "red", ("b.png",)),
    Triplet("4", "b.png", "long", ("g.png",)),
]


def test_holds_what_the_training_shows_and_nothing_else(tmp_path):
    gallery = TrainingGallery([dataset(tmp_path, TRIPLETS)])
    shown = [NAMES[key] for key in gallery.keys.tolist()]
    assert shown == ["b.png", "c.png", "d.png", "e.png", "g.png"]  # a, f and h are the test's
    rows = torch.tensor([4, 0, 4])
    for place, name in enumerate(("tokens", "pooled")):
        wanted = np.stack([features_of(shown[row])[place] for row in rows.tolist()])
        assert torch.equal(gallery.features(rows, name), torch.from_numpy(wanted))
    assert gallery.cached and not TrainingGallery([dataset(tmp_path, TRIPLETS, cached=False)]).cached


def test_several_data_sets_never_share_a_number(tmp_path):
    first = dataset(tmp_path, TRIPLETS)
    second = dataset(tmp_path, TRIPLETS[:1], NAMES[::-1], label="other")
    second.first_key = len(NAMES)
    gallery = TrainingGallery([first, second])
    names = [*NAMES, *NAMES[::-1]]
    assert len(gallery.keys) == 5 + 3
    shown = [names[key] for key in gallery.keys.tolist()]
    wanted = torch.from_numpy(np.stack([features_of(name)[1] for name in shown]))
    assert torch.equal(gallery.features(torch.arange(8), "pooled"), wanted)
    sample = second[0]
    assert (names[sample["reference_key"]], names[sample["target_key"]]) == ("g.png", "b.png")
    assert [names[key] for key in sample["right_keys"]] == ["b.png", "c.png"]


def test_answers_of_queries_without_a_part_are_those_of_a_loop(tmp_path):
    data = dataset(tmp_path, TRIPLETS)
    for index, triplet in enumerate(TRIPLETS):
        sample = data[index]
        by_text = {x for t in TRIPLETS if t.caption == triplet.caption for x in t.targets}
        by_reference = {x for t in TRIPLETS if t.reference == triplet.reference for x in t.targets}
        assert {NAMES[key] for key in sample["text_keys"]} == by_text
        assert {NAMES[key] for key in sample["reference_keys"]} == by_reference
        assert sample["right_keys"][0] in sample["text_keys"] and 0 <= sample["noise"] < 2**62
    assert data.collater([data[0], data[1]])["noise"].shape == (2,)
    assert not {"noise", "text_keys", "reference_keys"} & dataset(tmp_path, TRIPLETS, train=False)[0].keys()


def test_noise_follows_from_the_seeds_of_the_sample(tmp_path):
    data, drawn = dataset(tmp_path, TRIPLETS), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(int(data[0]["noise"]))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stream_is_refused(tmp_path):
    data = dataset(tmp_path, TRIPLETS)
    data.streamed = True
    with pytest.raises(ConfigError, match="'train' of set comes as a stream.*negatives: batch, or.*data_type: shards"):
        TrainingGallery([data])


def test_tokens_of_several_lengths_are_told(tmp_path):
    def uneven(part):
        for name in part:
            yield np.zeros((1 + (name == "b.png"), 3), np.float32), np.zeros(4, np.float32)

    cache = build_cache(tmp_path, "images", "uneven", NAMES, [""] * 8, uneven, 4)
    assert cache.rows("tokens", np.array([0, 2])).shape == (2, 1, 3)
    with pytest.raises(DataError, match=r"differ in the number of their tokens: \[1, 2\]"):
        cache.rows("tokens", np.array([0, 1]))
