"""neucore train: train by a config file; also the options that other commands with a config share."""

import argparse

from neucore_plugin.common.names import name_of

HELP = "train by a config file, then evaluate its test splits"


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--cfg-path and --options, the host's own names."""
    parser.add_argument(
        "--cfg-path",
        required=required,
        metavar="YAML",
        help="config file with model, datasets and run, or the name of a shipped one (see `neucore configs`)",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--options."""
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        type=name_of,
        metavar="KEY=VALUE",
        help="override settings of the file, such as run.max_epoch=2 (also as pairs: run.max_epoch 2)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train. Raises NeucoreError."""
    from neucore_plugin import launch

    launch.run(arguments.cfg_path, arguments.options)
