"""neucore convert: a checkpoint of the authors' released code becomes one of ours."""

import argparse
from pathlib import Path

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.files import read_json

HELP = "turn a checkpoint of the authors' released code into one of ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE, --out, and where the vocabulary comes from."""
    parser.add_argument("source", type=Path, help="the authors' .pth; read as weights only")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument(
        "--captions",
        nargs="+",
        type=Path,
        default=[],
        metavar="JSON",
        help="annotation files of its training split: words and concept classes are rebuilt from them, as they were",
    )
    parser.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="its words: JSON, or the authors' pickle, of which nothing runs"
    )
    parser.add_argument("--concepts", type=Path, metavar="JSON", help="a concept vocabulary of ours to be used instead")
    parser.add_argument(
        "--type", help="official_cirr, official_fashioniq or official_shoes (default: as the file says)"
    )
    parser.add_argument(
        "--settings", type=Path, metavar="JSON", help="the authors' settings, where the file lacks them"
    )
    parser.add_argument("--cnn", type=Path, metavar="PTH", help="torchvision's weights of the CNN, where it has none")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what was not used. Raises NeucoreError."""
    settings = None
    if arguments.settings:
        settings = read_json(arguments.settings, dict, "give the authors' settings as --settings")
        settings = settings.get("opt", settings)
        if not isinstance(settings, dict):
            raise ConfigError(f"--settings {arguments.settings}: expected an object of names and values")
    from neucore_plugin import register

    register()
    from neucore_plugin.released.convert import convert, report

    done = convert(
        arguments.source,
        arguments.out,
        arguments.captions,
        arguments.vocabulary,
        arguments.concepts,
        arguments.type,
        settings,
        arguments.cnn,
    )
    print("\n".join(report(done, arguments.out)))
