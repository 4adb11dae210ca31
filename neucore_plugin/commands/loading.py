"""The options by which a command is told its model, and the model that they mean."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from neucore_plugin.commands import positive
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.text import visible


def add_model_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """--checkpoint or --model-type, --module, --max-pixels, --device. required: no index may note a checkpoint."""
    model = parser.add_mutually_exclusive_group(required=required)
    noted = "" if required else " (default: the one that INDEX notes)"
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
    from neucore_plugin import load_model, register
    from neucore_plugin.common.distributed import pick_device

    checkpoint, model_type = arguments.checkpoint, arguments.model_type
    if model_type and not model_type.startswith("zeroshot_"):
        raise ConfigError(f"--model-type {model_type}: has nothing trained to search with; give --checkpoint")
    if checkpoint is None and model_type is None:
        noted = index.manifest.checkpoint if index is not None and index.manifest is not None else None
        if noted is not None and noted.startswith("zeroshot_"):
            model_type = noted
        elif noted is None:
            raise ConfigError(
                visible(f"index {index.folder} does not say which checkpoint built it; give --checkpoint")
            )
        elif not Path(noted).is_file():
            place = f"the checkpoint that built index {index.folder} is not at {noted}; give --checkpoint"
            raise ConfigError(visible(place))
        else:
            checkpoint = Path(noted)
    if arguments.module:
        register()
        try:
            importlib.import_module(arguments.module)
        except ImportError as error:
            raise ConfigError(f"--module {arguments.module}: {error}; install it, or put it on PYTHONPATH") from error
    model = load_model(checkpoint, model_type, pick_device(arguments.device))
    if arguments.max_pixels is not None:
        model.image_processor.max_pixels = arguments.max_pixels
    return model
