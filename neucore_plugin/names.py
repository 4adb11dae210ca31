"""The nearest valid name, for error messages."""

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A sentence tail such as ` Did you mean 'val'? Allowed: test, train, val.`"""
    allowed = sorted(str(name) for name in allowed)
    match = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {match[0]!r}?" if match else ""
    return f"{hint} Allowed: {', '.join(allowed) or 'nothing'}."
