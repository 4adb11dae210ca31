"""What a checkpoint may ask for on its own: not an import, and no file from a place nobody named. Knows no torch."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.common.files import expanded

# Where the weights of the host's tables and of ours lie.
KNOWN_SOURCES = (
    "https://storage.googleapis.com/sfr-vision-language-research/",
    "https://storage.googleapis.com/sfr-pcl-data-research/",
    "https://openaipublic.azureedge.net/clip/",
    "https://github.com/mlfoundations/open_clip/",
)


def refuse_strangers(path: str | Path, section: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> None:
    """Refuse a checkpoint whose model section would import a module, or fetch a URL, that only the file itself names.

    section: the one in the file. own: the user's; what it repeats is trusted. Raises CheckpointError.
    """
    for side, encoder in (section.get("backbone") or {}).items():
        named = ((own or {}).get("backbone") or {}).get(side) or {}
        module = encoder.get("module")
        if module is not None and module not in sys.modules and named.get("module") != module:
            raise CheckpointError(
                f"{path}: its {side} encoder is a model of the module {module!r}, which a checkpoint may not import. "
                f"If you trust it, import it first, or name it: model.backbone.{side}.module={module} "
                "(with search: --module)"
            )
        for key in ("pretrained", "vit_pretrained"):
            source = str(encoder.get(key) or "")
            strange = source.startswith(("http:", "https:")) and not source.startswith(KNOWN_SOURCES)
            if strange and named.get(key) != source:
                raise CheckpointError(
                    f"{path}: its {side} encoder's weights come from {source}, none of the host's places. If you trust "
                    f"it, name it yourself: model.backbone.{side}.{key}={source}, or a path of the file"
                )


def section_of(path: str | Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint of ours holds of its model: {"config": the `model` section, "image_processor", ...}.

    own: the user's section. None for a file that is not there, which the check of the config tells, or that is none of
    our models'. Raises `CheckpointError` for one that is damaged, hostile, or asks for what nobody named.
    """
    from neucore_plugin.weights import checkpoint

    if not expanded(path).is_file():
        return None
    architecture = checkpoint.load(path).get("architecture") or {}
    if not isinstance(architecture.get("config"), Mapping):
        return None
    refuse_strangers(path, architecture["config"], own)
    return architecture
