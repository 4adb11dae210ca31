"""Commands of `neucore`, one a module: HELP, add_arguments(parser), run(arguments). Light until they run."""

import argparse
import json
import sys
from typing import Any


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def print_json(value: Any) -> None:
    """Print a value as JSON: in ASCII alone where stdout's encoding lacks a letter, since JSON has its own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)
