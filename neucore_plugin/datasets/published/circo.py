"""CIRCO (Baldrati et al., ICCV 2023): several right answers a query, for evaluation only.

root/annotations/{val,test}.json  [{"id": 0, "reference_img_id": 1, "relative_caption": text, "target_img_id": 2,
                                  "gt_img_ids": [2, 3], ...}, ...]; test has neither target nor answers
root/annotations/image_info_unlabeled2017.json  the gallery: {"images": [{"id": 1, "file_name": name}, ...]}
root/unlabeled2017/               the pictures of COCO 2017 unlabeled

The image list and the pictures may also lie below root/COCO2017_unlabeled, as CIRCO's own instructions have them. Image
names are COCO's ids as text.
"""

from collections.abc import Container, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.names import Listing
from neucore_plugin.datasets.annotations import good_entries, is_whole, read_json, safe_name
from neucore_plugin.datasets.published.reader import Reader
from neucore_plugin.datasets.triplets import Triplet

IMAGES = "annotations/image_info_unlabeled2017.json"
COCO = "COCO2017_unlabeled"  # the folder that CIRCO's instructions put the list and the pictures into
PICTURES = ("unlabeled2017", f"{COCO}/unlabeled2017")


def _files(split: str) -> tuple[str, str]:
    return f"annotations/{split}.json", IMAGES


def _parse(root: Path, split: str, problems: list[str]) -> tuple[list[Triplet], dict[str, Path]]:
    paths = _image_list(root, problems)
    file = _files(split)[0]
    triplets = []
    entries = read_json(CIRCO.annotation(root, file), list, CIRCO.title)
    check = partial(_faults, answered=split in CIRCO.answered, known=paths)
    for _, entry in good_entries(entries, file, check, problems, unique="id"):
        answers = (entry["target_img_id"], *entry["gt_img_ids"]) if split in CIRCO.answered else ()
        targets = tuple(dict.fromkeys(str(image) for image in answers))
        reference, caption = str(entry["reference_img_id"]), entry["relative_caption"]
        aspects = tuple(entry.get("semantic_aspects") or ())
        triplets.append(Triplet(str(entry["id"]), reference, caption, targets, aspects=aspects))
    return triplets, paths


def _image_list(root: Path, problems: list[str]) -> dict[str, Path]:
    listed, usual = CIRCO.annotation(root, IMAGES), Path(CIRCO.image_folder(root, "val"))
    there, folders = Listing(), dict.fromkeys((usual, *(root / folder for folder in PICTURES)))
    entries = read_json(listed, dict, CIRCO.title).get("images")
    if not isinstance(entries, list):
        raise DataError(f"{listed}: holds no list 'images'; fetch COCO's image_info_unlabeled2017.json again")
    paths: dict[str, Path] = {}
    for index, entry in enumerate(entries):
        good = isinstance(entry, dict) and is_whole(entry.get("id")) and safe_name(entry.get("file_name"))
        if not good or str(entry["id"]) in paths:
            problems.append(f"{IMAGES}: images[{index}]: expected a new id and a file name, given {str(entry)[:80]}")
        else:
            places = (folder / entry["file_name"] for folder in folders)
            paths[str(entry["id"])] = next((p for p in places if p in there), usual / entry["file_name"])
    return paths


def _faults(entry: dict[str, Any], answered: bool, known: Container[str]) -> Iterable[str]:
    if not isinstance(entry.get("relative_caption"), str):
        yield "needs the text 'relative_caption'"
    keys = ("id", "reference_img_id", "target_img_id") if answered else ("id", "reference_img_id")
    for key in keys:
        if not is_whole(entry.get(key)):
            yield f"needs {key!r}, a whole number, given {entry.get(key)!r}"
    answers = entry.get("gt_img_ids") if answered else []
    if not isinstance(answers, list) or not all(map(is_whole, answers)) or (answered and not answers):
        yield f"needs 'gt_img_ids', a list of image ids, given {answers!r}"
        return
    aspects = entry.get("semantic_aspects") or []
    if not isinstance(aspects, list) or not all(isinstance(aspect, str) for aspect in aspects):
        yield f"'semantic_aspects' must be a list of texts, given {aspects!r}"
    named = [("reference_img_id", entry.get("reference_img_id")), ("target_img_id", entry.get("target_img_id"))]
    for key, image in [*named, *(("gt_img_ids", image) for image in answers)]:
        if is_whole(image) and str(image) not in known:
            yield f"{key} {image} is not in {IMAGES}"


CIRCO = Reader(
    name="circo",
    title="CIRCO",
    credit="Annotations: CIRCO (Baldrati et al., ICCV 2023), CC BY-NC 4.0. Images: COCO 2017 unlabeled",
    files=_files,
    images=lambda split: PICTURES,
    annotation_folders=("", COCO),
    parse=_parse,
    where_from="""\
the annotations val.json and test.json are in https://github.com/miccunifi/CIRCO (folder annotations)
    put them into {root}/annotations
the image list and the images are COCO's, at https://cocodataset.org/#download:
    2017 Unlabeled image info: image_info_unlabeled2017.json into {root}/annotations
    2017 Unlabeled images: unpack them to {root}/unlabeled2017
(or both into the same folders below {root}/COCO2017_unlabeled)""",
    queries=lambda split: _files(split)[:1],
)
