"""The commands of the README with several processes, on the real encoders: they train like one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from neucore_plugin import launch

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
EVERYTHING = {"grad_cache_chunk": 3, "ema_decay": 0.8, "accum_grad_iters": 2}


def config_of(tiny_config, name: str, batch: int, **run) -> Path:
    """Without dropout, whose draws each process has for itself."""

    def change(config: dict) -> None:
        config["model"]["query_dropout"] = {"image": 0.0, "text": 0.0}
        config["run"].update(batch_size_train=batch, output_dir=str(Path(config["run"]["output_dir"]) / name), **run)

    return tiny_config(change, f"{name}.yaml")


def outcome(path: Path) -> dict:
    """Losses by epoch, metrics, status of the one run in a config's output folder."""
    (folder,) = (entry for entry in (path.parent / "output" / path.stem).iterdir() if entry.is_dir())
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return {
        "losses": [line["train_loss"] for line in lines if "train_loss" in line],
        "metrics": json.loads((folder / "test_metrics.json").read_text())["metrics"],
        "status": json.loads((folder / "run.json").read_text())["status"],
    }


def start(path: Path, *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [TORCHRUN, *launcher, "-m", "lavis.train", "--cfg-path", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_like_one(found: dict, one: dict) -> None:
    """Equal up to rounding, which grows from step to step: by as much as when one process encodes in other chunks."""
    assert found["status"] == "finished"
    assert found["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)  # a batch's own gallery would give half
    assert found["losses"] == pytest.approx(one["losses"], rel=5e-3)
    for split, metrics in one["metrics"].items():
        for name in ("R@1", "R@5", "R@10"):
            allowed = 2.01 * 100 / metrics["queries"]  # two queries change places
            assert found["metrics"][split][name] == pytest.approx(metrics[name], abs=allowed), (split, name)


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, EVERYTHING], ids=["plain", "cached, averaged, accumulated"])
def test_two_processes_of_torchrun_train_like_one(tiny_config, run):
    one = config_of(tiny_config, "one", 16, **run)
    launch.run(one)
    two = config_of(tiny_config, "two", 8, **run)
    process = start(two, "--nproc_per_node=2")
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output[-3000:]
    assert_like_one(outcome(two), outcome(one))


@pytest.mark.slow
def test_two_machines_train_like_one(tiny_config):
    """Two launchers of one process each that meet at an address, as on two machines."""
    one = config_of(tiny_config, "one", 16)
    launch.run(one)
    two = config_of(tiny_config, "two", 8)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=pair"]
    nodes = [start(two, *launcher, f"--rdzv_endpoint=127.0.0.1:{port}") for _ in range(2)]
    output = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], output[0][-2000:] + output[1][-2000:]
    assert_like_one(outcome(two), outcome(one))


@pytest.mark.slow
def test_an_error_is_printed_once(tiny_config):
    path = config_of(tiny_config, "wrong", 8, dist_backend="nccl")
    process = start(path, "--nproc_per_node=2")
    output = process.communicate(timeout=400)[0]
    assert process.returncode != 0 and output.count("error: run.dist_backend is nccl") == 1
    assert "neucore_plugin/launch.py" not in output  # no traceback of ours
