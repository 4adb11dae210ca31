"""Checkpoint files: plain containers and tensors only, written whole or not at all, loaded exactly or refused.

A file is a dict: {"format", "architecture", "model", "frozen", "config", "progress", "optimizer", "scheduler",
"scaler", "rng", "same"}; "model" holds the entries that training may change, "frozen" a fingerprint of each group
of the others. The file of the best weights ends with "progress". Knows no host.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, first_few
from neucore_plugin.common.files import atomic_write, expanded
from neucore_plugin.weights import folder
from neucore_plugin.weights.files import misfits, read

FORMAT = "neucore-checkpoint-1"


# ---- plain containers ----------------------------------------------------------------------------


def plain(value: Any, where: str = "value") -> Any:
    """`value` as nested dict / list / tuple of str, int, float, bool, None and detached CPU tensors.

    numpy scalars and arrays, paths, OmegaConf nodes and other mappings are converted; `where` names the place in
    errors. Raises CheckpointError for anything else, which a safe loader would refuse.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # A view would drag the whole storage behind it into the file.
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), where)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (str, bool, int, float)):  # subclasses, such as enumerations of str
        return next(kind for kind in (str, bool, int, float) if isinstance(value, kind))(value)
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        return plain(OmegaConf.to_container(value, resolve=True), where)
    if isinstance(value, Mapping):
        return {_plain_key(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot go into a checkpoint. "
        "Allowed: tensors, numbers, texts, None, and lists or dicts of them"
    )


def _plain_key(key: Any, where: str) -> Any:
    if isinstance(key, (np.generic, Path)):
        return plain(key, where)
    if isinstance(key, (str, int, float, bool)):
        return key
    raise CheckpointError(f"a key of {where} is a {type(key).__qualname__}; keys must be texts or numbers")


def jsonable(value: Any) -> Any:
    """`value` for JSON: plain, one-element tensors as numbers, larger ones as lists, NaN and infinities as None."""
    value = plain(value)
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- fingerprints --------------------------------------------------------------------------------


def fingerprint(state: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> str:
    """Hexadecimal sha256 over the names, types, shapes and bytes of a state dict, in the order of the names.

    Args:
        extra: further named fingerprints (such as those of frozen weights) to be mixed in.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            digest.update(f"{name}|{value!r}|".encode())
    for name in sorted(extra or {}):
        digest.update(f"{name}={extra[name]}|".encode())
    return digest.hexdigest()


def _group(name: str) -> str:
    """First two parts of an entry's name: fine enough to say which encoder differs, coarse enough to be compact."""
    parts = name.split(".")
    return ".".join(parts[: min(2, max(1, len(parts) - 1))])


def _group_fingerprints(entries: Mapping[str, Any]) -> dict[str, str]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        groups.setdefault(_group(name), {})[name] = value
    return {name: fingerprint(group) for name, group in sorted(groups.items())}


# ---- model weights -------------------------------------------------------------------------------


def _frozen_names(model: nn.Module) -> set[str]:
    """Entries of the modules that own parameters, all frozen; their buffers (batch norm) count as frozen with them.

    Exceptions, since nobody could get the weights again: a module with `in_checkpoint`, with all below it, and what a
    checkpoint has brought (`restore_model`), such as blocks that an earlier phase trained and this one freezes.
    """
    names: set[str] = set()
    kept: list[str] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "in_checkpoint", False):
            kept.append(f"{prefix}." if prefix else "")
        if prefix.startswith(tuple(kept)) or f"{prefix}." in kept:
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own and not any(parameter.requires_grad for parameter in own):
            entries = {**module._parameters, **module._buffers}
            names |= {f"{prefix}.{name}" if prefix else name for name, value in entries.items() if value is not None}
    return names - getattr(model, "brought", set())


def trainable_state(model: nn.Module) -> dict[str, Any]:
    """State entries that training may change: all but those of modules whose own parameters are all frozen."""
    frozen = _frozen_names(model)
    return {name: plain(value, name) for name, value in model.state_dict().items() if name not in frozen}


def frozen_fingerprints(model: nn.Module) -> dict[str, str]:
    """{group of names: sha256} over the entries that `trainable_state` leaves out."""
    frozen = _frozen_names(model)
    return _group_fingerprints({name: value for name, value in model.state_dict().items() if name in frozen})


def model_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """(trainable_state, frozen_fingerprints) of a model."""
    return trainable_state(model), frozen_fingerprints(model)


def restore_model(model: nn.Module, state: Mapping[str, Any], frozen: Mapping[str, str], path: str | Path) -> None:
    """Put `state` into `model`, exactly: each entry of the model is in `state`, or `frozen` proves that it is the same.

    A part that was frozen when the file was written may be trainable now: it then has the verified weights.

    Raises: CheckpointError that lists missing, unexpected and ill-shaped entries and frozen parts that differ; the
    model is unchanged then.
    """
    current = model.state_dict()
    absent = {name: value for name, value in current.items() if name not in state}
    present = _group_fingerprints(absent)
    doubtful = {name for name in absent if present[_group(name)] != frozen.get(_group(name))}
    still_frozen = doubtful & _frozen_names(model)
    problems = misfits(current, state, optional=set(absent) - (doubtful - still_frozen), types=True)
    differing = sorted({_group(name) for name in still_frozen})
    differing += sorted(f"{name} (absent in the model)" for name in set(frozen) - set(present))
    if differing:
        problems.append(f"frozen weights that are not those of the training: {first_few(differing)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model.\n  " + "\n  ".join(problems) + "\n  "
            "Build the model with the config the file was trained with (stored beside it, in config.yaml), with the "
            "same pretrained encoders; or train anew"
            + (f"\n  {hint}" if (hint := getattr(model, "misfit_hint", "")) else "")
        )
    model.load_state_dict(dict(state), strict=False)  # checked above: what is not in the file is proven to be the same
    model.brought = getattr(model, "brought", set()) | set(state)


def non_finite(state: Mapping[str, Any]) -> list[str]:
    """Names of the floating-point entries that hold NaN or infinity."""
    floats = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return [name for name, value in floats.items() if not bool(torch.isfinite(value).all())]


# ---- files ---------------------------------------------------------------------------------------


def save(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write `checkpoint` (made plain, with our format mark) to a temporary name, then rename it to `path`."""
    value = plain({"format": FORMAT, **checkpoint}, "checkpoint")
    with atomic_write(path, "wb") as stream:
        torch.save(value, stream)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, on the CPU, without running any code in it; or the folder form of one
    (`folder.py`), from a folder or from a repository OWNER/NAME[@REVISION] of the hub.

    Raises: CheckpointError for a file that is missing, damaged, refused (a pickle with code), foreign, or no file.
    """
    if folder.is_here(path):
        return {"format": FORMAT, **folder.load(path)}
    path = expanded(path)
    if path.is_dir():
        inside = path / "checkpoint_best.pth"
        hint = f"give the file, such as {inside}" if inside.is_file() else "it holds no checkpoint_best.pth either"
        raise CheckpointError(
            f"{path} is a folder, not a checkpoint file, and no exported model (it lacks {folder.CONFIG}); {hint}"
        )
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}; training writes checkpoint_best.pth into its run folder")
    return _checked(read(path), path)


def _checked(value: Any, path: Path) -> dict[str, Any]:
    ours = f'{{"format": "{FORMAT}", "model": {{name: tensor}}, "frozen": {{group: sha256}}, ...}}'
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a checkpoint of ours is a dict {ours}")
    mark = value.get("format")
    if mark == FORMAT and isinstance(value.get("model"), dict) and isinstance(value.get("frozen"), dict):
        return value
    if isinstance(mark, str) and mark.startswith("neucore-checkpoint-") and mark != FORMAT:
        raise CheckpointError(
            f"{path} has format {mark}; this version reads {FORMAT}. Install the version that wrote it"
        )
    raise CheckpointError(
        f"{path} is not one of our checkpoints: it has the keys {first_few(value) or 'none'}. Ours look like {ours}"
    )
