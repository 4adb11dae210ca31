"""What runs keep for it, and what `neucore compare` makes of it: groups, pairs, refusals, old runs; report of a run."""

import json
import subprocess
import sys

import numpy as np
import pytest

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.evaluation.comparison import compare, read_groups
from neucore_plugin.evaluation.pages import comparison_page, run_page, run_title, standing
from neucore_plugin.evaluation.significance import hits, paired_bootstrap
from neucore_plugin.evaluation.stored import read_run
from neucore_plugin.report import Examples, comparison_lines

HOSTILE = "<script>alert(1)</script>"
QUERIES = 60


def ranks_of(seed, ahead=0.0):
    """Ranks of QUERIES queries; `ahead`: how much of them are moved to the first place."""
    random = np.random.default_rng(seed)
    ranks = random.integers(1, 30, QUERIES)
    ranks[random.random(QUERIES) < ahead] = 1
    return ranks.tolist()


def row_of(ranks, **more):
    recalls = {f"R@{k}": float(hits(ranks, k).mean()) for k in (1, 5, 10)}
    return {**recalls, "median_rank": float(np.median(ranks)), "queries": len(ranks), **more}


def write_run(
    folder, ranks, seed=1, title="neucore", kept=True, config=None, data="d", splits=("val",), gallery="g", **row
):
    """The files of a finished run, as an evaluation leaves them."""
    folder.mkdir(parents=True)
    config = {"model": {"arch": title}, "run": {"seed": seed, "runner": "runner_cir"}, **(config or {})}
    results = {split: {title: row_of(ranks, **row), "text_only": row_of([3] * len(ranks))} for split in splits}
    record = {"results": results, "per_change": {}, "config": config, "data": dict.fromkeys(splits, data)}
    (folder / "evaluation.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "created": 1.0, "config": config}))
    if kept:
        entry = {
            "protocol": row.get("protocol", "standard"), "queries": "q", "gallery": gallery, "count": len(ranks),
            "every": 1, "rows": {title: {"rank": ranks}, "text_only": {"rank": [3] * len(ranks)}},
        }  # fmt: skip
        content = {"format": "neucore-ranks-1", "means": {}, "splits": dict.fromkeys(splits, entry)}
        (folder / "ranks.json").write_text(json.dumps(content))
    return str(folder)


def test_two_runs(tmp_path):
    ours, theirs = ranks_of(1, 0.5), ranks_of(2)
    given = [write_run(tmp_path / "tirg", theirs, title="tirg"), write_run(tmp_path / "neucore", ours)]
    found = compare(read_groups(given))
    assert (found["baseline"], found["notes"]) == ("TIRG", [])
    assert list(found["splits"]["val"]) == ["R@1", "R@5", "R@10"]
    entry = found["splits"]["val"]["R@1"]["NEUCORE"]
    exact = paired_bootstrap(hits(ours, 1), hits(theirs, 1))
    assert entry["mean"] == pytest.approx(hits(ours, 1).mean()) and entry["spread"] is None
    assert entry["difference"] == pytest.approx(exact.mean)
    assert entry["difference_interval"] == [exact.low, exact.high] and entry["p"] == exact.p == entry["p_holm"]
    assert "difference" not in found["splits"]["val"]["R@1"]["TIRG"]
    lines = "\n".join(comparison_lines(found))
    assert f"{exact.mean:+.2f}*" in lines and "NEUCORE - TIRG" in lines and "<0.001" in lines
    turned = compare(read_groups(given), baseline="NEUCORE", metrics=["R@1"])["splits"]["val"]["R@1"]["TIRG"]
    assert turned["difference"] == pytest.approx(-entry["difference"])


def test_seeds_of_one_config_count_as_one(tmp_path):
    ranks = [ranks_of(seed, 0.3) for seed in range(3)]
    seeds = [write_run(tmp_path / f"s{seed}", ranks[seed], seed=seed) for seed in range(3)]
    other = write_run(tmp_path / "other", ranks_of(9), config={"model": {"arch": "neucore", "form": "released"}})
    found = compare(read_groups([*seeds[:2], other, seeds[2]]))
    assert [len(group["runs"]) for group in found["groups"]] == [3, 1]
    assert found["groups"][0]["seeds"] == [0, 1, 2]
    names = [group["name"] for group in found["groups"]]
    assert names == ["NEUCORE", "NEUCORE, form=released"]
    entry = found["splits"]["val"]["R@1"][names[0]]
    means = [float(hits(row, 1).mean()) for row in ranks]
    assert entry["values"] == pytest.approx(means) and entry["spread"] == pytest.approx(np.std(means, ddof=1))
    joined = found["splits"]["val"]["R@1"][names[1]]
    exact = paired_bootstrap(hits(ranks_of(9), 1), np.stack([hits(row, 1) for row in ranks]))
    assert joined["difference_interval"] == [exact.low, exact.high]
    assert "±" in "\n".join(comparison_lines(found))
    assert len(read_groups([*seeds, other], apart=True)) == 4
    again = write_run(tmp_path / "again", ranks[0], seed=0)  # the same seed once more would feign a small spread
    apart = read_groups([*seeds, again])
    assert [(group.name, len(group.runs)) for group in apart] == [("NEUCORE (s0)", 3), ("NEUCORE (again)", 1)]
    assert "--apart" in compare(read_groups(seeds))["notes"][0]


def test_names_join_runs(tmp_path):
    runs = [write_run(tmp_path / name, ranks_of(n), title=name) for n, name in enumerate(("tirg", "artemis", "arch"))]
    groups = read_groups([f"baselines={runs[0]}", f"baselines={runs[1]}", f"ours={runs[2]}"])
    assert [(group.name, len(group.runs)) for group in groups] == [("baselines", 2), ("ours", 1)]
    odd = write_run(tmp_path / "a=b", ranks_of(5), title="x")
    assert read_groups([odd])[0].name == "x"  # a path, not a name


def test_holm_over_runs_and_splits(tmp_path):
    base, *others = [
        write_run(tmp_path / f"r{n}", ranks_of(n, n / 10), title=f"m{n}", splits=("val", "test")) for n in range(3)
    ]
    found = compare(read_groups([base, *others]), metrics=["R@1"])
    entries = [rows["R@1"][name] for rows in found["splits"].values() for name in ("m1", "m2")]
    least = min(entry["p"] for entry in entries)
    assert min(entry["p_holm"] for entry in entries) == pytest.approx(min(1, 4 * least))


def test_runs_without_ranks_compare_means_alone(tmp_path):
    old = write_run(tmp_path / "old", ranks_of(1), title="tirg", kept=False)
    found = compare(read_groups([old, write_run(tmp_path / "new", ranks_of(2))]))
    entry = found["splits"]["val"]["R@1"]["NEUCORE"]
    assert "difference" in entry and "p" not in entry and "interval" in entry
    assert any("no ranks" in note and str(old) in note for note in found["notes"])
    assert "p (Holm)" not in "\n".join(comparison_lines(found))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "results.json").write_text(json.dumps({"val": {"tirg": row_of(ranks_of(3))}}))
    found = compare(read_groups([str(bare), old]))
    assert any("does not tell queries and gallery" in note for note in found["notes"])
    comparison_page(read_groups([str(bare), old]), found, tmp_path / "c.html")


def test_a_mean_over_splits_is_paired_by_its_parts(tmp_path):
    """FashionIQ: val_mean has no queries of its own."""
    paths = []
    for name in ("one", "two"):
        path = write_run(tmp_path / name, ranks_of(len(paths), 0.3), title=name, splits=("val_a", "val_b"))
        for file in ("evaluation.json", "results.json"):
            content = json.loads((tmp_path / name / file).read_text())
            results = content.get("results", content)
            results["val_mean"] = results["val_a"]
            (tmp_path / name / file).write_text(json.dumps(content))
        ranks = json.loads((tmp_path / name / "ranks.json").read_text())
        (tmp_path / name / "ranks.json").write_text(json.dumps({**ranks, "means": {"val_mean": ["val_a", "val_b"]}}))
        paths.append(path)
    entry = compare(read_groups(paths), splits=["val_mean"])["splits"]["val_mean"]["R@1"]["two"]
    ours, theirs = ([hits(ranks_of(n, 0.3), 1)] * 2 for n in (1, 0))
    exact = paired_bootstrap(ours, theirs)
    assert entry["difference_interval"] == [exact.low, exact.high]


REFUSED = [
    ({"splits": ("test",)}, {}, r"no split in common \(.*one: val; .*two: test\)"),
    ({"gallery": "other"}, {}, "cannot be compared on val: another gallery. .*--splits"),
    ({"protocol": "voc"}, {}, r"another protocol \(voc, not standard\)"),
    ({"ranks": ranks_of(1)[:50]}, {}, r"other queries \(50, not 60\)"),
    ({"data": "other", "kept": False}, {}, "other queries, texts, answers or another gallery"),
    ({}, {"splits": ["vall"]}, "has no split 'vall'. Did you mean 'val'"),
    ({}, {"metrics": ["R@2"]}, "metric 'R@2' is not in all runs"),
    ({}, {"baseline": "none"}, "--baseline 'none' is none of the runs"),
]


@pytest.mark.parametrize(("other", "options", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path, other, options, message):
    runs = [write_run(tmp_path / "one", ranks_of(0), title="a")]
    runs.append(write_run(tmp_path / "two", **{"ranks": ranks_of(1), "title": "b", **other}))
    with pytest.raises((ConfigError, DataError), match=message):
        compare(read_groups(runs), **options)


def test_what_is_no_run_is_refused(tmp_path):
    good = write_run(tmp_path / "good", ranks_of(0))
    for given, message in (
        ([good, good], "is the same run as"),
        ([good, f"x={good}/../good"], "is the same run as"),
        ([str(tmp_path / "gone")], "neither evaluation.json nor results.json is there"),
        ([f"={good}"], "the name before = is empty"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            read_groups(given)


DAMAGE = [
    (lambda c: c.update(format="x"), "expected the format"),
    (lambda c: c.update(means={"val_mean": ["gone"]}), "no file of ranks"),
    (lambda c: c.update(means={"val_mean": [{}]}), "no file of ranks"),
    (lambda c: c["splits"]["val"].update(count=7), "no file of ranks"),
    (lambda c: c["splits"]["val"].update(every=0), "no file of ranks"),
    (lambda c: c["splits"]["val"]["rows"]["neucore"].update(rank=["1"] * QUERIES), "no file of ranks"),
    (lambda c: c["splits"]["val"]["rows"]["neucore"].update(rank=[-1] * QUERIES), "no file of ranks"),
    (lambda c: c["splits"]["val"]["rows"]["neucore"].update(values={"mAP@5": ["x"] * QUERIES}), "no file of ranks"),
    (lambda c: c["splits"]["val"]["rows"]["neucore"].update(rank=[29] * QUERIES), "of another evaluation"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_ranks_are_told(tmp_path, damage, message):
    path = tmp_path / "run"
    write_run(path, ranks_of(0))
    content = json.loads((path / "ranks.json").read_text())
    damage(content)
    (path / "ranks.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_run(path)


def test_damaged_configs_and_neighbours(tmp_path):
    for number, config in enumerate(([1], {"run": "x"}, {"model": 3}, {"datasets": ["emoji"]})):
        for file in ("run.json", "evaluation.json"):
            path = tmp_path / f"{number}{file}"
            write_run(path, ranks_of(0))
            content = json.loads((path / file).read_text())
            (path / file).write_text(json.dumps({**content, "config": config}))
            with pytest.raises(DataError, match=f"{file}: its config is none as a run writes it"):
                read_run(path)
    write_run(tmp_path / "output" / "a", ranks_of(1))
    (tmp_path / "output" / "b").mkdir()
    (tmp_path / "output" / "b" / "run.json").write_text("{")
    assert read_run(tmp_path / "output").folder.name == "a"


def test_an_output_folder_stands_for_its_latest_run(tmp_path):
    write_run(tmp_path / "a", ranks_of(1))
    write_run(tmp_path / "b", ranks_of(2))
    (tmp_path / "results.json").write_bytes((tmp_path / "a" / "results.json").read_bytes())
    assert read_run(tmp_path).folder == tmp_path / "a"
    (tmp_path / "results.json").write_text(json.dumps({"val": {"x": row_of([1])}}))  # of a run that is gone
    assert read_run(tmp_path).folder == tmp_path


LOG = [
    {"config": {}},
    {"epoch": 0, "iteration": 10, "train_lr": 0.1, "train_loss": 2.0, "train_loss_matching": 1.5},
    {"epoch": 0, "iteration": 10, "val_R@1": 10.0, "val_R_subset@1": 20.0, "val_median_rank": 9.0, "val_queries": 60,
     "val_best_epoch": 0, "val_text_only": {"R@1": 1.0}},
    {"epoch": 1, "iteration": 20, "train_lr": 0.1, "train_loss": 1.0},
    {"epoch": 1, "iteration": 20, "val_R@1": 30.0, "val_R_subset@1": 40.0, "val_median_rank": 5.0, "val_queries": 60,
     "val_best_epoch": 1},
]  # fmt: skip


def running(folder, log=LOG, status="running"):
    folder.mkdir()
    config = {"model": {"arch": "neucore"}, "run": {"max_epoch": 5, "runner": "runner_cir"}, "datasets": {"emoji": {}}}
    (folder / "run.json").write_text(json.dumps({"status": status, "created": 2.0, "config": config}))
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in log) + '{"epoch": 2, "iter')
    return folder


def test_a_run_under_way(tmp_path):
    run = read_run(running(tmp_path / "run"))
    assert standing(run).startswith("Not finished (status: running): 2 of 5 epochs are trained; the results below are")
    assert run.results["val"]["neucore"]["R@1"] == 30 and run.results["val"]["neucore"]["R_subset@1"] == 40
    run_page(run, tmp_path / "r.html", run_title(run))
    page = (tmp_path / "r.html").read_text()
    assert "NEUCORE on emoji: run" in page and "2 of 5 epochs are trained" in page
    assert page.count("<polyline") == 2 + 2  # two losses; two metrics
    assert "R@1 30 at epoch 2" in page and "loss matching 1.5 at epoch 1" in page and ">best</text>" in page
    with pytest.raises(DataError, match="the run is not finished"):
        read_groups([str(tmp_path / "run")])
    empty = running(tmp_path / "empty", [])
    with pytest.raises(DataError, match=r"status: running\) has logged nothing yet"):
        read_run(empty)


def test_hostile_names_and_texts_are_escaped(tmp_path):
    runs = []
    for name in ("a", "b"):
        runs.append(write_run(tmp_path / name, ranks_of(len(runs)), title=HOSTILE + name, splits=(HOSTILE,)))
        (tmp_path / name / "log.txt").write_text(
            json.dumps({"epoch": 0, "iteration": 1, f"{HOSTILE}_R@1": 3.0, f"train_loss_{HOSTILE}": 1.0}) + "\n"
        )
    groups = read_groups([f"{HOSTILE}1={runs[0]}", runs[1]])
    comparison_page(groups, compare(groups), tmp_path / "c.html")
    run_page(read_run(runs[0]), tmp_path / "r.html", HOSTILE)
    for file in ("c.html", "r.html"):
        page = (tmp_path / file).read_text()
        assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


def test_kept_examples_are_shown_again_and_checked(tmp_path):
    shown = {"query_id": HOSTILE, "caption": HOSTILE, "split": "val", "change": "", "rank": 3, "targets": ["t"],
             "reference": tmp_path / "gone.png", "reference_name": "a cat"}  # fmt: skip
    hit = {"id": "t", "name": "the wanted", "path": tmp_path / "gone.png", "score": 1.0, "correct": True}
    shown["retrieved"] = [hit]
    write_run(tmp_path / "run", ranks_of(1))
    kept = tmp_path / "run" / "examples.json"
    Examples.of([shown, {**shown, "pick": "worst"}], credit="by someone").write(kept)
    run_page(read_run(tmp_path / "run"), tmp_path / "r.html", "t")
    page = (tmp_path / "r.html").read_text()
    assert "Answered worst" in page and "Answered best" not in page and "by someone" in page
    assert page.count("the wanted (t), score 1.000") == 2 and "<script" not in page
    good = json.loads(kept.read_text())
    for key, value in (("reference", "javascript:alert(1)"), ("rank", "1"), ("pick", "x"), ("maps", [{}]), ("more", 1)):
        bad = {**good, "cards": [{**good["cards"][0], key: value}]}
        kept.write_text(json.dumps(bad))
        with pytest.raises(DataError, match="holds no examples"):
            run_page(read_run(tmp_path / "run"), tmp_path / "r2.html", "t")
    assert not (tmp_path / "r2.html").exists()


def test_the_command(tmp_path):
    """Table, JSON and page, without torch or the host being imported."""
    runs = [write_run(tmp_path / n, ranks_of(i, 0.3 * i), title=n) for i, n in enumerate(("tirg", "neucore"))]
    code = (
        "import sys; from neucore_plugin.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'lavis') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )

    def command(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)

    done = command("compare", *runs, "--html", str(tmp_path / "c.html"), "--json")
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]", done.stderr
    assert json.loads(done.stdout) == compare(read_groups(runs))
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == 2 and "NEUCORE" in page and "baseline" in page
    done = command("report", runs[0], "--html", str(tmp_path / "r.html"))
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]" and "tirg" in done.stdout, done.stderr
    done = command("compare", *runs, "--baseline", "TIRGG")
    assert done.returncode == 2 and "error: --baseline 'TIRGG' is none of the runs. Did you mean 'TIRG'?" in done.stderr
