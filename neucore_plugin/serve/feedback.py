"""Votes on results become training data: a folder that `datasets: folder` trains from as it is.

DIR/votes.jsonl   every vote, appended, one JSON object a line: time, reference, caption, target, good, and the names
                  that the index has for the two pictures
DIR/images/       the pictures that were judged, named by the hash of their bytes
DIR/train.json    the triplets: of each (reference, caption) the targets whose last vote was good
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import atomic_write, file_errors, locked, parse_json, write_json

VOTES, TRIPLETS, IMAGES = "votes.jsonl", "train.json", "images"
_KEYS = {"reference": str, "caption": str, "target": str, "good": bool}


class Feedback:
    """The folder of one service, or of several at once. Raises FileError where it cannot be written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with file_errors(self.folder):
            (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def add(self, vote: dict[str, Any], reference: tuple[bytes, str], target: tuple[bytes, str]) -> dict[str, Any]:
        """Keep a vote {"caption", "good", ...} of two pictures (bytes, suffix); returns it as it was written."""
        with locked(self.folder):
            names = {"reference": self._keep(*reference), "target": self._keep(*target)}
            entry = {"time": round(time.time(), 3), **names, **vote}
            self._append(entry)
            write_json(self.folder / TRIPLETS, self.triplets(), indent=1)
        return entry

    def triplets(self) -> list[dict[str, Any]]:
        """[{"reference", "caption", "target": [names]}], oldest first; the last vote on a target counts."""
        latest: dict[tuple[str, str], dict[str, bool]] = {}
        for vote in self.votes():
            latest.setdefault((vote["reference"], vote["caption"]), {})[vote["target"]] = vote["good"]
        found = []
        for (reference, caption), targets in latest.items():
            if good := [name for name, is_good in targets.items() if is_good]:
                found.append({"reference": reference, "caption": caption, "target": good})
        return found

    def votes(self) -> Iterator[dict[str, Any]]:
        """All votes, oldest first; a line that a kill or a full drive cut is passed over."""
        path = self.folder / VOTES
        if not path.exists():
            return
        with file_errors(path), open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    vote = parse_json(line)
                except ValueError:
                    continue
                if isinstance(vote, dict) and all(isinstance(vote.get(key), kind) for key, kind in _KEYS.items()):
                    yield vote

    def _keep(self, data: bytes, suffix: str) -> str:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        path = self.folder / IMAGES / name
        if not path.exists():
            with atomic_write(path) as stream:
                stream.write(data)
        return name

    def _append(self, entry: dict[str, Any]) -> None:
        path = self.folder / VOTES
        line = json.dumps(entry).encode("ascii") + b"\n"
        with file_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                before = os.fstat(handle).st_size
                if before and os.pread(handle, 1, before - 1) != b"\n":  # a line that was cut: ours begins anew
                    line = b"\n" + line
                if os.write(handle, line) != len(line):
                    os.ftruncate(handle, before)
                    raise DataError(f"{path}: the vote could not be written whole; free space on the drive")
                os.fsync(handle)
            finally:
                os.close(handle)
