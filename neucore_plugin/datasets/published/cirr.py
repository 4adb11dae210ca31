"""CIRR (Liu et al., ICCV 2021) as it is published: rc2 annotations over pictures of NLVR2.

root/captions/cap.rc2.{split}.json        [{"pairid": 1, "reference": name, "caption": text, "target_hard": name,
                                          "target_soft": {name: weight}, "img_set": {"members": [names], ...}}, ...]
root/image_splits/split.rc2.{split}.json  {name: "./train/34/name.png", ...}: the gallery of the split
root/img_raw/                             train/0 ... train/99, dev (the pictures of val), test1

The one right answer is `target_hard`; `target_soft` weighs other images too, lacks the hard target in some entries and
holds the reference in others. A query's group is its `img_set`, reference included; R_subset@K ranks the others of it.
test1 is published without targets: it can only be ranked, for the test server.
"""

from collections.abc import Container, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.datasets.published.annotations import read_json, refuse
from neucore_plugin.datasets.triplets import Gallery, Triplet

NAME, TITLE = "cirr", "CIRR"
CREDIT = "Annotations: CIRR (Liu et al., ICCV 2021), MIT. Images: NLVR2, under its terms of use"
FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # split: its folder below img_raw/
SPLITS = tuple(FOLDERS)
WITH_TARGETS = ("train", "val")
ROOT_VARIABLE = "NEUCORE_CIRR_ROOT"


def sources(root: str | Path) -> str:
    """What to fetch, from where, and where it belongs."""
    return f"""\
the annotations are branch cirr_dataset of the CIRR repository:
    git clone -b cirr_dataset https://github.com/Cuberick-Orion/CIRR.git {root}
the images are those of NLVR2, to be had by the request form at
    https://github.com/lil-lab/nlvr/tree/master/nlvr2#direct-image-download
    (no answer: see "Raw Images" in CIRR's README)
    unpack them so that {Path(root) / "img_raw"} holds train, dev and test1"""


def annotations(split: str) -> tuple[str, ...]:
    """Files that a split needs, below the root."""
    return captions_file(split), images_file(split)


def image_folder(root: str | Path, split: str) -> str:
    """Where the images of a split belong."""
    return str(Path(root) / "img_raw" / FOLDERS[split])


def captions_file(split: str) -> str:
    """Place of a split's queries below the root."""
    return f"captions/cap.rc2.{split}.json"


def images_file(split: str) -> str:
    """Place of a split's image list below the root."""
    return f"image_splits/split.rc2.{split}.json"


def read(root: str | Path, split: str) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of a split: train, val or test1 (whose triplets have no targets).

    The image files need not exist. Raises DataError listing every problem by file and entry.
    """
    if split not in SPLITS:
        raise DataError(f"CIRR has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(root).expanduser()
    problems: list[str] = []
    paths = _read_images(root, split, problems)
    triplets = _read_queries(root, split, paths, problems)
    refuse(root, split, problems)
    return triplets, Gallery(tuple(paths), tuple(paths.values()))


def _read_images(root: Path, split: str, problems: list[str]) -> dict[str, Path]:
    """Image files by name, in the order of the split's list; what is wrong with an entry goes to `problems`."""
    file = images_file(split)
    paths = {}
    for name, given in read_json(root / file, dict, TITLE).items():
        place = PurePosixPath(given) if isinstance(given, str) and given else None
        if place is None or place.is_absolute() or ".." in place.parts or not place.name:
            problems.append(f"{file}: {name!r}: expected a path below img_raw, given {given!r}")
        else:
            paths[name] = root / "img_raw" / place
    return paths


def _read_queries(root: Path, split: str, known: Container[str], problems: list[str]) -> list[Triplet]:
    """The triplets of a split; what is wrong with an entry goes to `problems`."""
    file = captions_file(split)
    triplets, seen = [], {}
    for index, entry in enumerate(read_json(root / file, list, TITLE)):
        wrong = list(_problems(entry, split, known))
        if not wrong and seen.setdefault(entry["pairid"], index) != index:
            wrong = [f"pairid {entry['pairid']} stands already in entry {seen[entry['pairid']]}"]
        problems += [f"{file}: entry {index}: {text}" for text in wrong]
        if not wrong:
            targets = (entry["target_hard"],) if split in WITH_TARGETS else ()
            members = tuple(entry["img_set"]["members"])
            soft = tuple((name, float(weight)) for name, weight in (entry.get("target_soft") or {}).items())
            triplets.append(
                Triplet(str(entry["pairid"]), entry["reference"], entry["caption"], targets, members=members, soft=soft)
            )
    return triplets


def _problems(entry: Any, split: str, known: Container[str]) -> Iterable[str]:
    """What is wrong with one entry of a captions file."""
    if not isinstance(entry, dict):
        yield f"expected an object, given {type(entry).__name__}"
        return
    if not isinstance(entry.get("pairid"), int) or isinstance(entry["pairid"], bool):
        yield f"needs 'pairid', a whole number, given {entry.get('pairid')!r}"
    images = ("reference", "target_hard") if split in WITH_TARGETS else ("reference",)
    yield from (f"needs the text {key!r}" for key in (*images, "caption") if not isinstance(entry.get(key), str))
    named = {key: entry[key] for key in images if isinstance(entry.get(key), str)}
    yield from (f"{key} {name!r} is not in {images_file(split)}" for key, name in named.items() if name not in known)
    if len(set(named.values())) < len(named):
        yield f"reference and target_hard are both {entry['reference']!r}"
    soft = entry.get("target_soft") or {}
    if not isinstance(soft, dict) or not all(isinstance(weight, int | float) for weight in soft.values()):
        yield "target_soft must give a number for each image name"
    group = entry["img_set"].get("members") if isinstance(entry.get("img_set"), dict) else None
    if not isinstance(group, list) or not all(isinstance(name, str) for name in group) or not group:
        yield "needs img_set.members, a list of image names"
    elif split != "train":  # the groups of train are never ranked
        yield from (f"member {name!r} is not in {images_file(split)}" for name in group if name not in known)
        yield from (f"img_set.members lacks the {key} {name!r}" for key, name in named.items() if name not in group)
