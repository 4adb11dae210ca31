"""CIRR (Liu et al., ICCV 2021) as it is published: rc2 annotations over pictures of NLVR2.

root/captions/cap.rc2.{split}.json        [{"pairid": 1, "reference": name, "caption": text, "target_hard": name,
                                          "target_soft": {name: weight}, "img_set": {"members": [names], ...}}, ...]
root/image_splits/split.rc2.{split}.json  {name: "./train/34/name.png", ...}: the gallery of the split
root/img_raw/                             train/0 ... train/99, dev (the pictures of val), test1

CLIP4Cir and what is built on it keep train, dev and test1 directly below the root, and the annotations in root/cirr/:
each file is read from either place.

The one right answer is `target_hard`; `target_soft` weighs other images too, lacks the hard target in some entries and
holds the reference in others. A query's group is its `img_set`, reference included; R_subset@K ranks the others of it.
test1 is published without targets: it can only be ranked, for the test server.
"""

from collections.abc import Container, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from neucore_plugin.common.names import Listing
from neucore_plugin.datasets.annotations import good_entries, is_whole, read_json, safe_name
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Triplet

FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # split: its folder below one of IMAGES
IMAGES = ("img_raw", "")  # where FOLDERS lie: as published, as in CLIP4Cir


def _files(split: str) -> tuple[str, str]:
    """Queries and image list of a split."""
    return f"captions/cap.rc2.{split}.json", f"image_splits/split.rc2.{split}.json"


def _parse(root: Path, split: str, problems: list[str]) -> tuple[list[Triplet], dict[str, Path]]:
    captions_file, images_file = (CIRR.annotation(root, file) for file in _files(split))
    captions, images = (str(file.relative_to(root)) for file in (captions_file, images_file))
    there, usual = Listing(), Path(CIRR.image_folder(root, split)).parent
    bases = dict.fromkeys((usual, *(root / folder for folder in IMAGES)))
    paths = {}
    for name, place in read_json(images_file, dict, CIRR.title).items():
        if safe_name(place):
            paths[name] = next((base / place for base in bases if base / place in there), usual / place)
        else:
            problems.append(f"{images}: {name!r}: expected a path below img_raw, given {place!r}")
    triplets = []
    entries = read_json(captions_file, list, CIRR.title)
    check = partial(_faults, split=split, images=images, known=paths)
    for _, entry in good_entries(entries, captions, check, problems, unique="pairid"):
        targets = (entry["target_hard"],) if split in CIRR.answered else ()
        members = tuple(entry["img_set"]["members"])
        soft = tuple((name, float(weight)) for name, weight in (entry.get("target_soft") or {}).items())
        triplets.append(
            Triplet(str(entry["pairid"]), entry["reference"], entry["caption"], targets, members=members, soft=soft)
        )
    return triplets, paths


def _faults(entry: dict[str, Any], split: str, images: str, known: Container[str]) -> Iterable[str]:
    """What is wrong with one entry of a captions file; images: the name of the file that lists those `known`."""
    if not is_whole(entry.get("pairid")):
        yield f"needs 'pairid', a whole number, given {entry.get('pairid')!r}"
    keys = ("reference", "target_hard") if split in CIRR.answered else ("reference",)
    yield from (f"needs the text {key!r}" for key in (*keys, "caption") if not isinstance(entry.get(key), str))
    named = {key: entry[key] for key in keys if isinstance(entry.get(key), str)}
    yield from (f"{key} {name!r} is not in {images}" for key, name in named.items() if name not in known)
    soft = entry.get("target_soft") or {}
    if not isinstance(soft, dict) or not all(isinstance(weight, int | float) for weight in soft.values()):
        yield "target_soft must give a number for each image name"
    group = entry["img_set"].get("members") if isinstance(entry.get("img_set"), dict) else None
    if not isinstance(group, list) or not all(isinstance(name, str) for name in group) or not group:
        yield "needs img_set.members, a list of image names"
    elif split != "train":  # the groups of train are never ranked
        yield from (f"member {name!r} is not in {images}" for name in group if name not in known)
        yield from (f"img_set.members lacks the {key} {name!r}" for key, name in named.items() if name not in group)


CIRR = Reader(
    name="cirr",
    title="CIRR",
    credit="Annotations: CIRR (Liu et al., ICCV 2021), MIT. Images: NLVR2, under its terms of use",
    files=_files,
    images=lambda split: tuple(str(Path(base, FOLDERS[split])) for base in IMAGES),
    annotation_folders=("", "cirr"),
    parse=_parse,
    where_from="""\
the annotations are branch cirr_dataset of the CIRR repository:
    git clone -b cirr_dataset https://github.com/Cuberick-Orion/CIRR.git {root}
the images are those of NLVR2, to be had by the request form at
    https://github.com/lil-lab/nlvr/tree/master/nlvr2#direct-image-download
    (no answer: see "Raw Images" in CIRR's README)
    unpack them so that {root}/img_raw holds train, dev and test1
a copy as CLIP4Cir lays it out is read as it is: {root}/train, dev and test1, the annotations in {root}/cirr""",
    queries=lambda split: _files(split)[:1],
)
