"""Checks of a completed config over several sections, or of what must exist on disk; each yields (key, text)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neucore_plugin.common.errors import nearest
from neucore_plugin.common.files import WEIGHT_FILES, expanded, hub_name
from neucore_plugin.config.data import DATASET_SCHEMAS
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS, pixels_of
from neucore_plugin.config.model import ZERO_SHOT
from neucore_plugin.config.published import PUBLISHED
from neucore_plugin.config.run import RUNNERS, TASKS
from neucore_plugin.config.sections import MODEL_SCHEMAS, Tables

Conflicts = Iterator[tuple[str, str]]


def cross_checks(content: Mapping[str, Any], tables: Tables) -> Conflicts:
    """What is wrong between sections of a completed config, and between it and the disk."""
    model, run, datasets = content["model"], content["run"], content["datasets"]
    backbone, zero_shot = model.get("backbone") or {}, model.get("method") in ZERO_SHOT
    if model.get("arch") in MODEL_SCHEMAS:
        if model["checkpoint"] is None or hub_name(model["checkpoint"]) is None:
            yield from _missing("model.checkpoint", model["checkpoint"], "null, or the path of a checkpoint")
        if zero_shot:
            yield from _missing("model.inversion.weights", model["inversion"]["weights"], "the path of phi's weights")
        for side, encoder in backbone.items():
            yield from _encoder(f"model.backbone.{side}", encoder, bool(model["checkpoint"]), tables)
    if run.get("runner") in RUNNERS:
        if zero_shot and run["resume"] != "never":
            yield "run.resume", f"got {run['resume']!r}; {model['method']} has no weights of its own to go on with"
        if zero_shot and not run["evaluate"]:
            yield "model.method", f"{model['method']} trains nothing; evaluate it: neucore evaluate --cfg-path ..."
        if run["evaluate"] and run["task"] in TASKS and not (model.get("checkpoint") or zero_shot):
            yield "model.checkpoint", "is null, but run.evaluate=true needs trained weights; give a checkpoint"
        if run["keep_optimizer"] and not model.get("checkpoint"):
            yield (
                "run.keep_optimizer",
                "got true; it needs model.checkpoint, the checkpoint_last.pth of an earlier phase",
            )
        if run["resume"] not in ("never", "auto"):
            yield from _missing("run.resume", run["resume"], "never, auto, or the path of a checkpoint")
        if datasets and all(name in tables.splits for name in datasets):
            yield from unknown_splits(run, datasets, {split for name in datasets for split in tables.splits[name]})
    for name, dataset in datasets.items():
        if name in DATASET_SCHEMAS:
            yield from _dataset(name, dataset, backbone.get("image") or {})


def unknown_splits(run: Mapping[str, Any], datasets: Iterable[str], known: Iterable[str]) -> Conflicts:
    """Splits that the `run` section names and none of the data sets has; an evaluation reads no train_splits."""
    for key in ("train_splits", "valid_splits", "test_splits")[bool(run.get("evaluate")) :]:
        for split in run.get(key) or ():
            if split not in known:
                yield f"run.{key}", f"{split!r} is no split of {', '.join(datasets)}.{nearest(split, known)}"


def _encoder(path: str, encoder: Mapping[str, Any], started: bool, tables: Tables) -> Conflicts:
    """started: from a checkpoint, which brings weights and the adapters of an earlier phase."""
    if not started:
        for key in ("weights", "glove", "glove_words"):
            yield from _missing(f"{path}.{key}", encoder.get(key), "null, or the path of a file")
        for key in ("pretrained", "vit_pretrained"):
            given = encoder.get(key)
            if given and "://" not in given and given.endswith(WEIGHT_FILES):
                yield from _missing(f"{path}.{key}", given, "the path of a file of weights, a URL, or none")
        if encoder["freeze"] and encoder.get("lora") is not None:
            yield f"{path}.lora", "is given, but freeze is true, so that nothing of it would be trained"
    if encoder["name"] == "registered" and encoder["module"] is None and len(tables.models) > len(MODEL_SCHEMAS):
        arch, known = encoder["arch"], tables.models
        if arch not in known:
            hint = f"{nearest(str(arch), known)} One of your own: name its module"
            yield f"{path}.arch", f"the host has no model {arch!r}.{hint}"


def _dataset(name: str, dataset: Mapping[str, Any], image: Mapping[str, Any]) -> Conflicts:
    path = f"datasets.{name}"
    root = (dataset["build_info"] or {}).get("root")
    if root is None and name == "folder":
        yield f"{path}.build_info.root", "got null; allowed: the path of your folder"
    given = root is not None and name not in PUBLISHED and dataset["data_type"] != "stream"  # that may be an address
    if given and not expanded(root).is_dir():
        yield f"{path}.build_info.root", f"folder {root!r} does not exist; give the data set's root folder"
    maps = (dataset["build_info"] or {}).get("features")
    if name == "cirr" and image and dataset["data_type"] == "images" and (image["name"] == "features") != bool(maps):
        wants = "feature maps; name their folder" if not maps else "pictures; leave it null"
        yield f"{path}.build_info.features", f"got {maps!r}, but the image encoder {image['name']} takes {wants}"
    for side, processor in (dataset["vis_processor"] or {}).items():
        if isinstance(processor, Mapping) and processor.get("name") == "cir_image":
            for key, value in pixels_of(image).items():
                if processor[key] != value:
                    own = BACKBONE_SCHEMAS["image"][image["name"]].pixels_from
                    hint = f", or say it in model.backbone.image.{key}" if own else ""
                    text = (
                        f"got {processor[key]}, but the image encoder {image['name']} takes {value}; leave it out{hint}"
                    )
                    yield f"{path}.vis_processor.{side}.{key}", text


def _missing(key: str, path: str | None, allowed: str) -> Conflicts:
    if path is not None and not expanded(path).exists():
        yield key, f"{path!r} does not exist; allowed: {allowed}"
