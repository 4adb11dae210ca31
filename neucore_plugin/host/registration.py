"""Registration in the host's registry: our modules all at once, and decorators that bear a reload.

Nothing here imports lavis before a function needs it.
"""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable
from functools import partial

from neucore_plugin.host.importing import HostError, import_host
from neucore_plugin.host.mending import extend_zoos, mend_host

# These modules register themselves when they are imported.
MEMBERS = (
    "neucore_plugin.processors",
    "neucore_plugin.datasets.builders",
    "neucore_plugin.models.neucore",
    "neucore_plugin.models.baseline",
    "neucore_plugin.task",
    "neucore_plugin.training.runner",
)
_one_at_a_time = threading.Lock()


class _Here(threading.local):
    under_way = False


_here = _Here()


def register_all(wait: bool = True) -> None:
    """Import the host, mend it, import every module of ours that registers something; calling it again is harmless.

    wait: whether a second thread lets the first one finish, since two that import the host at once stand in each
    other's way. False for whoever is in the middle of an import: its lock may be what the first one waits for.
    """
    if _here.under_way:  # a member that is being imported asks for it again, through the hook
        return
    _here.under_way = True
    try:
        with _one_at_a_time if wait else contextlib.nullcontext():
            import_host()
            mend_host()
            for name in MEMBERS:
                importlib.import_module(name)
            extend_zoos()
    finally:
        _here.under_way = False


def _guarded(kind: str, name: str) -> Callable[[type], type]:
    """The host's decorator `register_<kind>`, harmless where the same class is registered already.

    The same class comes twice by `importlib.reload` (the new one takes the place) and by `python -m` of its module
    (the file is loaded as `__main__` too: the one under its proper name stays).
    """

    def wrap(cls: type) -> type:
        from lavis.common.registry import registry

        mapping = registry.mapping[f"{kind}_name_mapping"]
        holder = mapping.get(name)
        if holder is None:
            return getattr(registry, f"register_{kind}")(name)(cls)
        if holder.__qualname__ != cls.__qualname__ or not _same_source(holder, cls):
            raise HostError(
                f"the {kind} name {name!r} is held by {holder.__module__}.{holder.__qualname__} already, so "
                f"{cls.__module__}.{cls.__qualname__} cannot have it; choose another name or do not import both"
            )
        if holder.__module__ == cls.__module__:
            mapping[name] = cls
        return cls

    return wrap


def _same_source(one: type, other: type) -> bool:
    if one.__module__ == other.__module__:
        return True
    files = [getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in (one, other)]
    return None not in files and os.path.realpath(files[0]) == os.path.realpath(files[1])


# Class decorators, called with a name: the host's of the same names, safe against reload and double import.
register_model = partial(_guarded, "model")
register_task = partial(_guarded, "task")
register_runner = partial(_guarded, "runner")
register_builder = partial(_guarded, "builder")
register_processor = partial(_guarded, "processor")
