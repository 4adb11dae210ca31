"""How models are made: from a section of a config, and from a checkpoint. `CirModel` calls it."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.compare import reconciled
from neucore_plugin.config.loading import model_defaults, stored_pixels, stored_section
from neucore_plugin.models.backbones import SIDES, build_backbone
from neucore_plugin.models.backbones.resnet_gru import released_classes, word_list
from neucore_plugin.processors import CaptionProcessor, ImageProcessor
from neucore_plugin.weights import checkpoint
from neucore_plugin.weights.trust import refuse_strangers


def from_config(cls: Any, cfg: Any, vocabulary: ConceptVocabulary | None, captions: Iterable[str]) -> Any:
    """See `CirModel.from_config`; cls: the model's class."""
    given = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(dict(cfg))
    config = model_defaults({"arch": cls.arch, **given})
    source = config.get("checkpoint")
    if source:
        return cls.from_checkpoint(source, wanted=config)
    vocabulary = vocabulary or ConceptVocabulary(())
    words, text = None, config["backbone"]["text"]
    if text["name"] == "glove_bigru" and text["captions"] == "released":
        words = word_list(captions, rule="released")
        vocabulary = ConceptVocabulary(released_classes(words, vocabulary.words))
    elif text["name"] == "glove_bigru":
        words = word_list(map(CaptionProcessor(), captions), vocabulary.words)
    model = cls.from_section(build_backbone(config["backbone"], words), vocabulary, config)
    model.trained = bool(len(vocabulary))  # with a vocabulary it is about to be
    return model


def from_checkpoint(known: Mapping[str, Any], path: str | Path, wanted: Mapping[str, Any] | None) -> Any:
    """See `CirModel.from_checkpoint`; known: {arch: class} of the models that the checkpoint may hold."""
    stored = checkpoint.load(path)
    header = stored.get("architecture") or {}
    cls = known.get(header.get("arch"))
    if cls is None or not {"config", "concepts"} <= set(header):
        names = " or ".join(map(repr, known))
        raise CheckpointError(f"{path}: holds a model of architecture {header.get('arch')!r}, not {names}")
    config = stored_section(header["config"])
    refuse_strangers(path, config, wanted)
    if wanted is not None:
        config = reconciled(path, config, wanted)
    vocabulary = ConceptVocabulary.from_plain(header["concepts"], f"{path}: its concept vocabulary")
    # What the file holds itself need not be read from elsewhere first.
    load = {side: f"backbone.{side}" in stored["frozen"] for side in SIDES}
    backbone = build_backbone(config["backbone"], header.get("words"), load)
    model = cls.from_section(backbone, vocabulary, config)
    if (pixels := header.get("image_processor")) is not None:
        model.image_processor = ImageProcessor(**stored_pixels(pixels))
    checkpoint.restore_model(model, stored["model"], stored["frozen"], path)
    model.restored()
    model.trained = True
    return model


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that every model takes, `matching` and `matching_loss` among them, from a complete section."""
    matching = dict(config["matching"])
    return {
        "embed_dim": config["embed_dim"],
        "query_dropout": config["query_dropout"],
        "feature_dropout": config["feature_dropout"],
        "layout": config["layout"],
        "negatives": matching.pop("negatives"),
        "concept_pos": config["concepts"]["pos"],
        "matching_loss": {name: matching.pop(name) for name in ("mask_duplicates", "reference_negatives")},
        "matching": matching,
        "config": {**config, "checkpoint": None},
    }
