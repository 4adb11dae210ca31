"""Tiny CLIPs of random weights: the host's own, and our towers on the same weights."""

from functools import partial

import torch
from encoder_case import encoder
from lavis.models.clip_models import model as host_clip

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
VIT = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
RESNET = {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8}, "text_cfg": TEXT}
clip_image, clip_text = partial(encoder, "image", "clip"), partial(encoder, "text", "clip")


def host_model(config, **more):
    torch.manual_seed(0)
    model = host_clip.CLIP(**config, **more).eval()
    for name, value in model.named_parameters():  # bn3 begins at zero: its branch would not count
        if name.endswith("bn3.weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


def write_hosts(folder):
    """{name: (the host's model, the file of its weights)}."""
    found = {}
    for name, config in (("vit", VIT), ("resnet", RESNET)):
        model = host_model(config)
        torch.save(model.state_dict(), folder / f"{name}.pt")
        found[name] = (model, str(folder / f"{name}.pt"))
    return found


def image(hosts, name, **settings):
    return clip_image(config=VIT if name == "vit" else RESNET, pretrained=hosts[name][1], **settings).eval()


def text(hosts, **settings):
    return clip_text(config=VIT, pretrained=hosts["vit"][1], **settings).eval()


def pixels(count, side):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
