"""The evaluator on a model whose scores are a table full of ties, against sorting names; result files and page."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from runner_case import in_group
from torch.utils.data import DataLoader

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import DataError
from neucore_plugin.config.published import STANDARD
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.evaluation.evaluator import Evaluator
from neucore_plugin.evaluation.ranking import Evaluated, QueryRanks
from neucore_plugin.evaluation.results import _copied, write_results
from neucore_plugin.evaluation.stored import read_run
from neucore_plugin.report import Examples, table_lines, write_report
from neucore_plugin.retrieval.ranks import MISS

NAMES = tuple(f"image-{number}" for number in range(8))
FIRST, SECOND = NAMES[:6], NAMES[2:]  # two groups
QUERIES = [(0, 1, FIRST), (3, 2, FIRST), (7, 2, SECOND), (3, 6, SECOND), (6, 3, SECOND)]  # reference, target, group
ROWS = ("neucore", "text_only", "image_only")


class Red:
    """Image processor: a picture -> the red of its first pixel."""

    fit = "pad"

    def __call__(self, image):
        return torch.tensor(image.getpixel((0, 0))[:1])


class TableModel:
    """Scores are small integers: by the caption's query, the reference, or both."""

    title, device, weights = "neucore", torch.device("cpu"), "table"

    def __init__(self) -> None:
        self.image_processor = Red()
        generator = torch.Generator().manual_seed(5)
        self.by_text = torch.randint(0, 4, (len(QUERIES), len(NAMES)), generator=generator).float()
        self.by_image = torch.randint(0, 4, (len(NAMES), len(NAMES)), generator=generator).float()
        self.encoded = 0

    def eval(self):
        return self

    def fingerprint(self) -> str:
        return self.weights

    def encode_image(self, pixels, **_):
        self.encoded += len(pixels)
        return {"number": pixels[:, 0]}

    def encode_query(self, pixels=None, texts=None, **_):
        rows = torch.zeros(len(texts) if texts is not None else len(pixels), len(NAMES))
        if texts is not None:
            rows = rows + self.by_text[[int(text) for text in texts]]
        if pixels is not None:
            rows = rows + self.by_image[pixels[:, 0]]
        return {"rows": rows}

    def score(self, query, gallery, chunk):
        return query["rows"][:, gallery["number"]]

    def concept_maps(self, reference, texts, candidates):
        return [[] for _ in texts]


@pytest.fixture
def dataset(tmp_path):
    """Pictures tell their place in the gallery by their red, captions the query by its number."""
    paths = tuple(tmp_path / f"{name}.png" for name in NAMES)
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    triplets = [
        Triplet(f"q{number}", NAMES[reference], str(number), (NAMES[target],), members=group)
        for number, (reference, target, group) in enumerate(QUERIES)
    ]
    store = ImageStore(dict(zip(NAMES, paths, strict=True)), Red())
    found = TripletDataset("x", "val", triplets, Gallery(NAMES, paths), store)
    found.credit = "Pictures: nobody"
    return found


def test_two_runs_that_end_at_once_leave_the_results_of_one(tmp_path):
    """results.json and report.html one level up are both of the one or both of the other."""
    shared = tmp_path / "shared"
    shared.mkdir()

    def end(run: int) -> None:
        folder = tmp_path / str(run)
        folder.mkdir()
        paths = [folder / "results.json", folder / "report.html"]
        for path in paths:
            path.write_text(f"{run}\n" * 2000)
        for _ in range(20):
            _copied(paths, shared)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(end, range(3)))
    one, other = ((shared / name).read_text() for name in ("results.json", "report.html"))
    assert one == other


def evaluate(dataset, model=None, evaluator=None, chosen=None, **options) -> Evaluated:
    loader = DataLoader(dataset, batch_size=2, sampler=chosen, collate_fn=dataset.collater)
    return (evaluator or Evaluator(256, 64)).evaluate(model or TableModel(), loader, **options)


def order_by_loop(dataset, model, query: int, row: str, in_group: bool = False) -> list[str]:
    """The gallery, or the five others of the group, by score and then by place."""
    triplet, scores = dataset.triplets[query], torch.zeros(len(NAMES))
    if row != "image_only":
        scores = scores + model.by_text[query]
    if row != "text_only":
        scores = scores + model.by_image[NAMES.index(triplet.reference)]
    names = [name for name in (triplet.members if in_group else NAMES) if name != triplet.reference]
    assert len(names) == (5 if in_group else 7)
    return sorted(names, key=lambda name: (-float(scores[NAMES.index(name)]), NAMES.index(name)))


def test_ranks_and_recalls_of_every_row_by_loop(dataset):
    model = TableModel()
    found = evaluate(dataset, model, partial=True)
    metrics = found.metrics()
    assert tuple(found.rows) == ROWS
    for row in ROWS:
        whole, group = (
            [
                1 + order_by_loop(dataset, model, query, row, in_group).index(triplet.targets[0])
                for query, triplet in enumerate(dataset.triplets)
            ]
            for in_group in (False, True)
        )
        assert [query.rank for query in found.rows[row]] == whole
        assert [query.subset_rank for query in found.rows[row]] == group
        values = metrics if row == "neucore" else metrics[row]
        for k in (1, 2, 3):
            assert values[f"R_subset@{k}"] == pytest.approx(100 * sum(rank <= k for rank in group) / 5)
        assert values["R@5"] == pytest.approx(100 * sum(rank <= 5 for rank in whole) / 5)
        assert values["median_rank"] == sorted(whole)[2] and values["queries"] == 5
    assert metrics["agg_metrics"] == pytest.approx((metrics["R@5"] + metrics["R_subset@1"]) / 2)
    assert len({tuple(query.subset_rank for query in found.rows[row]) for row in ROWS}) == 3  # tells the rows apart


def test_without_groups_the_mean_of_two_recalls_selects(dataset):
    dataset.triplets[2] = replace(dataset.triplets[2], members=(), change="colour")
    metrics = evaluate(dataset).metrics()
    assert not [key for key in metrics if "subset" in key]
    assert metrics["agg_metrics"] == pytest.approx((metrics["R@1"] + metrics["R@10"]) / 2)
    assert set(metrics["per_change"]) == {"colour"} and metrics["per_change"]["colour"]["queries"] == 1


def test_the_gallery_is_encoded_once_until_the_weights_change(dataset):
    model, evaluator = TableModel(), Evaluator(256, 64)
    for weights, encoded in (("table", 8), ("table", 8), ("trained", 16)):
        model.weights = weights
        evaluate(dataset, model, evaluator)
        assert model.encoded == encoded


def test_every_query_is_wanted_once(dataset):
    with pytest.raises(DataError, match="saw 4 of 5 queries; the loader must give each query exactly once"):
        evaluate(dataset, chosen=[0, 1, 3, 4])


def evaluate_part(dataset, parts) -> tuple:
    """In each process of a group: what it found, and how many images it encoded."""
    model = TableModel()
    found = evaluate(dataset, model, chosen=parts[distributed.rank()], partial=True)
    return found.rows, model.encoded


def test_processes_share_the_work_and_all_have_the_whole(dataset, tmp_path):
    """Three processes, one of them without queries."""
    results = in_group(tmp_path, evaluate_part, dataset, ([0, 3], [1, 4, 2], []), world=3)
    assert [rows for rows, _ in results] == [evaluate(dataset, partial=True).rows] * 3
    assert [encoded for _, encoded in results] == [2, 3, 3]  # a third of the gallery each


def test_rankings_for_a_submission(dataset):
    model, evaluator = TableModel(), Evaluator(256, 2)
    whole, groups = evaluator.rank_for_submission(model, dataset, 6, 3)
    for query in range(5):
        order = [NAMES.index(name) for name in order_by_loop(dataset, model, query, "neucore")]
        assert whole[query] == order[:6]
        order = [NAMES.index(name) for name in order_by_loop(dataset, model, query, "neucore", in_group=True)]
        assert groups[query] == order[:3]
    with pytest.raises(DataError, match="a gallery of 8 images cannot give 50 images a query"):
        evaluator.rank_for_submission(model, dataset, 50, 3)


def test_a_miss_by_the_split_is_counted_told_and_shown(dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("neucore_plugin.evaluation.results.SAMPLE", 5)
    dataset.triplets[1] = replace(dataset.triplets[1], targets=(dataset.triplets[1].reference,))
    found = evaluate(TripletDataset("x", "val", dataset.triplets, dataset.gallery, dataset.images))
    assert found.rows["neucore"][1].rank == found.rows["neucore"][1].subset_rank == MISS
    assert found.table["neucore"]["queries"] == 5 and found.table["neucore"]["R@50"] == 80
    (tmp_path / "run").mkdir()
    with caplog.at_level("INFO"):
        write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {})
    kept = read_run(tmp_path / "run")
    assert kept.ranks["splits"]["val"]["rows"]["neucore"]["rank"][1] == 0 and kept.values("val", "R@50")[0][1] == 0
    notice = "1 of 5 queries have their reference as target, which the protocol removes from the ranking; they count"
    assert f"val: {notice}" in caplog.text
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["notices"]["val"][0].startswith(notice)
    page = (tmp_path / "report.html").read_text()
    assert page.count("the target is the reference, which is not ranked") == 1 and page.count("at rank\n") == 4 + 3 + 3


def test_a_submission_ranks_the_reference_where_the_protocol_does(dataset):
    model = TableModel()
    for kept in (True, False):
        dataset.protocol = replace(STANDARD, remove_reference=not kept)
        whole, groups = Evaluator(256, 2).rank_for_submission(model, dataset, 7, 3)
        own = [dataset.reference_position(query) for query in range(5)]
        assert any(place in row for place, row in zip(own, whole, strict=True)) is kept
        assert not any(place in row for place, row in zip(own, groups, strict=True))


def test_result_files_and_page(dataset, tmp_path):
    found = evaluate(dataset, partial=True)
    (tmp_path / "run").mkdir()
    files = write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {"seed": 1})
    assert all(path.is_file() for path in files) and len(files) == 7
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"val": found.table}
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (record["results"], record["seed"], record["per_change"]) == (results, 1, {"val": {}})
    page = (tmp_path / "report.html").read_text()
    assert ">R_subset@3</th>" in page and "Pictures: nobody" in page


def called(ids):
    return {name: f"called {name.partition('-')[2]}" for name in ids}


def unnamed(ids):
    raise DataError("the names are not installed")


def test_ranks_and_examples_are_kept(dataset, tmp_path):
    """Every query's ranks, whose means are the table; the best and the worst examples in order, by name."""
    dataset.names = called
    found = evaluate(dataset, partial=True)
    (tmp_path / "run").mkdir()
    write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {})
    run = read_run(tmp_path / "run")
    assert run.asked("val")["count"] == [5]
    for row, queries in found.rows.items():
        kept = run.ranks["splits"]["val"]["rows"][row]
        assert kept == {"rank": [q.rank for q in queries], "subset_rank": [q.subset_rank for q in queries]}
    for metric in ("R@1", "R@5", "R_subset@1", "R_subset@2"):
        (values,) = run.values("val", metric)
        assert values.mean() == pytest.approx(found.table["neucore"][metric])
    assert run.values("val", "median_rank") is None
    ((split, picks),) = Examples.read(tmp_path / "run" / "examples.json").in_order([])
    ranks = sorted(q.rank for q in found.rows["neucore"])
    assert (split, len(picks["sample"])) == ("val", 4)
    assert [card["rank"] for card in picks["best"]] == ranks[:3]
    assert [card["rank"] for card in picks["worst"]] == ranks[:1:-1]
    assert all(card["reference_name"].startswith("called ") for card in picks["best"])
    assert "called 3 (image-3), score" in (tmp_path / "report.html").read_text()
    dataset.names = unnamed  # what knows them is not installed
    write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {})
    assert "called" not in (tmp_path / "report.html").read_text()


def test_values_that_ranks_do_not_give_are_kept(dataset, tmp_path):
    dataset.protocol = replace(STANDARD, precision_at=(2, 5))
    dataset.triplets[0] = replace(dataset.triplets[0], targets=(NAMES[1], NAMES[4], NAMES[6]))
    found = evaluate(
        TripletDataset("x", "val", dataset.triplets, dataset.gallery, dataset.images, protocol=dataset.protocol)
    )
    (tmp_path / "run").mkdir()
    write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {}, report=False)
    run = read_run(tmp_path / "run")
    for metric in ("mAP@2", "mAP@5", "R@1"):
        (values,) = run.values("val", metric)
        assert len(values) == 5 and values.mean() == pytest.approx(found.table["neucore"][metric], abs=1e-3)
    assert not (tmp_path / "run" / "examples.json").exists()


def test_of_a_large_split_every_nth_query_is_kept(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("neucore_plugin.evaluation.stored.MOST", 2)
    found = evaluate(dataset)
    (tmp_path / "run").mkdir()
    write_results({"val": found}, TableModel(), tmp_path / "run", tmp_path, {})
    run = read_run(tmp_path / "run")
    assert run.asked("val")["every"] == [3]
    ranks = [q.rank for q in found.rows["neucore"]]
    assert run.ranks["splits"]["val"]["rows"]["neucore"]["rank"] == [ranks[0], ranks[3]]


def test_tables_show_subset_columns_only_where_they_are(tmp_path):
    def table(*subset_ranks):
        queries = [QueryRanks(rank, group) for rank, group in zip((1, 7), subset_ranks, strict=True)]
        data = SimpleNamespace(protocol=STANDARD, gallery=SimpleNamespace(ids=NAMES))
        return Evaluated(data, {"neucore": queries}).table

    plain, grouped = table(None, None), table(2, 1)
    assert "R_subset" not in "\n".join(table_lines({"val": plain}))
    head, first, second = table_lines({"cirr": grouped, "val": plain})
    for k, text in ((1, "50.00"), (2, "100.00"), (3, "100.00")):
        end = head.index(f"R_subset@{k}") + len("R_subset@1")
        assert first[:end].endswith(text)
    assert first.split()[2:] == ["50.00", "50.00", "100.00", "100.00", "50.00", "100.00", "100.00", "4.0", "2"]
    assert second.split()[-5:] == ["–", "–", "–", "4.0", "2"] and len({len(line) for line in (first, second)}) == 1
    for name, results, shown in (("a", {"val": plain}, False), ("b", {"cirr": grouped, "val": plain}, True)):
        write_report(tmp_path / f"{name}.html", "A run", results)
        page = (tmp_path / f"{name}.html").read_text()
        assert (">R_subset@1</th>" in page) is shown and ("the query's own group" in page) is shown
        assert "median rank</th>" in page
