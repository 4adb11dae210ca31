"""Errors that a user can mend: what was given, what is allowed, what to do; the command line prints no traceback."""

import difflib
from collections.abc import Iterable


class NeucoreError(Exception):
    """Base of every error this package raises on bad input."""


class ConfigError(NeucoreError, ValueError):
    """A yaml file or an option is wrong; all problems are listed at once."""


class DataError(NeucoreError, ValueError):
    """Annotations, splits or folders are missing or malformed."""


class ImageError(DataError):
    """A file is no readable image."""


class CheckpointError(NeucoreError, RuntimeError):
    """A weight file is missing, damaged, hostile or of another architecture."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A sentence tail such as ` Did you mean 'val'? Allowed: test, train, val.`"""
    allowed = sorted(str(name) for name in allowed)
    match = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {match[0]!r}?" if match else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'nothing'}."


def first_few(items: Iterable[object], shown: int = 4, separator: str = ", ") -> str:
    """The first items and the number of the others, such as `a, b, and 3 more`."""
    texts = [str(item) for item in items]
    rest = len(texts) - shown
    return separator.join([*texts[:shown], *([f"and {rest} more"] if rest > 0 else [])])
