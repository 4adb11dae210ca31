"""What the host misses in later releases of transformers: names lent while it is imported, methods of its own BERTs."""

import importlib
import importlib.util
import sys

import pytest
import torch
from lavis.models import med
from lavis.models.blip2_models import Qformer
from lavis.models.blip_models import nlvr_encoder
from transformers import BertConfig, PreTrainedModel, modeling_utils, pytorch_utils

from neucore_plugin.common.errors import NeucoreError
from neucore_plugin.host import bert_methods, moved_names

METHODS = ("get_head_mask", "invert_attention_mask", "init_weights", "tie_weights")


def state() -> tuple:
    dropped = sys.modules.get(moved_names.DROPPED_MODULE)
    return sorted(vars(modeling_utils)), sorted(vars(pytorch_utils)), dropped


def test_names_are_lent_and_taken_back():
    before = state()
    with moved_names.lent_names():
        for name in moved_names.MOVED:
            assert getattr(modeling_utils, name) is getattr(pytorch_utils, name)
        module = importlib.import_module(moved_names.DROPPED_MODULE)
        assert all(callable(getattr(module, name)) for name in moved_names.OF_DROPPED_MODULE)
    assert state() == before
    with pytest.raises(ZeroDivisionError), moved_names.lent_names():
        1 / 0  # noqa: B018
    assert state() == before


def test_nothing_is_left_in_transformers_after_the_hosts_import():
    """The host has been imported by this test's own imports."""
    for module in (modeling_utils, pytorch_utils):
        origins = {name: getattr(value, "__module__", None) for name, value in vars(module).items()}
        assert [name for name, origin in origins.items() if origin == moved_names.__name__] == []
    left = sys.modules.get(moved_names.DROPPED_MODULE)
    assert left is None or left.__spec__ is not None


def test_a_dropped_name_says_so_when_it_is_called():
    with pytest.raises(NeucoreError, match=r"prune.* is in no transformers of today.*'transformers<5'"):
        moved_names._dropped("prune")(1, key=2)


def test_the_hosts_berts_have_the_methods_and_transformers_class_is_untouched():
    bases = [module.BertPreTrainedModel for module in (med, Qformer, nlvr_encoder)]
    assert len(set(bases)) == 3
    given = not hasattr(PreTrainedModel, "get_head_mask")
    for base in bases:
        assert all(callable(getattr(base, name)) for name in METHODS)
        for name in METHODS:
            assert (getattr(base, name) is getattr(bert_methods, name)) == given
    assert not any(getattr(PreTrainedModel, name, None) is getattr(bert_methods, name) for name in METHODS)


class Model:
    dtype = torch.float32


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5)])
def test_inverted_mask_is_zero_where_it_may_be_seen_and_lowest_elsewhere(shape):
    mask = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    found = bert_methods.invert_attention_mask(Model(), mask)
    assert found.shape == ((2, 1, 1, 5) if len(shape) == 2 else (2, 1, 4, 5))
    lowest = torch.finfo(torch.float32).min
    for place, value in enumerate(mask.flatten().tolist()):
        assert found.flatten()[place].item() == (0.0 if value else lowest)


def test_head_masks():
    assert bert_methods.get_head_mask(None, None, 3) == [None, None, None]
    with pytest.raises(NeucoreError, match="'transformers<5'"):
        bert_methods.get_head_mask(None, torch.ones(3), 3)


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_and_ties(tied):
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        tie_word_embeddings=tied,
        add_type_embeddings=False,
        add_cross_attention=False,
    )
    torch.manual_seed(0)
    model = med.BertForMaskedLM(config)
    table = model.bert.embeddings.word_embeddings.weight
    assert (model.get_output_embeddings().weight is table) == tied
    assert 0.015 < table[1:].std().item() < 0.025  # initializer_range 0.02
    assert model.bert.encoder.layer[0].attention.self.query.bias.abs().max().item() == 0.0
