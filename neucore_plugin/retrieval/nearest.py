"""The score as one inner product, to first order: what an engine for nearest neighbours can look up.

The score of `query_factors` and `gallery_factors` is cosines . cosines^T + sum_t (weighted_t . weighted^T) /
sqrt(squares_t . squares^T), and where a model has it the change, whose images are taken as equally far from the
reference. Its fractions have the same value for every length of a gallery vector, so that unit vectors do for them, and
sqrt(squares_t . E[squares]) over the gallery stands for a denominator. What is left is linear in the image. Where the
cosines begin with the unit vectors themselves (they do where a model sums the term "fused" and a weighted one), the
fractions add to their columns; elsewhere the unit vectors are columns of their own.

A first stage only says which images are worth scoring: their scores are exact.

Letters: Q queries, G gallery images, D width, W width of the vectors that are looked up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import ConfigError, DataError

TINY = 1e-24  # squared length below which a vector counts as zero
NEAREST = 1e-3  # added to the squared distance from the reference in the change term
Factors = Mapping[str, Tensor]
Parts = Sequence[tuple[float, Factors]]  # a query: factors of one row each, and the sign and weight they count with


@dataclass
class FirstOrder:
    """How images and queries become vectors.

    shared: the cosines begin with the unit vectors of `weighted`. squares: E of their squares [D], None without a
    weighted term; count: over how many images.
    """

    shared: bool
    squares: Tensor | None
    count: int

    @classmethod
    def of(cls, factors: Factors) -> "FirstOrder":
        """For galleries whose `gallery_factors` look like these; the mean is not taken yet: see `gallery`."""
        if "weighted" not in factors:
            return cls(False, None, 0)
        return cls(_is_shared(factors), torch.zeros(factors["weighted"].shape[1], dtype=torch.float64), 0)

    def gallery(self, factors: Factors, learn: bool = True) -> Tensor:
        """`gallery_factors` -> float32 [G,W]; with `learn` they count in the mean. DataError: NaN, or of another kind.

        >>> order = FirstOrder.of({"cosines": torch.eye(2)})
        >>> order.gallery({"cosines": torch.eye(2)}).shape
        torch.Size([2, 2])
        """
        for values in factors.values():
            finite(values, "the gallery")
        columns = [factors["cosines"].float()] if "cosines" in factors else []
        if self.squares is not None:
            units = unit(factors["weighted"].float())
            if learn:
                total = self.count + len(units)
                self.squares += (units.double().square().sum(dim=0) - len(units) * self.squares) / max(total, 1)
                self.count = total
            if not self.shared:
                columns.append(units)
            elif not _is_shared(factors):
                raise DataError("the gallery's factors are not of one kind; build the index again with one model")
        return torch.cat(columns, dim=1)

    def query(self, parts: Parts) -> Tensor:
        """One query -> float32 [W]. DataError: NaN or infinite numbers."""
        total: Tensor | float = 0.0
        for weight, factors in parts:
            rows = {key: value[0].double().cpu() for key, value in factors.items()}
            row = rows.get("cosines")
            change = rows.get("change", 0.0)  # as of images at a distance of 1 from the reference
            if self.squares is None and "change" in rows:  # the cosines are those of the unit vectors
                row = row + torch.nn.functional.pad(change, (0, len(row) - len(change)))
            if self.squares is not None:
                lengths = (rows["squares"] @ self.squares).clamp(min=TINY).sqrt()  # [T]
                explicit = (rows["weighted"] / lengths[:, None]).sum(dim=0) + change
                if row is None:
                    row = explicit
                elif self.shared:
                    row = torch.cat([row[: len(explicit)] + explicit, row[len(explicit) :]])
                else:
                    row = torch.cat([row, explicit])
            total = total + weight * row
        return finite(total.float(), "the query")


def check_factors(model: Any) -> None:
    """ConfigError where a model's score has no factors (others tell the reason themselves, when asked for them)."""
    if not hasattr(model, "gallery_factors") or not hasattr(model, "query_factors"):
        raise ConfigError(
            f"{type(model).__name__} does not say what its score is made of (it has no `gallery_factors`), so that it "
            "cannot be computed elsewhere; search the index exactly"
        )


def unit(x: Tensor) -> Tensor:
    """Of length 1, zero where a vector is zero."""
    return torch.nn.functional.normalize(x, dim=-1, eps=TINY**0.5)


def _is_shared(factors: Factors) -> bool:
    if "cosines" not in factors:
        return False
    units = unit(factors["weighted"].float())
    return torch.allclose(factors["cosines"][:, : units.shape[1]].float(), units, atol=1e-4)


def finite(vectors: Tensor, what: str) -> Tensor:
    """The same; DataError where they are not all finite."""
    if not bool(vectors.isfinite().all()):
        raise DataError(f"{what} holds NaN or infinite numbers; the model's weights are damaged, or the index is")
    return vectors
