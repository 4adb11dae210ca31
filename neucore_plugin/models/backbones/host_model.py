"""A model of the host's registry, built by name, and which of its parameters matter to what is asked of it."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError, NeucoreError, nearest
from neucore_plugin.config.loading import escaped


class HostModel(nn.Module):
    """A model of the host's registry, built by its class; weights are loaded as its class does.

    Args:
        setting: section of the config, for messages. arch: the registered name.
        model_type: a type of its class; None means the only one. config: a model section for its `from_config`.
        module: a module to import first, which registers the model.
    """

    def __init__(
        self,
        setting: str,
        arch: str,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        module: str | None = None,
    ) -> None:
        super().__init__()
        self.idle: set[str] | None = None  # names of parameters that no encoder on this model has a use for
        if module is not None:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"{setting}.module: {error}; it must be installed, or on PYTHONPATH") from error
        known = registry.mapping["model_name_mapping"]
        if arch not in known:
            raise ConfigError(
                f"{setting}.arch: the host has no model {arch!r}.{nearest(arch, known)} A model of your own is there "
                f"once its module has been imported: name it in {setting}.module"
            )
        kind = known[arch]
        types = getattr(kind, "PRETRAINED_MODEL_CONFIG_DICT", None) or {}
        if config is not None and model_type is not None:
            raise ConfigError(f"{setting}: give model_type, or config in its place, not both")
        if config is None and model_type is None and len(types) == 1:
            model_type = next(iter(types))
        if model_type is not None and model_type not in types:
            raise ConfigError(f"{setting}.model_type: {arch} has no type {model_type!r}.{nearest(model_type, types)}")
        if config is None and model_type is None and types:
            raise ConfigError(f"{setting}.model_type: {arch} has several types: {', '.join(types)}")
        try:
            if model_type is not None:
                self.model = kind.from_pretrained(model_type)
            elif config is None and not hasattr(kind, "from_config"):
                self.model = kind()
            else:
                self.model = kind.from_config(OmegaConf.create(escaped(dict(config or {}))))
        except NeucoreError:
            raise
        except Exception as error:  # downloads, files and code of any model
            raise ConfigError(f"{setting}: {arch} cannot be built ({reason(error)})") from error

    @property
    def device(self) -> torch.device:
        """That of its first parameter."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def train_what_matters(self, output: Callable[[], Tensor], setting: str, hint: str) -> None:
        """Take out of training what `output()` does not depend on: an idle parameter is an error in DDP.

        What the model's class has frozen itself stays so. Raises ConfigError where no gradient reaches anything.
        """
        free = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name in (self.idle or ())
        }
        for parameter in free.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            value = output()
        if not value.requires_grad:
            raise ConfigError(f"{setting}.freeze is false, but no gradient reaches the model's parameters; {hint}")
        found = torch.autograd.grad(value.sum(), list(free.values()), allow_unused=True)
        unused = {name for name, gradient in zip(free, found, strict=True) if gradient is None}
        self.idle = unused if self.idle is None else self.idle & unused  # of a shared model, either side may need it
        for name, parameter in free.items():
            parameter.requires_grad_(name not in self.idle)


def reason(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
