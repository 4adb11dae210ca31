"""Files of weights: read as weights only, and one report of what does not fit. Knows no host."""

import contextlib
import errno
import pickletools
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neucore_plugin.common.errors import CheckpointError, FileError, first_few
from neucore_plugin.common.files import sha256_file

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # where a training file keeps its weights
# numpy's scalars, such as a metric beside the weights, for `allowed` of `read`.
SCALARS = [
    np.dtype,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *dict.fromkeys(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
]
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ"}  # operations of a pickle


def read(path: str | Path, allowed: Sequence[Any] = (), archives: Collection[str] = ()) -> Any:
    """What a file holds (safetensors, or what `torch.save` wrote), on the CPU, without running any code in it.

    allowed: further types of plain values, as `torch.serialization.safe_globals` takes them. archives: the sha256 of
    TorchScript archives that may be opened, for their state dict.

    Raises: CheckpointError for a file that is missing, damaged, or refused because of what it would run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file {path}; give a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript(path):
            return _archive_state(path, archives)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch itself does not look at the checksums
            if damaged:
                raise ValueError(f"the part {damaged} does not match its checksum")
        with (
            torch.serialization.safe_globals(list(allowed)) if allowed else contextlib.nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of the pickle's protocol: what matters is said in our error
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises whatever the damage leads to
        if code := _foreign_code(path):
            raise CheckpointError(
                f"{path} is refused: it contains code that would run on loading, or a type that is unknown here "
                f"({first_few(code)}). Where you trust its author, save its state_dict alone with torch.save"
            ) from error
        # The drive's doing, not the file's; EINVAL is what a seek by the lengths in a damaged file ends with.
        if isinstance(error, OSError) and error.errno not in (None, 0, errno.EINVAL):
            raise CheckpointError(str(FileError.of(error, path))) from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"{path} is truncated, damaged, or no file of weights ({path.stat().st_size:,} bytes; {reason}). Copy it "
            "again from where it was written, or fetch it again"
        ) from error


def read_state(path: str | Path, archives: Collection[str] = ()) -> dict[str, Tensor]:
    """{name: tensor} of a file of weights; see `read` and `state_of`."""
    return state_of(read(path, archives=archives), path)


def state_of(value: Any, path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of what a file held; wrappers and `module.` are taken off. CheckpointError where there is none."""
    holder = value if isinstance(value, Mapping) else {}
    holder = next((holder[key] for key in _WRAPPERS if isinstance(holder.get(key), Mapping)), holder)
    state = {str(name).removeprefix("module."): part for name, part in holder.items() if isinstance(part, Tensor)}
    if not state:
        found = f"the keys {first_few(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise CheckpointError(f"{path} holds no weights, a mapping of names to tensors; it holds {found}")
    return state


def misfits(
    expected: Mapping[str, Any],
    given: Mapping[str, Any],
    optional: Collection[str] = (),
    exact: bool = True,
    types: bool = False,
) -> list[str]:
    """Why `given` cannot be loaded where `expected` is wanted, a line a kind of problem; empty where it fits.

    optional: names that may be missing. exact: names that are not expected are a problem. types: so is another type of
    numbers, which loading would turn silently; but a wider one holds all that is needed.
    """
    problems = {
        "missing in the file": [name for name in expected if name not in given and name not in optional],
        "unknown to the model": [name for name in given if name not in expected] if exact else [],
        "other shape": [
            f"{name} {_shape(given[name])} in the file, {_shape(value)} in the model"
            for name, value in expected.items()
            if name in given and _shape(given[name]) != _shape(value)
        ],
        "other type": [
            f"{name} {given[name].dtype} in the file, {value.dtype} in the model"
            for name, value in (expected.items() if types else ())
            if isinstance(given.get(name), Tensor) and isinstance(value, Tensor) and not _holds(given[name], value)
        ],
    }
    return [f"{title}: {first_few(names)}" for title, names in problems.items() if names]


def _holds(given: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor's type is another's, or a wider floating one."""
    floats = given.is_floating_point() and wanted.is_floating_point()
    return given.dtype == wanted.dtype or (floats and given.element_size() > wanted.element_size())


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, by its list of members."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _archive_state(path: Path, archives: Collection[str]) -> dict[str, Tensor]:
    """Opening an archive may run what its author put in: only files whose sum is known are."""
    if sha256_file(path) not in archives:
        raise CheckpointError(
            f"{path} is refused: a TorchScript archive may run code of its author, and by its sha256 this is none of "
            "OpenAI's. Save its state_dict() with torch.save where you trust it, and give that file"
        )
    return torch.jit.load(path, map_location="cpu").state_dict()


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if isinstance(value, Tensor) else None


def _foreign_code(path: Path) -> list[str]:
    """Imports a pickle would make that weights never need, found without running anything; [] where unreadable."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                streams = [file.read(name) for name in file.namelist() if name.endswith("/data.pkl")]
        else:
            with open(path, "rb") as stream:
                streams = [stream.read(1 << 22)] if stream.read(1) == b"\x80" and stream.seek(0) == 0 else []
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return []
    found: set[str] = set()
    for content in streams:
        texts: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(content):
                if isinstance(argument, str):
                    texts.append(argument)
                if opcode.name in _IMPORTS:
                    found.add((argument if isinstance(argument, str) else " ".join(texts[-2:])).replace(" ", "."))
        except ValueError:
            pass  # damaged further on: what was seen so far counts
    return sorted(name for name in found if not name.startswith("torch.") and name != "collections.OrderedDict")
