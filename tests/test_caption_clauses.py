"""Where a relative caption is parted into clauses, on real captions too, and how their features come together."""

import json
import re

import pytest
import torch
from places import REAL, needs_real

from neucore_plugin.clauses import STILL, cached_text, clauses, joined, padded
from neucore_plugin.processors import CaptionProcessor

HAND = {
    "make it blue": ["make it blue"],
    "blue, longer": ["blue", "longer"],
    "blue ,longer;red ; short": ["blue", "longer", "red", "short"],
    "blue, and longer": ["blue", "longer"],
    "Blue AND Longer With Dots": ["Blue", "Longer", "With Dots"],
    "sand and candy": ["sand", "candy"],
    "without sleeves, band": ["without sleeves", "band"],
    "and red": ["and red"],
    "red and": ["red and"],
    "with red": ["with red"],
    "red with": ["red with"],
    "red and with dots": ["red", "with dots"],
    "red, with dots": ["red", "with dots"],
    "as before, only with curly hair": ["as before, only with curly hair"],
    "As Before, only a man, the skin dark": ["As Before, only a man", "the skin dark"],
    "red, all else the same": ["red, all else the same"],
    "red and the rest as it is, with dots": ["red and the rest as it is", "with dots"],
    "as before": ["as before"],
    "this and that": ["this and that"],
    ", , red ,": ["red"],
    "p,q,r,s,t and u": ["p", "q", "r", "s,t and u"],
    "日本語 and ÇA, größer; ☃": ["日本語", "ÇA", "größer; ☃"],
    "": [""],
    ",": [","],
    " ; ,, ": [" ; ,, "],
}


@pytest.mark.parametrize("caption", HAND)
def test_where_a_caption_is_parted(caption):
    assert clauses(caption, 4) == HAND[caption]
    assert clauses(caption, 1) == [caption]


def cut(caption):
    """At every mark, "and" and "with", whatever stands between."""
    words = caption.replace(",", " , ").replace(";", " , ").lower().split()
    parts = [[]]
    for place, word in enumerate(words):
        if word in (",", "and") and 0 < place < len(words) - 1:
            parts.append([])
        elif word == "with" and parts[-1]:
            parts.append([word])
        else:
            parts[-1].append(word)
    return [" ".join(part) for part in parts]


@needs_real("cirr")
@needs_real("fashioniq")
@needs_real("shoes")
def test_of_real_captions_nothing_is_lost_but_what_parts_them():
    captions = set()
    for path in sorted(REAL.glob("*/**/*.json")):
        if path.parts[-2] not in ("captions", "annotations", "shoes"):
            continue
        for entry in json.loads(path.read_text()):
            kinds = ("caption", "relative_caption", "RelativeCaption")
            given = entry.get("captions") or [entry.get(kind) for kind in kinds]
            captions.update(map(CaptionProcessor(), filter(None, given)))
            captions.add(CaptionProcessor()(" and ".join(filter(None, given))))
    counts = dict.fromkeys(range(1, 5), 0)
    for caption in captions:
        for most in (2, 3, 4, 99):
            parts, place = clauses(caption, most), 0
            assert 1 <= len(parts) <= most and (all(parts) or parts == [caption]), caption
            for part in (*parts, None):
                start = len(caption) if part is None else caption.index(part, place)
                between = caption[place:start].replace(",", " ").replace(";", " ").lower().split()
                assert set(between) <= {"and"}, (caption, parts)
                place = start + len(part or "")
            if most == 99 and all(set(re.findall(r"\w+", part.lower())) - set(STILL) for part in cut(caption)):
                assert all(clauses(part, 4) == [part] for part in parts), parts
                for words in (part.replace(",", " , ").replace(";", " ; ").lower().split() for part in parts):
                    assert len(words) < 2 or not {",", ";"} & set(words), parts
                    assert not {"and", "with"} & set(words[1:-1]), parts
            elif most < 99:  # the same, but that the last holds the rest
                assert clauses(caption, 99)[: len(parts) - 1] == parts[:-1]
        counts[len(clauses(caption, 4))] += 1
    assert sum(counts.values()) > 10_000 and all(count > 100 for count in counts.values()), counts


def test_texts_are_joined_and_padded_as_a_loop_does():
    lengths = [[2, 0, 3], [1], [0], [4, 1]]
    texts = [[(torch.randn(length, 5), torch.randn(3)) for length in one] for one in lengths]
    batch = padded([joined(one) for one in texts])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "words": (4, 5, 5), "word_mask": (4, 5), "sentence": (4, 3, 3), "clause": (4, 5)
    }  # fmt: skip
    for row, one in enumerate(texts):
        flat = [(number, word) for number, (words, _) in enumerate(one) for word in words]
        assert batch["word_mask"][row].tolist() == [place < len(flat) for place in range(5)]
        for place in range(5):
            number, word = flat[place] if place < len(flat) else (0, torch.zeros(5))
            assert batch["clause"][row, place] == number and torch.equal(batch["words"][row, place], word)
        for number in range(3):
            wanted = one[number][1] if number < len(one) else torch.zeros(3)
            assert torch.equal(batch["sentence"][row, number], wanted)
    whole = padded([{"words": words, "sentence": sentence} for (words, sentence), *_ in texts])
    assert "clause" not in whole and whole["sentence"].shape == (4, 3) and whole["words"].shape == (4, 4, 5)
    assert cached_text({"text_input": []}) is None
    assert cached_text({**batch, "other": 1}).keys() == batch.keys()
