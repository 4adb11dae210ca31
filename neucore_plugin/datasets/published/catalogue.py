"""The published data sets behind one interface: is everything in place, and what is not. No host, no model."""

import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import ConfigError, DataError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.common.names import Listing
from neucore_plugin.config.published import PRESETS
from neucore_plugin.datasets.published.circo import CIRCO
from neucore_plugin.datasets.published.cirr import CIRR
from neucore_plugin.datasets.published.fashion200k import FASHION200K
from neucore_plugin.datasets.published.fashioniq import FASHIONIQ
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.published.shoes import SHOES
from neucore_plugin.datasets.triplets import Gallery, Triplet

READERS: dict[str, Reader] = {reader.name: reader for reader in (CIRR, FASHIONIQ, SHOES, FASHION200K, CIRCO)}
Splits = dict[str, tuple[list[Triplet], Gallery]]


def load(
    name: str, root: str | Path | None, splits: Sequence[str], missing: str = "error"
) -> tuple[Path, Splits, dict[str, dict[str, Any]]]:
    """The root folder (`root`, else the data set's environment variable), the content of its `splits`, and by split
    what missing images cost.

    missing: images without a file are an "error"; "skip": left out with the queries that need them; "ignore": not
        looked for, as only annotations are wanted.
    Raises one ConfigError with everything that is missing, where each part belongs and where it comes from; DataError
    where an annotation file is damaged.
    """
    reader = READERS[name]
    for split in splits:
        reader.check_split(split)
    given = root or os.environ.get(reader.root_variable)
    where = expanded(given or "ROOT")
    lines = _missing_annotations(reader, where, splits)
    found: Splits = {}
    if given:
        named_by = f"datasets.{name}.build_info.root" if root else f"the environment variable {reader.root_variable}"
        head = f"{reader.title} is not complete below {where} (given by {named_by}); missing:"
        found = {s: reader.read(where, s) for s in splits if not _missing_annotations(reader, where, [s])}
    else:
        head = (
            f"datasets.{name}.build_info.root is null and the environment variable {reader.root_variable} is not set. "
            f"Give the root folder of {reader.title} by one of them, as in --options datasets.{name}.build_info.root="
            "ROOT; it must hold:"
        )
    if missing == "error":
        for split, (_, gallery) in found.items():
            place = reader.image_folder(where, split)
            if absent := absent_images(gallery.paths):
                names = ", ".join(os.path.relpath(path, where) for path in absent[:3])
                lines.append(f"{place}: {len(absent):,} of {len(gallery.ids):,} images of {split}, such as {names}")
        places: dict[str, list[str]] = {}  # of splits whose galleries are not known
        for split in splits:
            place = reader.image_folder(where, split)
            if split not in found and not (given and Path(place).is_dir()):
                places.setdefault(place, []).append(split)
        lines += [f"{place}: the images of {', '.join(of)}" for place, of in places.items()]
    if lines or not given:
        raise ConfigError("\n  ".join([head, *(f"- {line}" for line in lines), *reader.sources(where).splitlines()]))
    return where, *(_without_absent(name, found) if missing == "skip" else (found, {}))


def _missing_annotations(reader: Reader, root: Path, splits: Sequence[str]) -> list[str]:
    """Annotation files that `splits` lack below `root`, none twice."""
    files = dict.fromkeys(reader.annotation(root, file) for split in splits for file in reader.files(split))
    return [str(file) for file in files if not file.is_file()]


def absent_images(paths: Iterable[Path]) -> list[Path]:
    """The paths without a file."""
    there = Listing()
    return [path for path in paths if path not in there]


def _without_absent(name: str, splits: Splits) -> tuple[Splits, dict[str, dict[str, Any]]]:
    """The splits without images that have no file and the queries that need one; for those that lack some, {split:
    {"missing_images", "skipped_queries", "files"}}.

    A query needs its reference and a right answer; where R@K counts the target alone, the target. Absent images also
    leave its answers, its graded answers and its group.
    """
    target_alone = any(protocol.precision_at for protocol in PRESETS[name].values())
    kept, left_out = dict(splits), {}
    for split, (triplets, gallery) in splits.items():
        if not (absent := set(absent_images(gallery.paths))):
            continue
        there = {image: path for image, path in gallery.files.items() if path not in absent}
        missing = gallery.files.keys() - there
        asked = [found for triplet in triplets if (found := _without(triplet, missing, target_alone)) is not None]
        if not asked:
            raise DataError(f"split {split!r}: every query needs an image that is missing; fetch the images")
        kept[split] = asked, Gallery.of(there)
        left_out[split] = {
            "missing_images": len(absent),
            "skipped_queries": len(triplets) - len(asked),
            "files": sorted(map(str, absent)),
        }
    return kept, left_out


def _without(triplet: Triplet, missing: Container[str], target_alone: bool) -> Triplet | None:
    """The triplet without the images `missing`; None where it can no longer be asked or answered."""
    targets = tuple(image for image in triplet.targets if image not in missing)
    if triplet.reference in missing or (triplet.targets and not targets):
        return None
    if targets != triplet.targets:
        answerable = any(image != triplet.reference for image in targets)
        if not answerable or (target_alone and targets[0] != triplet.targets[0]):
            return None
    soft = tuple((image, weight) for image, weight in triplet.soft if image not in missing)
    members = tuple(image for image in triplet.members if image not in missing)
    return replace(triplet, targets=targets, soft=soft, members=members)


def check(name: str, root: str | Path | None = None) -> dict[str, Any]:
    """Is the data set in place? Counts of every split, and what is missing. No image is opened, no model needed.

    Returns {"name", "title", "root", "complete", "splits": {split: {"annotations_missing": [...], "error": text or
    None, "queries", "gallery", "images_missing", "missing_examples": [...], "image_folder"}}, "sources"}. Raises
    ConfigError where the name is unknown or no root is given.
    """
    if name not in READERS:
        raise ConfigError(f"{name!r} is no published data set.{nearest(name, READERS)}")
    reader = READERS[name]
    given = root or os.environ.get(reader.root_variable)
    if not given:
        raise ConfigError(f"no root folder: give --root, or set the environment variable {reader.root_variable}")
    where = expanded(given)
    rows = {}
    for split in reader.splits:
        row: dict[str, Any] = {
            "annotations_missing": _missing_annotations(reader, where, [split]),
            "error": None,
            "image_folder": reader.image_folder(where, split),
        }
        if not row["annotations_missing"]:
            try:
                triplets, gallery = reader.read(where, split)
                absent = absent_images(gallery.paths)
                row |= {"queries": len(triplets), "gallery": len(gallery.ids), "images_missing": len(absent)}
                row["missing_examples"] = [os.path.relpath(path, where) for path in absent[:3]]
            except DataError as error:
                row["error"] = str(error)
        rows[split] = row
    return {
        "name": name,
        "title": reader.title,
        "root": str(where),
        "splits": rows,
        "complete": all(row.get("images_missing") == 0 for row in rows.values()),
        "sources": reader.sources(where),
    }
