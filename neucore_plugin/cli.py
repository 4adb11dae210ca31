"""The command line: train, evaluate, search and report here, the others in commands/. Light until a command runs."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin import __version__
from neucore_plugin.commands.report import _report
from neucore_plugin.commands.search import _positive, _search
from neucore_plugin.commands.train import _add_config_arguments, _evaluate, _train
from neucore_plugin.common.errors import ConfigError, NeucoreError

COMMANDS = ("data", "vocab", "shards", "submit", "convert")  # modules of neucore_plugin.commands
DESCRIPTION = "NEUCORE: find images by a picture and a sentence that says what should be different."
EXAMPLES = """\
examples:
  neucore train --cfg-path projects/neucore/train_emoji.yaml
  neucore train --cfg-path my.yaml --options run.seed=1 run.output_dir=output/second
  neucore evaluate --cfg-path my.yaml --checkpoint output/emoji/RUN/checkpoint_best.pth
  neucore search --checkpoint BEST.pth --folder photos --image photos/cat.jpg --text "now asleep" --html found.html
  neucore report output/emoji
  neucore data emoji
  neucore data check cirr --root /data/cirr
  neucore vocab cirr --root /data/cirr --out concepts.json
  neucore shards cirr --root /data/cirr --out /data/cirr-shards
  neucore submit cirr --cfg-path projects/neucore/eval_cirr.yaml --checkpoint BEST.pth
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the commands `neucore` and `python -m neucore_plugin`; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def run_train(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.train`, with the options of the host's own script."""
    parser = argparse.ArgumentParser(prog="python -m lavis.train", description="Train and evaluate by a config file.")
    _add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _train(arguments))


def run_evaluate(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m lavis.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m lavis.evaluate", description="Evaluate by a config file.")
    _add_config_arguments(parser, evaluate=True)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _evaluate(arguments))


def guarded(command: Callable[[], Any]) -> int:
    """Run a command: its exit code (0 where it gives none), 2 after one `error: ...`, 130 after Ctrl-C.

    Of several processes only the first prints; the others would say the same.
    """
    try:
        code = command()
    except NeucoreError as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # torchrun ends all processes when one has ended: the first must get to print
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="neucore", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"neucore {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train by a config file, then evaluate its test splits")
    _add_config_arguments(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained checkpoint by a config file")
    _add_config_arguments(evaluate, evaluate=True)
    evaluate.set_defaults(run=_evaluate)

    search = commands.add_parser("search", help="search a folder of images with a picture and a sentence")
    search.add_argument("--checkpoint", required=True, type=Path, help="what training wrote: .../checkpoint_best.pth")
    search.add_argument("--folder", required=True, type=Path, help="images to search; sub-folders are included")
    search.add_argument("--image", help="reference: an image file, or the name of an image of the folder")
    search.add_argument("--text", help="relative caption: what should be different from the reference")
    search.add_argument("-k", type=_positive, default=10, help="number of results (default 10)")
    search.add_argument("--json", action="store_true", help="print the results as JSON")
    search.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows the results")
    search.add_argument("--batch-size", type=_positive, default=32, help="images encoded at a time (default 32)")
    search.add_argument("--module", help="module of your own to import first: it registers the checkpoint's backbone")
    search.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    search.set_defaults(run=_search)

    report = commands.add_parser("report", help="print the result table of a run, or write it as a page")
    report.add_argument("folder", type=Path, help="a run's folder, or the output folder that holds results.json")
    report.add_argument("--html", type=Path, metavar="FILE", help="write tables and charts as one HTML file")
    report.add_argument("--svg", type=Path, metavar="FILE", help="write the chart of R@1 and R@10 as a picture")
    report.set_defaults(run=_report)

    for name in COMMANDS:
        module = importlib.import_module(f"neucore_plugin.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
