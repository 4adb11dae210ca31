"""Runs from a stream, as users start them: both runners, one process and two, killed and resumed, from a web server."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import runner_case as case
import torch
from http_server import serving

from neucore_plugin import cli, launch
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary
from neucore_plugin.task import ComposedImageRetrievalTask

EPOCHS = {"max_epoch": 2, "checkpoint_every_iters": 2}
ITERS = {
    "runner": "runner_cir_iter",
    "max_epoch": None,
    "max_iters": 13,
    "iters_per_inner_epoch": 8,
    "checkpoint_every_iters": 3,
}


@pytest.fixture(scope="module")
def tars(shapes_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tars") / "out"
    assert cli.main(["shards", "folder", "--triplets", "--root", str(shapes_root), "--out", str(out)]) == 0
    return out


@pytest.fixture
def streamed(tiny_config, tars):
    """A yaml that trains on the stream; sections of it may be changed."""

    def make(name: str, root=tars, **run) -> Path:
        def change(config: dict) -> None:
            section = config["datasets"]["folder"]
            section["data_type"] = "stream"
            section["build_info"] = {"root": str(root), "shuffle_buffer": 8, "allow_remote": "://" in str(root)}
            places = {"output_dir": str(Path(config["run"]["output_dir"]) / name), "resume": "auto"}
            config["run"].update({"batch_size_train": 8, "test_splits": ["val"], **places, **run})

        return tiny_config(change, f"{name}.yaml")

    return make


def train(path: Path, kill_at: int = -1) -> dict:
    """Train, in a process of its own; the queries of its batches, metrics, weights. SIGKILL in place of a batch."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a command of its own
    step, seen, models = ComposedImageRetrievalTask.train_step, [], []

    def noted(self, model, samples):
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(samples["query_id"])
        models[:] = [model]
        return step(self, model, samples)

    ComposedImageRetrievalTask.train_step = noted
    try:
        metrics = launch.run(path)
    finally:
        ComposedImageRetrievalTask.train_step = step
    state = models[0].state_dict() if models else {}
    return {"queries": seen, "metrics": metrics, "state": {name: value.numpy() for name, value in state.items()}}


def train_with(environment: dict[str, str], path: Path, kill_at: int) -> None:
    """`train` in a child, whose environment is that of the server process that starts it, not the test's."""
    os.environ.update(environment)
    train(path, kill_at)


def same(one: dict, other: dict) -> bool:
    names = {name.removeprefix("module.") for name in one["state"]}
    plain = [{name.removeprefix("module."): value for name, value in run["state"].items()} for run in (one, other)]
    assert names and plain[0].keys() == plain[1].keys()
    return all((plain[0][name] == plain[1][name]).all() for name in names)


@pytest.mark.slow  # 20 to 60 seconds of CPU each; the next one is of their kind
@pytest.mark.parametrize(("run", "workers"), [(EPOCHS, 0), (ITERS, 2)], ids=["epochs", "iterations"])
def test_two_processes_train_on_a_stream_and_go_on_at_the_right_sample(tmp_path, streamed, run, workers):
    run = {**run, "num_workers": workers}
    whole = case.in_group(tmp_path, train, streamed("whole", **run))
    queries = [[query for batch in part["queries"] for query in batch] for part in whole]
    epoch = len(whole[0]["queries"]) // 2 if run.get("max_epoch") else 8
    first = [query for part in whole for batch in part["queries"][:epoch] for query in batch]
    assert len(set(first)) == len(first) >= 128  # of 149, dealt in whole batches to both, none twice
    assert len(queries[0]) == len(queries[1])
    case.in_group(tmp_path, train, streamed("killed", **run), 5, killed=True)
    rest = case.in_group(tmp_path, train, streamed("killed", **run))
    done = 4 if run["checkpoint_every_iters"] == 2 else 3
    for rank in (0, 1):
        assert rest[rank]["queries"] == whole[rank]["queries"][done:]
        assert same(rest[rank], whole[rank])
        assert rest[rank]["metrics"] == whole[rank]["metrics"]


def test_a_run_from_a_web_server_killed_and_continued_is_the_run_from_the_folder(
    tmp_path, streamed, tars, shapes_root, monkeypatch
):
    environment = {"no_proxy": "127.0.0.1", "NEUCORE_CACHE": str(tmp_path / "cache")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    run = {**EPOCHS, "max_epoch": 1}
    local = train(path := streamed("local", **run))
    # The vocabulary is that of the whole split, made before the first sample; val is ranked by place.
    captions = [entry["caption"] for entry in json.loads((shapes_root / "train.json").read_text())]
    expected = ConceptVocabulary.from_captions(ConceptExtractor()(captions), 1)
    written = next((path.parent / "output" / "local").rglob("concepts.json"))
    assert ConceptVocabulary.from_json(written) == expected
    assert local["metrics"]["val"]["queries"] == 22
    with serving(tars.parent) as server:
        path = streamed("afar", root=f"{server.url}/out", **run)
        assert case.run_child(train_with, environment, path, 5) == -signal.SIGKILL
        fetched = len(server.requests)
        afar = train(path)
        assert server.requests[fetched] == "/out/stream.json" and len(server.requests) > fetched
        assert len(set(server.requests[fetched:]) & set(server.requests[:fetched])) <= 1  # whole files are kept
    assert afar["queries"] == local["queries"][4:] and same(afar, local) and afar["metrics"] == local["metrics"]


def test_a_run_whose_order_would_be_another_is_not_continued(tmp_path, streamed):
    run = {**ITERS, "max_iters": 9}
    case.run_child(train, streamed("run", **run), 5)
    (folder,) = (path for path in (tmp_path / "output" / "run").iterdir() if path.is_dir())
    with pytest.raises(ConfigError, match="run.num_workers was 0, is 2"):
        launch.run(streamed("run", **{**run, "num_workers": 2, "resume": str(folder)}))


def test_what_a_stream_cannot_do_is_told(streamed, tars, tmp_path):
    with pytest.raises(ConfigError, match="split train comes as a stream"):
        launch.run(streamed("valid", valid_splits=["train"], max_epoch=1))
    with pytest.raises(ConfigError, match="'nowhere' is no split of folder"):
        launch.run(streamed("split", valid_splits=["nowhere"], max_epoch=1))
    with pytest.raises(DataError, match="too few for 1 processes with 12 readers each"):
        launch.run(streamed("many", num_workers=12, batch_size_train=64, max_epoch=1))
    with pytest.raises(ConfigError, match="no such folder"):
        launch.run(streamed("absent", root=tmp_path / "absent", max_epoch=1))
    with pytest.raises(ConfigError, match="allow_remote=true"):
        launch.run(streamed("afar", root="http://127.0.0.1:9/x"), ["datasets.folder.build_info.allow_remote=false"])
