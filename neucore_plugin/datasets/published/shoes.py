"""Shoes (Guo et al., NeurIPS 2018; pictures of Berg et al., ECCV 2010) as it is published.

root/relative_captions_shoes.json  [{"ImageName": target, "ReferenceImageName": name, "RelativeCaption": text}, ...]
root/train_im_names.txt, eval_im_names.txt  an image name a line; the second is the gallery
root/**/img_womens_*.jpg           the pictures; annotations give bare names, so the tree is indexed once

A triplet belongs to the split whose list names both of its images.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from neucore_plugin.common.images import find_images
from neucore_plugin.common.names import Names, name_of
from neucore_plugin.datasets.annotations import good_entries, read_json, read_lines, safe_name
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Triplet

LISTS = {"train": "train_im_names.txt", "test": "eval_im_names.txt"}
CAPTIONS = "relative_captions_shoes.json"
KEYS = ("ReferenceImageName", "ImageName", "RelativeCaption")


def _parse(root: Path, split: str, problems: list[str]) -> tuple[list[Triplet], dict[str, Path]]:
    names = [line.strip() for line in read_lines(root / LISTS[split], SHOES.title)]
    for number, name in enumerate(names, start=1):
        if not safe_name(name, folders=False):
            problems.append(f"{LISTS[split]}: line {number}: expected a file name, given {name!r}")
    known, triplets = set(names), []
    for index, entry in good_entries(read_json(root / CAPTIONS, list, SHOES.title), CAPTIONS, _faults, problems):
        reference, target = (entry[key].strip() for key in KEYS[:2])
        if reference in known and target in known:
            triplets.append(Triplet(str(index), reference, entry[KEYS[2]], (target,)))
    files = _pictures(root)
    spelt = Names(files)
    return triplets, {name: files.get(spelt.find(name) or "", root / name) for name in names}


def _faults(entry: dict[str, Any]) -> Iterable[str]:
    if missing := [key for key in KEYS if not isinstance(entry.get(key), str)]:
        yield f"needs the texts {', '.join(missing)}"


def _pictures(root: Path) -> dict[str, Path]:
    """{bare file name: path} of all pictures below the root; of equal names the first in sorted order."""
    files: dict[str, Path] = {}
    for path in sorted(find_images(root)[0], key=lambda path: (path.parent, path.name)):
        files.setdefault(name_of(path.name), path)
    return files


def _names(ids: Iterable[str]) -> dict[str, str]:
    """img_womens_athletic_shoes_830.jpg -> womens athletic shoes 830."""
    return {name: Path(name).stem.removeprefix("img_").replace("_", " ") for name in ids}


SHOES = Reader(
    name="shoes",
    title="Shoes",
    credit="Captions: Shoes (Guo et al., NeurIPS 2018). Pictures: Attribute Discovery (Berg et al., ECCV 2010)",
    files=lambda split: (CAPTIONS, LISTS[split]),
    images=lambda split: ("womens_*",),
    parse=_parse,
    where_from="""\
the captions and the two name lists come with
    https://github.com/XiaoxiaoGuo/fashion-retrieval (folder dataset): put the three files into {root}
the images are the Attribute Discovery data set of Tamara Berg
    http://tamaraberg.com/attributesDataset/index.html, an address that is reported dead; READMEs of later work,
    such as AMC (Zhu et al., 2023), link to copies. Unpack the folders womens_* anywhere below {root}""",
    queries=lambda split: (),  # one file holds those of both
    names=_names,
)
