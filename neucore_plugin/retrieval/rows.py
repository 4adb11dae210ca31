"""What an index knows of each picture beside its encodings: one small SQLite database a unit, or one in memory.

A name is any text that a file may have; what UTF-8 cannot say (half letters) is kept as bytes, since SQLite's texts are
UTF-8. Databases on disk may come from elsewhere: they are opened read-only and immutable, and what is not exactly the
table and the two look-ups made here (a view, a trigger) is refused before anything is asked.
"""

import json
import posixpath
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import parse_json
from neucore_plugin.common.names import asked_as, kept_as

FILE = "rows.sqlite"
_SCHEMA = {
    "rows": "CREATE TABLE rows(row INTEGER PRIMARY KEY, name, path, place INTEGER, bytes INTEGER, mtime_ns INTEGER, "
    "digest TEXT, attributes TEXT, loose, file)",
    "by_name": "CREATE INDEX by_name ON rows(loose)",
    "by_file": "CREATE INDEX by_file ON rows(file)",
}
_COLUMNS = "name, path, place, bytes, mtime_ns, digest, attributes"
_AT_A_TIME = 4096
_VALUES = 500  # of one question to SQLite, which takes 999 in old versions


@dataclass(frozen=True, slots=True)
class Row:
    """A picture of the gallery.

    path: posix text, below the index's root where it lies there. place: its offset in a tar shard, which `path` then
    names. bytes, mtime_ns, digest (sha256): of the file as it was encoded, None where they are not known.
    """

    name: str
    path: str
    place: int | None = None
    bytes: int | None = None
    mtime_ns: int | None = None
    digest: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Rows:
    """The rows of one unit, numbered from 0. Threads may share it."""

    def __init__(self, connection: sqlite3.Connection, count: int, place: str = "the index in memory") -> None:
        self._connection, self.count, self._place = connection, count, place
        self._lock, self._sound = threading.Lock(), False

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Rows":
        """In memory."""
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        return cls(connection, _fill(connection, rows))

    @classmethod
    def open(cls, path: Path, count: int) -> "Rows":
        """On disk; the file may be deleted from now on. DataError: no SQLite file."""
        try:
            uri = f"file:{quote(bytes(path.absolute()))}?mode=ro&immutable=1"
            return cls(sqlite3.connect(uri, uri=True, check_same_thread=False), count, str(path))
        except sqlite3.Error as error:
            raise DataError(f"{path} cannot be opened ({error}); build the index again") from None

    def select(self, sql: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """The answer to a query of the table `rows`. Raises DataError for a damaged database."""
        with self._lock:
            try:
                if not self._sound:
                    self._check()
                return self._connection.execute(sql, tuple(values)).fetchall()
            except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
                raise DataError(f"{self._place} is damaged ({error}); build the index again") from None

    def check(self) -> None:
        """Look at every page. Raises DataError."""
        if (found := self.select("PRAGMA quick_check(1)")) != [("ok",)]:
            raise DataError(f"{self._place} is damaged ({found[0][0]}); build the index again")
        if (count := self.select("SELECT count(*) FROM rows")[0][0]) != self.count:
            raise DataError(f"{self._place} is damaged ({count} rows, not {self.count}); build the index again")

    def _check(self) -> None:
        self._connection.execute("PRAGMA trusted_schema = OFF")
        self._connection.execute("PRAGMA cell_size_check = ON")
        if sorted(self._connection.execute("SELECT name, sql FROM sqlite_master")) != sorted(_SCHEMA.items()):
            raise sqlite3.DatabaseError("its tables are not those of an index")
        first, last = self._connection.execute(
            "SELECT (SELECT min(row) FROM rows), (SELECT max(row) FROM rows)"
        ).fetchone()
        if (first, last) != ((0, self.count - 1) if self.count else (None, None)):
            raise sqlite3.DatabaseError(f"it holds rows {first} to {last}, not {self.count}")
        self._sound = True

    def __getitem__(self, row: int) -> Row:
        found = self.select(f"SELECT {_COLUMNS} FROM rows WHERE row = ?", (row,))
        if not found:
            raise DataError(f"{self._place} is damaged (it lacks row {row}); build the index again")
        return self._row(found[0])

    def __iter__(self) -> Iterator[Row]:
        """All rows, in order."""
        for start in range(0, self.count, _AT_A_TIME):
            end = min(start + _AT_A_TIME, self.count)
            found = self.select(f"SELECT {_COLUMNS} FROM rows WHERE row >= ? AND row < ? ORDER BY row", (start, end))
            if len(found) != end - start:
                raise DataError(f"{self._place} is damaged (it lacks rows); build the index again")
            yield from map(self._row, found)

    def spelt(self, name: str) -> list[tuple[int, str]]:
        """(row, name) of all that a given spelling may mean."""
        found = self.select("SELECT row, name FROM rows WHERE loose IN (?, ?)", map(_kept, asked_as(name)))
        return [(row, self._text(known)) for row, known in found]

    def known(self, names: Sequence[str]) -> dict[str, list[int]]:
        """{name: its rows} of those of the given names that are here, spelt the same."""
        found: dict[str, list[int]] = {}
        wanted = set(names)
        for start in range(0, len(names), _VALUES):
            given = [_kept(kept_as(name)) for name in names[start : start + _VALUES]]
            sql = f"SELECT row, name FROM rows WHERE loose IN ({', '.join('?' * len(given))})"
            for row, kept in self.select(sql, given):
                if (name := self._text(kept)) in wanted and row not in found.setdefault(name, []):
                    found[name].append(row)
        return {name: rows for name, rows in found.items() if rows}

    def of_file(self, file: str) -> list[tuple[int, str]]:
        """(row, path) of the pictures whose files have this name, whatever their folder."""
        found = self.select("SELECT row, path FROM rows WHERE file = ? AND place IS NULL", (_kept(file),))
        return [(row, self._text(path)) for row, path in found]

    def _row(self, values: tuple[Any, ...]) -> Row:
        name, path, place, size, mtime, digest, attributes = values
        whole = all(value is None or isinstance(value, int) for value in (place, size, mtime))
        if not whole or not isinstance(digest, str | None):
            raise DataError(f"{self._place} is damaged (a row holds something else); build the index again")
        return Row(self._text(name), self._text(path), place, size, mtime, digest, self._attributes(attributes))

    def _text(self, kept: Any) -> str:
        try:
            return kept if isinstance(kept, str) else kept.decode("utf-8", "surrogatepass")
        except (AttributeError, UnicodeDecodeError):
            raise DataError(f"{self._place} is damaged (a row holds something else); build the index again") from None

    def _attributes(self, text: Any) -> dict[str, Any]:
        if text is None:
            return {}
        try:
            value = parse_json(text)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._place} is damaged (attributes: {error}); build the index again") from None
        if not isinstance(value, dict):
            raise DataError(f"{self._place} is damaged (attributes are no object); build the index again")
        return value


def write(path: Path, rows: Iterable[Row]) -> int:
    """A new database at `path`, which must not be there; returns the number of rows. OSError as the system says."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode = OFF")  # what is not finished is thrown away whole
        connection.execute("PRAGMA synchronous = OFF")  # the caller flushes it to the disk
        count = _fill(connection, rows)
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        connection.close()
    return count


def _fill(connection: sqlite3.Connection, rows: Iterable[Row]) -> int:
    connection.execute(_SCHEMA["rows"])
    number = -1

    def values() -> Iterator[tuple[Any, ...]]:
        nonlocal number
        for number, row in enumerate(rows):
            attributes = json.dumps(dict(row.attributes), allow_nan=False) if row.attributes else None
            yield (
                number, _kept(row.name), _kept(row.path), row.place, row.bytes, row.mtime_ns, row.digest, attributes,
                _kept(kept_as(row.name)), _kept(posixpath.basename(row.path)),
            )  # fmt: skip

    connection.executemany(f"INSERT INTO rows VALUES ({', '.join('?' * 10)})", values())
    connection.execute(_SCHEMA["by_name"])
    connection.execute(_SCHEMA["by_file"])
    connection.commit()
    return number + 1


def _kept(text: str) -> str | bytes:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
