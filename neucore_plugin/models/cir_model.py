"""What all composed-retrieval models here share: building, checkpoints, inputs, stand-ins, the batch's loss.

B batch, N image tokens, L words, K concepts of a query, C concept vocabulary, D width, Q queries, G gallery images.
"""

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel, all_gather_with_grad
from omegaconf import OmegaConf
from torch import Tensor, nn

from neucore_plugin import checkpoint, distributed
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary
from neucore_plugin.config import model_defaults
from neucore_plugin.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import SIDES, Backbone, build_backbone
from neucore_plugin.models.backbones.resnet_gru import word_list
from neucore_plugin.models.backbones.tuning import rate_scales
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.reconcile import reconciled
from neucore_plugin.names import nearest
from neucore_plugin.processors import CaptionProcessor, ImageProcessor

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"


def model_types(released: bool = True) -> dict[str, str]:
    """{model type: path of its yaml}; the authors' form only with `released`."""
    paths = {path.stem: str(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    return paths if released else {name: path for name, path in paths.items() if not name.startswith("official_")}


class CirModel(BaseModel):
    """Base of the registered models: a backbone and a head that fuses a reference image with a relative caption.

    A query may lack its image or its text; learned stand-ins, trained by `query_dropout`, take their place. A subclass
    names itself (`arch`, `title`, `head_parts`), has a `matching`, and defines `from_section`, `encode_pairs`,
    `encode_image` and `encode_query`.

    Args:
        backbone: see `neucore_plugin.models.backbones`.
        vocabulary: the concepts of the training captions; empty means that nothing can be trained.
        query_dropout: {"image": p, "text": p}, which part of the training queries loses its image, or its text.
        mask_duplicates: batch-mates with an equally right target do not count as negatives.
        reference_negatives: the batch's reference images count as negatives, beside its targets.
        config: the model section this was built from; kept in checkpoints.
        projected: whether words and sentences are projected to the width D, and images normalised before.
        query_reads: what queries read of the backbone: tokens or pooled (of the reference), words, sentence. Only that
            gets projections and stand-ins, so that no parameter is idle.
        gallery_reads: what gallery images are encoded from, tokens or pooled.
    """

    arch: ClassVar[str]
    head_parts: ClassVar[str]  # what has random weights before the training, for a warning
    DEFAULT_TYPE = "embedded"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {}
    matching: Matching

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: ConceptVocabulary,
        embed_dim: int,
        query_dropout: Mapping[str, float],
        mask_duplicates: bool = True,
        reference_negatives: bool = False,
        concept_pos: Sequence[str] = ("NOUN", "VERB", "ADJ", "ADV"),
        config: Mapping[str, Any] | None = None,
        projected: bool = True,
        query_reads: Sequence[str] = ("tokens", "words", "sentence"),
        gallery_reads: str = "tokens",
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = dict(config or {}), vocabulary
        self.mask_duplicates, self.reference_negatives = mask_duplicates, reference_negatives
        self.query_dropout, self.concept_pos, self.trained = dict(query_dropout), tuple(concept_pos), False
        self.backbone = backbone
        self.reference_reads = next((name for name in ("tokens", "pooled") if name in query_reads), None)
        self.gallery_reads = gallery_reads
        image, text, read = backbone.image, backbone.text, {*query_reads, gallery_reads}
        pooled_width = getattr(image, "pooled_width", image.width)
        self.image_projection = projection(image.width, embed_dim, projected) if "tokens" in read else None
        self.pooled_projection = projection(pooled_width, embed_dim, projected) if "pooled" in read else None
        if not projected and text.width != embed_dim:
            raise ConfigError(
                f"the released form has no projection of the words: model.backbone.text gives width "
                f"{text.width}, model.embed_dim is {embed_dim}; make them equal"
            )
        self.word_projection, self.sentence_projection = (
            (projection(text.width, embed_dim) if projected else nn.Identity()) if name in read else None
            for name in ("words", "sentence")
        )
        stand_ins = {"absent_image": self.reference_reads, "absent_word": "words", "absent_sentence": "sentence"}
        for name, part in stand_ins.items():
            setattr(self, name, nn.Parameter(torch.randn(embed_dim) * 0.02) if part in query_reads else None)
        self.image_processor = ImageProcessor(image.image_size, image.mean, image.std)
        self.caption_processor = CaptionProcessor()
        self._extractor: ConceptExtractor | None = None

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
        _refuse_imports(path, config, wanted)
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

    @property
    def device(self) -> torch.device:
        return self.matching.temperature.device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Named groups for `run.lr_scales`: backbone_image, backbone_text, head; only what is trained.

        An encoder with layer_decay has a group a block, all of one name, each with its own `lr_scale`.
        """
        groups: dict[tuple[str, float], list] = {}
        for side, tuning in self.backbone.tuning.items():
            for parameter, scale in rate_scales(getattr(self.backbone, side), tuning.layer_decay):
                groups.setdefault((f"backbone_{side}", scale), []).append(parameter)
        taken = {id(parameter) for members in groups.values() for parameter in members}
        head = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        groups[("head", 1.0)] = head
        return [{"name": name, "lr_scale": scale, "params": part} for (name, scale), part in groups.items() if part]

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def image_features(
        self, names: Iterable[str], pixels: Tensor | None, tokens: Tensor | None = None, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """pixels [B,3,H,W], or cached backbone outputs -> those of `names`, projected: tokens [B,N,D], pooled [B,D]."""
        names, found = tuple(names), {"tokens": tokens, "pooled": pooled}
        if any(found[name] is None for name in names):
            if pixels is None:
                raise ValueError(f"give an image as pixels, or its cached {' and '.join(names)}")
            found = self.backbone.image(pixels.to(self.device))
        layers = {"tokens": self.image_projection, "pooled": self.pooled_projection}
        return {name: layers[name](found[name].to(self.device)) for name in names}

    def image_tokens(self, pixels: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """pixels [B,3,H,W], or cached backbone tokens [B,N,Di] -> projected tokens [B,N,D]."""
        return self.image_features(["tokens"], pixels, tokens)["tokens"]

    def text_features(self, texts: Sequence[str], features: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """texts, or cached backbone features -> words [B,L,D], word_mask [B,L], sentence [B,D]: what queries read."""
        if self.word_projection is None and self.sentence_projection is None:
            return {}
        if features is None:
            encoded = self.backbone.text([self.caption_processor(text) for text in texts])
            features = {"words": encoded["words"], "word_mask": encoded["mask"], "sentence": encoded["sentence"]}
        mask = features["word_mask"].to(self.device)
        result = {}
        if self.word_projection is not None:
            words = self.word_projection(features["words"].to(self.device)) * mask[..., None]
            result |= {"words": words, "word_mask": mask}
        if self.sentence_projection is not None:
            result["sentence"] = self.sentence_projection(features["sentence"].to(self.device))
        return self._stand_in_text(result, ~mask.any(1))

    def _stand_in_text(self, text: dict[str, Tensor], absent: Tensor) -> dict[str, Tensor]:
        """Rows where `absent` [B] get the learned stand-in: one word and a sentence."""
        result = {}
        if "words" in text:
            words, mask = text["words"], text["word_mask"]
            if words.shape[1] == 0:
                words, mask = words.new_zeros(len(words), 1, self.absent_word.shape[0]), mask.new_zeros(len(mask), 1)
            first = torch.arange(words.shape[1], device=words.device) == 0
            stand_in = torch.where(first[:, None], self.absent_word, torch.zeros_like(self.absent_word))
            result["words"] = torch.where(absent[:, None, None], stand_in, words)
            result["word_mask"] = torch.where(absent[:, None], first, mask)
        if "sentence" in text:
            result["sentence"] = torch.where(absent[:, None], self.absent_sentence, text["sentence"])
        return result

    def extract_concepts(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Concepts of relative captions, as lemmas of the configured parts of speech."""
        if self._extractor is None:
            self._extractor = ConceptExtractor(self.concept_pos)
        return self._extractor([self.caption_processor(text) for text in texts])

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
        columns = torch.stack([key.cpu() for key in keys], dim=1)  # [B, sides]
        columns = torch.cat(distributed.own_first(distributed.gather(columns))).T.flatten()  # [G]
        also_right = None
        if self.mask_duplicates:
            right = [torch.isin(columns, torch.tensor(rights)) for rights in samples["right_keys"]]
            also_right = torch.stack(right).to(self.device)  # [B,G]
        found = {"loss_matching": self.matching.contrastive_loss(self.matching.score(query, gallery), also_right)}
        found |= {name: rows.mean() for name, rows in encoded.items() if name.startswith("loss_")}
        return {"loss": sum(found.values()), **found}

    def training_inputs(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's inputs, with stand-ins for what `query_dropout` takes away.

        -> reference (what queries read of it: projected tokens [B,N,D], pooled [B,D], or None), target (what the
        gallery reads), negative (the reference as the gallery reads it, None unless references are negatives), text
        (see `text_features`), concept_words.
        """
        given = {
            side: [samples.get(f"{side}_{key}") for key in ("image", "tokens", "pooled")]
            for side in ("reference", "target")
        }
        names = {self.reference_reads, self.gallery_reads if self.reference_negatives else None} - {None}
        seen = self.image_features(sorted(names), *given["reference"])
        reference, negative = seen.get(self.reference_reads), None
        if self.reference_negatives:
            negative = seen[self.gallery_reads]
        target = self.image_features([self.gallery_reads], *given["target"])[self.gallery_reads]
        cached = {key: samples[key] for key in ("words", "word_mask", "sentence")} if "words" in samples else None
        text = self.text_features(samples["text_input"], cached)
        concept_words = list(samples["concept_words"])
        if self.training:
            no_image, no_text = self._dropped(len(target))
            if reference is not None:
                rows = no_image.view(-1, *[1] * (reference.ndim - 1))
                reference = torch.where(rows, self.absent_image, reference)
            text = self._stand_in_text(text, no_text)
            concept_words = [() if gone else words for words, gone in zip(concept_words, no_text.tolist(), strict=True)]
        images = {"reference": reference, "target": target, "negative": negative}
        return {**images, "text": text, "concept_words": concept_words}

    def _dropped(self, size: int) -> tuple[Tensor, Tensor]:
        """Which queries of a training batch lose their image, and which their text; never both."""
        draw = torch.rand(size, device=self.device)
        image, text = self.query_dropout["image"], self.query_dropout["text"]
        return draw < image, (draw >= image) & (draw < image + text)

    # ---- retrieval ------------------------------------------------------------------------------------------------

    def query_inputs(
        self,
        pixels: Tensor | None,
        texts: Sequence[str] | None,
        tokens: Tensor | None,
        text_features: Mapping[str, Tensor] | None,
        concept_words: Sequence[Sequence[str]] | None,
        pooled: Tensor | None = None,
    ) -> dict[str, Any]:
        """What `encode_query` takes -> reference (see `training_inputs`), text, concept_words, with stand-ins for what
        is not given."""
        images = [given for given in (pixels, tokens, pooled) if given is not None]
        has_image, has_text, name = bool(images), texts is not None, self.reference_reads
        if not has_image and not has_text:
            raise ValueError("a query needs a reference image, a text, or both")
        count = len(images[0]) if has_image else len(texts)
        reference = None
        if name is not None and has_image:
            reference = self.image_features([name], pixels, tokens, pooled)[name]
        elif name is not None:
            shape = (self.backbone.image.num_tokens,) if name == "tokens" else ()
            reference = self.absent_image.expand(count, *shape, -1)
        texts = list(texts) if has_text else [""] * count
        if len(texts) != count:
            raise ValueError(f"{count} reference images but {len(texts)} texts")
        if not has_text:
            concept_words = [()] * count
        elif concept_words is None:
            concept_words = self.extract_concepts(texts)
        text = self.text_features(texts, text_features if has_text else None)
        return {"reference": reference, "text": text, "concept_words": concept_words}

    def score(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor], chunk: int = 256) -> Tensor:
        """Scores [Q,G], higher is better, in matrix products over chunks of queries."""
        return self.matching.score(query, gallery, chunk=chunk)


def _refuse_imports(path: str | Path, config: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    """A checkpoint may not decide what is imported: it may only ask for what the caller has imported, or names."""
    for side in SIDES:
        module = config["backbone"][side].get("module")
        given = None if wanted is None else wanted["backbone"][side].get("module")
        if module is not None and module not in sys.modules and module != given:
            raise CheckpointError(
                f"{path}: its {side} encoder is a model of the module {module!r}; import that first, if you trust it"
            )


def registered_models() -> dict[str, type[CirModel]]:
    """{arch: class} of the models of this kind in the host's registry."""
    known = registry.mapping["model_name_mapping"].items()
    return {arch: model for arch, model in known if issubclass(model, CirModel)}


def projection(width: int, dim: int, normalised: bool = True) -> nn.Module:
    """Features of an encoder -> width D."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) if normalised else nn.Linear(width, dim)


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
