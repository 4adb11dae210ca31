"""Reading annotation files: one clear error for a file, all problems of its entries in one message. No host."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from neucore_plugin.common import files
from neucore_plugin.common.errors import DataError, first_few

SHOWN = 10  # problems of one message


def read_json(path: Path, kind: type, title: str) -> Any:
    """The JSON list or object of a file. DataError where it cannot be read, is no JSON, or holds something else."""
    return files.read_json(path, kind, _remedy(title))


def read_lines(path: Path, title: str) -> list[str]:
    """The lines of a text file that are not blank, without their ends. Raises DataError."""
    return [line for line in files.read_text(path, _remedy(title)).split("\n") if line.strip()]


def _remedy(title: str) -> str:
    return f"mend it, or fetch it again: it belongs to {title}"


def good_entries(
    values: Sequence[Any],
    file: str,
    check: Callable[[dict[str, Any]], Iterable[str]],
    problems: list[str],
    unique: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a list that `check` finds no fault with, and their places; the faults go to `problems`.

    unique: a key whose value no two entries may share, where they have it.
    """
    seen: dict[Any, int] = {}
    for index, entry in enumerate(values):
        wrong = list(check(entry)) if isinstance(entry, dict) else [f"expected an object, given {type(entry).__name__}"]
        if not wrong and unique in entry and seen.setdefault(str(entry[unique]), index) != index:
            wrong = [f"{unique} {entry[unique]} stands already in entry {seen[str(entry[unique])]}"]
        problems += [f"{file}: entry {index}: {text}" for text in wrong]
        if not wrong:
            yield index, entry


def shown(value: Any) -> str:
    """A value of an annotation file in a message: cut where it is long."""
    return reprlib.repr(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def safe_name(name: Any, folders: bool = True) -> bool:
    """Whether an image name of an annotation file stays below the folder it is looked up in."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or "\\" in name:
        return False
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and bool(place.name) and (folders or "/" not in name)


def refuse(place: Path, problems: Sequence[str], of: str = "") -> None:
    """DataError with the first problems of a file or folder and their number, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listed = first_few((text if len(text) < 500 else f"{text[:500]}..." for text in problems), SHOWN, "\n  ")
        raise DataError(f"{place}: {count}{of}\n  {listed}")
