"""Encoders and backbones with what their schemas say where a test says nothing: constructors have no defaults."""

import dataclasses

import torch

from neucore_plugin.config.encoders import BACKBONE_SCHEMAS
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.backbones import build_backbone, encoder_class
from neucore_plugin.models.backbones.tuning import Tuning

TUNING = {"name", *(field.name for field in dataclasses.fields(Tuning))}  # the backbone's business


def encoder(side, name, **settings):
    fields = BACKBONE_SCHEMAS[side][name].model_fields
    defaults = {key: field.default for key, field in fields.items() if key not in TUNING and not field.is_required()}
    return encoder_class(side, name)(**{**defaults, **settings})


def complete(sections, **tuning):
    filled = model_defaults({"arch": "neucore", "model_type": "embedded", "backbone": sections})["backbone"]
    return {side: {**settings, **tuning} for side, settings in filled.items()}


@torch.no_grad()
def check_alone(encoder, given):
    """What an encoder gives of several pictures or texts is what it gives of each by itself, without padding."""
    together = encoder(given)
    for row in range(len(given)):
        for key, value in encoder(given[row : row + 1]).items():
            torch.testing.assert_close(together[key][row][: len(value[0])], value[0], atol=1e-5, rtol=0)
    return together


def backbone(sections, *arguments, **settings):
    return build_backbone(complete(sections), *arguments, **settings)
