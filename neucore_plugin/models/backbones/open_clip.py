"""The models of open_clip (the extra `open_clip`): CLIP, SigLIP, MetaCLIP, EVA, MobileCLIP, CoCa and so on.

Only the wanted tower is built; the other one is made as small as can be and dropped. Weights are read by us, as weights
only, and put in exactly. Knows no host.

B batch, N image tokens, S word pieces with those that the tokenizer adds, E width of the joint space.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, ConfigError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.config.encoder_parts import BRINGING
from neucore_plugin.models.backbones.towers import ImageTower, TextTower, Tower, required, short, with_given
from neucore_plugin.models.backbones.vit import resized_positions
from neucore_plugin.weights.files import read_state
from neucore_plugin.weights.hub import TOKENIZER, hub_file, hub_folder, is_local
from neucore_plugin.weights.pretrained import NONE, fit, read_pretrained

LEAST = (3, 0)  # of open_clip_torch: the towers' own steps have had these names since
CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
DOWNSCALE = 32  # of a ResNet's last map
_NO_VISION = {"layers": 1, "width": 64, "patch_size": 1, "image_size": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_DROPOUTS = {"patch_dropout": 0.0, "timm_model_pretrained": False}  # all tokens are wanted, and no further file


class _OpenClip(Tower):
    """What both towers share.

    Args:
        arch: a name of open_clip's, hf-hub:OWNER/NAME, or local-dir:FOLDER. config: an architecture in its place:
            {"embed_dim", "vision_cfg", "text_cfg"}, and "preprocess_cfg".
        pretrained: a tag of open_clip's table, the path of a file, or "none"; None: what `arch` brings.
        load: whether to read weights; a checkpoint of ours may bring them.

    Raises ConfigError for settings that cannot be, CheckpointError for weights that are missing or of another network.
    """

    library = "open_clip"

    def __init__(self, arch: str, config: Mapping[str, Any] | None, pretrained: str | None) -> None:
        super().__init__()
        self.description = _description(arch, config, pretrained, self.setting)
        self.source = _source(arch, config, pretrained, self.setting)
        self.in_checkpoint = self.source == NONE or isinstance(self.source, Path)
        kind = json.dumps(self.description, sort_keys=True)
        self.settings, self.joint_space = f"open_clip_{self.side}:{kind}", f"open_clip:{kind}:{self.source}"

    def _built(self, **towers: Mapping[str, Any]) -> nn.Module:
        """open_clip's model with the tower that is given, random weights."""
        import open_clip

        towers = {"vision_cfg": {**_NO_VISION, **_DROPOUTS}, "text_cfg": _NO_TEXT, **towers}
        sizes = {"embed_dim": self.description["embed_dim"], "quick_gelu": self.description["quick_gelu"]}
        try:
            return open_clip.CustomTextCLIP(**sizes, **towers)
        except Exception as error:  # sizes that do not fit, names that timm does not know
            raise ConfigError(f"{self.setting}: open_clip cannot build this model ({short(error)})") from error

    def _fill(self, model: nn.Module, part: str) -> nn.Module:
        """The tower of `model` with the weights of the source."""
        import open_clip.model as library

        tower, key = getattr(model, part), f"{self.setting}.pretrained"
        if self.source == NONE:
            read_pretrained(NONE, key, f"open_clip's {self.side} tower")  # warns
            return tower
        path = self.source if isinstance(self.source, Path) else _fetched(self.source, key)
        state = read_state(path, _openai_sums())
        for name in ("input_resolution", "context_length", "vocab_size"):  # in OpenAI's own files
            state.pop(name, None)
        state = library.convert_to_custom_text_state_dict(state)
        state.pop("text.transformer.embeddings.position_ids", None)  # a constant
        if part == "visual":
            library.resize_pos_embed(state, model)
            table = "visual.attnpool.positional_embedding"  # of a ResNet, which the library leaves as it is
            if table in state and hasattr(tower, "attnpool"):
                side = tower.image_size // DOWNSCALE
                state[table] = resized_positions(state[table], (side, side), path=path)
        state = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
        fit(tower, state, path, prefix=f"{part}.", exact=True)
        return tower


class OpenClipImage(_OpenClip, ImageTower):
    """The image tower of a model of open_clip.

    A ViT of open_clip gives every token in the joint space, class token first; where its pooling is an attention of its
    own, and for timm's networks, tokens are those of the last layer. Pooled is the model's own image vector.

    Args: as of _OpenClip; image_size, mean, std, fit, interpolation, resize: None means what the model says.
        frozen: nothing is trained.
    """

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
        super().__init__(**settings)
        given = {"image_size": image_size, "mean": mean, "std": std, "fit": fit} | {
            "interpolation": interpolation,
            "resize": resize,
        }
        pixels = with_given(_pixels(self.description, self.setting), given)
        size, vision = pixels["image_size"], {**self.description["vision_cfg"], **_DROPOUTS}
        is_timm = bool(vision.get("timm_model_name"))
        if ":" in str(vision.get("timm_model_name")):  # hf-hub: and the like, which timm would fetch or read by itself
            raise ConfigError(
                f"{self.setting}: the config takes its tower from {vision['timm_model_name']!r}; only names of timm's "
                "own networks are taken"
            )
        cell = DOWNSCALE if isinstance(vision.get("layers"), list | tuple) else vision.get("patch_size", 16)
        if not is_timm and isinstance(cell, int) and size % cell:
            raise ConfigError(
                f"{self.setting}.image_size is {size}; this model takes a multiple of {cell}, such as "
                f"{max(1, round(size / cell)) * cell}"
            )
        model = self._built(vision_cfg={**vision, "image_size": vision["image_size"] if is_timm else size})
        self.network = self._fill(model, "visual") if load else model.visual
        if is_timm and size != vision["image_size"]:
            self.network.set_input_size(size)
        self.settings += f":{size}"
        self._cells: tuple[int, int] | None = None
        self.settle(pixels, frozen)
        self.grid = self._cells or self.grid

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, stages, or a ResNet's bottlenecks, first to last."""
        if not hasattr(self.network, "attnpool"):
            return super().blocks
        return [block for layer in range(1, 5) for block in getattr(self.network, f"layer{layer}")]

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B,3,H,W] -> tokens [B,N,D], pooled [B,E]."""
        network = self.network
        if hasattr(network, "trunk"):  # timm's
            features = network.trunk.forward_features(pixels)
            pooled = network.head(network.trunk.forward_head(features))
            return self._as_tokens(features, getattr(network.trunk, "output_fmt", "NCHW")), pooled
        if hasattr(network, "attnpool"):
            cells = network.layer4(network.layer3(network.layer2(network.layer1(network.stem(pixels)))))
            return self._as_tokens(cells, "NCHW"), network.attnpool(cells)
        hidden = network.transformer(network._embeds(pixels))  # [B,1+P,width]
        pooled, _ = network._pool(hidden)
        self._cells = network.grid_size
        if network.attn_pool is not None:
            return hidden, pooled @ network.proj
        return network.ln_post(hidden) @ network.proj, pooled @ network.proj

    def _as_tokens(self, features: Tensor, layout: str) -> Tensor:
        """[B,N,D] as it is; a map, [B,D,rows,columns] or with the channels last (NHWC), one cell after the other."""
        if features.ndim == 3:
            return features
        features = features if layout == "NHWC" else features.permute(0, 2, 3, 1)
        self._cells = tuple(features.shape[1:3])
        return features.flatten(1, 2)


class OpenClipText(_OpenClip, TextTower):
    """The text tower of a model of open_clip: every word piece and the sentence in the joint space.

    Args: as of _OpenClip; max_words: word pieces kept of a text, at most what the context holds (None); a longer text
        is cut, its end token kept. frozen: nothing is trained.
    """

    def __init__(self, max_words: int | None, frozen: bool = True, load: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        text = dict(self.description["text_cfg"])
        for key in ("hf_model_name", "hf_tokenizer_name"):
            if text.get(key):
                further = TOKENIZER if key == "hf_tokenizer_name" else ()
                folder = _folder(text[key], f"{self.setting}.arch", further)
                if not further:
                    _check_known(folder, self.setting)
                text[key] = str(folder)
        text["hf_model_pretrained"] = False
        self.context, self.clips = text.get("context_length", 77), text.get("tokenizer_mode") == "clips"
        self.tokenizer = self._tokenizer(text)
        added = 2 if self._simple else 3 if self.clips else self.tokenizer.tokenizer.num_special_tokens_to_add()
        most = self.context - added
        self.max_words = most if max_words is None else max_words
        if not 1 <= self.max_words <= most or (self.clips and self.max_words < most):
            allowed = f"{most} word pieces" if self.clips else f"1 to {most} word pieces"
            raise ConfigError(f"{self.setting}.max_words is {max_words}; this model keeps {allowed}")
        self._length = self.max_words + added
        model = self._built(text_cfg=text)
        self.network = self._fill(model, "text") if load else model.text
        self.settings += f":{self.max_words}"
        self.settle(frozen)

    def _tokenizer(self, text: Mapping[str, Any]) -> Any:
        from open_clip import tokenizer as library

        kept = {"context_length": self.context, **(text.get("tokenizer_kwargs") or {})}
        self._simple = not text.get("hf_tokenizer_name")
        if self._simple:
            return library.SimpleTokenizer(**kept)
        kept |= {"tokenizer_mode": text.get("tokenizer_mode"), "local_files_only": True, "trust_remote_code": False}
        try:
            return library.HFTokenizer(text["hf_tokenizer_name"], **kept)
        except Exception as error:  # files of any kind
            where = text["hf_tokenizer_name"]
            raise CheckpointError(f"{self.setting}.arch: {where} gives no tokenizer ({short(error)})") from error

    @property
    def table(self) -> Tensor:
        """The input embeddings [V,Dw]."""
        network = self.network
        own = hasattr(network, "token_embedding")
        return (network.token_embedding if own else network.transformer.get_input_embeddings()).weight

    def pieces_of(self, word: str) -> list[int]:
        """Word pieces without those that the tokenizer adds, or that a text spells."""
        if self._simple:
            special = set(self.tokenizer.all_special_ids)
            return [piece for piece in self.tokenizer.encode(word) if piece not in special]
        return self.tokenizer.tokenizer(self.tokenizer.clean_fn(word), add_special_tokens=False)["input_ids"]

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B,context] as the model was trained on them, and which are words [B,context]."""
        if not self._simple:
            library = self.tokenizer.tokenizer
            ids = self.tokenizer(list(texts), context_length=self._length)
            missing = self.context - ids.shape[1]
            ids = nn.functional.pad(ids, (0, missing), value=library.pad_token_id)
            special = {*library.all_special_ids} - {library.unk_token_id}
            return ids, ~torch.isin(ids, torch.tensor([*special, *([0] * self.tokenizer.strip_sep_token)]))
        ids = torch.zeros(len(texts), self.context, dtype=torch.long)
        words = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            pieces = self.pieces_of(text)[: self.max_words]
            kept = [self.tokenizer.sot_token_id, *pieces, self.tokenizer.eot_token_id]
            ids[row, : len(kept)] = torch.tensor(kept)
            words[row, 1 : 1 + len(pieces)] = True
        return ids, words

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """texts -> hidden states [B,S,E], which of them are words [B,S], sentences [B,E]."""
        ids, words = (part.to(self.table.device) for part in self._ids(texts))
        network = self.network
        if not hasattr(network, "token_embedding"):  # a model of transformers
            attention = (ids != network.config.pad_token_id).long()
            found = network.transformer(input_ids=ids, attention_mask=attention)
            return network.proj(found.last_hidden_state), words, network.proj(network.pooler(found, attention))
        from open_clip.transformer import text_global_pool

        causal = network.attn_mask is not None and network.cls_emb is None
        if causal and network.pool_type in ("argmax", "eos"):  # what follows the end token, nobody sees
            most = int(words.sum(1).max()) + 2 if self._simple else ids.shape[1]
            ids, words = ids[:, :most], words[:, :most]
        hidden, mask = network._embeds(ids)
        if mask is not None and mask.ndim == 2:
            mask = mask[: hidden.shape[1], : hidden.shape[1]]
        hidden = network.ln_final(network.transformer(hidden, attn_mask=mask))  # [B,S,width], of CoCa [B,S+1,width]
        if network.cls_emb is not None:
            pooled, hidden = hidden[:, -1], hidden[:, :-1]
        else:
            pooled = text_global_pool(hidden, ids, network.pool_type, eos_token_id=network.eos_id)
        project = network.text_projection
        if project is None:
            return hidden, words, pooled
        if isinstance(project, nn.Linear):
            return project(hidden), words, project(pooled)
        return hidden @ project, words, pooled @ project


def own_pixels(image: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """What the pictures of a section `model.backbone.image` look like, as the model's files and the section say."""
    description = _description(image["arch"], image.get("config"), image.get("pretrained"), setting)
    return with_given(_pixels(description, setting), image)


def _description(arch: str, config: Mapping[str, Any] | None, pretrained: str | None, setting: str) -> dict[str, Any]:
    """{"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "preprocess_cfg"} of a model; raises ConfigError."""
    required("open_clip", "open_clip_torch", LEAST, setting, "open_clip")
    import open_clip

    tag: Mapping[str, Any] = {}
    if config is not None:
        found, where = copy.deepcopy(dict(config)), f"{setting}.config"
    elif arch.startswith(BRINGING):
        path = hub_file(_repo(arch), CONFIG, f"{setting}.arch")
        found, where = json.loads(path.read_text(encoding="utf-8")), str(path)
        found = {**(found.get("model_cfg") or {}), "preprocess_cfg": found.get("preprocess_cfg") or {}}
    else:
        name, known = arch.replace("/", "-"), open_clip.list_models()
        if name not in known:
            raise ConfigError(f"{setting}.arch: {arch!r} is no model of open_clip.{nearest(name, known)}")
        found, where = open_clip.get_model_config(name), name
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained and pretrained.lower() != NONE else {}
    lacking = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in found]
    if lacking:
        raise ConfigError(f"{where} lacks {', '.join(lacking)}: it describes no model of open_clip")
    # What the weights of a tag were trained with, whatever the architecture of that name says.
    quick_gelu = bool(tag.get("quick_gelu")) if tag else bool(found.get("quick_gelu"))
    preprocess = {**(found.get("preprocess_cfg") or {}), **tag}
    return {
        "embed_dim": found["embed_dim"],
        "vision_cfg": {"image_size": 224, **found["vision_cfg"]},  # the library's own default
        "text_cfg": found["text_cfg"],
        "quick_gelu": quick_gelu,
        "preprocess_cfg": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in preprocess.items()
            if key in ("mean", "std", "interpolation", "resize_mode")
        },
    }


def _pixels(description: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """The pixels' settings of a model, by our names."""
    from open_clip.transform import PreprocessCfg

    usual = PreprocessCfg()
    given = {key: value for key, value in description["preprocess_cfg"].items() if value is not None}
    size = description["vision_cfg"].get("image_size", usual.size)
    size = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    mode = given.get("resize_mode", usual.resize_mode)
    fits = {"shortest": "shortest", "squash": "stretch"}
    if not isinstance(size, int):
        raise ConfigError(f"{setting}: this model takes pictures of {size} pixels; only squares can be given")
    return {
        "image_size": size,
        "mean": list(given.get("mean", usual.mean)),
        "std": list(given.get("std", usual.std)),
        "fit": fits.get(mode, "pad"),  # longest: on black there, on white here
        "interpolation": "bilinear" if given.get("interpolation", usual.interpolation) == "bilinear" else "bicubic",
    }


def _source(arch: str, config: Mapping[str, Any] | None, pretrained: str | None, setting: str) -> Any:
    """Where weights come from: NONE, a Path, or {"hf_hub", "url"} of open_clip's table. Raises ConfigError."""
    import open_clip

    if pretrained is None:
        repo = _repo(arch)
        if not is_local(repo):
            return {"hf_hub": f"{repo}/"}
        found = [path for name in WEIGHTS if (path := expanded(repo) / name).is_file()]
        if not found:
            raise CheckpointError(f"{setting}.arch: {expanded(repo)} holds no weights; wanted: {' or '.join(WEIGHTS)}")
        return found[0]
    if pretrained.lower() == NONE:
        return NONE
    name = arch.replace("/", "-")
    if config is None and (tag := open_clip.get_pretrained_cfg(name, pretrained)):
        return dict(tag)
    if expanded(pretrained).is_file():
        return expanded(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name) if config is None else []
    raise ConfigError(
        f"{setting}.pretrained: {pretrained!r} is no tag of {arch if config is None else 'an own config'}, and no "
        f"file.{nearest(pretrained, [*tags, NONE])}"
    )


def _fetched(source: Mapping[str, Any], setting: str) -> Path:
    """The file of weights of an entry of open_clip's table, from the hub where it is there, safetensors first."""
    if not source.get("hf_hub"):
        from neucore_plugin.weights.pretrained import locate

        return locate(source["url"], setting)
    repo, _, name = source["hf_hub"].rpartition("/")
    if name and not name.endswith(".safetensors"):
        safe = f"{name.rpartition('.')[0]}.safetensors"
        return hub_file(repo, safe, setting, optional=True) or hub_file(repo, name, setting)
    if name:
        return hub_file(repo, name, setting)
    return hub_file(repo, WEIGHTS[0], setting, optional=True) or hub_file(repo, WEIGHTS[1], setting)


def _folder(repo: str, setting: str, further: tuple[str, ...]) -> Path:
    """The folder of a tokenizer, or of a text model's config."""
    if not further:
        return hub_folder(repo, setting)
    found = [path for name in further if (path := hub_file(repo, name, setting, optional=True))]
    if not found:
        raise CheckpointError(f"{setting}: {repo} holds no tokenizer; wanted: {', '.join(further)}")
    return found[0].parent


def _check_known(folder: Path, setting: str) -> None:
    """Raise ConfigError for a text model that is none of transformers' own: the library would ask to run its code."""
    from transformers import CONFIG_MAPPING

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in [*CONFIG_MAPPING.keys()]:
        raise ConfigError(
            f"{setting}: the text model {folder} is of model_type {kind!r}, which transformers lacks; code that a "
            "repository brings is never run"
        )


def _repo(arch: str) -> str:
    return arch.partition(":")[2]


def _openai_sums() -> set[str]:
    """sha256 of OpenAI's own files: a folder of their URLs."""
    import open_clip

    urls = [open_clip.get_pretrained_url(name, "openai") for name in open_clip.list_pretrained_models_by_tag("openai")]
    return {url.split("/")[-2] for url in urls if url.count("/") > 2}
