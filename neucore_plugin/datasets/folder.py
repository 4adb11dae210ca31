"""One's own composed-retrieval data: a folder of images and one JSON file a split.

root/images/**            pictures; an image's name is its path below images/, with suffix
root/train.json           [{"reference": name, "caption": text, "target": name or [names], "change"?, "query_id"?}, ...]
root/val.json, ...        any other split
root/gallery.val.json     optional: the names ranked for that split; without it every image below images/
"""

from collections.abc import Container, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.common.images import IMAGE_SUFFIXES
from neucore_plugin.datasets.annotations import good_entries, read_json, refuse
from neucore_plugin.datasets.triplets import Gallery, Triplet

KEYS = ("reference", "caption", "target", "change", "query_id")
TITLE = "your data set"


def splits(root: str | Path) -> list[str]:
    """Names of the splits that a root holds. Raises DataError where there is none."""
    root = expanded(root)
    found = sorted(path.stem for path in root.glob("*.json") if not path.name.startswith("gallery."))
    if not found:
        raise DataError(
            f"{root}: no data set here. Expected {root / 'train.json'}, {root / 'val.json'} and {root / 'images'}"
        )
    return found


def images(root: str | Path) -> dict[str, Path]:
    """Every image below root/images by name, sorted. Raises DataError where there is none."""
    folder = expanded(root) / "images"
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: no images here. Allowed suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def load_split(root: str | Path, split: str, known: dict[str, Path]) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of one split; `known`: what `images` gave. Raises DataError listing every problem."""
    root = expanded(root)
    path = root / f"{split}.json"
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file. Splits found: {', '.join(splits(root))}")
    problems: list[str] = []
    triplets = []
    check = partial(_faults, known=known, folder=root / "images")
    for index, entry in good_entries(read_json(path, list, TITLE), path.name, check, problems):
        targets = (entry["target"],) if isinstance(entry["target"], str) else tuple(entry["target"])
        query_id = str(entry.get("query_id", f"{split}-{index}"))
        change = str(entry.get("change", ""))
        triplets.append(Triplet(query_id, entry["reference"], entry["caption"], targets, change))
    refuse(path, problems)
    return triplets, _gallery(root / f"gallery.{split}.json", known)


def _faults(entry: dict[str, Any], known: Container[str], folder: Path) -> Iterable[str]:
    yield from (f"unknown key {key!r}.{nearest(key, KEYS)}" for key in sorted(set(entry) - set(KEYS)))
    targets = [entry["target"]] if isinstance(entry.get("target"), str) else entry.get("target")
    if not isinstance(entry.get("reference"), str) or not isinstance(entry.get("caption"), str):
        yield "needs the texts 'reference' and 'caption'"
    elif not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        yield "needs 'target', an image name or a list of names"
    else:
        yield from (f"no image {x!r} below {folder}" for x in (entry["reference"], *targets) if x not in known)


def _gallery(path: Path, known: dict[str, Path]) -> Gallery:
    if not path.exists():
        return Gallery.of(known)
    names = read_json(path, list, TITLE)
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(f"{path}: names {len(missing)} images that do not exist, such as {missing[0]!r}")
    return Gallery(tuple(names), tuple(known[name] for name in names))
