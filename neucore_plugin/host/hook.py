"""Whoever imports lavis, before or after us, finds our model, task, builders, processors and runners registered."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from typing import Any

from neucore_plugin.host import importing

_OURS_IN_HOST = ("train", "evaluate")  # lavis/ of this distribution


class _Here(threading.local):
    """Imports under way, of each thread its own: another's must not keep this one from registering."""

    host = False
    watched = 0  # one within the other


_here = _Here()


def _host_is_there() -> bool:
    """Whole, not half imported: `default_cfg` is set near the end of its __init__."""
    host = sys.modules.get("lavis")
    return hasattr(host, "default_cfg") and not getattr(host.__spec__, "_initializing", False)


def _register() -> None:
    from neucore_plugin.host.registration import register_all

    register_all(wait=False)


@contextlib.contextmanager
def host_import() -> Iterator[None]:
    """Around the lines of the host's `__init__`, by our loader or as `host.wheel` writes them; the inner is idle.

    Raises `HostError` with the remedy in the place of what they raise.
    """
    if _here.host:
        yield
        return
    _here.host = True
    try:
        with importing.bent():
            yield
    except Exception as error:
        raise importing.explain_import_failure(error) from error
    finally:
        _here.host = False
    if not _here.watched:  # nobody has imported us before the host
        _register()


class _WatchedLoader(Loader):
    """Loads a module as its own loader does; registers everything when the outermost watched import has brought lavis.

    Waiting for the outermost matters: `import neucore_plugin.task` imports lavis, and registering at that moment would
    import other modules of ours while this one is half made.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        is_host = module.__name__ == "lavis"
        module.__spec__.loader = module.__loader__ = self._loader  # resources and reload go the module's own way
        _here.watched += 1
        try:
            with host_import() if is_host else contextlib.nullcontext():
                self._loader.exec_module(module)
        finally:
            _here.watched -= 1
        if not _here.watched and (is_host or _host_is_there()):
            _register()

    def __getattr__(self, name: str) -> Any:  # get_code, get_source, ...: runpy and inspect ask for them
        return getattr(self._loader, name)


class _HostFinder(MetaPathFinder):
    """Watches for the import of lavis and of our own modules; the other finders find and load them.

    Where the host is not installed, importing it or a part of it raises `HostError` with the remedy.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        top, _, part = fullname.partition(".")
        if top == "lavis" and part:
            if getattr(sys.modules.get("lavis"), "__file__", None) or part in _OURS_IN_HOST:
                return None
            raise importing.missing_host()
        if fullname != "lavis" and not fullname.startswith("neucore_plugin."):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _HostFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            # Without an origin it is a namespace: a folder `lavis` without the host in it (the host is not installed).
            if spec.origin and hasattr(spec.loader, "exec_module"):
                spec.loader = _WatchedLoader(spec.loader)
            return spec
        if fullname == "lavis":
            raise importing.missing_host()
        return None


def install() -> None:
    """Watch from now on; where lavis is there already, register at once."""
    for finder in list(sys.meta_path):  # one left by an earlier load of this module (reload)
        if type(finder).__module__ == __name__ and type(finder).__name__ == "_HostFinder":
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _HostFinder())
    if _host_is_there():
        _register()
