"""The options by which a command is told its model, and the model that they mean."""

import argparse
from pathlib import Path
from typing import Any

from neucore_plugin.commands import import_own, positive
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import hub_name
from neucore_plugin.common.text import visible


def add_model_arguments(
    parser: argparse.ArgumentParser, required: bool, noted: str = "default: the one that INDEX notes"
) -> None:
    """--checkpoint or --model-type, --module, --max-pixels, --device. required: no index may note a checkpoint.

    noted: what is said of the checkpoint where it is not required.
    """
    model = parser.add_mutually_exclusive_group(required=required)
    noted = "" if required else f" ({noted})"
    model.add_argument("--checkpoint", type=Path, help=f"what training wrote: .../checkpoint_best.pth{noted}")
    model.add_argument("--model-type", metavar="TYPE", help="one that needs no training, such as zeroshot_clip_vitb32")
    parser.add_argument("--module", help="module of your own to import first: it registers the checkpoint's backbone")
    parser.add_argument(
        "--max-pixels", type=positive, help="pictures of more pixels are left out (default: as in training)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")


def load(arguments: argparse.Namespace, index: Any = None) -> Any:
    """The model of these options; where they name none, that of the checkpoint which a `GalleryIndex` notes.

    Raises ConfigError, CheckpointError.
    """
    from neucore_plugin import load_model
    from neucore_plugin.common.distributed import pick_device
    from neucore_plugin.host.importing import before_import

    before_import()
    checkpoint, model_type = arguments.checkpoint, arguments.model_type
    if model_type and not model_type.startswith("zeroshot_"):
        raise ConfigError(f"--model-type {model_type}: has nothing trained to search with; give --checkpoint")
    if checkpoint is None and model_type is None:
        noted = index.manifest.checkpoint if index.manifest is not None else None
        if noted is None:
            raise ConfigError(f"index {arguments.index} does not say which checkpoint built it; give --checkpoint")
        if noted.startswith("zeroshot_"):
            model_type = noted
        elif hub_name(noted) is not None:  # an index may come from elsewhere: it makes nobody fetch what it names
            raise ConfigError(
                visible(f"index {arguments.index} was built by {noted} of the hub; to use it give --checkpoint {noted}")
            )
        elif Path(noted).exists():
            checkpoint = Path(noted)
        else:
            raise ConfigError(
                visible(f"the checkpoint that built index {arguments.index} is not at {noted}; give --checkpoint")
            )
    import_own(arguments.module)
    model = load_model(checkpoint, model_type, pick_device(arguments.device))
    if arguments.max_pixels is not None:
        model.image_processor.max_pixels = arguments.max_pixels
    return model


def opened(arguments: argparse.Namespace) -> Any:
    """`stored`, with its model."""
    index = stored(arguments.index)
    index.attach(load(arguments, index), where=f" in {arguments.index}")
    return index


def stored(place: Path) -> Any:
    """The `GalleryIndex` in a folder. DataError for one of the earlier format, of which changes would be lost."""
    from neucore_plugin.retrieval import GalleryIndex

    index = GalleryIndex.open(place)
    if index.folder is None:
        raise DataError(
            f"{place} is an index of the earlier format, which is only read; build it again, or in Python "
            "GalleryIndex.open(INDEX).save(OTHER) writes it in today's"
        )
    return index
