"""Ranks and top K against slow definitions and cases worked by hand."""

import pytest
import torch

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import ranks
from neucore_plugin.retrieval.ranks import MISS, target_ranks, topk


def ranking(row, left_out=None, among=None):
    """Gallery positions in order: higher score first, then lower position."""
    places = [p for p in range(len(row)) if p != left_out and (among is None or p in among)]
    return sorted(places, key=lambda p: (-row[p], p))


def random_case(seed, queries=41, gallery=23, levels=5):
    """Few score levels, so that most rows are full of ties; some references missing; one to three right answers."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (queries, gallery), generator=draw).float() / 4
    targets, excluded = [], []
    for query in range(queries):
        order = torch.randperm(gallery, generator=draw).tolist()
        targets.append(tuple(order[: 1 + query % 3]))
        excluded.append(None if query % 4 == 0 else order[5])
    return scores, targets, excluded


@pytest.fixture(params=[None, 7])
def chunk(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(ranks, "_CHUNK_QUERIES", request.param)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_target_ranks_equal_the_definition(seed, grouped, chunk):
    scores, targets, excluded = random_case(seed)
    draw = torch.Generator().manual_seed(seed + 10)
    members, expected = [], []
    for query, (row, right, left_out) in enumerate(zip(scores.tolist(), targets, excluded, strict=True)):
        group = set(torch.randperm(len(row), generator=draw).tolist()[: 4 + query % 2]) | {right[0]}
        if left_out is not None:
            group.add(left_out)  # CIRR's members include the reference
        members.append(tuple(group))
        order = ranking(row, left_out, group if grouped else None)
        expected.append(1 + min(order.index(t) for t in right if t in order))
    assert target_ranks(scores, targets, excluded, members if grouped else None).tolist() == expected
    assert len(set(expected)) > (3 if grouped else 5)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 4, 22])
def test_topk_equals_the_definition(seed, k, chunk):
    scores, _, excluded = random_case(seed)
    expected = [ranking(row, left_out)[:k] for row, left_out in zip(scores.tolist(), excluded, strict=True)]
    assert topk(scores, k, excluded).tolist() == expected


def test_topk_without_ties_equals_torch():
    scores = torch.randn(9, 300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(topk(scores, 50), scores.topk(50).indices)
    assert topk(scores, 300).shape == (9, 300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type(dtype):
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]], dtype=dtype)
    assert topk(scores, 3).tolist() == [[1, 2, 3]]
    assert target_ranks(scores, [(2,)]).tolist() == [2]


def test_worked_example():
    #                   0    1    2    3    4
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.1]])
    assert target_ranks(scores, [(2,)]).tolist() == [3]  # 0, 1, then 2: position settles the tie
    assert target_ranks(scores, [(2,)], [0]).tolist() == [2]  # reference ahead of the target leaves
    assert target_ranks(scores, [(2,)], [1]).tolist() == [2]  # reference tied with the target leaves
    assert target_ranks(scores, [(2,)], [4]).tolist() == [3]  # reference behind the target changes nothing
    assert target_ranks(scores, [(2,)], [None]).tolist() == [3]
    assert target_ranks(scores, [(4, 3)], [None]).tolist() == [4]  # the better placed of two right answers
    assert target_ranks(scores, [(3, 2)]).tolist() == [3]  # two right answers that tie: the first one
    assert target_ranks(scores, [(0, 4)], [0]).tolist() == [4]  # a right answer that is the reference does not count
    assert target_ranks(scores, [(3,)], [1], [(4, 3, 2, 1)]).tolist() == [2]  # of a group: 2, 3, 4 remain


def test_an_only_right_answer_that_is_excluded_is_a_miss_at_every_k():
    scores = torch.tensor([[0.9, 0.5, 0.1]] * 4)
    assert target_ranks(scores, [(0,), (0, 2), (2,), (0,)], [0, 0, 0, None]).tolist() == [MISS, 2, 2, 1]
    assert target_ranks(scores[:1], [(0,)], [0], [(0, 1)]).tolist() == [MISS]
    assert MISS > 10**12


def test_infinite_scores_keep_their_order():
    low, high = -torch.inf, torch.inf
    scores = torch.tensor([[low, low, high, 0.0], [low, low, low, low]])
    assert topk(scores, 3, [0, 1]).tolist() == [[2, 3, 1], [0, 2, 3]]
    assert target_ranks(scores, [(1,), (3,)], [0, 1]).tolist() == [3, 3]


def test_memory_chunk_follows_the_gallery(monkeypatch):
    monkeypatch.setattr(ranks, "_CHUNK_CELLS", 100)
    assert [s.stop - s.start for s in ranks._chunks(5, 50)] == [2, 2, 1]
    assert [s.stop - s.start for s in ranks._chunks(2, 1000)] == [1, 1]  # a row is the least


def nan_scores():
    scores = torch.zeros(3, 4)
    scores[2, 1] = torch.nan
    return scores


BAD = [
    (lambda: target_ranks(nan_scores(), [(0,)] * 3), "scores of query 2 contain NaN"),
    (lambda: topk(nan_scores(), 2), "scores of query 2 contain NaN"),
    (
        lambda: target_ranks(torch.zeros(1, 4), [(4,)]),
        "query 0: targets names gallery position 4, but the gall",
    ),
    (lambda: target_ranks(torch.zeros(1, 4), [(-1,)]), "gallery position -1"),
    (lambda: target_ranks(torch.zeros(1, 4), [(1,)], [9]), "excluded names gallery position 9"),
    (lambda: target_ranks(torch.zeros(2, 4), [(1,), ()]), "query 1 has no right answer in the gallery"),
    (lambda: target_ranks(torch.zeros(1, 4), [(1, 2)], [1], [(0, 1)]), "query 0 has no right answer among"),
    (lambda: target_ranks(torch.zeros(2, 4), [(1,)]), "targets: 1 lists for 2 queries"),
    (lambda: target_ranks(torch.zeros(2, 4), [(1,)] * 2, [None]), "excluded: 1 lists for 2 queries"),
    (lambda: target_ranks(torch.zeros(1, 4), [(1,)], None, [(0, 2)]), "no right answer among its group members"),
    (lambda: topk(torch.zeros(1, 4), 5), r"k=5: the gallery has 4 images; give k from 1 to 4"),
    (lambda: topk(torch.zeros(2, 4), 4, [None, 0]), r"k=4: the gallery has 3 images without the reference"),
    (lambda: topk(torch.zeros(1, 4), 0), "k=0"),
    (lambda: topk(torch.zeros(1, 0), 1), r"neither side empty; given float32 \(1, 0\)"),
    (lambda: topk(torch.zeros(1, 4, dtype=torch.long), 1), "given int64"),
    (lambda: topk(torch.zeros(4), 1), "matrix"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()
