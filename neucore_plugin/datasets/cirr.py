"""CIRR (Liu et al., ICCV 2021) as it is published: rc2 annotations over pictures of NLVR2.

root/captions/cap.rc2.{split}.json        [{"pairid": 1, "reference": name, "caption": text, "target_hard": name,
                                          "target_soft": {name: weight}, "img_set": {"members": [names], ...}}, ...]
root/image_splits/split.rc2.{split}.json  {name: "./train/34/name.png", ...}: the gallery of the split
root/img_raw/                             train/0 ... train/99, dev (the pictures of val), test1

The protocol is *hard*: the one right answer is `target_hard`. `target_soft` is not read; it weighs other images too,
lacks the hard target in some entries and holds the reference in others. A query's group is its `img_set`, reference
included; R_subset@K ranks the others of it. test1 is published without targets, so it can neither be trained on nor
evaluated here: its triplets have none, and the builder leaves it out.
"""

import json
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from neucore_plugin.datasets.triplets import Gallery, Triplet
from neucore_plugin.errors import ConfigError, DataError
from neucore_plugin.names import nearest

FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # split: its folder below img_raw/
SPLITS = tuple(FOLDERS)
WITH_TARGETS = ("train", "val")
ROOT_VARIABLE = "NEUCORE_CIRR_ROOT"
SHOWN = 10  # problems of one message

SOURCES = """\
the annotations are branch cirr_dataset of the CIRR repository:
    git clone -b cirr_dataset https://github.com/Cuberick-Orion/CIRR.git {root}
the images are those of NLVR2, to be had by the request form at
    https://github.com/lil-lab/nlvr/tree/master/nlvr2#direct-image-download
    (no answer: see "Raw Images" in CIRR's README); unpack them so that {folders} are there"""


def captions_file(split: str) -> str:
    """Place of a split's queries below the root."""
    return f"captions/cap.rc2.{split}.json"


def images_file(split: str) -> str:
    """Place of a split's image list below the root."""
    return f"image_splits/split.rc2.{split}.json"


def load_split(root: str | Path, split: str) -> tuple[list[Triplet], Gallery, dict[str, Path]]:
    """Triplets, gallery and image files by name of a split: train, val or test1 (whose triplets have no targets).

    The image files need not exist (see `missing_files`). Raises DataError listing every problem by file and entry.
    """
    if split not in SPLITS:
        raise DataError(f"CIRR has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(root).expanduser()
    problems: list[str] = []
    paths = _read_images(root, split, problems)
    triplets = _read_queries(root, split, paths, problems)
    if problems:
        more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(
            f"{root}: {len(problems)} problems of split {split!r}\n  " + "\n  ".join(problems[:SHOWN]) + more
        )
    return triplets, Gallery(tuple(paths), tuple(paths.values())), paths


def missing_files(root: str | Path, splits: Sequence[str] = WITH_TARGETS) -> list[str]:
    """What `splits` lack below `root`, a line each: annotation files, and image folders with the number of images."""
    root = Path(root).expanduser()
    lines = [path for path in _annotations(root, splits) if not Path(path).is_file()]
    for split in splits:
        folder = root / "img_raw" / FOLDERS[split]
        if not (root / images_file(split)).is_file():
            lines += [] if folder.is_dir() else [_all_images(root, split)]
            continue
        try:
            wanted = _read_images(root, split, [])
        except DataError:  # damaged, not missing: `load_split` tells what is wrong with it
            continue
        absent = _absent(wanted.values())
        if absent:
            names = ", ".join(os.path.relpath(path, root / "img_raw") for path in absent[:3])
            lines.append(f"{folder}: {len(absent):,} of {len(wanted):,} images of {split}, such as {names}")
    return lines


def locate(root: str | Path | None, splits: Sequence[str] = WITH_TARGETS) -> Path:
    """The root folder: `root`, else the environment's NEUCORE_CIRR_ROOT.

    Raises one ConfigError with everything that is missing, where each part belongs and where it comes from.
    """
    given = root or os.environ.get(ROOT_VARIABLE)
    where = Path(given or "ROOT").expanduser()
    if given:
        lines = missing_files(where, splits)
        if not lines:
            return where
        named_by = "datasets.cirr.build_info.root" if root else f"the environment variable {ROOT_VARIABLE}"
        head = f"CIRR is not complete below {where} (given by {named_by}); missing:"
    else:
        lines = [*_annotations(where, splits), *(_all_images(where, split) for split in splits)]
        head = (
            f"datasets.cirr.build_info.root is null and the environment variable {ROOT_VARIABLE} is not set. Give "
            "CIRR's root folder by one of them, as in --options datasets.cirr.build_info.root=ROOT; it must hold:"
        )
    folders = " and ".join(str(where / "img_raw" / FOLDERS[split]) for split in splits)
    sources = SOURCES.format(root=where, folders=folders).replace("\n", "\n  ")
    raise ConfigError("\n  ".join([head, *(f"- {line}" for line in lines), sources]))


def _annotations(root: Path, splits: Sequence[str]) -> list[str]:
    return [str(root / file(split)) for split in splits for file in (captions_file, images_file)]


def _all_images(root: Path, split: str) -> str:
    return f"{root / 'img_raw' / FOLDERS[split]}: the images of {split}"


def _absent(paths: Iterable[Path]) -> list[Path]:
    """The paths without a file. A folder is listed once: asking for each file takes minutes on a network drive."""
    listed: dict[Path, set[str]] = {}
    absent = []
    for path in paths:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in listed[path.parent]:
            absent.append(path)
    return absent


def _read_images(root: Path, split: str, problems: list[str]) -> dict[str, Path]:
    """Image files by name, in the order of the split's list; what is wrong with an entry goes to `problems`."""
    file = images_file(split)
    paths = {}
    for name, given in _read_json(root / file, dict).items():
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
    for index, entry in enumerate(_read_json(root / file, list)):
        wrong = list(_problems(entry, split, known))
        if not wrong and seen.setdefault(entry["pairid"], index) != index:
            wrong = [f"pairid {entry['pairid']} stands already in entry {seen[entry['pairid']]}"]
        problems += [f"{file}: entry {index}: {text}" for text in wrong]
        if not wrong:
            targets = (entry["target_hard"],) if split in WITH_TARGETS else ()
            members = tuple(entry["img_set"]["members"])
            triplets.append(
                Triplet(str(entry["pairid"]), entry["reference"], entry["caption"], targets, members=members)
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
    group = entry["img_set"].get("members") if isinstance(entry.get("img_set"), dict) else None
    if not isinstance(group, list) or not all(isinstance(name, str) for name in group) or not group:
        yield "needs img_set.members, a list of image names"
    elif split != "train":  # the groups of train are never ranked
        yield from (f"member {name!r} is not in {images_file(split)}" for name in group if name not in known)
        yield from (f"img_set.members lacks the {key} {name!r}" for key, name in named.items() if name not in group)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it comes with CIRR's repository") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid JSON ({error}); fetch it again") from None
    if not isinstance(value, kind):
        what = {dict: "object", list: "list"}[kind]
        raise DataError(f"{path}: expected a JSON {what}, given {type(value).__name__}")
    return value
