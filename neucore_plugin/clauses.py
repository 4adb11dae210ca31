"""A relative caption in clauses: "now a woman, with dark skin and a hat" asks for one change after the other.

L words, C clauses of a caption, Dt width of the text encoder.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TEXT_KEYS = ("words", "word_mask", "sentence", "clause")  # of a batch with cached features of its texts
# Where one change ends and the next begins: at marks, at "and", and before "with".
BETWEEN = r"(?i:\s*[,;](?!\d)\s*(?:and\s+)?|\s+and\s+|\s+(?=with\s))"
# Words that ask for nothing by themselves: what has no others, such as "as before", is no clause of its own.
STILL = re.findall(
    r"\w+",
    "a an and the with as at be been before but else every everything all in is are was were it its them they their "
    "this that these those than just keep kept like now only other others otherwise rest same should stay stays still "
    "again",
)


def clauses(caption: str, most: int) -> list[str]:
    """A caption, as `clean_caption` gives it -> its clauses, in order, at least one and at most `most`.

    What is beyond `most` stays together in the last.

    >>> clauses("now a woman with dark skin and a hat", 4)
    ['now a woman', 'with dark skin', 'a hat']
    >>> clauses("now a woman with dark skin and a hat", 2)
    ['now a woman', 'with dark skin and a hat']
    >>> clauses("as before, only with a hat", 4)
    ['as before, only with a hat']
    """
    if most < 2:
        return [caption]
    first, *rest = re.split(f"({BETWEEN})", caption)
    parts = [first]
    for mark, part in zip(rest[::2], rest[1::2], strict=True):
        if len(parts) < most and _asks(parts[-1]) and _asks(part):
            parts.append(part)
        else:
            parts[-1] += mark + part
    return [part for part in (one.strip(" ,;") for one in parts) if part] or [caption]


def _asks(text: str) -> bool:
    return any(word not in STILL for word in re.findall(r"\w+", text.lower()))


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(words [Lc,Dt], sentence [Dt]) of each clause -> words [L,Dt], clause [L] that each is of, sentence [C,Dt]."""
    words, sentences = zip(*parts, strict=True)
    lengths = torch.tensor([len(rows) for rows in words])
    return {
        "words": torch.cat(words),
        "clause": torch.repeat_interleave(torch.arange(len(parts)), lengths),
        "sentence": torch.stack(sentences),
    }


def padded(captions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Texts, each as `joined` gives it or without clauses (words [L,Dt], sentence [Dt]) -> a batch of them:

    words [B,L,Dt], word_mask [B,L], sentence [B,Dt], or with clauses sentence [B,C,Dt] and clause [B,L].
    """
    lengths = torch.tensor([len(one["words"]) for one in captions])
    batch = {"words": pad_sequence([one["words"] for one in captions], batch_first=True)}
    device = batch["words"].device
    batch["word_mask"] = torch.arange(batch["words"].shape[1], device=device) < lengths.to(device)[:, None]
    if "clause" not in captions[0]:
        return batch | {"sentence": torch.stack([one["sentence"] for one in captions])}
    for name in ("sentence", "clause"):
        batch[name] = pad_sequence([one[name] for one in captions], batch_first=True)
    return batch


def cached_text(samples: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The cached features of a batch's texts, as `padded` gives them; None where it has none."""
    return {key: samples[key] for key in TEXT_KEYS if key in samples} if "words" in samples else None
