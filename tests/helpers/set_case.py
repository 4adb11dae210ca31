"""What must be the same beside every set of packages: encoders, word pieces, ranks of a checkpoint.

In the tests' own process, or `python set_case.py OUT.json [CHECKPOINT FOLDER]` with the Python of another environment.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch

import neucore_plugin

neucore_plugin.register()

from encoder_case import encoder  # noqa: E402 - the encoders need the host

from neucore_plugin.models.backbones.bert_words import bert_tokenizer  # noqa: E402

TEXTS = (
    "make it red, and do not add dogs",
    "",
    "the same naïve café-style dress but its unbelievably floral 1970s-ish sleeves can't be longer - isn't it ok ?",
    "日本 is [SEP] blue!? 𝒳 " + "very " * 60,
)
SIZES = {"width": 16, "depth": 2, "heads": 2}
TEXT = {"width": 16, "layers": 2, "heads": 2}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
RANDOM = {"pretrained": "none"}
NONE = {"pretrained": "none", "vit_pretrained": "none"}
QFORMER = {"query_width": 16, "query_layers": 2, "query_heads": 2}
ENCODERS = {
    ("image", "efficientnet_lite0"): {"image_size": 64, "grid": 2},
    ("text", "minilm_l6"): {"max_words": 40},
    ("image", "blip"): {"image_size": 28, "patch_size": 14, "architecture": SIZES, **RANDOM},
    ("text", "blip"): {"max_words": 40, "architecture": TEXT, **RANDOM},
    ("image", "albef"): {"image_size": 28, "patch_size": 14, "architecture": SIZES, **RANDOM},
    ("text", "albef"): {"max_words": 40, "architecture": TEXT, **RANDOM},
    ("image", "blip2"): {"vit": "clip_L", "image_size": 28, "queries": 3, "architecture": SIZES | QFORMER} | NONE,
    ("text", "blip2"): {"max_words": 40, "architecture": TEXT, **RANDOM},
    ("image", "clip"): {"config": CLIP, **RANDOM},
    ("text", "clip"): {"config": CLIP, "max_words": 40, **RANDOM},
}


def numbers(shape: torch.Size, step: int) -> torch.Tensor:
    """Numbers between -0.5 and 0.5 by whole arithmetic: the same bits on every machine."""
    count = torch.arange(shape.numel(), dtype=torch.long)
    return (((count * step) % 1009).float() / 1009 - 0.5).reshape(shape)


def summary(output: torch.Tensor) -> list[float]:
    """Mean, mean of the sizes, and four of the numbers."""
    flat = output.flatten().double()
    return [flat.mean().item(), flat.abs().mean().item(), *flat[:: max(1, len(flat) // 4)][:4].tolist()]


@torch.no_grad()
def encoders() -> dict[str, dict]:
    """{side/name: fingerprint, a few numbers of each output, sha256 of all its bits}."""
    found = {}
    for (side, name), settings in ENCODERS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights are meant
            made = encoder(side, name, **settings).eval()
        if "pretrained" in settings:
            for place, parameter in enumerate(made.parameters()):
                parameter.copy_(numbers(parameter.shape, 7 + 2 * place))
        given = numbers(torch.Size((2, 3, settings.get("image_size", 28), settings.get("image_size", 28))), 11)
        outputs = made(given if side == "image" else list(TEXTS))
        digest = hashlib.sha256()
        for key in sorted(outputs):
            digest.update(outputs[key].contiguous().numpy().tobytes())
        found[f"{side}/{name}"] = {
            "fingerprint": made.fingerprint,
            "values": {key: summary(outputs[key]) for key in sorted(outputs)},
            "bits": digest.hexdigest(),
        }
    return found


def word_pieces() -> list[list[int]]:
    """Ids of the texts, from BERT's tokenizer."""
    return [bert_tokenizer()(text)["input_ids"] for text in TEXTS]


def ranks(checkpoint: str, folder: str) -> dict[str, list]:
    """{query: names and scores of the folder's images, best first} of a trained model."""
    from neucore_plugin.retrieval import GalleryIndex

    index = GalleryIndex.build(neucore_plugin.load_model(checkpoint), Path(folder), progress=False)
    queries = [(name, text) for name in index.names[::5] for text in ("make it blue", "now a circle", "a red cross")]
    return {
        f"{name} {text}": [[hit.name, hit.score] for hit in index.search(name, text, k=None)] for name, text in queries
    }


def everything(checkpoint: str | None = None, folder: str | None = None) -> dict:
    """What is compared, as JSON has it."""
    found = {"encoders": encoders(), "word_pieces": word_pieces()}
    if checkpoint:
        found["ranks"] = ranks(checkpoint, folder)
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(everything(*sys.argv[2:])))
