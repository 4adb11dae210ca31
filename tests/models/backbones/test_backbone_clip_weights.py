"""CLIP's weights: state dicts, OpenAI's archives, wrong and missing files, no network."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from clip_case import RESNET, TEXT, VISION, VIT, clip_image, clip_text, host_clip, host_model, pixels, text, write_hosts
from lavis.models.clip_models import pretrained as published
from lavis.models.clip_models.tokenizer import tokenize

from neucore_plugin.common.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return write_hosts(tmp_path_factory.mktemp("clip"))


def test_random_weights_are_announced(hosts):
    with pytest.warns(UserWarning, match="image.pretrained is 'none': CLIP's image tower has random weights"):
        assert clip_image(config=VIT, pretrained="none").in_checkpoint
    with pytest.warns(UserWarning, match="text.pretrained is 'none': CLIP's text tower has random weights"):
        assert clip_text(config=VIT, pretrained="none").in_checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_text(config=VIT, pretrained="none", load=False)
        assert text(hosts).in_checkpoint  # a file of one's own: nobody could fetch it again
        clip_image(config=VIT, pretrained="/nowhere/clip.pt", load=False)  # a checkpoint brings the weights


def test_half_precision_weights_are_read_as_single(hosts, tmp_path):
    torch.save({k: v.half() for k, v in hosts["vit"][0].state_dict().items()}, tmp_path / "half.pt")
    encoder = clip_image(config=VIT, pretrained=str(tmp_path / "half.pt"))
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(encoder.visual.proj, hosts["vit"][0].visual.proj, atol=1e-3, rtol=0)


def test_weights_of_another_network_are_refused(hosts, tmp_path):
    file = hosts["vit"][1]
    deeper = {**VIT, "vision_cfg": {**VISION, "layers": 3}, "text_cfg": {**TEXT, "layers": 3}}
    shallower = {**VIT, "vision_cfg": {**VISION, "layers": 1}, "text_cfg": {**TEXT, "layers": 1}}
    for kind in (clip_image, clip_text):
        with pytest.raises(
            CheckpointError, match=r"vit.pt holds weights of another network.\n  missing in the file: .*resblocks.2"
        ):
            kind(config=deeper, pretrained=file)
        with pytest.raises(CheckpointError, match=r"another network.\n  unknown to the model: .*resblocks.1"):
            kind(config=shallower, pretrained=file)
    with pytest.raises(CheckpointError, match="other shape: visual.proj"):
        clip_image(config={**VIT, "embed_dim": 32}, pretrained=file)
    with pytest.raises(CheckpointError, match="missing in the file: visual.bn1"):
        clip_image(config=RESNET, pretrained=file)
    torch.save({"visual.positional_embedding": torch.zeros(8, 64)}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="odd.pt: its table of 7 positions is no square"):
        clip_image(config=VIT, pretrained=str(tmp_path / "odd.pt"))
    (tmp_path / "cut.pt").write_bytes(Path(file).read_bytes()[:4000])
    with pytest.raises(CheckpointError, match="cut.pt is truncated, damaged, or no file of weights"):
        clip_text(config=VIT, pretrained=str(tmp_path / "cut.pt"))
    with pytest.raises(CheckpointError, match=r"model.backbone.text.pretrained: no file .*gone.pt; .*'none'"):
        clip_text(config=VIT, pretrained=str(tmp_path / "gone.pt"))


def offline(*args, **kwargs):
    raise OSError("Network is unreachable")


@pytest.mark.parametrize(("kind", "side"), [(clip_image, "image"), (clip_text, "text")])
def test_without_a_network_the_remedies_are_named(kind, side, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    url = published.get_pretrained_url("ViT-B-32", "openai")
    with pytest.raises(CheckpointError) as caught:
        kind()
    for part in (f"model.backbone.{side}.pretrained", url, str(tmp_path / "hub/checkpoints/ViT-B-32.pt"), "'none'"):
        assert part in str(caught.value)


class Holder(torch.nn.Module):
    """A scripted module with the weights of the host's model, as OpenAI's files are."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *outer, last = name.split(".")
            part = self
            for step in outer:
                if step not in part._modules:
                    part.add_module(step, torch.nn.Module())
                part = part._modules[step]
            part.register_buffer(last, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def archive(hosts, tmp_path, monkeypatch):
    """A tiny TorchScript archive in the cache, where a table of OpenAI's is made to point."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    state = {name: value.half() for name, value in hosts["vit"][0].state_dict().items()}
    state["input_resolution"] = torch.tensor(32)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Holder(state)).save(str(path))
    monkeypatch.setitem(host_clip._MODEL_CONFIGS, "tiny", VIT)

    def known(digest):
        monkeypatch.setitem(
            published._PRETRAINED,
            "tiny",
            {"openai": f"https://openaipublic.azureedge.net/clip/models/{digest}/tiny.pt"},
        )

    return path, known


@torch.no_grad()
def test_openais_archives_are_read_where_their_sum_is_known(hosts, archive):
    path, known = archive
    known(hashlib.sha256(path.read_bytes()).hexdigest())
    encoder, images = clip_image(arch="tiny").eval(), pixels(2, 32)
    assert encoder.quick_gelu
    assert not encoder.in_checkpoint  # anybody can fetch it again
    host = host_model(VIT, quick_gelu=True)
    host.load_state_dict({name: value.half() for name, value in hosts["vit"][0].state_dict().items()})
    torch.testing.assert_close(encoder(images)["pooled"], host.encode_image(images), atol=1e-5, rtol=0)
    words = clip_text(arch="tiny").eval()
    torch.testing.assert_close(words(["red"])["sentence"], host.encode_text(tokenize(["red"])), atol=1e-5, rtol=0)
    moved = path.rename(path.with_name("mine.pt"))
    assert clip_image(arch="tiny", pretrained=str(moved), quick_gelu=True).fingerprint == encoder.fingerprint
    with pytest.raises(ConfigError, match=r"mine.pt is OpenAI's.*set model.backbone.image.quick_gelu: true"):
        clip_image(arch="tiny", pretrained=str(moved))


def test_other_archives_are_refused(archive):
    path, known = archive
    known("0" * 64)
    with pytest.raises(CheckpointError, match="tiny.pt: its sha256 is .* damaged, or another file"):
        clip_image(arch="tiny")
    with pytest.raises(CheckpointError, match="tiny.pt is refused: a TorchScript archive may run code"):
        clip_text(arch="tiny", pretrained=str(path), quick_gelu=True)
