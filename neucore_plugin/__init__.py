"""NEUCORE, composed image retrieval by neural concept reasoning, as a plug-in of LAVIS.

Importing this package is light: neither torch nor lavis is loaded by it. Its model, task, builders, processors and
runners enter the host's registry when lavis is imported, before or after this package; `register()` does it at once.
"""

from typing import TYPE_CHECKING, Any

from neucore_plugin.host.hook import install

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "register"]


def register() -> None:
    """Put everything of this package into the host's registry; calling it again changes nothing.

    Raises `HostError` (a `NeucoreError` and an `ImportError`) where the host cannot be imported, with the remedy.
    """
    from neucore_plugin.host.registration import register_all

    register_all()


def load_model(
    checkpoint: "str | Path | None" = None,
    model_type: str | None = None,
    device: "str | torch.device" = "cpu",
    is_eval: bool = True,
) -> Any:
    """The model of a checkpoint that training wrote, in eval mode, NEUCORE or a baseline; without one, NEUCORE's
    `model_type` with an untrained head, or a baseline that needs no training (`zeroshot_...`).

    The host's `load_model("neucore", checkpoint=...)` gives the same, but builds an untrained one first.
    Raises `CheckpointError` where the file is missing, damaged or of another architecture, `ConfigError` where the type
    is unknown.
    """
    register()
    from neucore_plugin.common.errors import ConfigError
    from neucore_plugin.models.base import CirModel
    from neucore_plugin.models.baseline import CirBaseline
    from neucore_plugin.models.neucore import NeucoreModel

    if checkpoint is not None and model_type is not None:
        raise ConfigError(f"a checkpoint knows its model type; leave out model_type={model_type!r}")
    kind = CirBaseline if (model_type or "").startswith("zeroshot_") else NeucoreModel
    model = kind.from_pretrained(model_type) if checkpoint is None else CirModel.from_checkpoint(checkpoint)
    return model.train(not is_eval).to(device)


install()
