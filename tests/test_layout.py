"""What must never be: who may import whom, read from the source, lazy and relative imports included.

The list stands in CONTRIBUTING.md. `PLANTED` holds a breach of each rule, and the test must see every one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import neucore_plugin

PACKAGE = Path(neucore_plugin.__file__).parent
ROOT_MODULES = {"__init__", "__main__", "clauses", "cli", "concepts", "launch", "processors", "task"}
# From the ground up: a module imports from its own floor and from below. `__init__` is the face, which builds models.
FLOORS = (
    ("common",),
    ("config", "weights", "host"),
    ("clauses", "concepts", "processors"),
    ("models", "datasets", "training", "retrieval", "report"),
    ("evaluation", "export", "released", "serve"),
    ("__init__", "task"),
    ("launch",),
    ("study",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
NEVER = {  # neighbours on one floor, or further, that must not know each other
    "config": ("weights", "host"),
    "weights": ("config", "host"),
    "host": ("config", "weights"),
    "training": ("models", "datasets", "retrieval", "report", "evaluation", "task"),
    "models": ("datasets", "training", "evaluation", "retrieval", "report"),
    "datasets": ("models", "training", "evaluation", "retrieval", "report"),
    "retrieval": ("models", "datasets", "evaluation", "config", "report"),
    "report": ("models", "datasets", "evaluation", "config", "retrieval"),
    "serve": ("models", "datasets", "training", "evaluation", "released", "config", "weights", "host"),
    "evaluation": ("models", "training", "task", "released"),
    "study": ("models", "datasets", "retrieval", "host", "weights", "task", "concepts", "processors"),
}
HOST_LINE = (  # these alone may import lavis
    "host.",
    "launch",
    "task",
    "processors",
    "training.runner",
    "datasets.builders",
    "models.base",
    "models.neucore",
    "models.baseline",
    *(
        f"models.backbones.{name}"
        for name in ("albef", "blip", "blip2", "clip", "embedded", "host_model", "registered")
    ),
)
LIFTABLE = (
    "models.concept_alignment",
    "models.concept_loss",
    "models.clause_fusion",
    "models.progressive_fusion",
    "models.matching",
    "models.matching_loss",
    "models.layers",
)


def modules() -> dict[str, str]:
    """{name below the package: source}; `models` is the `__init__` of a folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts if len(parts) == 1 else [part for part in parts if part != "__init__"])] = path.read_text()
    return found


def named(source: str, module: str, folder: bool) -> Iterator[str]:
    """Full names of everything that the source imports, at its top or in a function, also by `import_module("...")`."""
    here = ["neucore_plugin", *module.split(".")] if module != "__init__" else ["neucore_plugin"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + (folder or module == "__init__")] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def graph(sources: dict[str, str]) -> tuple[dict[str, set[str]], set[str]]:
    """{module: modules of ours that it imports}, and the modules that import lavis."""
    edges: dict[str, set[str]] = {}
    lavis = set()
    for module, source in sources.items():
        folder = any(other.startswith(f"{module}.") for other in sources)
        edges[module] = set()
        for name in named(source, module, folder):
            if name.split(".")[0] == "lavis":
                lavis.add(module)
            if name.split(".")[0] == "neucore_plugin":
                inner = name.split(".")[1:]
                while inner and ".".join(inner) not in sources:  # a name of a module, not a module
                    inner.pop()
                edges[module].add(".".join(inner) or "__init__")
        edges[module].discard(module)
    return edges, lavis


def below(edges: dict[str, set[str]], start: str) -> set[str]:
    """All that a module imports, and what that imports, and so on."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in edges[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def breaches(sources: dict[str, str]) -> list[str]:
    """Everything in these sources that must never be."""
    edges, lavis = graph(sources)
    found = [f"{module} is in the package root" for module in sources if "." not in module and module not in FLOOR]
    found += [f"{module}: no file is called utils" for module in sources if "utils" in module.split(".")]
    for module, imported in edges.items():
        part = module.split(".")[0]
        for other in sorted(imported):
            if (target := other.split(".")[0]) == part:
                continue
            if FLOOR.get(target, 0) > FLOOR.get(part, 99):
                found.append(f"{module} imports {other}, which runs up")
            if target in NEVER.get(part, ()):
                found.append(f"{module} imports {other}: {part} never imports {target}")
            if target == "released" and part != "commands":
                found.append(f"{module} imports {other}: only commands imports released")
    found += [f"{module} imports lavis" for module in sorted(lavis) if not f"{module}.".startswith(line_ends())]
    found += [f"{module} is in an import circle" for module in edges if module in below(edges, module)]
    for module in LIFTABLE:
        strange = {other for other in below(edges, module) if not other.startswith(("common", *LIFTABLE))}
        found += [f"{module} can not be lifted: it needs {other}" for other in sorted(strange - {"models"})]
    return found


def line_ends() -> tuple[str, ...]:
    return tuple(entry if entry.endswith(".") else f"{entry}." for entry in HOST_LINE)


def test_nothing_is_that_must_never_be():
    assert breaches(modules()) == []


def test_the_root_holds_eight_modules_and_one_folder_a_question():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders == {part for floor in FLOORS for part in floor} - ROOT_MODULES


PLANTED = [
    ("common.files", "from neucore_plugin.config import run", "runs up"),
    ("common.files", "def f():\n    import neucore_plugin.models.layers", "runs up"),
    ("config.run", "from ..weights import checkpoint", "config never imports weights"),
    ("config.run", "from neucore_plugin.models import layers", "runs up"),
    ("weights.trust", "import neucore_plugin.host.hook", "weights never imports host"),
    ("host.hook", "def f():\n    from ..config.loading import Config", "host never imports config"),
    ("host.hook", "def f():\n    __import__('neucore_plugin.task')", "runs up"),
    ("training.schedule", "from neucore_plugin.models.layers import check_shape", "training never imports models"),
    ("training.schedule", "from neucore_plugin.datasets import triplets", "training never imports datasets"),
    ("training.schedule", "from neucore_plugin.evaluation import metrics", "training never imports evaluation"),
    ("training.schedule", "def f():\n    from .. import task", "training never imports task"),
    ("models.layers", "from ..datasets.triplets import Triplet", "models never imports datasets"),
    ("datasets.triplets", "def f():\n    from ..models.layers import x", "datasets never imports models"),
    ("models.layers", "from neucore_plugin.training import loaders", "models never imports training"),
    ("models.layers", "from neucore_plugin.evaluation import metrics", "models never imports evaluation"),
    *(
        (f"{part}.{module}", f"def f():\n    from neucore_plugin.{other} import x", f"{part} never imports {other}")
        for part, module, neighbour in (("retrieval", "store", "report"), ("report", "charts", "retrieval"))
        for other in ("models", "datasets", "evaluation", "config", neighbour)
    ),
    ("evaluation.metrics", "from neucore_plugin.models import base", "evaluation never imports models"),
    ("evaluation.metrics", "from neucore_plugin.training import loaders", "evaluation never imports training"),
    ("evaluation.metrics", "from neucore_plugin import task", "evaluation never imports task"),
    ("study.plan", "from neucore_plugin.models import base", "study never imports models"),
    ("study.worker", "def f():\n    from neucore_plugin.datasets import triplets", "study never imports datasets"),
    ("launch", "def f():\n    from neucore_plugin.study import plan", "runs up"),
    *(
        ("serve.app", f"def f():\n    from neucore_plugin.{other} import x", f"serve never imports {other}")
        for other in ("models", "datasets", "evaluation", "config", "weights")
    ),
    ("task", "def f():\n    from neucore_plugin.released import convert", "only commands imports released"),
    ("concepts", "def f():\n    from lavis.common.registry import registry", "concepts imports lavis"),
    ("evaluation.evaluator", "import lavis", "evaluation.evaluator imports lavis"),
    ("models.composers", "import lavis", "models.composers imports lavis"),
    ("models.matching", "from neucore_plugin.host import hook", "models.matching can not be lifted"),
    ("models.layers", "def f():\n    from .matching import Matching", "import circle"),
    ("datasets.utils", "", "called utils"),
    ("helpers", "", "in the package root"),
]


@pytest.mark.parametrize(("module", "code", "expected"), PLANTED)
def test_a_planted_breach_is_seen(module, code, expected):
    sources = modules()
    sources[module] = f"{sources.get(module, '')}\n{code}\n"
    assert any(expected in breach for breach in breaches(sources))
