"""Composed retrieval on emoji drawings: the data set that pip alone installs.

Queries are made from attributes (`attributes.py`), images from OpenMoji (`drawings.py`). The gallery is the whole
drawing set, flags, letters and OpenMoji's own extras included: they are distractors, no query names them. Everything
is decided by hashes of names, so every machine makes the same data set.

Splits, and what an image of training (`seen`) is:
- held-out roles: a tenth of the roles and gestures, in no training image at all, as reference or target;
- held-out combinations: one (role, tone) in six, one (role, gender) in eight, one (hair, tone, gender) in four;
- held-out objects: one in five of those that have a query;
- a drawing that nearly coincides with a held-out one is kept out of training as well.

train      one change; reference and targets are seen images
val        the same; pairs that training uses in neither order
test_combo one change; reference a seen image, target of a held-out combination
test_role  one change; target of a held-out role; reference of the same role (tone, gender) or a seen image (role)
test_word  one word of an object's name; the target is a held-out object
test_two   gender and tone at once; both images seen, but training has no text with two changes

A query that is evaluated also has three further wordings, and near-twins of its reference that lack the change.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from neucore_plugin.common.errors import DataError
from neucore_plugin.config.data import EmojiInfoSchema
from neucore_plugin.config.published import SPLITS
from neucore_plugin.datasets.emoji.attributes import (
    ADULT,
    PRESENTATION,
    TONES,
    Attributes,
    change_text,
    change_wordings,
    code_points,
    object_text,
    object_wordings,
    parse,
    substitutions,
)
from neucore_plugin.datasets.emoji.drawings import INSTALL, prepare, read_manifest
from neucore_plugin.datasets.emoji.styles import drawings_of
from neucore_plugin.datasets.sampling import cap, sample, unit_hash
from neucore_plugin.datasets.triplets import Gallery, Triplet

ROLE_CAP = EmojiInfoSchema().role_cap  # 118,000 pairs otherwise, nine tenths of the data
_OBJECT_CAP = 6  # substitutions of one word that a reference starts: 62 smileys are one word apart from each other
_LIMITS = {"val": 1000, "test_combo": 1500, "test_role": 1500, "test_word": 1000, "test_two": 1000}
_VAL_SHARE = 0.08


@dataclass(frozen=True)
class HeldOut:
    """What training never shows. The three combination sets hold (role, tone), (role, gender), (hair, tone, gender)."""

    roles: frozenset[str]
    role_tones: frozenset[tuple[str, str]]
    role_genders: frozenset[tuple[str, str]]
    hair_tone_genders: frozenset[tuple[str, str, str]]
    objects: frozenset[str]

    def has_combination(self, a: Attributes) -> bool:
        """True if the emoji shows a held-out combination."""
        return (
            (a.role, a.tone) in self.role_tones
            or (a.role, a.gender) in self.role_genders
            or (bool(a.hair) and (a.hair, a.tone, a.gender) in self.hair_tone_genders)
        )


def load(
    cache: str | Path | None = None,
    image_size: int = 224,
    role_cap: int = ROLE_CAP,
    progress: bool = True,
    only: Iterable[str] | None = None,
) -> dict[str, tuple[list[Triplet], Gallery]]:
    """Triplets and gallery by split; the drawings are prepared where needed. `only` restricts both to some ids."""
    wanted = None if only is None else frozenset(only)
    folder = prepare(cache, image_size, progress, wanted)
    manifest = read_manifest(folder)
    paths = {name: folder / f"{name}.png" for name in sorted(manifest["files"]) if wanted is None or name in wanted}
    near = {name: [n for n in others if n in paths] for name, others in manifest["near_duplicates"].items()}
    names = emoji_names(paths)
    splits = build_splits(names, near, hold_out(names), role_cap)
    gallery = Gallery.of(paths)
    return {split: (list(triplets), gallery) for split, triplets in splits.items()}


def other_drawings(
    folder: str | Path,
    splits: Mapping[str, tuple[list[Triplet], Gallery]],
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[dict[str, tuple[list[Triplet], Gallery]], dict[str, dict[str, int]]]:
    """The same splits on other drawings (see `styles.py`), of the pairs that these have; then, of each split, how many
    images and queries they lack.

    What nearly coincides there is equally right there, a pair that does is none, and training shows nothing that
    coincides with a held-out drawing.
    """
    _, gallery = splits["train"]
    names = emoji_names(gallery.ids)
    files, near = drawings_of(folder, names, cache, progress)
    hidden = _Sorter.build(names, {}, hold_out(names)).hidden
    result, lacking = {}, {}
    for split, (triplets, _) in splits.items():
        kept, absent = [], set()
        for t in triplets:
            lost = {t.reference, t.targets[0]} - files.keys()
            absent |= lost
            twins = near.get(t.targets[0], ())
            learnt = {t.reference, t.targets[0]} if split in ("train", "val") else set()
            if lost or t.reference in twins or any(not hidden.isdisjoint(near.get(name, ())) for name in learnt):
                continue
            right = dict.fromkeys([*(name for name in t.targets if name in files), *twins])
            others = tuple(name for name in t.near_twins if name in files and name not in right)
            kept.append(replace(t, targets=tuple(right), near_twins=others))
        result[split] = kept, Gallery.of(files)
        lacking[split] = {"missing_images": len(absent), "skipped_queries": len(triplets) - len(kept)}
    return result, lacking


def emoji_names(ids: Iterable[str]) -> dict[str, str]:
    """English names of those ids that are emoji (the `emoji` package); OpenMoji's own extras are left out."""
    known = _known()
    return {name: known[codes][1] for name in ids if (codes := code_points(name)) in known}


def emoji_texts(ids: Iterable[str]) -> dict[str, str]:
    """Those ids that are emoji, as text."""
    known = _known()
    return {name: known[codes][0] for name in ids if (codes := code_points(name)) in known}


def _known() -> dict[tuple[int, ...], tuple[str, str]]:
    """{code points: (text, English name)} of all emoji, in their fully qualified form."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError(f"the names of emoji are not installed (package emoji): {INSTALL}") from error
    known: dict[tuple[int, ...], tuple[str, str]] = {}
    for text, entry in EMOJI_DATA.items():
        key = tuple(code for code in map(ord, text) if code != PRESENTATION)
        qualified = entry["status"] == 2
        if qualified or key not in known:
            known[key] = text, entry["en"].strip(":").replace("_", " ")
    return known


def _is_plain_object(emoji_id: str) -> bool:
    codes = code_points(emoji_id)
    flag = 0x1F1E6 <= codes[0] <= 0x1F1FF or any(code >= 0xE0020 for code in codes)
    return not flag and not any(code in TONES for code in codes)


def _object_pairs(names: Mapping[str, str]) -> list[tuple[str, str, str, str, str]]:
    return substitutions({name: text for name, text in sorted(names.items()) if _is_plain_object(name)})


def hold_out(names: Mapping[str, str]) -> HeldOut:
    """Choose what training never shows, from `names` (id -> English name of every emoji, extras left out)."""
    tones, genders = defaultdict(set), defaultdict(set)
    hair_combinations = set()
    for a in filter(None, map(parse, sorted(names))):
        tones[a.role].add(a.tone)
        genders[a.role].add(a.gender)
        if a.hair:
            hair_combinations.add((a.hair, a.tone, a.gender))
    ranked = sorted((role for role in tones if role != ADULT), key=lambda role: unit_hash("role", role))
    roles = frozenset(ranked[: round(len(ranked) / 10)])
    # A role with a single tone or gender cannot lose it without becoming an unseen role.
    role_tones = {
        (role, tone)
        for role, values in tones.items()
        for tone in values
        if len(values) > 1 and unit_hash("role-tone", role, tone) < 1 / 6
    }
    role_genders = {
        (role, gender)
        for role, values in genders.items()
        for gender in values
        if len(values) > 1 and role != ADULT and unit_hash("role-gender", role, gender) < 1 / 8
    }
    objects = {reference for _, reference, _, _, _ in _object_pairs(names)}
    return HeldOut(
        roles=roles,
        role_tones=frozenset(pair for pair in role_tones if pair[0] not in roles),
        role_genders=frozenset(pair for pair in role_genders if pair[0] not in roles),
        hair_tone_genders=frozenset(c for c in hair_combinations if unit_hash("hair", *c) < 1 / 4),
        objects=frozenset(name for name in objects if unit_hash("object", name) < 1 / 5),
    )


@dataclass(frozen=True)
class _Sorter:
    """Decides which split a pair belongs to."""

    attributes: Mapping[str, Attributes]
    unseen_role: frozenset[str]
    unseen_combination: frozenset[str]
    unseen_object: frozenset[str]
    hidden: frozenset[str]  # all of these, and the drawings that nearly coincide with one of them

    @classmethod
    def build(cls, names: Iterable[str], twins: Mapping[str, frozenset[str]], held_out: HeldOut) -> "_Sorter":
        attributes = {name: a for name in sorted(names) if (a := parse(name))}
        role = frozenset(name for name, a in attributes.items() if a.role in held_out.roles)
        combination = frozenset(n for n, a in attributes.items() if n not in role and held_out.has_combination(a))
        hidden = role | combination | held_out.objects
        hidden |= {name for name, others in twins.items() if others & hidden}
        return cls(attributes, role, combination, held_out.objects, hidden)

    def split(self, reference: str, target: str, change: str) -> str | None:
        if change == "object" and target in self.unseen_object:
            return "test_word"
        if change == "role" and target in self.unseen_role:
            return None if reference in self.hidden else "test_role"
        if change in ("tone", "gender") and target in self.unseen_role:
            return "test_role"  # the reference is of the same role
        if reference in self.hidden:
            return None
        if change != "gender+tone" and target in self.unseen_combination:
            return "test_combo"
        if target in self.hidden:
            return None
        if change == "gender+tone":
            return "test_two"
        # By the unordered pair: the way back must not be trained either.
        return "val" if unit_hash("val", *sorted((reference, target))) < _VAL_SHARE else "train"


def build_splits(
    names: Mapping[str, str],
    near: Mapping[str, Iterable[str]],
    held_out: HeldOut,
    role_cap: int = ROLE_CAP,
) -> dict[str, tuple[Triplet, ...]]:
    """All splits. `near`: id -> ids whose drawing nearly coincides; they become equally right targets."""
    twins = {name: frozenset(others) for name, others in near.items()}
    sorter = _Sorter.build(names, twins, held_out)
    found: dict[str, dict[str, Triplet]] = {split: {} for split in SPLITS["emoji"]}
    write: dict[str, tuple[Callable[[str], str], Callable[[], tuple[str, ...]]]] = {}  # last, for the pairs that stay

    def add(reference: str, target: str, change: str, *captions: Callable) -> None:
        split = sorter.split(reference, target, change)
        others = twins.get(target, frozenset())
        if split is None or reference in others:  # a reference that nearly is the target asks for no change
            return
        query_id = f"{reference}>{target}"
        if query_id not in write:  # "black large square": two words of one name may lead to one target
            write[query_id] = captions
            found[split][query_id] = Triplet(query_id, reference, "", (target, *sorted(others)), change)

    for reference, target, change in _attribute_pairs(sorter.attributes):
        asked = change, sorter.attributes[target]
        add(reference, target, change, partial(change_text, *asked), partial(change_wordings, *asked))
    for _, reference, before, target, after in _object_pairs(names):
        asked = before, after
        add(reference, target, "object", partial(object_text, *asked), partial(object_wordings, *asked))
    near_twins = _NearTwins(sorter.attributes)
    caps = {"train": role_cap, "val": 1, "test_combo": 2, "test_role": 5}
    result = {}
    for split, queries in found.items():
        # In the tests the target is what is new, so role changes are capped by target; elsewhere by reference.
        triplets = cap(queries.values(), "role", caps.get(split), by_target=split.startswith("test"))
        triplets = cap(triplets, "object", _OBJECT_CAP, by_target=False)
        chosen = sample(triplets, _LIMITS.get(split))
        result[split] = tuple(replace(t, caption=write[t.query_id][0](t.query_id)) for t in chosen)
        if not split.startswith("train"):
            result[split] = tuple(
                replace(
                    t,
                    wordings=write[t.query_id][1](),
                    near_twins=near_twins(t),
                    in_place=not {"tone", "gender", "hair"}.isdisjoint(t.change.split("+")),
                )
                for t in result[split]
            )
    return result


class _NearTwins:
    """What differs from a query's reference in exactly one of tone, gender, hair and direction, and keeps what is asked
    to change: of two changes at least one of them. No right answer is among them."""

    _FIELDS = ("tone", "gender", "hair", "direction")

    def __init__(self, attributes: Mapping[str, Attributes]) -> None:
        self.attributes = attributes
        self._alike: dict[Attributes, list[str]] = defaultdict(list)
        for name, a in attributes.items():
            for field in self._FIELDS:
                self._alike[a.without(field)].append(name)

    def __call__(self, query: Triplet) -> tuple[str, ...]:
        own = self.attributes.get(query.reference)
        if own is None:
            return ()
        near = {name for field in self._FIELDS for name in self._alike[own.without(field)]}
        asked = query.change.split("+")
        return tuple(
            name
            for name in sorted(near - {query.reference, *query.targets})
            if any(getattr(self.attributes[name], field) == getattr(own, field) for field in asked)
        )


def _attribute_pairs(attributes: Mapping[str, Attributes]) -> Iterable[tuple[str, str, str]]:
    """Ordered pairs that differ in exactly one attribute, and those that differ in gender and tone."""
    for change in ("tone", "gender", "hair", "role", "direction", "gender+tone"):
        fields = change.split("+")
        groups: dict[Attributes, list[str]] = defaultdict(list)
        for name, a in attributes.items():
            groups[a.without(*fields)].append(name)
        for members in groups.values():
            for reference in members:
                for target in members:
                    a, b = attributes[reference], attributes[target]
                    if all(getattr(a, name) != getattr(b, name) for name in fields):
                        yield reference, target, change
