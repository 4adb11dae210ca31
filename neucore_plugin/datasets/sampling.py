"""Choices by hashes of names, for data sets that are made by rules: the same on every machine, without any chance."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from neucore_plugin.datasets.triplets import Triplet


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone: the only source of chance."""
    digest = hashlib.blake2b("\x1f".join(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose(options: list[str], *key: str) -> str:
    """One of the options, by the hash of a key."""
    return options[int(unit_hash("phrase", *key) * len(options))]


def cap(triplets: Iterable[Triplet], change: str, most: int | None, by_target: bool) -> list[Triplet]:
    """At most `most` triplets of one kind of change for each reference (or target), those of lowest hash."""
    count: dict[str, int] = defaultdict(int)
    kept = []
    for triplet in sorted(triplets, key=lambda t: (unit_hash("cap", t.query_id), t.query_id)):
        if triplet.change == change and most is not None:
            key = triplet.targets[0] if by_target else triplet.reference
            count[key] += 1
            if count[key] > most:
                continue
        kept.append(triplet)
    return kept


def sample(triplets: Iterable[Triplet], limit: int | None) -> list[Triplet]:
    """The `limit` triplets of lowest hash, in that order: any first part of a split is a fair sample of it."""
    return sorted(triplets, key=lambda t: (unit_hash("sample", t.query_id), t.query_id))[:limit]
