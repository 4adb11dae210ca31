"""A tiny universal embedder of random weights: Qwen2-VL's classes, a byte tokenizer, saved by sentence-transformers."""

from pathlib import Path

import torch

SIDE = 32
_SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


def write_embedder(folder: Path, pooling: str = "lasttoken", prompts: dict | None = None) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(_SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
    end, _, start, stop, image, video = (fast.convert_tokens_to_ids(name) for name in _SPECIAL)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {"vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"bos_token_id": end, "eos_token_id": end}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    cells = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    torch.manual_seed(0)
    network = Qwen2VLModel(
        Qwen2VLConfig(
            text_config=text,
            vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=stop,
        )
    )
    network.save_pretrained(folder / "base")
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**cells, min_pixels=64, max_pixels=SIDE**2),
        video_processor=Qwen2VLVideoProcessor(**cells),
        tokenizer=fast,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder / "base")
    modules = [Transformer(str(folder / "base")), Pooling(32, pooling_mode=pooling), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder / "model"))
    return folder / "model"
