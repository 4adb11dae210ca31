"""Names of image files: the same text in every locale, and found however an annotation, an index or a user spells them.

On a disk a name is bytes. Its text is those bytes as UTF-8, what is no UTF-8 as lone surrogates (Python's
`surrogateescape`), whatever the locale; JSON says them as escapes.
"""

import os
import posixpath
import unicodedata
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path

from neucore_plugin.common.errors import DataError, first_few


def name_of(path: str | os.PathLike) -> str:
    """The text of a path, or of a part of one, that the system gave; a text that it cannot have given is itself."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return os.fspath(path)


def path_of(name: str) -> Path:
    """The path whose text `name_of` gives."""
    try:
        return Path(os.fsdecode(name.encode("utf-8", "surrogateescape")))
    except UnicodeEncodeError:  # half a letter, which no file name holds: a path that can be asked for
        return Path(name.encode("utf-8", "backslashreplace").decode())


def _tidy(name: str) -> str:
    """Without `./`, doubled and backward slashes, blanks at the ends; accents as one letter each."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", _tidy(name).casefold())


def _bare(name: str) -> str:
    return posixpath.splitext(_caseless(name))[0]


# How given and known names are compared, from strict to loose; with the last, a given name may lack its suffix.
_COMPARED: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (_tidy, _tidy),
    (_caseless, _caseless),
    (_caseless, _bare),
)


def kept_as(name: str) -> str:
    """What a store keeps beside a known name, so that `asked_as` finds all that `Names` may take a spelling for."""
    return _bare(name)


def asked_as(name: str) -> tuple[str, str]:
    """The two texts of `kept_as` that a given spelling may mean; `Names` over what is found decides."""
    return _caseless(name), _bare(name)


class Names:
    """Known names, and which of them a given spelling means: the same, else the only one that differs least."""

    def __init__(self, known: Collection[str]) -> None:
        self.known = known

    @cached_property
    def _tables(self) -> list[dict[str, list[str]]]:
        tables: list[dict[str, list[str]]] = [{} for _ in _COMPARED]
        for name in self.known:
            for table, (_, of_known) in zip(tables, _COMPARED, strict=True):
                table.setdefault(of_known(name), []).append(name)
        return tables

    def find(self, name: str) -> str | None:
        """The known name that is meant; None where there is none. DataError where several may be meant."""
        if name in self.known:
            return name
        for table, (of_given, _) in zip(self._tables, _COMPARED, strict=True):
            found = table.get(of_given(name), ())
            if len(found) > 1:
                raise DataError(f"{name!r} may mean {first_few(map(repr, found))}; write the name as the file has it")
            if found:
                return found[0]
        return None


def _is_file(entry: os.DirEntry) -> bool:
    """Links alone are asked for; one in a circle is no file."""
    return entry.is_file(follow_symlinks=False) or os.path.isfile(entry)


class Listing:
    """Which files are there. A folder is listed once: asking for each file takes minutes on a network drive."""

    def __init__(self) -> None:
        self._folders: dict[Path, tuple[dict[str, Path], Names]] = {}

    def find(self, path: Path) -> Path | None:
        """The file that is meant by a path, whose last part may be spelt otherwise than on the disk; see `Names`."""
        if path.parent not in self._folders:
            place = next((place for place in (path.parent, path_of(str(path.parent))) if os.path.isdir(place)), None)
            try:
                there = sorted(entry.name for entry in os.scandir(place) if _is_file(entry)) if place else []
            except OSError as error:
                raise DataError(f"{place}: cannot be listed ({error.strerror}); check its permissions") from None
            files = {name_of(name): place / name for name in there}
            self._folders[path.parent] = files, Names(files)
        files, names = self._folders[path.parent]
        try:
            found = names.find(path.name) or names.find(name_of(path.name))
        except DataError as error:
            raise DataError(f"{path.parent}: {error}") from None
        return None if found is None else files[found]

    def __contains__(self, path: Path) -> bool:
        return self.find(path) is not None
