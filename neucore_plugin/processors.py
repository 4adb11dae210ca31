"""Processors that the host lacks: pictures made square without cutting anything off, and relative captions."""

from typing import Any

from lavis.common.registry import registry  # noqa: F401 - the host must be there before its classes are subclassed
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.images import MAX_PIXELS, Picture, load_for
from neucore_plugin.common.pillow import pillow_as_set_here
from neucore_plugin.common.text import clean_caption
from neucore_plugin.config.data import AUGMENTS, FITS
from neucore_plugin.config.encoders import INTERPOLATIONS, RESIZING_FITS
from neucore_plugin.host.registration import register_processor

LONGEST = 65_535  # of a picture that is made square without being shrunk before, as no JPEG is longer
_BAND = 8_000_000  # pixels of the square that are there at once


@register_processor("cir_image")
class ImageProcessor(BaseProcessor):
    """A picture, of any mode -> normalised pixels [3, image_size, image_size].

    Args:
        image_size: side in pixels. mean, std: of the three channels, for values in [0, 1].
        fit: "pad" to a square on white, "crop" the middle, or "stretch" to a square of `resize`, the centre cropped;
            "shortest": the shorter side resized to `resize`, the centre cropped; "released": as in the authors' code,
            plain RGB padded on white, resized to 8/7 (bilinear), the centre cropped.
        augment: "none", or "crop_flip": resize to 8/7, random crop, random horizontal flip (the paper's training).
        max_pixels: pictures of more are refused.
        interpolation: how pictures are resized. resize: with fit "shortest" or "stretch", at least image_size; None:
            image_size.
    Raises: ConfigError; of a picture that cannot be read ImageError.
    """

    def __init__(
        self,
        image_size: int = 224,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        fit="pad",
        augment="none",
        max_pixels: int = MAX_PIXELS,
        interpolation="bicubic",
        resize=None,
    ) -> None:
        super().__init__()
        if fit not in FITS or augment not in AUGMENTS or interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"cir_image: fit must be one of {', '.join(FITS)}, augment one of {', '.join(AUGMENTS)}, interpolation "
                f"one of {', '.join(INTERPOLATIONS)}; given fit {fit!r}, augment {augment!r}, interpolation "
                f"{interpolation!r}"
            )
        if resize is not None and (fit not in RESIZING_FITS or resize < image_size):
            fits = " or ".join(RESIZING_FITS)
            raise ConfigError(f"cir_image: resize is {resize}; it needs fit {fits}, and at least {image_size}")
        self.image_size, self.mean, self.std, self.fit, self.augment = image_size, tuple(mean), tuple(std), fit, augment
        self.max_pixels, self.interpolation, self.resize = max_pixels, interpolation, resize
        steps = [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        if augment == "crop_flip":
            steps = [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip(), *steps]
        elif fit == "released":
            steps = [transforms.CenterCrop(image_size), *steps]
        self.transform = transforms.Compose(steps)

    @property
    def deterministic(self) -> bool:
        """Whether an image always gives the same pixels, so that features can be cached."""
        return self.augment == "none"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments for evaluation, plain: what a checkpoint keeps."""
        plain = {"image_size": self.image_size, "mean": list(self.mean), "std": list(self.std), "fit": self.fit}
        return plain | {"max_pixels": self.max_pixels, "interpolation": self.interpolation, "resize": self.resize}

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the pixels."""
        usual = self.interpolation == "bicubic" and self.resize is None  # and older caches say nothing of it
        further = "" if usual else f":{self.interpolation}:{self.resize}"
        return f"cir_image:{self.image_size}:{self.mean}:{self.std}:{self.fit}:{self.augment}{further}"

    @property
    def plain(self) -> bool:
        """Whether pictures are to be read as plain RGB: alpha dropped, not turned by EXIF (see `load_image`)."""
        return self.fit == "released"

    def __call__(self, image: Picture) -> Tensor:
        image = load_for(self, image)
        with pillow_as_set_here(self.max_pixels):  # Pillow asks its limit before it crops, too
            return self.transform(self._square(image))

    def _square(self, image: Image.Image) -> Image.Image:
        larger = self.augment != "none" or self.fit == "released"
        side = round(self.image_size * 8 / 7) if larger else self.image_size
        if self.fit == "released":
            return _padded(image, side)
        if self.fit == "pad" and image.width != image.height:
            # Shrunk before it is padded: a square of a panorama's longer side could fill the memory.
            longest = max(image.size)
            shrunk = [max(1, round(edge * side / longest)) for edge in image.size]
            image = image.resize(shrunk, Image.Resampling[self.interpolation.upper()])
            page = Image.new("RGB", (side, side), "white")
            page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = page
        elif self.fit == "shortest":
            image = _centre(image, side, side if larger else self.resize or side, self.interpolation)
        elif self.fit == "stretch" and self.resize and not larger:
            image = image.resize((self.resize,) * 2, Image.Resampling[self.interpolation.upper()])
            image = transforms.CenterCrop(side)(image)
        elif self.fit == "crop" and image.width != image.height:
            image = ImageOps.fit(image, (min(image.size),) * 2)
        if image.size != (side, side):
            resize = transforms.Resize((side, side), InterpolationMode(self.interpolation))
            image = resize(image)
        return image

    @classmethod
    def from_config(cls, cfg=None) -> "ImageProcessor":
        """From a mapping with the constructor's arguments (and the host's `name`)."""
        return cls(**_plain(cfg))


@register_processor("cir_caption")
class CaptionProcessor(BaseProcessor):
    """Relative caption -> one clean line of text, or with `clean` false the raw one, as the released form reads it."""

    def __init__(self, clean: bool = True) -> None:
        super().__init__()
        self.clean = clean

    def __call__(self, caption: str) -> str:
        return clean_caption(caption) if self.clean else caption

    @classmethod
    def from_config(cls, cfg=None) -> "CaptionProcessor":
        """From a mapping with the constructor's arguments (and the host's `name`)."""
        return cls(**_plain(cfg))


def _padded(image: Image.Image, side: int) -> Image.Image:
    """A square of the picture's longer side, white around it, resized (bilinear) to `side`.

    Pillow resizes the rows, then the columns: done here band by band, so that the square is never there as a whole.
    """
    if max(image.size) > LONGEST:
        image = image.copy()
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    longest = max(image.size)
    left, top = (longest - image.width) // 2, (longest - image.height) // 2
    narrow = Image.new("RGB", (side, longest), "white")  # the square, its rows resized
    rows = max(1, _BAND // longest)
    for row in range(0, image.height, rows):
        part = image.crop((0, row, image.width, min(row + rows, image.height)))
        band = Image.new("RGB", (longest, part.height), "white")
        band.paste(part, (left, 0))
        narrow.paste(band.resize((side, part.height), Image.Resampling.BILINEAR), (0, top + row))
    return narrow.resize((side, side), Image.Resampling.BILINEAR)


def _centre(image: Image.Image, side: int, shorter: int, interpolation: str) -> Image.Image:
    """The middle square of a picture whose shorter side is resized to `shorter`."""
    least = min(image.size)
    full = [shorter if edge == least else int(shorter * edge / least) for edge in image.size]  # as torchvision rounds
    starts = [round((edge - side) / 2) for edge in full]
    if max(full) <= 8 * shorter:
        image = image.resize(full, Image.Resampling[interpolation.upper()])
        return image.crop((*starts, *(start + side for start in starts)))
    # Of a panorama the middle alone is computed: the whole could fill the memory.
    scale = [edge / size for edge, size in zip(image.size, full, strict=True)]
    low, high = ([(start + add) * by for start, by in zip(starts, scale, strict=True)] for add in (0, side))
    return image.resize((side, side), Image.Resampling[interpolation.upper()], box=(*low, *high))


def _plain(cfg) -> dict:
    settings = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else dict(cfg or {})
    settings.pop("name", None)
    return settings
