"""Models of transformers (the extra `huggingface`): of two towers (CLIP, SigLIP, SigLIP 2, ALIGN, BLIP, Chinese-CLIP
and so on), vision models alone (DINOv2, DINOv3, ViT), text models alone, those of sentence-transformers too.

Weights are safetensors, or read as weights only; code of a repository is never run. Knows no host.

B batch, N image tokens, S word pieces with those that the tokenizer adds, D width.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, ConfigError, first_few
from neucore_plugin.models.backbones.huggingface_files import (
    config_of,
    json_of,
    picture_settings,
    plain_class,
    pooling_of,
    weights_only,
    without_versions,
)
from neucore_plugin.models.backbones.towers import ImageTower, TextTower, Tower, required, short, with_given
from neucore_plugin.weights.hub import TOKENIZER, hub_file, hub_folder, is_local
from neucore_plugin.weights.pretrained import read_pretrained

LEAST = (4, 49)  # of transformers: SigLIP 2, and weights-only reading everywhere


class _HuggingFace(Tower):
    """What both sides share: the model, without its other tower.

    Args:
        repo: OWNER/NAME on the hub, or a folder as save_pretrained writes it. revision: commit, branch or tag.
        config: a model's config in place of the repository's, with "model_type".
        pretrained: None means the repository's weights, "none" random ones. dtype: of weights and computation.
        load: whether to read weights; a checkpoint of ours may bring them.

    Raises ConfigError for settings that cannot be, CheckpointError for what cannot be fetched or is of another network.
    """

    library = "huggingface"
    own: tuple[str, ...]  # beginnings of the names of this side's parts
    other: tuple[str, ...]
    features: str  # the library's method that gives this side's vector, in a model of two towers
    input_name: str  # what a model of this side alone reads

    def __init__(
        self,
        repo: str | None,
        revision: str | None,
        config: Mapping[str, Any] | None,
        pretrained: str | None,
        dtype: str,
        load: bool,
    ) -> None:
        super().__init__()
        required("huggingface", "transformers", LEAST, self.setting, "huggingface")
        load = load and pretrained is None
        self.repo, self.revision, self.dtype = repo, revision, getattr(torch, dtype)
        self.in_checkpoint = pretrained is not None or is_local(repo)
        folder = None if config is not None else hub_folder(repo, f"{self.setting}.repo", revision, load)
        raw = dict(config) if folder is None else json_of(folder / "config.json")
        self.config = config_of(raw, self.setting)
        if pretrained is not None:
            read_pretrained(pretrained, f"{self.setting}.pretrained", f"{raw.get('model_type')}'s {self.side} side")
        self.network = self._model(folder if load else None)
        angles = {name: value for name, value in self.network.named_buffers() if name.endswith("inv_freq")}
        self.network.to(self.dtype)
        for name, value in angles.items():  # of rotary positions: no weights, and the library keeps them as they are
            part, _, name = name.rpartition(".")
            setattr(self.network.get_submodule(part), name, value)
        kind = json.dumps(without_versions(raw), sort_keys=True, default=str)
        self.settings = f"huggingface_{self.side}:{kind}:{dtype}"
        self.joint_space = f"huggingface:{kind}:{repo}:{revision}" if self.two_towers else None

    def _model(self, folder: Path | None) -> nn.Module:
        """The model with this side alone, with the weights of a folder or random ones."""
        kind = plain_class(self.config, self.setting)
        further = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
        try:
            if folder is None:
                model = kind(self.config, **further)
            else:
                model, found = kind.from_pretrained(
                    folder,
                    config=self.config,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **weights_only(kind),
                    **further,
                )
        except Exception as error:  # files that are damaged or of another network, sizes that do not fit
            where = folder or f"a {self.config.model_type} of this config"
            raise CheckpointError(f"{self.setting}: {where} cannot be used ({short(error)})") from error
        self.two_towers = hasattr(model, self.features)
        if not self.two_towers and getattr(model, "main_input_name", self.input_name) != self.input_name:
            raise ConfigError(f"{self.setting}: a model of type {self.config.model_type} has no {self.side} side")
        if getattr(self.config, "is_encoder_decoder", False) and not self.two_towers:
            model = model.get_encoder()
        if self.two_towers:
            parts = [*model.named_children(), *model.named_parameters(recurse=False)]
            for name, _ in parts:
                if name.startswith(("logit", *self.other)):
                    setattr(model, name, None)
        if folder is not None:
            expected = {*model.state_dict()}
            missing = [name for name in found["missing_keys"] if name in expected and not name.endswith("position_ids")]
            missing += [str(one) for one in found["mismatched_keys"]]
            if missing:
                lacking = first_few(sorted(missing))
                raise CheckpointError(f"{folder} holds weights of another network; it lacks {lacking}")
        return model.eval()

    def _part(self) -> nn.Module | None:
        """This side's tower within a model of two."""
        return next((part for name, part in self.network.named_children() if name.startswith(self.own)), None)

    def _ask(self, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """(hidden states of the tower, the model's own vector of the whole, None where it has none)."""
        if not self.two_towers:
            found = self.network(**inputs)
            return found.last_hidden_state, getattr(found, "pooler_output", None)
        seen: list[Any] = []
        hook = self._part().register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
        try:
            found = getattr(self.network, self.features)(**inputs)
        finally:
            hook.remove()
        hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0].last_hidden_state
        found = found if isinstance(found, Tensor) else found.pooler_output  # a tensor before transformers 5
        return hidden, found[:, 0] if found.ndim == 3 else found  # FLAVA's: of all tokens, it compares the first

    def _takes(self) -> set[str]:
        """Names of what the model's forward pass of this side takes."""
        return {*inspect.signature(getattr(self.network, self.features if self.two_towers else "forward")).parameters}


class HuggingFaceImage(_HuggingFace, ImageTower):
    """The image tower of a model of two, or a vision model alone.

    Tokens are the tower's last hidden states: class and register tokens, where it has them, then the patches, or the
    cells of a convolution's last map. Pooled is the vector of `get_image_features`; of a vision model alone its pooled
    output, where that has no weights of its own, else the class token, else the mean.

    Args: as of _HuggingFace; image_size, mean, std, fit, interpolation, resize: None means what the repository's
        processor says. frozen: nothing is trained.
    """

    own, other = ("vis", "image"), ("text",)
    features, input_name = "get_image_features", "pixel_values"

    def __init__(
        self,
        image_size: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        fit: str | None,
        interpolation: str | None,
        resize: int | None,
        frozen: bool = True,
        load: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(load=load, **settings)
        given = {"image_size": image_size, "mean": mean, "std": std, "fit": fit} | {
            "interpolation": interpolation,
            "resize": resize,
        }
        pixels = with_given(picture_settings(self.config, self.repo, self.revision, self.setting), given)
        sizes = getattr(self.config, "vision_config", self.config)
        self.patch = getattr(sizes, "patch_size", None)
        self.patch = self.patch if isinstance(self.patch, int) else None
        self.flat = "spatial_shapes" in self._takes()  # SigLIP 2 of any shape reads rows of patches
        if self.flat and (pixels["image_size"] or 0) % self.patch:
            given = pixels["image_size"]
            raise ConfigError(f"{self.setting}.image_size is {given}; allowed: a multiple of {self.patch}")
        other = getattr(sizes, "image_size", None) not in (None, pixels["image_size"])
        self.interpolated = other and "interpolate_pos_encoding" in self._takes()
        self.settings += f":{pixels['image_size']}"
        self._cells: tuple[int, int] | None = None
        self.settle(pixels, frozen)
        side = self.image_size // self.patch if self.patch else 0
        has_side = side > 1 and side * side <= self.num_tokens
        self.grid = self._cells or ((side, side) if has_side else self.grid)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] -> tokens [B,N,D], pooled [B,Dp]."""
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.dtype)}
        if self.flat:
            side = self.image_size // self.patch
            rows = pixels.unflatten(3, (side, self.patch)).unflatten(2, (side, self.patch))  # [B,3,side,p,side,p]
            rows = rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B,side^2,p*p*3]
            mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
            shapes = torch.full((len(rows), 2), side, device=rows.device)
            inputs = {"pixel_values": rows.to(self.dtype), "pixel_attention_mask": mask, "spatial_shapes": shapes}
        if self.interpolated:
            inputs["interpolate_pos_encoding"] = True
        tokens, pooled = self._ask(**inputs)
        if tokens.ndim == 4:  # a map
            self._cells = tuple(tokens.shape[2:])
            tokens = tokens.flatten(2).transpose(1, 2)
        if pooled is None:
            alone = round(tokens.shape[1] ** 0.5) ** 2 == tokens.shape[1]  # patches without a class token
            pooled = tokens.mean(1) if alone else tokens[:, 0]
        return tokens.float(), pooled.flatten(1).float()


class HuggingFaceText(_HuggingFace, TextTower):
    """The text tower of a model of two, or a text model alone.

    Words of a tower are its last hidden states, taken into the joint space as its sentence is, which is the vector of
    `get_text_features`. Words of a text model alone are its last hidden states; its sentence is pooled from them.

    Args: as of _HuggingFace; tokenizer: its repository or folder (None: repo's). pooling: cls, mean or last (the last
        piece), None means what sentence-transformers' files say, else mean. max_words: word pieces kept of a text; a
        longer one is cut, its end token kept. frozen: nothing is trained.
    """

    own, other = ("text",), ("vis", "image")
    features, input_name = "get_text_features", "input_ids"

    def __init__(
        self,
        tokenizer: str | None,
        pooling: str | None,
        max_words: int | None,
        frozen: bool = True,
        load: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(load=load, **settings)
        self.tokenizer = self._tokenizer(tokenizer)
        text = getattr(self.config, "text_config", self.config)
        context = min(getattr(text, "max_position_embeddings", None) or 1 << 20, self.tokenizer.model_max_length)
        if text.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            context = min(context, text.max_position_embeddings - 2)  # they count from behind the padding's number
        # SigLIP was trained on texts in lower case that fill its context, padding read like any other piece; only some
        # of its tokenizers see to the former
        self.full = self.two_towers and self.config.model_type.startswith("siglip")
        if not self.full:
            self.tokenizer.padding_side = "right"
        added = self.tokenizer.num_special_tokens_to_add()
        most = context - added
        self.max_words = min(most, 510) if max_words is None else max_words
        if not 1 <= self.max_words <= most:
            raise ConfigError(f"{self.setting}.max_words is {max_words}; this model keeps 1 to {most} word pieces")
        self.length, self.context = self.max_words + added, context
        self.pooling = None
        if not self.two_towers:
            self.pooling = pooling or pooling_of(self.repo, self.revision, self.setting)
        elif pooling is not None:
            kind = self.config.model_type
            raise ConfigError(f"{self.setting}.pooling is {pooling!r}; a {kind} has a vector of its own")
        self.settings += f":{self.max_words}:{self.pooling}"
        self.settle(frozen)

    def _tokenizer(self, source: str | None) -> Any:
        from transformers import AutoTokenizer

        key = "repo" if source is None else "tokenizer"
        repo, revision = (self.repo, self.revision) if source is None else (source, None)
        if repo is None:
            raise ConfigError(f"{self.setting}.tokenizer: your own config brings none; name a repository or folder")
        found = [hub_file(repo, name, f"{self.setting}.{key}", revision, optional=True) for name in TOKENIZER]
        found = [path for path in found if path]
        if not found:
            raise CheckpointError(f"{self.setting}.{key}: {repo} holds no tokenizer; wanted: {', '.join(TOKENIZER)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(found[0].parent, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # files of any kind
            raise CheckpointError(f"{self.setting}.{key}: {repo} gives no tokenizer ({short(error)})") from error
        tokenizer.truncation_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @property
    def table(self) -> Tensor:
        """The input embeddings [V,Dw]."""
        model = self._part() if self.two_towers else self.network
        words = getattr(self.config, "text_config", self.config).vocab_size
        parts = (part for part in model.modules() if isinstance(part, nn.Embedding))
        return next(part.weight for part in parts if part.num_embeddings == words)

    def pieces_of(self, word: str) -> list[int]:
        """Word pieces without those that the tokenizer adds."""
        return self.tokenizer(self._cased(word), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _cased(self, text: str) -> str:
        return text.lower() if self.full else text

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """texts -> hidden states [B,S,D], which of them are words [B,S], sentences [B,D]."""
        batch = self.tokenizer(
            [self._cased(text) for text in texts],
            truncation=True,
            max_length=self.length,
            padding=True,
            return_tensors="pt",
            return_attention_mask=True,
            return_special_tokens_mask=True,
            split_special_tokens=True,  # those that a text spells are words like others
        )
        keys = ("input_ids", "attention_mask", "special_tokens_mask")
        ids, attention, special = (batch[key].long() for key in keys)  # of nothing, the library's are no integers
        missing = self.context - ids.shape[1] if self.full else int(not ids.shape[1])
        if missing:
            places = (missing, 0) if self.tokenizer.padding_side == "left" else (0, missing)
            ids = nn.functional.pad(ids, places, value=self.tokenizer.pad_token_id)
            attention, special = (nn.functional.pad(part, places, value=1) for part in (attention, special))
        device = self.table.device
        ids, attention, words = ids.to(device), attention.to(device), (attention.bool() & ~special.bool()).to(device)
        hidden, pooled = self._ask(input_ids=ids, **({} if self.full else {"attention_mask": attention}))
        hidden = self._joint(hidden).float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            pooled = hidden[torch.arange(len(hidden), device=device), attention.sum(1) - 1]
        elif self.pooling == "mean":
            shown = attention[..., None]
            pooled = (hidden * shown).sum(1) / shown.sum(1).clamp_min(1)
        return hidden, words, pooled.float()

    def _joint(self, hidden: Tensor) -> Tensor:
        """Hidden states of a tower in the space of its sentences."""
        if not self.two_towers:
            return hidden
        project = getattr(self.network, "text_projection", None) or getattr(self._part(), "head", None)
        return hidden if project is None else project(hidden)


def own_pixels(image: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """What the pictures of a section `model.backbone.image` look like, as the model's files and the section say."""
    required("huggingface", "transformers", LEAST, setting, "huggingface")
    repo, revision, config = image.get("repo"), image.get("revision"), image.get("config")
    if config is None:
        config = json_of(hub_file(repo, "config.json", f"{setting}.repo", revision))
    return with_given(picture_settings(config_of(dict(config), setting), repo, revision, setting), image)
