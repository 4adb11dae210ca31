"""neucore index: build an index over one's own pictures, and keep it."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.commands import index_accelerate, index_push, positive, print_json
from neucore_plugin.commands.loading import add_model_arguments, load, opened, stored
from neucore_plugin.common.errors import ConfigError, DataError, NeucoreError
from neucore_plugin.common.names import name_of
from neucore_plugin.common.text import visible

HELP = "encode pictures once into an index, which is then searched at once; add, remove, sync, check"
_EXAMPLES = """\
examples:
  neucore index build photos --checkpoint BEST.pth --out photos.index
  neucore index build products.csv --checkpoint BEST.pth --out products.index   (the other columns are attributes)
  torchrun --nproc_per_node=8 -m neucore_plugin index build shards --checkpoint BEST.pth --out big.index
  neucore index sync photos.index
  neucore index add photos.index new/dog.jpg new/cat.jpg
  neucore index remove photos.index holiday/beach.jpg
  neucore index compact photos.index
  neucore index info photos.index --failures
  neucore index verify photos.index --checkpoint BEST.pth
  neucore index accelerate photos.index   (of 100,000 pictures and more)
"""
_SHOWN = 20  # names, and bad pictures, printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command each for what is done with an index."""
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", dest="what", required=True, metavar="COMMAND")

    def command(name: str, run_: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        shown = [line for line in _EXAMPLES.splitlines() if f" index {name} " in line]
        own = commands.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        own.epilog = "\n".join(["examples:" if len(shown) > 1 else "example:", *shown]) if shown else None
        own.set_defaults(index_command=run_)
        return own

    build = command("build", _build, "encode pictures into a new index; an interrupted build is continued")
    build.add_argument(
        "source", help="folder (with those below), tar shards or a folder of them, or a list: CSV, JSON, JSON lines"
    )
    add_model_arguments(build, required=True)
    build.add_argument("--out", required=True, type=Path, metavar="INDEX", help="folder of the index")
    build.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="as stored (default float16)")
    build.add_argument("--unit-size", type=positive, default=4096, help="images between two saves (default 4096)")
    _encoding(build)

    add = command("add", _add, "encode further pictures and put them into an index")
    _index(add)
    add.add_argument("sources", nargs="+", help="image files, or one folder, list or shard")
    add_model_arguments(add, required=False)
    _encoding(add)

    remove = command("remove", _remove, "take pictures out of an index; their files stay")
    _index(remove)
    remove.add_argument("names", nargs="+", type=name_of, help="names in the index, such as holiday/beach.jpg")

    sync = command("sync", _sync, "add, remove and encode anew what differs between a folder and the index")
    _index(sync)
    sync.add_argument("folder", nargs="?", type=Path, help="default: the folder that the index was built from")
    add_model_arguments(sync, required=False)
    _encoding(sync)

    compact = command("compact", _compact, "merge small units and drop what was removed")
    _index(compact)

    info = command("info", _info, "what an index holds, from its own files")
    _index(info)
    info.add_argument(
        "--failures", action="store_true", help="list the pictures that could not be read, with the reason"
    )
    info.add_argument("--json", action="store_true", help="print as JSON")

    verify = command("verify", _verify, "read every byte and compare the sums; exit code 1 where something is wrong")
    _index(verify)
    add_model_arguments(verify, required=False, noted="default: none; with a first stage the one that INDEX notes")
    verify.add_argument(
        "--queries", type=Path, metavar="FILE",
        help='JSON list of {"image": ..., "text": ...}: the recall of the first stage is measured on them as well',
    )  # fmt: skip
    verify.add_argument("--json", action="store_true", help="print as JSON")

    for module in (index_accelerate, index_push):
        module.add_arguments(command(module.__name__.rpartition("_")[2], module.run, module.HELP))


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="what `neucore index build` wrote")


def _encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, default=32, help="images encoded at a time (default 32)")
    parser.add_argument("--workers", type=positive, default=2, help="threads that read pictures (default 2)")


def run(arguments: argparse.Namespace) -> int | None:
    """What the sub-command does. Raises NeucoreError."""
    return arguments.index_command(arguments)


# ---- build ----------------------------------------------------------------------------------------------------------


def share(environment: "os._Environ[str] | dict[str, str]") -> tuple[int, int]:
    """(number, of how many) of this process among those that torchrun and a SLURM array start; (0, 1) alone.

    Raises ConfigError where the environment says so by half.
    """

    def numbers(*names: str) -> list[int]:
        texts = [environment.get(name, "") for name in names]
        if not all(text.isascii() and text.isdecimal() for text in texts):
            shown = ", ".join(f"{name}={text!r}" for name, text in zip(names, texts, strict=True))
            raise ConfigError(f"the environment announces several processes, but not properly: {shown}; unset them")
        return [int(text) for text in texts]

    number, count = 0, 1
    if "RANK" in environment or "WORLD_SIZE" in environment:
        number, count = numbers("RANK", "WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, tasks, first = numbers("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
        step = numbers("SLURM_ARRAY_TASK_STEP")[0] if environment.get("SLURM_ARRAY_TASK_STEP") else 1
        if step == 0 or (task - first) % step or not 0 <= (task - first) // step < tasks:
            raise ConfigError(
                f"SLURM_ARRAY_TASK_ID={task} is none of {tasks} numbers from {first} in steps of {step}; give the "
                "array as a whole range, such as --array=0-7"
            )
        number, count = (task - first) // step * count + number, count * tasks
    if not 0 <= number < count:
        raise ConfigError(f"process {number} of {count}: numbers are below the number of processes")
    return number, count


def _build(arguments: argparse.Namespace) -> None:
    number, count = share(os.environ)
    source = Path(arguments.source)
    if not source.exists():
        raise DataError(f"{arguments.source} does not exist; give a folder, tar shards, or a list of images")
    import torch

    from neucore_plugin.common.images import told
    from neucore_plugin.retrieval import GalleryIndex

    if arguments.device == "auto" and count > 1 and torch.cuda.is_available():
        arguments.device = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    model = load(arguments)
    given = arguments.checkpoint
    noted = arguments.model_type if given is None else name_of(given.resolve() if given.exists() else given)
    index = _quietly(
        lambda: GalleryIndex.build(
            model,
            arguments.source,
            out=arguments.out,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            dtype=getattr(torch, arguments.dtype),
            unit_size=arguments.unit_size,
            checkpoint=noted,
            share=(number, count),
        )
    )
    _tell_failures(index.failures, arguments.out)
    if index.left_out:
        print(visible(f"{arguments.source}: {told(index.left_out)}"), file=sys.stderr)
    facts = index.info()
    lacking = facts["planned_units"] - facts["planned_units_done"]
    print(visible(f"{arguments.out}: {len(index):,} images, {facts['bytes'] / 2**20:,.1f} MiB"))
    if lacking > 0:
        print(f"{lacking} of {facts['planned_units']} units are still to come from the other processes")
    elif number == 0:
        place = shlex.quote(str(arguments.out))
        print(visible(f"search it: neucore search {place} --image PICTURE --text 'what should be different'"))


def _quietly(make: Callable[[], Any]) -> Any:
    """Without the log's words on what could not be read: it is printed after."""
    log = logging.getLogger("neucore_plugin.retrieval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return make()
    finally:
        log.setLevel(level)


def _tell_failures(failures: Sequence[Any], index: Path) -> None:
    for failure in failures[:_SHOWN]:
        print(visible(f"left out {failure.name}: {failure.reason}"), file=sys.stderr)
    if len(failures) > _SHOWN:
        rest = f"and {len(failures) - _SHOWN:,} more: neucore index info {shlex.quote(str(index))} --failures"
        print(visible(rest), file=sys.stderr)


# ---- changes --------------------------------------------------------------------------------------------------------


def _add(arguments: argparse.Namespace) -> None:
    index = opened(arguments)
    before = len(index.failures)
    one = len(arguments.sources) == 1 and _is_source(Path(arguments.sources[0]))
    source = arguments.sources[0] if one else arguments.sources
    added = _quietly(lambda: index.add(source, arguments.batch_size, True, arguments.workers))
    _tell_failures(index.failures[before:], arguments.index)
    print(visible(f"{arguments.index}: added {_few(added)}; {len(index):,} images"))


def _is_source(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".csv", ".json", ".jsonl", ".tar")


def _few(names: Sequence[str]) -> str:
    from neucore_plugin.common.errors import first_few

    return f"{len(names):,} ({first_few(names, _SHOWN)})" if names else "0"


def _remove(arguments: argparse.Namespace) -> None:
    index = stored(arguments.index)
    before = len(index)
    index.remove(arguments.names)
    print(visible(f"{arguments.index}: removed {before - len(index):,}; {len(index):,} images"))


def _sync(arguments: argparse.Namespace) -> None:
    index = opened(arguments)
    done = _quietly(lambda: index.sync(arguments.folder, batch_size=arguments.batch_size, workers=arguments.workers))
    last = {failure.name: failure for failure in index.failures}
    _tell_failures([last[name] for name in done.failures], arguments.index)
    for what in ("added", "changed", "moved", "removed"):
        if names := getattr(done, what):
            print(visible(f"{what} {_few(names)}"))
    rest = f"{done.unchanged + len(done.touched):,} as before" + (
        f", {len(done.failures)} unreadable" * bool(done.failures)
    )
    print(visible(f"{arguments.index}: {len(index):,} images, {rest}"))


def _compact(arguments: argparse.Namespace) -> None:
    index = stored(arguments.index)
    before, after = index.compact()
    print(visible(f"{arguments.index}: {before} units are now {after}; {len(index):,} images"))


# ---- looking --------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> None:
    from neucore_plugin.retrieval import GalleryIndex
    from neucore_plugin.retrieval.upkeep import unreadable

    index = GalleryIndex.open(arguments.index)
    failures = [{"name": f.name, "path": str(f.path), "reason": f.reason} for f in unreadable(index)]
    if arguments.json:
        print_json(index.info() | ({"unreadable": failures} if arguments.failures else {}))
        return
    _print_facts(index.info())
    for failure in failures if arguments.failures else ():
        print(visible(f"{failure['name']}: {failure['reason']}"))


def _print_facts(facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if key != "problems" and value is not None:
            print(visible(f"{key.replace('_', ' '):20} {value:,}" if isinstance(value, int) else f"{key:20} {value}"))
    if facts.get("planned_units", 0) > facts.get("planned_units_done", 0):
        print("The build is not finished: give the same `neucore index build` command again.")


def _verify(arguments: argparse.Namespace) -> int:
    index = stored(arguments.index)
    asked = _asked(arguments.queries) if arguments.queries else []
    model = _verifying(arguments, index, bool(asked))
    facts = index.verify(model, not arguments.json, asked)
    if arguments.json:
        print_json(facts)
    else:
        measured = facts.pop("recall", None) or {}
        _print_facts(facts)
        for kind, value in measured.items():
            print(f"recall of the first stage, of the 50 best images: {100 * value:.1f} % ({kind} queries)")
        for problem in facts["problems"]:
            print(visible(f"wrong: {problem}"))
        if not facts["problems"]:
            print("all as it was written")
    return 1 if facts["problems"] else 0


def _verifying(arguments: argparse.Namespace, index: Any, asked: bool) -> Any:
    """The model to verify with; None where none was given, and there is no first stage whose recall needs one."""
    if asked or arguments.checkpoint or arguments.model_type:
        return load(arguments, index)
    if not (arguments.index / "nearest" / "manifest.json").is_file():
        return None
    try:
        return load(arguments, index)
    except NeucoreError as error:
        print(visible(f"the recall of the first stage was not measured: {error}"), file=sys.stderr)
    return None


def _asked(path: Path) -> list[Any]:
    """The queries of a file. Raises DataError."""
    from neucore_plugin.common.files import read_json
    from neucore_plugin.retrieval.queries import Query

    rows = read_json(path, list, "write it anew")
    for number, row in enumerate(rows):
        known = isinstance(row, dict) and set(row) <= {"image", "text"}
        if not known or not all(isinstance(value, str | None) for value in row.values()):
            raise DataError(f'{path}: entry {number} is no query such as {{"image": "cat.jpg", "text": "now asleep"}}')
    return [Query(row.get("image"), row.get("text")) for row in rows]
