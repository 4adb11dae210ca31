"""Fashion200K (Han et al., ICCV 2017) with the queries of Vo et al. (TIRG, CVPR 2019).

root/labels/{category}_{train,test}_detect_all.txt  "path <tab> detection score <tab> description" a line
root/test_queries.txt                               "source target" a line
root/women/{category}/{caption}/{id}/{file}.jpeg    the pictures

A caption is the description with its marks spelt out, in the letters it is written in. A hit is any gallery image whose
caption equals the target's. The text is that of TIRG: "replace X with Y", X the first word of the source that the
target lacks, Y the other way round; where a caption holds no such word, its last one. Training pairs are not published:
each train image that has a caption one word apart is paired once with a drawn image of a drawn such caption, from a
fixed seed (other code draws anew at every step).
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from neucore_plugin.datasets.annotations import read_lines, safe_name
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Triplet

CATEGORIES = ("dress", "skirt", "jacket", "pants", "top")
SPECIAL = str.maketrans({".": "dotmark", "?": "questionmark", "&": "andmark", "*": "starmark"})
SEED = 0


def _files(split: str) -> tuple[str, ...]:
    labels = tuple(f"labels/{category}_{split}_detect_all.txt" for category in CATEGORIES)
    return (*labels, "test_queries.txt") if split == "test" else labels


def _parse(root: Path, split: str, problems: list[str]) -> tuple[list[Triplet], dict[str, Path]]:
    captions = _read_labels(root, split, problems)
    triplets = _test_queries(root, captions, problems) if split == "test" else _train_queries(captions)
    return triplets, {name: root / name for name in captions}


def clean(description: str) -> str:
    """A description as the queries count it: marks spelt out, nothing around it."""
    return description.strip().translate(SPECIAL)


def difference(source: str, target: str) -> tuple[str, str]:
    """The first word of each caption that the other lacks; where there is none, its last word."""
    ours, theirs = source.split(), target.split()
    removed = next((word for word in ours if word not in theirs), ours[-1])
    return removed, next((word for word in theirs if word not in ours), theirs[-1])


def _text(source: str, target: str) -> str:
    return "replace {} with {}".format(*difference(source, target))


def _read_labels(root: Path, split: str, problems: list[str]) -> dict[str, str]:
    """{image: caption} of a split, in the order of the files."""
    captions: dict[str, str] = {}
    for category in CATEGORIES:
        file = f"labels/{category}_{split}_detect_all.txt"
        for number, line in enumerate(read_lines(root / file, FASHION200K.title), start=1):
            parts = line.split("\t")
            if len(parts) != 3 or not safe_name(parts[0].strip()) or not parts[2].strip():
                problems.append(f"{file}: line {number}: expected path, score and description, given {line[:80]!r}")
            else:
                captions.setdefault(parts[0].strip(), clean(parts[2]))
    return captions


def _test_queries(root: Path, captions: dict[str, str], problems: list[str]) -> list[Triplet]:
    same: dict[str, list[str]] = defaultdict(list)
    for name, caption in captions.items():
        same[caption].append(name)
    triplets = []
    for number, line in enumerate(read_lines(root / "test_queries.txt", FASHION200K.title), start=1):
        parts = line.split()
        unknown = [name for name in parts if name not in captions]
        if len(parts) != 2 or unknown:
            what = f"expected two paths, given {line[:80]!r}"
            if unknown and len(parts) == 2:
                what = f"{unknown[0]!r} is in no label file of test"
            problems.append(f"test_queries.txt: line {number}: {what}")
            continue
        source, target = parts
        right = dict.fromkeys([target, *same[captions[target]]])
        triplets.append(Triplet(str(number - 1), source, _text(captions[source], captions[target]), tuple(right)))
    return triplets


def _train_queries(captions: dict[str, str]) -> list[Triplet]:
    """One query an image. Captions one word apart share a mask (a caption without one word): no pairwise comparison."""
    images: dict[str, list[str]] = defaultdict(list)
    for name, caption in captions.items():
        images[caption].append(name)
    masked: dict[str, list[str]] = defaultdict(list)
    for caption in images:
        for mask in _masks(caption):
            masked[mask].append(caption)
    draw = random.Random(SEED)
    triplets = []
    for index, (name, caption) in enumerate(captions.items()):
        groups = [mask for mask in _masks(caption) if len(masked[mask]) > 1]
        if groups:
            near = [other for other in masked[draw.choice(groups)] if other != caption]
            other = draw.choice(near)
            triplets.append(Triplet(str(index), name, _text(caption, other), (draw.choice(images[other]),)))
    return triplets


def _masks(caption: str) -> list[str]:
    words = caption.split()
    return list(dict.fromkeys(" ".join([*words[:place], *words[place + 1 :]]) for place in range(len(words))))


def _names(ids: Iterable[str]) -> dict[str, str]:
    """women/dresses/casual_dresses/517/517_0.jpeg -> casual dresses 517."""
    parts = {name: Path(name).parts for name in ids}
    return {name: f"{found[-3]} {found[-2]}".replace("_", " ") for name, found in parts.items() if len(found) > 2}


FASHION200K = Reader(
    name="fashion200k",
    title="Fashion200K",
    credit="Fashion200K (Han et al., ICCV 2017); queries: Vo et al., CVPR 2019",
    files=_files,
    images=lambda split: ("women",),
    parse=_parse,
    where_from="""\
the images and the labels come from the authors, by the links of https://github.com/xthan/fashion-200k
    unpack them so that {root}/women and {root}/labels are there
test_queries.txt is not in the repository https://github.com/google/tirg: its README links to
    https://storage.googleapis.com/image_retrieval_css/test_queries.txt: put it into {root}""",
    queries=lambda split: ("test_queries.txt",) if split == "test" else (),  # those of train are made from the labels
    names=_names,
)
