"""neucore search: an index, or a folder of images, with a picture and a sentence."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neucore_plugin.commands import positive, print_json
from neucore_plugin.commands.loading import add_model_arguments, load
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.names import name_of
from neucore_plugin.common.text import visible

HELP = "search an index, or a folder of images, with a picture and a sentence"
_EXAMPLES = """\
examples:
  neucore search photos.index --image cat.jpg --text "now asleep"
  neucore search photos.index --image cat.jpg --text "now asleep" --then "on a sofa" --not "a dog" --explain
  neucore search products.index --text "a red dress" --filter 'price < 50' -k 20 --html found.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The index or the folder, the checkpoint, the query, and the form of the answer."""
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("index", nargs="?", type=Path, metavar="INDEX", help="what `neucore index build` wrote")
    parser.add_argument("--folder", type=Path, help="in place of INDEX: images that are encoded for this one search")
    parser.add_argument(
        "--qdrant",
        metavar="URL",
        help="in place of INDEX: a Qdrant server, see `neucore index push`; needs --collection",
    )
    parser.add_argument("--collection", metavar="NAME", help="what is searched in the Qdrant server")
    add_model_arguments(parser, required=False)
    several = {"action": "append", "default": []}
    parser.add_argument(
        "--image", **several, help="reference: an image file, or the name of an image searched in; several are averaged"
    )
    parser.add_argument("--text", type=name_of, help="relative caption: what should be different from the reference")
    parser.add_argument("--then", **several, type=name_of, metavar="TEXT", help="a further turn of a dialogue")
    parser.add_argument(
        "--not", **several, dest="without_texts", type=name_of, metavar="TEXT", help="what it should not be"
    )
    parser.add_argument("--not-image", **several, metavar="IMAGE", help="a picture that it should not be like")
    parser.add_argument("--filter", metavar="CONDITION", help="on attributes: 'category == \"dress\" and price < 50'")
    parser.add_argument("--exclude", **several, metavar="NAME", help="an image that is no answer, by its name")
    parser.add_argument("-k", type=positive, default=10, help="number of results (default 10)")
    parser.add_argument("--exact", action="store_true", help="score every image, also where there is a first stage")
    parser.add_argument("--explain", action="store_true", help="show the concepts read, and the terms of each score")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows the results")
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="images of --folder encoded at a time (default 32)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Search, print or write what was found. Raises NeucoreError."""
    _check(arguments)
    from neucore_plugin.host.importing import before_import
    from neucore_plugin.retrieval.queries import Query, concepts

    query = Query(
        images=arguments.image,
        text=arguments.text,
        then=arguments.then,
        without_texts=arguments.without_texts,
        without_images=arguments.not_image,
        where=arguments.filter,
        exclude=arguments.exclude,
        k=arguments.k,
        explain=arguments.explain,
        exact=arguments.exact,
    )
    before_import()
    if arguments.index is not None:
        index = _opened(arguments, query)
    else:
        index = _encoded(arguments) if arguments.folder is not None else _collection(arguments)
    read = concepts(index.model, query)  # not in the time: the first call of a model loads its tagger
    start = time.perf_counter()
    hits = index.search_many([query])[0]
    took = 1000 * (time.perf_counter() - start)
    print(f"searched {len(index):,} images in {took:.1f} ms", file=sys.stderr)
    read = read if arguments.explain else []
    if not hits and query.where is None and not query.exclude:
        place = arguments.index or arguments.collection or f"--folder {arguments.folder}"
        raise DataError(f"{place} holds no image but the reference; give one with others")
    _show(arguments, hits, read)
    if arguments.html:
        _write_page(arguments.html, index, query, hits, read)


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    given = [*arguments.image, *(text for text in [arguments.text, *arguments.then] if (text or "").strip())]
    if not given:
        raise DataError("nothing to search with; give --image, --text, or both")
    if sum(place is not None for place in (arguments.index, arguments.folder, arguments.qdrant)) != 1:
        some = arguments.folder or arguments.qdrant
        what = "give one of them" if some else "give INDEX, which `neucore index build` writes, or --folder"
        raise DataError(f"what is to be searched, --qdrant, INDEX or --folder? {what}")
    if (arguments.qdrant is None) != (arguments.collection is None):
        raise ConfigError("--qdrant and --collection go together: the server's address and the name of its collection")
    if arguments.qdrant is not None and not (arguments.checkpoint or arguments.model_type):
        raise ConfigError("a Qdrant collection does not hold its model; give --checkpoint, or --model-type")
    if arguments.folder is not None:
        if not arguments.folder.is_dir():
            raise DataError(f"--folder {arguments.folder} is no folder")
        if not (arguments.checkpoint or arguments.model_type):
            raise ConfigError("--folder is encoded by a model; give --checkpoint, or --model-type")
    elif arguments.index is not None and not (arguments.index / "manifest.json").is_file():
        _no_index(arguments.index)
    if arguments.model_type and not arguments.model_type.startswith("zeroshot_"):
        raise ConfigError(f"--model-type {arguments.model_type}: has nothing trained to search with; give --checkpoint")
    if arguments.filter is not None:
        from neucore_plugin.retrieval.filters import parse

        parse(arguments.filter)


def _no_index(place: Path) -> None:
    build = f"`neucore index build {'PICTURES' if not place.is_dir() else place} --checkpoint BEST.pth --out INDEX`"
    if not place.exists():
        raise DataError(f"index {place} does not exist; make one with {build}")
    if not place.is_dir():
        raise DataError(f"{place} is a file, no index; make one of a folder with {build}")
    raise DataError(
        f"{place} is no index (it has no manifest.json). If these are your pictures: {build} encodes them once, "
        f"`neucore search --folder {place} --checkpoint BEST.pth` for this one search"
    )


def _opened(arguments: argparse.Namespace, query: Any) -> Any:
    """The index, with the model that it was built by."""
    from neucore_plugin.retrieval import GalleryIndex
    from neucore_plugin.retrieval.queries import check_named

    index = GalleryIndex.open(arguments.index)
    check_named(index, query)  # before the seconds that loading takes
    index.attach(load(arguments, index), where=f" in {arguments.index}")
    return index


def _collection(arguments: argparse.Namespace) -> Any:
    """A gallery in a Qdrant server, which is searched like an index."""
    from neucore_plugin.retrieval.qdrant_server import QdrantCollection, connect

    client = connect(arguments.qdrant)  # what is wrong with the address is said before the model is loaded
    model = load(arguments)
    return QdrantCollection(client, arguments.collection, model, arguments.qdrant)


def _encoded(arguments: argparse.Namespace) -> Any:
    """An index of the folder, in memory."""
    from neucore_plugin.common.images import told
    from neucore_plugin.retrieval import GalleryIndex

    model = load(arguments)
    log = logging.getLogger("neucore_plugin.retrieval")
    level = log.level
    log.setLevel(logging.ERROR)  # what could not be read is printed below
    try:
        index = GalleryIndex.build(
            model, arguments.folder, batch_size=arguments.batch_size, progress=not arguments.json
        )
    finally:
        log.setLevel(level)
    for failure in index.failures:
        print(visible(f"left out {failure.name}: {failure.reason}"), file=sys.stderr)
    if index.left_out:
        print(visible(f"{arguments.folder}: {told(index.left_out)}"), file=sys.stderr)
    return index


def _show(arguments: argparse.Namespace, hits: Sequence[Any], read: Sequence[tuple[str, Sequence[str]]]) -> None:
    if arguments.json:
        rows = [
            {"rank": hit.rank, "name": hit.name, "score": hit.score, "path": name_of(str(hit.path))}
            | ({"attributes": dict(hit.attributes)} if hit.attributes else {})
            | ({"terms": dict(hit.terms)} if hit.terms is not None else {})
            for hit in hits
        ]
        texts = [{"text": text, "concepts": list(words)} for text, words in read]
        print_json({"texts": texts, "hits": rows} if arguments.explain else rows)
        return
    if not hits:
        print("no image is left that may be an answer: see --filter and --exclude", file=sys.stderr)
    for text, words in read:
        print(visible(f"concepts of {text!r}: {', '.join(words) or 'none'}"))
    for hit in hits:
        terms = " ".join(f"{value:+.4f} {term}" for term, value in (hit.terms or {}).items())
        print(f"{hit.rank:3d}  {hit.score:8.4f}  {f'= {terms}  ' if terms else ''}{visible(hit.name)}")


def _write_page(path: Path, index: Any, query: Any, hits: Sequence[Any], read: Sequence[Any]) -> None:
    from neucore_plugin.report import search_page

    seen, unlike = ([index.reference(one)[0] for one in some] for some in (query.references, query.without_images))
    search_page(path, seen, query.turns, hits, without_images=unlike, without_texts=query.negatives, concepts=read)
    print(f"page: {path}", file=sys.stderr)
