"""The training captions of a data set, raw, in the order in which the released code takes words from them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import expanded, read_json
from neucore_plugin.datasets.annotations import read_lines

CATEGORIES = ("dress", "shirt", "toptee")  # in their order
NAMES = "train_im_names.txt"  # which of Shoes' captions are for training
FILES = {  # what `neucore convert --captions` takes, by model type
    "official_cirr": "cap.rc2.train.json",
    "official_fashioniq": ", ".join(f"cap.{category}.train.json" for category in CATEGORIES),
    "official_shoes": f"relative_captions_shoes.json, with {NAMES} beside it or given as well",
}


def training_captions(paths: Sequence[str | Path], model_type: str) -> list[str]:
    """All captions of the training split, from its files in whatever order they are given.

    CIRR: in the file's order. Shoes: those whose target is in the list of training names, in the file's order.
    FashionIQ: dress, shirt, toptee; of each first all first captions, then all second ones.
    Raises: DataError, which says which files are wanted, where they are not those of `model_type`.
    """
    read = {"official_cirr": _cirr, "official_fashioniq": _fashioniq, "official_shoes": _shoes}[model_type]
    return read([expanded(path) for path in paths])


def _wanted(model_type: str, problem: str) -> DataError:
    return DataError(
        f"--captions: {problem}. {model_type} takes {FILES[model_type]}; or give the words by --vocabulary"
    )


def _entries(path: Path, key: str, model_type: str) -> list[dict[str, Any]]:
    """The entries of a file, which all hold texts under `key`."""
    entries = read_json(path, list, f"{model_type} takes {FILES[model_type]}")
    for place, entry in enumerate(entries):
        texts = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(texts, list if key == "captions" else str):
            raise _wanted(model_type, f"{path}: entry {place} has no {key!r}")
        if key == "captions" and (len(texts) != 2 or not all(isinstance(text, str) for text in texts)):
            raise _wanted(model_type, f"{path}: entry {place} has not two captions")
    if not entries:
        raise _wanted(model_type, f"{path} holds no caption")
    return entries


def _cirr(paths: Sequence[Path]) -> list[str]:
    if len(paths) != 1:
        raise _wanted("official_cirr", f"{len(paths)} files are given")
    return [entry["caption"] for entry in _entries(paths[0], "caption", "official_cirr")]


def _fashioniq(paths: Sequence[Path]) -> list[str]:
    found: dict[str, Path] = {}
    for path in paths:
        named = [category for category in CATEGORIES if category in re.split(r"[._-]", path.name.lower())]
        if len(named) != 1 or named[0] in found or not path.name.lower().endswith("train.json"):
            raise _wanted("official_fashioniq", f"{path}: by its name no further category's training file")
        found[named[0]] = path
    if missing := [category for category in CATEGORIES if category not in found]:
        raise _wanted("official_fashioniq", f"the file of {' and '.join(missing)} is missing")
    captions: list[str] = []
    for category in CATEGORIES:
        pairs = [entry["captions"] for entry in _entries(found[category], "captions", "official_fashioniq")]
        captions += [pair[place] for place in (0, 1) for pair in pairs]
    return captions


def _shoes(paths: Sequence[Path]) -> list[str]:
    lists, files = ([path for path in paths if (path.suffix == ".txt") is named] for named in (True, False))
    if len(files) != 1 or len(lists) > 1:
        raise _wanted("official_shoes", f"{len(files)} files of captions and {len(lists)} lists of names are given")
    names = lists[0] if lists else files[0].with_name(NAMES)
    if not names.is_file():
        raise _wanted("official_shoes", f"{names} is missing: it says which captions are for training")
    known = {line.strip() for line in read_lines(names, "Shoes")}
    entries = _entries(files[0], "RelativeCaption", "official_shoes")
    captions = [entry["RelativeCaption"] for entry in entries if entry.get("ImageName") in known]
    if not captions:
        raise _wanted("official_shoes", f"{names} names no image of {files[0]}")
    return captions
