"""Tiny real data: drawn shapes, relative captions about their colour and form, and a yaml that trains on them."""

import itertools
import json
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

COLOURS = ("red", "blue", "green", "yellow", "black", "orange")
SPLITS = {"val": {0}, "test": {4}, "train": {1, 2, 3, 5, 6, 7, 8}}  # by the number of a query, modulo nine
FORMS = ("circle", "square", "triangle", "cross")


def draw_shape(form: str, colour: str, side: int = 64) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    low, high, middle = side // 8, side - side // 8, side // 2
    if form == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif form == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif form == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], fill=colour)
    else:
        pen.line((low, low, high, high), fill=colour, width=side // 8)
        pen.line((low, high, high, low), fill=colour, width=side // 8)
    return image


def write_shapes(root: Path) -> Path:
    """A `folder` data set of 24 images with 192 queries: 149 of training, 22 of val, 21 of test."""
    (root / "images").mkdir(parents=True)
    entries = []
    for form, colour in itertools.product(FORMS, COLOURS):
        draw_shape(form, colour).save(root / "images" / f"{form}-{colour}.png")
        changes = [("colour", f"make it {other}", f"{form}-{other}.png") for other in COLOURS if other != colour]
        changes += [("form", f"now a {other}", f"{other}-{colour}.png") for other in FORMS if other != form]
        for change, caption, target in changes:
            reference = f"{form}-{colour}.png"
            entries.append({"reference": reference, "caption": caption, "target": target, "change": change})
    parts = {split: [e for i, e in enumerate(entries) if i % 9 in nines] for split, nines in SPLITS.items()}
    for split, chosen in parts.items():
        (root / f"{split}.json").write_text(json.dumps(chosen))
    return root


def write_tiny(shapes_root: Path, cache_root: Path, folder: Path, change=None, name: str = "tiny.yaml") -> Path:
    """A complete yaml for the shapes in `folder`; `change` edits the sections first."""
    image = {"name": "cir_image", "image_size": 64}
    config = {
        "model": {
            "arch": "neucore",
            "model_type": "embedded",
            "backbone": {"image": {"name": "efficientnet_lite0", "image_size": 64, "grid": 2}},
            "embed_dim": 32,
            "concept_alignment": {"heads": 2},
            "concepts": {"min_count": 1},
        },
        "datasets": {
            "folder": {
                "build_info": {"root": str(shapes_root)},
                "vis_processor": {"train": dict(image), "eval": dict(image)},
            }
        },
        "run": {
            "init_lr": 3e-3,
            "min_lr": 1e-5,
            "warmup_lr": 1e-5,
            "warmup_steps": 4,
            "max_epoch": 3,
            "batch_size_train": 16,
            "batch_size_eval": 16,
            "seed": 7,
            "output_dir": str(folder / "output"),
            "cache_dir": str(cache_root),
            "valid_splits": ["val"],
            "test_splits": ["val", "test"],
            "device": "cpu",
        },
    }
    if change:
        change(config)
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path
