"""Files for the test servers of CIRR and CIRCO: writing them, and checking any such file before it is uploaded.

CIRR (rc2): {"version": "rc2", "metric": "recall", "12063": [50 names], ...}, and "recall_subset" with the 3 best of the
other members of a query's group; 5 MB at most; the reference takes no place. CIRCO: {"0": [50 image ids], ...}, as
numbers or as texts; its own example files and evaluation rank the reference too. Knows neither torch nor lavis.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.common.errors import DataError, FileError, first_few
from neucore_plugin.common.files import atomic_write
from neucore_plugin.datasets.annotations import is_whole
from neucore_plugin.datasets.triplets import Gallery, Triplet

LENGTHS = {"recall": 50, "recall_subset": 3, "circo": 50}
MAX_BYTES = {"recall": 5_000_000, "recall_subset": 5_000_000}
SHOWN = 10
# Pair ids of CIRR are no row of numbers, so only their count is known here; CIRCO's are 0, 1, 2, ...
QUERIES = {("cirr", "test1"): 4148, ("cirr", "val"): 4181, ("circo", "test"): 800, ("circo", "val"): 220}


def cirr_content(metric: str, rankings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A CIRR file of {pair id: image names, best first}; metric: "recall" or "recall_subset"."""
    return {"version": "rc2", "metric": metric, **{query: list(names) for query, names in rankings.items()}}


def circo_content(rankings: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """A CIRCO file of {query id: image ids as text, best first}."""
    return {query: [int(name) for name in names] for query, names in rankings.items()}


def write(path: str | Path, content: Mapping[str, Any], split: tuple[Sequence[Triplet], Gallery] | None = None) -> Path:
    """Write a file and check it; a file with problems is not left behind. Raises DataError listing them."""
    path = Path(path)
    text = json.dumps(content, ensure_ascii=False)
    if problems := _problems(_parse(text), len(text.encode("utf-8")), split):
        raise DataError(_listing(path, problems))
    with atomic_write(path, "w") as stream:
        stream.write(text)
    return path


def check(
    path: str | Path,
    split: tuple[Sequence[Triplet], Gallery] | None = None,
    published: tuple[str, str] | None = None,
) -> str:
    """What a file is, such as "CIRR recall, 4,148 queries". Raises DataError listing what its server would refuse.

    split: triplets and gallery of the test split; without it names cannot be compared. published: the data set and the
    split that the file must belong to, as in QUERIES: then files of another one, or with other queries, are refused.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        pairs = _parse(raw.decode("utf-8"))
    except OSError as error:
        raise DataError(str(FileError.of(error, path))) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON ({error})") from None
    kind = _kind(dict(pairs))
    problems = _problems(pairs, len(raw), split)
    if published is not None and kind is not None:
        if (kind == "circo") != (published[0] == "circo"):
            form = "of CIRCO (it names no metric)" if kind == "circo" else f"of CIRR (its metric is {kind})"
            raise DataError(f"{path}: has the form {form}; a file for {published[0].upper()} is wanted")
        if split is None:
            problems += _count_problems(pairs, published)
    if problems:
        raise DataError(_listing(path, problems))
    count = sum(key not in ("version", "metric") for key, _ in pairs)
    return f"{'CIRCO' if kind == 'circo' else f'CIRR {kind}'}, {count:,} queries"


def _count_problems(pairs: Sequence[tuple[str, Any]], published: tuple[str, str]) -> list[str]:
    """What the published number of queries tells where their ids are not at hand."""
    found = {key for key, _ in pairs if key not in ("version", "metric")}
    wanted = QUERIES[published]
    if published[0] != "circo":
        return [f"has {len(found):,} queries; {published[1]} has {wanted:,}"] * (len(found) != wanted)
    known = [str(number) for number in range(wanted)]
    problems = [f"query {key!r} is not of this split (0 to {wanted - 1})" for key in found.difference(known)]
    return problems + [f"query {key!r} is missing" for key in known if key not in found]


def _listing(path: Path, problems: Sequence[str]) -> str:
    separator = "\n  "
    return f"{path}: {len(problems)} problems{separator}{first_few(problems, SHOWN, separator)}"


def _parse(text: str) -> list[tuple[str, Any]]:
    """Key and value of every entry, in order: a dict would hide an id that stands twice."""
    found = json.loads(text, object_pairs_hook=list)
    if not isinstance(found, list) or not all(isinstance(pair, tuple) for pair in found):
        raise DataError("a submission is a JSON object of lists, one a query")
    return found


def _kind(content: Mapping[str, Any]) -> str | None:
    if "metric" not in content and "version" not in content:
        return "circo"
    return content.get("metric") if content.get("metric") in ("recall", "recall_subset") else None


def _problems(
    pairs: Sequence[tuple[str, Any]], size: int, split: tuple[Sequence[Triplet], Gallery] | None
) -> list[str]:
    content = dict(pairs)
    kind = _kind(content)
    if kind is None:
        return [f"metric is {content.get('metric')!r}; allowed: recall, recall_subset (none in a CIRCO file)"]
    problems = [f"{key!r} stands {n} times" for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if kind != "circo" and content.get("version") != "rc2":
        problems.append(f"version is {content.get('version')!r}; allowed: rc2")
    if size > MAX_BYTES.get(kind, size):
        problems.append(f"has {size:,} bytes; the server takes {MAX_BYTES[kind]:,} at most")
    rankings = {key: value for key, value in content.items() if kind == "circo" or key not in ("version", "metric")}
    if not rankings:
        problems.append("holds no query")
    queries = None if split is None else {triplet.query_id: triplet for triplet in split[0]}
    known = None if split is None else set(split[1].ids)
    if queries is not None:
        problems += [f"query {key!r} is not of this split" for key in rankings if key not in queries]
        problems += [f"query {key!r} is missing" for key in queries if key not in rankings]
    for key, ranking in rankings.items():
        triplet = None if queries is None else queries.get(key)
        problems += [f"query {key!r}: {text}" for text in _ranking_problems(kind, ranking, triplet, known)]
    return problems


def _name(kind: str, image: Any) -> str | None:
    """An image of a ranking by its name in the gallery; None for what is none. CIRCO's ids are numbers or texts."""
    if kind != "circo":
        return image if isinstance(image, str) else None
    if isinstance(image, str) and re.fullmatch("[0-9]{1,18}", image):
        image = int(image)
    return str(image) if is_whole(image) else None


def _ranking_problems(kind: str, ranking: Any, triplet: Triplet | None, known: set[str] | None) -> list[str]:
    names = [_name(kind, image) for image in ranking] if isinstance(ranking, list) else [None]
    if None in names:
        what = "image ids (whole numbers, or such as text)" if kind == "circo" else "image names"
        return [f"needs a list of {what}"]
    problems = []
    if len(names) != LENGTHS[kind]:
        problems.append(f"has {len(names)} images; exactly {LENGTHS[kind]} are wanted")
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        problems.append(f"{repeated[0]!r} stands twice")
    if kind != "circo" and (suffixed := [name for name in names if name.endswith((".png", ".jpg", ".jpeg"))]):
        problems.append(f"{suffixed[0]!r} carries a suffix; names stand without one")
    elif known is not None and (unknown := [name for name in names if name not in known]):
        problems.append(f"{unknown[0]!r} is no image of the gallery")
    if kind != "circo" and triplet is not None and triplet.reference in names:
        problems.append(f"holds its own reference {triplet.reference!r}")
    if kind == "recall_subset" and triplet is not None and (out := [n for n in names if n not in triplet.members]):
        problems.append(f"{out[0]!r} is no member of the query's group")
    return problems
