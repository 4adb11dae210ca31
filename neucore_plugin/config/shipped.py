"""Where the yamls lie that ship with the package; those of `projects/neucore` are found by their bare names."""

from pathlib import Path

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.files import expanded

PACKAGE = Path(__file__).resolve().parent.parent
CONFIGS = PACKAGE / "configs"  # default files of the model types and the data sets


def shipped_configs() -> dict[str, Path]:
    """{bare name: file}: a wheel holds them inside the package, a checkout or an editable install beside it."""
    inside, beside = CONFIGS / "projects", PACKAGE.parent / "projects" / "neucore"
    folder = inside if inside.is_dir() else beside
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(given: str | Path) -> Path:
    """The file that `--cfg-path` means: the path itself, or the shipped yaml of that bare name, with or without suffix.

    Raises ConfigError, with the nearest name, where there is neither.
    """
    path = expanded(given)
    if path.is_file():
        return path
    shipped = shipped_configs() if path.parent == Path() else {}
    if path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    names = {*shipped, *(one.stem for one in path.parent.glob("*.yaml"))}
    hint = nearest(path.stem, names).partition(" Allowed:")[0].replace("'?", f"{path.suffix}'?")
    what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
    raise ConfigError(
        f"config file {path} {what}.{hint} Give the path of a yaml file, or a name that `neucore configs` lists."
    )
