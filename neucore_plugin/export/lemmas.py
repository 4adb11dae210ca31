"""A table of the forms of a vocabulary's concepts, for whoever finds concepts without a tagger.

It cannot tell a noun from a verb by what stands around it, and knows no concept outside the vocabulary:
docs/howto/export.md says how often its concepts are those of the tagger.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from neucore_plugin.common.text import clean_caption
from neucore_plugin.concepts import ConceptExtractor

CARRIERS = ("is {}", "with {}", "the {} one", "it is more {}")  # in which the tagger reads a form
_VOWELS = "aeiou"


def form_table(words: Sequence[str], extractor: ConceptExtractor) -> dict[str, str]:
    """{form: concept} of a vocabulary: what the tagger most often says of each form in CARRIERS."""
    known = set(words)
    forms = dict.fromkeys(words)
    for word in words:
        forms.update(dict.fromkeys(regular_forms(word)))
    for table in extractor.exceptions().values():
        forms.update(dict.fromkeys(form for form, lemmas in table.items() if known & set(lemmas)))
    own = [set(extractor([clean_caption(carrier.format(""))])[0]) for carrier in CARRIERS]
    read = extractor([carrier.format(form) for form in forms for carrier in CARRIERS])
    found = {}
    for place, form in enumerate(forms):
        votes: Counter[str] = Counter()
        for lemmas, others in zip(read[place * len(CARRIERS) :], own, strict=False):
            votes[next((lemma for lemma in lemmas if lemma not in others), "")] += 1
        best = max(votes, key=lambda lemma: (votes[lemma], lemma))
        if best in known:
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
