"""One's own composed-retrieval data: a folder of images and one JSON file a split.

root/images/**            pictures; an image's name is its path below images/, with suffix
root/train.json           [{"reference": name, "caption": text, "target": name or [names], "change"?, "query_id"?}, ...]
root/val.json, ...        any other split
root/gallery.val.json     optional: the names ranked for that split; without it every image below images/
"""

import difflib
import logging
import os
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.common.images import LOOKED_FOR, find_images, told
from neucore_plugin.common.names import Names, name_of
from neucore_plugin.datasets.annotations import good_entries, is_whole, read_json, refuse, shown
from neucore_plugin.datasets.triplets import Gallery, Triplet

KEYS = ("reference", "caption", "target", "change", "query_id")
TITLE = "your data set"
_SPLITS = ("train", "val", "test", "dev")  # files of these names must hold queries


def splits(root: str | Path, asked: Collection[str] = ()) -> list[str]:
    """Names of the splits that a root holds; those `asked` for are taken as they are. DataError where there is none."""
    root = expanded(root)
    files = _json_files(root)
    found = [
        stem for stem, path in files.items() if not stem.startswith("gallery.") and (stem in asked or _is_split(path))
    ]
    if not found:
        raise DataError(
            f"{root}: no data set here. Expected {root / 'train.json'}, {root / 'val.json'} and {root / 'images'}"
        )
    return found


def _json_files(root: Path) -> dict[str, Path]:
    """The JSON files of a root by name. Raises DataError for the gallery of no split: it would not be used."""
    files = {path.stem: path for path in sorted(root.glob("*.json")) if path.is_file() and path.name[0] != "."}
    allowed = [f"gallery.{stem}" for stem in files if not stem.lower().startswith("gallery")]
    for stem, path in files.items():
        meant = stem.lower().startswith("gallery") or difflib.get_close_matches(stem, allowed, n=1, cutoff=0.8)
        if meant and stem not in allowed:
            names = [f"{name}.json" for name in allowed]
            raise DataError(f"{path}: a gallery, but of no split.{nearest(path.name, names)}")
    return files


def _is_split(path: Path) -> bool:
    """Whether a JSON file holds queries, or must by its name; other files may lie beside them, and are told."""
    if path.stem in _SPLITS:
        return True
    try:
        entries = read_json(path, list, TITLE)
        ours = not entries or any(isinstance(entry, dict) and len({*KEYS[:3]} & entry.keys()) > 1 for entry in entries)
    except DataError:
        ours = False
    if not ours:
        logging.warning("%s: no list of queries, so it is taken for no split", path)
    return ours


def images(root: str | Path) -> dict[str, Path]:
    """Every image below root/images by name, sorted; what else lies there is counted and logged.

    Raises DataError where there is none.
    """
    folder = expanded(root) / "images"
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder. Put the pictures there, or give the folder that holds images/")
    paths, left_out = find_images(folder)
    if not paths:
        raise DataError(f"{folder}: no images here. Looked for {LOOKED_FOR}; {told(left_out)}".rstrip("; "))
    if left_out:
        logging.warning("%s: %s", folder, told(left_out))
    return {name_of(path.relative_to(folder).as_posix()): path for path in paths}


def load_split(root: str | Path, split: str, known: dict[str, Path]) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of one split; `known`: what `images` gave. Raises DataError listing every problem."""
    root = expanded(root)
    path = root / f"{split}.json"
    if not path.exists():
        raise DataError(f"{path}: no such annotation file. Splits found: {', '.join(splits(root))}")
    _json_files(root)
    problems: list[str] = []
    triplets = []
    names = Names(known)
    check = partial(_faults, names=names, folder=root / "images")
    for index, entry in good_entries(read_json(path, list, TITLE), path.name, check, problems, "query_id"):
        reference, *targets = (names.find(name) for name in _images_of(entry))
        query_id = str(entry.get("query_id", f"{split}-{index}"))
        change = str(entry.get("change", ""))
        triplets.append(Triplet(query_id, reference, entry["caption"], tuple(dict.fromkeys(targets)), change))
    refuse(path, problems)
    return triplets, _gallery(root / f"gallery.{split}.json", names)


def _images_of(entry: dict[str, Any]) -> list[Any]:
    targets = entry["target"]
    return [entry["reference"], *(targets if isinstance(targets, list) else [targets])]


def _faults(entry: dict[str, Any], names: Names, folder: Path) -> Iterable[str]:
    yield from (f"unknown key {key[:80]!r}.{nearest(key, KEYS)}" for key in sorted(set(entry) - set(KEYS)))
    for key in KEYS[3:]:
        if key in entry and not isinstance(entry[key], str) and not is_whole(entry[key]):
            yield f"{key!r} must be a text, given {shown(entry[key])}"
    targets = [entry["target"]] if isinstance(entry.get("target"), str) else entry.get("target")
    if not isinstance(entry.get("reference"), str) or not isinstance(entry.get("caption"), str):
        yield "needs the texts 'reference' and 'caption'"
    elif not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        yield "needs 'target', an image name or a list of names"
    else:
        yield from _unknown(_images_of(entry), names, folder)


def _unknown(given: Iterable[Any], names: Names, folder: Path) -> Iterable[str]:
    """What is wrong with names of images."""
    for name in given:
        try:
            if not isinstance(name, str):
                yield f"expected the name of an image, given {shown(name)}"
            elif names.find(name) is None:
                yield f"no image {name[:200]!r} below {folder}"
        except DataError as error:  # it may mean several
            yield str(error)


def _gallery(path: Path, names: Names) -> Gallery:
    known = names.known
    if not path.exists():
        return Gallery.of(known)
    problems: list[str] = []
    places: dict[str, int] = {}
    for index, name in enumerate(read_json(path, list, TITLE)):
        if wrong := list(_unknown([name], names, path.parent / "images")):
            problems += [f"entry {index}: {text}" for text in wrong]
        elif (first := places.setdefault(names.find(name), index)) != index:
            problems.append(f"entry {index}: {name!r} stands already in entry {first}")
    refuse(path, problems)
    return Gallery(tuple(places), tuple(known[name] for name in places))
