"""A tiny retrieval model whose score is known in closed form, and a folder of pictures for it."""

import numpy as np
import torch
from PIL import Image
from torch import nn

COLOURS = {"red": (250, 0, 0), "green": (0, 240, 0), "blue": (0, 0, 230), "grey": (90, 90, 90), "pink": (250, 120, 130)}


class ColourModel(nn.Module):
    """Encodes a picture as its mean colour; a query is colour + named colours, the score the negative distance."""

    def __init__(self, name="colours-1"):
        super().__init__()
        self.name = name
        self.noise = nn.Dropout(0.9)  # shows when the model is not in eval mode
        self.frozen = nn.Dropout(0.9).eval()
        self.encoded = []
        self.device = torch.device("cpu")
        self.train()
        self.frozen.eval()

    def fingerprint(self):
        return self.name

    def image_processor(self, image):
        assert image.mode == "RGB"
        return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32).copy()).permute(2, 0, 1) / 255

    def encode_image(self, pixels):
        assert torch.is_inference_mode_enabled()
        self.encoded.append(len(pixels))
        return {"fg": self.noise(pixels.mean((2, 3))), "bg": self.frozen(pixels.amax((2, 3)))}

    def encode_query(self, pixels, texts):
        assert pixels is not None or texts is not None
        count = len(pixels) if pixels is not None else len(texts)
        colour = self.noise(pixels.mean((2, 3))) if pixels is not None else torch.zeros(count, 3)
        for row, text in enumerate(texts or ()):
            for word in text.split():
                colour[row] += torch.tensor(COLOURS[word]) / 255
        return {"fused": colour}

    def score(self, query, gallery):
        assert all(value.dtype == torch.float32 for value in gallery.values())
        return -torch.cdist(query["fused"], gallery["fg"])


def draw(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS.get(colour, colour)).save(path)
    return path


NAMES = ["blue.png", "green.png", "more/Grey.JPG", "more/deep/pink.webp", "red.png"]


def make_folder(root):
    """Five pictures at three depths, and files that are to be passed over."""
    for colour in ("red", "green", "blue"):
        draw(root / f"{colour}.png", colour)
    draw(root / "more" / "Grey.JPG", "grey")
    draw(root / "more" / "deep" / "pink.webp", "pink")
    draw(root / ".thumbnails" / "red.png", "red")
    draw(root / ".hidden.png", "red")
    (root / "notes.txt").write_text("no image")
    return root


def names(hits):
    return [hit.name for hit in hits]
