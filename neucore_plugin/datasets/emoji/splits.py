"""Composed retrieval on emoji drawings: the data set that pip alone installs.

Queries are made from attributes (`emoji_attributes`), images from OpenMoji (`emoji_drawings`). The gallery is the whole
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
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import sha256_text
from neucore_plugin.datasets.emoji.attributes import (
    ADULT,
    TONES,
    Attributes,
    change_text,
    code_points,
    object_text,
    parse,
    substitutions,
    unit_hash,
)
from neucore_plugin.datasets.emoji.drawings import CREDIT, INSTALL, VERSION, prepare, read_manifest
from neucore_plugin.datasets.triplets import Gallery, Triplet

__all__ = [
    "CREDIT",
    "SPLITS",
    "EmojiData",
    "HeldOut",
    "build_splits",
    "emoji_names",
    "find_leaks",
    "hold_out",
    "load",
    "prepare",
]

SPLITS = ("train", "val", "test_combo", "test_role", "test_word", "test_two")
ROLE_CAP = 12  # role changes a reference starts in training: 118,000 pairs otherwise, nine tenths of the data
_OBJECT_CAP = 6  # substitutions of one word that a reference starts: 62 smileys are one word apart from each other
_LIMITS = {"val": 1000, "test_combo": 1500, "test_role": 1500, "test_word": 1000, "test_two": 1000}
_VAL_SHARE = 0.08
_GENERATOR = "emoji-1"  # part of the fingerprint; changes with any rule here


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


@dataclass(frozen=True)
class EmojiData:
    """The prepared data set: `gallery`, `names` (id -> English name), splits, and a fingerprint of all of it."""

    gallery: Gallery
    names: Mapping[str, str]
    held_out: HeldOut
    fingerprint: str
    credit: str = CREDIT
    _splits: Mapping[str, tuple[Triplet, ...]] = field(default_factory=dict, repr=False)
    _glyphs: Mapping[str, str] = field(default_factory=dict, repr=False)

    def triplets(self, split: str) -> list[Triplet]:
        """The queries of one split; ConfigError names the splits there are."""
        if split not in self._splits:
            raise ConfigError(f"the emoji data has no split {split!r}; its splits are {', '.join(SPLITS)}")
        return list(self._splits[split])

    def glyph(self, emoji_id: str) -> str:
        """The Unicode string of an id, to be shown as text (fully qualified, so that it is drawn in colour)."""
        return self._glyphs.get(emoji_id) or "".join(chr(int(part, 16)) for part in emoji_id.split("-"))


def load(
    cache_dir: str | Path | None = None,
    image_size: int = 224,
    role_cap: int = ROLE_CAP,
    progress: bool = True,
    only: Iterable[str] | None = None,
) -> EmojiData:
    """Prepare the drawings where needed and build all splits. `only` restricts both to some ids."""
    if not isinstance(role_cap, int) or isinstance(role_cap, bool) or role_cap < 1:
        raise ConfigError(f"role_cap is {role_cap!r}; a whole number of role changes per reference, from 1, is wanted")
    wanted = None if only is None else frozenset(only)
    folder = prepare(cache_dir, image_size, progress, wanted)
    manifest = read_manifest(folder)
    ids = tuple(name for name in sorted(manifest["files"]) if wanted is None or name in wanted)
    listed = frozenset(ids)
    near = {name: [n for n in others if n in listed] for name, others in manifest["near_duplicates"].items()}
    names, glyphs = emoji_names(ids)
    queried = {name: names[name] for name in ids if name in glyphs}
    held = hold_out(queried)
    splits = build_splits(queried, near, held, role_cap)
    content = {
        "generator": _GENERATOR,
        "drawings": VERSION,
        "image_size": image_size,
        "renderer": manifest["versions"],
        "gallery": ids,
        "splits": {
            split: [[t.query_id, t.reference, t.caption, list(t.targets), t.change] for t in triplets]
            for split, triplets in splits.items()
        },
    }
    return EmojiData(
        gallery=Gallery(ids=ids, paths=tuple(folder / f"{name}.png" for name in ids)),
        names=names,
        held_out=held,
        fingerprint=sha256_text(json.dumps(content, sort_keys=True, ensure_ascii=False)),
        _splits=splits,
        _glyphs=glyphs,
    )


def emoji_names(ids: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """English names of all ids, and the qualified Unicode string of those that are emoji (the `emoji` package)."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError(f"the names of emoji are not installed (package emoji): {INSTALL}") from error
    known: dict[tuple[int, ...], tuple[str, str]] = {}
    for text, entry in EMOJI_DATA.items():
        key = tuple(code for code in map(ord, text) if code != 0xFE0F)
        qualified = entry["status"] == 2
        if qualified or key not in known:
            known[key] = (entry["en"].strip(":").replace("_", " "), text)
    names, glyphs = {}, {}
    for emoji_id in ids:
        if found := known.get(code_points(emoji_id)):
            names[emoji_id], glyphs[emoji_id] = found
        else:
            names[emoji_id] = f"OpenMoji {emoji_id}"
    return names, glyphs


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
    def build(cls, names: Iterable[str], twins: Mapping[str, frozenset[str]], held: HeldOut) -> "_Sorter":
        attributes = {name: a for name in sorted(names) if (a := parse(name))}
        role = frozenset(name for name, a in attributes.items() if a.role in held.roles)
        combination = frozenset(n for n, a in attributes.items() if n not in role and held.has_combination(a))
        hidden = role | combination | held.objects
        hidden |= {name for name, others in twins.items() if others & hidden}
        return cls(attributes, role, combination, held.objects, hidden)

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
    held: HeldOut,
    role_cap: int = ROLE_CAP,
) -> dict[str, tuple[Triplet, ...]]:
    """All splits. `near`: id -> ids whose drawing nearly coincides; they become equally right targets."""
    twins = {name: frozenset(others) for name, others in near.items()}
    sorter = _Sorter.build(names, twins, held)
    found: dict[str, dict[str, Triplet]] = {split: {} for split in SPLITS}
    write: dict[str, Callable[[str], str]] = {}  # captions are written last, for the few pairs that stay

    def add(reference: str, target: str, change: str, caption: Callable[[str], str]) -> None:
        split = sorter.split(reference, target, change)
        others = twins.get(target, frozenset())
        if split is None or reference in others:  # a reference that nearly is the target asks for no change
            return
        query_id = f"{reference}>{target}"
        if query_id not in write:  # "black large square": two words of one name may lead to one target
            write[query_id] = caption
            found[split][query_id] = Triplet(query_id, reference, "", (target, *sorted(others)), change)

    for reference, target, change in _attribute_pairs(sorter.attributes):
        add(reference, target, change, partial(change_text, change, sorter.attributes[target]))
    for _, reference, before, target, after in _object_pairs(names):
        add(reference, target, "object", partial(object_text, before, after))
    caps = {"train": role_cap, "val": 1, "test_combo": 2, "test_role": 5}
    result = {}
    for split, queries in found.items():
        # In the tests the target is what is new, so role changes are capped by target; elsewhere by reference.
        triplets = _cap(queries.values(), "role", caps.get(split), by_target=split.startswith("test"))
        triplets = _cap(triplets, "object", _OBJECT_CAP, by_target=False)
        chosen = _sample(triplets, _LIMITS.get(split))
        result[split] = tuple(replace(t, caption=write[t.query_id](t.query_id)) for t in chosen)
    return result


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


def _cap(triplets: Iterable[Triplet], change: str, cap: int | None, by_target: bool) -> list[Triplet]:
    """At most `cap` triplets of one kind of change for each reference (or target), those of lowest hash."""
    count: dict[str, int] = defaultdict(int)
    kept = []
    for triplet in sorted(triplets, key=lambda t: (unit_hash("cap", t.query_id), t.query_id)):
        if triplet.change == change and cap is not None:
            key = triplet.targets[0] if by_target else triplet.reference
            count[key] += 1
            if count[key] > cap:
                continue
        kept.append(triplet)
    return kept


def _sample(triplets: Iterable[Triplet], limit: int | None) -> list[Triplet]:
    """The `limit` triplets of lowest hash, in that order: any first part of a split is a fair sample of it."""
    return sorted(triplets, key=lambda t: (unit_hash("sample", t.query_id), t.query_id))[:limit]


def find_leaks(data: EmojiData) -> list[str]:
    """Every way in which train or val shows what is held out, one sentence each; empty when all is well."""
    leaks = []
    for split in ("train", "val"):
        for triplet in data.triplets(split):
            for name in (triplet.reference, *triplet.targets):
                a = parse(name)
                if name in data.held_out.objects or (a and a.role in data.held_out.roles):
                    leaks.append(f"{split} query {triplet.query_id} shows the held-out {data.names[name]}")
                elif a and data.held_out.has_combination(a):
                    leaks.append(f"{split} query {triplet.query_id} shows the held-out combination {data.names[name]}")
    return leaks
