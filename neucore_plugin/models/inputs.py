"""What a composed-retrieval model reads of its backbone: projections, stand-ins for what a query lacks, query dropout.

B batch, N image tokens, L words, D width, Di width of the backbone's tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.concepts import ConceptExtractor
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.processors import CaptionProcessor, ImageProcessor


class CirInputs(nn.Module):
    """A backbone with projections to one width.

    A query may lack its image or its text; learned stand-ins, trained by `query_dropout`, take their place.

    Args:
        backbone: see `neucore_plugin.models.backbones`.
        query_dropout: {"image": p, "text": p}, which part of the training queries loses its image, or its text.
        concept_pos: parts of speech that count as concepts.
        projected: whether words and sentences are projected to the width D, and images normalised before.
        query_reads: what queries read of the backbone: tokens or pooled (of the reference), words, sentence. Only that
            gets projections and stand-ins, so that no parameter is idle.
        gallery_reads: what gallery images are encoded from, tokens or pooled.
    """

    def __init__(
        self,
        backbone: Backbone,
        embed_dim: int,
        query_dropout: Mapping[str, float],
        concept_pos: Sequence[str] = ("NOUN", "VERB", "ADJ", "ADV"),
        projected: bool = True,
        query_reads: Sequence[str] = ("tokens", "words", "sentence"),
        gallery_reads: str = "tokens",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.query_dropout, self.concept_pos = dict(query_dropout), tuple(concept_pos)
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
        for name, reads in stand_ins.items():
            setattr(self, name, nn.Parameter(torch.randn(embed_dim) * 0.02) if reads in query_reads else None)
        self.image_processor = ImageProcessor(image.image_size, image.mean, image.std)
        self.caption_processor = CaptionProcessor()
        self._extractor: ConceptExtractor | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        layer = self.image_projection if self.gallery_reads == "tokens" else self.pooled_projection
        return next(layer.parameters()).device

    def image_features(
        self, names: Iterable[str], pixels: Tensor | None, tokens: Tensor | None = None, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """pixels [B,3,H,W], or cached backbone outputs -> those of `names`, projected: tokens [B,N,D], pooled [B,D]."""
        names, found = sorted(names), {"tokens": tokens, "pooled": pooled}
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

    def training_inputs(self, samples: Mapping[str, Any], negatives: bool = False) -> dict[str, Any]:
        """A batch's inputs, with stand-ins for what `query_dropout` takes away.

        -> reference: what queries read of it, projected tokens [B,N,D] or pooled [B,D], or None; target: what the
        gallery reads; with `negatives` also negative, the whole batch's references as the gallery reads them; text, see
        `text_features`; concept_words.
        """
        given = {
            side: [samples.get(f"{side}_{key}") for key in ("image", "tokens", "pooled")]
            for side in ("reference", "target")
        }
        names = {self.reference_reads, self.gallery_reads if negatives else None} - {None}
        seen = self.image_features(names, *given["reference"])
        reference = seen.get(self.reference_reads)
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
        inputs = {"reference": reference, "target": target, "text": text, "concept_words": concept_words}
        return {**inputs, "negative": seen[self.gallery_reads]} if negatives else inputs

    def _dropped(self, size: int) -> tuple[Tensor, Tensor]:
        """Which queries of a training batch lose their image, and which their text; never both."""
        draw = torch.rand(size, device=self.device)
        image, text = self.query_dropout["image"], self.query_dropout["text"]
        return draw < image, (draw >= image) & (draw < image + text)

    def query_inputs(
        self,
        pixels: Tensor | None,
        texts: Sequence[str] | None,
        tokens: Tensor | None,
        text_features: Mapping[str, Tensor] | None,
        concept_words: Sequence[Sequence[str]] | None,
        pooled: Tensor | None = None,
    ) -> dict[str, Any]:
        """What `encode_query` takes -> reference, text, concept_words as in training, with stand-ins for what lacks."""
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


def projection(width: int, dim: int, normalised: bool = True) -> nn.Module:
    """Features of an encoder -> width D."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) if normalised else nn.Linear(width, dim)
