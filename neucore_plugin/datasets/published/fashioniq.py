"""FashionIQ (Wu et al., CVPR 2021) as it is published: dresses, shirts and tops with two captions a pair.

root/captions/cap.{category}.{split}.json        [{"target": asin, "candidate": asin, "captions": [text, text]}, ...]
root/image_splits/split.{category}.{split}.json  [asin, ...]: the gallery of the category
root/images/                                     {asin}.jpg or .png, all in one folder or in one a category

The candidate is the reference. The public test files have no target. `train` is the three categories together;
evaluation is per category, then the mean (see the presets of `config/published.py`). Some pairs have one empty
caption; some val images belong to two categories.
"""

from collections.abc import Container, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from neucore_plugin.common.images import image_suffixes, is_hidden
from neucore_plugin.config.published import FASHIONIQ_CATEGORIES as CATEGORIES
from neucore_plugin.datasets.annotations import good_entries, read_json, safe_name
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Triplet

PREFERRED = (".jpg", ".png", ".jpeg")  # of the files of one image; then others that Pillow reads, by name


def _parts(split: str) -> list[tuple[str, str]]:
    """(part, category) of a split: "val_dress" is one, "train" is three."""
    part, _, category = split.partition("_")
    return [(part, name) for name in ((category,) if category else CATEGORIES)]


def _files(split: str) -> tuple[str, ...]:
    return tuple(file for part, category in _parts(split) for file in _files_of(part, category))


def _files_of(part: str, category: str) -> tuple[str, str]:
    return f"captions/cap.{category}.{part}.json", f"image_splits/split.{category}.{part}.json"


def _parse(root: Path, split: str, problems: list[str]) -> tuple[list[Triplet], dict[str, Path]]:
    triplets: list[Triplet] = []
    listed_in: dict[str, str] = {}  # image: the category it was first listed in
    for part, category in _parts(split):
        own = _read_names(root, part, category, problems)
        for name in own:
            listed_in.setdefault(name, category)
        triplets += _read_pairs(root, part, category, own, problems)
    files = _pictures(root / "images")
    return triplets, {
        name: files.get((name, category)) or files.get((name, "")) or _elsewhere(files, name, root)
        for name, category in listed_in.items()
    }


def _elsewhere(files: dict[tuple[str, str], Path], name: str, root: Path) -> Path:
    """The file of an image that another category's folder holds, else the place where it belongs."""
    found = (files[name, category] for category in CATEGORIES if (name, category) in files)
    return next(found, root / "images" / f"{name}.jpg")


def _pictures(folder: Path) -> dict[tuple[str, str], Path]:
    """{(image, category or ""): file}; each folder is listed once."""
    files: dict[tuple[str, str], Path] = {}
    suffixes, order = image_suffixes(), {suffix: place for place, suffix in enumerate(PREFERRED)}
    for category in ("", *CATEGORIES):
        place = folder / category
        if place.is_dir():
            listed = [path for path in place.iterdir() if path.suffix.lower() in suffixes and not is_hidden(path.name)]
            for path in sorted(listed, key=lambda path: (order.get(path.suffix.lower(), len(order)), path)):
                files.setdefault((path.stem, category), path)
    return files


def _read_names(root: Path, part: str, category: str, problems: list[str]) -> dict[str, None]:
    """The image names of a category's list, each once, in its order."""
    file = _files_of(part, category)[1]
    names = read_json(root / file, list, FASHIONIQ.title)
    good = [safe_name(name, folders=False) for name in names]
    problems += [
        f"{file}: entry {index}: expected an image name, given {name!r}"
        for index, name in enumerate(names)
        if not good[index]
    ]
    return dict.fromkeys(name for name, fine in zip(names, good, strict=True) if fine)


def _read_pairs(root: Path, part: str, category: str, known: Container[str], problems: list[str]) -> list[Triplet]:
    file = _files_of(part, category)[0]
    keys = ("candidate",) if part == "test" else ("candidate", "target")
    triplets = []
    entries = read_json(root / file, list, FASHIONIQ.title)
    for index, entry in good_entries(entries, file, partial(_faults, keys=keys, known=known), problems):
        captions = tuple(entry["captions"])  # as they are: an empty one counts, and the released form reads raw ones
        reference, *targets = (entry[key] for key in keys)
        query = f"{category}-{part}-{index}"
        caption = " and ".join(filter(None, map(str.strip, captions)))
        triplets.append(Triplet(query, reference, caption, tuple(targets), category, captions=captions))
    return triplets


def _faults(entry: dict[str, Any], keys: tuple[str, ...], known: Container[str]) -> Iterable[str]:
    for key in keys:
        name = entry.get(key)
        if not isinstance(name, str):
            yield f"needs the text {key!r}"
        elif name not in known:
            yield f"{key} {name!r} is not in the image list of the split"
    captions = entry.get("captions")
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        yield f"needs 'captions', a list of texts, given {captions!r}"


FASHIONIQ = Reader(
    name="fashioniq",
    title="FashionIQ",
    credit="FashionIQ (Wu et al., CVPR 2021); pictures: their sellers on Amazon",
    files=_files,
    images=lambda split: ("images",),
    parse=_parse,
    where_from="""\
the annotations (captions/ and image_splits/) are in the repository
    https://github.com/XiaoxiaoGuo/fashion-iq: put both folders below {root}
the images are named by the lists of URLs of
    https://github.com/hongwang600/fashion-iq-metadata; 74,381 of 77,684 could still be had when this was written
    put them into {root}/images, as ASIN.jpg or ASIN.png, with or without a folder a category
(then missing=skip evaluates what is there, and says how much that is)""",
    queries=lambda split: tuple(_files_of(part, category)[0] for part, category in _parts(split)),
)
