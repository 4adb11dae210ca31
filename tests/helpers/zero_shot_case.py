"""Baselines that train nothing, on a tiny CLIP of the host and a phi of SEARLE's kind."""

import torch
from clip_case import VIT
from torch import nn

from neucore_plugin.models.baseline import CirBaseline

E, W = VIT["embed_dim"], VIT["text_cfg"]["width"]


def searle(seed=1, first=E, hidden=4 * E, last=W) -> nn.Sequential:
    torch.manual_seed(seed)
    drop = nn.Dropout(0.5)
    parts = (nn.Linear(first, hidden), nn.GELU(), drop, nn.Linear(hidden, hidden), nn.GELU(), drop)
    return nn.Sequential(*parts, nn.Linear(hidden, last)).eval()


def named(phi: nn.Sequential) -> dict:
    return {f"layers.{name}": value for name, value in phi.state_dict().items()}


def build(hosts, method="average", **settings):
    sides = {side: {"name": "clip", "config": VIT, "pretrained": hosts["vit"][1]} for side in ("image", "text")}
    model = CirBaseline.from_config({"method": method, "backbone": sides, **settings})
    return model.eval()
