"""Whether two methods differ by more than the choice of queries: paired bootstrap, Holm's correction. numpy alone.

Q queries, S runs of one method (seeds), U different values, N draws. A value is what a metric's mean is made of: 100 or
0 for a hit at K or none, or a query's average precision, in percent.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neucore_plugin.common.errors import DataError

DRAWS, SEED, LEVEL = 10_000, 0, 0.95
_CELLS = 1 << 22  # numbers drawn at a time: 32 MB
_DIGITS = 9  # differences that agree so far are one value: what sums of floats add is no difference

Values = Any  # an array-like [Q] or [S,Q]; a list of such arrays where a metric is the mean of several splits


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval at `LEVEL`, and p (two-sided) of its being 0, all in the unit of the values."""

    mean: float
    low: float
    high: float
    p: float

    def plain(self) -> dict[str, float]:
        """As a mapping, for JSON."""
        return asdict(self)


def hits(ranks: Any, k: int) -> np.ndarray:
    """Ranks [...] from 1 (0: not ranked) -> 100.0 where within the first `k`, else 0.0."""
    ranks = np.asarray(ranks)
    return np.where((ranks >= 1) & (ranks <= k), 100.0, 0.0)


def paired_bootstrap(
    values: Values, baseline: Values, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL
) -> Estimate:
    """How much higher the mean of `values` is than that of `baseline`, by resampling the queries that both answered.

    Either is [Q], or [S,Q] of several seeds, whose mean over S a query has: seeds stay together, so the interval speaks
    of the choice of queries, and the spread over seeds is told apart (`spread`). Where both are lists of arrays, one a
    split, the queries of each are resampled by themselves and the splits' means averaged (FashionIQ).

    The interval is that of percentiles. p is the share of draws that, centred at 0, lie as far out as the mean itself,
    the mean itself counted as one of them (Davison and Hinkley 1997, section 4.4). The same seed gives the same draws.
    Raises DataError where the queries of both are not as many, there is none, or a value is not finite.
    """
    ours, theirs = _strata(values), _strata(baseline)
    if [part.shape[1] for part in ours] != [part.shape[1] for part in theirs]:
        given = " and ".join(str([part.shape[1] for part in side]) for side in (ours, theirs))
        raise DataError(f"paired values need the same queries on both sides, given numbers of queries {given}")
    return _bootstrap([a.mean(0) - b.mean(0) for a, b in zip(ours, theirs, strict=True)], draws, seed, level)


def bootstrap(values: Values, draws: int = DRAWS, seed: int = SEED, level: float = LEVEL) -> Estimate:
    """The mean of `values` and its interval; as `paired_bootstrap`, of one method alone."""
    return _bootstrap([part.mean(0) for part in _strata(values)], draws, seed, level)


def spread(means: Sequence[float]) -> float | None:
    """Standard deviation of the means of several seeds, with S - 1 below; None for a single one."""
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """p values, each corrected for all being tested at once (Holm 1979), in the order given.

    Below 0.05 afterwards: real, with at most 5 % chance that any of those called real is not.
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for place, number in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[number]))
        corrected[number] = highest
    return corrected.tolist()


def _strata(values: Values) -> list[np.ndarray]:
    """[S,Q] arrays, one a split."""
    several = isinstance(values, list | tuple) and len(values) > 0 and all(isinstance(v, np.ndarray) for v in values)
    parts = [np.asarray(part, dtype=np.float64) for part in (values if several else [values])]
    parts = [part[None] if part.ndim == 1 else part for part in parts]
    for part in parts:
        if part.ndim != 2 or not part.size:
            raise DataError(f"a bootstrap needs values [queries] or [seeds, queries], given the shape {part.shape}")
        if not np.isfinite(part).all():
            raise DataError("a bootstrap needs finite values; NaN or infinity is among those given")
    return parts


def _bootstrap(parts: Sequence[np.ndarray], draws: int, seed: int, level: float) -> Estimate:
    random = np.random.default_rng(seed)
    mean = float(np.mean([np.sort(part).mean() for part in parts]))  # sorted: the order of queries moves no digit
    drawn = np.mean([_means(part, draws, random) for part in parts], axis=0)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    slack = 10.0**-_DIGITS
    beyond = np.count_nonzero(np.abs(drawn - mean) >= abs(mean) - slack)
    return Estimate(mean, float(low), float(high), (1 + beyond) / (1 + draws))


def _means(values: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Means [N] of `draws` resamples of values [Q].

    Resampled queries with the same value are one and the same, so how often each of U values comes is drawn at once.
    """
    unique, counts = np.unique(values.round(_DIGITS), return_counts=True)
    chunk = max(1, _CELLS // len(unique))
    parts = [
        random.multinomial(len(values), counts / len(values), size=min(chunk, draws - start)) @ unique
        for start in range(0, draws, chunk)
    ]
    return np.concatenate(parts) / len(values)
