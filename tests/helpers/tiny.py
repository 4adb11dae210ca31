"""Small settings of the models and their parts, a batch of three pairs, a checkpoint: once for all tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.models.base import CirModel
from neucore_plugin.models.baseline import CirBaseline
from neucore_plugin.models.composers import COMPOSERS
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.weights import checkpoint

WORDS = ("red", "blue", "square", "dress", "long")
TEXTS = ["make it blue", "the same dress but much longer and in red", "square"]
CONCEPTS = [("blue",), ("dress", "long", "red"), ("square",)]

# ---- model sections ------------------------------------------------------------------------------------------------

BACKBONE = {"image": {"name": "efficientnet_lite0", "image_size": 64, "grid": 2}}
NEUCORE = {
    "arch": "neucore",
    "model_type": "embedded_paper",
    "backbone": BACKBONE,
    "embed_dim": 32,
    "concept_alignment": {"depth": 1, "heads": 2},
    "fusion": {"steps": 2, "heads": 2, "head_dim": 16},
}
CLAUSES = {key: value for key, value in NEUCORE.items() if key != "fusion"} | {"model_type": "embedded"}
BASELINE = {"arch": "cir_baseline", "backbone": BACKBONE, "embed_dim": 32, "cross_attention": {"depth": 2, "heads": 2}}
KINDS = ("neucore", "clauses", *COMPOSERS)


def build(kind: str = "neucore", **changes: Any) -> CirModel:
    """NEUCORE as in the paper or in clauses, or a baseline by its method, on the embedded encoders; sections given
    replace those above."""
    torch.manual_seed(0)
    if kind in ("neucore", "clauses"):
        section = {"neucore": NEUCORE, "clauses": CLAUSES}[kind]
        return NeucoreModel.from_config({**section, **changes}, vocabulary=ConceptVocabulary(WORDS))
    return CirBaseline.from_config({**BASELINE, "method": kind, **changes}, vocabulary=ConceptVocabulary(WORDS))


# ---- keyword arguments of the parts, but for `dim` ------------------------------------------------------------------

ALIGNMENT = {"depth": 1, "heads": 2, "mlp_ratio": 4.0, "dropout": 0.0, "bag": "union", "released": False}
FUSION = {
    "mode": "progressive",
    "steps": 3,
    "layers": 1,
    "module_depth": 1,
    "heads": 2,
    "head_dim": 3,
    "mlp_ratio": 2.0,
    "dropout": 0.0,
    "released": False,
    "gumbel": False,
    "generator_linears": 2,
    "attend_padding": False,
    "instruction_linears": 2,
}
MATCHING = {
    "terms": ("fused", "explicit", "background"),
    "temperature": 2.65926,
    "learn_temperature": True,
    "released": False,
}
COMPOSER = {
    "combiner": {"dropout": 0.5},
    "cross_attention": {"depth": 2, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0},
    "artemis": {"temperature": 2.65926, "learn_temperature": True},
}


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def exact(cls: type, **settings: Any) -> torch.nn.Module:
    """A part in float64, in eval mode."""
    return cls(**settings).double().eval()


# ---- a batch, a checkpoint -----------------------------------------------------------------------------------------


def pictures(count: int = 3, side: int = 64) -> list[Image.Image]:
    noise = np.random.default_rng(3).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def pixels(model: CirModel) -> torch.Tensor:
    """Three pictures as the model takes them."""
    return torch.stack([model.image_processor(image) for image in pictures()])


def samples(images: torch.Tensor) -> dict[str, Any]:
    """Three pairs: the third target is the first reference, the second reference is no other's target."""
    return {
        "reference_image": images,
        "target_image": images.flip(0),
        "text_input": TEXTS,
        "concept_words": CONCEPTS,
        "reference_key": torch.tensor([0, 1, 2]),
        "target_key": torch.tensor([2, 3, 0]),
        "right_keys": [(2,), (3,), (0,)],
    }


def save(model: CirModel, path: Path) -> Path:
    """A checkpoint of the model as training writes it, without a training's progress."""
    state, frozen = checkpoint.model_state(model)
    checkpoint.save({"architecture": model.checkpoint_header(), "model": state, "frozen": frozen}, path)
    return path
