"""The data sets that are known by name: their splits, and how the published ones are evaluated.

Numbers of two protocols cannot be compared: on FashionIQ they lie 7 to 12 points apart. The preset is therefore printed
and stored with every result.
"""

from dataclasses import dataclass

FASHIONIQ_CATEGORIES = ("dress", "shirt", "toptee")


def _by_category(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}_{category}" for part in parts for category in FASHIONIQ_CATEGORIES)


# The splits with answers: what can be trained on or evaluated; the others are for the test servers alone.
SPLITS = {
    "cirr": ("train", "val"),
    "fashioniq": ("train", *_by_category("train", "val")),
    "shoes": ("train", "test"),
    "fashion200k": ("train", "test"),
    "circo": ("val",),
    "emoji": ("train", "val", "test_combo", "test_role", "test_word", "test_two"),
    "icons": ("train", "val", "test_combo", "test_base"),
}
UNANSWERED_SPLITS = {"cirr": ("test1",), "fashioniq": _by_category("test"), "circo": ("test",)}


@dataclass(frozen=True)
class Protocol:
    """How the queries of a split are asked and counted.

    gallery: "full" = the split's own list; "union" = the references and targets of the split's queries.
    remove_reference: whether a query's reference takes no place in its ranking.
    text: of a pair with several captions: "concat" = one query "a and b"; "both_orders" = two queries, "a and b" and
        "b and a"; "separate" = each caption a query.
    strip: letters taken off both ends of each caption, before captions are joined.
    soft: R@K is the largest weight (`Triplet.soft`) among the top K, 0 where none of them has a positive one.
    subset_top: with soft, R_subset@K counts the group members alone that stand in the top `subset_top` of the whole
        gallery; None = all.
    recall_at: the K of R@K.
    precision_at: mAP@K over all right answers; R@K then counts the target alone.
    by_aspect: the metric that the log also gives for each kind of query; "" for none.
    select: the metrics whose mean selects the best checkpoint; () = R@1 and R@10, in groups R@5 and R_subset@1.
    """

    name: str
    source: str = ""
    gallery: str = "full"
    remove_reference: bool = True
    text: str = "concat"
    strip: str = ""
    soft: bool = False
    subset_top: int | None = None
    recall_at: tuple[int, ...] = (1, 5, 10, 50)
    precision_at: tuple[int, ...] = ()
    by_aspect: str = ""
    select: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for logs and result files."""
        what = "the split's own list" if self.gallery == "full" else "references and targets of the split's queries"
        parts = [f"gallery: {what}", f"reference {'removed' if self.remove_reference else 'kept'}"]
        stripped = f", without {self.strip!r} at the ends of a caption" if self.strip else ""
        parts += [f"text: {self.text}{stripped}"] if self.name in PRESETS["fashioniq"] else []
        parts += ["R@K: largest target_soft weight among the top K"] if self.soft else []
        within = f"those in the global top {self.subset_top}" if self.subset_top else "all five others"
        parts += [f"R_subset@K: the same of the group's members, {within}"] if self.soft else []
        parts += ["mAP@K over all right answers, R@K on the target alone"] if self.precision_at else []
        return "; ".join([*parts, self.source] if self.source else parts)


def _table(*protocols: Protocol) -> dict[str, Protocol]:
    return {protocol.name: protocol for protocol in protocols}


STANDARD = Protocol("standard")
_CIRR = {"select": ("R@5", "R_subset@1")}
_FASHION = {"select": ("R@10", "R@50")}
_RECALLS = {"select": ("R@1", "R@10", "R@50")}
_CIRCO = {
    "recall_at": (1, 5, 10, 25, 50),
    "precision_at": (5, 10, 25, 50),
    "by_aspect": "mAP@10",
    "select": ("mAP@5", "mAP@10", "mAP@25", "mAP@50"),
}
PRESETS = {  # the first of a data set is its default
    "cirr": _table(
        Protocol("hard", "a hit is target_hard, as in CLIP4Cir", **_CIRR),
        Protocol("soft", "as in CIRPLANT", soft=True, **_CIRR),
        Protocol("soft_top50", "as in ARTEMIS and NEUCORE", soft=True, subset_top=50, **_CIRR),
    ),
    "fashioniq": _table(
        Protocol("neucore", "as in ARTEMIS", text="both_orders", **_FASHION),
        Protocol("clip4cir", "as in CLIP4Cir and SPRC", remove_reference=False, strip=".?, ", **_FASHION),
        Protocol("covr", "as in CoVR", **_FASHION),
        Protocol("val", "as in VAL", gallery="union", text="separate", **_FASHION),
        Protocol("tgcir", "as in TG-CIR", gallery="union", **_FASHION),
    ),
    "shoes": _table(Protocol("shoes", **_RECALLS)),
    "fashion200k": _table(Protocol("fashion200k", "a hit is any image of the target's caption", **_RECALLS)),
    "circo": _table(
        Protocol("circo", "as in CIRCO's own evaluation", remove_reference=False, **_CIRCO),
        Protocol("circo_removed", "as in CoVR", **_CIRCO),
    ),
}
PUBLISHED = tuple(PRESETS)
