"""Files of the Hugging Face hub: taken from its cache, fetched once by the first that wants them. Knows no host."""

import re
from pathlib import Path
from types import ModuleType

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.common.files import expanded

# Beside the weights themselves, safetensors first; an index names the parts of a file that was split.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
PIXELS = ("preprocessor_config.json", "processor_config.json")


def is_local(repo: str) -> bool:
    """Whether `repo` is a folder here, which is never looked for on the hub."""
    return expanded(repo).is_dir()


def hub_file(repo: str, name: str, setting: str, revision: str | None = None, optional: bool = False) -> Path | None:
    """The file `name` of a repository OWNER/NAME, or of a folder; None for an `optional` one that it does not have.

    The hub is asked only for what its cache ($HF_HOME) does not know yet. setting: the key of the config that named
    `repo`, for messages. Raises ConfigError for what is no repository, CheckpointError for a file that cannot be had.
    """
    if is_local(repo):
        path = expanded(repo) / name
        if path.is_file() or optional:
            return path if path.is_file() else None
        raise CheckpointError(f"{setting}: the folder {expanded(repo)} lacks {name}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ConfigError(f"{setting}: {repo!r} is no folder here, and no repository OWNER/NAME of the hub")
    hub = _hub(setting, repo)
    found = hub.try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(found, str):
        return Path(found)
    if found is None:
        try:
            return Path(hub.hf_hub_download(repo, name, revision=revision))
        except hub.errors.EntryNotFoundError as error:
            if isinstance(error, hub.errors.LocalEntryNotFoundError) and not (optional and _whole(hub, repo, revision)):
                raise _unfetched(hub, repo, name, setting, error) from error
        except Exception as error:  # whatever a network does
            if not (optional and _whole(hub, repo, revision)):
                raise _unfetched(hub, repo, name, setting, error) from error
    if optional:
        return None
    raise CheckpointError(f"{setting}: the repository {repo} of the hub has no {name}")


def hub_folder(
    repo: str, setting: str, revision: str | None = None, weights: bool = False, further: tuple[str, ...] = ()
) -> Path:
    """The folder that holds a model's config.json, and of `further` what there is.

    weights: also the first kind of WEIGHTS that there is, with all its parts. Raises as `hub_file`.
    """
    folder = hub_file(repo, "config.json", setting, revision).parent
    if not is_local(repo):
        revision = folder.name  # the commit: all files are of one
    for name in further:
        hub_file(repo, name, setting, revision, optional=True)
    if weights:
        _fetch_weights(repo, setting, revision)
    return folder


def _fetch_weights(repo: str, setting: str, revision: str | None) -> None:
    import json

    for name in WEIGHTS:
        if path := hub_file(repo, name, setting, revision, optional=True):
            if name.endswith(".index.json"):
                for part in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
                    hub_file(repo, part, setting, revision)
            return
    raise CheckpointError(f"{setting}: {repo} holds no weights; wanted: one of {', '.join(WEIGHTS)}")


def _whole(hub: ModuleType, repo: str, revision: str | None) -> bool:
    """Whether the cache was filled by `hf download`: with a file that every repository has, and nothing here wants."""
    return isinstance(hub.try_to_load_from_cache(repo, ".gitattributes", revision=revision), str)


def _hub(setting: str, repo: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ConfigError(
            f"{setting}: {_not_here(repo)}, which needs huggingface_hub ({error}); correct the path, or run: pip "
            "install huggingface_hub"
        ) from error
    return huggingface_hub


def _not_here(repo: str) -> str:
    return f"there is no {repo} in {Path.cwd()}, so it was taken for a repository of the hub"


def _unfetched(hub: ModuleType, repo: str, name: str, setting: str, error: Exception) -> CheckpointError:
    root: BaseException = error
    while root.__cause__ is not None:  # what the network said, under what the client made of it
        root = root.__cause__
    reason = " ".join(str(root).split())[:160] or type(root).__name__
    cache = Path(hub.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    return CheckpointError(
        f"{setting}: cannot fetch {name} of the repository {repo} ({reason}). If a path was meant: {_not_here(repo)}; "
        f"correct it. If the repository: it is looked for in {cache}; fill that on another machine with `hf download "
        f"{repo}` and copy it here"
    )
