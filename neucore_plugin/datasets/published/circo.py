"""CIRCO (Baldrati et al., ICCV 2023): several right answers a query, for evaluation only.

root/annotations/{val,test}.json  [{"id": 0, "reference_img_id": 1, "relative_caption": text, "target_img_id": 2,
                                  "gt_img_ids": [2, 3], ...}, ...]; test has neither target nor answers
root/annotations/image_info_unlabeled2017.json  the gallery: {"images": [{"id": 1, "file_name": name}, ...]}
root/unlabeled2017/               the pictures of COCO 2017 unlabeled

Image names are COCO's ids as text.
"""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, nearest
from neucore_plugin.datasets.published.annotations import read_json, refuse, safe_name
from neucore_plugin.datasets.triplets import Gallery, Triplet

NAME, TITLE = "circo", "CIRCO"
CREDIT = "Annotations: CIRCO (Baldrati et al., ICCV 2023), CC BY-NC 4.0. Images: COCO 2017 unlabeled"
ROOT_VARIABLE = "NEUCORE_CIRCO_ROOT"
SPLITS, WITH_TARGETS = ("val", "test"), ("val",)
IMAGES = "annotations/image_info_unlabeled2017.json"


def sources(root: str | Path) -> str:
    """What to fetch, from where, and where it belongs."""
    return f"""\
the annotations val.json and test.json are in https://github.com/miccunifi/CIRCO (folder annotations)
    put them into {Path(root) / "annotations"}
the image list and the images are COCO's, at https://cocodataset.org/#download:
    2017 Unlabeled image info: image_info_unlabeled2017.json into {Path(root) / "annotations"}
    2017 Unlabeled images: unpack them to {Path(root) / "unlabeled2017"}"""


def annotations(split: str) -> tuple[str, ...]:
    """Files that a split needs, below the root."""
    return f"annotations/{split}.json", IMAGES


def image_folder(root: str | Path, split: str) -> str:
    """Where the images of a split belong."""
    return str(Path(root) / "unlabeled2017")


def read(root: str | Path, split: str) -> tuple[list[Triplet], Gallery]:
    """Triplets and gallery of val or test. Images need not exist. Raises DataError listing every problem."""
    if split not in SPLITS:
        raise DataError(f"{TITLE} has no split {split!r}.{nearest(split, SPLITS)}")
    root = Path(root).expanduser()
    problems: list[str] = []
    gallery = _read_gallery(root, problems)
    known, triplets, seen = set(gallery.ids), [], {}
    file = f"annotations/{split}.json"
    for index, entry in enumerate(read_json(root / file, list, TITLE)):
        wrong = list(_problems(entry, split, known))
        if not wrong and seen.setdefault(entry["id"], index) != index:
            wrong = [f"id {entry['id']} stands already in entry {seen[entry['id']]}"]
        problems += [f"{file}: entry {index}: {text}" for text in wrong]
        if not wrong:
            answers = () if split == "test" else (entry["target_img_id"], *entry["gt_img_ids"])
            targets = tuple(dict.fromkeys(str(image) for image in answers))
            caption = " ".join(entry["relative_caption"].split())
            triplets.append(Triplet(str(entry["id"]), str(entry["reference_img_id"]), caption, targets))
    refuse(root, split, problems)
    return triplets, gallery


def _read_gallery(root: Path, problems: list[str]) -> Gallery:
    entries = read_json(root / IMAGES, dict, TITLE).get("images")
    if not isinstance(entries, list):
        raise DataError(f"{root / IMAGES}: holds no list 'images'; fetch COCO's image_info_unlabeled2017.json again")
    paths: dict[str, Path] = {}
    for index, entry in enumerate(entries):
        good = isinstance(entry, dict) and _whole(entry.get("id")) and safe_name(entry.get("file_name"))
        if not good or str(entry["id"]) in paths:
            problems.append(f"{IMAGES}: images[{index}]: expected a new id and a file name, given {str(entry)[:80]}")
        else:
            paths[str(entry["id"])] = root / "unlabeled2017" / entry["file_name"]
    return Gallery(tuple(paths), tuple(paths.values()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(entry: Any, split: str, known: Container[str]) -> Iterable[str]:
    if not isinstance(entry, dict):
        yield f"expected an object, given {type(entry).__name__}"
        return
    if not isinstance(entry.get("relative_caption"), str):
        yield "needs the text 'relative_caption'"
    keys = ("id", "reference_img_id") if split == "test" else ("id", "reference_img_id", "target_img_id")
    yield from (
        f"needs {key!r}, a whole number, given {entry.get(key)!r}" for key in keys if not _whole(entry.get(key))
    )
    answers = [] if split == "test" else entry.get("gt_img_ids")
    if not isinstance(answers, list) or not all(map(_whole, answers)) or (split == "val" and not answers):
        yield f"needs 'gt_img_ids', a list of image ids, given {answers!r}"
        return
    named = [("reference_img_id", entry.get("reference_img_id")), ("target_img_id", entry.get("target_img_id"))]
    for key, image in [*named, *(("gt_img_ids", image) for image in answers)]:
        if _whole(image) and str(image) not in known:
            yield f"{key} {image} is not in {IMAGES}"
