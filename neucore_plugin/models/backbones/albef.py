"""ALBEF's encoders (Li et al., 2021): BLIP's ViT, and the first half of a BERT whose second half reads images.

That second half is not built: it takes no part in reading a text alone. Shapes as in `blip.py`.
"""

from collections.abc import Mapping
from typing import ClassVar

from neucore_plugin.models.backbones.blip import BlipImage, BlipText

URL = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/ALBEF.pth"


class AlbefImage(BlipImage):
    """The class token and the patches of ALBEF's ViT-B/16; `pooled` is the class token. Arguments as for BlipImage."""

    name: ClassVar[str] = "albef"
    urls: ClassVar[dict[str, str]] = {"base": URL}

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        architecture: Mapping[str, int] | None = None,
        projected: bool = False,
        proj_dim: int = 256,
        pretrained: str | None = None,
        load: bool = True,
    ) -> None:
        super().__init__("base", image_size, patch_size, architecture, projected, proj_dim, pretrained, load)


class AlbefText(BlipText):
    """The six layers of ALBEF's BERT that precede its fusion layers. Arguments as for BlipText."""

    name: ClassVar[str] = "albef"
    url: ClassVar[str] = URL
    sizes: ClassVar[dict[str, int]] = {"width": 768, "layers": 6, "heads": 12}
    vocabulary: ClassVar[int] = 30522
    prefix: ClassVar[str] = "text_encoder.bert."
