"""The ONNX form of a model: one graph for gallery images, one for queries, and what a consumer needs beside them.

Both give factors of the score, so that whoever searches needs no more than products (T terms; 0 where the fraction's
lower product is 0):

S = cosines . cosines^T + sum_T weighted_T . weighted^T / sqrt(squares_T . squares^T)
  + (change . units^T - change . origin) / sqrt(2 + NEAREST - 2 origin . units^T)

B images, Q queries, S side of a picture, L word pieces, K concepts, P word pieces of a concept, D width.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from neucore_plugin.clauses import BETWEEN, STILL
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.files import write_json
from neucore_plugin.export.lemmas import form_table
from neucore_plugin.models.backbones.bert_words import BertText
from neucore_plugin.models.backbones.encoder import TextEncoder
from neucore_plugin.models.base import CirModel
from neucore_plugin.models.inputs import EmbeddedConcepts, Query
from neucore_plugin.models.matching import NEAREST

IMAGE, QUERY, RULES, PIECES, SCRIPT = "image.onnx", "query.onnx", "search.json", "tokenizer.json", "search.py"
TOLERANCE = 1e-4  # of a score, and of a cosine's factors
_FITS = ("pad", "stretch")  # what SCRIPT knows
# Captions of several lengths, with a word that is no concept, and one that says nothing.
_TEXTS = ("make it red", "the same but much longer, with two blue buttons and no sleeves", "", "zebras")


def check_packages() -> None:
    """Raise ConfigError with the pip command where a package is missing, before anything is done."""
    for package in ("onnx", "onnxruntime", "onnxscript", "tokenizers"):
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(f"--onnx needs {package} ({error}); run: pip install 'neucore-plugin[onnx]'") from error


def export_onnx(model: CirModel, folder: Path) -> str:
    """Write IMAGE, QUERY, RULES, PIECES and SCRIPT into a folder; returns a sentence or two for the model card.

    The graphs are compared with the model in onnxruntime. Raises ConfigError for a model that has no such form, or
    whose graphs do not give the same.
    """
    refuse_unsupported(model)
    model = model.eval().cpu()
    gallery, query = ImageSide(model), QuerySide(model)
    for side, name in tqdm(((gallery, IMAGE), (query, QUERY)), "writing graphs", unit="graph"):
        _write_graph(side, folder / name)
    pieces = word_pieces(model.backbone.text)
    pieces.save(str(folder / PIECES))
    settings = model.image_processor.settings
    rules = {"side": settings["image_size"], "fit": settings["fit"], "interpolation": settings["interpolation"].upper()}
    if query.reads_concepts:
        model.extract_concepts([""])
        rules["forms"] = form_table(model.vocabulary.words, whole_words(model.backbone.text), model._extractor)
    if model.clauses > 1:
        rules |= {"clauses": model.clauses, "between": BETWEEN, "still": list(STILL)}
    write_json(folder / RULES, rules, indent=None)
    shutil.copyfile(Path(__file__).with_name("search_script.py"), folder / SCRIPT)
    try:
        check(model, query, folder, pieces)
    except ConfigError:
        raise
    except Exception as error:  # onnxruntime's own: an operation that it lacks, a size that was fixed in writing
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--onnx: onnxruntime does not run what torch wrote of this model ({reason}); without --onnx the folder is "
            "written"
        ) from error
    return (
        f"`{IMAGE}` and `{QUERY}` give factors of the score; `{SCRIPT}` searches with them, by onnxruntime, numpy, "
        f'tokenizers and Pillow alone: `python {SCRIPT} PICTURES --image ONE.jpg --text "the same but red"`. '
        f"Differences to the model are below {TOLERANCE:g}."
        + (" The script finds concepts by a table of their forms, not by the tagger." if query.reads_concepts else "")
    )


def refuse_unsupported(model: CirModel) -> None:
    """Raise ConfigError that says what of a model has no ONNX form."""
    text, fit = model.backbone.text, model.image_processor.fit
    reason = None
    if model.head_parts is None:
        reason = f"{model.title} composes a query in the encoders' own way"
    elif not isinstance(text, BertText):
        name = model.config["backbone"]["text"]["name"]
        reason = f"the word pieces of the text encoder {name} are not BERT's"
    elif fit not in _FITS or model.image_processor.resize is not None:
        reason = f"its pictures are made square by cutting something off (fit {fit})"
    if reason:
        raise ConfigError(
            f"--onnx: this model has no ONNX form: {reason}. Supported are NEUCORE and the trained baselines on a text "
            "encoder with BERT's word pieces, such as minilm_l6, and pictures that are padded or stretched; without "
            "--onnx the folder is written"
        )


# ---- the two sides ---------------------------------------------------------------------------------------------------


class Side(nn.Module):
    """What both graphs share: pictures as bytes, normalised within the graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: CirModel) -> None:
        super().__init__()
        self.model = model
        self.side = model.image_processor.image_size
        self.register_buffer("mean", torch.tensor(model.image_processor.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(model.image_processor.std).view(3, 1, 1), persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """[B,S,S,3] uint8 -> [B,3,S,S], as the model's processor gives it."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class ImageSide(Side):
    """Gallery images: pixels [B,S,S,3] uint8 -> cosines, weighted, squares, [B,D or 2D], what the score has of them."""

    inputs = ("pixels",)

    def __init__(self, model: CirModel) -> None:
        super().__init__(model)
        self.outputs = tuple(self.factors(model.encode_image(torch.zeros(1, 3, self.side, self.side))))

    def factors(self, encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of gallery encodings."""
        return self.model.gallery_factors(encoding)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.factors(self.model.encode_image(self.normalised(pixels))).values())

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace with."""
        return {"pixels": torch.zeros(2, self.side, self.side, 3, dtype=torch.uint8)}

    def dynamic(self) -> dict[str, dict[int, Any]]:
        """Names of the sizes that may differ, by input."""
        return {"pixels": {0: torch.export.Dim("images")}}


class QuerySide(Side):
    """Queries -> cosines [Q,D or 2D], weighted and squares [Q,T,D], what the score has of them.

    pixels [Q,S,S,3] uint8 and has_image [Q] bool (false: a query of its text alone, whatever the pixels); pieces [Q,L]
    and concepts [Q,K,P], int64, what `word_pieces` gives of captions and of single words, with [CLS], [SEP] and its own
    number at padding; K is at least 1. No text and no concept are the pieces of "". What a model does not read is no
    input. Of a model that reads clauses, pieces are of each of the most that there can be, [Q,C,L].
    """

    def __init__(self, model: CirModel) -> None:
        super().__init__(model)
        self.reads_image = bool(model.reference_reads)
        self.reads_text = model.word_projection is not None or model.sentence_projection is not None
        self.reads_concepts = "concepts" in model.query_reads
        self.padding = padding_of(model.backbone.text)
        # whether a concept is the mean of its pieces' input embeddings, or read as a text
        self.bare_concepts = type(model.backbone.text).embed_words is not TextEncoder.embed_words
        reads = {
            "pixels": self.reads_image,
            "has_image": self.reads_image,
            "pieces": self.reads_text,
            "concepts": self.reads_concepts,
        }
        self.inputs = tuple(name for name, used in reads.items() if used)
        with torch.no_grad():
            texts, images = [""], torch.zeros(1, 3, self.side, self.side)
            self.outputs = tuple(self.factors(model.encode_query(images, texts, concept_words=[()])))

    def factors(self, encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of query encodings."""
        return self.model.query_factors(encoding)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inputs, model = dict(zip(self.inputs, given, strict=True)), self.model
        reference, text, concepts = {}, {}, ()
        if self.reads_image:
            for name, value in model.image_features(model.reference_reads, self.normalised(inputs["pixels"])).items():
                has_image = inputs["has_image"].view(-1, *[1] * (value.ndim - 1))
                reference[name] = torch.where(has_image, value, model.absent_image)
        if self.reads_text:
            text = model.text_features([], self.features(inputs["pieces"]))
        if self.reads_concepts:
            concepts = self.embedded(inputs["concepts"])
        return tuple(self.factors(model.compose(Query(reference, text, concepts))).values())

    def features(self, pieces: Tensor) -> dict[str, Tensor]:
        """Word pieces [Q,L], or of clauses [Q,C,L] -> what `text_features` takes."""
        if pieces.ndim == 2:
            words, mask, sentence = self.read(pieces)
            return {"words": words, "word_mask": mask, "sentence": sentence}
        count = pieces.shape[1]
        words, mask, sentence = self.read(pieces.flatten(0, 1))  # of [QC,L]
        numbered = torch.arange(count)[:, None].expand(count, words.shape[1]).flatten()  # [C(L-1)]
        return {
            "words": words.unflatten(0, (-1, count)).flatten(1, 2),
            "word_mask": mask.unflatten(0, (-1, count)).flatten(1, 2),
            "sentence": sentence.unflatten(0, (-1, count)),
            "clause": numbered.expand(pieces.shape[0], -1),
        }

    def attended(self, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Word pieces [Q,L], padded -> ids and attention, [Q,L+1], and which of L-1 places are words, [Q,L-1].

        One place more, so that a text without a word has a place of a word as well.
        """
        pieces = nn.functional.pad(pieces, (0, 1), value=self.padding)
        attention = (pieces != self.padding).long()
        place = torch.arange(pieces.shape[1] - 2, device=pieces.device)
        return pieces * attention, attention, place[None] < attention.sum(1, keepdim=True) - 2

    def read(self, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Word pieces [Q,L] -> words [Q,L-1,Dt], mask [Q,L-1], sentence [Q,Dt], as `BertText.forward` gives them."""
        text = self.model.backbone.text
        ids, attention, mask = self.attended(pieces)
        hidden = text.hidden_states(ids, attention)  # [Q,L+1,Dt]
        words = hidden[:, 1 : ids.shape[1] - 1] * mask[..., None]
        return words, mask, text.sentence(hidden, words, mask)

    def embedded(self, concepts: Tensor) -> EmbeddedConcepts:
        """Word pieces of concepts [Q,K,P] -> embeddings [Q,K,Dw], mask [Q,K]."""
        count, length = concepts.shape[1:]
        flat = concepts.reshape(-1, length)  # [QK,P]
        ids, _, mask = self.attended(flat)
        if self.bare_concepts:
            vectors = self.model.backbone.text.word_embeddings(ids[:, 1 : ids.shape[1] - 1]) * mask[..., None]
            embeddings = vectors.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        else:
            embeddings = self.read(flat)[2]
        width = embeddings.shape[-1]
        return EmbeddedConcepts(embeddings.reshape(-1, count, width), mask.any(1).reshape(-1, count))

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace with."""
        pieces = torch.from_numpy(numbers(word_pieces(self.model.backbone.text), ["red dress", "red"]))
        every = {
            "pixels": torch.zeros(2, self.side, self.side, 3, dtype=torch.uint8),
            "has_image": torch.tensor([True, False]),
            "pieces": pieces if self.model.clauses == 1 else pieces[:, None].repeat(1, self.model.clauses, 1),
            "concepts": pieces[:, None].repeat(1, 3, 1),
        }
        return {name: every[name] for name in self.inputs}

    def dynamic(self) -> dict[str, dict[int, Any]]:
        """Names of the sizes that may differ, by input."""
        dim = torch.export.Dim
        queries = {0: dim("queries")}
        last = 1 if self.model.clauses == 1 else 2
        sizes = {"pieces": {last: dim("length", min=2)}, "concepts": {1: dim("count"), 2: dim("concept_length", min=2)}}
        return {name: {**queries, **sizes.get(name, {})} for name in self.inputs}


# ---- writing and comparing -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word of the exporter's: it warns of its own parts, and prints how far it is."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_graph(side: ImageSide | QuerySide, path: Path) -> None:
    side = side.eval()
    shapes = side.dynamic()
    if isinstance(side, QuerySide):
        shapes = {"given": tuple(shapes.values())}
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                side,
                tuple(side.example().values()),
                path,
                input_names=list(side.inputs),
                output_names=list(side.outputs),
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever torch makes of an operation that it cannot write
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"--onnx: torch cannot write the {path.stem} side of this model ({reason}); "
            "without --onnx the folder is written"
        ) from error


def padding_of(text: BertText) -> int:
    """The number that stands where a text has no more word pieces: none of theirs, since a text may hold "[PAD]"."""
    return len(text.tokenizer.get_vocab())


def whole_words(text: BertText) -> list[str]:
    """Those of its word pieces that are words."""
    return [word for word in text.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 1]


def word_pieces(text: BertText) -> Any:
    """The encoder's tokenizer as one of the package tokenizers, which needs neither torch nor transformers; it cleans
    captions as `clean_caption` does."""
    from tokenizers import BertWordPieceTokenizer, Regex, Tokenizer, normalizers

    pieces = BertWordPieceTokenizer(vocab=dict(text.tokenizer.get_vocab()), lowercase=True)
    pieces.enable_truncation(text.max_words + 2)
    pieces.enable_padding(pad_id=padding_of(text))
    pieces = Tokenizer.from_str(pieces.to_str())
    clean = [normalizers.NFKC(), normalizers.Replace(Regex(r"\p{C}"), " "), pieces.normalizer]
    pieces.normalizer = normalizers.Sequence(clean)
    return pieces


def numbers(pieces: Any, texts: Sequence[str]) -> np.ndarray:
    """Texts -> the numbers of their word pieces, [texts, longest] int64."""
    return np.array([line.ids for line in pieces.encode_batch(list(texts))], dtype=np.int64)


def query_pieces(model: CirModel, pieces: Any, texts: Sequence[str]) -> np.ndarray:
    """What the query's graph takes of texts: [texts, longest], or of clauses [texts, C, longest]."""
    if model.clauses == 1:
        return numbers(pieces, texts)
    parts = [model.clauses_of(model.caption_processor(text)) for text in texts]
    flat = [part for one in parts for part in one + [""] * (model.clauses - len(one))]
    return numbers(pieces, flat).reshape(len(texts), model.clauses, -1)


@torch.no_grad()
def check(model: CirModel, query: QuerySide, folder: Path, pieces: Any) -> None:
    """Raise ConfigError unless the graphs give the model's scores, for several numbers of images and queries, captions
    of several lengths, and queries that lack a part."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    images, queries = (onnxruntime.InferenceSession(folder / name, options) for name in (IMAGE, QUERY))
    side = model.image_processor.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    pixels = torch.stack([model.image_processor(Image.fromarray(picture)) for picture in pictures])
    gallery = model.encode_image(pixels)
    found = dict(zip(ImageSide(model).outputs, images.run(None, {"pixels": pictures}), strict=True))
    for count, has_image, texts in (
        (4, True, list(_TEXTS)),
        (1, True, [_TEXTS[1]]),
        (2, False, list(_TEXTS[:2])),
        (3, True, None),
    ):
        words = model.extract_concepts(texts) if texts and query.reads_concepts else [()] * count
        longest = max(1, max(map(len, words)))
        flat = numbers(pieces, [row[k] if k < len(row) else "" for row in words for k in range(longest)])
        every = {
            "pixels": pictures[:count],
            "has_image": np.full(count, has_image),
            "pieces": query_pieces(model, pieces, texts or [""] * count),
            "concepts": flat.reshape(count, longest, -1),
        }
        given = {name: every[name] for name in query.inputs}
        factors = dict(zip(query.outputs, queries.run(None, given), strict=True))
        if not (query.reads_image if texts is None else has_image or query.reads_text):
            continue
        own = model.encode_query(pixels[:count] if has_image else None, texts, concept_words=words)
        error = np.abs(scores(factors, found) - model.score(own, gallery).numpy()).max()
        if not error <= TOLERANCE:
            raise ConfigError(
                f"--onnx: in onnxruntime the scores of this model differ by {error:.1e}, more than {TOLERANCE:g}; "
                "without --onnx the folder is written"
            )


def scores(query: Mapping[str, np.ndarray], gallery: Mapping[str, np.ndarray]) -> np.ndarray:
    """Factors -> scores [Q,G]; the formula stands at the top of this file."""
    total = query["cosines"] @ gallery["cosines"].T if "cosines" in query else 0.0
    if "weighted" in query:
        upper, lower = (np.einsum("qtd,gd->qtg", query[name], gallery[name]) for name in ("weighted", "squares"))
        total = total + (upper / np.sqrt(np.maximum(lower, 1e-24))).sum(axis=1)
    if "change" in query:
        at_reference = (query["change"] * query["origin"]).sum(axis=1, keepdims=True)
        distance = 2 + NEAREST - 2 * query["origin"] @ gallery["units"].T
        total = total + (query["change"] @ gallery["units"].T - at_reference) / np.sqrt(distance)
    return total
