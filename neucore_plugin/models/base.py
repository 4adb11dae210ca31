"""What all composed-retrieval models here share: building, checkpoints, inputs (`cir_inputs.py`), the batch's loss.

B batch, N image tokens, L words, K concepts of a query, C concept vocabulary, D width, Q queries, G gallery images.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel, all_gather_with_grad
from omegaconf import OmegaConf
from torch import Tensor

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import CheckpointError, ConfigError, nearest
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.compare import reconciled
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.backbones import SIDES, Backbone, build_backbone
from neucore_plugin.models.backbones.resnet_gru import word_list
from neucore_plugin.models.backbones.tuning import rate_scales
from neucore_plugin.models.inputs import CirInputs
from neucore_plugin.models.matching import Matching
from neucore_plugin.processors import CaptionProcessor, ImageProcessor
from neucore_plugin.weights import checkpoint
from neucore_plugin.weights.trust import refuse_strangers

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"


def model_types(released: bool = True) -> dict[str, str]:
    """{model type: path of its yaml}; the authors' form only with `released`."""
    paths = {path.stem: str(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    return paths if released else {name: path for name, path in paths.items() if not name.startswith("official_")}


class CirModel(CirInputs, BaseModel):
    """Base of the registered models: a backbone and a head that fuses a reference image with a relative caption.

    A subclass names itself (`arch`, `title`, `head_parts`), has a `matching`, and defines `from_section`,
    `encode_pairs`, `encode_image` and `encode_query`.

    Args:
        vocabulary: the concepts of the training captions; empty means that nothing can be trained.
        mask_duplicates: batch-mates with an equally right target do not count as negatives.
        reference_negatives: the batch's reference images count as negatives, beside its targets.
        config: the model section this was built from; kept in checkpoints.
        inputs: keyword arguments of CirInputs.
    """

    arch: ClassVar[str]
    head_parts: ClassVar[str]  # what has random weights before the training, for a warning
    DEFAULT_TYPE = "embedded"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {}
    matching: Matching

    def __init__(
        self,
        vocabulary: ConceptVocabulary,
        mask_duplicates: bool = True,
        reference_negatives: bool = False,
        config: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> None:
        super().__init__(**inputs)
        self.config, self.vocabulary = copy.deepcopy(dict(config or {})), vocabulary
        for side, encoder in (self.config.get("backbone") or {}).items():
            encoder |= getattr(getattr(self.backbone, side), "resolved", {})
        self.mask_duplicates, self.reference_negatives = mask_duplicates, reference_negatives
        self.trained = False

    # ---- building -------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What result tables call the model."""
        return self.arch

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "CirModel":
        """Build from a complete model section; subclasses define it."""
        raise TypeError(f"{cls.__name__} does not say how it is built from a config")

    @classmethod
    def default_config_path(cls, model_type: str | None = None) -> str:
        """Path of a type's yaml; None means the default type. Raises ConfigError for an unknown type."""
        model_type = model_type or cls.DEFAULT_TYPE
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise ConfigError(
                f"{cls.arch} has no model type {model_type!r}.{nearest(model_type, cls.PRETRAINED_MODEL_CONFIG_DICT)}"
            )
        return cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def from_pretrained(cls, model_type: str | None = None) -> "CirModel":
        """The model of a type: real encoders, a head of random weights."""
        cls.default_config_path(model_type)  # refuses an unknown type
        return cls.from_config({"model_type": model_type or cls.DEFAULT_TYPE})

    @classmethod
    def from_config(
        cls, cfg: Any, vocabulary: ConceptVocabulary | None = None, captions: Iterable[str] = ()
    ) -> "CirModel":
        """Build from a model section (defaults of its type filled in) and load `checkpoint` where it names one.

        captions: those of the training; a text encoder with a word vocabulary of its own builds it from them.
        """
        given = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(dict(cfg))
        config = model_defaults({"arch": cls.arch, **given})
        source = config.get("checkpoint")
        if source:
            return cls.from_checkpoint(source, wanted=config)
        vocabulary = vocabulary or ConceptVocabulary(())
        words = None
        if config["backbone"]["text"]["name"] == "glove_bigru":
            words = word_list(map(CaptionProcessor(), captions), vocabulary.words)
        model = cls._build(config, vocabulary, words)
        model.trained = bool(len(vocabulary))  # with a vocabulary it is about to be
        return model

    @classmethod
    def _build(
        cls,
        config: dict[str, Any],
        vocabulary: ConceptVocabulary,
        words: Sequence[str] | None = None,
        load: bool | Mapping[str, bool] = True,
    ) -> "CirModel":
        return cls.from_section(build_backbone(config["backbone"], words, load), vocabulary, config)

    @classmethod
    def from_checkpoint(cls, path: str | Path, wanted: Mapping[str, Any] | None = None) -> "CirModel":
        """A model as a checkpoint describes it, with its weights and concept vocabulary. Raises CheckpointError.

        Of a subclass the checkpoint must be its own; CirModel itself takes those of all registered subclasses.
        `wanted`: a model section. What it says of the training (loss, query_dropout, which negatives) is followed; what
        decides the architecture or the concepts must be the checkpoint's, a clear error otherwise.
        """
        stored = checkpoint.load(path)
        header = stored.get("architecture") or {}
        known = {cls.arch: cls} if cls is not CirModel else registered_models()
        cls = known.get(header.get("arch"))
        if cls is None or not {"config", "concepts"} <= set(header):
            names = " or ".join(map(repr, known))
            raise CheckpointError(f"{path}: holds a model of architecture {header.get('arch')!r}, not {names}")
        config = model_defaults(header["config"])
        refuse_strangers(path, config, wanted)
        if wanted is not None:
            config = reconciled(path, config, wanted)
        vocabulary = ConceptVocabulary.from_plain(header["concepts"], f"{path}: its concept vocabulary")
        # What the file holds itself need not be read from elsewhere first.
        load = {side: f"backbone.{side}" in stored["frozen"] for side in SIDES}
        model = cls._build(config, vocabulary, header.get("words"), load)
        model.image_processor = ImageProcessor(**header.get("image_processor", model.image_processor.settings))
        checkpoint.restore_model(model, stored["model"], stored["frozen"], path)
        model.restored()
        model.trained = True
        return model

    def restored(self) -> None:
        """Renew what was computed from weights that a checkpoint has replaced."""

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Become the model of a checkpoint: its architecture, weights and vocabulary (the host calls this)."""
        other = type(self).from_checkpoint(url_or_filename)
        self.__dict__.update(other.__dict__)

    def to(self, *args: Any, **kwargs: Any) -> "CirModel":
        """As in torch; warns once of an untrained head: the host's load_model ends here, checkpoint loaded or not."""
        if not self.trained:
            self.trained = True
            warnings.warn(
                f"{self.arch}: {self.head_parts} have random weights (an untrained head); train it, or load a trained "
                f'one with load_model("{self.arch}", checkpoint=PATH)',
                stacklevel=2,
            )
        return super().to(*args, **kwargs)

    def checkpoint_header(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights to be loaded by itself: plain containers only."""
        return {
            "arch": self.arch,
            "config": self.config,
            "concepts": self.vocabulary.to_plain(),
            "image_processor": self.image_processor.settings,
            **({"words": list(self.backbone.text.words)} if hasattr(self.backbone.text, "words") else {}),
        }

    def fingerprint(self) -> str:
        """Changes with any weight that training may change and with the backbone."""
        state, frozen = checkpoint.model_state(self)
        return checkpoint.fingerprint({**state}) if not frozen else checkpoint.fingerprint(state, extra=frozen)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Named groups for `run.lr_scales`: backbone_image, backbone_text, head; only what is trained.

        An encoder with layer_decay has a group a block, all of one name, each with its own `lr_scale`.
        """
        groups: dict[tuple[str, float], list] = {}
        taken: set[int] = set()
        for side, tuning in self.backbone.tuning.items():
            for parameter, scale in rate_scales(getattr(self.backbone, side), tuning.layer_decay):
                if id(parameter) not in taken:  # both sides may be one model
                    groups.setdefault((f"backbone_{side}", scale), []).append(parameter)
                    taken.add(id(parameter))
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        groups[("head", 1.0)] = head
        return [{"name": name, "lr_scale": scale, "params": part} for (name, scale), part in groups.items() if part]

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Where each concept of a query lies in its two images (see `models/concept_maps.py`): none in this base."""
        return [[] for _ in texts]

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """One training step: a batch of TripletDataset samples -> loss, loss_matching and others (scalars)."""
        return self.losses(self.encode_pairs(samples), samples)

    def encode_pairs(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every pair of a batch by itself -> {"query.*", "target.*", "reference.*", "loss_*"}, each with B rows."""
        raise TypeError(f"{type(self).__name__} does not say how pairs are encoded")

    def losses(self, encoded: Mapping[str, Tensor], samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch from what `encode_pairs` gave: each query against the targets of all processes.

        Rows of "loss_*" are averaged. `loss` is the sum of all. With several processes the gallery of the loss is that
        of the whole global batch, gathered with its gradient, so that N processes of B pairs equal one of N x B.
        """
        query, targets = part(encoded, "query"), part(encoded, "target")
        sides, keys = [targets], [samples["target_key"]]
        if self.reference_negatives:
            sides, keys = [targets, part(encoded, "reference")], [*keys, samples["reference_key"]]
        gallery = with_others({name: torch.stack([side[name] for side in sides], dim=1) for name in targets})
        gallery = {name: value.transpose(0, 1).flatten(0, 1) for name, value in gallery.items()}
        columns = with_others({"key": torch.stack([key.to(self.device) for key in keys], dim=1)})["key"]
        columns = columns.T.flatten().cpu()  # [G]
        if len(columns) < 2:
            raise ConfigError(
                "a batch of one pair has no negatives: its matching loss is always 0. Set run.batch_size_train to 2 or "
                "more, or model.matching.reference_negatives: true, or start several processes"
            )
        also_right = None
        if self.mask_duplicates:
            right = [torch.isin(columns, torch.tensor(rights)) for rights in samples["right_keys"]]
            also_right = torch.stack(right).to(self.device)  # [B,G]
        found = {"loss_matching": self.matching.contrastive_loss(self.matching.score(query, gallery), also_right)}
        found |= {name: rows.mean() for name, rows in encoded.items() if name.startswith("loss_")}
        return {"loss": sum(found.values()), **found}

    # ---- retrieval ------------------------------------------------------------------------------------------------

    def score(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor], chunk: int = 256) -> Tensor:
        """Scores [Q,G], higher is better, in matrix products over chunks of queries."""
        return self.matching.score(query, gallery, chunk=chunk)


def registered_models() -> dict[str, type[CirModel]]:
    """{arch: class} of the models of this kind in the host's registry."""
    known = registry.mapping["model_name_mapping"].items()
    return {arch: model for arch, model in known if issubclass(model, CirModel)}


def part(encoded: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries "name.*" of what `encode_pairs` gave, without `name.`."""
    return {key.removeprefix(f"{name}."): value for key, value in encoded.items() if key.startswith(f"{name}.")}


def with_others(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows [B,...] of all processes, this one's first, with gradient to where they come from; in one exchange."""
    if distributed.world_size() == 1:
        return rows
    flat = torch.cat([value.flatten(1) for value in rows.values()], dim=1)
    gathered = all_gather_with_grad(flat)
    gathered = torch.cat(distributed.own_first(list(gathered.chunk(distributed.world_size()))))
    widths = [value[0].numel() for value in rows.values()]
    pieces = gathered.split(widths, dim=1)
    return {name: piece.unflatten(1, rows[name].shape[1:]) for name, piece in zip(rows, pieces, strict=True)}
