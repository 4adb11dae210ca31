"""neucore compare: several runs side by side, with paired differences and how sure they are."""

import argparse
import sys
from pathlib import Path

from neucore_plugin.commands import print_json

HELP = "compare runs: means over seeds, differences, and how sure they are (paired bootstrap over queries)"
EPILOG = """\
Runs whose configs differ in the seed alone count as one, with mean and spread; NAME=RUN names runs, and those of one
name count as one. Each difference is that to the baseline, the first run where none is named. A star: p under 0.05
after Holm's correction for all tests of that metric.

example:
  neucore compare tirg=output/tirg/RUN output/emoji/RUN --baseline tirg --html compared.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, what of them is compared, and the file to write."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or an output folder, or NAME=RUN")
    parser.add_argument("--baseline", metavar="NAME", help="the group that the others are measured by (default: first)")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="these splits (default: those that all runs have)")
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help="these metrics, such as R@1 R@10 (default: all)")
    parser.add_argument("--apart", action="store_true", help="do not join the seeds of one config")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write tables and plots as one HTML file")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Write what is asked for, print the comparison. Raises ConfigError and DataError."""
    from neucore_plugin.evaluation.comparison import compare, read_groups
    from neucore_plugin.evaluation.pages import comparison_page
    from neucore_plugin.report import comparison_lines

    groups = read_groups(arguments.runs, arguments.apart)
    found = compare(groups, arguments.baseline, arguments.splits, arguments.metrics)
    if arguments.html:  # first: whoever reads the table may stop at any line
        comparison_page(groups, found, arguments.html)
        print(f"page: {arguments.html}", file=sys.stderr)
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(comparison_lines(found)))
