"""A real service over a saved index of colours: `python serve_process.py INDEX [OPTIONS]` prints its address first.

The options are those of `neucore serve`; the model is the tiny one of the tests, which has no checkpoint.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def serving(index: Path, *options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of a service on a free port."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, __file__, str(index), "--port", "0", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    from serve_case import MappedColours

    from neucore_plugin.commands import serve
    from neucore_plugin.retrieval import GalleryIndex

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args()
    opened = lambda: GalleryIndex.open(arguments.index, MappedColours())  # noqa: E731
    serve.serve(arguments, opened, "colours", ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
