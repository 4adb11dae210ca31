"""Write the result tables of README.md and docs from docs/study.json, between markers; needs neither torch nor lavis.

    python docs/make_tables.py                                  # the tables anew
    python docs/make_tables.py output/study_emoji/study.json    # first docs/study.json, from a finished study

A marker is `<!-- study: NAME -->`, with NAME of `PARTS`; what follows it up to `<!-- study: end -->` is replaced.
`tests/test_docs_tables.py` holds the pages against docs/study.json.
"""

import re
import sys
from pathlib import Path
from typing import Any

from neucore_plugin import cli
from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import atomic_write, read_json, read_text, write_json
from neucore_plugin.study import tables

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "docs" / "study.json"
PAGES = tuple(ROOT / name for name in ("README.md", "docs/explanation/results.md", "docs/study.md"))
FORMAT = "neucore-study-1"
MEANINGS = {
    "val": "pairs not seen in training",
    "test_combo": "unseen combinations of known attributes",
    "test_role": "roles never seen in training",
    "test_word": "held-out objects",
    "test_two": "two changes at once, trained on one",
}


def _differences(summary: tables.Summary) -> list[str]:
    return tables.differences_table(summary).lines if summary["differences"] else [_OPEN]


def _ablations(summary: tables.Summary) -> list[str]:
    return tables.ablations_table(summary).lines if summary["ablations"] else [_OPEN]


_OPEN = "*No study has been run yet.*"
PARTS = {
    "facts": tables.facts,
    "half": lambda summary: tables.partial_table(summary).lines,
    "methods": lambda summary: tables.methods_table(summary).lines,
    "differences": _differences,
    "ablations": _ablations,
    "goals": lambda summary: tables.goals_list(summary) or [_OPEN],
}
MARKED = re.compile(r"<!-- study: (?!end)(\S+) -->\n.*?<!-- study: end -->", re.DOTALL)


def load(path: Path = STUDY) -> dict[str, Any]:
    """A study's summary, its splits with what they test. Raises DataError."""
    summary = read_json(path, dict, "give the study.json of `neucore study`")
    if summary.get("format") != FORMAT:
        raise DataError(f"{path}: expected the format {FORMAT}, given {summary.get('format')!r}")
    for split, about in summary["splits"].items():
        about["meaning"] = MEANINGS.get(split, "")
    return summary


def written(page: str, summary: tables.Summary) -> str:
    """The text of a page with all marked tables anew. Raises DataError for a marker that is no part."""

    def part(found: re.Match) -> str:
        if found[1] not in PARTS:
            raise DataError(f"<!-- study: {found[1]} -->: no such part; there are {', '.join(PARTS)}")
        lines = "\n".join(PARTS[found[1]](summary))
        return f"<!-- study: {found[1]} -->\n\n{lines}\n\n<!-- study: end -->"

    text = MARKED.sub(part, page)
    if page.count("<!-- study:") != 2 * len(MARKED.findall(page)):
        raise DataError("a marker <!-- study: ... --> has no end, or an end no beginning")
    return text


def small(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what no page shows: folders, further metrics."""
    shown = tables.metrics_shown(summary)

    def kept(results: dict[str, Any]) -> dict[str, Any]:
        return {split: {name: found[name] for name in shown if name in found} for split, found in results.items()}

    rows = {}
    for name, row in summary["rows"].items():
        partial = {part: kept(found) for part, found in row["partial"].items()} if name == summary["main"] else {}
        rows[name] = {key: value for key, value in row.items() if key != "folders"}
        rows[name] |= {"results": kept(row["results"]), "partial": partial}
    return {**summary, "rows": rows}


def main(given: list[str]) -> None:
    """Write the pages; with an argument docs/study.json first. Raises DataError."""
    if given:
        write_json(STUDY, small(read_json(Path(given[0]), dict, "give the study.json of `neucore study`")))
    summary = load()
    for path in PAGES:
        text = read_text(path)
        new = written(text, summary)
        if new != text:
            with atomic_write(path, "w") as stream:
                stream.write(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv[1:])))
