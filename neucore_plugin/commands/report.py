"""neucore report: the result table of a run, also as a page or a chart."""

import argparse
import sys
from pathlib import Path

from neucore_plugin.common.files import atomic_write

HELP = "print the result table of a run, or write it as a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and the files to write."""
    parser.epilog = "example: neucore report output/emoji --html report.html"
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="a run's folder, finished or not, or an output folder: then its latest run",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write one HTML file: tables, charts, learning curves, example queries, where concepts land",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the chart of R@1 and R@10 as a picture")


def run(arguments: argparse.Namespace) -> None:
    """Write what is asked for, print the table. Raises DataError."""
    from neucore_plugin.evaluation.pages import run_page, run_title, standing
    from neucore_plugin.evaluation.stored import read_run
    from neucore_plugin.report import results_chart_svg, table_lines

    found = read_run(arguments.folder)
    if arguments.svg:  # files first: whoever reads the table may stop at any line
        with atomic_write(arguments.svg, "w") as stream:
            stream.write(results_chart_svg(found.results))
    if arguments.html:
        run_page(found, arguments.html, run_title(found))
        print(f"page: {arguments.html}", file=sys.stderr)
    if text := standing(found):
        print(text, file=sys.stderr)
    if found.results:
        print("\n".join(table_lines(found.results)))
