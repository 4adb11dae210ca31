"""Tiny random models of open_clip and transformers, and folders as their libraries write them; nothing is fetched."""

import importlib.metadata
import json

import pytest
import torch
from encoder_case import encoder

TEXTS = ["make it red", "", "a longer dress with no sleeves", "blue"]
WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "make", "it", "red", "a", "longer", "dress", "blue", "with", "no", "sleeves"]
LONG = "red dress " * 60


def version(package):
    """Its first two numbers; None where it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


def needs(package, least):
    """A mark that skips, with the reason, where an optional library is absent or too old."""
    if (found := version(package)) is None:
        return pytest.mark.skip(reason=f"{package} is not installed")
    texts = (".".join(map(str, one)) for one in (found, least))
    return pytest.mark.skipif(found < least, reason=f"{package} {' is older than '.join(texts)}")


def transformers_is_before(least):
    return version("transformers") < least


needs_open_clip, needs_transformers = needs("open_clip_torch", (3, 0)), needs("transformers", (4, 49))


def pixels(count, side):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


# ---- open_clip -------------------------------------------------------------------------------------------------------

VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**TEXT, "context_length": 16, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
# Of each kind of image tower; timm's smallest networks have fixed sizes.
TOWERS = {
    "vit": VIT,
    "vit_mean": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "coca": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "siglip": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
}


def open_clip_config(tower="vit", text=TEXT, **further):
    width = 96 if tower == "siglip" else 24
    return {"embed_dim": width, "vision_cfg": TOWERS[tower], "text_cfg": text, **further}


def write_open_clip(folder, config):
    """A folder as open_clip's push_to_hf_hub writes it, and its model."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(1)
    kept = {key: value for key, value in config.items() if key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    model = open_clip.CustomTextCLIP(**kept).eval()
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": config.get("preprocess_cfg", {})}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def of_open_clip(side, folder, **settings):
    return encoder(side, "open_clip", arch=f"local-dir:{folder}", **settings).eval()


# ---- transformers ----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
READS = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
READS |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SCALES = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32}
TWO_TOWERS = {
    "clip": {"text_config": READS, "vision_config": VISION, "projection_dim": 24},
    "siglip": {"text_config": {**READS, "projection_size": 32}, "vision_config": VISION},
    "siglip2": {
        "text_config": {**READS, "projection_size": 32},
        "vision_config": {**SIZES, "patch_size": 8, "num_patches": 16},
    },
    "align": {"text_config": READS, "vision_config": {"image_size": 64, **SCALES}, "projection_dim": 32},
    "blip": {"text_config": READS, "vision_config": VISION, "projection_dim": 24},
    "chinese_clip": {"text_config": READS, "vision_config": VISION, "projection_dim": 24},
}
VISION_ALONE = {
    "dinov2": VISION,
    "dinov3_vit": {**VISION, "num_register_tokens": 4},
    "vit": VISION,
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}
TEXT_ALONE = {
    "bert": READS,
    "roberta": {**READS, "max_position_embeddings": 18},
    "qwen3": {**READS, "num_key_value_heads": 2, "head_dim": 16},
}
ALL = {**TWO_TOWERS, **VISION_ALONE, **TEXT_ALONE}
SQUARE = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2}
SQUARE |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False, "do_rescale": True}
SQUARE |= {"do_normalize": True, "rescale_factor": 1 / 255}
PROCESSORS = {
    "clip": {
        **SQUARE,
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 36},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "image_mean": [0.4, 0.5, 0.6],
    },
    "align": {
        **SQUARE,
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 64, "width": 64},
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "include_top": False,
    },
    "siglip2": {
        "image_processor_type": "Siglip2ImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": 8,
        "max_num_patches": 16,
        "resample": 2,
    },
}


def write_tokenizer(folder, first="<s>", last="</s>"):
    """A tokenizer of a few words, which puts <s> before a text and </s> after it (empty: nothing)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer, made.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(), special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **special).save_pretrained(folder)


def write_transformers(folder, kind, sizes=None):
    """A folder as save_pretrained writes it: weights, config, tokenizer, image processor; and its model.

    sizes: None means those of ALL.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **(sizes or ALL[kind]))
    model = MODEL_MAPPING[type(config)](config).eval()
    model.save_pretrained(folder)
    # transformers would make SigLIP 2's own tokenizer of these words
    write_tokenizer(folder / "words" if kind == "siglip2" else folder, "" if kind.startswith("siglip") else "<s>")
    if kind in {**TWO_TOWERS, **VISION_ALONE}:
        usual = {**SQUARE, "image_processor_type": "SiglipImageProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS.get(kind, usual)))
    return model


def of_transformers(side, folder, **settings):
    own = {"tokenizer": str(folder / "words")} if side == "text" and (folder / "words").is_dir() else {}
    return encoder(side, "huggingface", repo=str(folder), **own, **settings).eval()


def named(found):
    """The library's vector: a tensor before transformers 5, a field since."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output
