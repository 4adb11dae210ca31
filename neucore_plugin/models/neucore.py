"""NEUCORE as a model of the host: backbone, concept alignment, progressive fusion, matching.

B batch, N image tokens, L words, K concepts of a query, C concept vocabulary, D width, Q queries, G gallery images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.host.registration import register_model
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.base import CirModel, model_types
from neucore_plugin.models.concept_alignment import ConceptAlignment, ConceptAlignmentLoss
from neucore_plugin.models.concept_maps import concept_maps
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.progressive_fusion import ProgressiveFusion


@register_model("neucore")
class NeucoreModel(CirModel):
    """Composed image retrieval by concept alignment and progressive fusion (Zhao & Xu, 2023).

    Args:
        alignment, fusion, matching: keyword arguments of ConceptAlignment, ProgressiveFusion and Matching.
        loss: keyword arguments of ConceptAlignmentLoss.
        released: the authors' form: one linear map of the image tokens, none of the words, and the parts' own.
        shared: as in CirModel.
    """

    arch = "neucore"
    head_parts = "alignment, fusion and matching"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types()

    def __init__(
        self,
        backbone: Backbone,
        vocabulary: ConceptVocabulary,
        embed_dim: int,
        alignment: Mapping[str, Any],
        fusion: Mapping[str, Any],
        matching: Mapping[str, Any],
        loss: Mapping[str, Any],
        released: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(vocabulary, backbone=backbone, embed_dim=embed_dim, projected=not released, **shared)
        self.released = released
        self.alignment = ConceptAlignment(
            dim=embed_dim, word_dim=backbone.text.word_width, released=released, **alignment
        )
        self.fusion = ProgressiveFusion(dim=embed_dim, released=released, **fusion)
        self.matching = Matching(dim=embed_dim, released=released, **matching)
        self.concept_loss = ConceptAlignmentLoss(**loss)
        self.words_live = getattr(backbone.text, "words_live", False)
        self.register_buffer("concept_embeddings", None, persistent=False)  # they follow from the backbone
        self.restored()

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "NeucoreModel":
        """Build from a complete `model` section."""
        matching, loss = dict(config["matching"]), config["loss"]
        return cls(
            backbone=backbone,
            vocabulary=vocabulary,
            embed_dim=config["embed_dim"],
            alignment=config["concept_alignment"],
            fusion=config["fusion"],
            loss={"weight": loss["concept_weight"], "alpha": loss["focal_alpha"], "gamma": loss["focal_gamma"]},
            query_dropout=config["query_dropout"],
            mask_duplicates=matching.pop("mask_duplicates"),
            reference_negatives=matching.pop("reference_negatives"),
            matching=matching,
            concept_pos=config["concepts"]["pos"],
            config={**config, "checkpoint": None},
            released=config["form"] == "released",
        )

    def restored(self) -> None:
        """Embed the vocabulary with the weights that the text encoder has now."""
        if not self.words_live:
            self.concept_embeddings = self.backbone.text.embed_words(self.vocabulary.words).clone()

    def concept_table(self) -> Tensor:
        """Embeddings of the concept vocabulary [C,Dw]; with gradient where the word embedding is trained."""
        return self.backbone.text.embed_words(self.vocabulary.words) if self.words_live else self.concept_embeddings

    def query_concepts(self, words: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Concept lemmas of each query -> projected embeddings [B,K,D], mask [B,K]; any word is allowed."""
        length = max((len(concepts) for concepts in words), default=0)
        mask = torch.zeros(len(words), length, dtype=torch.bool, device=self.device)
        flat = [word for concepts in words for word in concepts]
        for row, concepts in enumerate(words):
            mask[row, : len(concepts)] = True
        embeddings = self._embed_concepts(flat)
        padded = embeddings.new_zeros(len(words), length, embeddings.shape[-1])
        padded[mask] = embeddings
        return self.alignment.classifier.project(padded) * mask[..., None], mask

    def _embed_concepts(self, words: Sequence[str]) -> Tensor:
        if self.words_live:
            return self.backbone.text.embed_words(words)
        rows = [self.vocabulary.index(word) for word in words]
        unseen = [word for word, row in zip(words, rows, strict=True) if row is None]
        known = (
            self.concept_embeddings[torch.tensor([row or 0 for row in rows], dtype=torch.long, device=self.device)]
            if (len(self.vocabulary))
            else self.concept_embeddings.new_zeros(len(words), self.concept_embeddings.shape[1])
        )
        if unseen:
            where = torch.tensor([row is None for row in rows], device=self.device)
            known = known.clone()
            known[where] = self.backbone.text.embed_words(unseen).to(known)
        return known

    # ---- the computation ------------------------------------------------------------------------------------------

    def encode_pairs(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch of TripletDataset samples -> query.*, target.*, reference.* for `losses`, and loss_concept [B]."""
        if not len(self.vocabulary):
            raise ConfigError(
                "neucore: a model without a concept vocabulary cannot be trained; build it from a train split"
            )
        given = self.training_inputs(samples)
        both = self.alignment.encode(torch.cat([given["reference"], given["target"]]))
        r, t = ({key: value.chunk(2)[side] for key, value in both.items()} for side in (0, 1))
        bag = self.alignment.align(r, t, given["reference"], given["target"])
        logits = self.alignment.classifier(bag["pooled"], self.concept_table())  # [B,C]
        query = self._query(r, given["text"], given["concept_words"])
        return {
            **{f"query.{name}": value for name, value in query.items()},
            **{f"target.{name}": t[name] for name in ("fg", "bg")},
            **{f"reference.{name}": r[name] for name in ("fg", "bg")},
            "loss_concept": self.concept_loss(logits, self.concept_labels(samples["concept_words"]), reduce=False),
        }

    def concept_labels(self, words: Sequence[Sequence[str]]) -> Tensor:
        """Multi-hot labels [B,C] of the vocabulary's concepts."""
        labels = torch.zeros(len(words), len(self.vocabulary), device=self.device)
        for row, concepts in enumerate(words):
            columns = [index for word in concepts if (index := self.vocabulary.index(word)) is not None]
            labels[row, columns] = 1.0
        return labels

    def _query(
        self, reference: dict[str, Tensor], text: dict[str, Tensor], concept_words, alone: bool = False
    ) -> dict[str, Tensor]:
        concepts, concept_mask = self.query_concepts(concept_words)
        fused = self.fusion(
            reference_tokens=reference["tokens"],
            reference_fg=reference["fg"],
            concepts=concepts,
            concept_mask=concept_mask,
            words=text["words"],
            word_mask=text["word_mask"],
            sentence=text["sentence"],
            alone=alone,
        )["fused"]
        return self.matching.query(fused, text["sentence"], reference["bg"])

    # ---- retrieval ------------------------------------------------------------------------------------------------

    def encode_image(
        self, pixels: Tensor | None = None, tokens: Tensor | None = None, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gallery images, pixels [G,3,H,W] or cached tokens -> {"fg": [G,D], "bg": [G,D]}; `pooled` has no use here."""
        encoded = self.alignment.encode(self.image_tokens(pixels, tokens))
        return self.matching.gallery(encoded["fg"], encoded["bg"])

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
            pixels: reference images [Q,3,H,W], or `tokens` from a cache; neither = a text-only query.
            texts: relative captions; None = an image-only query. `text_features`, `concept_words`: cached or
                precomputed forms of the same texts.
        """
        given = self.query_inputs(pixels, texts, tokens, text_features, concept_words)
        return self._query(self.alignment.encode(given["reference"]), given["text"], given["concept_words"], alone=True)

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Where each concept of a query lies in its reference and in a candidate image; see `models/concept_maps.py`.

        Args: pixels, candidates [Q,3,H,W]; texts of length Q. No maps where the backbone's tokens have no place.
        """
        if self.backbone.image.grid is None:
            return [[] for _ in texts]
        concept_words = self.extract_concepts(texts)
        concepts, _ = self.query_concepts(concept_words)
        sides = [self.alignment.encode(self.image_tokens(images)) for images in (pixels, candidates)]
        return concept_maps(sides, concept_words, concepts, self.backbone.image.grid)
