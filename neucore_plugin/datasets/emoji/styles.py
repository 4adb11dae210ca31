"""Other drawings of the same emoji: a folder of pictures named by code point, and how such a folder is made.

`1f468-1f3fd.png`, `U+1F468 U+1F3FD.png` and `emoji_u1f468_1f3fd.png` all name one emoji; variation selectors are
optional, as in every set of drawings. Sources: a colour font with bitmaps (Debian's fonts-noto-color-emoji), or another
folder (an unpacked npm package of Fluent emoji).
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import atomic_write, cache_dir, file_errors, read_json, sha256_text, write_json
from neucore_plugin.common.images import load_image
from neucore_plugin.datasets.emoji.attributes import PRESENTATION, TONES, code_points
from neucore_plugin.datasets.emoji.drawings import NEAR, THUMBNAIL, near_duplicates

_MEDIUM_LIGHT, _MEDIUM = 0x1F3FC, 0x1F3FD
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".gif", ".bmp")
FONTS = (".ttf", ".otf")
NAMES = "1f468-1f3fd.png, U+1F468 U+1F3FD.png or emoji_u1f468_1f3fd.png"
_CODE = re.compile(r"(?:U\+?)?([0-9A-F]{2,6})")
_MOST = 2000  # pixels of a bitmap font's side, to find the size that it has


def codes_of(stem: str) -> tuple[int, ...] | None:
    """Code points of a file's name, variation selectors dropped; None where it names none."""
    parts = [part for part in re.split(r"[-_ ,]+", stem.upper()) if part]
    parts = parts[1:] if parts[:1] == ["EMOJI"] else parts
    found = [_CODE.fullmatch(part) for part in parts]
    if not found or not all(found):
        return None
    codes = tuple(int(match[1], 16) for match in found)
    return tuple(code for code in codes if code != PRESENTATION) if max(codes) <= 0x10FFFF else None


def by_code_points(folder: str | Path) -> dict[tuple[int, ...], Path]:
    """Pictures of a folder, and of those in it, by their emoji; of two names of one emoji the first in order counts.

    Raises DataError where there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give one with pictures named by code point, such as {NAMES}")
    with file_errors(folder, "Another folder of drawings: datasets.emoji.build_info.drawings"):
        files = sorted(
            Path(place, name)
            for place, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(SUFFIXES)
        )
    found: dict[tuple[int, ...], Path] = {}
    for file in files:
        if codes := codes_of(file.stem):
            found.setdefault(codes, file)
    if not found:
        raise DataError(
            f"{folder}: none of its {len(files)} pictures is named by code point ({NAMES}); suffixes that are read: "
            f"{', '.join(SUFFIXES)}"
        )
    return found


def drawings_of(
    folder: str | Path, ids: Iterable[str], cache: str | Path | None = None, progress: bool = True
) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Drawings of those of `ids` that a folder has, by id, and which of them nearly coincide.

    Comparing takes a minute for 4,000 pictures, once: what is found is kept in the cache.
    """
    found = by_code_points(folder)
    files = {name: found[codes] for name in sorted(ids) if (codes := code_points(name)) in found}
    if not files:
        raise DataError(f"{folder}: none of its {len(found)} drawings is an emoji that OpenMoji has")
    facts = ((name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items())
    key = sha256_text("\n".join([str(NEAR), str(THUMBNAIL), *map(repr, facts)]))[:24]
    kept = cache_dir(cache) / "emoji" / f"near-{key}.json"
    if not kept.is_file():
        names, small = list(files), np.zeros((len(files), THUMBNAIL * THUMBNAIL * 3), dtype=np.uint8)
        for row, name in enumerate(tqdm(names, "comparing drawings", unit="drawing", disable=not progress)):
            picture = square(load_image(files[name]), THUMBNAIL, Image.Resampling.BOX)
            small[row] = np.asarray(picture).reshape(-1)
        near = {names[row]: [names[other] for other in others] for row, others in near_duplicates(small).items()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, near)
    return files, read_json(kept, dict, f"delete {kept}: it is made anew")


def square(picture: Image.Image, side: int, how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """An RGB picture padded on white to a square of `side` pixels."""
    return ImageOps.pad(picture, (max(picture.size),) * 2, color="white").resize((side, side), how)


# ---- making such a folder -----------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    out: str | Path,
    wanted: Mapping[str, str],
    image_size: int,
    mend_tones: bool = False,
    progress: bool = True,
) -> int:
    """Drawings of a font or a folder -> OUT/1F468-1F3FD.png, on white; returns how many. What is there is overwritten.

    wanted: {id: the emoji as text}; the font draws these, of a folder those are taken. mend_tones: as in
    `mended`. Raises DataError.
    """
    source, out = Path(source), Path(out)
    if source.suffix.lower() in FONTS:
        draw, names = _font(source), list(wanted)
        pictures: Iterator[tuple[str, Image.Image | None]] = ((name, draw(wanted[name])) for name in names)
    else:
        found = by_code_points(source)
        files = {name: found[codes] for name in wanted if (codes := code_points(name)) in found}
        files, names = mended(files) if mend_tones else files, list(files)
        pictures = ((name, load_image(files[name])) for name in names)
    count = 0
    with file_errors(out, "Give another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in tqdm(pictures, "drawings", total=len(names), unit="drawing", disable=not progress):
            if picture is not None:
                with atomic_write(out / f"{name}.png") as stream:
                    square(picture, image_size).save(stream, "png")
                count += 1
    if not count:
        raise DataError(f"{source}: draws none of the {len(wanted)} emoji; give a colour font of emoji, with bitmaps")
    return count


def mended(files: Mapping[str, Path]) -> dict[str, Path]:
    """The files, of each emoji's medium-light and medium skin the lighter one as medium-light: of almost all emoji of
    Fluent's package they stand under each other's name. Emoji of several tones stay."""
    result = dict(files)
    by_codes = {code_points(name): name for name in files}
    for codes, name in by_codes.items():
        other = by_codes.get(tuple(_MEDIUM if code == _MEDIUM_LIGHT else code for code in codes))
        if codes.count(_MEDIUM_LIGHT) == 1 and len(TONES.keys() & codes) == 1 and other is not None:
            one, two = (np.asarray(square(load_image(files[n]), 64).convert("L"), float) for n in (name, other))
            if one.sum() < two.sum():
                result |= {name: files[other], other: files[name]}
    return result


def _font(path: Path) -> Callable[[str], Image.Image | None]:
    """What draws an emoji with a font of colour bitmaps; None for one that it has not."""
    if not features.check("raqm"):
        raise DataError(f"{path}: sequences of code points need Pillow with raqm; the wheels of pip have it")
    wanted = "give a font of colour bitmaps, such as Debian's fonts-noto-color-emoji"
    font, reason = None, None
    for size in (109, 160, 136, 128, 96, 72, 64):  # a bitmap font has few sizes, mostly one; Noto's is 109
        try:
            font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
            break
        except OSError as error:
            reason = error
    if font is None:
        raise DataError(f"{path}: cannot be read ({reason}); {wanted}")
    face = _drawn(font, "\U0001f600")
    if face is None or not np.ptp(np.asarray(face), axis=2).any():
        raise DataError(f"{path}: draws no colours; {wanted}")
    # Two emoji that the font does not join are twice as wide as one: what is wider is drawn in pieces.
    single, absent = font.getlength("\U0001f600"), _drawn(font, "\U0010fffe")

    def draw(text: str) -> Image.Image | None:
        picture = _drawn(font, text) if font.getlength(text) < 1.5 * single else None
        return None if absent is not None and picture == absent else picture

    return draw


def _drawn(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """On white, cut to the height of the font; None where nothing is drawn."""
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top or max(right, bottom) > _MOST:
        return None
    layer = Image.new("RGBA", (int(right - left), int(bottom - top)), (255, 255, 255, 0))
    ImageDraw.Draw(layer).text((-left, -top), text, font=font, embedded_color=True)
    picture = Image.new("RGB", layer.size, "white")
    picture.paste(layer, mask=layer.getchannel("A"))
    return picture
