"""`neucore train` and `neucore evaluate`: by a config file."""

import argparse

from neucore_plugin.common.errors import ConfigError


def _add_config_arguments(parser: argparse.ArgumentParser, evaluate: bool = False) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="config file with model, datasets and run")
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings of the file, such as run.max_epoch=2 (also as pairs: run.max_epoch 2)",
    )
    if evaluate:
        parser.add_argument("--checkpoint", help="the same as --options model.checkpoint=PATH")
        parser.add_argument(
            "--protocol",
            nargs="+",
            metavar="PRESET",
            help="presets to evaluate with, in one pass over the gallery, such as: hard soft (CIRR)",
        )


def _train(arguments: argparse.Namespace) -> None:
    from neucore_plugin import launch

    launch.run(arguments.cfg_path, arguments.options)


def _evaluate(arguments: argparse.Namespace) -> None:
    from neucore_plugin import launch
    from neucore_plugin.config import loading

    options = loading.dotlist(arguments.options)
    if arguments.checkpoint:
        options.append(f"model.checkpoint={arguments.checkpoint}")
    if arguments.protocol:
        names = list((loading.read_yaml(arguments.cfg_path).get("datasets") or {}).keys())
        if len(names) != 1:
            raise ConfigError(
                f"--protocol needs a config with one data set, this has {', '.join(names) or 'none'}; "
                "give --options datasets.NAME.build_info.protocol=[...]"
            )
        options.append(f"datasets.{names[0]}.build_info.protocol=[{','.join(arguments.protocol)}]")
    launch.run(arguments.cfg_path, options, evaluate=True)
