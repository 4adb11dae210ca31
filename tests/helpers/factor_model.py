"""A retrieval model of random projections whose score is the one of `Matching`, and a gallery of random images."""

import numpy as np
import torch

from neucore_plugin.clauses import clauses
from neucore_plugin.models.composers import Artemis
from neucore_plugin.models.matching import Matching
from neucore_plugin.retrieval import GalleryIndex

D = 16
TERMS = ("fused", "explicit", "background")
IMPLICIT = ("fused", "explicit", "implicit")  # up to three clauses a text
CLAUSES = (*IMPLICIT, "change")
ARTEMIS = ("explicit", "implicit")


class FactorModel:
    """Pictures and texts as fixed random projections of their pixels and letters."""

    device = torch.device("cpu")

    def __init__(self, terms=TERMS, name="factors-1"):
        self.name = name
        with torch.random.fork_rng():
            torch.manual_seed(1)
            settings = {"temperature": 1.0, "learn_temperature": False}
            if tuple(terms) == ARTEMIS:
                made = Artemis(dim=D, **settings)
            else:
                made = Matching(dim=D, terms=list(terms), released=False, **settings)
            self.matching = made.requires_grad_(False)
            self.see, self.read = torch.randn(48, 2 * D), torch.randn(26, D)
        self.score = self.matching.score
        self.query_factors, self.gallery_factors = self.matching.query_factors, self.matching.gallery_factors

    def fingerprint(self):
        return self.name

    def image_processor(self, image):
        return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32).copy()).flatten() / 255 - 0.5

    def encode_image(self, pixels):
        fg, bg = (pixels @ self.see).chunk(2, dim=1)
        return {"fg": fg, "bg": bg}

    def encode_query(self, pixels, texts):
        rows = len(texts if pixels is None else pixels)
        seen = torch.zeros(rows, 2 * D) if pixels is None else pixels @ self.see
        said = torch.zeros(rows, 3, D)
        for row, text in enumerate(texts or ()):
            for number, part in enumerate(clauses(text, 3)):
                for letter in part:
                    said[row, number] += self.read[ord(letter) % 26]
        fused, background = seen.chunk(2, dim=1)
        return self.compose(fused, said, background)

    def compose(self, fused, said, background):
        """Of a reference [Q,D] each, of a text's clauses [Q,C,D], 0 where there is none."""
        whole = said.sum(1)
        if isinstance(self.matching, Artemis):
            return self.matching(pooled=fused, sentence=whole)
        if {"implicit", "change"} & set(self.matching.terms):
            return self.matching.query(fused + whole, said, fused, said.any(-1), whole, fused)
        return self.matching.query(fused + whole, whole, background)


def random_index(folder, model, count=600, seed=0, copies=3):
    """A saved index of `count` images, the first of which stands `copies` times: ties."""
    made = torch.Generator().manual_seed(seed)
    fg, bg = torch.randn(count, D, generator=made), torch.randn(count, D, generator=made)
    fg[:copies], bg[:copies] = fg[0], bg[0]
    fg[copies] = 0.0  # an image without a foreground
    names = [f"{number:04d}.jpg" for number in range(count)]
    attributes = [
        {"price": number, "category": ("dress", "shirt")[number % 2], "tags": ["new"] if number % 3 == 0 else []}
        for number in range(count)
    ]
    fingerprint = model.fingerprint()
    index = GalleryIndex(
        names, names, {"fg": fg, "bg": bg}, None, folder.parent / "pictures", (), fingerprint, attributes
    )
    index.save(folder)
    return GalleryIndex.open(folder, model)
