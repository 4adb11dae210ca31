"""How a relative caption is cleaned: the one rule of data sets, models and the search for concepts. What is printed."""

import re
import unicodedata


def clean_caption(caption: str) -> str:
    """One line: unicode normalised (NFKC), control characters and runs of white space as one space."""
    text = unicodedata.normalize("NFKC", caption)
    text = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in text)
    return re.sub(r"\s+", " ", text).strip()


def visible(text: str) -> str:
    """A text for one line of a terminal: what cannot be seen there (line ends, half letters) as its escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
