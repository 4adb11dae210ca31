"""The folder of one run, fresh or to be continued: its record run.json, config.yaml and log.txt. Knows no host.

`<output_dir>/<job_id>/` holds run.json, config.yaml, log.txt (one JSON object a line), checkpoint_last.pth,
checkpoint_best.pth, test_metrics.json and what the task writes.
"""

import contextlib
import itertools
import json
import os
import platform
import time
import weakref
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import ConfigError, DataError, FileError
from neucore_plugin.common.files import (
    atomic_write,
    expanded,
    file_errors,
    lock,
    open_lock,
    read_json,
    write_json,
)
from neucore_plugin.config.compare import config_differences
from neucore_plugin.config.loading import as_yaml
from neucore_plugin.config.run import RunSchema
from neucore_plugin.weights.checkpoint import jsonable

LAST, BEST = "checkpoint_last.pth", "checkpoint_best.pth"
RECORD, CONFIG, LOG, METRICS = "run.json", "config.yaml", "log.txt", "test_metrics.json"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = {"neucore_plugin": "neucore-plugin"}
    packages |= {name: name for name in ("torch", "transformers", "salesforce-lavis", "numpy")}
    found = {"python": platform.python_version()}
    for name, package in packages.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunFolder:
    """One run's folder. `record` is what run.json holds: {"status", "kind", "fingerprint", "config", ...}."""

    def __init__(self, path: Path, record: dict[str, Any], continued: bool) -> None:
        self.path, self.record, self.continued = path, record, continued

    @property
    def finished(self) -> bool:
        """Trained, tested and reported."""
        return self.record["status"] == "finished"

    @classmethod
    def choose(cls, run: RunSchema, job_id: str, config: Mapping[str, Any], fingerprint: str) -> "RunFolder":
        """The folder to continue, or a new one with its record written, under run.output_dir.

        run.resume: never; auto (the newest run with the same fingerprint); or the path of a run folder or of its
        checkpoint_last.pth. An evaluation always has a new folder.

        Args:
            job_id: name of a new folder; where it exists already, `-2`, `-3`, ... is appended.
        Raises: ConfigError for a path that is no run, or one whose config differs (its keys are named).
        """
        if run.resume == "auto" and not run.evaluate:
            newest = newest_run(run.output_dir, fingerprint)
            if newest is not None:
                return newest
        elif run.resume != "never" and not run.evaluate:
            return cls._at(Path(run.resume), config, fingerprint)
        path = _fresh(expanded(run.output_dir).absolute(), job_id)
        record = {
            "status": "running",
            "kind": "evaluate" if run.evaluate else "train",
            "created": time.time(),
            "fingerprint": fingerprint,
            "versions": versions(),
            "config": jsonable(config),
        }
        folder = cls(path, record, continued=False)
        with atomic_write(path / CONFIG, "w") as stream:
            stream.write(as_yaml(record["config"]))
        folder.write()
        return folder

    @classmethod
    def _at(cls, given: Path, config: Mapping[str, Any], fingerprint: str) -> "RunFolder":
        path = expanded(given).absolute()
        if path.is_file() and path.name != LAST:
            raise ConfigError(
                f"run.resume: {given} is no {LAST}, the file a training continues from; to start a new training from "
                "its weights set model.checkpoint to it"
            )
        path = path if path.is_dir() else path.parent
        record = read_record(path)
        if record is None or record["kind"] != "train":
            raise ConfigError(
                f"run.resume: {given} is no training run (a folder with {RECORD}, or the {LAST} in it); allowed are "
                "never, auto, or such a path"
            )
        if record["fingerprint"] != fingerprint:
            changes = config_differences(record["config"], config)
            if changes:
                raise ConfigError(
                    f"run.resume: {path} was started with another config, so it cannot be continued:\n  "
                    + "\n  ".join(changes)
                    + "\n  Set these keys back, or use resume: never for a new run"
                )
        return cls(path, record, continued=True)

    def write(self, **changes: Any) -> None:
        """Update run.json."""
        self.record |= changes
        write_json(self.path / RECORD, self.record)

    def lock(self) -> None:
        """Keep other processes out until this one ends, however it ends, and clear away what a kill left half-written.

        Raises ConfigError where another one is in already.
        """
        handle = open_lock(self.path / ".lock")
        if handle is not None:
            weakref.finalize(self, os.close, handle)  # held as long as this object lives
        try:
            alone = lock(handle, whole_process=True, without=f"let no other process train in {self.path}")
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path} is being trained by another process now. Wait for it, stop it, or set run.resume: never"
            ) from error
        for rest in self.path.glob(".*.tmp") if alone else ():
            rest.unlink(missing_ok=True)

    # ---- log.txt ----------------------------------------------------------------------------

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line to log.txt."""
        path = self.path / LOG
        with file_errors(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(jsonable(entry), ensure_ascii=False) + "\n")

    def trim_log(self, iteration: int) -> None:
        """Drop what was logged after `iteration` (it is done again), of the tests, and half-written lines."""
        path = self.path / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and entry.get("iteration", 0) <= iteration and entry.get("epoch") != "best":
                kept.append(line + "\n")
        with atomic_write(path, "w") as stream:
            stream.writelines(kept)

    # ---- results ----------------------------------------------------------------------------

    def store_metrics(
        self, metrics: Mapping[str, Any], provenance: Mapping[str, Any], files: Iterable[str | Path] = ()
    ) -> None:
        """Write test_metrics.json; `files`: what the task has written besides."""
        record = jsonable({"metrics": metrics, "provenance": provenance})
        write_json(self.path / METRICS, {**record, "files": [str(Path(file).absolute()) for file in files]})

    def stored_metrics(self, splits: list[str]) -> dict[str, Any] | None:
        """{"metrics", "data"} of all `splits`, from an earlier end of this run whose result files are still there."""
        try:
            stored = read_json(self.path / METRICS, dict)
            complete = all(os.path.exists(path) for path in stored["files"])
            metrics = {split: stored["metrics"][split] for split in splits}
            return {"metrics": metrics, "data": stored["provenance"]["data"]} if complete else None
        except (DataError, KeyError, TypeError, AttributeError):
            return None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What run.json of `folder` holds; None where there is none, or something else."""
    try:
        record = read_json(folder / RECORD, dict)
    except DataError:
        return None
    needed = {"status": str, "kind": str, "fingerprint": str, "config": dict, "created": int | float}
    return record if all(isinstance(record.get(key), kind) for key, kind in needed.items()) else None


def newest_run(output_dir: str | Path, fingerprint: str) -> RunFolder | None:
    """The training run under `output_dir` that was created last with this fingerprint."""
    root = expanded(output_dir).absolute()
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        record = read_record(path)
        if record is not None and record["kind"] == "train" and record["fingerprint"] == fingerprint:
            found.append(RunFolder(path, record, continued=True))
    return max(found, key=lambda run: (run.record["created"], run.path.name), default=None)


def _fresh(root: Path, name: str) -> Path:
    """Create a folder that did not exist: making it claims it, so two processes cannot get the same."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = root / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise ConfigError(f"run.output_dir: {FileError.of(error, root)}") from error
