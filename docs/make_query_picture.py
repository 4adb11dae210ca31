"""The picture of the README: one reference, three relative captions, and what a trained model finds for each.

    python docs/make_query_picture.py output/emoji/RUN/checkpoint_best.pth docs/query.png

Needs `neucore-plugin[emoji]` and a checkpoint of the main job (`sh run.sh emoji`). The gallery is every OpenMoji
drawing; of those that are the same picture, byte for byte, one is kept. Drawings: OpenMoji, CC BY-SA 4.0, credited in
the picture.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from neucore_plugin import load_model
from neucore_plugin.datasets.emoji.drawings import CREDIT, prepare
from neucore_plugin.retrieval import GalleryIndex

REFERENCE = "1F469-200D-1F692.png"  # a woman firefighter
CAPTIONS = ("the same but a man", "with dark skin", "now an astronaut")
SHOWN = 5
CELL, GAP, LEFT, TOP = 168, 14, 330, 74  # pixels
INK, PALE, LINE = (32, 33, 36), (95, 99, 104), (218, 220, 224)


def gallery(folder: Path) -> dict[str, Path]:
    """Name to file; of drawings with the same bytes the first by name."""
    first: dict[bytes, Path] = {}
    for path in [folder / REFERENCE, *sorted(folder.glob("*.png"))]:
        first.setdefault(path.read_bytes(), path)
    return {path.name: path for path in first.values()}


def draw(index: GalleryIndex, count: int) -> Image.Image:
    """The picture: a row a caption, its reference and text on the left, hits and scores on the right."""
    row = CELL + 46
    width = LEFT + (SHOWN + 1) * (CELL + GAP)
    picture = Image.new("RGB", (width, TOP + row * len(CAPTIONS) + 36), "white")
    pen = ImageDraw.Draw(picture)
    title, text, small = (ImageFont.load_default(size) for size in (26, 24, 18))
    pen.text((GAP, 22), "reference + relative caption", INK, title)
    pen.text((LEFT + CELL + 2 * GAP, 22), f"best {SHOWN} of {count:,} drawings, with scores", INK, title)
    reference = index.paths[index.names.index(REFERENCE)]
    for number, caption in enumerate(CAPTIONS):
        top = TOP + number * row
        pen.line([(GAP, top - 10), (width - GAP, top - 10)], LINE, 2)
        _paste(picture, reference, (GAP, top))
        pen.text((GAP + CELL + 12, top + CELL // 2 - 14), f"+ “{caption}”", INK, text)
        for hit in index.search(REFERENCE, caption, k=SHOWN):
            left = LEFT + CELL + GAP + (hit.rank - 1) * (CELL + GAP)
            _paste(picture, hit.path, (left, top))
            pen.text((left + CELL // 2, top + CELL + 4), f"{hit.score:.3f}", PALE, small, anchor="ma")
    pen.text((GAP, picture.height - 30), CREDIT, PALE, small)
    return picture.quantize(64, dither=Image.Dither.NONE)


def _paste(picture: Image.Image, path: Path, place: tuple[int, int]) -> None:
    with Image.open(path) as drawing:
        picture.paste(drawing.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), place)


def main(checkpoint: str, out: str) -> None:
    """Build the index with the checkpoint's model, search, and write the PNG."""
    files = gallery(prepare())
    index = GalleryIndex.build(load_model(checkpoint=checkpoint), files)
    draw(index, len(index)).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
