"""A tiny authors' checkpoint of random weights, its settings and words, and the model that it becomes."""

import released_reference as slow
import torch

from neucore_plugin.concepts import ConceptVocabulary
from neucore_plugin.models.backbones.resnet_gru import SPECIALS
from neucore_plugin.released.convert import Conversion, convert_state

WORDS = [*SPECIALS, "red", "blue", "dress", "longer", "make", "it", "sleeve"]
CONCEPTS = ("red", "dress", "sleeve")
OPT = {
    "data_name": "shoes",
    "embed_dim": 8,
    "concept_depth": 2,
    "concept_heads": 2,
    "engine_depth": 2,
    "num_type_instruction": 5,
    "module_depth": 3,
    "module_heads": 2,
    "module_dim_head": 3,
}
SIZES = {"rows": len(WORDS), "word_dim": 5, "dim": 8, "width": 6, "depth": 2, "types": 5, "layers": 2}
SIZES |= {"module_depth": 3, "heads": 2, "head_dim": 3}


def weights(**changes):
    """Numpy arrays under the authors' names."""
    return slow.random_weights(**{"seed": 4, **SIZES, **changes})


def tensors(**changes):
    return {name: torch.from_numpy(value) for name, value in weights(**changes).items()}


def converted(state=None, settings=OPT, words=WORDS) -> Conversion:
    return convert_state(state or tensors(), settings, words, ConceptVocabulary(CONCEPTS))
