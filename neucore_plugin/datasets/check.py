"""Is a data set in place? The checks of training and evaluation without a model, and counts. No host, no model."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from neucore_plugin.common.errors import ConfigError, DataError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.common.images import MAX_PIXELS, check_images
from neucore_plugin.config.published import PRESETS
from neucore_plugin.datasets import folder, protocols
from neucore_plugin.datasets.annotations import read_json, read_lines
from neucore_plugin.datasets.published import catalogue
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet

Content = tuple[list[Triplet], Gallery]
Found = tuple[dict[str, dict[str, Any]], dict[str, Content], dict[str, Path]]
CHECKED = (*catalogue.READERS, "folder")


def check(
    name: str, root: str | Path | None = None, open_images: bool = False, max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """Counts of every split, what is missing or wrong, and what training and evaluation would tell, as they build the
    same data sets. No image is opened, unless `open_images`: then every one is decoded that has no more
    than `max_pixels`.

    Returns {"name", "title", "root", "complete", "splits": {split: row}, "sources"}. A row: "annotations_missing" (a
    list), "error" (text or None), "notices" (texts), "image_folder"; where they are known "queries", "gallery",
    "images_missing", "missing_examples", "skipped_queries" (by `missing: skip`); with `open_images` also
    "images_unreadable" and "unreadable" (a reason each). Raises ConfigError where the name is unknown or no root is
    given, DataError where it is no folder, or that of one's own data is no data set.
    """
    if name not in CHECKED:
        raise ConfigError(f"{name!r} is no data set that can be checked.{nearest(name, CHECKED)}")
    reader = catalogue.READERS.get(name)
    given = root or (os.environ.get(reader.root_variable) if reader else None)
    if not given:
        variable = f", or set the environment variable {reader.root_variable}" if reader else ""
        raise ConfigError(f"no root folder: give --root{variable}")
    where = expanded(given)
    if not where.is_dir() and (where.exists() or not reader):
        raise DataError(f"{where}: is no folder; give the root folder of the data set")
    rows, found, images = _published(reader, where) if reader else _folder(where)
    absent = set(catalogue.absent_images(images.values()))
    there = [path for path in images.values() if path not in absent]
    unreadable = dict(check_images(there, SimpleNamespace(max_pixels=max_pixels))) if open_images else {}
    for split, content in found.items():
        rows[split] |= _build(name, split, content, ImageStore(images, str))
        if open_images:
            rows[split] |= _unreadable(content, images, unreadable)
        if reader and (absent or unreadable):
            rows[split]["skipped_queries"] = _skipped(name, split, content, absent, unreadable)
    bad = ("error", "annotations_missing", "images_missing", "images_unreadable")
    return {
        "name": name,
        "title": reader.title if reader else folder.TITLE,
        "root": str(where),
        "splits": rows,
        "complete": not any(row.get(key) for row in rows.values() for key in bad),
        "sources": reader.sources(where) if reader else (folder.__doc__ or "").strip(),
    }


def _published(reader: Reader, root: Path) -> Found:
    """A row for every split, the splits that could be read, and their images."""
    rows, found = {}, {}
    for split in reader.splits:
        missing = catalogue.missing_annotations(reader, root, [split])
        row = rows[split] = _row(missing, reader.image_folder(root, split))
        try:
            if missing:
                row |= _count(reader, root, split)
                continue
            triplets, gallery = found[split] = reader.read(root, split)
            absent = catalogue.absent_images(gallery.paths)
            row |= {"queries": len(triplets), "gallery": len(gallery.ids), "images_missing": len(absent)}
            row["missing_examples"] = [os.path.relpath(path, root) for path in absent[:3]]
        except DataError as error:
            row["error"] = str(error)
    return rows, found, {image: path for _, gallery in found.values() for image, path in gallery.files.items()}


def _folder(root: Path) -> Found:
    """The same of one's own data."""
    known, rows, found = folder.images(root), {}, {}
    for split in folder.splits(root):
        row = rows[split] = _row([], str(root / "images"))
        try:
            triplets, gallery = found[split] = folder.load_split(root, split, known)
            row |= {"queries": len(triplets), "gallery": len(gallery.ids), "images_missing": 0}
        except DataError as error:
            row["error"] = str(error)
    return rows, found, known


def _row(missing: list[str], images: str) -> dict[str, Any]:
    return {"annotations_missing": missing, "error": None, "notices": [], "image_folder": images}


def _count(reader: Reader, root: Path, split: str) -> dict[str, int]:
    """The number of queries where their own files are there, though others are not."""
    files = [reader.annotation(root, file) for file in reader.queries(split)]
    if not files or not all(file.is_file() for file in files):
        return {}
    texts = (file.suffix != ".json" for file in files)
    return {
        "queries": sum(
            len(read_lines(file, reader.title) if text else read_json(file, list, reader.title))
            for file, text in zip(files, texts, strict=True)
        )
    }


def _build(name: str, split: str, content: Content, images: ImageStore) -> dict[str, Any]:
    """Make the data sets of a split as a run would, with every preset: what that tells, or the error."""
    try:
        made = protocols.build(name, split, content, images, protocols.presets(name, list(PRESETS.get(name, ()))))
    except DataError as error:
        return {"error": str(error)}
    several = len(made) > 1
    return {
        "notices": [
            f"{notice} ({dataset.protocol.name})" if several else notice
            for dataset in made.values()
            for notice in dataset.notices
        ]
    }


def _unreadable(content: Content, images: dict[str, Path], failures: dict[Path, str]) -> dict[str, Any]:
    """How many images of a split cannot be decoded, and why the first ones cannot."""
    triplets, gallery = content
    named = {*gallery.ids, *(name for t in triplets for name in (t.reference, *t.targets))}
    reasons = [failures[path] for name, path in images.items() if name in named and path in failures]
    return {"images_unreadable": len(reasons), "unreadable": reasons[:3]}


def _skipped(name: str, split: str, content: Content, absent: set[Path], unreadable: dict[Path, str]) -> int:
    """How many queries `missing: skip` leaves out."""
    try:
        counts = catalogue.without(name, {split: content}, absent, unreadable)[1].get(split, {})
    except DataError:  # nothing is left
        return len(content[0])
    return counts.get("skipped_queries", 0)
