"""What is where in an image, for its pooled vector.

G images, N tokens, P cells, Di width of the encoder's tokens, K components of a cell, D width.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.models.layers import check_positive, check_shape
from neucore_plugin.models.negatives import TrainingImages

log = logging.getLogger(__name__)

SIDE = 4  # of the map of cells; a finer map of tokens is averaged
FITTED_ON = 1024  # images
_AT_A_TIME = 512  # images whose tokens are read together


class Layout(nn.Module):
    """A linear layer from the places of an image to its vector, beside the projection of its pooled vector:

    y = W [z_1 ; ... ; z_P],  z_p = C (norm(x_p) - m),

    x_p the mean token of cell p of a map of at most 4 x 4, norm the one of LayerNorm. C and m do not learn: the K
    leading principal components of the training images' cells, scaled so that the entries of z have mean square 1; of
    random signs until `fit`. W starts at zero. A pooled vector alone says what an image shows, not where.

    Args:
        width: Di. grid: rows and columns that the last tokens form. components: K, at most Di. dim: D.
    Raises: ValueError for more components than that.

    Source: ours.
    """

    def __init__(self, *, width: int, grid: tuple[int, int], components: int, dim: int) -> None:
        super().__init__()
        check_positive(width=width, components=components, dim=dim)
        if components > width:
            raise ValueError(f"{components} components of tokens that are {width} wide")
        self.width, self.grid, self.count = width, tuple(grid), components
        self.cells = min(grid[0], SIDE), min(grid[1], SIDE)
        signs = torch.randint(2, (components, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self.register_buffer("components", signs / width**0.5)  # C [K,Di]
        self.register_buffer("offset", torch.zeros(components))  # C m [K]
        self.register_buffer("settled", torch.tensor(False))
        self.linear = nn.Linear(self.cells[0] * self.cells[1] * components, dim, bias=False)  # W
        nn.init.zeros_(self.linear.weight)

    def reduced(self, tokens: Tensor) -> Tensor:
        """tokens [G,N,Di] -> z [G,P*K]; what follows from the encoder alone, so that it can be kept."""
        return (self.cells_of(tokens) @ self.components.T - self.offset).flatten(1)

    def forward(self, reduced: Tensor, kept: Tensor | None = None) -> Tensor:
        """z [G,P*K], kept [G,K] or [1,K], what dropout multiplies the components of all cells by -> [G,D]."""
        if kept is None:
            return self.linear(reduced)
        kept = kept.repeat(1, self.cells[0] * self.cells[1])
        if len(kept) == 1:  # one product less over all images
            return F.linear(reduced, self.linear.weight * kept)
        return self.linear(reduced * kept)

    @torch.no_grad()
    def fit(self, cells: Tensor) -> None:
        """Take C and m from the cells [G,P,Di] of training images, on the CPU."""
        cells = cells.flatten(0, 1).double()
        mean = cells.mean(0)
        centred = cells - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
        values, vectors = values[-self.count :].flip(0), vectors[:, -self.count :].flip(1)
        largest = vectors.abs().argmax(0)
        vectors = vectors * vectors[largest, torch.arange(self.count)].sign()  # they are unique but for the sign
        scale = values.mean().clamp_min(1e-12).rsqrt()
        self.components.copy_(vectors.T * scale)
        self.offset.copy_(mean @ vectors * scale)
        self.settled.fill_(True)

    def fit_on(self, images: TrainingImages | None) -> None:
        """`fit`, on the cached features of a training's images; where they are none (None: a stream's, which are there
        only as they pass) the directions stay random. Once for all: what is trained afterwards relies on them."""
        if self.settled:
            return
        if images is None or not images.cached:
            self.settled.fill_(True)
            log.warning(
                "model.layout: the images' features are not cached, so that their principal components are not known; "
                "random directions are taken, which has helped less. model.layout.components: 0 is the alternative"
            )
            return
        count = len(images.keys)
        rows = torch.linspace(0, count - 1, min(count, FITTED_ON)).round().long().unique()
        self.fit(torch.cat([self.cells_of(images.features(part, "tokens")) for part in rows.split(_AT_A_TIME)]))

    def cells_of(self, tokens: Tensor) -> Tensor:
        """tokens [G,N,Di] -> normalised cells [G,P,Di]."""
        rows, columns = self.grid
        check_shape("image tokens [G,N,Di]", tokens, None, None, self.width)
        places = tokens[:, -rows * columns :]
        if self.cells != self.grid:
            grid = places.transpose(1, 2).unflatten(2, self.grid)
            places = F.adaptive_avg_pool2d(grid, self.cells).flatten(2).transpose(1, 2)
        return F.layer_norm(places, (self.width,))


class KnownLayouts:
    """What `layout` makes of the tokens of a training's images, kept while their features do not change.

    All of them are reduced when the first is asked for, after a checkpoint has been read: [G,P*K] numbers.
    """

    def __init__(self, layout: Layout, images: TrainingImages) -> None:
        self._layout, self._images = layout, images
        self._reduced: Tensor | None = None

    @torch.no_grad()
    def of(self, rows: Tensor) -> Tensor:
        """Of some images, rows [n] of the images' keys -> [n,P*K]."""
        if self._reduced is None:
            device, parts = self._layout.offset.device, torch.arange(len(self._images.keys)).split(_AT_A_TIME)
            tokens = (self._images.features(part, "tokens").to(device) for part in parts)
            self._reduced = torch.cat([self._layout.reduced(part) for part in tokens])
        return self._reduced[rows.to(self._reduced.device)]

    def by_key(self, keys: Tensor) -> Tensor | None:
        """The same by keys [n]; None where one is no image of the training."""
        keys, known = keys.cpu(), self._images.keys
        rows = torch.searchsorted(known, keys).clamp_(max=max(0, len(known) - 1))
        return self.of(rows) if len(known) and torch.equal(known[rows], keys) else None
