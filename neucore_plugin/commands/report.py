"""neucore report: the result table of a run, also as a page or a chart."""

import argparse
import sys
from pathlib import Path

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import read_json

HELP = "print the result table of a run, or write it as a page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and the files to write."""
    parser.add_argument("folder", type=Path, help="a run's folder, or the output folder that holds results.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write tables and charts as one HTML file")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the chart of R@1 and R@10 as a picture")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, write what is asked for. Raises DataError."""
    found = next(
        (path for name in ("evaluation.json", "results.json") if (path := arguments.folder / name).is_file()), None
    )
    if found is None:
        raise DataError(
            f"{arguments.folder}: neither evaluation.json nor results.json is there; `neucore evaluate` writes them"
        )
    content = read_json(found, dict, "it is no result file: evaluate again")
    content = content if "results" in content else {"results": content}
    results, per_change = content.pop("results"), content.pop("per_change", None)
    from neucore_plugin.report import check_results, table_lines

    check_results(results, found)
    check_results(per_change or {}, found)
    print("\n".join(table_lines(results)))
    if arguments.svg:
        from neucore_plugin.common.files import atomic_write
        from neucore_plugin.report import results_chart_svg

        with atomic_write(arguments.svg, "w") as stream:
            stream.write(results_chart_svg(results))
    if arguments.html:
        from neucore_plugin.report import write_report
        from neucore_plugin.report.charts import row_label

        rows = next(iter(results.values()), {})
        title = f"{row_label(next(iter(rows), 'results'))}: {arguments.folder.resolve().name}"
        write_report(arguments.html, title, results, settings=content, per_change=per_change)
        print(f"page: {arguments.html}", file=sys.stderr)
