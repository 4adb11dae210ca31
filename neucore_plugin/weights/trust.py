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
    backbone = section.get("backbone") or {}
    if not isinstance(backbone, Mapping) or not all(isinstance(encoder, Mapping) for encoder in backbone.values()):
        raise CheckpointError(f"{path}: its model.backbone is no mapping of encoders: damaged, or not written by us")
    for side, encoder in backbone.items():
        named = ((own or {}).get("backbone") or {}).get(side) or {}
        module = encoder.get("module")
        if module is not None and module not in sys.modules and named.get("module") != module:
            raise CheckpointError(
                f"{path}: its {side} encoder is a model of the module {module!r}, which a checkpoint may not import. "
                f"If you trust it, import it first, or name it: model.backbone.{side}.module={module} "
                "(with search: --module)"
            )
        for key, repo in _repositories(encoder):
            if repo not in dict(_repositories(named)).values() and not _is_here(repo):
                raise CheckpointError(
                    f"{path}: its {side} encoder is made of the repository {repo} of the hub, which is not in the "
                    f"cache, and a checkpoint may not have it fetched. If you trust it: hf download {repo}, or name it "
                    f"yourself: model.backbone.{side}.{key}={repo}, or the path of a folder"
                )
        for key in ("pretrained", "vit_pretrained"):
            source = str(encoder.get(key) or "")
            strange = source.startswith(("http:", "https:")) and not source.startswith(KNOWN_SOURCES)
            if strange and named.get(key) != source:
                raise CheckpointError(
                    f"{path}: its {side} encoder's weights come from {source}, none of the host's places. If you trust "
                    f"it, name it yourself: model.backbone.{side}.{key}={source}, or a path of the file"
                )


def _repositories(encoder: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, repository of the hub) of everything that an encoder's section would have fetched by name."""
    found = [(key, encoder.get(key)) for key in ("repo", "tokenizer")]
    arch = str(encoder.get("arch") or "")
    found += [("arch", arch.removeprefix("hf-hub:"))] if arch.startswith("hf-hub:") else []
    text = (encoder.get("config") or {}).get("text_cfg")
    if isinstance(text, Mapping):
        found += [(f"config.text_cfg.{key}", text.get(key)) for key in ("hf_model_name", "hf_tokenizer_name")]
    return [(key, str(repo)) for key, repo in found if repo]


def _is_here(repo: str) -> bool:
    """Whether a repository is a folder, or in the hub's cache."""
    if expanded(repo).is_dir():
        return True
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return True  # nothing can be fetched
    names = ("config.json", "open_clip_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt")
    try:
        return any(isinstance(try_to_load_from_cache(repo, name), str) for name in names)
    except ValueError:  # no name of a repository
        return False


def section_of(path: str | Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint of ours holds of its model: {"config": the `model` section, "image_processor", ...}.

    own: the user's section. None for a file that is not there, which the check of the config tells, or that is none of
    our models'. Raises `CheckpointError` for one that is damaged, hostile, or asks for what nobody named.
    """
    from neucore_plugin.weights import checkpoint, folder

    if not expanded(path).is_file() and not folder.is_here(path):
        return None
    architecture = checkpoint.load(path).get("architecture") or {}
    if not isinstance(architecture.get("config"), Mapping):
        return None
    refuse_strangers(path, architecture["config"], own)
    return architecture
