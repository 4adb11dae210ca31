"""Metrics against slow definitions and cases worked by hand."""

import random

import pytest

from neucore_plugin.common.errors import DataError
from neucore_plugin.evaluation.metrics import SUBSET_AT, mean_average_precision, recall_at


def test_recall():
    ranks = [1, 2, 5, 6, 11, 51]
    assert recall_at(ranks, (1, 5, 10, 50)) == pytest.approx(
        {"R@1": 100 / 6, "R@5": 50.0, "R@10": 400 / 6, "R@50": 500 / 6}
    )
    assert recall_at([2], SUBSET_AT, "R_subset") == {"R_subset@1": 0.0, "R_subset@2": 100.0, "R_subset@3": 100.0}
    with pytest.raises(DataError, match="none is given"):
        recall_at([], (1,))


def test_average_precision_by_hand():
    # right answers 7, 8, 9; found at places 1 and 3 of 5: (1/1 + 2/3) / min(3, k)
    found = mean_average_precision([[7, 0, 9, 1, 2]], [(7, 8, 9)], (1, 2, 5))
    assert found == pytest.approx({"mAP@1": 100.0, "mAP@2": 50.0, "mAP@5": 100 * (1 + 2 / 3) / 3})
    with pytest.raises(DataError, match="AP@5 needs rankings of 5 images, but these have 3"):
        mean_average_precision([[1, 2, 3]], [(1,)], (5,))


def test_mean_average_precision_equals_the_definition():
    draw = random.Random(5)
    rankings = [draw.sample(range(23), 10) for _ in range(41)]
    targets = [draw.sample(range(23), draw.randint(1, 3)) for _ in range(41)]
    for k in (1, 3, 10):
        values = []
        for row, right in zip(rankings, targets, strict=True):
            total = found = 0
            for place, image in enumerate(row[:k], start=1):
                if image in right:
                    found += 1
                    total += found / place
            values.append(total / min(len(right), k))
        expected = 100 * sum(values) / len(values)
        assert mean_average_precision(rankings, targets, (k,))[f"mAP@{k}"] == pytest.approx(expected)
