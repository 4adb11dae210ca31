"""Real processes in other locales: the same names, texts, files and results, and output that never fails."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from colour_model import draw
from places import ROOT
from published_case import put

C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "ascii": C,
    "ascii output": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
    "latin output": {**C, "PYTHONIOENCODING": "latin-1"},
}
OTHERS = ["ascii", *(pytest.param(locale, marks=pytest.mark.slow) for locale in ("ascii output", "latin output"))]
COLOURS = {
    "café.png": "red",
    unicodedata.normalize("NFD", "über.png"): "blue",
    "日本/空.PNG": "green",
    "\udcff\udce9.png": "grey",
    "a\nb.png": "pink",
    "😀.png": "red",
    "z.png": "blue",
}
NAMES = list(COLOURS)


def run(locale: str, *command: str, **options) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))
    }
    environment |= {"NEUCORE_CACHE": "cache", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"
    return subprocess.run([sys.executable, *command], env=environment | LOCALES[locale], capture_output=True, **options)


def write(base: Path) -> Path:
    for name, colour in COLOURS.items():
        draw(base / "data/images" / name, colour)
    entries = [
        {"reference": "CAFÉ.png", "caption": "größer, naïve: größer", "target": "über.png"},
        {"reference": ".\\日本\\空.png", "caption": "\ud83d café", "target": ["\udcff\udce9.png", "a\nb"]},
    ]
    put(base / "data/val.json", entries)
    content = json.dumps(["café.png", "über.png", "\udcff\udce9.png", "a\nb.png", "z.png"], ensure_ascii=False)
    (base / "data/gallery.val.json").write_bytes(b"\xef\xbb\xbf" + content.encode("utf-8", "backslashreplace"))
    (base / "mine.yaml").write_bytes("\ufeffmodel: {caption: größer}\n".encode())
    return base


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[str], tuple[dict, bytes, Path]]:
    """Of a locale what the process found, its output, its folder."""

    @cache
    def of(locale: str) -> tuple[dict, bytes, Path]:
        base = write(tmp_path_factory.mktemp("données"))
        spellings = ["Café.PNG", str(base / "data/images/café.png")]
        done = run(locale, str(ROOT / "tests/helpers/locale_case.py"), str(base), *spellings, cwd=base)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return json.loads((base / "found.json").read_text("ascii")), done.stdout, base

    return of


def test_names_are_found_as_they_are(found):
    first, _, _ = found("utf-8")
    assert sorted(first["images"]) == sorted(first["index"]) == sorted(first["shards"]) == sorted(NAMES)
    assert first["triplets"][0] == ["café.png", "größer, naïve: größer", [NAMES[1]]]
    assert first["triplets"][1][::2] == ["日本/空.PNG", ["\udcff\udce9.png", "a\nb.png"]]
    assert first["from shards"] and first["shown"] == [] and "größer," in first["words"] and first["code"] == 0
    assert first["text"] == "Café.PNG" and first["path of a config"]
    assert first["yaml"] == {"model": {"caption": "größer"}}


@pytest.mark.parametrize("locale", OTHERS)
def test_names_results_and_files_are_those_of_any_locale(found, locale):
    values, _, base = found(locale)
    first, _, first_base = found("utf-8")
    assert values == first
    assert "größer" in (base / "words.json").read_text("utf-8")
    page = (base / "page.html").read_text("utf-8")
    assert "日本/空.PNG" in page and r"\udcff\udce9.png" in page
    for file in ("words.json", "page.html", "shards/index.json", "shards/triplets-val.json"):
        assert (base / file).read_bytes() == (first_base / file).read_bytes(), file
    (concepts,) = (base / "cache/features").glob("concepts-*.json")
    assert json.loads(concepts.read_text("utf-8"))


@pytest.mark.parametrize("locale", OTHERS)
def test_json_on_stdout_is_json_in_any_encoding(found, locale):
    first = json.loads(found("utf-8")[1].decode())
    assert "größer" in str(first["most_frequent"]) or "café" in str(first["most_frequent"])
    assert json.loads(found(locale)[1].decode("latin-1" if locale == "latin output" else "ascii")) == first


@pytest.mark.parametrize("locale", ["ascii", "latin output"])
def test_errors_and_tables_are_printed_in_any_encoding(locale, tmp_path):
    done = run(locale, "-m", "neucore_plugin", "report", str(tmp_path / "größe\udcff"))
    told = done.stderr.decode("ascii" if locale == "ascii" else "latin-1")
    assert done.returncode == 2 and told.startswith("error: ") and "neither evaluation.json nor" in told
    done = run(locale, "-m", "neucore_plugin", "data", "check", "cirr", "--root", str(tmp_path))
    assert done.returncode == 1 and b"no annotations" in done.stdout and b"Traceback" not in done.stderr


def test_a_config_that_names_a_file_which_the_locale_cannot_is_one_error():
    code = "from neucore_plugin import cli; import os; raise SystemExit(cli.guarded(lambda: os.stat(chr(246))))"
    done = run("ascii", "-c", code)
    assert done.returncode == 2 and done.stderr.startswith(b"error: '\\xf6' cannot be a file's name in ascii")
    assert done.stderr.rstrip().endswith(b"set LC_ALL=C.UTF-8 or PYTHONUTF8=1")


@pytest.mark.parametrize("arguments", ["configs", "report ."])
def test_a_reader_that_has_gone_is_no_error(arguments, tmp_path):
    put(tmp_path / "results.json", {"val": {"neucore": {"R@1": 1.0, "median_rank": 1.0, "queries": 1}}})
    command = f"{sys.executable} -m neucore_plugin {arguments} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stderr == b"" and done.returncode in (0, 141)
    for closed in (">&-", "2>&-"):  # nothing to write to at all
        command = f"{sys.executable} -m neucore_plugin {arguments} {closed}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr + done.stdout
