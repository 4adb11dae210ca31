"""One's own composed-retrieval data: a folder of images and one JSON file a split.

root/images/**            pictures; an image's name is its path below images/, with suffix
root/train.json           [{"reference": name, "caption": text, "target": name or [names], "change"?, "query_id"?}, ...]
root/val.json, ...        any other split
root/gallery.val.json     optional: the names ranked for that split; without it every image below images/
"""

import json
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, first_few, nearest
from neucore_plugin.common.images import IMAGE_SUFFIXES
from neucore_plugin.datasets.triplets import Gallery, Triplet


def splits(root: str | Path) -> list[str]:
    """Names of the splits that a root holds. Raises DataError where there is none."""
    root = Path(root).expanduser()
    found = sorted(path.stem for path in root.glob("*.json") if not path.name.startswith("gallery."))
    if not found:
        raise DataError(
            f"{root}: no data set here. Expected {root / 'train.json'}, {root / 'val.json'} and {root / 'images'}"
        )
    return found


def images(root: str | Path) -> dict[str, Path]:
    """Every image below root/images by name, sorted. Raises DataError where there is none."""
    folder = Path(root).expanduser() / "images"
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: no images here. Allowed suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def load_split(root: str | Path, split: str, known: dict[str, Path]) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of one split; `known`: what `images` gave. Raises DataError listing every problem."""
    root = Path(root).expanduser()
    path = root / f"{split}.json"
    problems: list[str] = []
    triplets = []
    for index, entry in enumerate(_read_list(path)):
        where = f"entry {index}"
        if not isinstance(entry, dict):
            problems.append(f"{where}: expected an object, given {type(entry).__name__}")
            continue
        unknown = set(entry) - {"reference", "caption", "target", "change", "query_id"}
        problems += [
            f"{where}: unknown key {key!r}.{nearest(key, ('reference', 'caption', 'target', 'change', 'query_id'))}"
            for key in sorted(unknown)
        ]
        targets = entry.get("target")
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(entry.get("reference"), str) or not isinstance(entry.get("caption"), str):
            problems.append(f"{where}: needs the texts 'reference' and 'caption'")
        elif not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
            problems.append(f"{where}: needs 'target', an image name or a list of names")
        else:
            missing = [name for name in (entry["reference"], *targets) if name not in known]
            problems += [f"{where}: no image {name!r} below {root / 'images'}" for name in missing]
            query_id = str(entry.get("query_id", f"{split}-{index}"))
            triplets.append(
                Triplet(query_id, entry["reference"], entry["caption"], tuple(targets), str(entry.get("change", "")))
            )
    if problems:
        listed = first_few(problems, 10, "\n  ")
        raise DataError(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n  {listed}")
    return triplets, _gallery(root / f"gallery.{split}.json", known)


def _gallery(path: Path, known: dict[str, Path]) -> Gallery:
    if not path.exists():
        return Gallery(tuple(known), tuple(known.values()))
    names = _read_list(path)
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(f"{path}: names {len(missing)} images that do not exist, such as {missing[0]!r}")
    return Gallery(tuple(names), tuple(known[name] for name in names))


def _read_list(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file. Splits found: {', '.join(splits(path.parent))}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list, given {type(value).__name__}")
    return value
