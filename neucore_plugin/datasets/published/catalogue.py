"""The published data sets behind one interface: is everything in place, and what is not. No host, no model.

A reader is a module with NAME, TITLE, CREDIT, ROOT_VARIABLE, SPLITS, WITH_TARGETS, annotations(split), read(root,
split), sources(root) and image_folder(root, split).
"""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import ConfigError, DataError, nearest
from neucore_plugin.datasets.protocols import PRESETS
from neucore_plugin.datasets.published import circo, cirr, fashion200k, fashioniq, shoes
from neucore_plugin.datasets.triplets import Gallery, Triplet

READERS: dict[str, Any] = {module.NAME: module for module in (cirr, fashioniq, shoes, fashion200k, circo)}
Splits = dict[str, tuple[list[Triplet], Gallery]]


def reader(name: str) -> Any:
    """The reader of a data set; ConfigError names the nearest one."""
    if name not in READERS:
        raise ConfigError(f"{name!r} is no published data set.{nearest(name, READERS)}")
    return READERS[name]


def absent_images(paths: Iterable[Path]) -> list[Path]:
    """The paths without a file. A folder is listed once: asking for each file takes minutes on a network drive."""
    listed: dict[Path, set[str]] = {}
    absent = []
    for path in paths:
        if path.parent not in listed:
            listed[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in listed[path.parent]:
            absent.append(path)
    return absent


def missing_annotations(name: str, root: str | Path, splits: Sequence[str]) -> list[str]:
    """Annotation files that `splits` lack below `root`, none twice."""
    files = dict.fromkeys(str(Path(root) / file) for split in splits for file in READERS[name].annotations(split))
    return [file for file in files if not Path(file).is_file()]


def missing_images(name: str, root: str | Path, galleries: Mapping[str, Gallery]) -> list[str]:
    """A line a split whose gallery lacks image files: where they belong, how many, and a few of them."""
    lines = []
    for split, gallery in galleries.items():
        if absent := absent_images(gallery.paths):
            names = ", ".join(os.path.relpath(path, root) for path in absent[:3])
            place = READERS[name].image_folder(root, split)
            lines.append(f"{place}: {len(absent):,} of {len(gallery.ids):,} images of {split}, such as {names}")
    return lines


def locate(name: str, root: str | Path | None, splits: Sequence[str], need_images: bool = True) -> tuple[Path, Splits]:
    """The root folder (`root`, else the data set's environment variable) and the content of its `splits`.

    Raises one ConfigError with everything that is missing, where each part belongs and where it comes from; DataError
    where an annotation file is damaged. `need_images` False: only annotations must be there.
    """
    module = READERS[name]
    given = root or os.environ.get(module.ROOT_VARIABLE)
    where = Path(given or "ROOT").expanduser()
    lines = missing_annotations(name, where, splits)
    found: Splits = {}
    if given:
        named_by = f"datasets.{name}.build_info.root" if root else f"the environment variable {module.ROOT_VARIABLE}"
        head = f"{module.TITLE} is not complete below {where} (given by {named_by}); missing:"
        found = {s: module.read(where, s) for s in splits if not missing_annotations(name, where, [s])}
        if need_images:
            lines += missing_images(name, where, {split: gallery for split, (_, gallery) in found.items()})
        if not lines:
            return where, found
    else:
        head = (
            f"datasets.{name}.build_info.root is null and the environment variable {module.ROOT_VARIABLE} is not set. "
            f"Give the root folder of {module.TITLE} by one of them, as in --options datasets.{name}.build_info.root="
            "ROOT; it must hold:"
        )
    if need_images:
        unread = [split for split in splits if split not in found]
        places = dict.fromkeys(
            module.image_folder(where, split) for split in unread if not given or _lacks(where, name, split)
        )
        lines += [f"{place}: the images of {_of(module, where, unread, place)}" for place in places]
    raise ConfigError("\n  ".join([head, *(f"- {line}" for line in lines), *module.sources(where).splitlines()]))


def _lacks(where: Path, name: str, split: str) -> bool:
    folder = READERS[name].image_folder(where, split)
    return not Path(folder).is_dir()


def _of(module: Any, where: Path, splits: Sequence[str], place: str) -> str:
    return ", ".join(split for split in splits if module.image_folder(where, split) == place)


def without_absent(name: str, splits: Splits) -> tuple[Splits, dict[str, dict[str, Any]]]:
    """The splits without images that have no file and the queries that need one, and {split: what was left out}.

    A query needs its reference and a right answer; where R@K counts the target alone, the target. Absent images also
    leave its answers, its graded answers and its group.
    """
    target_alone = any(protocol.precision_at for protocol in PRESETS[name].values())
    kept, left_out = {}, {}
    for split, (triplets, gallery) in splits.items():
        absent = {str(path) for path in absent_images(gallery.paths)}
        images = list(zip(gallery.ids, gallery.paths, strict=True))
        gone = {image for image, path in images if str(path) in absent}
        asked = [found for triplet in triplets if (found := _without(triplet, gone, target_alone)) is not None]
        there = [(image, path) for image, path in images if image not in gone]
        kept[split] = (asked, Gallery(tuple(image for image, _ in there), tuple(path for _, path in there)))
        left_out[split] = {
            "missing_images": len(absent),
            "skipped_queries": len(triplets) - len(asked),
            "files": sorted(absent),
        }
        if absent and not asked:
            raise DataError(f"split {split!r}: every query needs an image that is missing; fetch the images")
    return kept, left_out


def _without(triplet: Triplet, gone: Container[str], target_alone: bool) -> Triplet | None:
    """The triplet without the images `gone`; None where it can no longer be asked or answered."""
    targets = tuple(image for image in triplet.targets if image not in gone)
    if triplet.reference in gone or (triplet.targets and not targets):
        return None
    if targets != triplet.targets:
        answerable = any(image != triplet.reference for image in targets)
        if not answerable or (target_alone and targets[0] != triplet.targets[0]):
            return None
    soft = tuple((image, weight) for image, weight in triplet.soft if image not in gone)
    members = tuple(image for image in triplet.members if image not in gone)
    return replace(triplet, targets=targets, soft=soft, members=members)


def check(name: str, root: str | Path | None = None) -> dict[str, Any]:
    """Is the data set in place? Counts of every split, and what is missing. No image is opened, no model needed.

    Returns {"name", "title", "root", "complete", "splits": {split: {"annotations_missing": [...], "error": text or
    None, "queries", "gallery", "images_missing", "missing_examples": [...], "image_folder"}}, "sources"}. Raises
    ConfigError where no root is given.
    """
    module = reader(name)
    given = root or os.environ.get(module.ROOT_VARIABLE)
    if not given:
        raise ConfigError(f"no root folder: give --root, or set the environment variable {module.ROOT_VARIABLE}")
    where = Path(given).expanduser()
    report: dict[str, Any] = {"name": name, "title": module.TITLE, "root": str(where), "splits": {}}
    for split in module.SPLITS:
        lacking = missing_annotations(name, where, [split])
        row: dict[str, Any] = {
            "annotations_missing": lacking,
            "error": None,
            "image_folder": module.image_folder(where, split),
        }
        if not lacking:
            try:
                triplets, gallery = module.read(where, split)
                absent = absent_images(gallery.paths)
                row |= {"queries": len(triplets), "gallery": len(gallery.ids), "images_missing": len(absent)}
                row["missing_examples"] = [os.path.relpath(path, where) for path in absent[:3]]
            except DataError as error:
                row["error"] = str(error)
        report["splits"][split] = row
    rows = report["splits"].values()
    report["complete"] = all(not r["annotations_missing"] and not r["error"] and not r["images_missing"] for r in rows)
    report["sources"] = module.sources(where)
    return report
