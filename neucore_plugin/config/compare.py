"""A config against the one that a checkpoint was trained with: what may differ, and what must not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.common.files import sha256_text

# Settings of the training: the config's are taken.
_TRAINING = ("loss", "query_dropout", "matching.mask_duplicates", "matching.reference_negatives", "fusion.gumbel")
_TRAINING += ("matching.learn_temperature", "dropout", "fusion.dropout", "concept_alignment.dropout")
_TUNING = ("freeze", "freeze_words", "train_blocks", "layer_decay", "checkpoint_activations", "blocks", "save_weights")
_TRAINING += tuple(f"backbone.{side}.{key}" for side in ("image", "text") for key in _TUNING)
# Where frozen weights that the checkpoint leaves out are found: the config's are taken where it names a place.
_PLACES = tuple(f"backbone.{side}.{key}" for side in ("image", "text") for key in ("pretrained", "vit_pretrained"))
# No part of the architecture: where weights came from, and how the vocabulary was counted.
_IGNORED = ("checkpoint", "model_type", "concepts.min_count", "backbone.image.weights", "backbone.text.glove")
_IGNORED += ("backbone.text.glove_words",)


def reconciled(path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The stored model section with the training settings of `wanted`. Raises CheckpointError on other differences."""
    theirs, mine = _flat(stored), _flat(wanted)
    problems = [
        f"model.{key}: {theirs.get(key)!r} in the checkpoint, {mine.get(key)!r} in the config"
        for key in sorted(theirs.keys() | mine.keys())
        if theirs.get(key) != mine.get(key)
        and not _within(key, _TRAINING + _PLACES + _IGNORED)
        and not (key.endswith((".quick_gelu", ".module")) and mine.get(key) is None)  # the checkpoint knows
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} was trained with other settings; give the config the same, or train anew\n  {listed}"
        )
    result = _copied(stored)
    for key, value in mine.items():
        elsewhere = _within(key, _PLACES) and value is not None and theirs.get(key) != "none"
        if _within(key, _TRAINING) or elsewhere:
            _put(result, key, value)
    return result


def _within(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _copied(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in section.items()}


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        section = section.setdefault(name, {})
    section[last] = value


# Keys of `run` that may differ between two runs that compute the same thing (the runner's rule for resume uses it too).
_FOLDERS_AND_LOG = ("output_dir", "resume", "evaluate", "report", "log_freq", "checkpoint_every_iters")
_LOADING = ("num_workers", "cache_dir", "cache_features", "batch_size_eval", "score_chunk", "use_dist_eval_sampler")
_PROCESSES = ("device", "distributed", "dist_url", "dist_backend", "rank", "gpu")
NOT_IN_FINGERPRINT = frozenset((*_FOLDERS_AND_LOG, *_LOADING, *_PROCESSES))
# Keys that change where and how something is done, not what comes out; a run may be continued with others. The number
# of processes is compared when the checkpoint is read.
HARMLESS = NOT_IN_FINGERPRINT | {"world_size", "job_id"}


def essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plain config without the keys of `run` that are harmless and without cache folders."""
    kept = {key: value for key, value in config.items() if key != "run"}
    kept["run"] = {key: value for key, value in (config.get("run") or {}).items() if key not in HARMLESS}
    return _without_caches(json.loads(json.dumps(kept, default=str)))  # as it stands in run.json


def _without_caches(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_caches(item) for key, item in value.items() if key != "cache_dir"}
    return value


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 of the essential part of a plain config, whatever the order of its keys."""
    return sha256_text(json.dumps(essential(config), sort_keys=True, ensure_ascii=False))


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`run.init_lr: 0.1 -> 0.2` for every essential key that differs."""
    before, after = _leaves(essential(old)), _leaves(essential(new))
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted({*before, *after})
        if before.get(key, absent) != after.get(key, absent)
    ]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves
