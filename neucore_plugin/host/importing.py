"""Importing salesforce-lavis 1.0.2, with one message where that fails. Light: neither torch nor lavis."""

import importlib
import warnings
from importlib import metadata

from neucore_plugin.common.errors import NeucoreError


class HostError(NeucoreError, ImportError):
    """The host cannot be imported, or something else holds one of our names in it."""


def before_import() -> None:
    """Silence the deprecation warnings that the host's old dependencies raise while they are imported."""
    for module in (r"fairscale\.", r"timm\.", r"torch\.jit", r"torch\.cuda\.amp", r"transformers\.", r"webdataset\."):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")


def explain_import_failure(error: BaseException) -> HostError:
    """One message with the remedy for what usually keeps `import lavis` from working."""
    if isinstance(error, HostError):
        return error
    bounds = {"numpy": ((0,), (2,)), "transformers": ((4, 25), (4, 27)), "pyarrow": ((0,), (26,))}
    for package, (low, high) in bounds.items():
        version = _installed_version(package)
        if version is not None and not low <= version < high:
            wanted = f"{package}>={'.'.join(map(str, low))}," if low > (0,) else package
            wanted += f"<{'.'.join(map(str, high))}"
            return HostError(
                f"`import lavis` failed with {package} {metadata.version(package)}, which salesforce-lavis 1.0.2 "
                f"cannot work with; run: pip install '{wanted}'  ({type(error).__name__}: {error})"
            )
    if isinstance(error, ModuleNotFoundError):
        remedy = "salesforce-lavis==1.0.2" if error.name == "lavis" else "-e . (or `pip install neucore-plugin`)"
        return HostError(f"`import lavis` failed: no module named {error.name}; run: pip install {remedy}")
    return HostError(
        f"`import lavis` failed ({type(error).__name__}: {error}); the tested set of packages is in constraints.txt: "
        "`sh run.sh setup` makes an environment of it"
    )


def _installed_version(package: str) -> tuple[int, ...] | None:
    try:
        parts = metadata.version(package).split(".")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def import_host() -> None:
    """Import lavis with the parts that `import lavis` leaves out (runners, schedulers).

    Raises `HostError` with the remedy where that fails.
    """
    before_import()
    try:
        lavis = importlib.import_module("lavis")
        if not getattr(lavis, "__file__", None):  # a mere folder of that name, such as the one with our two modules
            raise ModuleNotFoundError("No module named 'lavis'", name="lavis")
        importlib.import_module("lavis.common.optims")
        importlib.import_module("lavis.runners")
    except Exception as error:
        raise explain_import_failure(error) from error
