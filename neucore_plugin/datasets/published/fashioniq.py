"""FashionIQ (Wu et al., CVPR 2021) as it is published: dresses, shirts and tops with two captions a pair.

root/captions/cap.{category}.{split}.json        [{"target": asin, "candidate": asin, "captions": [text, text]}, ...]
root/image_splits/split.{category}.{split}.json  [asin, ...]: the gallery of the category
root/images/                                     {asin}.jpg or .png, all in one folder or in one a category

The candidate is the reference. The public test files have no target. `train` is the three categories together;
evaluation is per category, then the mean (see the presets of `datasets/protocols.py`). Some pairs have one empty
caption; some val images belong to two categories.
"""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.datasets.published.annotations import read_json, refuse, safe_name
from neucore_plugin.datasets.triplets import Gallery, Triplet

NAME, TITLE = "fashioniq", "FashionIQ"
CREDIT = "FashionIQ (Wu et al., CVPR 2021); pictures: their sellers on Amazon"
ROOT_VARIABLE = "NEUCORE_FASHIONIQ_ROOT"
CATEGORIES = ("dress", "shirt", "toptee")
PARTS = {f"{part}_{category}": (part, category) for part in ("train", "val", "test") for category in CATEGORIES}
WITH_TARGETS = ("train", *(split for split in PARTS if not split.startswith("test")))
SPLITS = ("train", *PARTS)
SUFFIXES = (".jpg", ".png", ".jpeg")


def sources(root: str | Path) -> str:
    """What to fetch, from where, and where it belongs."""
    return f"""\
the annotations (captions/ and image_splits/) are in the repository
    https://github.com/XiaoxiaoGuo/fashion-iq: put both folders below {root}
the images are named by the lists of URLs of
    https://github.com/hongwang600/fashion-iq-metadata; many can no longer be had
    put them into {Path(root) / "images"}, as ASIN.jpg or ASIN.png, with or without a folder a category
(then missing=skip evaluates what is there, and says how much that is)"""


def annotations(split: str) -> tuple[str, ...]:
    """Files that a split needs, below the root."""
    parts = [PARTS[split]] if split in PARTS else [("train", category) for category in CATEGORIES]
    return tuple(
        f"{folder}.{category}.{part}.json"
        for part, category in parts
        for folder in ("captions/cap", "image_splits/split")
    )


def image_folder(root: str | Path, split: str) -> str:
    """Where the images of a split belong."""
    return str(Path(root) / "images")


def read(root: str | Path, split: str) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of a split: "train", or a category's such as "val_dress".

    Images need not exist. Raises DataError listing every problem by file and entry.
    """
    if split not in SPLITS:
        raise DataError(f"{TITLE} has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(root).expanduser()
    problems: list[str] = []
    triplets: list[Triplet] = []
    names: dict[str, str] = {}  # image: the category it was first listed in
    for part, category in [PARTS[split]] if split in PARTS else [("train", category) for category in CATEGORIES]:
        own = _read_names(root, part, category, problems)
        for name in own:
            names.setdefault(name, category)
        triplets += _read_pairs(root, part, category, set(own), problems)
    refuse(root, split, problems)
    files = _files(root / "images")
    paths = tuple(files.get((name, names[name])) or files.get((name, "")) or _any(files, name, root) for name in names)
    return triplets, Gallery(tuple(names), paths)


def _any(files: dict[tuple[str, str], Path], name: str, root: Path) -> Path:
    """The file of an image that another category's folder holds, else the place where it belongs."""
    held = [files[name, category] for category in CATEGORIES if (name, category) in files]
    return held[0] if held else root / "images" / f"{name}.jpg"


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    """{(image, category or ""): file}; each folder is listed once."""
    files: dict[tuple[str, str], Path] = {}
    for category in ("", *CATEGORIES):
        place = folder / category
        if place.is_dir():
            listed = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
            for path in sorted(listed, key=lambda path: SUFFIXES.index(path.suffix.lower())):
                files.setdefault((path.stem, category), path)
    return files


def _read_names(root: Path, part: str, category: str, problems: list[str]) -> list[str]:
    file = f"image_splits/split.{category}.{part}.json"
    names = read_json(root / file, list, TITLE)
    good = []
    for index, name in enumerate(names):
        if not safe_name(name) or "/" in name:
            problems.append(f"{file}: entry {index}: expected an image name, given {name!r}")
        else:
            good.append(name)
    return list(dict.fromkeys(good))


def _read_pairs(root: Path, part: str, category: str, known: Container[str], problems: list[str]) -> list[Triplet]:
    file = f"captions/cap.{category}.{part}.json"
    triplets = []
    for index, entry in enumerate(read_json(root / file, list, TITLE)):
        wrong = list(_problems(entry, part, known))
        problems += [f"{file}: entry {index}: {text}" for text in wrong]
        if not wrong:
            captions = tuple(text for text in (" ".join(text.split()) for text in entry["captions"]) if text)
            targets = () if part == "test" else (entry["target"],)
            query = f"{category}-{part}-{index}"
            triplets.append(
                Triplet(query, entry["candidate"], " and ".join(captions), targets, category, captions=captions)
            )
    return triplets


def _problems(entry: Any, part: str, known: Container[str]) -> Iterable[str]:
    if not isinstance(entry, dict):
        yield f"expected an object, given {type(entry).__name__}"
        return
    for key in ("candidate",) if part == "test" else ("candidate", "target"):
        name = entry.get(key)
        if not isinstance(name, str):
            yield f"needs the text {key!r}"
        elif name not in known:
            yield f"{key} {name!r} is not in the image list of the split"
    captions = entry.get("captions")
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        yield f"needs 'captions', a list of texts, given {captions!r}"
