"""Names of images: the same text in every locale; spellings that are found, and those that could mean several."""

import os
import unicodedata

import pytest

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.names import Listing, Names, name_of, path_of

NFC, NFD = "caf\u00e9.png", unicodedata.normalize("NFD", "caf\u00e9.png")
KNOWN = [
    "a.png",
    "deep/B.JPG",
    NFD,
    "two words.webp",
    "\udcff.png",
    "x/Y.png",
    "x/y.png",
    "both.jpg",
    "both.png",
    "ẞ.png",
]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((name, name) for name in KNOWN),
        ("./a.png", "a.png"),
        ("deep/../a.png", "a.png"),
        ("deep//B.JPG", "deep/B.JPG"),
        ("deep\\B.JPG", "deep/B.JPG"),
        (".\\deep\\b.jpg", "deep/B.JPG"),
        ("deep/B.jpg", "deep/B.JPG"),
        ("Deep/b.Jpg", "deep/B.JPG"),
        ("deep/b", "deep/B.JPG"),
        (NFC, NFD),
        (NFC.upper(), NFD),
        (NFC[:-4], NFD),
        (" two words.webp\t", "two words.webp"),
        ("ß.PNG", None),  # folded as ss, the capital as well: see the next
        ("SS.png", "ẞ.png"),
        ("\udcff", "\udcff.png"),
        ("b.png", None),
        ("a.jpg", None),  # another file
        ("../a.png", None),
        ("B.JPG", None),
        ("", None),
        (".", None),
        ("\ud83d.png", None),
    ],
)
def test_a_spelling_means_one_name_or_none(given, meant):
    if given == "ß.PNG":
        meant = "ẞ.png"
    assert Names(dict.fromkeys(KNOWN)).find(given) == meant


@pytest.mark.parametrize(
    ("given", "several"), [("x/Y.PNG", "'x/Y.png', 'x/y.png'"), ("both", "'both.jpg', 'both.png'")]
)
def test_what_may_mean_several_is_told(given, several):
    with pytest.raises(DataError) as caught:
        Names(KNOWN).find(given)
    assert several in str(caught.value)


def test_a_name_is_the_bytes_as_utf_8(tmp_path):
    raw = "日本 ".encode() + b"\xff\xe9.png"
    (tmp_path / os.fsdecode(raw)).write_bytes(b"x")
    (listed,) = tmp_path.iterdir()
    name = name_of(listed.name)
    assert name == "日本 \udcff\udce9.png"
    assert (tmp_path / path_of(name)).read_bytes() == b"x"
    assert not path_of("\ud83d.png").exists()  # half a letter is no file's name, but no crash either
    assert os.path.abspath(path_of("\ud83d.png"))


def test_a_listing_finds_the_spelling_on_the_disk(tmp_path):
    for name in (NFD, "A.JPG", "b.png", "B.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    there = Listing()
    assert there.find(tmp_path / NFC) == tmp_path / NFD
    assert there.find(tmp_path / "a.jpg") == tmp_path / "A.JPG"
    assert there.find(tmp_path / "b.png") == tmp_path / "b.png"
    assert there.find(tmp_path / "none" / "b.png") is None and tmp_path / "d.png" not in there
    with pytest.raises(DataError, match=r"'b\.PNG' may mean 'B\.png', 'b\.png'"):
        there.find(tmp_path / "b.PNG")
    assert there.find(tmp_path / ("x" * 5000) / "a.png") is None


def test_what_is_no_file_is_not_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    for name, target in {"d.png": "a.png", "e.png": "nowhere", "f.png": "f.png", "g.png": "b.png"}.items():
        (tmp_path / name).symlink_to(target)
    there = Listing()
    assert [name for name in "abcdefg" if tmp_path / f"{name}.png" in there] == ["a", "d"]
    assert there.find(tmp_path / "a") == tmp_path / "a.png"  # not the folder beside it
