"""Training modes of an encoder: frozen, last blocks, layer-wise rates, low-rank adapters, recomputed activations."""

import copy
import sys

import pytest
import tiny
import torch
from tiny import TEXTS
from torch import nn

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.models.backbones.tuning import Tuning, rate_scales, settle_modes
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.training.optimisation import parameter_groups
from neucore_plugin.weights import checkpoint


class Tower(nn.Module):
    """An encoder with an embedding, three blocks with dropout and batch norm, and a tail of a norm and a parameter."""

    lora_targets = ("linear",)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(3, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "dropout": nn.Dropout(0.5)})
            for _ in range(3)
        )
        self.norm, self.out = nn.LayerNorm(4), nn.Parameter(torch.ones(4, 2))

    blocks = property(lambda self: list(self.layers))
    tail = property(lambda self: [self.norm, self.out])


def trained(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def section(**text):
    backbone = {**copy.deepcopy(tiny.BACKBONE), "text": {"name": "minilm_l6", **text}}
    return {**tiny.NEUCORE, "query_dropout": {"image": 0.0, "text": 0.0}, "backbone": backbone}


def build(**text):
    torch.manual_seed(0)
    return tiny.build(**section(**text))


def batch(model):
    return tiny.samples(tiny.pixels(model))


def step(model, rate=0.01):
    model.train()
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, {}), lr=rate)
    model(batch(model))["loss"].backward()
    optimizer.step()


def test_frozen_means_frozen():
    tower = Tower()
    Tuning(freeze=True).apply(tower, "x")
    tower.train()
    settle_modes(tower, True)
    assert not trained(tower) and not any(part.training for part in tower.modules())
    model = build()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    step(model, rate=1.0)
    assert not model.backbone.image.training and not model.backbone.text.training
    assert [group["name"] for group in model.parameter_groups()] == ["head"]
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    in_optimizer = {id(p) for group in parameter_groups(model, 0.0, {}) for p in group["params"]}
    assert not in_optimizer & {id(p) for p in model.backbone.parameters()}


def test_the_last_blocks_alone_are_trained():
    tower = Tower()
    Tuning(freeze=False, train_blocks=1).apply(tower, "x")
    assert trained(tower) == {"layers.2.linear.weight", "layers.2.linear.bias", "layers.2.norm.weight",
                              "layers.2.norm.bias", "norm.weight", "norm.bias", "out"}  # fmt: skip
    tower.train()
    settle_modes(tower, False)
    # below the trained block no statistics move and no dropout acts
    assert not tower.layers[1]["norm"].training and not tower.layers[1]["dropout"].training
    assert tower.layers[2]["norm"].training and tower.layers[2]["dropout"].training
    with pytest.raises(ConfigError, match="x.train_blocks is 4; the encoder has 3"):
        Tuning(freeze=False, train_blocks=4).apply(Tower(), "x")


def test_partial_unfreezing_moves_the_last_layer_of_a_real_encoder_only():
    model = build(freeze=False, train_blocks=1)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    step(model)
    moved = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("text.network.encoder.layer.5.") for name in moved)


def test_rates_decay_from_the_last_block_to_the_first():
    tower = Tower()
    scales = {id(parameter): scale for parameter, scale in rate_scales(tower, 0.5)}
    expected = {"out": 1, "norm.weight": 1, "layers.2.linear.bias": 0.5, "layers.1.linear.bias": 0.25}
    expected |= {"layers.0.norm.weight": 0.125, "embedding.weight": 0.0625}
    parameters = dict(tower.named_parameters())
    assert {name: scales[id(parameters[name])] for name in expected} == expected
    assert len(scales) == len(parameters)


def test_layer_decay_reaches_the_optimiser():
    model = build(freeze=False, layer_decay=0.5)
    groups = parameter_groups(model, 0.01, {"backbone_text": 0.1})
    rates = {round(group["lr_scale"], 8) for group in groups if group["name"] == "backbone_text"}
    assert rates == {round(0.1 * 0.5**power, 8) for power in range(1, 8)}  # six layers and the embedding
    assert {group["lr_scale"] for group in groups if group["name"] == "head"} == {1.0}
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_whole_encoder_can_be_trained_and_its_checkpoint_holds_it(tmp_path):
    model = build(freeze=False)
    before = model.concept_table().detach().clone()
    step(model)
    assert not torch.allclose(model.concept_table(), before)  # the vocabulary's embeddings follow the encoder
    tiny.save(model, tmp_path / "whole.pth")
    again = NeucoreModel.from_checkpoint(tmp_path / "whole.pth").eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    frozen_again = section()
    frozen_again["checkpoint"] = str(tmp_path / "whole.pth")
    phase_two = NeucoreModel.from_config(frozen_again).eval()  # trained before, frozen now
    with torch.no_grad():
        assert torch.allclose(phase_two.concept_table(), again.concept_table(), atol=1e-6)
    assert not trained(phase_two.backbone)


def test_a_trained_image_encoder_gets_gradients():
    config = section()
    config["backbone"]["image"]["freeze"] = False
    model = tiny.build(**config).train()
    model(batch(model))["loss"].backward()
    idle = [name for name, p in model.backbone.image.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_adapters_alone_are_trained_and_begin_as_nothing(tmp_path):
    pytest.importorskip("peft")
    plain, model = build().eval(), build(freeze=False, lora={"rank": 2, "alpha": 4.0, "dropout": 0.0}).eval()
    names = trained(model.backbone)
    assert names and all("lora_" in name and ".layer." in name for name in names)
    assert sum(dict(model.backbone.named_parameters())[n].numel() for n in names) == 6 * 2 * 2 * (384 * 2)
    with torch.no_grad():
        assert torch.allclose(model.backbone.text(TEXTS)["sentence"], plain.backbone.text(TEXTS)["sentence"], atol=1e-6)
    base = {n: v.clone() for n, v in model.backbone.state_dict().items() if "lora_" not in n}
    step(model)
    assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in base.items())
    state = checkpoint.load(tiny.save(model, tmp_path / "lora.pth"))["model"]
    held = {name for name in state if name.removeprefix("backbone.") in dict(model.backbone.named_parameters())}
    assert held and all("lora_" in name for name in held)  # of the encoder the file holds the adapters alone
    again = NeucoreModel.from_checkpoint(tmp_path / "lora.pth").eval()
    with torch.no_grad():
        model.eval()
        assert torch.equal(model.backbone.text(TEXTS)["sentence"], again.backbone.text(TEXTS)["sentence"])


def test_adapters_without_peft_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"text\.lora needs peft .* pip install 'neucore-plugin\[lora\]'"):
        build(freeze=False, lora={"rank": 2, "alpha": 4.0, "dropout": 0.0})


def test_recomputed_activations_change_neither_loss_nor_gradients():
    kept, recomputed = build(freeze=False), build(freeze=False, checkpoint_activations=True)
    sizes, gradients, losses = [], [], []
    for model in (kept, recomputed):
        model.train()
        held = 0

        def pack(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(batch(model))["loss"]
        loss.backward()
        losses.append(loss.detach())
        sizes.append(held)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert sizes[1] < 0.7 * sizes[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-6), name
    copied = copy.deepcopy(recomputed)
    assert copied.backbone.text.blocks[0].forward.forward.__self__ is copied.backbone.text.blocks[0]


def test_a_checkpoint_tells_the_frozen_encoder_it_needs(tmp_path):
    model = build()
    stored = checkpoint.load(tiny.save(model, tmp_path / "a.pth"))
    stored["frozen"]["backbone.text"] = "0" * 64
    with pytest.raises(CheckpointError, match="frozen weights that are not those of the training: backbone.text"):
        checkpoint.restore_model(build(), stored["model"], stored["frozen"], "a.pth")
    model.backbone.text.in_checkpoint = True  # as an encoder of random weights has it
    assert any(name.startswith("backbone.text.") for name in checkpoint.trainable_state(model))


def test_batch_norms_are_not_counted_twice_and_convolutions_have_no_adapters():
    with pytest.raises(ConfigError, match="has batch norms, whose statistics would count each batch twice"):
        Tuning(freeze=False, checkpoint_activations=True).apply(Tower(), "x")
    tower = Tower()
    tower.lora_targets = ()
    with pytest.raises(ConfigError, match="x.lora: this encoder has no linear layers"):
        Tuning(freeze=False, lora={"rank": 1, "alpha": 1.0, "dropout": 0.0}).apply(tower, "x")


@pytest.mark.parametrize("later", [{"freeze": True}, {"freeze": False, "train_blocks": 1}], ids=["frozen", "fewer"])
def test_what_an_earlier_phase_trained_stays_in_later_checkpoints(later, tmp_path):
    first = build(freeze=False, train_blocks=2)
    step(first)
    tiny.save(first, tmp_path / "first.pth")
    config = section(**later)
    config["checkpoint"] = str(tmp_path / "first.pth")
    second = NeucoreModel.from_config(config)
    step(second)
    tiny.save(second, tmp_path / "second.pth")
    again = NeucoreModel.from_checkpoint(tmp_path / "second.pth")
    for name, value in second.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(
        again.backbone.text.blocks[4].output.dense.weight, build().backbone.text.blocks[4].output.dense.weight
    )


def test_adapters_may_be_frozen_in_a_later_phase(tmp_path):
    pytest.importorskip("peft")
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    first = build(freeze=False, lora=lora)
    step(first)
    tiny.save(first, tmp_path / "first.pth")
    config = section(freeze=True, lora=lora)
    config["checkpoint"] = str(tmp_path / "first.pth")
    second = NeucoreModel.from_config(config)
    assert not trained(second.backbone)
    tiny.save(second, tmp_path / "second.pth")
    again = NeucoreModel.from_checkpoint(tmp_path / "second.pth").eval()
    with torch.no_grad():
        assert torch.equal(again.backbone.text(TEXTS)["sentence"], first.eval().backbone.text(TEXTS)["sentence"])
