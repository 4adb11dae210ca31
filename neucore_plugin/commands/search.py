"""neucore search: a folder of images, with a picture and a sentence."""

import argparse
import importlib
import logging
import sys
from pathlib import Path

from neucore_plugin.commands import positive, print_json
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.names import name_of
from neucore_plugin.common.text import visible

HELP = "search a folder of images with a picture and a sentence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the folder, the query, and the form of the answer."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="what training wrote: .../checkpoint_best.pth")
    model.add_argument("--model-type", metavar="TYPE", help="one that needs no training, such as zeroshot_clip_vitb32")
    parser.add_argument("--folder", required=True, type=Path, help="images to search; sub-folders are included")
    parser.add_argument("--image", help="reference: an image file, or the name of an image of the folder")
    parser.add_argument("--text", type=name_of, help="relative caption: what should be different from the reference")
    parser.add_argument("-k", type=positive, default=10, help="number of results (default 10)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows the results")
    parser.add_argument(
        "--max-pixels", type=positive, help="pictures of more pixels are left out (default: as in training)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="images encoded at a time (default 32)")
    parser.add_argument("--module", help="module of your own to import first: it registers the checkpoint's backbone")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")


def run(arguments: argparse.Namespace) -> None:
    """Encode the folder, rank it, print or write what was found. Raises NeucoreError."""
    if arguments.image is None and not (arguments.text or "").strip():
        raise DataError("nothing to search with; give --image, --text, or both")
    if not arguments.folder.is_dir():
        raise DataError(f"--folder {arguments.folder} is no folder")
    from neucore_plugin import load_model, register
    from neucore_plugin.common.distributed import pick_device
    from neucore_plugin.common.images import told
    from neucore_plugin.host.importing import before_import
    from neucore_plugin.report import search_page
    from neucore_plugin.retrieval import GalleryIndex

    before_import()
    if arguments.module:
        register()
        try:
            importlib.import_module(arguments.module)
        except ImportError as error:
            raise ConfigError(f"--module {arguments.module}: {error}; install it, or put it on PYTHONPATH") from error
    if arguments.model_type and not arguments.model_type.startswith("zeroshot_"):
        raise ConfigError(f"--model-type {arguments.model_type}: has nothing trained to search with; give --checkpoint")
    model = load_model(arguments.checkpoint, arguments.model_type, pick_device(arguments.device))
    if arguments.max_pixels is not None:
        model.image_processor.max_pixels = arguments.max_pixels
    log = logging.getLogger("neucore_plugin.retrieval")
    level = log.level
    log.setLevel(logging.ERROR)  # what could not be read is printed below
    try:
        index = GalleryIndex.build(
            model, arguments.folder, batch_size=arguments.batch_size, progress=not arguments.json
        )
    finally:
        log.setLevel(level)
    for failure in index.failures:
        print(visible(f"left out {failure.name}: {failure.reason}"), file=sys.stderr)
    if index.left_out:
        print(visible(f"{arguments.folder}: {told(index.left_out)}"), file=sys.stderr)
    hits = index.search(arguments.image, arguments.text, k=None)[: arguments.k]
    if not hits:
        raise DataError(f"--folder {arguments.folder} holds no image but the reference; give one with others")
    if arguments.json:
        rows = [{"rank": hit.rank, "name": hit.name, "score": hit.score, "path": name_of(hit.path)} for hit in hits]
        print_json(rows)
    else:
        for hit in hits:
            print(f"{hit.rank:3d}  {hit.score:8.4f}  {visible(hit.name)}")
    if arguments.html:
        reference = index.reference(arguments.image)[0] if arguments.image is not None else None
        search_page(arguments.html, reference, arguments.text, hits)
        print(f"page: {arguments.html}", file=sys.stderr)
