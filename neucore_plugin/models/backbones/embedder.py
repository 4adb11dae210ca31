"""Universal multimodal embedders (the extra `embedder`): models of sentence-transformers that give one vector of a
picture, of a text, or of both together, such as Qwen3-VL-Embedding. They are used as they are. Knows no host.

B batch, E width of the vectors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.common.files import expanded
from neucore_plugin.models.backbones.encoder import Encoder, TextEncoder, check_pixels, normalisation

_SETTING = "model.backbone.{}.repo"
# What is fetched of a repository: weights as safetensors alone, and no code.
_FETCHED = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
_OWN = "sentence_transformers."  # where the classes of a model's modules may come from


class Embedding(nn.Module):
    """The model of a repository, and how it is asked.

    Args:
        repo: OWNER/NAME on the hub, or a folder as sentence-transformers saves it. revision: commit, branch or tag.
        dtype: of weights and computation. setting: the key of the config that names `repo`, for messages.

    Raises ConfigError where the library is missing or the model does not read picture and text together,
    CheckpointError for files that cannot be had or would run code.
    """

    def __init__(self, repo: str, revision: str | None, dtype: str, setting: str) -> None:
        super().__init__()
        try:
            import sentence_transformers
            from sentence_transformers.base.modality import infer_modality  # noqa: F401 - not in older versions
        except ImportError as error:
            raise ConfigError(
                f"{setting}: the encoder embedder needs sentence-transformers 5.4 or later, which reads pictures and "
                f"texts together ({error}); run: pip install 'neucore-plugin[embedder]' (Python 3.12 or later)"
            ) from error
        folder = _folder(repo, revision, setting)
        modules = _modules(folder, setting)
        try:
            self.model = sentence_transformers.SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype, "use_safetensors": True},
            )
        except Exception as error:  # files and configs of any model
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{setting}: {folder} cannot be loaded ({reason})") from error
        if not self.model.supports(("image", "text")):
            raise ConfigError(
                f"{setting}: {repo} reads {', '.join(map(str, self.model.modalities))}, but no picture together with a "
                "text; take a universal multimodal embedder, such as Qwen/Qwen3-VL-Embedding-2B"
            )
        self.model.eval().requires_grad_(False)
        self.width = self.model.get_embedding_dimension()
        self.kind = f"{json.dumps(modules, sort_keys=True)}:{dtype}"
        self.name = f"embedder:{repo}:{revision}:{dtype}"

    def embed(self, inputs: Sequence[Any], prompt: str | None, query: bool) -> Tensor:
        """Pictures, texts, or {"image", "text"}, all of one kind -> [B,E]; prompt None: the model's own, if any."""
        if not inputs:
            return torch.zeros(0, self.width, device=self.model.device)
        encode = self.model.encode_query if query else self.model.encode_document
        given = {} if prompt is None else {"prompt": prompt}
        found = encode(
            list(inputs),
            batch_size=len(inputs),
            show_progress_bar=False,
            convert_to_tensor=True,
            device=self.model.device,
            **given,
        )
        return found.float().clone()  # of an inference, which no gradient could pass otherwise


class EmbedderImage(Encoder):
    """The gallery's side: the vector of a picture, which is its only token; and the fused vector of a query.

    Args: as of Embedding; image_size: side of the squares that pictures come as; the model resizes them further as it
        does. prompt: what the model is told of a query; None means what it says itself.
    """

    mean, std = normalisation("embedder")
    grid, num_tokens = None, 1

    def __init__(self, repo: str, revision: str | None, dtype: str, image_size: int, prompt: str | None) -> None:
        super().__init__()
        self.embedding = Embedding(repo, revision, dtype, _SETTING.format("image"))
        self.width = self.pooled_width = self.embedding.width
        self.image_size, self.prompt = image_size, prompt
        self.in_checkpoint = expanded(repo).is_dir()
        self.settings, self.joint_space = f"embedder_image:{self.embedding.kind}", self.embedding.name

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W] in [0, 1] -> tokens [B,1,E], pooled [B,E], as of documents. Raises ValueError."""
        pooled = self.embedding.embed(self._pictures(pixels), None, query=False)
        return {"tokens": pooled[:, None], "pooled": pooled}

    def fuse(self, pixels: Tensor | None, texts: Sequence[str] | None) -> Tensor:
        """Queries of a reference [B,3,H,W], a relative caption, or both -> [B,E]; a blank caption counts as none."""
        pictures = None if pixels is None else self._pictures(pixels)
        if pictures is None:
            return self.embedding.embed(texts, self.prompt, query=True)
        texts = [""] * len(pictures) if texts is None else texts
        found = torch.zeros(len(pictures), self.width, device=pixels.device)
        for told in (True, False):
            rows = [row for row, text in enumerate(texts) if bool(text.strip()) is told]
            inputs = [{"image": pictures[row], "text": texts[row]} if told else pictures[row] for row in rows]
            found[rows] = self.embedding.embed(inputs, self.prompt, query=True).to(found.device)
        return found

    def _pictures(self, pixels: Tensor) -> list[Image.Image]:
        """The pictures that the pixels came from: the model's own processor takes them."""
        check_pixels(pixels, "embedder", self.image_size)
        values = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(value) for value in values]


class EmbedderText(TextEncoder):
    """The same model on texts alone: the sentence, which is the only word.

    Args: as of Embedding; prompt: as of EmbedderImage. shared: the image side's, where both name the same model.
    """

    shares, same_for_both = "embedding", ("repo", "revision", "dtype")

    def __init__(
        self, repo: str, revision: str | None, dtype: str, prompt: str | None, shared: Embedding | None = None
    ) -> None:
        super().__init__()
        self.embedding = shared or Embedding(repo, revision, dtype, _SETTING.format("text"))
        self.width = self.word_width = self.embedding.width
        self.prompt, self.in_checkpoint = prompt, expanded(repo).is_dir()
        self.settings, self.joint_space = f"embedder_text:{self.embedding.kind}:{prompt}", self.embedding.name

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,1,E], mask [B,1], sentence [B,E]; a blank text has no word and a zero sentence."""
        sentence = self.embedding.embed(texts, self.prompt, query=True)
        mask = torch.tensor([bool(text.strip()) for text in texts], dtype=torch.bool, device=sentence.device)[:, None]
        sentence = sentence * mask
        return {"words": sentence[:, None], "mask": mask, "sentence": sentence}


def _folder(repo: str, revision: str | None, setting: str) -> Path:
    """Where the files of a repository lie: a folder here, or the hub's cache, filled where it lacks them."""
    if expanded(repo).is_dir():
        return expanded(repo)
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FETCHED)))
    except Exception as error:  # whatever a network does, and what is no name of a repository
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        cache = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
        raise CheckpointError(
            f"{setting}: {repo} is no folder here, and the repository of that name cannot be fetched ({reason}). Its "
            f"files are looked for in {cache}: copy that folder from another machine, or give the path of a folder"
        ) from error


def _modules(folder: Path, setting: str) -> list[dict[str, Any]]:
    """modules.json of a folder, which names the classes that are built: the library's own alone."""
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [module["type"] for module in modules]
        for name in ("router_config.json", "config.json"):  # a router names classes of its own
            files = (folder / module["path"] / name for module in modules)
            found = (json.loads(file.read_text(encoding="utf-8")).get("types") for file in files if file.is_file())
            kinds += [kind for types in found if isinstance(types, dict) for kind in types.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{setting}: {path} cannot be read ({error}); a model as sentence-transformers saves it has that file"
        ) from error
    if strange := [kind for kind in kinds if not str(kind).startswith(_OWN)]:
        raise CheckpointError(f"{setting}: {path} wants code of its author, {strange[0]}, which is never run")
    return modules
