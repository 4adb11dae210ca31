"""The command `models`: every type, what it says of its sizes, and that it costs no import of torch."""

import subprocess
import sys

import hub_case
import pytest
import torch
from encoder_case import complete

from neucore_plugin.cli import main
from neucore_plugin.commands.models import COLUMNS, described
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.config.sections import model_types
from neucore_plugin.models.backbones import build_backbone, own_pixels

ROWS = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in described()}
EMBEDDED = {"image": {"name": "efficientnet_lite0"}, "text": {"name": "minilm_l6"}}


def test_every_type_has_a_line(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = {*model_types("neucore"), *model_types("cir_baseline")}
    assert [line.split()[0] for line in lines[1:-2]] == sorted(known)
    assert all(all(row.values()) for row in ROWS.values())
    assert "google/siglip2-base-patch16-224" in next(line for line in lines if line.startswith("siglip2_b16_cirr"))


def test_neither_torch_nor_the_host_is_imported():
    code = "import sys; from neucore_plugin.cli import main; main(['models']); "
    code += "print({'torch', 'lavis'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def section(name):
    """The type's encoders with random weights of the published sizes, from configs that need no file."""
    backbone = model_defaults({"arch": "neucore", "model_type": name})["backbone"]
    own = {"siglip2_b16_cirr": {"model_type": "siglip"}, "dinov2_b14_minilm": {"model_type": "dinov2"}}
    for encoder in backbone.values():
        if encoder["name"] == "open_clip":
            encoder["pretrained"] = "none"
        elif encoder["name"] == "huggingface":
            encoder |= {"repo": None, "config": own[name], "pretrained": "none"}
    return backbone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("openclip_vitb32_cirr", marks=hub_case.needs_open_clip),
        pytest.param("siglip2_b16_cirr", marks=hub_case.needs_transformers),
        pytest.param("dinov2_b14_minilm", marks=hub_case.needs_transformers),
        "embedded",
    ],
)
def test_the_sizes_that_are_told_are_the_encoders(name, tmp_path):
    backbone, sides = section(name), ("image", "text")
    if name == "siglip2_b16_cirr":  # its tokenizer is a file
        from transformers import SiglipTextConfig

        backbone["text"], sides = EMBEDDED["text"], ("image",)
        assert str(SiglipTextConfig().hidden_size) == ROWS[name]["words"]
    built = build_backbone(complete(backbone))
    told = {"image": f"{built.image.num_tokens} x {built.image.width}", "text": str(built.text.width)}
    assert [told[side] for side in sides] == [ROWS[name][key] for key in ("tokens", "words")][: len(sides)]
    assert str(built.image.image_size) == ROWS[name]["pixels"]
    assert torch.isfinite(torch.tensor(built.image.mean)).all()


@hub_case.needs_open_clip
@pytest.mark.parametrize("name", ["openclip_vitb32_cirr", "openclip_vitb32_fashioniq"])
def test_pixels_of_a_type_are_those_of_its_tag(name):
    """They stand in the yaml for the host's load_model_and_preprocess, which reads nothing else."""
    image = model_defaults({"arch": "neucore", "model_type": name})["backbone"]["image"]
    said = own_pixels({key: image[key] for key in ("name", "arch", "config", "pretrained")})
    assert {key: said[key] for key in said} == {key: image[key] for key in said}
