"""Packages that are put off while the host is imported: each is imported when something of it is used.

Of the host, which nothing here calls: `import cv2` (processors/randaugment.py), `import decord` (data_utils.py of
datasets), `import pandas` and `from iopath... import` (common/utils.py), `from fairscale... import checkpoint_wrapper`
(models/vit.py, clip_vit.py, timesformer/vit.py), `from einops import rearrange` (timesformer/vit.py), `from
pycocoevalcap... import` and `from pycocotools... import` (tasks/captioning.py, dialogue.py), `import spacy`
(img2prompt_models/img2prompt_vqa.py). So none of them has to be installed; one that is not is named when it is used.

Of torchvision, timm and transformers, for the time that they take: torch's compiler, scipy's solvers.

Light: the standard library alone.
"""

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# {package: its name for pip}
OF_HOST = {
    "cv2": "opencv-python-headless",
    "decord": "decord",
    "einops": "einops",
    "fairscale": "fairscale",
    "iopath": "iopath",
    "pandas": "pandas",
    "pycocoevalcap": "pycocoevalcap",
    "pycocotools": "pycocotools",
    "spacy": "spacy",
}
SLOW = {"torch._dynamo": "torch", "scipy.optimize": "scipy", "transformers.integrations.flex_attention": "transformers"}
# What is called while the host is imported, for its effect in the package: done when that is imported, by whomever.
# Each is given back its first argument (two are decorators that do just this).
_FOR_EFFECT = ("decord.bridge.set_bridge", "torch._dynamo.allow_in_graph", "torch._dynamo.assume_constant_result")
# torch's own form of this decorator for use within torch: it imports the compiler when the function is called.
_INSTEAD = {"torch._dynamo.disable": "torch._compile._disable_dynamo"}


class _Package(MetaPathFinder, Loader):
    """One package: finds stand-ins in its place while it is put off, and the way to the real one."""

    def __init__(self, name: str, pip_name: str) -> None:
        self.name, self.pip_name = name, pip_name
        self.put_off = True
        self._asking = False  # the other finders
        self.calls: list[tuple[str, tuple, dict]] = []  # of _FOR_EFFECT

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if self.put_off:
            mine = f"{fullname}.".startswith(f"{self.name}.")
            return ModuleSpec(fullname, self, is_package=True) if mine else None
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithEffects(spec.loader, self)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def withdraw(self) -> None:
        """Take the stand-ins away, so that whoever imports the package from now on gets it."""
        self.put_off = False
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Module) and module._package is self:
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if vars(sys.modules.get(parent, self)).get(child) is module:
                    delattr(sys.modules[parent], child)
        if not self.calls and self in sys.meta_path:
            sys.meta_path.remove(self)

    def real(self, path: str) -> Any:
        """What the dotted name is in the real package. Raises ModuleNotFoundError where that is not installed."""
        self.withdraw()
        try:
            importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.name}.".startswith(f"{error.name}."):
                raise
            raise ModuleNotFoundError(
                f"{path} was used, but {self.pip_name} is not installed; run: pip install {self.pip_name}",
                name=error.name,
            ) from error
        return pkgutil.resolve_name(path)


class _LoaderWithEffects(Loader):
    """Loads a module as its own loader does, then makes the calls that were put off."""

    def __init__(self, loader: Loader, package: _Package) -> None:
        self._loader, self._package = loader, package

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._package in sys.meta_path:  # not when found: many only ask whether it is there
            sys.meta_path.remove(self._package)
        for path, args, kwargs in self._package.calls:
            pkgutil.resolve_name(path)(*args, **kwargs)


class _Module(ModuleType):
    """Stands for a module of a package that is put off."""

    def __init__(self, name: str, package: _Package) -> None:
        super().__init__(name)
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        return _Name(path, self._package) if self._package.put_off else self._package.real(path)


class _Name:
    """Stands for a name of such a module; the real one is called when this is."""

    def __init__(self, path: str, package: _Package) -> None:
        self._path, self._package = path, package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(f"{self._path}.{name}", self._package)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._package.put_off and self._path in _FOR_EFFECT:
            self._package.calls.append((self._path, args, kwargs))
            return args[0]
        if self._package.put_off and self._path in _INSTEAD:
            kwargs.pop("reason", None)
            return pkgutil.resolve_name(_INSTEAD[self._path])(*args, **kwargs)
        return self._package.real(self._path)(*args, **kwargs)

    def __mro_entries__(self, bases: tuple) -> tuple[type, ...]:
        return (self._package.real(self._path),)  # a subclass needs the real class now

    def __repr__(self) -> str:
        return f"<{self._path}, imported when it is called>"


@contextlib.contextmanager
def deferred(packages: Mapping[str, str]) -> Iterator[None]:
    """While this is open, importing one of the packages gives a stand-in, which is gone from sys.modules afterwards.

    A package that has been imported already is left alone.

    Args:
        packages: {name: its name for pip}.
    """
    placed = [_Package(name, pip_name) for name, pip_name in packages.items() if name not in sys.modules]
    sys.meta_path[:0] = placed
    try:
        yield
    finally:
        for package in placed:
            package.withdraw()
