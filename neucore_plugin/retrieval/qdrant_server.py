"""A gallery in a Qdrant server (`qdrant-client`): sharded and replicated there, and scored there exactly.

Each image is a point with up to three vectors: `nearest`, which is looked up, and the factors `weighted` and `squares`
(and `cosines` and `units` where `nearest` is another vector), which are not indexed. A query is two requests: the
nearest points give ids; these alone are scored, by a formula of products (`qdrant_formula.py`). The collection's
metadata says which model made it. The client's `:memory:` mode does the same in this process. Its mode of a folder is
refused: it unpickles what it finds there.
"""

import os
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from neucore_plugin.common.errors import ConfigError, DataError, NeucoreError, first_few
from neucore_plugin.common.files import file_errors, sha256_file, sha256_text
from neucore_plugin.common.images import Picture, load_for
from neucore_plugin.common.names import name_of, path_of
from neucore_plugin.common.shard_image import ShardImage
from neucore_plugin.retrieval import filters, queries
from neucore_plugin.retrieval.encoding import evaluating, fingerprint_of
from neucore_plugin.retrieval.index import Hit
from neucore_plugin.retrieval.nearest import FirstOrder, Parts, check_factors, finite
from neucore_plugin.retrieval.qdrant_filters import condition, payload_key
from neucore_plugin.retrieval.qdrant_formula import scored
from neucore_plugin.retrieval.sources import File, canonical, relative

FORMAT = "neucore-collection-1"
KEY = "QDRANT_API_KEY"  # environment variable: a key on a command line is seen by everybody on the machine
CANDIDATES = 1000  # looked up, then scored exactly
EXACT_UP_TO = 10_000  # images; collections of so few are scored whole
SAMPLE = 20_000  # images that the mean of the first stage is taken over
BATCH = 128  # points a request: some 5 MB of JSON
_TIES = 100  # hits beyond k that are fetched, so that equal scores can be put in the gallery's order
_INDEXED = 64  # attributes that get an index


@dataclass(frozen=True)
class Layout:
    """How a new collection is laid out; None leaves it to the server. quantization: int8 copies kept in memory."""

    shard_number: int | None = None
    replication_factor: int | None = None
    on_disk: bool = False
    quantization: bool = False


class QdrantCollection:
    """A collection that holds a gallery, searched like an index; opened with `connect`, filled with `push`.

    model: what queries are encoded with. root: folder that the pictures' paths are relative to, as text. index: id of
    the index that it was filled from.
    DataError: no such collection, one of something else or of another model; the server does not answer.
    """

    def __init__(self, client: Any, name: str, model: Any, where: str = "the server"):
        self.client, self.name, self.model, self.where = client, name, model, where
        with answering(where):
            if not client.collection_exists(name):
                there = sorted(found.name for found in client.get_collections().collections)
                raise DataError(
                    f"Qdrant at {where} has no collection {name!r}; make it with `neucore index push`. It has "
                    f"{first_few(map(repr, there), 5) or 'none'}"
                )
            settings = client.get_collection(name).config
        noted = getattr(settings, "metadata", None) or {}
        if noted.get("format") != FORMAT:
            raise DataError(
                f"collection {name!r} at {where} was not made by `neucore index push` (its metadata lacks the format "
                f"{FORMAT!r}); choose another name"
            )
        squares = noted["squares"]
        squares = None if squares is None else torch.tensor(squares, dtype=torch.float64)
        self.order = FirstOrder(noted["shared"], squares, noted["count"])
        self.width = settings.params.vectors["nearest"].size
        self.beside = sorted(set(settings.params.vectors) - {"nearest"})
        self.model_fingerprint, self.root, self.index = noted["model"], noted["root"], noted["index"]
        given = fingerprint_of(model)
        if given and self.model_fingerprint and given != self.model_fingerprint:
            raise DataError(
                f"collection {name!r} at {where} was made by model {self.model_fingerprint}, but the model given is "
                f"{given}: their encodings cannot be compared; choose another collection, or that model"
            )

    @classmethod
    def connect(cls, url: str, name: str, model: Any) -> "QdrantCollection":
        """url: http://HOST:6333; its key: environment QDRANT_API_KEY."""
        return cls(connect(url), name, model, url)

    def __len__(self) -> int:
        with answering(self.where):
            return self.client.count(self.name, exact=True).count

    # ---- as an index ------------------------------------------------------------------------------------------------

    def search_many(self, asked: Sequence[queries.Query]) -> list[list[Hit]]:
        """What `GalleryIndex.search_many` gives, for queries of `queries.Query`; positions are None.

        DataError for an explained search: the terms are not told apart in the server.
        """
        if any(query.explain for query in asked):
            raise DataError("a search in a Qdrant server cannot be explained; search the index itself")
        with torch.inference_mode(), evaluating(self.model):
            encoded = queries.encode(self.model, asked, self.reference)
            return [self._hits(query, one) for query, one in zip(asked, encoded, strict=True)]

    def _hits(self, query: queries.Query, encoded: queries.Encoded) -> list[Hit]:
        models = _models()
        must = [condition(filters.parse(query.where))] if query.where and query.where.strip() else []
        unwanted = [point_id(name) for name in (*encoded.left_out, *map(self._known, query.exclude))]
        must_not = [models.HasIdCondition(has_id=unwanted)] if unwanted else []
        keep = models.Filter(must=must, must_not=must_not) if must or must_not else None
        parts = [(weight, self.model.query_factors(part)) for weight, part in encoded.parts]
        found = self.nearest(parts, query.k, keep, query.exact or None)
        return [
            Hit(rank, _heard(payload["name"]), score, self._file(payload), None, payload["attributes"])
            for rank, (score, payload) in enumerate(found, start=1)
        ]

    def reference(self, image: Picture) -> tuple[Any, str | None]:
        """The picture meant by a name in the collection, a file, its bytes or a picture; its name there, if any."""
        processor = getattr(self.model, "image_processor", None)
        if not isinstance(image, str | os.PathLike):
            return load_for(processor, image), None
        name = name_of(image)
        if payload := self._payload(name):
            return load_for(processor, self._file(payload)), name
        if not os.path.exists(image):
            raise DataError(f"reference {name!r} is neither a file nor a name in collection {self.name!r}")
        models = _models()
        path = _said(relative(canonical(image), path_of(self.root) if self.root else None))
        mine = models.FieldCondition(key="path", match=models.MatchValue(value=path)) if isinstance(path, str) else None
        with answering(self.where):
            same = self.client.scroll(self.name, models.Filter(must=[mine]), limit=1)[0] if mine else []
        return load_for(processor, image), _heard(same[0].payload["name"]) if same else None

    def _payload(self, name: str) -> dict[str, Any] | None:
        with answering(self.where):
            found = self.client.retrieve(self.name, [point_id(name)], with_payload=True)
        return found[0].payload if found else None

    def _known(self, name: str) -> str:
        if self._payload(name) is None:
            raise DataError(f"no image {name!r} in collection {self.name!r}")
        return name

    def _file(self, payload: Mapping[str, Any]) -> File:
        path = path_of(_heard(payload["path"]))
        path = path_of(self.root) / path if self.root else path
        if payload.get("place") is None:
            return path
        return ShardImage(str(path), payload["place"], payload["bytes"] or 0, _heard(payload["name"]))

    # ---- scores -----------------------------------------------------------------------------------------------------

    def nearest(
        self, parts: Parts, k: int | None = 10, keep: Any = None, exact: bool | None = None
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k best points for one query, None = all: (score, payload); equal scores in the gallery's order.

        parts: see `FirstOrder.query`. keep: the Qdrant filter of those to look at. exact: score all of them, not only
        the nearest; by default where the collection is small.
        """
        models = _models()
        nearest = self.order.query(parts).tolist()
        with answering(self.where):  # an estimate: to count very many points takes long
            count = self.client.count(self.name, exact=False).count
        if exact or k is None or count <= 2 * EXACT_UP_TO:
            count = len(self)
        k = count if k is None else k
        exact = count <= EXACT_UP_TO if exact is None else exact
        wanted = count if exact else min(count, max(CANDIDATES, 4 * k))
        if count == 0:
            return []
        with answering(self.where):
            if not exact:
                found = self.client.query_points(
                    self.name,
                    query=nearest,
                    using="nearest",
                    query_filter=keep,
                    limit=wanted,
                    search_params=models.SearchParams(hnsw_ef=wanted),
                    with_payload=False,
                ).points
                if not found:
                    return []
                keep, wanted = (
                    models.Filter(must=[models.HasIdCondition(has_id=[point.id for point in found])]),
                    len(found),
                )
            prefetch, formula = scored(_models(), parts, self.order, self.beside, self.width, keep, wanted)
            found = self.client.query_points(
                self.name, prefetch=prefetch, query=formula, limit=min(wanted, k + _TIES), with_payload=True
            ).points
        best = sorted(found, key=lambda point: (-point.score, point.payload["unit"], point.payload["row"]))
        return [(point.score, point.payload) for point in best[:k]]


def connect(url: str) -> Any:
    """A client for a server's address. ConfigError: the package is missing, or no such address."""
    _models()
    from qdrant_client import QdrantClient

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--qdrant {url}: give the server's address, such as http://127.0.0.1:6333")
    with answering(url):
        return QdrantClient(url=url, api_key=os.environ.get(KEY) or None, timeout=60, check_compatibility=False)


@contextmanager
def answering(where: str) -> Iterator[None]:
    """What the client and the server say, as one error of ours."""
    from httpx import InvalidURL
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except NeucoreError:
        raise
    except UnexpectedResponse as error:
        said = " ".join(error.content.decode("utf-8", "replace").split())[:300]
        remedy = f"; set {KEY} to its key" if error.status_code in (401, 403) else ""
        raise DataError(f"Qdrant at {where} refused: {error.status_code} {said}{remedy}") from error
    except ResponseHandlingException as error:
        raise DataError(f"Qdrant at {where} does not answer ({error.source}); is the server running?") from error
    except (ApiException, InvalidURL, ValueError) as error:  # the last: what the client itself refuses
        raise DataError(f"Qdrant at {where}: {' '.join(str(error).split())[:300]}") from error


def push(
    index: Any, client: Any, name: str, layout: Layout, where: str = "the server", progress: bool = True
) -> tuple[int, int]:
    """Make a collection equal to a saved index that has its model; (points written, points there afterwards).

    Unit by unit, and units that are there already are passed over: after a kill it goes on where it was.
    DataError: the collection holds another model's images, another folder's, or something else.
    """
    models = _models()
    if index.folder is None:
        raise DataError("an index held in memory cannot be pushed; save it first (GalleryIndex.save)")
    if not len(index):
        raise DataError("the index holds no images yet; finish its build, or add some")
    check_factors(index.model)
    with answering(where):
        new = not client.collection_exists(name)
    if new:
        _create(index, client, name, layout, where)
    there = QdrantCollection(client, name, index.model, where)
    if index.manifest.id != there.index and index.manifest.root != there.root:
        raise DataError(
            f"collection {name!r} at {where} holds the pictures of {there.root!r}, the index those of "
            f"{index.manifest.root!r}; choose another collection"
        )
    with answering(where):  # the pictures may have moved, the index may have been built anew
        client.update_collection(name, metadata={"root": index.manifest.root, "index": index.manifest.id})
    units = list(_units(index))
    written, indexed = 0, set()

    def of_unit(unit: str) -> Any:
        return models.FieldCondition(key="unit", match=models.MatchValue(value=unit))

    with answering(where), tqdm(total=len(index), desc=f"to {name}", unit="image", disable=not progress) as bar:
        for unit, start, rows in units:
            mine = models.Filter(must=[of_unit(unit)])
            if client.count(name, count_filter=mine, exact=True).count == len(rows):
                bar.update(len(rows))
                continue
            ids: list[str] = []
            for first in range(0, len(rows), BATCH):
                batch = _points(index, there, unit, start, rows[first : first + BATCH], indexed)
                client.upsert(name, batch, wait=True)
                ids += batch.ids
                bar.update(len(batch.ids))
            written += len(rows)
            gone = models.Filter(must=[of_unit(unit)], must_not=[models.HasIdCondition(has_id=ids)] if ids else [])
            client.delete(name, models.FilterSelector(filter=gone), wait=True)
        known = models.FieldCondition(key="unit", match=models.MatchAny(any=[unit for unit, _, _ in units]))
        client.delete(name, models.FilterSelector(filter=models.Filter(must_not=[known])), wait=True)
    if (after := len(there)) != len(index):
        raise DataError(
            f"collection {name!r} at {where} holds {after} points after the push, not {len(index)}; push again"
        )
    return written, after


def _units(index: Any) -> Iterator[tuple[str, int, list[int]]]:
    """(unit, gallery position of its first row, its rows that are there).

    A unit is its name and the sum of its JSON: a build of the same names in another folder, or of pictures that
    changed, names its units alike.
    """
    for part in index.parts:
        with file_errors(index.folder):
            unit = f"{part.unit}/{sha256_file(index.folder / 'units' / f'{part.unit}.json')[:16]}"
        there = None if index.alive is None else index.alive[part.start : part.start + part.count]
        yield unit, part.start, list(range(part.count)) if there is None else there.nonzero().flatten().tolist()


def _create(index: Any, client: Any, name: str, layout: Layout, where: str) -> None:
    """A collection for this index, with the mean of a sample of it."""
    models = _models()
    alive = torch.arange(index.stored) if index.alive is None else index.alive.nonzero().flatten()
    sample = alive[:: max(1, len(alive) // SAMPLE)]
    factors = index.model.gallery_factors(index.candidates(sample))
    order = FirstOrder.of(factors)
    widths = {"nearest": order.gallery(factors).shape[1]}
    if order.squares is not None:
        beside = ("weighted", "squares") if order.shared or "cosines" not in factors else tuple(factors)
        widths |= {key: factors[key].shape[1] for key in beside}
    int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
    vectors = {
        key: models.VectorParams(
            size=width,
            distance=models.Distance.DOT,
            on_disk=layout.on_disk or None,
            # no graph for those that are only read for given points
            hnsw_config=None if key == "nearest" else models.HnswConfigDiff(m=0),
            quantization_config=models.ScalarQuantization(scalar=int8)
            if layout.quantization and key == "nearest"
            else None,
        )
        for key, width in widths.items()
    }
    metadata = {
        "format": FORMAT,
        "model": index.model_fingerprint,
        "root": index.manifest.root,
        "index": index.manifest.id,
        "shared": order.shared,
        "squares": None if order.squares is None else order.squares.tolist(),
        "count": order.count,
    }
    with answering(where):
        client.create_collection(
            name,
            vectors_config=vectors,
            shard_number=layout.shard_number,
            replication_factor=layout.replication_factor,
            metadata=metadata,
        )
        if (client.get_collection(name).config.metadata or {}).get("format") != FORMAT:
            client.delete_collection(name)
            raise DataError(f"Qdrant at {where} keeps no metadata of collections; use server and client 1.16 or later")
        for key in ("unit", "name", "path"):
            _index_payload(client, name, key, "KEYWORD")


def _index_payload(client: Any, name: str, key: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's memory has no such indexes
        client.create_payload_index(name, key, getattr(_models().PayloadSchemaType, kind))


def point_id(name: str) -> str:
    """Id of an image's point: the same for the same name, in every collection."""
    return str(uuid.UUID(hex=sha256_text(name)[:32]))


def _points(index: Any, there: "QdrantCollection", unit: str, start: int, rows: Sequence[int], indexed: set) -> Any:
    """Rows of a unit as points; what their attributes hold is indexed, so that filters are quick."""
    places = [start + row for row in rows]
    factors = index.model.gallery_factors(index.candidates(torch.tensor(places)))
    vectors = {"nearest": there.order.gallery(factors, learn=False)}
    vectors |= {key: finite(factors[key].float(), "the gallery") for key in there.beside}
    known = [index.row(place) for place in places]
    payloads = []
    for number, row in zip(rows, known, strict=True):
        payload = {"name": _said(row.name), "path": _said(row.path), "unit": unit, "row": number}
        if row.place is not None:
            payload |= {"place": row.place, "bytes": row.bytes}
        payloads.append(payload | {"attributes": dict(row.attributes)})
        for key, kind in _kinds(row.attributes):
            if key not in indexed and len(indexed) < _INDEXED:
                indexed.add(key)
                _index_payload(there.client, there.name, key, kind)
    ids = [point_id(row.name) for row in known]
    return _models().Batch(ids=ids, vectors={key: value.tolist() for key, value in vectors.items()}, payloads=payloads)


def _kinds(attributes: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(path, kind of index) of what attributes hold."""
    for key, value in attributes.items():
        one = value[0] if isinstance(value, list) and value else value
        kind = {str: "KEYWORD", bool: "BOOL", int: "FLOAT", float: "FLOAT"}.get(type(one))
        if isinstance(value, Mapping):
            yield from _kinds(value, (*above, key))
        elif kind is not None and '"' not in key:
            yield payload_key("attributes", *above, key), kind


def _said(text: str) -> Any:
    """A name as JSON can say it: one with half letters as its bytes."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return {"hex": text.encode("utf-8", "surrogatepass").hex()}


def _heard(value: Any) -> str:
    return value if isinstance(value, str) else bytes.fromhex(value["hex"]).decode("utf-8", "surrogatepass")


def _models() -> Any:
    try:
        from qdrant_client import models
    except ImportError as error:
        raise ConfigError(
            f"a Qdrant server needs a package that is not installed ({error}): pip install 'neucore-plugin[qdrant]'"
        ) from error
    return models
