"""Queries with their pictures, ready to be shown: made when a run is evaluated, kept as JSON, shown again later."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import read_json, write_json
from neucore_plugin.report.pictures import LARGE, THUMB, Pictures

PICKS = ("sample", "best", "worst", "region")  # region: shown with its right answer and where they differ
_BRIEF = 5  # retrieved pictures kept of a best or worst query
_FORMAT = "neucore-examples-1"
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")
_TILE = {"rank": int, "id": str, "name": str, "picture": _PICTURE, "score": str, "terms": [[str]], "correct": bool}
_CARD = {
    "split": str,
    "pick": str,
    "query_id": str,
    "reference": _PICTURE,
    "reference_name": str,
    "caption": str,
    "change": str,
    "rank": (None, int),
    "several": bool,
    "retrieved": [_TILE],
    "target": (None, {"id": str, "name": str, "picture": _PICTURE}),
    "beyond": bool,
    "maps": [{"concept": str, "reference": _PICTURE, "candidate": _PICTURE}],
}


class Examples:
    """Cards of queries: plain values and embedded pictures.

    missing: the pictures that could not be read. credit: whom a page that shows them has to name.
    """

    def __init__(self, cards: Sequence[Mapping[str, Any]], missing: list[str], credit: str | None) -> None:
        self.cards, self.missing, self.credit = list(cards), missing, credit

    @classmethod
    def of(cls, examples: Iterable[Mapping[str, Any]], fit: str = "pad", credit: str | None = None) -> "Examples":
        """From mappings as `write_report` takes them: reads the pictures, lays the maps over them."""
        pictures = Pictures(fit)
        return cls([_card(example, pictures) for example in examples], pictures.missing, credit)

    @classmethod
    def read(cls, path: Path) -> "Examples":
        """What `write` wrote. DataError where it is anything else."""
        found = read_json(path, dict, "evaluate again")
        credit, missing, cards = found.get("credit"), found.get("missing"), found.get("cards")
        good = found.get("format") == _FORMAT and (credit is None or isinstance(credit, str))
        if not (good and _fits(missing, [str]) and _fits(cards, [_CARD]) and all(c["pick"] in PICKS for c in cards)):
            raise DataError(f"{path}: holds no examples as an evaluation writes them; evaluate again")
        return cls(cards, missing, credit)

    def write(self, path: Path) -> None:
        """Keep them as JSON, pictures included."""
        content = {"format": _FORMAT, "credit": self.credit, "missing": self.missing, "cards": self.cards}
        write_json(path, content, indent=None)

    def in_order(self, splits: Iterable[str]) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
        """[(split, {pick: cards})], the splits named first, without empty ones."""
        order = dict.fromkeys([*splits, *(card["split"] for card in self.cards)])
        groups = {split: {pick: [] for pick in PICKS} for split in order}
        for card in self.cards:
            groups[card["split"]][card["pick"]].append(dict(card))
        return [(split, picks) for split, picks in groups.items() if any(picks.values())]


def tile(rank: int, item: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """A retrieved picture: a mapping of id and path, where known also name, score, its terms, correct."""
    score = item.get("score")
    return {
        "rank": rank,
        "id": str(item["id"]),
        "name": str(item.get("name") or item["id"]),
        "picture": pictures.thumb(item["path"]),
        "score": "" if score is None else f"{float(score):.3f}",
        "terms": [(term, f"{value:+.3f}") for term, value in (item.get("terms") or {}).items()],
        "correct": bool(item.get("correct")),
    }


def _card(example: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    pick = example.get("pick", PICKS[0])
    retrieved = list(example["retrieved"])
    first = retrieved[0] if retrieved else None
    if pick != PICKS[0]:
        retrieved = retrieved[:_BRIEF]
    rank, target = example["rank"], example.get("target")
    maps = [
        {
            "concept": str(item["concept"]),
            "reference": pictures.heat(example["reference"], item["reference"]),
            "candidate": _candidate(pictures, first["path"], item["candidate"]) if first else None,
        }
        for item in example.get("maps") or ()
    ]
    named = target and {
        "id": str(target["id"]),
        "name": str(target.get("name") or target["id"]),
        "picture": pictures.thumb(target["path"]),
    }
    return {
        "split": str(example["split"]),
        "pick": pick,
        "query_id": str(example["query_id"]),
        "reference": pictures.thumb(example["reference"], LARGE if pick == PICKS[0] else THUMB),
        "reference_name": str(example.get("reference_name") or ""),
        "caption": str(example["caption"]),
        "change": str(example.get("change") or ""),
        "rank": rank,
        "several": len(example.get("targets") or ()) > 1,
        "retrieved": [tile(rank, item, pictures) for rank, item in enumerate(retrieved, start=1)],
        "target": named or None,
        "beyond": target is not None and (rank is None or rank > len(retrieved)),
        "maps": maps,
    }


def _candidate(pictures: Pictures, path: Any, values: Any) -> str | None:
    """The picture with its map; without one, where the model has none of candidates, as it is."""
    return pictures.thumb(path) if values is None else pictures.heat(path, values)


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape: a type, a picture, (None or) a shape, a list of one, a mapping of shapes."""
    if shape is _PICTURE:
        return value is None or (isinstance(value, str) and _PICTURE.fullmatch(value) is not None)
    if isinstance(shape, tuple):
        return value is None or _fits(value, shape[1])
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        same = isinstance(value, dict) and value.keys() == shape.keys()
        return same and all(_fits(value[key], inner) for key, inner in shape.items())
    return type(value) is shape
