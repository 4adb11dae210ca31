"""What the evaluation presets of `config/published.py` do to the queries of a split. Knows no host and no model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.text import AND
from neucore_plugin.config.published import PRESETS, STANDARD, Protocol
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset


def queries(protocol: Protocol, triplets: Sequence[Triplet], train: bool = False, joiner: str = "and") -> list[Triplet]:
    """The triplets with the texts that a protocol asks. Training never takes captions apart.

    joiner: what stands between two captions of a pair: "and", left out beside an empty caption; or the mark AND,
        which stays, between captions as they are.
    A pair with an empty caption is a pair: both orders of it are asked.
    """
    text = "concat" if train and protocol.text == "separate" else protocol.text
    asked = []
    for triplet in triplets:
        captions = [caption if joiner == AND else caption.strip() for caption in triplet.captions]
        captions = [caption.strip(protocol.strip) for caption in captions]
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
    kept = captions if joiner == AND else [caption for caption in captions if caption.strip()]
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


def is_train(split: str) -> bool:
    """Whether a split is trained on: its name begins with train."""
    return split.startswith("train")


def build(
    name: str,
    split: str,
    content: tuple[Sequence[Triplet], Gallery],
    images: ImageStore,
    chosen: Sequence[Protocol],
    joiner: str = "and",
    captions: Callable[[str], str] = str,
) -> dict[str, TripletDataset]:
    """The data sets of one split: by the first protocol as {split: ...}, by each further one as {split@preset: ...}; a
    split to train on has the first alone. Raises DataError for what can neither be trained on nor evaluated.

    joiner: see `queries`. captions: the text processor.
    """
    train = is_train(split)
    datasets = {}
    for protocol in chosen[:1] if train else chosen:
        title = split if protocol is chosen[0] else f"{split}@{protocol.name}"
        asked = queries(protocol, content[0], train, joiner)
        datasets[title] = TripletDataset(
            *(name, title, asked, content[1], images),
            captions=captions,
            train=train,
            protocol=protocol,
            answers=any(triplet.targets for triplet in asked),
        )
    return datasets
