"""How a relative caption is cleaned: the one rule of data sets, models and the search for concepts."""

import re
import unicodedata


def clean_caption(caption: str) -> str:
    """One line: unicode normalised (NFKC), control characters and runs of white space as one space."""
    text = unicodedata.normalize("NFKC", caption)
    text = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in text)
    return re.sub(r"\s+", " ", text).strip()
