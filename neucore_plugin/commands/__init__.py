"""Commands of `neucore`, one a module: HELP, add_arguments(parser), run(arguments). Light until they run."""

import argparse


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
