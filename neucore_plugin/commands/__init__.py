"""Commands of `neucore`, one a module: HELP, add_arguments(parser), run(arguments). Light until they run."""

import argparse
import importlib
import json
import sys
from typing import Any

from neucore_plugin.common.errors import ConfigError


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def import_own(module: str | None) -> None:
    """Import what --module names, which registers backbones of its own with the host. Raises ConfigError."""
    from neucore_plugin import register

    if module is None:
        return
    register()
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--module {module}: {error}; install it, or put it on PYTHONPATH") from error


def print_json(value: Any) -> None:
    """Print a value as JSON: in ASCII alone where stdout's encoding lacks a letter, or a terminal may obey one."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        plain = text.replace("\n", "").isprintable()
    except UnicodeEncodeError:
        plain = False
    print(text if plain else json.dumps(value, indent=2))
