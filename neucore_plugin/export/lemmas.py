"""A table of forms and their concepts, for whoever finds concepts without a tagger.

It cannot tell a noun from a verb by what stands around it: docs/howto/export.md says how often its concepts are those
of the tagger.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from neucore_plugin.concepts import ConceptExtractor

CARRIERS = ("with {}", "the {} one", "is {}")  # in which the tagger reads a form
_VOWELS = "aeiou"


def form_table(words: Sequence[str], further: Iterable[str], extractor: ConceptExtractor) -> dict[str, str]:
    """{form: concept}, forms in lower case, none that is no concept.

    words: a concept vocabulary, the frequent first. further: words of the language. Of what the tagger says of a form
    in CARRIERS the concept that is most frequent in the vocabulary is taken; where none is of the vocabulary, what it
    says most often.
    """
    rank = {word: place for place, word in enumerate(words)}
    forms = list(dict.fromkeys([*words, *(form for word in words for form in regular_forms(word)), *further]))
    own = [set(extractor([carrier.format("")])[0]) for carrier in CARRIERS]
    read = extractor([carrier.format(form) for form in forms for carrier in CARRIERS], progress=True)
    found = {}
    for place, form in enumerate(forms):
        votes: Counter[str] = Counter()
        for lemmas, others in zip(read[place * len(CARRIERS) :], own, strict=False):
            votes[next((lemma for lemma in lemmas if lemma not in others), "")] += 1
        known = [lemma for lemma in votes if lemma in rank]
        best = min(known, key=rank.get) if known else max(votes, key=lambda lemma: (votes[lemma], lemma))
        if best:
            found[form] = best
    return found


def regular_forms(word: str) -> Iterator[str]:
    """Plural, third person, past, participle, comparative and superlative, as English builds them."""
    if len(word) < 3 or not word.isalpha():
        return
    if word.endswith("y") and word[-2] not in _VOWELS:
        yield from (f"{word[:-1]}{end}" for end in ("ies", "ied", "ier", "iest"))
        yield f"{word}ing"
    elif word.endswith("e"):
        yield from (f"{word}{end}" for end in ("s", "d", "r", "st"))
        yield f"{word[:-1]}ing"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        yield from (f"{word}{end}" for end in ("es", "ed", "ing", "er", "est"))
    else:
        yield from (f"{word}{end}" for end in ("s", "ed", "ing", "er", "est"))
        if word[-1] not in f"{_VOWELS}wy" and word[-2] in _VOWELS and word[-3] not in _VOWELS:
            yield from (f"{word}{word[-1]}{end}" for end in ("ed", "ing", "er", "est"))
