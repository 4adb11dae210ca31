"""Hand-made trees of published data sets: annotations of the published shape over generated pictures."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf
from shapes import COLOURS, FORMS, draw_shape

from neucore_plugin.config.published import FASHIONIQ_CATEGORIES
from neucore_plugin.datasets.triplets import TripletDataset


def put(path: Path, content: Any) -> None:
    """Write a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edit(path: Path, change) -> None:
    """Change the JSON of a file in place."""
    value = json.loads(path.read_text())
    change(value)
    put(path, value)


def pictures(paths: Iterable[Path]) -> None:
    """One of the shapes at each path, chosen by its name."""
    for path in paths:
        number = int(hashlib.sha256(path.stem.encode()).hexdigest(), 16)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape(FORMS[number % len(FORMS)], COLOURS[number // 7 % len(COLOURS)], 32).save(path)


def cirr_entry(
    pairid: int, members: list[str], reference: int, target: int | None, soft: dict | None = None, caption: str = ""
) -> dict[str, Any]:
    """One object of CIRR's captions file; `reference` and `target` are places among the members."""
    image_set = {"id": 36, "members": members, "reference_rank": reference}
    entry = {"pairid": pairid, "reference": members[reference], "caption": caption or f"query {pairid}"}
    if target is not None:
        entry["target_hard"] = members[target]
        entry["target_soft"] = soft if soft is not None else {members[target]: 1.0}
        image_set["target_rank"] = target
    return {**entry, "img_set": image_set}


def write_cirr(root: Path, places: Mapping[str, Mapping[str, str]], queries: Mapping[str, Sequence[Any]]) -> Path:
    """A root of CIRR: by split, the image list {name: "./dev/name.png"} and the entries of the captions file."""
    for split, images in places.items():
        put(root / f"captions/cap.rc2.{split}.json", queries[split])
        put(root / f"image_splits/split.rc2.{split}.json", images)
        pictures(root / "img_raw" / place for place in images.values())
    return root


def write_cirr_to_train_on(root: Path) -> Path:
    """24 queries of train, 12 of val, 6 of test1, in groups of six images."""
    places, queries = {}, {}
    for split, folder, count in (("train", "train/0", 24), ("val", "dev", 12), ("test1", "test1", 6)):
        queries[split] = []
        for number in range(count):
            members = [f"{split}-{number // 4}-img{side}" for side in range(6)]
            reference, target = number % 4, None if split == "test1" else number % 4 + 1
            soft = {members[number % 4 + 1]: 1.0, members[0]: 0.5}
            caption = f"show {number} red dogs, not a blue cat"
            pairid = number + 100 * len(places)
            queries[split].append(cirr_entry(pairid, members, reference, target, soft, caption))
        names = dict.fromkeys(name for query in queries[split] for name in query["img_set"]["members"])
        places[split] = {name: f"./{folder}/{name}.png" for name in names}
    return write_cirr(root, places, queries)


def write_fashioniq(root: Path) -> Path:
    """8 pairs of train and 6 of val a category, and galleries that hold more than the pairs name."""
    for category in FASHIONIQ_CATEGORIES:
        for split, count in (("train", 8), ("val", 6)):
            names = [f"{category}{split}{number}" for number in range(count + 13)]
            pairs = [
                {"target": names[number + 1], "candidate": names[number], "captions": ["is red", f"has {number} dots"]}
                for number in range(count)
            ]
            put(root / f"captions/cap.{category}.{split}.json", pairs)
            put(root / f"image_splits/split.{category}.{split}.json", names)
            pictures(root / "images" / f"{name}.{'png' if split == 'val' else 'jpg'}" for name in names)
    return root


def build(
    name: str, root: Path | None, wanted: Sequence[str] | None = None, data_type: str = "images", **info: Any
) -> dict[str, TripletDataset]:
    """What the host's builder of a data set makes of a root; `wanted`: the splits that a run would name."""
    image, caption = {"name": "cir_image", "image_size": 8}, {"name": "cir_caption"}
    sides = {"vis_processor": {"train": image, "eval": image}, "text_processor": {"train": caption, "eval": caption}}
    given = {"data_type": data_type, "build_info": {"root": str(root) if root else None, **info}, **sides}
    builder = registry.get_builder_class(name)(OmegaConf.create(given))
    builder.wanted = wanted
    return builder.build_datasets()


def copy_without(root: Path, to: Path, absent: list[str]) -> Path:
    """The same tree of links, less the files of these stems."""
    for folder, _, files in os.walk(root):
        for file in files:
            path = to / os.path.relpath(os.path.join(folder, file), root)
            path.parent.mkdir(parents=True, exist_ok=True)
            if Path(file).stem not in absent:
                path.symlink_to(os.path.join(folder, file))
    return to


def damaged(root: Path, to: Path, names: list[str]) -> Path:
    """A copy in which the pictures of these names end too early."""
    for path in copy_without(root, to, []).rglob("*.png"):
        if path.stem in names:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[: len(data) // 2])
    return to
