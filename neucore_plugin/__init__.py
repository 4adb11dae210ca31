"""NEUCORE, composed image retrieval by neural concept reasoning, as a plug-in of LAVIS.

Importing this package is light: neither torch nor lavis is loaded by it. Its model, task, builders, processors and
runners enter the host's registry when lavis is imported, before or after this package; `register()` does it at once.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "register"]


def register() -> None:
    """Put everything of this package into the host's registry; calling it again changes nothing.

    Raises `HostError` (a `NeucoreError` and an `ImportError`) where the host cannot be imported, with the remedy.
    """
    from neucore_plugin import host

    host.register_all()


def load_model(
    checkpoint: "str | Path | None" = None,
    model_type: str | None = None,
    device: "str | torch.device" = "cpu",
    is_eval: bool = True,
) -> Any:
    """The model of a checkpoint that training wrote, in eval mode, NEUCORE or a baseline; without one, NEUCORE's
    `model_type` with an untrained head.

    The host's `load_model("neucore", checkpoint=...)` gives the same, but builds an untrained one first.
    Raises `CheckpointError` where the file is missing, damaged or of another architecture, `ConfigError` where the type
    is unknown.
    """
    register()
    from neucore_plugin.errors import ConfigError
    from neucore_plugin.models.cir_model import CirModel
    from neucore_plugin.models.neucore import NeucoreModel

    if checkpoint is not None and model_type is not None:
        raise ConfigError(f"a checkpoint knows its model type; leave out model_type={model_type!r}")
    model = NeucoreModel.from_pretrained(model_type) if checkpoint is None else CirModel.from_checkpoint(checkpoint)
    return model.train(not is_eval).to(device)


# These modules register themselves in the host's registry when they are imported.
MEMBERS = (
    "neucore_plugin.processors",
    "neucore_plugin.datasets.builders",
    "neucore_plugin.models.neucore",
    "neucore_plugin.models.baselines",
    "neucore_plugin.task",
    "neucore_plugin.runner",
)
_nesting = [0]


class _WatchedLoader(Loader):
    """Loads a module as its own loader does; when the outermost watched import is over, everything is registered.

    Waiting for the outermost matters: `import neucore_plugin.task` imports lavis, and registering at that moment would
    import the other members while this one is half made.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        from neucore_plugin import host

        is_host = module.__name__ == "lavis"
        if is_host:
            host.before_import()
        module.__spec__.loader = module.__loader__ = self._loader  # resources and reload go the module's own way
        _nesting[0] += 1
        try:
            self._loader.exec_module(module)
        except Exception as error:
            if is_host:
                raise host.explain_import_failure(error) from error
            raise
        finally:
            _nesting[0] -= 1
        if _nesting[0] == 0:
            register()

    def __getattr__(self, name: str) -> Any:  # get_code, get_source, ...: runpy and inspect ask for them
        return getattr(self._loader, name)


class _HostFinder(MetaPathFinder):
    """Watches for the import of lavis and of our registering modules; the other finders find and load them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "lavis" and fullname not in MEMBERS:
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
        return None


def _install_hook() -> None:
    for finder in list(sys.meta_path):  # one left by an earlier load of this module (reload)
        if type(finder).__module__ == __name__ and type(finder).__name__ == "_HostFinder":
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _HostFinder())
    host = sys.modules.get("lavis")
    # `default_cfg` is set near the end of the host's __init__; without it the host is missing or still being loaded.
    if hasattr(host, "default_cfg") and not getattr(host.__spec__, "_initializing", False):
        register()


_install_hook()
