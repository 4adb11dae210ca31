"""What a model reads of its backbone or of cached features: images, texts and batches of pairs, projected to its width.

B batch, N image tokens, L words, C clauses, D width.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.clauses import cached_text, clauses, joined, padded
from neucore_plugin.common.errors import first_few
from neucore_plugin.common.randomness import mix
from neucore_plugin.concepts import ConceptExtractor, ReleasedConceptExtractor
from neucore_plugin.models.batch_loss import BatchLoss, iteration_of
from neucore_plugin.models.inputs import (
    Pairs,
    Projection,
    Query,
    drawn,
    kept_channels,
    part_of,
    with_stand_ins,
    without,
)
from neucore_plugin.models.layout import KnownLayouts, Layout

log = logging.getLogger(__name__)

_SLOTS = {"tokens": 0, "pooled": 1, "layout": 2}  # of the dropout's draws


def _with_layout(projected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projected layout as part of the pooled vector."""
    if "layout" in projected:
        projected["pooled"] = projected["pooled"] + projected.pop("layout")
    return projected


class Reading:
    """The part of `CirModel` that reads; its attributes are set there."""

    backbone: Any
    device: torch.device
    training: bool
    feature_dropout: float
    layout_dropout: float
    clauses: int
    query_reads: tuple[str, ...]
    reference_reads: tuple[str, ...]
    target_reads: tuple[str, ...]
    gallery_reads: str
    query_dropout: Mapping[str, float]
    seed: int
    batch_loss: BatchLoss
    concept_pos: tuple[str, ...]
    caption_processor: Any
    raw_captions: bool
    absent_image: Tensor | None
    absent_word: Tensor | None
    absent_sentence: Tensor | None
    image_projection: nn.Module | None
    pooled_projection: nn.Module | None
    layout: Layout | None
    _layouts: KnownLayouts | None
    word_projection: nn.Module | None
    sentence_projection: nn.Module | None
    _extractor: ConceptExtractor | None

    def image_features(
        self,
        names: Iterable[str],
        pixels: Tensor | None,
        tokens: Tensor | None = None,
        pooled: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """pixels [B,3,H,W], or cached backbone outputs -> those of `names`, projected: tokens [B,N,D], pooled [B,D].

        noise [B], or [1] for all rows together: what dropout in training follows from; None: there is none.
        """
        return self._projected(self._raw(names, pixels, tokens, pooled), noise)

    def _raw(
        self,
        names: Iterable[str],
        pixels: Tensor | None,
        tokens: Tensor | None,
        pooled: Tensor | None,
        layout: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the image encoder gives, or a cache has of it; with the pooled vector also what `layout` reads, which
        may be known already."""
        names, found = sorted(names), {"tokens": tokens, "pooled": pooled}
        with_layout = self.layout is not None and "pooled" in names
        needed = sorted({*names, "tokens"}) if with_layout else names
        if any(found[name] is None for name in needed):
            if pixels is None:
                raise ValueError(f"give an image as pixels, or its cached {' and '.join(needed)}")
            found = self.backbone.image(pixels.to(self.device))
        read = {name: found[name].to(self.device) for name in names}
        if with_layout:
            read["layout"] = self.layout.reduced(found["tokens"].to(self.device)) if layout is None else layout
        return read

    def _projected(self, read: Mapping[str, Tensor], noise: Tensor | None) -> dict[str, Tensor]:
        layers = {"tokens": self.image_projection, "pooled": self.pooled_projection, "layout": self.layout}
        found = {}
        for name, value in read.items():
            share = self.layout_dropout if name == "layout" else self.feature_dropout
            if not (self.training and share and noise is not None):
                found[name] = layers[name](value)
                continue
            channels = self.layout.count if name == "layout" else value.shape[-1]
            kept = kept_channels(channels, share, noise, slot=_SLOTS[name]).to(value)
            if isinstance(layers[name], Projection | Layout):
                found[name] = layers[name](value, kept)
            else:
                found[name] = layers[name](value * kept.view(len(kept), *[1] * (value.ndim - 2), -1))
        return _with_layout(found)

    def tokens_of(self, images: Tensor) -> Tensor:
        """pixels [B,3,H,W], or cached tokens [B,N,Di] -> projected tokens [B,N,D]."""
        given = {"pixels": images} if images.ndim == 4 else {"pixels": None, "tokens": images}
        return self.image_features(["tokens"], **given)["tokens"]

    def text_features(self, texts: Sequence[str], features: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """texts, or cached backbone features -> words [B,L,D], word_mask [B,L], sentence [B,D]: what queries read.

        Of a model that reads clauses: sentence [B,C,D], and which of the C there are, present [B,C]; C is always the
        most that there can be, lest an encoding depend on its batch-mates.
        """
        if self.word_projection is None and self.sentence_projection is None:
            return {}
        if features is None:
            features = self._read(texts)
        if self.clauses > 1 and "clause" not in features:  # texts that were read as a whole
            clause = torch.zeros_like(features["word_mask"], dtype=torch.long)
            features = {**features, "clause": clause, "sentence": features["sentence"][:, None]}
        mask = features["word_mask"].to(self.device)
        result = {}
        if "clause" in features:
            numbers = torch.arange(self.clauses, device=self.device)[:, None]
            own = mask[:, None] & (features["clause"].to(self.device)[:, None] == numbers)  # [B,C,L]
            result["present"] = own.any(2)
        if self.word_projection is not None:
            words = self.word_projection(features["words"].to(self.device)) * mask[..., None]
            result |= {"words": words, "word_mask": mask}
        if self.sentence_projection is not None:
            sentence = features["sentence"].to(self.device)
            if "clause" in features:
                sentence = nn.functional.pad(sentence, (0, 0, 0, self.clauses - sentence.shape[1]))
            result["sentence"] = self.sentence_projection(sentence)
        return with_stand_ins(result, ~mask.any(1), self.absent_word, self.absent_sentence)

    def _read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder gives of texts, as `padded` gives it."""
        parts = [self.clauses_of(self.caption_processor(text)) for text in texts]
        encoded = self.backbone.text([part for one in parts for part in one])
        if self.clauses == 1:
            return {"words": encoded["words"], "word_mask": encoded["mask"], "sentence": encoded["sentence"]}
        rows = [
            (words[mask.bool()], sentence)
            for words, mask, sentence in zip(*(encoded[name] for name in ("words", "mask", "sentence")), strict=True)
        ]
        numbers = iter(rows)
        return padded([joined([next(numbers) for _ in one]) for one in parts])

    def clauses_of(self, caption: str) -> list[str]:
        """What the text encoder reads of a caption: itself, or its clauses."""
        return clauses(caption, self.clauses)

    def tell_unknown(self, texts: Iterable[str]) -> None:
        """One warning for all captions in which the text encoder reads nothing: they ask for no change."""
        if self.word_projection is None and self.sentence_projection is None:
            return
        texts, known = list(dict.fromkeys(texts)), getattr(self.backbone.text, "known", str.strip)
        unknown = [text for text in texts if not known(self.caption_processor(text))]
        if unknown:
            log.warning(
                "%d of %d captions hold nothing that the text encoder knows, so they do not say what should be "
                "different: %s; write them in other words",
                *(len(unknown), len(texts), first_few(repr(text[:80]) for text in unknown)),
            )

    def concepts_read(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """The words of relative captions that the model knows as concepts: none of a model that knows none."""
        return self.extract_concepts(texts) if "concepts" in self.query_reads else [()] * len(texts)

    def extract_concepts(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Concepts of relative captions, as lemmas of the configured parts of speech."""
        if self._extractor is None:
            kind = ReleasedConceptExtractor if self.raw_captions else ConceptExtractor
            self._extractor = kind(self.concept_pos)
        return self._extractor([self.caption_processor(text) for text in texts])

    def read_pairs(self, samples: Mapping[str, Any], negatives: bool = False) -> Pairs:
        """A batch of samples, in training with dropout of features, and stand-ins for what `query_dropout` takes away.

        negatives: whether the references are also read as gallery images are.
        """
        images = {
            side: [samples.get(f"{side}_{key}") for key in ("image", "tokens", "pooled")]
            for side in ("reference", "target")
        }
        # Queries lose features each by itself, gallery images all the same ones, the further negatives among them: what
        # tells two of them apart is never the dropout.
        noise = samples["noise"] if self.training and (self.feature_dropout or self.layout_dropout) else None
        shared = None if noise is None else self.shared_noise(samples)
        names, own = {*self.reference_reads, *([self.gallery_reads] if negatives else [])}, self.gallery_reads
        known = dict.fromkeys(images)
        if self.training and self._layouts is not None and self.batch_loss.negatives.live:
            keys = torch.cat([samples[f"{side}_key"] for side in images])
            if (found := self._layouts.by_key(keys)) is not None:
                known = dict(zip(images, found.chunk(2), strict=True))
        seen = self._raw(names, *images["reference"], known["reference"])
        shown = self._raw(self.target_reads, *images["target"], known["target"])
        reference = {}
        for name in self.reference_reads:
            reference |= self._projected(part_of(seen, name), noise if name == "pooled" else shared)
        negative = self._projected(part_of(seen, own), shared)[own] if negatives else None
        target = self._projected(shown, shared)
        text = self.text_features(samples["text_input"], cached_text(samples))
        concept_words = list(samples["concept_words"])
        query, origin = Query(reference, text, concept_words), negative
        if self.training and self.batch_loss.partial_weight is None:
            lost = drawn(self.query_dropout, torch.rand(len(concept_words), device=self.device))
            query = without(query, *lost, *self._stand_ins())
            if negative is not None and self.absent_image is not None:
                origin = torch.where(lost[0][:, None], self.absent_image, negative)
        return Pairs(query.reference, query.text, query.concept_words, target, negative, origin)

    def shared_noise(self, samples: Mapping[str, Any]) -> Tensor:
        """[1], what the dropout of a step's gallery images follows from: the seed and the number of the step."""
        return torch.tensor([mix(self.seed, iteration_of(samples), 2) >> 1])

    def _stand_ins(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.absent_image, self.absent_word, self.absent_sentence
