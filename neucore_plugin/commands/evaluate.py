"""neucore evaluate: the test splits of a config file with a trained checkpoint."""

import argparse

from neucore_plugin.commands import train
from neucore_plugin.common.errors import ConfigError

HELP = "evaluate a trained checkpoint by a config file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, the checkpoint and the presets."""
    train.add_arguments(parser)
    parser.add_argument("--checkpoint", help="the same as --options model.checkpoint=PATH")
    parser.add_argument(
        "--protocol",
        nargs="+",
        metavar="PRESET",
        help="presets to evaluate with, in one pass over the gallery, such as: hard soft (CIRR)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate. Raises NeucoreError."""
    from neucore_plugin import launch
    from neucore_plugin.config import loading

    options = loading.dotlist(arguments.options)
    if arguments.checkpoint is not None:
        options.append(("model.checkpoint", arguments.checkpoint))
    if arguments.protocol:
        names = list((loading.read_yaml(arguments.cfg_path).get("datasets") or {}).keys())
        if len(names) != 1:
            raise ConfigError(
                f"--protocol needs a config with one data set, this has {', '.join(names) or 'none'}; "
                "give --options datasets.NAME.build_info.protocol=[...]"
            )
        options.append((f"datasets.{names[0]}.build_info.protocol", arguments.protocol))
    launch.run(arguments.cfg_path, options, evaluate=True)
