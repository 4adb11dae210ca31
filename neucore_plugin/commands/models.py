"""neucore models: the model types that ship with the package, what they are made of, and what was tried of each."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

HELP = "list the model types: encoders, sizes, where weights come from, what was tried"
COLUMNS = ("model_type", "encoders", "pixels", "tokens", "words", "weights", "tried here")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing is asked."""


def run(arguments: argparse.Namespace) -> None:
    """One line a type, under a line of headings. Needs neither torch nor the host."""
    rows = [COLUMNS, *described()]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("\nOther encoders: model.backbone.image.name, model.backbone.text.name; see docs/howto/which_encoder.md")


def described() -> Iterator[tuple[str, ...]]:
    """COLUMNS of every type: tokens is their number and width, words the width of the text side."""
    from neucore_plugin.config.encoders import pixels_of  # within: the help of all commands comes at once
    from neucore_plugin.config.loading import model_defaults, read_yaml
    from neucore_plugin.config.sections import model_types

    for name, path in sorted({**model_types("cir_baseline"), **model_types("neucore")}.items()):
        arch = "neucore" if name in model_types("neucore") else "cir_baseline"
        section = model_defaults({"arch": arch, "model_type": name})["backbone"]
        about = read_yaml(path)["about"]
        pixels = str(pixels_of(section["image"])["image_size"])
        encoders = dict.fromkeys(_encoder(section[side]) for side in ("image", "text"))
        yield (name, ", ".join(encoders), pixels, *(str(about[key]) for key in ("tokens", "words", "weights", "tried")))


def _encoder(section: Mapping[str, Any]) -> str:
    which = section.get("repo") or section.get("arch") or section.get("network")
    return f"{section['name']} {which}" if which else section["name"]
