"""A config against the one that a checkpoint was trained with: what may differ, and what must not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neucore_plugin.errors import CheckpointError

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
