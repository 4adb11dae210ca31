"""Evaluation protocols as named presets: what is ranked, with which text, and what is reported.

Numbers of two protocols cannot be compared: on FashionIQ they lie 7 to 12 points apart. The preset is therefore printed
and stored with every result. Knows no host and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.datasets.triplets import Triplet

TEXTS = ("concat", "both_orders", "separate")


@dataclass(frozen=True)
class Protocol:
    """How the queries of a split are asked and counted.

    gallery: "full" = the split's own list; "union" = the references and targets of the split's queries.
    remove_reference: whether a query's reference takes no place in its ranking.
    text: of a pair with several captions: "concat" = one query "a and b"; "both_orders" = two queries, "a and b" and
        "b and a"; "separate" = each caption a query.
    soft: R@K is the largest weight (`Triplet.soft`) among the top K, 0 where none of them has a positive one.
    precision_at: mAP@K over all right answers; R@K then counts the target alone.
    select: the metrics whose mean selects the best checkpoint; () = R@1 and R@10, in groups R@5 and R_subset@1.
    """

    name: str
    source: str = ""
    gallery: str = "full"
    remove_reference: bool = True
    text: str = "concat"
    soft: bool = False
    precision_at: tuple[int, ...] = ()
    select: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for logs and result files."""
        what = "the split's own list" if self.gallery == "full" else "references and targets of the split's queries"
        parts = [f"gallery: {what}", f"reference {'removed' if self.remove_reference else 'kept'}"]
        parts += [f"text: {self.text}"] if self.name in PRESETS["fashioniq"] else []
        parts += ["R@K: largest target_soft weight among the top K"] if self.soft else []
        parts += ["mAP@K over all right answers, R@K on the target alone"] if self.precision_at else []
        return "; ".join([*parts, self.source] if self.source else parts)

    def queries(self, triplets: Sequence[Triplet], train: bool = False, joiner: str = "and") -> list[Triplet]:
        """The triplets with the texts that this protocol asks. Training never takes captions apart.

        joiner: the word between two captions of a pair, which readers join by "and".
        """
        text = "concat" if train and self.text == "separate" else self.text
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


STANDARD = Protocol("standard")
_FASHION = {"select": ("R@10", "R@50")}
PRESETS: dict[str, dict[str, Protocol]] = {
    "emoji": {"standard": STANDARD},
    "folder": {"standard": STANDARD},
    "cirr": {
        "hard": Protocol("hard", "a hit is target_hard, as in CLIP4Cir", select=("R@5", "R_subset@1")),
        "soft": Protocol("soft", "as in ARTEMIS and CIRPLANT", soft=True, select=("R@5", "R_subset@1")),
    },
    "fashioniq": {
        "neucore": Protocol("neucore", "as in ARTEMIS", text="both_orders", **_FASHION),
        "clip4cir": Protocol("clip4cir", "as in SPRC and SEARLE", remove_reference=False, **_FASHION),
        "covr": Protocol("covr", "as in CoVR", **_FASHION),
        "val": Protocol("val", "as in VAL", gallery="union", text="separate", **_FASHION),
        "tgcir": Protocol("tgcir", "as in TG-CIR", gallery="union", **_FASHION),
    },
    "shoes": {"shoes": Protocol("shoes", select=("R@1", "R@10", "R@50"))},
    "fashion200k": {
        "fashion200k": Protocol(
            "fashion200k", "a hit is any image of the target's caption", select=("R@1", "R@10", "R@50")
        )
    },
    "circo": {"circo": Protocol("circo", precision_at=(5, 10, 25, 50), select=("mAP@5", "mAP@10", "mAP@25", "mAP@50"))},
}


def presets(dataset: str, names: Sequence[str] | str | None) -> list[Protocol]:
    """The presets of a data set by name; None = its first one. Raises ConfigError for unknown, repeated or no names."""
    known = PRESETS.get(dataset, {"standard": STANDARD})
    if names is None:
        return [next(iter(known.values()))]
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"datasets.{dataset}.build_info.protocol: no preset {name!r}.{nearest(str(name), known)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"datasets.{dataset}.build_info.protocol: got {chosen}; "
            f"allowed: one or more of {', '.join(known)}, none twice"
        )
    return [known[name] for name in chosen]


def split_name(split: str, protocol: Protocol, first: bool) -> str:
    """Name of a split in results: as it is for the first preset, `split@preset` for the others."""
    return split if first else f"{split}@{protocol.name}"


def describe(protocol: Protocol) -> dict[str, Any]:
    """What result files hold of a protocol."""
    return {"name": protocol.name, "summary": protocol.summary}
