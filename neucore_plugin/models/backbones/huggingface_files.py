"""What the files of a repository of the Hugging Face hub say: its config, its pictures, how its words are pooled."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import CheckpointError, ConfigError, nearest
from neucore_plugin.models.backbones.towers import short
from neucore_plugin.weights.hub import PIXELS, hub_file

_VERSIONS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")  # that change no output
_RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
_POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
_POOLINGS |= {"lasttoken": "last", "last": "last"}


def picture_settings(config: Any, repo: str | None, revision: str | None, setting: str) -> dict[str, Any]:
    """The settings of a repository's image processor by our names; without one, those of CLIP at the config's size."""
    from neucore_plugin.config.encoders import CLIP

    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    size = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    size = size if isinstance(size, int) else None
    named = [hub_file(repo, name, f"{setting}.repo", revision, optional=True) for name in PIXELS] if repo else []
    found = next((path for path in named if path), None)
    if found is None:
        mean, std = ([*side] for side in CLIP)
        return {"image_size": size, "mean": mean, "std": std, "fit": "shortest", "interpolation": "bicubic"}
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(found.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # files of any kind
        raise CheckpointError(f"{setting}.repo: {found} is no image processor's ({short(error)})") from error
    if getattr(processor, "do_flip_channel_order", False):
        raise ConfigError(
            f"{setting}: this model takes colours as blue, green, red; only red, green, blue can be given"
        )
    resample = getattr(processor, "resample", None)
    # The library computes (255 factor x - offset - mean) / std of pixels x in [0, 1]; ours (x - mean) / std.
    factor = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    normal = getattr(processor, "do_normalize", True)
    mean, std = (list(processor.image_mean), list(processor.image_std)) if normal else ([0.0] * 3, [1.0] * 3)
    again = std if getattr(processor, "include_top", False) and normal else [1.0] * 3  # EfficientNet's, divided twice
    given = {
        "mean": [(offset + one) / factor for one in mean],
        "std": [one * other / factor for one, other in zip(std, again, strict=True)],
        "interpolation": _RESAMPLES[3 if resample is None else int(resample)],
    }
    return given | _shape(processor, size, setting)


def _shape(processor: Any, size: int | None, setting: str) -> dict[str, Any]:
    """image_size, fit and resize of an image processor. Raises ConfigError where it makes no squares."""
    wanted, crop = (_sides(getattr(processor, key, None)) for key in ("size", "crop_size"))
    crop = crop if getattr(processor, "do_center_crop", False) else {}
    share = getattr(processor, "crop_pct", None)
    if share and "shortest_edge" in wanted:  # ConvNeXt and PoolFormer say the share of the shorter side that is kept
        side = wanted["shortest_edge"]
        if not crop and side >= 384:  # ConvNeXt's large pictures are stretched
            return {"image_size": side, "fit": "stretch"}
        wanted, crop = {"shortest_edge": int(side / share)}, crop or {"height": side, "width": side}
    if "shortest_edge" in wanted and crop:
        found = {"image_size": crop["height"], "fit": "shortest", "resize": wanted["shortest_edge"]}
        return found if found["image_size"] == crop["width"] else _no_square(setting, crop)
    if "shortest_edge" in wanted:  # no square by itself
        return {"image_size": wanted["shortest_edge"], "fit": "shortest"}
    if wanted:
        side = wanted["height"]
        if crop and crop["height"] < side:  # stretched, and then its border left out
            return {"image_size": crop["height"], "fit": "stretch", "resize": side}
        return {"image_size": side, "fit": "stretch"} if side == wanted["width"] else _no_square(setting, wanted)
    patches, patch = getattr(processor, "max_num_patches", None), getattr(processor, "patch_size", None)
    if patches:  # of any shape: squares of as many patches
        return {"image_size": int(patches**0.5) * patch, "fit": "stretch"}
    return {"image_size": size, "fit": "stretch"}


def _sides(value: Any) -> dict[str, int]:
    if isinstance(value, int):
        return {"height": value, "width": value}
    found = {key: getattr(value, key, None) for key in ("height", "width", "shortest_edge")}
    found = {**found, **value} if isinstance(value, Mapping) else found
    return {key: side for key, side in found.items() if side}


def _no_square(setting: str, sides: Mapping[str, int]) -> dict[str, Any]:
    raise ConfigError(f"{setting}: this model takes pictures of {dict(sides)}; only squares can be given")


def config_of(raw: Mapping[str, Any], setting: str) -> Any:
    """transformers' object of a config.json. Raises ConfigError."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind, known = raw.get("model_type"), [*CONFIG_MAPPING.keys()]
    if kind not in known:
        what = "has no model_type" if kind is None else f"is of model_type {kind!r}, which transformers lacks"
        hint = "" if kind is None else nearest(kind, known) if len(known) < 40 else ""
        raise ConfigError(
            f"{setting}: the config {what}; code that a repository brings is never run, a newer transformers may have "
            f"it.{hint}"
        )
    try:
        return AutoConfig.for_model(**{key: value for key, value in raw.items() if key != "auto_map"})
    except Exception as error:  # values that the class refuses
        raise ConfigError(f"{setting}: no config of {kind} ({short(error)})") from error


def plain_class(config: Any, setting: str) -> Any:
    """transformers' class of a config, without any head. Raises ConfigError."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ConfigError(f"{setting}: transformers has no plain model of type {config.model_type}")
    kind = MODEL_MAPPING[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def weights_only(kind: Any) -> dict[str, Any]:
    """Keyword arguments by which a class reads pickled weights as weights only, where it can say so."""
    return {"weights_only": True} if "weights_only" in inspect.signature(kind.from_pretrained).parameters else {}


def pooling_of(repo: str | None, revision: str | None, setting: str) -> str:
    """How sentence-transformers' files of a repository pool its words; mean where it has none."""
    key = f"{setting}.repo"
    path = hub_file(repo, "modules.json", key, revision, optional=True) if repo else None
    if path is None:
        return "mean"
    modules = json_of(path)
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if further := {*kinds} - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(
            f"{setting}: {repo} has {', '.join(sorted(further))} after its transformer, which cannot be had here; name "
            "a `pooling` to take its transformer alone"
        )
    if "Pooling" not in kinds:
        return "mean"
    pooling = json_of(hub_file(repo, f"{kinds['Pooling']}/config.json", key, revision))
    modes = [name.removeprefix("pooling_mode_") for name in pooling if name.startswith("pooling_mode_")]
    modes = [mode for mode in modes if pooling[f"pooling_mode_{mode}"]]
    modes = [pooling["pooling_mode"]] if isinstance(pooling.get("pooling_mode"), str) else modes
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        found = ", ".join(modes) or "nothing"
        raise ConfigError(f"{setting}: {repo} pools by {found}; name a `pooling`: cls, mean, last")
    return _POOLINGS[modes[0]]


def json_of(path: Path) -> Any:
    """What a JSON file of a repository holds. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {short(error)}") from error


def without_versions(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what changes no output."""
    return {
        key: without_versions(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in _VERSIONS
    }
