"""The icons: names taken apart, splits and their leaks, the package that the user fetches. On a made-up package."""

import json

import pytest

pytest.importorskip("resvg_py", reason="the emoji extra is not installed")

from neucore_plugin.cli import main
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.datasets import icons
from neucore_plugin.datasets.builders import IconsBuilder

BASES = [f"thing-{letter}" for letter in "abcdefghijklmnopqrst"]
SIGNS = ["off", "plus", "x", "heart", "star", "key", "pin", "code"]
FILLED = [name for base in BASES[:8] for name in (base, f"{base}-plus", f"{base}-x")]
OTHERS = ["arrow", "arrow-up", "arrow-down", "lone-plus", "plus", "triangle-off", "triangle"]
OUTLINE = [*BASES, *(f"{base}-{sign}" for base in BASES for sign in SIGNS), *OTHERS]


def svg(number: int, filled: bool) -> str:
    """A drawing of its own: nine cells, filled or not by the digits of a number."""
    cells = [(n % 4, n // 4) for n in range(12) if number >> n & 1]
    parts = "".join(f'<rect x="{2 + 5 * x}" y="{2 + 6 * y}" width="4" height="4" />' for x, y in cells)
    colours = 'fill="currentColor"' if filled else 'fill="none" stroke="currentColor" stroke-width="1"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" {colours}>{parts}</svg>'


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("npm") / "package"
    for style, names in (("outline", OUTLINE), ("filled", FILLED)):
        folder = root / "icons" / style
        folder.mkdir(parents=True)
        for number, name in enumerate(names, start=3):
            (folder / f"{name}.svg").write_text(svg(7 * number, style == "filled"))
    (root / "package.json").write_text(json.dumps({"name": "@tabler/icons", "version": "0.0.1"}))
    return root


@pytest.fixture(scope="module")
def splits(package):
    return icons.build_splits(icons.package_files(package), {})


def test_names_are_taken_apart_where_a_base_has_several_signs(package):
    found = icons.parse(icons.package_files(package))
    assert len(found) == len(BASES) * (1 + len(SIGNS)) + len(FILLED)
    assert found["thing-a-plus"] == icons.Icon("thing-a", "plus", "outline")
    assert found["thing-b.filled"] == icons.Icon("thing-b", "", "filled")
    assert not {"arrow", "arrow-up", "lone-plus", "triangle-off"} & set(found)


def test_queries_differ_in_what_they_say(splits, package):
    found = icons.parse(icons.package_files(package))
    assert {t.change for t in splits["train"]} == {"sign", "style", "base"}
    for triplets in splits.values():
        assert len({t.query_id for t in triplets}) == len(triplets) > 20
        for t in triplets:
            own, target = found[t.reference], found[t.targets[0]]
            assert [f for f in ("base", "sign", "style") if getattr(own, f) != getattr(target, f)] == [t.change]
            for text in (t.caption, *t.wordings):
                assert (target.words in text) == (t.change == "base")
                if t.change == "sign" and target.sign not in ("", "off"):
                    assert icons.SIGNS[target.sign] in text
                elif t.change == "sign" and not target.sign:
                    assert any(word in text for word in ("without", "not", "no", "off"))


def test_nothing_held_out_is_trained(splits, package):
    found = icons.parse(icons.package_files(package))
    trained = {name for t in splits["train"] for name in (t.reference, *t.targets)}
    bases = {found[name].base for name in trained}
    combinations = {(found[name].base, found[name].sign) for name in trained}
    for t in splits["test_base"]:
        assert found[t.targets[0]].base not in bases
        assert t.reference in trained or t.change != "base"
    for t in splits["test_combo"]:
        target = found[t.targets[0]]
        assert target.base in bases and (target.base, target.sign) not in combinations and t.reference not in splits
    pairs = {frozenset((t.reference, t.targets[0])) for t in splits["train"]}
    assert not any(frozenset((t.reference, t.targets[0])) in pairs for t in splits["val"])
    assert 1 <= len({found[t.targets[0]].base for t in splits["test_base"]}) <= 3


def test_further_wordings_occur_nowhere_else(splits):
    captions = {t.caption for triplets in splits.values() for t in triplets}
    for split, triplets in splits.items():
        for t in triplets:
            assert len(set(t.wordings)) == (0 if split == "train" else 3) and not captions & set(t.wordings)


def test_near_twins_are_of_the_references_base_and_lack_the_change(splits, package):
    found = icons.parse(icons.package_files(package))
    for t in (*splits["val"], *splits["test_combo"], *splits["test_base"]):
        own, target = found[t.reference], found[t.targets[0]]
        expected = []
        for name, other in found.items():
            apart = [f for f in ("base", "sign", "style") if getattr(own, f) != getattr(other, f)]
            lacks = getattr(other, t.change) != getattr(target, t.change)
            if len(apart) == 1 and apart != ["base"] and lacks and name not in t.targets:
                expected.append(name)
        assert sorted(t.near_twins) == sorted(expected) and expected


def test_drawings_that_coincide_are_equally_right_or_left_out(package):
    ids = icons.package_files(package)
    plain = icons.build_splits(ids, {})
    query = plain["train"][0]
    twins = {query.targets[0]: ["arrow"], "arrow": [query.targets[0]]}
    again = {t.query_id: t for t in icons.build_splits(ids, twins)["train"]}
    assert again[query.query_id].targets == (query.targets[0], "arrow")
    held = plain["test_base"][0].targets[0]
    hidden = {query.targets[0]: [held], held: [query.targets[0]]}
    assert query.query_id not in {t.query_id for t in icons.build_splits(ids, hidden)["train"]}


def test_the_builder_renders_once_and_gives_every_split(package, tmp_path):
    info = {"root": str(package), "cache_dir": str(tmp_path), "image_size": 32}
    datasets = IconsBuilder({"build_info": info}).build_datasets()
    assert list(datasets) == ["train", "val", "test_combo", "test_base"]
    val = datasets["val"]
    assert len(val.gallery.ids) == len(OUTLINE) + len(FILLED) and "MIT" in val.credit
    assert val.names(["thing-a.filled"]) == {"thing-a.filled": "thing a, filled"}
    assert val.images.pixels("thing-a").shape == (3, 224, 224)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(times) == len(val.gallery.ids)
    IconsBuilder({"build_info": info}).build_datasets()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}


def test_without_the_package_the_command_that_fetches_it_is_told(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"build_info\.root is null.*\n  npm pack @tabler/icons@"):
        IconsBuilder({"build_info": {"root": None}}).build_datasets()
    with pytest.raises(DataError, match="is no unpacked package @tabler/icons. Fetch it where you like: npm pack"):
        icons.prepare(tmp_path)
    folder = tmp_path / "icons" / "outline"
    folder.mkdir(parents=True)
    (folder / "a.svg").write_text(svg(1, False))
    (tmp_path / "package.json").write_text('{"name": "lucide"}')
    with pytest.raises(DataError, match="is the package 'lucide', not @tabler/icons"):
        icons.prepare(tmp_path)
    assert main(["vocab", "icons"]) == 2
    assert "--root is needed: the unpacked package" in capsys.readouterr().err
