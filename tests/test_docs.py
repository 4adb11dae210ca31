"""README, CONTRIBUTING, CHANGELOG and docs/ name only what is there: links, commands, config keys, files, Python names.

Needs neither mkdocs nor a network. `PLANTED` holds a breach of each kind, and the checks must see every one.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from places import PROJECTS, ROOT

from neucore_plugin import cli
from neucore_plugin.config.shipped import shipped_configs

TYPES = ROOT / "neucore_plugin" / "configs" / "models"
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*FRONT, *sorted(DOCS.rglob("*.md"))]
COMMAND = re.compile(
    r"(\w+=\S+ )*(neucore |(\.venv/bin/)?python (-m (lavis|neucore_plugin)|\w+/)|torchrun |sh run\.sh|make )"
)
TOP = ("tests", "benchmarks", "projects", "neucore_plugin", "docs")  # folders that texts name files in
PATH = re.compile(r"(\.\./)*[\w./*{},-]+(\.(py|yaml|json|md|toml|txt|sh|svg|png)|/)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = {DOCS / place: page() for place, page in load_generator().PAGES.items()}
KEYS = set(re.findall(r"^\| `([\w.]+)`", GENERATED[DOCS / "reference" / "config.md"], re.MULTILINE))


# --- what a page holds ------------------------------------------------------------------------------------------------


def fences(text: str, *languages: str) -> Iterator[str]:
    yield from (found[3] for found in FENCE.finditer(text) if found[2] in languages)


def inline(text: str) -> list[str]:
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """(command, whether it stands in a block: then it must be whole)."""
    for block in fences(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line := re.sub(r"(^|\s)#.*", "", line).strip():
                yield line, True
    yield from ((code, False) for code in inline(text) if COMMAND.match(code))


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


# --- what is wrong with it --------------------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        content = GENERATED.get(path) or (text if path == page else None)
        if content is None and not path.is_file():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(content or path.read_text(encoding="utf-8")):
            yield f"{target}: no such heading"


def wrong_command(command: str, whole: bool) -> str | None:
    words = shlex.split(command)
    while re.fullmatch(r"\w+=\S*", words[0]):  # environment variables
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        rest = rest[rest.index("-m") :]
    if program == "sh":
        known = re.findall(r"^([\w]+)\)$", (ROOT / "run.sh").read_text(), re.MULTILINE)
        return wrong_script(rest[1:], known)
    if program == "make":
        known = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        return wrong_script(rest, known)
    if program == "uv" and rest[:2] == ["run", "--no-project"]:
        return wrong_command(shlex.join(rest[2:]), whole)
    if program == "neucore":
        return wrong_arguments(rest, whole)
    if rest[:1] == ["-m"] and rest[1] == "neucore_plugin":
        return wrong_arguments(rest[2:], whole)
    if rest[:1] == ["-m"] and rest[1] in ("lavis.train", "lavis.evaluate"):
        return wrong_arguments([rest[1].removeprefix("lavis."), *rest[2:]], whole)
    if program.endswith("python") and rest[0].endswith(".py"):
        return None if (ROOT / rest[0]).is_file() else f"{rest[0]} is no file"
    return None if program in ("npm", "pip", "python", "uv") else f"{program} is not known"


def wrong_script(words: list[str], known: list[str]) -> str | None:
    """Of run.sh and make: the command, and the files that it is told to test."""
    if words and words[0] not in known:
        return f"{words[0]} is none of {known}"
    absent = [word for word in words[1:] if "/" in word and not (ROOT / word).exists()]
    return f"{absent} is not there" if absent else None


def wrong_arguments(words: list[str], whole: bool) -> str | None:
    if not whole and all(re.fullmatch(r"[a-z]\w*|[A-Z]+|--help", word) for word in words):
        return unknown_name(words)
    message = io.StringIO()
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
        try:
            parsed = cli.build_parser().parse_args(words)
        except SystemExit as stop:
            return message.getvalue().strip().splitlines()[-1] if stop.code else None
    given = getattr(parsed, "cfg_path", None)
    if given and not Path(given).suffix and given not in shipped_configs():
        return f"--cfg-path {given}: no such config ships with the package"
    if given and given.startswith("projects/") and not (ROOT / given).is_file():
        return f"--cfg-path {given}: no such file"
    unknown = [word for word in getattr(parsed, "options", ()) if not known_key(word.partition("=")[0])]
    if unknown:
        return f"--options: {unknown} is no key"
    types = [word for word in getattr(parsed, "options", ()) if word.startswith("model.model_type=")]
    absent = [word for word in types if not (TYPES / f"{word.partition('=')[2]}.yaml").is_file()]
    return f"{absent}: no such model type" if absent else None


def unknown_name(words: list[str]) -> str | None:
    """A command that is only named, without its arguments: `neucore data check`; capitals stand for any name."""
    parser = cli.build_parser()
    for word in words:
        choices = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), None)
        if choices is None or not word[0].islower():
            return None
        if word not in choices:
            return f"{word} is none of {list(choices)}"
        parser = choices[word]
    return None


def known_key(key: str) -> bool:
    """A key or a section of a schema, or a key within a mapping whose keys are free."""
    free = ("run.lr_scales", *(known for known in KEYS if known.endswith(".config")))
    return key in KEYS or any(known.startswith(f"{key}.") for known in KEYS) or key.startswith(free)


def wrong_names(text: str) -> Iterator[str]:
    """Config keys, yamls, files and what stands in them (`file.py::name`) in inline code."""
    for code in inline(text):
        if reference := re.fullmatch(r"([\w/]+\.py)::([\w.]+)", code):
            files = [path for top in TOP for path in ROOT.glob(f"{top}/**/{reference[1].removeprefix(f'{top}/')}")]
            names = [re.compile(rf"(def|class) {name}\b") for name in reference[2].split(".")]
            if not any(all(name.search(path.read_text(encoding="utf-8")) for name in names) for path in files):
                yield f"`{code}`: no such name"
        key, _, _ = code.partition("=") if "=" in code else code.partition(":")
        if re.fullmatch(r"(run|model|datasets)(\.\w+)+", key) and not known_key(key) and not PATH.fullmatch(code):
            yield f"`{code}`: no such key"
        if re.fullmatch(r"(train|eval)_[a-z0-9_]+(\.yaml)?", code):
            if not (PROJECTS / f"{code.removesuffix('.yaml')}.yaml").is_file():
                yield f"`{code}`: no such yaml"
        elif PATH.fullmatch(code) and code.split("/")[0] in TOP:
            if not any(ROOT.glob(code.rstrip("/"))):
                yield f"`{code}`: no such file"
        elif re.fullmatch(r"[\w/]+/\w+\.py", code) and not (ROOT / "neucore_plugin" / code).is_file():
            yield f"`{code}`: no such file"


def wrong_python(text: str) -> Iterator[str]:
    """Examples that do not compile, or import from this package what it does not have."""
    for source in fences(text, "python"):
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            yield f"line {error.lineno}: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("neucore_plugin"):
                module = importlib.import_module(node.module)
                yield from (f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name))


def wrong_directives(text: str) -> Iterator[str]:
    """`::: name` of mkdocstrings: a module of this package, or a name that stands in one."""
    for name in re.findall(r"^::: (\S+)", text, re.MULTILINE):
        parts, inner = name.split("."), []
        while not (found := _source("/".join(parts))) and parts:
            inner.insert(0, parts.pop())
        names = {getattr(node, "name", None) for node in ast.parse(found.read_text()).body} if found else set()
        if not found or (inner and inner[0] not in names):
            yield f"::: {name}: no such name"


def _source(place: str) -> Path | None:
    return next((path for path in (ROOT / f"{place}.py", ROOT / place / "__init__.py") if path.is_file()), None)


def problems(page: Path, text: str) -> list[str]:
    found = [f"{command}: {why}" for command, whole in commands(text) if (why := wrong_command(command, whole))]
    return [*broken_links(page, text), *found, *wrong_names(text), *wrong_python(text), *wrong_directives(text)]


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_names_only_what_is_there(page):
    assert problems(page, page.read_text(encoding="utf-8")) == []


def test_the_head_of_each_yaml_and_the_help_name_commands_that_parse():
    texts = {path: path.read_text(encoding="utf-8") for path in shipped_configs().values()}
    texts[Path("help")] = cli.EXAMPLES
    for path, text in texts.items():
        joined = re.sub(r"\\\n#?\s*", " ", text)
        for line in re.findall(r"^#?\s+((?:neucore|python -m|torchrun) .*)", joined, re.MULTILINE):
            assert wrong_command(line, whole=True) is None, path


PLANTED = [
    ("[x](nowhere.md)", "no such file"),
    ("[x](#nowhere)", "no such heading"),
    ("![x](docs/nowhere.png)", "no such file"),
    ("[x](docs/reference/config.md#nowhere)", "no such heading"),
    ("```sh\nneucore trian --cfg-path my.yaml\n```", "invalid choice"),
    ("```sh\nneucore train\n```", "required"),
    ("```sh\nneucore train --cfg-path train_nowhere\n```", "ships"),
    ("```sh\npython -m lavis.train --cfg-path projects/neucore/nowhere.yaml\n```", "no such file"),
    ("```sh\ntorchrun --nproc_per_node=8 -m lavis.evaluate --checkpiont x\n```", "required"),
    ("`neucore train --cfg-path my.yaml --options run.sead=1`", "no key"),
    ("`neucore train --cfg-path my.yaml --options model.model_type=clip`", "no such model type"),
    ("`neucore data chekc`", "none of"),
    ("`python -m neucore_plugin serach`", "none of"),
    ("`sh run.sh tset`", "none of"),
    ("`sh run.sh test tests/test_nowhere.py`", "not there"),
    ("`make nothing`", "none of"),
    ("`python benchmarks/nowhere.py`", "no file"),
    ("`model.fusion.stepps`", "no such key"),
    ("`run.nothing: 3`", "no such key"),
    ("`train_nowhere`", "no such yaml"),
    ("`tests/nowhere/test_docs.py`", "no such file"),
    ("`matching.py::Matching.scroe`", "no such name"),
    ("`datasets/nowhere.py`", "no such file"),
    ("```python\nfrom neucore_plugin import load_modle\n```", "has no load_modle"),
    ("```python\nfor hit in\n```", "invalid syntax"),
    ("::: neucore_plugin.retrieval.index.GaleryIndex", "no such name"),
]


@pytest.mark.parametrize(("text", "found"), PLANTED)
def test_a_breach_is_seen(text, found):
    [problem] = problems(ROOT / "README.md", f"# Title\n\n{text}\n")
    assert found in problem


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_navigation_holds_every_page_once():
    pages = [place for part in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for place in _leaves(part)]
    there = {path.relative_to(DOCS).as_posix() for path in [*DOCS.rglob("*.md"), *GENERATED]}
    assert sorted(pages) == sorted(there)


def _leaves(part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _leaves(inner)


def test_generated_pages_hold_keys_commands_and_yamls():
    config, command, yamls = GENERATED.values()
    assert "| `run.seed` | whole number" in config
    assert "### image encoder clip" in config
    rows = [line for line in config.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.split(" | ")[-1].strip(" |") == ""] == []  # a key without a description
    assert "## neucore search" in command
    assert "`--cfg-path` `YAML`" in command
    assert all(f"| `{name}` |" in yamls for name in shipped_configs())
