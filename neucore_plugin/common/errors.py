"""Errors that a user can mend: what was given, what is allowed, what to do; the command line prints no traceback."""

import difflib
from collections.abc import Iterable, Sequence


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
    return f"{did_you_mean(given, allowed)} Allowed: {', '.join(allowed) or 'nothing'}."


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A sentence tail such as ` Did you mean 'val'?`; empty where no known name is near, or too many to look at."""
    match = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5) if len(known) <= 20_000 else []
    return f" Did you mean {match[0]!r}?" if match else ""


def first_few(items: Iterable[object], shown: int = 4, separator: str = ", ") -> str:
    """The first items and the number of the others, such as `a, b, and 3 more`."""
    texts = [str(item) for item in items]
    rest = len(texts) - shown
    return separator.join([*texts[:shown], *([f"and {rest} more"] if rest > 0 else [])])
