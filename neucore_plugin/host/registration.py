"""Registration in the host's registry: our modules all at once, and decorators that bear a reload.

Nothing here imports lavis before a function needs it.
"""

import importlib
import os
import sys
from collections.abc import Callable

from neucore_plugin.host.importing import MEMBERS, HostError, import_host
from neucore_plugin.host.mending import _extend_zoos, _mend_host

_busy = [False]


def register_all() -> None:
    """Import the host, mend it, import every module of ours that registers something; calling it again is harmless."""
    if _busy[0]:
        return
    _busy[0] = True
    try:
        import_host()
        _mend_host()
        for name in MEMBERS:
            importlib.import_module(name)
        _extend_zoos()
    finally:
        _busy[0] = False


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


def register_model(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_model`, safe against reload and double import."""
    return _guarded("model", name)


def register_task(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_task`, safe against reload and double import."""
    return _guarded("task", name)


def register_runner(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_runner`, safe against reload and double import."""
    return _guarded("runner", name)


def register_builder(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_builder`, safe against reload and double import."""
    return _guarded("builder", name)


def register_processor(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_processor`, safe against reload and double import."""
    return _guarded("processor", name)


def register_lr_scheduler(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_lr_scheduler`, safe against reload and double import."""
    return _guarded("lr_scheduler", name)


# --- processes, log ----------------------------------------------------------------------------------------------


# --- main flow ----------------------------------------------------------------------------------------------------
