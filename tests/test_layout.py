"""Who may import whom: the two new components know no host, so that they can be lifted into any project."""

import ast
from pathlib import Path

import neucore_plugin

PACKAGE = Path(neucore_plugin.__file__).parent
HOST_LINE = {  # only these may import lavis
    "commands/submit.py",
    "host.py",
    "processors.py",
    "runner.py",
    "runner_parts.py",
    "runner_state.py",
    "task.py",
    "datasets/builders.py",
    "models/backbones/blip.py",
    "models/backbones/blip2.py",
    "models/backbones/clip.py",
    "models/backbones/host_model.py",
    "models/backbones/registered.py",
    "models/cir_model.py",
}


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> dict[str, set[str]]:
    return {path.relative_to(PACKAGE).as_posix(): imports(path) for path in sorted(PACKAGE.rglob("*.py"))}


def reaches(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


def test_only_the_host_line_imports_lavis():
    assert {name for name, imported in files().items() if reaches(imported, "lavis")} == HOST_LINE


def test_models_datasets_and_retrieval_do_not_know_each_other():
    for name, imported in files().items():
        part = name.split("/")[0]
        for other in {"models", "datasets", "retrieval"} - {part}:
            if part in ("models", "datasets", "retrieval"):
                assert not reaches(imported, f"neucore_plugin.{other}"), f"{name} imports {other}"
