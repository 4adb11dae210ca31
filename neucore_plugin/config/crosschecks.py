"""Checks of a config that take more than one key: what must go together, and what must exist on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neucore_plugin.common.errors import nearest
from neucore_plugin.config.encoders import pixels_of
from neucore_plugin.config.model import WITH_DROPOUT
from neucore_plugin.config.published import PUBLISHED
from neucore_plugin.config.run import OUR_RUNNERS, OUR_TASKS
from neucore_plugin.config.sections import DATASET_SCHEMAS, MODEL_SCHEMAS

if TYPE_CHECKING:
    from neucore_plugin.config.loading import Checker
    from neucore_plugin.config.sections import Tables


def cross_checks(checker: "Checker", content: Mapping[str, Any], tables: "Tables") -> None:
    """Add to `checker` what is wrong between keys; keys that are wrong in themselves are left alone."""
    if content["model"].get("arch") in MODEL_SCHEMAS:
        _model(checker, content["model"])
        for side, encoder in (content["model"].get("backbone") or {}).items():
            if isinstance(encoder, Mapping):
                _encoder(checker, f"model.backbone.{side}", encoder, content["model"], tables)
    if content["run"].get("runner") in OUR_RUNNERS or "run.runner" in checker.bad:
        _run(checker, content)
        _splits(checker, content, tables)
    for name, dataset in content["datasets"].items():
        if name in DATASET_SCHEMAS:
            _dataset(checker, name, dataset, content["model"])


def _model(checker: "Checker", model: Mapping[str, Any]) -> None:
    width = model.get("embed_dim")
    alignment = model.get("concept_alignment") or {}
    heads = alignment.get("heads")
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        checker.add("model.concept_alignment.heads", f"got {heads}; allowed: a divisor of model.embed_dim ({width})")
    dropped = model.get("query_dropout") or {}
    if sum(value for value in dropped.values() if isinstance(value, float)) > 1:
        checker.add("model.query_dropout", f"got {dropped}; allowed: image and text together at most 1")
    image = (model.get("backbone") or {}).get("image")
    if isinstance(image, Mapping) and image.get("name") == "efficientnet_lite0":
        size, grid = image.get("image_size"), image.get("grid")
        if isinstance(size, int) and isinstance(grid, int) and grid > size // 32:
            checker.add("model.backbone.image.grid", f"got {grid}; allowed: at most image_size / 32, here {size // 32}")
    _exists(checker, "model.checkpoint", model.get("checkpoint"), "null, or the path of a checkpoint")
    text = (model.get("backbone") or {}).get("text")
    if not model.get("checkpoint"):  # a checkpoint brings the weights itself
        for side, section, key in (("image", image, "weights"), ("text", text, "glove"), ("text", text, "glove_words")):
            given = section.get(key) if isinstance(section, Mapping) else None
            _exists(checker, f"model.backbone.{side}.{key}", given, "null, or the path of a file")
    if model.get("form") == "released":
        _released(checker, model, text)
    if model.get("arch") == "cir_baseline" and "model.method" not in checker.bad:
        _baseline(checker, model, text)


_FILES = (".pth", ".pt", ".bin", ".safetensors")


def _encoder(
    checker: "Checker", path: str, encoder: Mapping[str, Any], model: Mapping[str, Any], tables: "Tables"
) -> None:
    """What can be told of an encoder without building it."""
    started = model.get("checkpoint")  # it brings weights, and adapters of an earlier phase
    for key in ("pretrained", "vit_pretrained"):
        given = encoder.get(key)
        if not started and isinstance(given, str) and "://" not in given and given.endswith(_FILES):
            _exists(checker, f"{path}.{key}", given, "the path of a file of weights, a URL, or none")
    if encoder.get("freeze") is True and encoder.get("train_blocks") is not None:
        checker.add(f"{path}.train_blocks", f"got {encoder['train_blocks']}; it needs freeze: false")
    if encoder.get("freeze") is True and encoder.get("lora") is not None and not started:
        checker.add(f"{path}.lora", "is given, but freeze is true, so that nothing of it would be trained")
    if encoder.get("lora") is not None and encoder.get("train_blocks") is not None:
        checker.add(f"{path}.lora", "is given beside train_blocks; allowed: one of the two")
    size, patch = encoder.get("image_size"), encoder.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and size % patch:
        checker.add(f"{path}.image_size", f"got {size}; allowed: a multiple of the patch size {patch}")
    sizes = encoder.get("architecture") or {}
    width, heads = sizes.get("width"), sizes.get("heads")
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        checker.add(f"{path}.architecture.heads", f"got {heads}; allowed: a divisor of its width {width}")
    arch = encoder.get("arch")
    known = encoder.get("name") == "registered" and encoder.get("module") is None and len(tables.models) > 2
    if known and f"{path}.arch" not in checker.bad and arch not in tables.models:
        checker.add(
            f"{path}.arch",
            f"the host has no model {arch!r}.{nearest(str(arch), tables.models)} One of your own: name its module",
        )


def _released(checker: "Checker", model: Mapping[str, Any], text: Any) -> None:
    """What the authors' form needs."""
    for section, key, needed in (("concept_alignment", "bag", "joint"), ("fusion", "mode", "mixture")):
        given = (model.get(section) or {}).get(key)
        if given not in (None, needed) and f"model.{section}.{key}" not in checker.bad:
            checker.add(f"model.{section}.{key}", f"got {given!r}; model.form released needs {needed!r}")
    width = text.get("width") if isinstance(text, Mapping) else None
    if width is not None and width != model.get("embed_dim"):
        checker.add("model.backbone.text.width", f"got {width}; model.form released needs model.embed_dim's")


def _baseline(checker: "Checker", model: Mapping[str, Any], text: Any) -> None:
    """What a method of the baselines has no use for, or needs."""
    method, width = model.get("method"), model.get("embed_dim")
    if model.get("dropout") is not None and method not in WITH_DROPOUT:
        checker.add("model.dropout", f"got {model['dropout']}; {method} has none, only {' and '.join(WITH_DROPOUT)}")
    heads = (model.get("cross_attention") or {}).get("heads")
    if method == "cross_attention" and isinstance(width, int) and isinstance(heads, int) and width % heads:
        checker.add("model.cross_attention.heads", f"got {heads}; allowed: a divisor of model.embed_dim ({width})")
    if method == "image_only" and isinstance(text, Mapping) and text.get("freeze") is False:
        checker.add("model.backbone.text.freeze", "got false; image_only reads no text, so that nothing would train it")


def _run(checker: "Checker", content: Mapping[str, Any]) -> None:
    run = content["run"]
    needed = {"runner_cir": ("max_epoch",), "runner_cir_iter": ("max_iters", "iters_per_inner_epoch")}
    for key in needed.get(run.get("runner"), ()):
        if run.get(key) is None and f"run.{key}" not in checker.bad and not run.get("evaluate"):
            checker.add(f"run.{key}", f"is required by {run['runner']} but not given")
    if not run.get("train_splits") and not run.get("evaluate") and "run.train_splits" not in checker.bad:
        checker.add("run.train_splits", "got []; training needs a split; name one, or set run.evaluate=true")
    untrained = not content["model"].get("checkpoint") and "model.checkpoint" not in checker.bad
    if run.get("evaluate") and run.get("task") in OUR_TASKS and untrained:
        checker.add("model.checkpoint", "is null, but run.evaluate=true needs trained weights; give a checkpoint")
    if run.get("evaluate") and not run.get("test_splits") and not run.get("valid_splits"):
        checker.add("run.test_splits", "got []; run.evaluate=true needs a split to evaluate")
    low, high = run.get("min_lr"), run.get("init_lr")
    if low is not None and high is not None and low > high and "run.init_lr" not in checker.bad:
        checker.add("run.min_lr", f"got {low}; allowed: at most run.init_lr ({high})")
    if run.get("resume") not in ("never", "auto"):
        _exists(checker, "run.resume", run.get("resume"), "never, auto, or the path of a checkpoint")


def _splits(checker: "Checker", content: Mapping[str, Any], tables: "Tables") -> None:
    names = list(content["datasets"])
    if not names or any(name not in tables.splits for name in names):
        return
    known = {split for name in names for split in tables.splits[name]}
    keys = (
        ("valid_splits", "test_splits")
        if content["run"].get("evaluate")
        else ("train_splits", "valid_splits", "test_splits")
    )
    for key in keys:
        for split in content["run"].get(key) or ():
            if split not in known:
                checker.add(f"run.{key}", f"{split!r} is no split of {', '.join(names)}.{nearest(split, known)}")


def _dataset(checker: "Checker", name: str, dataset: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    path, info = f"datasets.{name}", dataset.get("build_info")
    root = info.get("root") if isinstance(info, Mapping) else None
    own_check = name in PUBLISHED
    if isinstance(root, str) and not own_check and not Path(root).expanduser().is_dir():
        checker.add(f"{path}.build_info.root", f"folder {root!r} does not exist; give the data set's root folder")
    backbone = model.get("backbone")
    image = backbone.get("image") if isinstance(backbone, Mapping) else None
    wanted = pixels_of(image) if isinstance(image, Mapping) else {}
    for side, processor in (dataset.get("vis_processor") or {}).items():
        if not isinstance(processor, Mapping) or processor.get("name") != "cir_image":
            continue
        for key, value in wanted.items():
            if processor.get(key) not in (None, value) and f"model.backbone.image.{key}" not in checker.bad:
                checker.add(
                    f"{path}.vis_processor.{side}.{key}",
                    f"got {processor[key]}, but the image encoder {image['name']} takes {value}; leave it out",
                )


def _exists(checker: "Checker", path: str, given: Any, allowed: str) -> None:
    if isinstance(given, str) and path not in checker.bad and not Path(given).expanduser().exists():
        checker.add(path, f"{given!r} does not exist; allowed: {allowed}")
