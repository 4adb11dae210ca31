"""Baselines behind NEUCORE's interface: same backbones, loss, index and report, another way to compose a query.

The ways are in `composers.py`. Gallery images are their projected pooled vector.

B batch, D width, Q queries, G gallery images.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.model import WITH_DROPOUT
from neucore_plugin.config.sections import model_types
from neucore_plugin.host.registration import register_model
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.base import CirModel, by_side, shared_settings
from neucore_plugin.models.composers import COMPOSERS, Artemis
from neucore_plugin.models.inputs import Query
from neucore_plugin.models.matching import Matching

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
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "CirBaseline":
        """Build from a complete `model` section."""
        method, dropout = config["method"], config["dropout"]
        options = dict(config["cross_attention"]) if method == "cross_attention" else {}
        if method in WITH_DROPOUT:
            options["dropout"] = DROPOUT[method] if dropout is None else dropout
        return cls(backbone=backbone, vocabulary=vocabulary, method=method, options=options, **shared_settings(config))

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """A batch of TripletDataset samples -> loss = loss_matching, scalars; `by_pair`: as in CirModel."""
        negatives = self.matching_loss.reference_negatives
        given = self.read_pairs(samples, negatives)
        encoded = by_side(query=self.compose(given), target=self.represent(given.target))  # [B,D] each
        if negatives:
            encoded |= by_side(reference=self.represent(given.negative))
        return encoded if by_pair else self.losses(encoded, samples)  # of scores [B,G]

    def compose(self, query: Query) -> dict[str, Tensor]:
        """Queries -> {"fused": [Q,D]}, or the four vectors of ARTEMIS."""
        inputs = {**query.text} if query.reference is None else {self.reference_reads: query.reference, **query.text}
        return {"fused": self.composer(**inputs)} if self.composer is not None else self.matching(**inputs)

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, pooled [G,D] -> {"fg": [G,D]}."""
        return {"fg": features}
