"""Pictures as small PNG or JPEG data within a page, and maps laid over them."""

import base64
import io
import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.images import Picture, load_image

if TYPE_CHECKING:
    from torch import Tensor

THUMB = 192  # pixels at the longer side: sharp at 96 points on a dense screen
LARGE = 320
_JPEG_QUALITY = 85

log = logging.getLogger(__name__)


class Pictures:
    """Makes embedded pictures, and keeps a list of those that could not be read."""

    def __init__(self, fit: str):
        self.fit = fit
        self.missing: list[str] = []
        self._made: dict[tuple[str | int, int], str | None] = {}

    def thumb(self, picture: Picture, size: int = THUMB) -> str | None:
        """A data address, or None where the picture cannot be read."""
        key = (id(picture) if _in_memory(picture) else str(picture), size)
        if key not in self._made:
            image = self._open(picture)
            if image:
                image.thumbnail((size, size), Image.Resampling.LANCZOS)
            self._made[key] = _data_address(image) if image else None
        return self._made[key]

    def heat(self, picture: Picture, values: "Tensor") -> str | None:
        """The picture as the model saw it, square, with a map [h,w] in [0,1] laid over it."""
        image = self._open(picture)
        return _data_address(heat_overlay(image, values, fit=self.fit)) if image else None

    def _open(self, picture: Picture) -> Image.Image | None:
        try:
            return load_image(picture)
        except ImageError as error:  # the page is still wanted
            name = "a picture given in memory" if _in_memory(picture) else str(picture)
            if name not in self.missing:
                self.missing.append(name)
                log.debug("no thumbnail of %s: %s", name, error)
            return None


def _in_memory(picture: Picture) -> bool:
    return isinstance(picture, Image.Image | bytes | bytearray | memoryview | io.IOBase)


def heat_overlay(image: Image.Image, values: "Tensor", size: int = THUMB, fit: str = "pad") -> Image.Image:
    """A map [h,w] in [0,1] (clamped; NaN counts as 0) over an RGB image made square as `fit` says; side `size`."""
    import torch  # here: a page of what is stored already does without

    if fit in ("pad", "released"):
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    if fit == "released":
        image = ImageOps.crop(image, image.width // 16)  # the centre, 7/8 of the side
    elif fit == "crop":
        image = ImageOps.fit(image, (min(image.size),) * 2)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    grid = torch.as_tensor(values).detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    heat = np.asarray(Image.fromarray(grid.numpy()).resize((size, size), Image.Resampling.BILINEAR))[..., None]
    grey = np.asarray(ImageOps.grayscale(image), dtype=np.float32)[..., None]
    base = 0.45 * np.asarray(image, dtype=np.float32) + 0.55 * (
        0.6 * grey + 0.4 * 255
    )  # paler, so that heat stands out
    stops = [np.interp(heat, (0, 0.5, 1), channel) for channel in ((255, 250, 190), (221, 122, 10), (80, 20, 40))]
    alpha = 0.78 * heat**0.8
    mixed = (1 - alpha) * base + alpha * np.concatenate(stops, axis=-1)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _data_address(image: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller: drawings come out as the one, photographs as the other."""
    kinds = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY, "optimize": True})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        kinds[kind] = stream.getvalue()
    kind = min(kinds, key=lambda name: len(kinds[name]))
    return f"data:image/{kind};base64,{base64.b64encode(kinds[kind]).decode('ascii')}"
