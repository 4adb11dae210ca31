"""NEUCORE as a model of the host: backbone, concept alignment, progressive fusion, matching.

B batch, N image tokens, L words, K concepts of a query, C concept vocabulary, D width, Q queries, G gallery images.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from neucore_plugin import checkpoint, host
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary
from neucore_plugin.config import model_defaults
from neucore_plugin.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones import build_backbone
from neucore_plugin.models.backbones.resnet_gru import word_list
from neucore_plugin.models.concept_alignment import ConceptAlignment, ConceptAlignmentLoss
from neucore_plugin.models.concept_maps import concept_maps
from neucore_plugin.models.matching import Matching
from neucore_plugin.models.progressive_fusion import ProgressiveFusion
from neucore_plugin.models.reconcile import reconciled
from neucore_plugin.names import nearest
from neucore_plugin.processors import CaptionProcessor, ImageProcessor

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"


@host.register_model("neucore")
class NeucoreModel(BaseModel):
    """Composed image retrieval by concept alignment and progressive fusion (Zhao & Xu, 2023).

    A query may lack its image or its text; learned stand-ins, trained by `query_dropout`, take their place.

    Args:
        backbone: see `neucore_plugin.models.backbones`.
        vocabulary: the concepts that alignment classifies; empty means that nothing can be trained.
        alignment, fusion, matching: keyword arguments of ConceptAlignment, ProgressiveFusion and Matching.
        loss: keyword arguments of ConceptAlignmentLoss. query_dropout: {"image": p, "text": p}.
        mask_duplicates: batch-mates with an equally right target do not count as negatives.
        reference_negatives: the batch's reference images count as negatives, beside its targets.
        config: the model section this was built from; kept in checkpoints.
        released: the authors' form: one linear map of the image tokens, none of the words, and the parts' own.
    """

    DEFAULT_TYPE = "embedded"
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        path.stem: str(path) for path in sorted(CONFIGS.glob("*.yaml"))
    }

    def __init__(
        self,
        backbone: nn.Module,
        vocabulary: ConceptVocabulary,
        embed_dim: int,
        alignment: Mapping[str, Any],
        fusion: Mapping[str, Any],
        matching: Mapping[str, Any],
        loss: Mapping[str, Any],
        query_dropout: Mapping[str, float],
        mask_duplicates: bool = True,
        reference_negatives: bool = False,
        concept_pos: Sequence[str] = ("NOUN", "VERB", "ADJ", "ADV"),
        config: Mapping[str, Any] | None = None,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.vocabulary = dict(config or {}), vocabulary
        self.mask_duplicates, self.reference_negatives = mask_duplicates, reference_negatives
        self.query_dropout, self.concept_pos, self.trained = dict(query_dropout), tuple(concept_pos), False
        self.backbone = backbone
        self.released = released
        self.image_projection = _projection(backbone.image.width, embed_dim, released)
        if released and backbone.text.width != embed_dim:
            raise ConfigError(
                f"the released form has no projection of the words: model.backbone.text gives width "
                f"{backbone.text.width}, model.embed_dim is {embed_dim}; make them equal"
            )
        self.word_projection, self.sentence_projection = (
            nn.Identity() if released else _projection(backbone.text.width, embed_dim) for _ in range(2)
        )
        self.absent_image = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.absent_word = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.absent_sentence = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.alignment = ConceptAlignment(
            dim=embed_dim, word_dim=backbone.text.word_width, released=released, **alignment
        )
        self.fusion = ProgressiveFusion(dim=embed_dim, released=released, **fusion)
        self.matching = Matching(dim=embed_dim, released=released, **matching)
        self.concept_loss = ConceptAlignmentLoss(**loss)
        self.image_processor = ImageProcessor(backbone.image.image_size, backbone.image.mean, backbone.image.std)
        self.caption_processor = CaptionProcessor()
        self._extractor: ConceptExtractor | None = None
        self.words_live = getattr(backbone.text, "words_live", False)
        embeddings = None if self.words_live else backbone.text.embed_words(vocabulary.words).clone()
        self.register_buffer("concept_embeddings", embeddings)

    # ---- building -------------------------------------------------------------------------------------------------

    @classmethod
    def default_config_path(cls, model_type: str | None = None) -> str:
        """Path of a type's yaml; None means the default type. Raises ConfigError for an unknown type."""
        model_type = model_type or cls.DEFAULT_TYPE
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            raise ConfigError(
                f"neucore has no model type {model_type!r}.{nearest(model_type, cls.PRETRAINED_MODEL_CONFIG_DICT)}"
            )
        return cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def from_pretrained(cls, model_type: str | None = None) -> "NeucoreModel":
        """The model of a type: real encoders, a head of random weights."""
        return cls.from_config(OmegaConf.load(cls.default_config_path(model_type)).model)

    @classmethod
    def from_config(
        cls, cfg: Any, vocabulary: ConceptVocabulary | None = None, captions: Iterable[str] = ()
    ) -> "NeucoreModel":
        """Build from a model section (defaults of its type filled in) and load `checkpoint` where it names one.

        captions: those of the training; a text encoder with a word vocabulary of its own builds it from them.
        """
        given = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(dict(cfg))
        config = model_defaults(given)
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
        load: bool = True,
    ) -> "NeucoreModel":
        backbone = build_backbone(config["backbone"], words, load)
        matching, loss = dict(config["matching"]), dict(config["loss"])
        mask_duplicates = matching.pop("mask_duplicates")
        reference_negatives = matching.pop("reference_negatives")
        return cls(
            backbone=backbone,
            vocabulary=vocabulary,
            embed_dim=config["embed_dim"],
            alignment=config["concept_alignment"],
            fusion=config["fusion"],
            matching=matching,
            loss={"weight": loss["concept_weight"], "alpha": loss["focal_alpha"], "gamma": loss["focal_gamma"]},
            query_dropout=config["query_dropout"],
            mask_duplicates=mask_duplicates,
            reference_negatives=reference_negatives,
            concept_pos=config["concepts"]["pos"],
            config={**config, "checkpoint": None},
            released=config["form"] == "released",
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path, wanted: Mapping[str, Any] | None = None) -> "NeucoreModel":
        """A model as a checkpoint describes it, with its weights and concept vocabulary. Raises CheckpointError.

        `wanted`: a model section. What it says of the training (loss, query_dropout, which negatives) is followed; what
        decides the architecture or the concepts must be the checkpoint's, a clear error otherwise.
        """
        stored = checkpoint.load(path)
        header = stored.get("architecture") or {}
        if header.get("arch") != "neucore" or not {"config", "concepts"} <= set(header):
            raise CheckpointError(f"{path}: holds a model of architecture {header.get('arch')!r}, not 'neucore'")
        config = model_defaults(header["config"])
        if wanted is not None:
            config = reconciled(path, config, wanted)
        vocabulary = ConceptVocabulary.from_plain(header["concepts"], f"{path}: its concept vocabulary")
        model = cls._build(config, vocabulary, header.get("words"), load=False)
        model.image_processor = ImageProcessor(**header.get("image_processor", model.image_processor.settings))
        checkpoint.restore_model(model, stored["model"], stored["frozen"], path)
        model.trained = True
        return model

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Become the model of a checkpoint: its architecture, weights and vocabulary (the host calls this)."""
        other = type(self).from_checkpoint(url_or_filename)
        self.__dict__.update(other.__dict__)

    def to(self, *args: Any, **kwargs: Any) -> "NeucoreModel":
        """As in torch; warns once of an untrained head: the host's load_model ends here, checkpoint loaded or not."""
        if not self.trained:
            self.trained = True
            warnings.warn(
                "neucore: alignment, fusion and matching have random weights (an untrained head); "
                'train it, or load a trained one with load_model("neucore", checkpoint=PATH)',
                stacklevel=2,
            )
        return super().to(*args, **kwargs)

    def checkpoint_header(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights to be loaded by itself: plain containers only."""
        return {
            "arch": "neucore",
            "config": self.config,
            "concepts": self.vocabulary.to_plain(),
            "image_processor": self.image_processor.settings,
            **({"words": list(self.backbone.text.words)} if hasattr(self.backbone.text, "words") else {}),
        }

    def concept_table(self) -> Tensor:
        """Embeddings of the concept vocabulary [C,Dw]; with gradient where the word embedding is trained."""
        return self.backbone.text.embed_words(self.vocabulary.words) if self.words_live else self.concept_embeddings

    def fingerprint(self) -> str:
        """Changes with any weight that training may change and with the backbone."""
        state, frozen = checkpoint.model_state(self)
        return checkpoint.fingerprint({**state}) if not frozen else checkpoint.fingerprint(state, extra=frozen)

    @property
    def device(self) -> torch.device:
        return self.absent_image.device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Named groups for `run.lr_scales`: backbone_image, backbone_text, head; only what is trained."""
        groups: dict[str, list] = {"backbone_image": [], "backbone_text": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                side = name.split(".")[1] if name.startswith("backbone.") else None
                groups[f"backbone_{side}" if side else "head"].append((name, parameter))
        return [{"name": name, "params": members} for name, members in groups.items() if members]

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def image_tokens(self, pixels: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """pixels [B,3,H,W], or cached backbone tokens [B,N,Di] -> projected tokens [B,N,D]."""
        if tokens is None:
            tokens = self.backbone.image(pixels.to(self.device))["tokens"]
        return self.image_projection(tokens.to(self.device))

    def text_features(self, texts: Sequence[str], features: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """texts, or cached backbone features -> words [B,L,D], word_mask [B,L], sentence [B,D]."""
        if features is None:
            encoded = self.backbone.text([self.caption_processor(text) for text in texts])
            features = {"words": encoded["words"], "word_mask": encoded["mask"], "sentence": encoded["sentence"]}
        mask = features["word_mask"].to(self.device)
        words = self.word_projection(features["words"].to(self.device)) * mask[..., None]
        result = {
            "words": words,
            "word_mask": mask,
            "sentence": self.sentence_projection(features["sentence"].to(self.device)),
        }
        return self._stand_in_text(result, ~mask.any(1))

    def _stand_in_text(self, text: dict[str, Tensor], absent: Tensor) -> dict[str, Tensor]:
        """Rows where `absent` [B] get the learned stand-in: one word and a sentence."""
        words, mask = text["words"], text["word_mask"]
        if words.shape[1] == 0:
            words, mask = words.new_zeros(len(words), 1, self.absent_word.shape[0]), mask.new_zeros(len(mask), 1)
        first = torch.arange(words.shape[1], device=words.device) == 0
        stand_in = torch.where(first[:, None], self.absent_word, torch.zeros_like(self.absent_word))
        return {
            "words": torch.where(absent[:, None, None], stand_in, words),
            "word_mask": torch.where(absent[:, None], first, mask),
            "sentence": torch.where(absent[:, None], self.absent_sentence, text["sentence"]),
        }

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

    def extract_concepts(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Concepts of relative captions, as lemmas of the configured parts of speech."""
        if self._extractor is None:
            self._extractor = ConceptExtractor(self.concept_pos)
        return self._extractor([self.caption_processor(text) for text in texts])

    # ---- the computation ------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """One training step: a batch of TripletDataset samples -> loss, loss_matching, loss_concept (scalars)."""
        if not len(self.vocabulary):
            raise ConfigError(
                "neucore: a model without a concept vocabulary cannot be trained; build it from a train split"
            )
        reference = self.image_tokens(samples.get("reference_image"), samples.get("reference_tokens"))  # [B,N,D]
        target = self.image_tokens(samples.get("target_image"), samples.get("target_tokens"))
        cached = {key: samples[key] for key in ("words", "word_mask", "sentence")} if "words" in samples else None
        text = self.text_features(samples["text_input"], cached)
        concept_words = list(samples["concept_words"])
        if self.training:
            no_image, no_text = self._dropped(len(reference))
            reference = torch.where(no_image[:, None, None], self.absent_image, reference)
            text = self._stand_in_text(text, no_text)
            concept_words = [() if gone else words for words, gone in zip(concept_words, no_text.tolist(), strict=True)]
        both = self.alignment.encode(torch.cat([reference, target]))
        r, t = ({key: value.chunk(2)[side] for key, value in both.items()} for side in (0, 1))
        bag = self.alignment.align(r, t, reference, target)
        logits = self.alignment.classifier(bag["pooled"], self.concept_table())  # [B,C]
        loss_concept = self.concept_loss(logits, self.concept_labels(samples["concept_words"]))
        loss_matching = self._matching_loss(self._query(r, text, concept_words), r, t, samples)
        return {"loss": loss_matching + loss_concept, "loss_matching": loss_matching, "loss_concept": loss_concept}

    def _matching_loss(self, query: dict[str, Tensor], r: dict[str, Tensor], t: dict[str, Tensor], samples) -> Tensor:
        """Each query against the batch's targets and, as an option, its references, which are encoded anyway."""
        sides, keys = [t], [samples["target_key"]]
        if self.reference_negatives:
            sides, keys = [t, r], [*keys, samples["reference_key"]]
        gallery = self.matching.gallery(*(torch.cat([side[name] for side in sides]) for name in ("fg", "bg")))
        columns, also_right = torch.cat(keys).cpu(), None  # [G]
        if self.mask_duplicates:
            right = [torch.isin(columns, torch.tensor(rights)) for rights in samples["right_keys"]]
            also_right = torch.stack(right).to(self.device)  # [B,G]
        return self.matching.contrastive_loss(self.matching.score(query, gallery), also_right)

    def _dropped(self, size: int) -> tuple[Tensor, Tensor]:
        """Which queries of a training batch lose their image, and which their text; never both."""
        draw = torch.rand(size, device=self.device)
        image, text = self.query_dropout["image"], self.query_dropout["text"]
        return draw < image, (draw >= image) & (draw < image + text)

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

    def encode_image(self, pixels: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Gallery images, pixels [G,3,H,W] or cached tokens -> {"fg": [G,D], "bg": [G,D]}."""
        encoded = self.alignment.encode(self.image_tokens(pixels, tokens))
        return self.matching.gallery(encoded["fg"], encoded["bg"])

    def encode_query(
        self,
        pixels: Tensor | None = None,
        texts: Sequence[str] | None = None,
        *,
        tokens: Tensor | None = None,
        text_features: Mapping[str, Tensor] | None = None,
        concept_words: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Tensor]:
        """Queries -> encodings for `score`.

        Args:
            pixels: reference images [Q,3,H,W], or `tokens` from a cache; neither = a text-only query.
            texts: relative captions; None = an image-only query. `text_features`, `concept_words`: cached or
                precomputed forms of the same texts.
        """
        has_image, has_text = pixels is not None or tokens is not None, texts is not None
        if not has_image and not has_text:
            raise ValueError("a query needs a reference image, a text, or both")
        if has_image:
            reference = self.image_tokens(pixels, tokens)
            count = len(reference)
        else:
            count = len(texts)
            reference = self.absent_image.expand(count, self.backbone.image.num_tokens, -1)
        texts = list(texts) if has_text else [""] * count
        if len(texts) != count:
            raise ValueError(f"{count} reference images but {len(texts)} texts")
        if not has_text:
            concept_words = [()] * count
        elif concept_words is None:
            concept_words = self.extract_concepts(texts)
        text = self.text_features(texts, text_features if has_text else None)
        return self._query(self.alignment.encode(reference), text, concept_words, alone=True)

    def score(self, query: Mapping[str, Tensor], gallery: Mapping[str, Tensor], chunk: int = 256) -> Tensor:
        """Scores [Q,G], higher is better, in matrix products over chunks of queries."""
        return self.matching.score(query, gallery, chunk=chunk)

    def concept_maps(self, pixels: Tensor, texts: Sequence[str], candidates: Tensor) -> list[list[dict[str, Any]]]:
        """Where each concept of a query lies in its reference and in a candidate image; see `models/concept_maps.py`.

        Args: pixels, candidates [Q,3,H,W]; texts of length Q.
        """
        concept_words = self.extract_concepts(texts)
        concepts, _ = self.query_concepts(concept_words)
        sides = [self.alignment.encode(self.image_tokens(images)) for images in (pixels, candidates)]
        return concept_maps(sides, concept_words, concepts, self.backbone.image.grid)


def _projection(width: int, dim: int, released: bool = False) -> nn.Module:
    return nn.Linear(width, dim) if released else nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
