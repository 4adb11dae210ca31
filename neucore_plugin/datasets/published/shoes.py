"""Shoes (Guo et al., NeurIPS 2018; pictures of Berg et al., ECCV 2010) as it is published.

root/relative_captions_shoes.json  [{"ImageName": target, "ReferenceImageName": name, "RelativeCaption": text}, ...]
root/train_im_names.txt, eval_im_names.txt  an image name a line; the second is the gallery
root/**/img_womens_*.jpg           the pictures; annotations give bare names, so the tree is indexed once

A triplet belongs to the split whose list names both of its images.
"""

import os
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.common.images import IMAGE_SUFFIXES
from neucore_plugin.datasets.published.annotations import read_json, read_lines, refuse, safe_name
from neucore_plugin.datasets.triplets import Gallery, Triplet

NAME, TITLE = "shoes", "Shoes"
CREDIT = "Captions: Shoes (Guo et al., NeurIPS 2018). Pictures: Attribute Discovery (Berg et al., ECCV 2010)"
ROOT_VARIABLE = "NEUCORE_SHOES_ROOT"
LISTS = {"train": "train_im_names.txt", "test": "eval_im_names.txt"}
SPLITS = WITH_TARGETS = tuple(LISTS)
CAPTIONS = "relative_captions_shoes.json"
KEYS = ("ReferenceImageName", "ImageName", "RelativeCaption")


def sources(root: str | Path) -> str:
    """What to fetch, from where, and where it belongs."""
    return f"""\
the captions and the two name lists come with
    https://github.com/XiaoxiaoGuo/fashion-retrieval (folder dataset): put the three files into {root}
the images are the Attribute Discovery data set of Tamara Berg
    http://tamaraberg.com/attributesDataset/index.html: unpack its folders womens_* anywhere below {root}"""


def annotations(split: str) -> tuple[str, ...]:
    """Files that a split needs, below the root."""
    return CAPTIONS, LISTS[split]


def image_folder(root: str | Path, split: str) -> str:
    """Where the images of a split belong."""
    return str(Path(root) / "womens_*")


def read(root: str | Path, split: str) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of train or test. Images need not exist. Raises DataError listing every problem."""
    if split not in SPLITS:
        raise DataError(f"{TITLE} has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(root).expanduser()
    problems: list[str] = []
    names = []
    for index, line in enumerate(read_lines(root / LISTS[split], TITLE)):
        name = line.strip()
        if not safe_name(name) or "/" in name:
            problems.append(f"{LISTS[split]}: line {index + 1}: expected a file name, given {name!r}")
        names.append(name)
    known, triplets = set(names), []
    for index, entry in enumerate(read_json(root / CAPTIONS, list, TITLE)):
        if wrong := _problem(entry):
            problems.append(f"{CAPTIONS}: entry {index}: {wrong}")
            continue
        reference, target, caption = (entry[key].strip() for key in KEYS)
        if reference in known and target in known:
            triplets.append(Triplet(str(index), reference, " ".join(caption.split()), (target,)))
    refuse(root, split, problems)
    files = _files(root)
    unique = tuple(dict.fromkeys(names))
    return triplets, Gallery(unique, tuple(files.get(name, root / name) for name in unique))


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, given {type(entry).__name__}"
    missing = [key for key in KEYS if not isinstance(entry.get(key), str)]
    return f"needs the texts {', '.join(missing)}" if missing else None


def _files(root: Path) -> dict[str, Path]:
    """{bare file name: path} of all pictures below the root; of equal names the first in sorted order."""
    files: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below.sort()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                files.setdefault(name, Path(folder) / name)
    return files
