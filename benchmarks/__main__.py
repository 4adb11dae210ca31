"""All benchmarks as one table: what, ours, the naive or rival form, ratio, memory, share of the machine's own rate.

    python -m benchmarks --quick                        # small sizes; minutes
    python -m benchmarks --out mine.json                # full sizes; an hour and more
    python -m benchmarks --quick --compare mine.json    # how each ratio moved since; sizes must be the same
    python -m benchmarks --quick step scoring           # these alone
    python -m benchmarks growth --plots growth          # how a training step grows, also as pictures in growth/

Run it in the repository's root. Times are processor seconds, and so are ratios and shares: other work on the machine
disturbs them least. "share" is what ours reaches of the rate of a large matrix product ("products"), or of what a sum
reads from memory a second ("memory"), measured in the same process. Each script runs in a process of its own with one
thread, unless --threads says otherwise; its memory is that process's peak. The scripts say what they measure, and
print more when they are run by themselves: `python benchmarks/SCRIPT.py --help`.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from machine import Row, own_process, table  # noqa: E402

SCRIPTS = ("scoring", "search", "evaluation", "step", "growth", "grad_cache", "data", "backbones")


def shown(rows: list[Row], old: dict[str, Row]) -> str:
    """The table; with `old` also the ratio then, and how much better or worse it is now."""
    titles = ["what", "ours", "against", "theirs", "ratio", "peak memory", "share"]
    lines = [[*titles, "then", "now / then"] if old else titles]
    for row in rows:
        share = "" if row.share is None else f"{row.share:.0%} of {row.of}"
        line = [row.what, _time(row.ours), row.other, _time(row.theirs), f"{row.ratio:.2f}"]
        line += [f"{row.memory / 1e6:,.0f} MB", share]
        if old:
            then = old.get(row.name)
            line += ["", ""] if then is None else [f"{then.ratio:.2f}", f"{row.ratio / then.ratio:.2f}"]
        lines.append(line)
    return table(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def read(path: Path) -> dict[str, Row]:
    """{name: row} of what --out wrote. Exits with a message where it is something else."""
    try:
        rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no file that `python -m benchmarks --out` wrote ({error})")
    return {row.name: row for row in rows}


def main(arguments: list[str] | None = None) -> int:
    """1 where a script failed; the others are shown all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)}; all without")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--threads", type=int, default=1, help="threads of all forms (1)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there as well")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show how the ratios moved since")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the curves of 'growth' there, as SVG")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.scripts if name not in SCRIPTS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(SCRIPTS)}")
    names = given.scripts or list(SCRIPTS)
    if given.plots and "growth" not in names:
        parser.error("--plots draws the curves of the benchmark 'growth'; name it as well")
    old = read(given.compare) if given.compare else {}
    rows, failed = [], []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        wanted = f"{given.quick}, {str(given.plots)!r}" if given.plots and name == "growth" else given.quick
        code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {name}; from dataclasses import asdict; "
        code += f"print(json.dumps([asdict(row) for row in {name}.rows({wanted})]))"
        try:
            answer = own_process("-c", code, threads=given.threads)
            rows += [Row(**row) for row in json.loads(answer.splitlines()[-1])]
        except subprocess.CalledProcessError:
            failed.append(name)
    if rows:
        print(shown(rows, old))
    if given.out:
        known: dict[str, Any] = {"quick": given.quick, "threads": given.threads, "rows": [asdict(row) for row in rows]}
        given.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}; what they said stands above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
