"""Reading annotation files: one clear error for a file, all problems of its entries in one message. No host."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from neucore_plugin.common.errors import DataError, first_few

SHOWN = 10  # problems of one message


def read_json(path: Path, kind: type, title: str) -> Any:
    """The JSON list or object of a file. DataError where it cannot be read, is no JSON, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it comes with {title}'s annotations") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON ({error}); fetch it again") from None
    if not isinstance(value, kind):
        what = {dict: "object", list: "list"}[kind]
        raise DataError(f"{path}: expected a JSON {what}, given {type(value).__name__}")
    return value


def read_lines(path: Path, title: str) -> list[str]:
    """The lines of a text file that are not blank, without their ends."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it comes with {title}'s annotations") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error}); fetch it again") from None
    return [line.rstrip("\r\n") for line in text.split("\n") if line.strip()]


def safe_name(name: Any) -> bool:
    """Whether an image name of an annotation file stays below the folder it is looked up in."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or "\\" in name:
        return False
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and bool(place.name)


def refuse(root: Path, split: str, problems: Sequence[str]) -> None:
    """DataError with the first problems and their number, if there are any."""
    if problems:
        listed = first_few(problems, SHOWN, "\n  ")
        raise DataError(f"{root}: {len(problems)} problems of split {split!r}\n  {listed}")
