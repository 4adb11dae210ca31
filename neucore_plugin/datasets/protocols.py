"""What the evaluation presets of `config/published.py` do to the queries of a split. Knows no host and no model."""

from collections.abc import Sequence
from dataclasses import replace

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.published import PRESETS, STANDARD, Protocol
from neucore_plugin.datasets.triplets import Triplet


def queries(protocol: Protocol, triplets: Sequence[Triplet], train: bool = False, joiner: str = "and") -> list[Triplet]:
    """The triplets with the texts that a protocol asks. Training never takes captions apart.

    joiner: what stands between two captions of a pair: "and", left out beside an empty caption; or a mark, which stays.
    A pair with an empty caption is a pair: both orders of it are asked.
    """
    text = "concat" if train and protocol.text == "separate" else protocol.text
    asked = []
    for triplet in triplets:
        captions = [caption.strip(protocol.strip) for caption in triplet.captions]
        if not captions:
            asked.append(triplet)
        elif len(captions) == 1 or text == "concat":
            asked.append(replace(triplet, caption=_joined(captions, joiner)))
        elif text == "both_orders":
            orders = zip((captions, captions[::-1]), "ab", strict=True)
            asked += [_asked(triplet, _joined(order, joiner), tag) for order, tag in orders]
        else:
            told = [caption for caption in captions if caption.strip()] or [""]
            asked += [_asked(triplet, caption, str(place)) for place, caption in enumerate(told)]
    return asked


def _joined(captions: Sequence[str], joiner: str) -> str:
    kept = captions if joiner != "and" else [caption for caption in captions if caption.strip()]
    return f" {joiner} ".join(kept)


def _asked(triplet: Triplet, caption: str, tag: str) -> Triplet:
    return replace(triplet, query_id=f"{triplet.query_id}/{tag}", caption=caption)


def presets(dataset: str, names: Sequence[str] | None) -> list[Protocol]:
    """The presets of a data set by name; None = its first one. Raises ConfigError for an unknown name."""
    known = PRESETS.get(dataset, {STANDARD.name: STANDARD})
    for name in names or []:
        if name not in known:
            raise ConfigError(f"datasets.{dataset}.build_info.protocol: no preset {name!r}.{nearest(str(name), known)}")
    return [known[name] for name in names or list(known)[:1]]
