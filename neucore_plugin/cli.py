"""The command line: the parser of all commands, each a module of `commands/`, and what becomes of their errors.

Light: nothing heavy is imported until a command runs.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from neucore_plugin import __version__
from neucore_plugin.commands import (
    compare,
    configs,
    convert,
    data,
    demo,
    evaluate,
    export,
    index,
    models,
    report,
    search,
    serve,
    setup_host,
    shards,
    study,
    submit,
    train,
    vocab,
)
from neucore_plugin.common.errors import FileError, NeucoreError, explained
from neucore_plugin.common.text import visible

COMMANDS = (train, evaluate, study, index, search, serve, demo, report, compare, configs, models, data, vocab)
COMMANDS += (shards, submit, convert, export, setup_host)
DESCRIPTION = "NEUCORE: find images by a picture and a sentence that says what should be different."
EXAMPLES = """\
examples:
  neucore train --cfg-path train_emoji
  neucore train --cfg-path my.yaml --options run.seed=1 run.output_dir=output/second
  neucore evaluate --cfg-path my.yaml --checkpoint output/emoji/RUN/checkpoint_best.pth
  neucore study --cfg-path study_emoji --quick
  neucore index build photos --checkpoint BEST.pth --out photos.index
  neucore search --checkpoint BEST.pth --folder photos --image photos/cat.jpg --text "now asleep" --html found.html
  neucore search my_index --image cat.jpg --text "now asleep" --then "on a sofa" --not "a dog" --explain
  neucore serve my_index --feedback my_votes
  neucore demo
  neucore report output/emoji
  neucore compare output/emoji/RUN output/other/RUN --html compared.html
  neucore configs copy train_cirr
  neucore models
  neucore data emoji
  neucore data check cirr --root /data/cirr
  neucore vocab cirr --root /data/cirr --out concepts.json
  neucore shards cirr --root /data/cirr --out /data/cirr-shards
  neucore submit cirr --cfg-path eval_cirr --checkpoint BEST.pth
  neucore export BEST.pth --out my-model --onnx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the commands `neucore` and `python -m neucore_plugin`; returns the exit code."""

    def command() -> Any:
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments)

    return guarded(command)


def run_train(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.train`, with the options of the host's own script."""
    return _run_alone(train, argv)


def run_evaluate(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.evaluate`."""
    return _run_alone(evaluate, argv)


def _name(command: ModuleType) -> str:
    return command.__name__.rpartition(".")[2].replace("_", "-")


def _run_alone(command: ModuleType, argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m lavis.{_name(command)}", description=command.HELP)
    command.add_arguments(parser)
    return guarded(lambda: command.run(parser.parse_args(argv)))


def guarded(command: Callable[[], Any]) -> int:
    """Run a command: its exit code (0 where it gives none), 2 after one `error: ...`, 130 after Ctrl-C.

    Of several processes only the first prints an error that all have (`shared`). What the system refuses (a file,
    memory) is such an error as well. What the terminal's encoding lacks is printed as its escape.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (`2>&-`): imports want one, and the next file would get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = command()
        finally:
            if not sys.stdout.closed:
                sys.stdout.flush()  # a reader that has gone is noticed here, not when the interpreter ends
    except NeucoreError as error:
        return _refused(error)
    except KeyboardInterrupt:
        _say("\nstopped")
        return 130
    except UnicodeEncodeError as error:  # a name of a config or an annotation file
        remedy = "correct it" if error.encoding == "utf-8" else "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        _say(f"error: {error.object[:200]!r} cannot be a file's name in {error.encoding} ({error.reason}); {remedy}")
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _mute()
        return 141
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _mute()
        return _refused(FileError.of(error, "a file, or the output"))
    except (MemoryError, RuntimeError) as error:
        if (reason := explained(error)) is None:
            raise
        return _refused(reason)
    return code if isinstance(code, int) else 0


def _refused(error: NeucoreError) -> int:
    if os.environ.get("RANK", "0") == "0" or not error.shared:
        _say("\n".join(visible(line) for line in f"error: {error}".split("\n")))  # it may hold names of files
    else:
        time.sleep(3)  # torchrun ends all processes when one has ended: the first must get to print
    return 2


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, or the drive is full
        print(text, file=sys.stderr, flush=True)


def _mute() -> None:
    """What is still to be printed goes nowhere: the interpreter would try it once more."""
    with contextlib.suppress(OSError):  # no file: nothing is flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Takes options spelt in full alone: `--token X` is not `--token-file X`. Those of commands are made by it too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="neucore", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"neucore {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(_name(command), help=command.HELP, description=command.HELP)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
