"""Baselines behind NEUCORE's interface: same backbones, loss, index and report, another way to compose a query.

A composer is a small module that knows no host. `reads` names what it takes of the backbone's projected output: pooled
or tokens (of the reference), sentence or words. Gallery images are their projected pooled vector.

B batch, N image tokens, L words, D width, Q queries, G gallery images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.model import WITH_DROPOUT
from neucore_plugin.host.registration import register_model
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.base import CirModel, model_types
from neucore_plugin.models.composers import COMPOSERS, Artemis
from neucore_plugin.models.matching import Matching

# ---- composers -----------------------------------------------------------------------------------------------------


# ---- the model -----------------------------------------------------------------------------------------------------


@register_model("cir_baseline")
class CirBaseline(CirModel):
    """A baseline: a composer between the backbone and the contrastive loss.

    Args:
        method: one of COMPOSERS. options: keyword arguments of its composer. matching: temperature, learn_temperature.
        shared: as in CirModel.
    """

    arch = "cir_baseline"
    head_parts = "projections and composer"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types(released=False)

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: ConceptVocabulary,
        embed_dim: int,
        method: str,
        matching: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        if method not in COMPOSERS:
            raise ConfigError(f"model.method: {method!r} is no baseline.{nearest(method, COMPOSERS)}")
        composer = COMPOSERS[method]
        reads = {"query_reads": composer.reads, "gallery_reads": "pooled"}
        super().__init__(vocabulary, backbone=backbone, embed_dim=embed_dim, **reads, **shared)
        self.method = method
        if composer is Artemis:
            self.composer, self.matching = None, Artemis(embed_dim, **matching)
        else:
            self.composer = composer(embed_dim, **(options or {}))
            self.matching = Matching(embed_dim, terms=["fused"], **matching)

    @property
    def title(self) -> str:
        """The method's name."""
        return self.method

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "CirBaseline":
        """Build from a complete `model` section."""
        matching, method = dict(config["matching"]), config["method"]
        options = dict(config["cross_attention"]) if method == "cross_attention" else {}
        if config["dropout"] is not None:
            if method not in WITH_DROPOUT:
                raise ConfigError(f"model.dropout: got {config['dropout']}; {method} has none; leave it out")
            options["dropout"] = config["dropout"]
        return cls(
            backbone=backbone,
            vocabulary=vocabulary,
            embed_dim=config["embed_dim"],
            method=method,
            options=options,
            query_dropout=config["query_dropout"],
            mask_duplicates=matching.pop("mask_duplicates"),
            reference_negatives=matching.pop("reference_negatives"),
            matching=matching,
            concept_pos=config["concepts"]["pos"],
            config={**config, "checkpoint": None},
        )

    def _query(self, reference: Tensor | None, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {**text} if reference is None else {self.reference_reads: reference, **text}
        return {"fused": self.composer(**inputs)} if self.composer is not None else self.matching(**inputs)

    def encode_pairs(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch of TripletDataset samples -> query.*, target.fg and, where it is a negative, reference.fg."""
        given = self.training_inputs(samples, negatives=self.reference_negatives)
        query = self._query(given["reference"], given["text"])
        gallery = {"target.fg": given["target"]}
        if self.reference_negatives:
            gallery["reference.fg"] = given["negative"]
        return {**{f"query.{name}": value for name, value in query.items()}, **gallery}

    def encode_image(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gallery images, pixels [G,3,H,W] or cached pooled vectors -> {"fg": [G,D]}; `tokens` have no use here."""
        return {"fg": self.image_features(["pooled"], pixels, tokens, pooled)["pooled"]}

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
        """Queries -> encodings for `score`.

        Args:
            pixels: reference images [Q,3,H,W], or `tokens` and `pooled` from a cache; none = a text-only query.
            texts: relative captions; None = an image-only query. `text_features`: cached form of the same texts.
            concept_words: have no use here.
        """
        given = self.query_inputs(pixels, texts, tokens, text_features, concept_words or (), pooled)
        return self._query(given["reference"], given["text"])
