"""ALBEF's encoders (Li et al., 2021): BLIP's ViT, and the first half of a BERT whose second half reads images.

That second half is not built: it takes no part in reading a text alone. Shapes as in `blip.py`.
"""

from typing import Any

from neucore_plugin.models.backbones.blip import BlipImage, BlipText

URL = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/ALBEF.pth"


class AlbefImage(BlipImage):
    """The class token and the patches of ALBEF's ViT-B/16; `pooled` is the class token. Arguments as for BlipImage."""

    name = "albef"
    urls = {"base": URL}  # noqa: RUF012

    def __init__(self, load: bool = True, **settings: Any) -> None:
        super().__init__(vit="base", load=load, **settings)


class AlbefText(BlipText):
    """The six layers of ALBEF's BERT that precede its fusion layers. Arguments as for BlipText."""

    name = "albef"
    url = URL
    layers = 6
    vocabulary = 30522
    prefix = "text_encoder.bert."
