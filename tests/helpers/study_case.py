"""Trials that train nothing, for the tests of a study's processes; and finished ones with known ranks."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from neucore_plugin.study import plan, running


def write_study(folder: Path, beside: Path, **study) -> Path:
    """A study of two methods on the config `beside`; `study` replaces parts of its section."""
    section = {
        "base": str(beside),
        "output_dir": str(folder / "out"),
        "methods": {"neucore": None, "tirg": {"model.arch": "cir_baseline", "model.method": "tirg"}},
        "seeds": [1, 2],
        **study,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"study": section}, sort_keys=False))
    return path


def results_of(ranks: dict[str, list[int]]) -> dict:
    """{split: ranks} -> results.json of one row."""
    found = {}
    for split, values in ranks.items():
        recalls = {f"R@{k}": 100 * sum(0 < rank <= k for rank in values) / len(values) for k in (1, 10)}
        found[split] = {"row": {**recalls, "median_rank": 1.0, "queries": len(values)}}
    return found


def finish(trial: plan.Trial, ranks: dict[str, list[int]], curve: list[float] = (), asked: str = "q", **record) -> None:
    """Leave behind what a trial with these ranks would."""
    run = trial.folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    config = {"model": {}, "run": {"seed": trial.seed}}
    (run / "run.json").write_text(json.dumps({"status": "finished", "created": 1.0, "config": config}))
    results = results_of(ranks)
    (run / "results.json").write_text(json.dumps(results))
    versions = {"torch": "2"}
    (run / "evaluation.json").write_text(json.dumps({"results": results, "versions": versions, "threads": 1}))
    splits = {
        split: {"protocol": "standard", "queries": asked, "gallery": "g", "count": len(values), "every": 1,
                "rows": {"row": {"rank": values}}}
        for split, values in ranks.items()
    }  # fmt: skip
    (run / "ranks.json").write_text(json.dumps({"format": "neucore-ranks-1", "means": {}, "splits": splits}))
    lines = [{"epoch": at, "iteration": 10 * (at + 1), "val_R@1": value} for at, value in enumerate(curve)]
    (run / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"fingerprint": trial.fingerprint, "run_folder": "run", "parameters": 1_500_000, "max_epoch": 2,
             "training_seconds": 90.0, **record}  # fmt: skip
    (trial.folder / "trial.json").write_text(json.dumps(found))


# ---- in place of run_trial and run_probe, in a process of their own --------------------------------------------------


def quick_trial(config: str, record: dict, connection) -> None:
    """Finishes at once, unless the folder `behave` above says how else a trial of this name is to end."""
    folder = Path(config).parent
    name = f"{folder.parent.name}-{folder.name}"
    (folder.parents[2] / "started").mkdir(exist_ok=True)
    (folder.parents[2] / "started" / f"{name}-{time.monotonic_ns()}").touch()
    behaviour = folder.parents[2] / "behave" / name
    with open(folder / "trial.log", "a") as log:
        print(f"threads {os.environ['OMP_NUM_THREADS']}", file=log)
        if behaviour.exists():
            print("a line before the end\nValueError: planted", file=log, flush=True)
            if (how := behaviour.read_text()) == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                time.sleep(300)
            sys.exit(3)
    content = yaml.safe_load(Path(config).read_text())
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "results.json").write_text(json.dumps({"seed": content["run"]["seed"]}))
    (folder / running.RECORD).write_text(json.dumps({**record, "run_folder": "run"}))


def quick_probe(config: str, log: str, connection) -> None:
    """A step of NEUCORE takes 0.2 s, of others 0.1 s."""
    arch = yaml.safe_load(Path(config).read_text())["model"]["arch"]
    step = 0.2 if arch == "neucore" else 0.1
    connection.send({"step": step, "round": 100, "validation": 1.0, "setup": 2.0, "device": "cpu"})


def failing_probe(config: str, log: str, connection) -> None:
    Path(log).write_text("error: no such folder\n")
    sys.exit(2)
