"""Importing salesforce-lavis 1.0.2, with one message where that fails. Light: neither torch nor lavis."""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata

from neucore_plugin.common.errors import NeucoreError


class HostError(NeucoreError, ImportError):
    """The host cannot be imported, or something else holds one of our names in it."""


def beside_todays_packages() -> bool:
    """Whether pip can or did install other packages than the released host asks for, so that it must be set up.

    What counts is transformers, the first of these packages to rule out the others; before it is installed, Python.
    """
    version = _installed_version("transformers")
    return sys.version_info >= (3, 12) if version is None else version >= (4, 27)


def before_import() -> None:
    """Silence the deprecation warnings that the host's old dependencies raise while they are imported."""
    for module in (r"fairscale\.", r"timm\.", r"torch\.jit", r"torch\.cuda\.amp", r"transformers\.", r"webdataset\."):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")


@contextlib.contextmanager
def bent() -> Iterator[None]:
    """Around the host's import, all that it takes: warnings off, packages put off, names lent, methods given back."""
    before_import()
    from neucore_plugin.host import bert_methods, deferred, moved_names

    with deferred.deferred(deferred.SLOW):
        # These look for installed packages while they are imported: before stand-ins take the names of some.
        for name in ("torchvision", "transformers.modeling_utils", "timm", "webdataset"):
            importlib.import_module(name)
        with deferred.deferred(deferred.OF_HOST), moved_names.lent_names():
            yield
    bert_methods.add_bert_methods()


def explain_import_failure(error: BaseException) -> HostError:
    """One message with the remedy for what usually keeps `import lavis` from working."""
    if isinstance(error, HostError):
        return error
    bounds = {"transformers": ((4, 25), (6,))}
    if not beside_todays_packages():
        bounds |= {"numpy": ((0,), (2,)), "pyarrow": ((0,), (26,))}
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
        if error.name == "lavis":
            return missing_host()
        remedy = "pip install -e . (or `pip install neucore-plugin`)"
        return HostError(f"`import lavis` failed: no module named {error.name}; run: {remedy}")
    return HostError(
        f"`import lavis` failed ({type(error).__name__}: {error}); the tested sets of packages are in "
        "constraints*.txt: `sh run.sh setup` makes an environment of one"
    )


def missing_host() -> HostError:
    """The message where salesforce-lavis is not installed: how to install it beside the packages that are here."""
    remedy = "neucore setup-host" if beside_todays_packages() else "pip install salesforce-lavis==1.0.2"
    return HostError(f"`import lavis` failed: no module named lavis; run: {remedy}")


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
    try:
        lavis = importlib.import_module("lavis")
        if not getattr(lavis, "__file__", None):  # a mere folder of that name, such as the one with our two modules
            raise missing_host()
        importlib.import_module("lavis.common.optims")
        importlib.import_module("lavis.runners")
    except Exception as error:
        raise explain_import_failure(error) from error
