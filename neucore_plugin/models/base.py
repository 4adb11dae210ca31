"""What all composed-retrieval models here share: reading a batch or a query, the batch's losses, building, checkpoints.

B batch, N image tokens, L words, D width, Di width of the backbone's tokens, Q queries, G gallery images.
"""

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel, all_gather_with_grad
from torch import Tensor, nn

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary
from neucore_plugin.config.encoders import PIXELS
from neucore_plugin.models import building
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.backbones.tuning import named_groups
from neucore_plugin.models.batch_loss import BatchLoss, by_side
from neucore_plugin.models.inputs import (
    Query,
    partial_rows,
    projection,
    with_stand_ins,
    without,
)
from neucore_plugin.models.layout import KnownLayouts, Layout
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.matching_loss import MatchingLoss
from neucore_plugin.models.negatives import Negatives, TrainingImages
from neucore_plugin.models.reading import Reading
from neucore_plugin.processors import CaptionProcessor, ImageProcessor
from neucore_plugin.weights import checkpoint

log = logging.getLogger(__name__)


class CirModel(Reading, BaseModel):
    """Base of the registered models: a backbone and a head that composes a reference image with a relative caption.

    A subclass names itself (`arch`, `head_parts`), has a `matching`, and defines `from_section`, `forward`, `compose`
    (queries) and `represent` (gallery images). A query may lack its image or its text: learned stand-ins, trained by
    `query_dropout`, take their place. Its parts lie directly in the model, since their names are those of checkpoints.

    Args:
        backbone: see `neucore_plugin.models.backbones`.
        vocabulary: the concepts of the training captions; empty means that nothing can be trained.
        embed_dim: D.
        query_dropout: {"image": p, "text": p, "mode": "replace" or "extra", "weight": of extra}: which part of the
            training queries loses its image, or its text; of extra a second copy of it does.
        feature_dropout: share of the image encoder's features that training leaves out.
        layout: of what the pooled vector is told beside (see `Layout`): components of each place, 0 for none (so too
            where tokens have no place), and the share of them that training leaves out.
        negatives: beyond the batch, "batch" (none), "gallery" or a number of images; see `use_gallery`.
        concept_pos: parts of speech that count as concepts.
        matching_loss: keyword arguments of MatchingLoss.
        config: the model section this was built from; kept in checkpoints.
        projected: whether words and sentences are projected to the width D, and images normalised before; None: nothing
            is projected.
        query_reads: what queries read: tokens and pooled (of the reference), words, sentence, concepts. Only that gets
            projections and stand-ins, so that no parameter is idle.
        gallery_reads: what gallery images are encoded from, tokens or pooled. pair_reads: what else the training reads
            of a target.
        clauses: in how many clauses at most a caption is read, each by itself; 1: as a whole.
    """

    arch: ClassVar[str]
    head_parts: ClassVar[str | None]  # what has random weights before the training, for a warning
    scores_half = True  # `score` reads a gallery in half precision as it is stored, and computes in float32
    reads_pairs = False  # whether picture and text of a query are read together, so that neither can be read ahead
    DEFAULT_TYPE = "embedded"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {}
    matching: Matching

    def __init__(
        self,
        *,
        backbone: Backbone,
        vocabulary: ConceptVocabulary,
        embed_dim: int,
        query_dropout: Mapping[str, Any],
        feature_dropout: float,
        layout: Mapping[str, float],
        negatives: str | int,
        concept_pos: Sequence[str],
        matching_loss: Mapping[str, bool],
        config: Mapping[str, Any],
        projected: bool | None,
        query_reads: Sequence[str],
        gallery_reads: str,
        pair_reads: Sequence[str] = (),
        clauses: int = 1,
    ) -> None:
        super().__init__()
        self.backbone, self.vocabulary = backbone, vocabulary
        self.query_dropout = {name: query_dropout[name] for name in ("image", "text")}
        self.feature_dropout, self.concept_pos = feature_dropout, tuple(concept_pos)
        self.query_reads, self.gallery_reads = tuple(query_reads), gallery_reads
        self.reference_reads = tuple(name for name in ("tokens", "pooled") if name in query_reads)
        self.target_reads, self.clauses = (gallery_reads, *pair_reads), clauses
        image, text, read = backbone.image, backbone.text, {*query_reads, gallery_reads}
        pooled_width = getattr(image, "pooled_width", image.width)
        self.image_projection = projection(image.width, embed_dim, projected) if "tokens" in read else None
        self.pooled_projection = projection(pooled_width, embed_dim, projected) if "pooled" in read else None
        self.layout, count = None, min(layout["components"], image.width)
        if count and image.grid is not None:
            self.layout = Layout(width=image.width, grid=image.grid, components=count, dim=embed_dim)
        self._layouts: KnownLayouts | None = None
        self.layout_dropout = 0.0 if self.layout is None else layout["dropout"]
        if projected is False and text.width != embed_dim:
            raise ConfigError(
                f"the released form has no projection of the words: model.backbone.text gives width "
                f"{text.width}, model.embed_dim is {embed_dim}; make them equal"
            )
        self.word_projection, self.sentence_projection = (
            (projection(text.width, embed_dim, True) if projected else nn.Identity()) if name in read else None
            for name in ("words", "sentence")
        )
        stand_ins = {
            "absent_image": bool(self.reference_reads),
            "absent_word": "words" in query_reads,
            "absent_sentence": "sentence" in query_reads,
        }
        for name, used in stand_ins.items():
            setattr(self, name, nn.Parameter(torch.randn(embed_dim) * 0.02) if used else None)
        self.matching_loss = MatchingLoss(**matching_loss)
        self.batch_loss = BatchLoss(self.matching_loss, query_dropout, negatives, with_others)
        own = {key: value for key in PIXELS if (value := getattr(image, key, None)) is not None}
        self.image_processor = ImageProcessor(**own)
        self.raw_captions = getattr(text, "captions", "default") == "released"
        self.caption_processor = CaptionProcessor(clean=not self.raw_captions)
        self._extractor: ConceptExtractor | None = None
        self.config = copy.deepcopy(dict(config))
        for side, encoder in (self.config.get("backbone") or {}).items():
            encoder |= getattr(getattr(backbone, side), "resolved", {})
        self.trained, self.seed = False, 0  # the seed of the training

    @property
    def title(self) -> str:
        """What result tables call the model."""
        return self.arch

    @property
    def cheap_gallery(self) -> bool:
        """Whether all images of a training can be encoded in each step, from cached features; see `negatives.py`."""
        return self.gallery_reads == "pooled"

    @property
    def image_reads(self) -> tuple[str, ...]:
        """Which features of images it reads at all."""
        also = () if self.layout is None else ("tokens",)
        return tuple(dict.fromkeys((*self.reference_reads, *self.target_reads, *also)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ---- what a subclass defines ----------------------------------------------------------------------------------

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "CirModel":
        """Build from a complete model section."""
        raise TypeError(f"{cls.__name__} does not say how it is built from a config")

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """One training step: a batch of TripletDataset samples -> loss, loss_matching and others (scalars).

        `by_pair`: instead what `losses` takes, without any look at the rest of the batch (see `encode_pairs`).
        """
        raise TypeError(f"{type(self).__name__} does not say how it is trained")

    def compose(self, query: Query) -> dict[str, Tensor]:
        """Queries -> encodings for `score`, [Q,D] each; of each query by itself."""
        raise TypeError(f"{type(self).__name__} does not say how queries are composed")

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, projected tokens [G,N,D] or pooled [G,D] as `gallery_reads` says -> {"fg": [G,D], ...}."""
        raise TypeError(f"{type(self).__name__} does not say how gallery images are represented")

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Where each concept of a query lies in its two images (see `models/concept_maps.py`): none in this base."""
        return [[] for _ in texts]

    def restored(self) -> None:
        """Renew what was computed from weights that a checkpoint has replaced."""

    # ---- retrieval ------------------------------------------------------------------------------------------------

    def encode_image(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gallery images, pixels [G,3,H,W] or cached backbone outputs -> {"fg": [G,D], ...} for `score`.

        A model reads tokens or pooled vectors; what it does not read has no use here.
        """
        return self.represent(self.image_features([self.gallery_reads], pixels, tokens, pooled)[self.gallery_reads])

    def encode_query(
        self,
        pixels: Tensor | None = None,
        texts: Sequence[str] | None = None,
        *,
        tokens: Tensor | None = None,
        pooled: Tensor | None = None,
        text_features: Mapping[str, Tensor] | None = None,
        concept_words: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Tensor]:
        """Queries -> encodings for `score`; each as if it were alone.

        Args:
            pixels: reference images [Q,3,H,W], or `tokens` and `pooled` from a cache; none = a text-only query.
            texts: relative captions; None = an image-only query. `text_features`, `concept_words`: cached or
                precomputed forms of the same texts.
        Raises: ValueError for neither image nor text, or different numbers of them.
        """
        images = [given for given in (pixels, tokens, pooled) if given is not None]
        has_image, has_text = bool(images), texts is not None
        if not has_image and not has_text:
            raise ValueError("a query needs a reference image, a text, or both")
        count = len(images[0]) if has_image else len(texts)
        if has_image:
            reference = self.image_features(self.reference_reads, pixels, tokens, pooled)
        else:
            shapes = {"tokens": (self.backbone.image.num_tokens,), "pooled": ()}
            reference = {name: self.absent_image.expand(count, *shapes[name], -1) for name in self.reference_reads}
        texts = list(texts) if has_text else [""] * count
        if len(texts) != count:
            raise ValueError(f"{count} reference images but {len(texts)} texts")
        if has_text and text_features is None and concept_words is None:  # a user's own, no data set's
            self.tell_unknown(texts)
        if not has_text or "concepts" not in self.query_reads:
            concept_words = [()] * count
        elif concept_words is None:
            concept_words = self.concepts_read(texts)
        text = self.text_features(texts, text_features if has_text else None)
        if not has_text:
            gone = torch.ones(count, dtype=torch.bool, device=self.device)
            text = with_stand_ins(text, gone, self.absent_word, self.absent_sentence)
        return self.compose(Query(reference, text, concept_words))

    def score(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor], chunk: int = 256) -> Tensor:
        """Scores [Q,G], higher is better, in matrix products over chunks of queries."""
        return self.matching.score(query, gallery, chunk=chunk)

    def explain(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the scores, {term: [Q,G]}, whose sum is `score`; for few images."""
        return self.matching.score_terms(query, gallery)

    def query_factors(self, query: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Matching.query_factors` gives. ConfigError where the score is no such sum."""
        return self.matching.query_factors(query)

    def gallery_factors(self, gallery: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Matching.gallery_factors` gives. ConfigError where the score is no such sum."""
        return self.matching.gallery_factors(gallery)

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def partial(self, given: Query, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """For `losses`: some queries of a batch once more, without image or text, composed: {"partial.*": [E,D]}.

        None but in training with `query_dropout.mode: extra`. Which, follows from each sample's noise.
        """
        if not self.training or self.batch_loss.partial_weight is None:
            return {}
        rows, no_image = (part.to(self.device) for part in partial_rows(self.query_dropout, samples["noise"]))
        count = len(rows)
        if not count:  # no rows cannot be composed
            rows, no_image = rows.new_zeros(1), no_image.new_ones(1)
        composed = self.compose(without(given.of(rows), no_image, ~no_image, *self._stand_ins()))
        return by_side(partial={name: value[:count] for name, value in composed.items()})

    # ---- training -------------------------------------------------------------------------------------------------

    def encode_pairs(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every pair of a batch by itself, for `losses`: {"query.*", "target.*", "reference.*", "loss_*"}, B rows each.

        Gradient caching calls it on a few pairs at a time.
        """
        return self.forward(samples, by_pair=True)

    def losses(self, encoded: Mapping[str, Tensor], samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch from what `encode_pairs` gave; see `BatchLoss`."""
        return self.batch_loss(encoded, samples, self.matching, self.training, self.shared_noise(samples))

    def use_gallery(self, images: TrainingImages, seed: int) -> None:
        """Take the negatives beyond the batch from these training images, as `matching.negatives` asks for them."""

        own = self.gallery_reads
        self._layouts = None if self.layout is None else KnownLayouts(self.layout, images)

        def encode(rows: Tensor, noise: Tensor) -> dict[str, Tensor]:
            read = {own: images.features(rows, own).to(self.device)}
            if self._layouts is not None:
                read["layout"] = self._layouts.of(rows)
            return self.represent(self._projected(read, noise)[own])

        self.seed, wanted = seed, self.batch_loss.wanted if isinstance(self.batch_loss.wanted, int) else None
        negatives = self.batch_loss.negatives = Negatives(images, wanted, seed, encode, cheap=self.cheap_gallery)
        if not negatives.live:
            log.warning(
                "model.matching.negatives is %s, but this model's gallery vectors are too dear to be made anew each "
                "step: encodings are kept, without gradient, which has not helped so far; batch is the alternative",
                self.batch_loss.wanted,
            )

    def fit_layout(self, images: TrainingImages | None) -> None:
        """Before a training: the directions of `layout`, where it has one; see `Layout.fit_on`."""
        if self.layout is not None:
            self.layout.fit_on(images)

    def training_state(self) -> dict[str, Any] | None:
        """What continuing a training needs beside the weights."""
        negatives = self.batch_loss.negatives
        return None if negatives is None else negatives.state_dict()

    def restore_training_state(self, state: Mapping[str, Any] | None) -> None:
        """As `training_state` gave it."""
        if self.batch_loss.negatives is not None:
            self.batch_loss.negatives.load_state_dict(state, self.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Named groups for `run.lr_scales`: backbone_image, backbone_text, head; only what is trained.

        An encoder with layer_decay has a group a block, all of one name, each with its own `lr_scale`.
        """
        return named_groups(self.backbone, self.parameters())

    # ---- building and checkpoints ---------------------------------------------------------------------------------

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
        return building.from_config(cls, cfg, vocabulary, captions)

    @classmethod
    def from_checkpoint(cls, path: str | Path, wanted: Mapping[str, Any] | None = None) -> "CirModel":
        """A model as a checkpoint describes it, with its weights and concept vocabulary. Raises CheckpointError.

        Of a subclass the checkpoint must be its own; CirModel itself takes those of all registered subclasses.
        `wanted`: a model section. What it says of the training (loss, query_dropout, which negatives) is followed; what
        decides the architecture or the concepts must be the checkpoint's, a clear error otherwise.
        """
        return building.from_checkpoint({cls.arch: cls} if cls is not CirModel else registered_models(), path, wanted)

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Become the model of a checkpoint: its architecture, weights and vocabulary (the host calls this)."""
        other = type(self).from_checkpoint(url_or_filename)
        self.__class__ = type(other)  # another form is another class
        self.__dict__.update(other.__dict__)

    def to(self, *args: Any, **kwargs: Any) -> "CirModel":
        """As in torch; warns once of an untrained head: the host's load_model ends here, checkpoint loaded or not."""
        if not self.trained and self.head_parts:
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
        return checkpoint.fingerprint(*checkpoint.model_state(self))


def registered_models() -> dict[str, type[CirModel]]:
    """{arch: class} of the models of this kind in the host's registry."""
    known = registry.mapping["model_name_mapping"].items()
    return {arch: model for arch, model in known if issubclass(model, CirModel)}


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
