"""The authors' word vocabulary: as JSON, or out of their pickle without running anything in it. Knows no torch.

Only plain containers come to life; an object of a class named Vocabulary becomes an inert record of its attributes.
Everything else in the file is refused by its name. A pickle may set attributes of whatever it is handed (BUILD), so it
is handed nothing that anybody else uses and that can be changed: builtin types, and classes of this file.
"""

import builtins
import io
import pickle
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import read_json
from neucore_plugin.common.pickles import refuse_bombs

_LARGEST = 256 << 20
_BUILTINS = {"dict", "list", "set", "frozenset", "tuple", "str", "int", "float", "bool", "object"}
_OLD_NAMES = {"long": int, "unicode": str}  # of Python 2, which protocols below 3 still write
_COLLECTIONS = {"OrderedDict", "defaultdict", "Counter"}


class Record:
    """What is left of a vocabulary object: its attributes, in `fields`."""

    fields: dict[str, Any]

    def __new__(cls, *_: Any) -> "Record":  # unpickling does not call __init__
        record = super().__new__(cls)
        record.fields = {}
        return record

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.fields.update(part)


class _Table(dict):
    """In place of the dicts of `collections`. A BUILD on the class itself fails: its __setstate__ lacks a `self`."""

    __slots__ = ()

    def __init__(self, *given: Any) -> None:  # a defaultdict comes with its factory first
        super().__init__(*(part for part in given if isinstance(part, dict | list | tuple)))

    def __setstate__(self, state: Any) -> None:
        """Attributes of a table are no words."""


class _Reconstructed:
    """What protocols 0 and 1 call in place of a plain construction."""

    __slots__ = ()

    def __new__(cls, kind: type, *_: Any) -> Record:
        if kind is not Record:
            raise pickle.UnpicklingError("refused: an object of another class than a vocabulary's")
        return Record()

    def __setstate__(self, state: Any) -> None:
        """There are no instances; see `_Table`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return getattr(builtins, name)
        if module == "__builtin__" and name in _OLD_NAMES:
            return _OLD_NAMES[name]
        if module == "collections" and name in _COLLECTIONS:
            return _Table
        if (module, name) == ("copyreg", "_reconstructor") or (module, name) == ("copy_reg", "_reconstructor"):
            return _Reconstructed
        if name.split(".")[-1].lower() in ("vocabulary", "vocab"):
            return Record
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which no vocabulary needs")


def read_vocabulary(path: str | Path) -> list[str]:
    """The words in the order of their rows. Raises DataError.

    A `.json` holds them as a list, or as an object word -> row; any other file is the authors' pickle.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        value = read_json(path, remedy="give its words as JSON")
        if isinstance(value, list):
            value = {word if type(word) is str else None: row for row, word in enumerate(value)}
    else:
        value = _unpickled(path)
    fields = value.fields if isinstance(value, Record) else value
    table = fields.get("word2idx", fields) if isinstance(fields, dict) else None
    if not isinstance(table, dict) or not table:
        raise DataError(
            f"{path} holds no table of words: a list of words, a table word -> row, or an object with `word2idx` is "
            "expected"
        )
    rows = {word: row for word, row in table.items() if type(word) is str and type(row) is int}
    if len(rows) != len(table) or sorted(rows.values()) != list(range(len(rows))):
        raise DataError(f"{path}: its table does not map words to the rows 0 to {len(table) - 1}, each once")
    return sorted(rows, key=rows.__getitem__)


def _unpickled(path: Path) -> Any:
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise DataError(f"{path} has {size:,} bytes; no vocabulary is that large")
        content = path.read_bytes()
        refuse_bombs(content)
        return _Unpickler(io.BytesIO(content)).load()
    except OSError as error:
        raise DataError(f"cannot read the vocabulary {path}: {error.strerror}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise DataError(f"{path} is no pickled vocabulary: {str(error)[:200] or type(error).__name__}") from error
