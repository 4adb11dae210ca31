"""What may differ between a config and the one that a checkpoint (`model`) or a run (all of it) was started with."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.common.files import sha256_text
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS, PIXELS

# Settings of the training: the config's are taken.
_TRAINING = ("loss", "query_dropout", "matching.mask_duplicates", "matching.reference_negatives", "fusion.gumbel")
_TRAINING += ("matching.learn_temperature", "dropout", "fusion.dropout", "concept_alignment.dropout")
_TRAINING += ("matching.negatives", "feature_dropout", "layout.dropout")
_TRAINING += ("fusion.attend_padding",)  # of the evaluation, and as free
_TUNING = ("freeze", "freeze_words", "train_blocks", "layer_decay", "checkpoint_activations", "blocks", "save_weights")
_TUNING += ("moving_norms",)
_TRAINING += tuple(f"backbone.{side}.{key}" for side in ("image", "text") for key in _TUNING)
# Where frozen weights that the checkpoint leaves out are found: the config's are taken where it names a place.
_PLACES = ("pretrained", "vit_pretrained", "repo", "revision", "tokenizer")
_PLACES = tuple(f"backbone.{side}.{key}" for side in ("image", "text") for key in _PLACES)
# Of an encoder whose files say it: the checkpoint knows what they said.
_PIXELS = tuple(f"backbone.image.{key}" for key in PIXELS)
# No part of the architecture: where weights came from, and how the vocabulary was counted.
_IGNORED = ("checkpoint", "model_type", "concepts.min_count", "backbone.image.weights", "backbone.text.glove")
_IGNORED += ("backbone.text.glove_words",)


def reconciled(path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section to build a checkpoint's model with, from the one `stored` in it and the `wanted` one.

    What decides the architecture or the concepts must be equal: CheckpointError lists all that is not, by key. What
    only concerns the training is taken from `wanted`, and so is the place of frozen weights that the file leaves out;
    where weights once came from does not matter.
    """
    result, old, new = copy.deepcopy(dict(stored)), leaves(stored), leaves(wanted)
    says_pixels = getattr(BACKBONE_SCHEMAS["image"].get(old.get("backbone.image.name")), "pixels_from", None)
    problems = [
        f"model.{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} in the config"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not _within(key, _TRAINING + _IGNORED)
        and not _is_place(key, old.get(key), new.get(key))
        and not (key.endswith((".quick_gelu", ".module")) and new.get(key) is None)  # the checkpoint knows
        and not (key in _PIXELS and new.get(key) is None and says_pixels)
    ]
    if problems:
        listed = "\n  ".join(problems)
        if old.get("form") == "default" and new.get("form") == "clauses":
            listed += "\n  (the type embedded has another form now; model.model_type: embedded_paper has the former)"
        raise CheckpointError(
            f"{path} was trained with other settings; give the config the same, or train anew\n  {listed}"
        )
    for key, value in new.items():
        elsewhere = _is_place(key, old.get(key), value) and value is not None and old.get(key) != "none"
        if _within(key, _TRAINING) or elsewhere:
            *outer, last = key.split(".")
            section = result
            for name in outer:
                section = section.setdefault(name, {})
            section[last] = value
    return result


def _is_place(key: str, old: Any, new: Any) -> bool:
    """Whether a key says where weights lie; an architecture does where it is a folder."""
    folders = key.endswith(".arch") and all(str(value).startswith("local-dir:") for value in (old, new))
    return _within(key, _PLACES) or folders


def _within(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


# Keys of `run` that change where and how something is done, not what comes out: a run may be continued with others.
# The number of processes is compared when the checkpoint is read.
_FOLDERS_AND_LOG = ("output_dir", "job_id", "resume", "evaluate", "report", "log_freq", "checkpoint_every_iters")
_LOADING = (
    "num_workers",
    "loader_timeout",
    "cache_dir",
    "batch_size_eval",
    "score_chunk",
    "use_dist_eval_sampler",
)
_PROCESSES = ("device", "distributed", "dist_url", "dist_backend", "rank", "gpu", "world_size")
_HARMLESS = frozenset((*_FOLDERS_AND_LOG, *_LOADING, *_PROCESSES))


def _essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plain config without the keys of `run` that are harmless, cache folders, and what is refused as too large."""
    kept = {key: value for key, value in config.items() if key != "run"}
    kept["run"] = {key: value for key, value in (config.get("run") or {}).items() if key not in _HARMLESS}
    return _without_places(json.loads(json.dumps(kept, default=str)))  # as it stands in run.json


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in ("cache_dir", "max_pixels")}
    return value


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 of the essential part of a plain config, whatever the order of its keys."""
    return sha256_text(json.dumps(_essential(config), sort_keys=True, ensure_ascii=False))


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`run.init_lr: 0.1 -> 0.2` for every essential key that differs."""
    before, after = leaves(_essential(old)), leaves(_essential(new))
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted({*before, *after})
        if before.get(key, absent) != after.get(key, absent)
    ]


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of everything that is no mapping."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
