"""A gallery in a Qdrant server (`qdrant-client`): sharded and replicated there, and scored there exactly.

Each image is a point with three vectors: `nearest`, which is looked up, and the factors `weighted` and `squares` (and
`cosines` where `nearest` is another vector), which are not indexed. A query is two requests: the nearest points give
ids; these alone are scored, by products that the server combines, cosines + weighted / sqrt(squares). The collection's
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
from neucore_plugin.common.files import sha256_text
from neucore_plugin.retrieval.nearest import FirstOrder, Parts, finite
from neucore_plugin.retrieval.qdrant_filters import payload_key

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
    """A collection that holds a gallery; opened with `connect`, filled with `push`.

    model_fingerprint: of the model that made it. root: folder that the pictures' paths are relative to, as text.
    DataError: no such collection, or one that holds something else; the server does not answer.
    """

    def __init__(self, client: Any, name: str, where: str = "the Qdrant server"):
        self.client, self.name, self.where = client, name, where
        with self._server():
            if not client.collection_exists(name):
                there = sorted(found.name for found in client.get_collections().collections)
                raise DataError(
                    f"{where} has no collection {name!r}; it has {first_few(map(repr, there), 5) or 'none'}. "
                    f"Make it with `neucore index push INDEX --qdrant ... --collection {name}`"
                )
            noted = client.get_collection(name).config.metadata or {}
        if noted.get("format") != FORMAT:
            raise DataError(
                f"collection {name!r} at {where} was not made by `neucore index push` (its metadata lacks "
                f"format = {FORMAT!r}); choose another name"
            )
        squares = noted["squares"]
        squares = None if squares is None else torch.tensor(squares, dtype=torch.float64)
        self.order = FirstOrder(noted["shared"], squares, noted["count"])
        self.model_fingerprint, self.root = noted["model"], noted["root"]

    @classmethod
    def connect(cls, url: str, name: str) -> "QdrantCollection":
        """url: http://HOST:6333; its key: environment QDRANT_API_KEY."""
        return cls(client(url), name, url)

    def __len__(self) -> int:
        with self._server():
            return self.client.count(self.name, exact=True).count

    def check_model(self, fingerprint: str | None) -> None:
        """DataError where another model than this made the collection."""
        if fingerprint and self.model_fingerprint and fingerprint != self.model_fingerprint:
            raise DataError(
                f"collection {self.name!r} at {self.where} was made by model {self.model_fingerprint}, but the model "
                f"given is {fingerprint}: their encodings cannot be compared; choose another collection, or that model"
            )

    def search(
        self, parts: Parts, k: int, keep: Any = None, exact: bool | None = None, candidates: int = CANDIDATES
    ) -> list[tuple[float, dict[str, Any]]]:
        """The k best points for one query: (score, payload); equal scores in the gallery's order.

        parts: see `FirstOrder.query`. keep: the Qdrant filter of those to look at, see `kept`. exact: score all of
        them, not only the nearest; by default where the collection is small.
        """
        models = _models()
        nearest = self.order.query(parts).tolist()
        count = len(self)
        exact = count <= EXACT_UP_TO if exact is None else exact
        wanted = count if exact else max(candidates, 4 * k)
        if count == 0:
            return []
        with self._server():
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
                keep, wanted = models.Filter(must=[models.HasIdCondition(has_id=[point.id for point in found])]), len(found)
            prefetch, formula = self._formula(parts, keep, wanted)
            found = self.client.query_points(
                self.name, prefetch=prefetch, query=formula, limit=min(wanted, k + _TIES), with_payload=True
            ).points
        best = sorted(found, key=lambda point: (-point.score, point.payload["unit"], point.payload["row"]))
        return [(point.score, point.payload) for point in best[:k]]

    def _formula(self, parts: Parts, keep: Any, limit: int) -> tuple[list[Any], Any]:
        """What is fetched for the points, and the score made of it."""
        models = _models()
        exactly = models.SearchParams(exact=True, quantization=models.QuantizationSearchParams(ignore=True))
        fetched: list[Any] = []
        defaults: dict[str, float] = {}

        def product(name: str, row: torch.Tensor, otherwise: float) -> str:
            defaults[variable := f"$score[{len(fetched)}]"] = otherwise
            fetched.append(
                models.Prefetch(query=row.tolist(), using=name, filter=keep, limit=limit, params=exactly)
            )
            return variable

        terms: list[Any] = []
        for weight, factors in parts:
            both: list[Any] = []
            if "cosines" in factors:
                name = "nearest" if self._plain_is_cosines() else "cosines"
                both.append(product(name, factors["cosines"][0].float(), 0.0))
            if "weighted" in factors:
                over = product("weighted", factors["weighted"][0].float(), 0.0)
                root = models.SqrtExpression(sqrt=product("squares", factors["squares"][0].float(), 0.0))
                both.append(models.DivExpression(div=models.DivParams(left=over, right=root, by_zero_default=0.0)))
            terms.append(models.MultExpression(mult=[weight, models.SumExpression(sum=both)]))
        return fetched, models.FormulaQuery(formula=models.SumExpression(sum=terms), defaults=defaults)

    def _plain_is_cosines(self) -> bool:
        return self.order.squares is None or self.order.shared

    @contextmanager
    def _server(self) -> Iterator[None]:
        with answering(self.where):
            yield


def client(url: str) -> Any:
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
    index: Any, collection_client: Any, name: str, layout: Layout, where: str = "the server", progress: bool = True
) -> tuple[int, int]:
    """Make a collection equal to an index that has its model; (points written, points taken away).

    Unit by unit, and units that are there already are passed over: after a kill it goes on where it was.
    DataError: the collection holds another model's images, another folder's, or something else.
    """
    models = _models()
    with answering(where):
        if not collection_client.collection_exists(name):
            _create(index, collection_client, name, layout, where)
    there = QdrantCollection(collection_client, name, where)
    there.check_model(index.model_fingerprint)
    if there.root != (root := _root(index)):
        raise DataError(
            f"collection {name!r} at {where} holds the pictures of {there.root!r}, the index those of {root!r}; "
            "choose another collection"
        )
    written, before, indexed = 0, len(there), set()
    units = list(_units(index))
    alive = sum(len(rows) for _, _, rows in units)

    def of_unit(unit: str) -> Any:
        return models.FieldCondition(key="unit", match=models.MatchValue(value=unit))

    with answering(where), tqdm(total=alive, desc=f"to {name}", unit="image", disable=not progress) as bar:
        for unit, start, rows in units:
            mine = models.Filter(must=[of_unit(unit)])
            if collection_client.count(name, count_filter=mine, exact=True).count == len(rows):
                bar.update(len(rows))
                continue
            for first in range(0, len(rows), BATCH):
                some = rows[first : first + BATCH]
                collection_client.upsert(name, _points(index, there, unit, start, some, indexed), wait=True)
                bar.update(len(some))
            written += len(rows)
            names = [point_id(index.name(start + row)) for row in rows]
            others = models.Filter(must=[of_unit(unit)], must_not=[models.HasIdCondition(has_id=names)] if names else [])
            collection_client.delete(name, models.FilterSelector(filter=others), wait=True)
        known = models.FieldCondition(key="unit", match=models.MatchAny(any=[unit for unit, _, _ in units]))
        collection_client.delete(name, models.FilterSelector(filter=models.Filter(must_not=[known])), wait=True)
    after = len(there)
    if after != alive:
        raise DataError(f"collection {name!r} at {where} holds {after} points after the push, not {alive}; push again")
    return written, max(before + written - after, 0) if before else 0


def point_id(name: str) -> str:
    """Id of an image's point: the same for the same name, in every collection."""
    return str(uuid.UUID(hex=sha256_text(name)[:32]))


def _points(index: Any, there: QdrantCollection, unit: str, start: int, rows: Sequence[int], indexed: set) -> Any:
    """Rows of a unit as points; what their attributes hold is indexed, so that filters are quick."""
    models = _models()
    places = [start + row for row in rows]
    factors = index.model.gallery_factors(index.candidates(torch.tensor(places)))
    vectors = {"nearest": there.order.gallery(factors, learn=False)}
    vectors |= {key: finite(factors[key].float(), "the gallery") for key in there.vectors if key != "nearest"}
    payloads = []
    for place, row in zip(places, rows, strict=True):
        attributes = index.attributes(place)
        name, path = _said(index.name(place)), _said(there.path_text(index.path(place)))
        payloads.append({"name": name, "path": path, "unit": unit, "row": row, "attributes": attributes})
        for key, kind in _kinds(attributes):
            if key not in indexed and len(indexed) < _INDEXED:
                indexed.add(key)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the client's memory has no such indexes
                    there.client.create_payload_index(there.name, key, getattr(models.PayloadSchemaType, kind))
    ids = [point_id(index.name(place)) for place in places]
    return models.Batch(ids=ids, vectors={key: value.tolist() for key, value in vectors.items()}, payloads=payloads)


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


def _create(index: Any, there: Any, name: str, layout: Layout, where: str) -> None:
    """A collection for this index, with the mean of a sample of it."""
    models = _models()
    places = torch.linspace(0, len(index.alive_positions) - 1, min(SAMPLE, len(index)), dtype=torch.float64).long().unique()
    factors = index.model.gallery_factors(index.candidates(index.alive_positions[places]))
    order = FirstOrder.of(factors)
    widths = {"nearest": order.gallery(factors).shape[1]}
    named = {"weighted", "squares"} if order.squares is not None else set()
    named |= {"cosines"} if order.squares is not None and not order.shared and "cosines" in factors else set()
    int8 = models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
    )
    vectors = {
        "nearest": models.VectorParams(
            size=widths["nearest"],
            distance=models.Distance.DOT,
            on_disk=layout.on_disk or None,
            quantization_config=int8 if layout.quantization else None,
        )
    }
    for key in sorted(named):  # m=0: no graph; they are only read for given points
        vectors[key] = models.VectorParams(
            size=factors[key].shape[1],
            distance=models.Distance.DOT,
            on_disk=layout.on_disk or None,
            hnsw_config=models.HnswConfigDiff(m=0),
        )
    metadata = {
        "format": FORMAT,
        "model": index.model_fingerprint,
        "root": _root(index),
        "shared": order.shared,
        "squares": None if order.squares is None else order.squares.tolist(),
        "count": order.count,
    }
    there.create_collection(
        name,
        vectors_config=vectors,
        shard_number=layout.shard_number,
        replication_factor=layout.replication_factor,
        metadata=metadata,
    )
    if (there.get_collection(name).config.metadata or {}).get("format") != FORMAT:
        there.delete_collection(name)
        raise DataError(f"Qdrant at {where} keeps no metadata of collections; use server 1.16 or later")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's own folder has no such indexes
        for key in ("unit", "name", "path"):
            there.create_payload_index(name, key, models.PayloadSchemaType.KEYWORD, wait=True)
