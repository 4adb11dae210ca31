"""What the evaluation presets of `config/published.py` do to the queries of a split. Knows no host and no model."""

from collections.abc import Sequence
from dataclasses import replace

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.published import PRESETS, STANDARD, Protocol
from neucore_plugin.datasets.triplets import Triplet


def queries(protocol: Protocol, triplets: Sequence[Triplet], train: bool = False, joiner: str = "and") -> list[Triplet]:
    """The triplets with the texts that a protocol asks. Training never takes captions apart.

    joiner: the word between two captions of a pair, which readers join by "and".
    """
    text = "concat" if train and protocol.text == "separate" else protocol.text
    asked = []
    for triplet in triplets:
        captions = [caption for caption in triplet.captions if caption.strip()]
        if len(triplet.captions) < 2 or (text == "concat" and joiner == "and"):
            asked.append(triplet)
        elif text == "concat":
            asked.append(replace(triplet, caption=f" {joiner} ".join(captions)))
        elif text == "both_orders":
            joined = (f" {joiner} ".join(order) for order in (captions, captions[::-1]))
            asked += [_asked(triplet, caption, tag) for caption, tag in zip(joined, "ab", strict=True)]
        else:
            asked += [_asked(triplet, caption, str(place)) for place, caption in enumerate(captions or [""])]
    return asked


def _asked(triplet: Triplet, caption: str, tag: str) -> Triplet:
    return replace(triplet, query_id=f"{triplet.query_id}/{tag}", caption=caption)


def presets(dataset: str, names: Sequence[str] | None) -> list[Protocol]:
    """The presets of a data set by name; None = its first one. Raises ConfigError for an unknown name."""
    known = PRESETS.get(dataset, {STANDARD.name: STANDARD})
    for name in names or []:
        if name not in known:
            raise ConfigError(f"datasets.{dataset}.build_info.protocol: no preset {name!r}.{nearest(str(name), known)}")
    return [known[name] for name in names or list(known)[:1]]
