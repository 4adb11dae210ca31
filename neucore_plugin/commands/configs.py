"""neucore configs: the yamls that ship with the package, listed, or one of them copied to be changed."""

import argparse
from pathlib import Path

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.files import atomic_write
from neucore_plugin.config.shipped import shipped_configs

HELP = "list the configs that ship with the package, or copy one to change it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing, or `copy NAME [DIR]`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    copy = actions.add_parser("copy", help="write a shipped config into a folder; no file is overwritten")
    copy.add_argument("name", metavar="NAME", help="one of those that `neucore configs` lists")
    copy.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path(), help="default: the current folder")


def run(arguments: argparse.Namespace) -> None:
    """List with the first line of each, or copy. Raises ConfigError for an unknown name or a file that is there."""
    shipped = shipped_configs()
    if arguments.action is None:
        width = max(map(len, shipped))
        for name, path in shipped.items():
            head, _, _ = path.read_text(encoding="utf-8").partition("\n")
            print(f"{name:<{width}}  {head.removeprefix('# ')}")
        return
    name = arguments.name.removesuffix(".yaml")
    if name not in shipped:
        raise ConfigError(f"no config {arguments.name!r} ships with the package.{nearest(name, shipped)}")
    target = arguments.folder / f"{name}.yaml"
    if target.exists():
        raise ConfigError(f"{target} is there already; move it away, or give another folder")
    with atomic_write(target, "w") as stream:
        stream.write(shipped[name].read_text(encoding="utf-8"))
    print(target)
