"""The published data sets behind one interface: what is missing, and what is left without it. No host, no model."""

import os
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import expanded
from neucore_plugin.common.names import Listing
from neucore_plugin.config.published import PRESETS
from neucore_plugin.datasets.feature_maps import check_files, map_file
from neucore_plugin.datasets.published import cirr
from neucore_plugin.datasets.published.circo import CIRCO
from neucore_plugin.datasets.published.cirr import CIRR
from neucore_plugin.datasets.published.fashion200k import FASHION200K
from neucore_plugin.datasets.published.fashioniq import FASHIONIQ
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.published.shoes import SHOES
from neucore_plugin.datasets.triplets import Gallery, Triplet

READERS: dict[str, Reader] = {reader.name: reader for reader in (CIRR, FASHIONIQ, SHOES, FASHION200K, CIRCO)}
Splits = dict[str, tuple[list[Triplet], Gallery]]
ProcessorOf = Callable[[str], Any]


def load(
    name: str,
    root: str | Path | None,
    splits: Sequence[str],
    missing: str = "error",
    processor_of: ProcessorOf = lambda split: None,
    features: str | None = None,
) -> tuple[Path, Splits, dict[str, dict[str, Any]]]:
    """The root folder (`root`, else the data set's environment variable), the content of its `splits`, and by split
    what missing images cost.

    missing: images without a file are an "error"; "skip": they and those that cannot be read are left out, with the
        queries that need them; "ignore": not looked for, as only annotations are wanted.
    processor_of: the image processor of a split, which says what can be read.
    features: folder below the root of feature maps, which are then meant by images: the tree of the images.
    Raises one ConfigError with everything that is missing, where each part belongs and where it comes from; DataError
    where an annotation file is damaged.
    """
    reader = READERS[name]
    for split in splits:
        reader.check_split(split)
    given = root or os.environ.get(reader.root_variable)
    where = expanded(given or "ROOT")
    lines = missing_annotations(reader, where, splits)
    found: Splits = {}
    if given:
        named_by = f"datasets.{name}.build_info.root" if root else f"the environment variable {reader.root_variable}"
        head = f"{reader.title} is not complete below {where} (given by {named_by}); missing:"
        found = {s: reader.read(where, s) for s in splits if not missing_annotations(reader, where, [s])}
        if features:
            found = {s: (asked, _mapped(where, features, gallery)) for s, (asked, gallery) in found.items()}
    else:
        head = (
            f"datasets.{name}.build_info.root is null and the environment variable {reader.root_variable} is not set. "
            f"Give the root folder of {reader.title} by one of them, as in --options datasets.{name}.build_info.root="
            "ROOT; it must hold:"
        )
    if missing == "error":
        for split, (_, gallery) in found.items():
            place = str(where / features) if features else reader.image_folder(where, split)
            if absent := absent_images(gallery.paths):
                names = ", ".join(os.path.relpath(path, where) for path in absent[:3])
                lines.append(f"{place}: {len(absent):,} of {len(gallery.ids):,} images of {split}, such as {names}")
        places: dict[str, list[str]] = {}  # of splits whose galleries are not known
        for split in splits:
            place = str(where / features) if features else reader.image_folder(where, split)
            if split not in found and not (given and Path(place).is_dir()):
                places.setdefault(place, []).append(split)
        lines += [f"{place}: the images of {', '.join(of)}" for place, of in places.items()]
    if lines or not given:
        raise ConfigError("\n  ".join([head, *(f"- {line}" for line in lines), *reader.sources(where).splitlines()]))
    return where, *(skip_bad(name, found, processor_of) if missing == "skip" else (found, {}))


def _mapped(root: Path, features: str, gallery: Gallery) -> Gallery:
    """The gallery of the pictures' feature maps."""
    folder, bases = root / features, [root / base for base in cirr.IMAGES]
    files = {}
    for name, path in gallery.files.items():
        base = next(base for base in bases if path.is_relative_to(base))
        files[name] = map_file(folder / path.relative_to(base))
    return Gallery.of(files)


def missing_annotations(reader: Reader, root: Path, splits: Sequence[str]) -> list[str]:
    """Annotation files that `splits` lack below `root`, none twice."""
    files = dict.fromkeys(reader.annotation(root, file) for split in splits for file in reader.files(split))
    return [str(file) for file in files if not file.is_file()]


def absent_images(paths: Iterable[Path]) -> list[Path]:
    """The paths without a file."""
    there = Listing()
    return [path for path in paths if path not in there]


def skip_bad(
    name: str, splits: Splits, processor_of: ProcessorOf = lambda split: None
) -> tuple[Splits, dict[str, dict[str, Any]]]:
    """The splits without images that have no file or that the split's image processor cannot read, and without the
    queries that need one; what that costs: see `without`. Every image is read."""
    kept, left_out = {}, {}
    for split, content in splits.items():
        paths = content[1].paths
        absent = set(absent_images(path for path in paths if isinstance(path, Path)))  # an image of a shard is there
        there = [path for path in paths if path not in absent]
        failures = distributed.on_main(lambda there=there, split=split: check_files(there, processor_of(split)))
        found, costs = without(name, {split: content}, absent, [path for path, _ in failures])
        kept |= found
        left_out |= costs
    return kept, left_out


def without(
    name: str, splits: Splits, absent: Collection[Any], unreadable: Collection[Any] = ()
) -> tuple[Splits, dict[str, dict[str, Any]]]:
    """The splits without these image files and the queries that need one; for those that lack some, {split:
    {"missing_images", "unreadable_images", "skipped_queries", "files"}}.

    A query needs its reference and a right answer; where R@K counts the target alone, the target. Bad images also
    leave its answers, its graded answers and its group. Raises DataError where nothing is left.
    """
    target_alone = any(protocol.precision_at for protocol in PRESETS.get(name, {}).values())
    absent, unreadable = set(absent), set(unreadable)
    kept, left_out = dict(splits), {}
    for split, (triplets, gallery) in splits.items():
        bad = [(image, path) for image, path in gallery.files.items() if path in absent or path in unreadable]
        if not bad:
            continue
        missing = {image for image, _ in bad}
        asked = [found for triplet in triplets if (found := _without(triplet, missing, target_alone)) is not None]
        if not asked:
            raise DataError(
                f"split {split!r}: every query needs an image that is missing or cannot be read; fetch the images"
            )
        there = {image: path for image, path in gallery.files.items() if image not in missing}
        kept[split] = asked, Gallery.of(there)
        left_out[split] = {
            "missing_images": sum(path in absent for _, path in bad),
            "unreadable_images": sum(path in unreadable for _, path in bad),
            "skipped_queries": len(triplets) - len(asked),
            "files": sorted(str(path) for _, path in bad),
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
