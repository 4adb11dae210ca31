"""Baselines behind NEUCORE's interface: same backbones, loss, index and report, another way to compose a query.

The ways are in `composers.py`, those without a training in `zero_shot.py`. Gallery images are their pooled vector,
projected where something is trained.

B batch, D width, Q queries, G gallery images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.model import WITH_DROPOUT, ZERO_SHOT
from neucore_plugin.config.sections import model_types
from neucore_plugin.host.registration import register_model
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.base import CirModel
from neucore_plugin.models.batch_loss import by_side
from neucore_plugin.models.building import shared_settings
from neucore_plugin.models.composers import COMPOSERS, Artemis, CrossAttention
from neucore_plugin.models.inputs import Query
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.zero_shot import COMPOSERS as WITHOUT_TRAINING

DROPOUT = {"combiner": 0.5, "cross_attention": 0.0}  # what `dropout: null` means


@register_model("cir_baseline")
class CirBaseline(CirModel):
    """A baseline: a composer between the backbone and the matching loss.

    Args:
        method: one of COMPOSERS. options: keyword arguments of its composer. matching: temperature, learn_temperature.
        shared: as in CirModel.
    """

    arch = "cir_baseline"
    head_parts = "projections and composer"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types("cir_baseline")

    def __init__(
        self, *, embed_dim: int, method: str, options: Mapping[str, Any], matching: Mapping[str, Any], **shared: Any
    ) -> None:
        composer = COMPOSERS[method]
        reads = {"query_reads": composer.reads, "gallery_reads": "pooled"}
        super().__init__(embed_dim=embed_dim, projected=True, **reads, **shared)
        self.method = method
        # What a checkpoint that does not fit is told.
        if note := getattr(composer, "changed", None):
            self.misfit_hint = f"If an earlier version wrote it: {method} has changed ({note}); train it anew"
        if composer is Artemis:
            self.composer, self.matching = None, Artemis(dim=embed_dim, **matching)
        else:
            self.composer = composer(dim=embed_dim, **options)
            self.matching = Matching(dim=embed_dim, terms=["fused"], released=False, **matching)

    @property
    def title(self) -> str:
        """The method's name."""
        return self.method

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> CirModel:
        """Build from a complete `model` section; of a method without a training a `ZeroShotBaseline`."""
        method, dropout = config["method"], config["dropout"]
        if method in ZERO_SHOT:
            return ZeroShotBaseline.from_section(backbone, vocabulary, config)
        options = dict(config["cross_attention"]) if method == "cross_attention" else {}
        if method in WITH_DROPOUT:
            options["dropout"] = DROPOUT[method] if dropout is None else dropout
        return cls(backbone=backbone, vocabulary=vocabulary, method=method, options=options, **shared_settings(config))

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """A batch of TripletDataset samples -> loss = loss_matching, scalars; `by_pair`: as in CirModel."""
        negatives = self.matching_loss.reference_negatives
        given = self.read_pairs(samples, negatives)
        target = self.represent(given.target[self.gallery_reads])
        encoded = by_side(query=self.compose(given), target=target)  # [B,D] each
        if negatives:
            encoded |= by_side(reference=self.represent(given.negative))
        encoded |= self.partial(given, samples)
        return encoded if by_pair else self.losses(encoded, samples)  # of scores [B,G]

    def compose(self, query: Query) -> dict[str, Tensor]:
        """Queries -> {"fused": [Q,D]}, or the four vectors of ARTEMIS."""
        inputs = {**query.reference, **query.text}
        return {"fused": self.composer(**inputs)} if self.composer is not None else self.matching(**inputs)

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, pooled [G,D] -> {"fg": [G,D]}."""
        return {"fg": features}

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Of cross-attention, where the query looks in its reference, one map a query; the candidate has none."""
        grid = self.backbone.image.grid
        if not isinstance(self.composer, CrossAttention) or grid is None:
            return super().concept_maps(pixels, texts, candidates)
        captions = self.text_features(texts)
        weights = self.composer.looks_at(self.tokens_of(pixels), captions["words"], captions["word_mask"])
        cells = weights[:, -grid[0] * grid[1] :]
        maps = (cells / cells.amax(1, keepdim=True).clamp_min(1e-12)).view(-1, *grid).cpu()
        return [[{"concept": "attention", "reference": one, "candidate": None}] for one in maps]


class ZeroShotBaseline(CirModel):
    """A baseline that trains nothing: a pretrained model's own vectors, and its own comparison by their cosine.

    A query without its image is its caption's vector, one without its text its reference's (of inversion: a sentence
    that ends behind the reference's word).

    Args:
        method: one of WITHOUT_TRAINING. options: keyword arguments of its composer. shared: as in CirModel.
    """

    arch = "cir_baseline"
    head_parts = None

    def __init__(self, *, backbone: Backbone, method: str, options: Mapping[str, Any], **shared: Any) -> None:
        composer = WITHOUT_TRAINING[method](backbone=backbone, **options)
        width = getattr(backbone.image, "pooled_width", backbone.image.width)
        super().__init__(
            backbone=backbone, embed_dim=width, projected=None, query_reads=(), gallery_reads="pooled", **shared
        )
        self.method, self.composer, self.reads_pairs = method, composer, composer.reads == "pixels"
        self.matching = Matching(
            dim=width, terms=["fused"], temperature=0.0, learn_temperature=False, released=False
        )  # no loss is taken

    title = CirBaseline.title

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> CirModel:
        """Build from a complete `model` section."""
        method, shared = config["method"], shared_settings(config)
        for unused in ("embed_dim", "matching"):
            del shared[unused]
        options = {
            "average": {"text_weight": config["text_weight"]},
            "inversion": dict(config["inversion"]),
            "joint": {},
        }[method]
        return cls(backbone=backbone, vocabulary=vocabulary, method=method, options=options, **shared)

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """Raises ConfigError: there is nothing to train."""
        raise ConfigError(f"{self.method} trains nothing; evaluate it as it is")

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, pooled [G,D] -> {"fg": [G,D]}."""
        return {"fg": features}

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
        """Queries -> {"fused": [Q,D]}; see CirModel.encode_query."""
        images = next((given for given in (pixels, pooled, tokens) if given is not None), None)
        if images is None and texts is None:
            raise ValueError("a query needs a reference image, a text, or both")
        if images is not None and texts is not None and len(images) != len(texts):
            raise ValueError(f"{len(images)} reference images but {len(texts)} texts")
        captions = None if texts is None else [self.caption_processor(text) for text in texts]
        if self.reads_pairs:
            if images is not None and pixels is None:
                raise ValueError(f"{self.method} reads picture and text together: give the reference as pixels")
            return {"fused": self.composer(None if pixels is None else pixels.to(self.device), captions)}
        reference, sentence = None, None
        if images is not None:
            reference = self.image_features(["pooled"], pixels, tokens, pooled)["pooled"]
            if self.composer.reads == "texts":
                return {"fused": self.composer(reference, captions or [""] * len(reference))}
        if captions is not None:
            found = self.backbone.text(captions) if text_features is None else text_features
            sentence = found["sentence"].to(self.device)
        if reference is None or sentence is None:
            return {"fused": sentence if reference is None else reference}
        return {"fused": self.composer(reference, sentence)}
