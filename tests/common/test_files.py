"""Where caches lie, and texts: UTF-8 whatever the locale, JSON without surprises."""

import ast
from pathlib import Path

import pytest
from places import ROOT

from neucore_plugin.common import files
from neucore_plugin.common.errors import DataError


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUCORE_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    assert not (tmp_path / "own").exists()
    assert files.cache_dir(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("NEUCORE_CACHE")
    assert files.cache_dir() == Path.home() / ".cache" / "neucore"
    monkeypatch.chdir(tmp_path)
    assert files.cache_dir("relative") == tmp_path / "relative"


# ---- JSON ------------------------------------------------------------------------------------------------------------

BAD_JSON = {
    "empty": (b"", "no valid JSON"),
    "cut": (b'[{"a": 1', "no valid JSON"),
    "no text": (b"\xff\xfe[\x00]\x00", "no text in UTF-8"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 300 + b"1" + b"}" * 300, "nested too deeply"),
    "deeper than what is printed later": (b"[1," * 90 + b"1" + b"]" * 90, "nested too deeply"),
    "NaN": (b'[{"a": 1}, {"b": {"c": [1, NaN]}}]', "entry 1, b, c, entry 1: NaN is no number"),
    "minus infinity": (b'{"a": -Infinity}', "a: -Infinity is no number"),
    "1e999": (b'[{"weight": 1e999}]', "entry 0, weight: the number 1e999 is too large"),
    "a number of 5,000 digits": (b"[0, " + b"9" * 5000 + b"]", "entry 1: the number 99999999999999999999... is too"),
    "2 to the 63": (b"[-1, 9223372036854775808]", "entry 1: the number 9223372036854775808... is too large"),
    "a key twice": (b'[{"a": 1}, {"a": {"b": 1, "b": 2}}]', "entry 1, a: the key 'b' stands twice"),
    "twice at the top": (b'{"x": 1, "x": NaN}', "the key 'x' stands twice"),
    "two values": (b"[] []", "no valid JSON"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_refused_is_told_with_file_and_entry(case, tmp_path):
    content, message = BAD_JSON[case]
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_no_json_file_at_all(tmp_path):
    with pytest.raises(DataError, match="Is a directory; give the path of a file, or fetch it again"):
        files.read_json(tmp_path)
    with pytest.raises(DataError, match="a part of this path is a file where a folder is wanted.*, or copy it again$"):
        files.read_json(Path(__file__) / "x.json", remedy="copy it again")
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="no name of a file"):
        files.read_json("a\0.json")
    (tmp_path / "text.json").write_text('"text"', encoding="utf-8")
    for kind, what in ((list, "list"), (dict, "object")):
        with pytest.raises(DataError, match=f"expected a JSON {what}, given str; ask"):
            files.read_json(tmp_path / "text.json", kind, "ask")


def test_json_is_read_as_it_stands(tmp_path):
    value = {
        "Größe": [1, -2.5, True, None, "\udcff half", "\ud83d", "日本"],
        "9223372036854775807": 9223372036854775807,
    }
    for indent, mark in ((None, b""), (2, b"\xef\xbb\xbf")):  # with a byte order mark as well
        files.write_json(tmp_path / "a.json", value, indent)
        (tmp_path / "a.json").write_bytes(mark + (tmp_path / "a.json").read_bytes())
        assert files.read_json(tmp_path / "a.json", dict) == value
    assert "日本".encode() in (tmp_path / "a.json").read_bytes()  # still readable by people


# ---- no text by the locale -------------------------------------------------------------------------------------------

SOURCES = [
    ROOT / "setup.py",
    *(p for part in ("neucore_plugin", "lavis", "benchmarks", "docs") for p in ROOT.glob(f"{part}/**/*.py")),
]
OPENERS = {
    "open": 1,
    "fdopen": 1,
    "read_text": 0,
    "write_text": 1,
    "NamedTemporaryFile": 0,
    "TemporaryFile": 0,
    "FileHandler": 9,
}
FOREIGN = {"Image", "tarfile", "os", "self", "webbrowser"}  # whose `open` takes no encoding
PROCESSES = {"run", "Popen", "check_output", "check_call", "call"}


def by_locale(source: str) -> list[int]:
    """Lines that open a text, or read a process, in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [*node.args[:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        text = name in PROCESSES and owner == "subprocess" and given & {"text", "universal_newlines"}
        ours = owner in FOREIGN or owner == "cls" or owner[:1].isupper()  # a class's own way to open something
        text = text or (name in OPENERS and not binary and not (name == "open" and ours))
        positional = name in ("read_text", "write_text") and len(node.args) > OPENERS[name]
        if text and not positional and not given & {"encoding", None}:
            found.append(node.lineno)
    return found


def test_every_text_of_ours_is_opened_as_utf_8():
    assert len(SOURCES) > 100
    assert {
        str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := by_locale(path.read_text("utf-8")))
    } == {}


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("open(path)", True),
        ("open(path, 'a')", True),
        ("path.open('w')", True),
        ("Path(x).read_text()", True),
        ("path.write_text(text, errors='replace')", True),
        ("os.fdopen(handle, 'w')", True),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(command, text=True)", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='rb')", False),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text, encoding='utf-8')", False),
        ("Image.open(path)", False),
        ("GalleryIndex.open(path)", False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_walk_sees_what_the_locale_decides(code, seen):
    assert bool(by_locale(code)) == seen
