"""How a relative caption is read: cleaned, for data sets, models, concepts; or as the authors do. What is printed."""

import re
import unicodedata

AND = "<and>"  # the released form's mark between the two captions of a pair
_MARK = re.compile(rf"(?:^| ){AND}(?: |$)")
_PAIRS = ("can not", "gim me", "gon na", "got ta", "lem me", "wan na")  # written together, read as two words
_IN_TWO = {pair.replace(" ", ""): pair.split() for pair in _PAIRS}


def clean_caption(caption: str) -> str:
    """One line: unicode normalised (NFKC), control characters and runs of white space as one space."""
    text = unicodedata.normalize("NFKC", caption)
    text = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in text)
    return re.sub(r"\s+", " ", text).strip()


def visible(text: str) -> str:
    """A text for one line of a terminal: what cannot be seen there (line ends, half letters) as its escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def captions_of(text: str) -> list[str]:
    """The captions that `<and>` joins in a text, each as it was written."""
    return _MARK.split(text)


def released_words(text: str) -> list[str]:
    """The words that the released code reads in a raw text, `<and>` between two captions.

    `/`, `-` and `\\` part words; whatever else is no ASCII letter, parenthesis or blank is deleted, with nothing in its
    place. Source: the released code's words of real captions.
    """
    words: list[str] = []
    for place, caption in enumerate(captions_of(text)):
        kept = re.sub(r"[^a-zA-Z() ]", "", re.sub(r"[/\\-]", " ", caption)).lower()
        words += [AND] * (place > 0)
        for word in re.findall(r"[a-z]+|[()]", kept):
            words += _IN_TWO.get(word, [word])
    return words
