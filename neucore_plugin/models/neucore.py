"""NEUCORE as a model of the host: backbone, concept alignment, progressive fusion, matching.

Source: Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358),
figure 1. The equations, where they are computed and where tested: docs/equations.md.

B batch, N image tokens, L words, K concepts of a query, C concept vocabulary, D width, Dw width of a concept's
embedding, Q queries, G gallery images. r reference, t target.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.config.sections import model_types
from neucore_plugin.host.registration import register_model
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.models.base import CirModel
from neucore_plugin.models.batch_loss import by_side
from neucore_plugin.models.building import shared_settings
from neucore_plugin.models.clause_fusion import ClauseFusion
from neucore_plugin.models.concept_alignment import ConceptAlignment
from neucore_plugin.models.concept_loss import ConceptLoss
from neucore_plugin.models.concept_maps import concept_maps
from neucore_plugin.models.inputs import EmbeddedConcepts, Pairs, Query
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.progressive_fusion import ProgressiveFusion


@register_model("neucore")
class NeucoreModel(CirModel):
    """Composed image retrieval by concept alignment and progressive fusion.

    Args:
        alignment, fusion, matching, concept_loss: keyword arguments of ConceptAlignment, ProgressiveFusion, Matching
            and ConceptLoss.
        released: the authors' form: one linear map of the image tokens, none of the words, and the parts' own.
        shared: as in CirModel.
    """

    arch = "neucore"
    head_parts = "alignment, fusion and matching"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = model_types("neucore")

    reads: ClassVar[dict[str, Any]] = {
        "query_reads": ("tokens", "words", "sentence", "concepts"),
        "gallery_reads": "tokens",
    }

    def __init__(
        self,
        *,
        backbone: Backbone,
        embed_dim: int,
        alignment: Mapping[str, Any],
        fusion: Mapping[str, Any],
        matching: Mapping[str, Any],
        concept_loss: Mapping[str, float],
        released: bool,
        **shared: Any,
    ) -> None:
        reads = {**self.reads, "clauses": fusion.get("clauses", 1)}
        super().__init__(backbone=backbone, embed_dim=embed_dim, projected=not released, **reads, **shared)
        self.released = released
        self.alignment = ConceptAlignment(
            dim=embed_dim, word_dim=backbone.text.word_width, released=released, **alignment
        )
        self.fusion = self._fusion(matching["terms"], dim=embed_dim, released=released, **fusion)
        self.matching = Matching(dim=embed_dim, released=released, **matching)
        self.concept_loss = ConceptLoss(**concept_loss)
        self.words_live = getattr(backbone.text, "words_live", False)
        self.register_buffer("concept_embeddings", None, persistent=False)  # they follow from the backbone
        self.restored()

    @classmethod
    def from_section(cls, backbone: Backbone, vocabulary: ConceptVocabulary, config: dict[str, Any]) -> "NeucoreModel":
        """Build from a complete `model` section; of the form in clauses a `ClausewiseNeucore`."""
        loss, alignment, fusion = config["loss"], dict(config["concept_alignment"]), dict(config["fusion"])
        kind = ClausewiseNeucore if config["form"] == "clauses" else NeucoreModel
        if kind is ClausewiseNeucore:
            alignment["background"] = False
        else:
            del fusion["clauses"], fusion["places"]
        return kind(
            backbone=backbone,
            vocabulary=vocabulary,
            alignment=alignment,
            fusion=fusion,
            concept_loss={"weight": loss["concept_weight"], "alpha": loss["focal_alpha"], "gamma": loss["focal_gamma"]},
            released=config["form"] == "released",
            **shared_settings(config),
        )

    def _fusion(self, terms: Sequence[str], **settings: Any) -> nn.Module:
        return ProgressiveFusion(**settings)

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """A batch of TripletDataset samples -> loss = loss_matching + loss_concept, scalars; `by_pair`: as in CirModel.

        The paper's figure 1, from left to right.
        """
        given = self._pairs(samples)  # reference and target [B,N,D], words [B,L,D], sentence [B,D]
        sides = (side["tokens"] for side in (given.reference, given.target))
        r, t, logits = self.alignment(*sides, self.concept_table())  # fg, bg [B,D]; [B,C]
        concepts, concept_mask = self.query_concepts(given.concept_words)  # [B,K,D], [B,K]
        fused = self.fusion(r["tokens"], r["fg"], concepts, concept_mask, **given.text)["fused"]  # [B,D]
        query = self.matching.query(fused, given.text["sentence"], r["bg"])  # [B,D] each
        target, reference = (self.matching.gallery(side["fg"], side["bg"]) for side in (t, r))  # [B,D] each
        encoded = by_side(query=query, target=target, reference=reference)
        encoded |= self.partial(given, samples)
        encoded["loss_concept"] = self.concept_loss(logits, self.concept_labels(samples["concept_words"]))  # [B]
        return encoded if by_pair else self.losses(encoded, samples)  # of scores [B,G]

    def _pairs(self, samples: Mapping[str, Any], negatives: bool = False) -> Pairs:
        if not len(self.vocabulary):
            raise ConfigError(
                "neucore: a model without a concept vocabulary cannot be trained; build it from a train split"
            )
        return self.read_pairs(samples, negatives)

    def compose(self, query: Query) -> dict[str, Tensor]:
        """Queries -> fused, background and, with the explicit term, text and attention, [Q,D] each."""
        r = self.alignment.encode(query.reference["tokens"])
        concepts, concept_mask = self.query_concepts(query.concept_words)  # [Q,K,D], [Q,K]
        fused = self.fusion(r["tokens"], r["fg"], concepts, concept_mask, **query.text, alone=True)["fused"]  # [Q,D]
        return self.matching.query(fused, query.text["sentence"], r["bg"])

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, tokens [G,N,D] -> {"fg": [G,D], "bg": [G,D]}."""
        encoded = self.alignment.encode(features)
        return self.matching.gallery(encoded["fg"], encoded["bg"])

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Where each concept of a query lies in its reference and in a candidate image; see `models/concept_maps.py`.

        Args: pixels, candidates [Q,3,H,W], or cached tokens [Q,N,Di]; texts of length Q. No maps where the backbone's
        tokens have no place.
        """
        if self.backbone.image.grid is None:
            return [[] for _ in texts]
        concept_words = [tuple(dict.fromkeys(words)) for words in self.extract_concepts(texts)]
        concepts, _ = self.query_concepts(concept_words)
        images = (self.tokens_of(side) for side in (pixels, candidates))
        sides = [self.alignment.encode(tokens) for tokens in images]
        return concept_maps(sides, concept_words, concepts, self.backbone.image.grid)

    # ---- concepts -------------------------------------------------------------------------------------------------

    def restored(self) -> None:
        """Embed the vocabulary with the weights that the text encoder has now."""
        if not self.words_live:
            self.concept_embeddings = self.backbone.text.embed_words(self.vocabulary.words).clone()

    def concept_table(self) -> Tensor:
        """Embeddings of the concept vocabulary [C,Dw]; with gradient where the word embedding is trained."""
        return self.backbone.text.embed_words(self.vocabulary.words) if self.words_live else self.concept_embeddings

    def concept_labels(self, words: Sequence[Sequence[str]]) -> Tensor:
        """Multi-hot labels [B,C] of the vocabulary's concepts."""
        labels = torch.zeros(len(words), len(self.vocabulary))  # filled before it moves: a GPU would wait for each row
        class_of = getattr(self.backbone.text, "class_of", str)
        for row, concepts in enumerate(words):
            found = [index for word in concepts if (index := self.vocabulary.index(class_of(word))) is not None]
            labels[row, found] = 1.0
        return labels.to(self.device, non_blocking=True)

    def query_concepts(self, words: Sequence[Sequence[str]] | EmbeddedConcepts) -> tuple[Tensor, Tensor]:
        """Concept lemmas of each query -> projected embeddings [B,K,D], mask [B,K]; any word is allowed."""
        embeddings, mask = words if isinstance(words, EmbeddedConcepts) else self._padded(words)
        return self.alignment.classifier.project(embeddings) * mask[..., None], mask

    def _padded(self, words: Sequence[Sequence[str]]) -> EmbeddedConcepts:
        counts = torch.tensor([len(concepts) for concepts in words], dtype=torch.long)
        length = int(counts.max()) if len(words) else 0
        mask = torch.arange(length) < counts[:, None]
        places = mask.flatten().nonzero().flatten().to(self.device, non_blocking=True)
        embeddings = self._embed([word for concepts in words for word in concepts])
        padded = embeddings.new_zeros(mask.numel(), embeddings.shape[-1]).index_copy(0, places, embeddings)
        return EmbeddedConcepts(padded.view(*mask.shape, embeddings.shape[-1]), mask.to(self.device, non_blocking=True))

    def _embed(self, words: Sequence[str]) -> Tensor:
        """[n,Dw]; those of the vocabulary from its table, where the text encoder does not change."""
        if self.words_live:
            return self.backbone.text.embed_words(words)
        table, rows = self.concept_embeddings, [self.vocabulary.index(word) for word in words]
        known, unseen = ([place for place, row in enumerate(rows) if (row is None) == new] for new in (False, True))

        def index(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long).to(self.device, non_blocking=True)

        found = table.new_zeros(len(words), table.shape[1])
        found[index(known)] = table[index([rows[place] for place in known])]
        if unseen:
            found[index(unseen)] = self.backbone.text.embed_words([words[place] for place in unseen]).to(found)
        return found


class ClausewiseNeucore(NeucoreModel):
    """The form in clauses: a gallery image is the projection of its pooled vector; a query begins as its reference's
    and is changed by one clause of the caption after the other (`ClauseFusion`); matching asks for every clause's own
    words ("explicit"), for what the text does not speak of ("implicit") and for the difference itself ("change").

    The concepts are aligned as in the other forms: one bag of both images' tokens, and the concept loss; a clause
    attends the reference's tokens as they come from it. With so cheap a gallery all training images can be negatives,
    with gradient (`matching.negatives: gallery`).
    """

    reads: ClassVar[dict[str, Any]] = {
        "query_reads": ("tokens", "pooled", "sentence"),
        "gallery_reads": "pooled",
        "pair_reads": ("tokens",),
    }

    def _fusion(self, terms: Sequence[str], *, dim: int, places: bool, **_: Any) -> nn.Module:
        fuses, changes = "fused" in terms, "change" in terms
        return ClauseFusion(dim=dim, places=places and (fuses or changes), fuses=fuses, changes=changes)

    def forward(self, samples: Mapping[str, Any], by_pair: bool = False) -> dict[str, Tensor]:
        """As in NeucoreModel."""
        given = self._pairs(samples, self.matching_loss.reference_negatives or "change" in self.matching.terms)
        sides = (side["tokens"] for side in (given.reference, given.target))
        r, _, logits = self.alignment(*sides, self.concept_table())
        query = self._composed(given, r["tokens"], given.origin)
        encoded = by_side(query=query, target=self.represent(given.target["pooled"]))
        if self.matching_loss.reference_negatives:
            encoded |= by_side(reference=self.represent(given.negative))
        encoded |= self.partial(given, samples)
        encoded["loss_concept"] = self.concept_loss(logits, self.concept_labels(samples["concept_words"]))
        return encoded if by_pair else self.losses(encoded, samples)

    def compose(self, query: Query) -> dict[str, Tensor]:
        """Queries -> what the terms need, [Q,D] each, text and attention [Q,C,D]; see `Matching.query`."""
        tokens = self.alignment.encode(query.reference["tokens"])["tokens"]
        return self._composed(query, tokens, query.reference["pooled"])

    def concepts_read(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """The concepts of relative captions, as the alignment has them; queries are composed without."""
        return self.extract_concepts(texts)

    def _composed(self, query: Query, tokens: Tensor, origin: Tensor | None) -> dict[str, Tensor]:
        """origin [Q,D]: the references, as gallery images are encoded."""
        pooled, sentence = query.reference["pooled"], query.text["sentence"]
        if self.clauses > 1:
            present = query.text["present"]
        else:  # read as a whole
            sentence, present = sentence[:, None], torch.ones_like(sentence[:, :1], dtype=torch.bool)
        fused, change = self.fusion(tokens, pooled, sentence, present)
        return self.matching.query(fused, sentence, pooled, present, change, origin)

    def represent(self, features: Tensor) -> dict[str, Tensor]:
        """Gallery images, pooled [G,D] -> {"fg": [G,D]}."""
        return self.matching.gallery(features)
