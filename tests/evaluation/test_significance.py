"""Bootstrap and Holm against enumeration of all resamples, closed forms, and cases worked by hand."""

import itertools
import math

import numpy as np
import pytest

from neucore_plugin.common.errors import DataError
from neucore_plugin.evaluation.significance import bootstrap, hits, holm, paired_bootstrap, spread


def every_resample(differences):
    """Means of all Q^Q equally likely resamples."""
    return np.array([np.mean(draw) for draw in itertools.product(differences, repeat=len(differences))])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([100, 100, 0, 100, 0], [0, 100, 0, 0, 0]),
        ([100, 0, 0, 100, 100], [0, 100, 100, 100, 0]),
        ([12.5, 50, 100, 0, 33.0], [25, 25, 0, 0, 40]),  # average precisions
    ],
)
def test_interval_and_p_are_those_of_all_resamples(ours, theirs):
    found = paired_bootstrap(ours, theirs, draws=200_000)
    differences = np.subtract(ours, theirs)
    means = every_resample(differences)
    assert found.mean == pytest.approx(differences.mean())
    exact = np.mean(np.abs(means - differences.mean()) >= abs(differences.mean()) - 1e-9)
    assert found.p == pytest.approx(exact, abs=0.005)
    for value, share in ((found.low, 0.025), (found.high, 0.975)):  # as a quantile of a step function: by its share
        below, upto = np.mean(means < value - 1e-9), np.mean(means <= value + 1e-9)
        assert below - 0.002 <= share <= upto + 0.002


def test_large_sets_approach_the_normal_law():
    random = np.random.default_rng(3)
    ours, theirs = (hits(random.integers(1, 4, 4000), k) for k in (2, 1))
    found = paired_bootstrap(ours, theirs)
    error = (ours - theirs).std() / math.sqrt(4000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.03)
    alone = bootstrap(ours)
    share = ours.mean() / 100
    half = 196 * math.sqrt(share * (1 - share) / 4000)
    assert (alone.low, alone.high) == pytest.approx((ours.mean() - half, ours.mean() + half), abs=0.1)


def test_p_is_even_where_nothing_differs_and_small_where_much_does():
    """Under the null hypothesis a share of about 0.05 has p <= 0.05."""
    random = np.random.default_rng(11)
    found = [
        paired_bootstrap(hits(random.integers(1, 3, 300), 1), hits(random.integers(1, 3, 300), 1), draws=999).p
        for _ in range(400)
    ]
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)
    clear = paired_bootstrap([100.0] * 30 + [0.0] * 10, [0.0] * 40, draws=999)
    assert clear.p == 1 / 1000 and clear.low > 0  # never 0: the mean itself is one of the draws


def test_equal_runs_do_not_differ():
    ours = [0.0, 100.0, 100.0]
    found = paired_bootstrap(ours, ours)
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    third = 100 / 3
    seeds = np.array([[third, 0.1], [0.2, 0.3], [0.7, third]])
    assert paired_bootstrap(seeds, seeds[::-1].copy()).p == 1  # what floats add to a sum is no difference


def test_pairing_counts():
    """Two runs that differ on few of many hard queries: unpaired the difference would drown."""
    base = np.array([100.0] * 500 + [0.0] * 500)
    ours = base.copy()
    ours[500:515] = 100
    found = paired_bootstrap(ours, base)
    assert found.mean == pytest.approx(1.5) and found.p < 0.001
    assert found.low < 1.5 < found.high
    assert bootstrap(ours).low < base.mean()


def test_seeds_are_averaged_a_query():
    ours = np.array([[100, 0, 100], [100, 100, 0]])
    theirs = np.array([[0, 0, 100], [100, 0, 0], [0, 0, 50]])
    found = paired_bootstrap(ours, theirs)
    assert found == paired_bootstrap([100, 50, 50], [100 / 3, 0, 50])
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert spread([3.0]) is None


def test_means_over_splits_resample_each():
    """As enumerating both splits: the small one weighs as much as the large one."""
    first, second = np.array([100.0, 0.0, 0.0]), np.array([0.0, 100.0])
    zero = [np.zeros(3), np.zeros(2)]
    found = paired_bootstrap([first, second], zero, draws=200_000)
    means = np.array([(a + b) / 2 for a in every_resample(first) for b in every_resample(second)])
    assert found.mean == pytest.approx((100 / 3 + 50) / 2)
    assert found.p == pytest.approx(np.mean(np.abs(means - found.mean) >= found.mean - 1e-9), abs=0.005)


def test_the_same_seed_gives_the_same_draws_in_any_order_of_queries():
    random = np.random.default_rng(0)
    ours, theirs = random.random(50).round(3), random.random(50).round(3)
    turned = random.permutation(50)
    first = paired_bootstrap(ours, theirs)
    assert first == paired_bootstrap(ours[turned], theirs[turned])
    assert first != paired_bootstrap(ours, theirs, seed=1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_hits():
    assert hits([[1, 2, 0], [11, 10, 3]], 10).tolist() == [[100, 100, 0], [0, 100, 100]]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1, 2, 3], [1, 2], r"the same queries on both sides, given numbers of queries \[3\] and \[2\]"),
        ([], [], r"given the shape \(1, 0\)"),
        ([[[1.0]]], [1.0], r"given the shape \(1, 1, 1\)"),
        ([1.0, math.nan], [1.0, 2.0], "finite"),
        ([np.ones(2), np.ones(3)], np.ones(5), r"\[2, 3\] and \[5\]"),
    ],
)
def test_what_cannot_be_paired_is_refused(ours, theirs, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(ours, theirs)
