"""What the addresses of the service do: names to positions, pictures to pixels, queries to the model's thread."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from neucore_plugin.common.errors import ImageError
from neucore_plugin.common.text import visible
from neucore_plugin.report.page import heat_overlay
from neucore_plugin.retrieval import GalleryIndex
from neucore_plugin.retrieval.index import Hit
from neucore_plugin.retrieval.queries import Query, Ready
from neucore_plugin.serve import forms
from neucore_plugin.serve.answers import Refused
from neucore_plugin.serve.counters import Counters
from neucore_plugin.serve.feedback import Feedback
from neucore_plugin.serve.guard import Limits
from neucore_plugin.serve.pictures import THUMBNAIL, Pictures, data_address, encoded, tag, whole_file
from neucore_plugin.serve.searching import Searching
from neucore_plugin.serve.worker import Busy, Handler, Worker

Uploads = dict[str, list[bytes]]
_EXAMPLES = 12
_TURN = " and "  # between the turns of a dialogue, where one caption is wanted: for maps, and for votes
_AGAIN = {"Retry-After": "1"}


class Service:
    """Over one index that has its model. `start` before the first request, `close` after the last."""

    def __init__(self, index: GalleryIndex, limits: Limits, counters: Counters, feedback: Feedback | None) -> None:
        self.index, self.limits, self.counters, self._feedback = index, limits, counters, feedback
        self.searching, self._alive = Searching(index), index.alive
        self._explains = hasattr(index.model, "explain")
        counters.waiting(lambda: len(self.worker))
        self._busy = 0  # requests whose pictures are decoded, or that wait for the model

    def start(self) -> None:
        """The model's thread, and those that decode."""
        self.worker = Worker(self.limits.waiting, self.limits.together, self.counters.batch)
        self.pictures = Pictures(self.index.model.image_processor, self.limits.max_pixels, self.limits.decoders)

    def close(self) -> None:
        """End them, once what waits is answered."""
        self.worker.close()
        self.pictures.close()

    def about(self) -> dict[str, Any]:
        """What the page wants to know."""
        places = self._examples()
        return {
            "images": len(self.index),
            "model": self.index.model_fingerprint,
            "maps": hasattr(self.index.model, "concept_maps"),
            "explain": self._explains,
            "feedback": self._feedback is not None,
            "examples": [{"id": place, "name": self.index.name(place)} for place in places],
            "attributes": sorted({key for place in places for key in self.index.attributes(place)}),
        }

    def _examples(self) -> list[int]:
        """Positions of a few pictures from all over the index, to start from."""
        there, count = len(self.index), min(_EXAMPLES, len(self.index))
        numbers = [number * there // count for number in range(count)]
        return numbers if self._alive is None else self._alive.nonzero().flatten()[numbers].tolist()

    @property
    def feedback(self) -> Feedback:
        """Raises Refused where no votes are kept."""
        if self._feedback is None:
            raise Refused(404, "votes are not kept; start the service with --feedback DIR")
        return self._feedback

    async def search(self, body: forms.SearchBody, uploads: Uploads) -> dict[str, Any]:
        """What /search answers."""
        began = time.perf_counter()
        references = [*uploads.get("images", ()), *self.places(body.images)]
        others = [*uploads.get("not_image", ()), *self.places(body.not_image)]
        unwanted = [self.index.name(place) for place in self.places(body.exclude)]
        if not references and not any(text.strip() for text in (body.text, *body.then)):
            raise Refused(422, "nothing to search with; give a reference picture, a text, or both")
        if body.explain and not self._explains:
            raise Refused(422, "this model does not say what its scores are made of; search without `explain`")
        async with self._admitted():
            pictures = await self._ready([*references, *others])
            query = Query(
                images=pictures[: len(references)],
                text=body.text.strip(),
                then=body.then,
                without_texts=body.not_text,
                without_images=pictures[len(references) :],
                k=body.k,
                exclude=unwanted,
                where=body.filter.strip() or None,
                explain=body.explain,
            )
            hits, words = await self._answer(self.searching.search, query)
        return {
            "caption": _TURN.join(query.turns),
            **({"concepts": words} if body.explain else {}),
            "results": [_result(hit) for hit in hits],
            "milliseconds": round(1000 * (time.perf_counter() - began), 1),
        }

    async def maps(self, body: forms.MapsBody, uploads: Uploads) -> dict[str, Any]:
        """What /maps answers: pictures as data addresses, and the words that have none."""
        sources = {"reference": self._reference(body.images, uploads), "candidate": self.place(body.result)}
        async with self._admitted():
            reference, result = await self._ready(list(sources.values()))
            found = await self._answer(self.searching.maps, (reference.pixels, body.text.strip(), result.pixels))
            if not found:
                return {"maps": []}
            return {"maps": await self._decoding(self._drawn, found, sources)}

    def _drawn(self, found: Sequence[dict[str, Any]], sources: dict[str, Any]) -> list[dict[str, Any]]:
        fit = getattr(self.index.model.image_processor, "fit", "pad")
        small = {side: self._small(source) for side, source in sources.items()}
        maps = []
        for entry in found:
            heated = {side: heat_overlay(image, entry[side], THUMBNAIL, fit) for side, image in small.items()}
            shown = {side: data_address(encoded(image)) for side, image in heated.items()}
            maps.append({"concept": entry["concept"], "reference": shown["reference"], "result": shown["candidate"]})
        return maps

    def _small(self, source: Any) -> Image.Image:
        image = self.pictures.load(self._source(source))
        image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        return image

    async def vote(self, body: forms.VoteBody, uploads: Uploads) -> dict[str, Any]:
        """What POST /feedback answers."""
        feedback, given, result = self.feedback, self._reference(body.images, uploads), self.place(body.result)
        names = {"result": self.index.name(result)}
        if isinstance(given, int):
            names["image"] = self.index.name(given)

        def keep() -> dict[str, Any]:
            pair = []
            for source in (given, result):
                self._checked(self.pictures.load, source)  # what is kept can be trained from
                data = source if isinstance(source, bytes) else self._checked(whole_file, source)
                pair.append((data, self.pictures.kind(data)))
            return feedback.add({"caption": body.text.strip(), "good": body.good, "index": names}, *pair)

        async with self._admitted():
            entry = await self._decoding(keep)
        return {"kept": {key: entry[key] for key in ("reference", "caption", "target", "good")}}

    async def picture(self, request: Request, place: int, size: int) -> Response:
        """A picture of the index, or that the browser has it already."""
        source = self._source(self.place(place))
        try:
            mark = tag(source, size)
            headers = {"ETag": mark, "Cache-Control": "private, no-cache"}
            if request.headers.get("if-none-match") == mark:
                return Response(status_code=304, headers=headers)
            data, media = await self._decoding(self.pictures.shown, source, size)
        except ImageError as error:
            raise self._unreadable(place, error) from None
        return Response(data, media_type=media, headers=headers)

    # ---- names, pictures, threads ---------------------------------------------------------------------------------

    def places(self, names: Iterable[str | int]) -> list[int]:
        """Positions in the index. Raises Refused."""
        return [self.place(name) for name in names]

    def place(self, name: str | int) -> int:
        """Position in the index of a name, spelt as there, or of an id. Raises Refused."""
        if isinstance(name, str):
            place = self.index.positions_of([name]).get(name)
        else:
            place = name if name < self.index.stored and (self._alive is None or self._alive[name]) else None
        if place is None:
            what = f"{name[:200]!r}" if isinstance(name, str) else f"of id {name}"
            raise Refused(404, f"no image {what} in the index ({len(self.index):,} images)")
        return place

    def _reference(self, known: Sequence[str | int], uploads: Uploads) -> bytes | int:
        given = [*uploads.get("images", ()), *self.places(known)]
        if len(given) != 1:
            raise Refused(422, f"give one reference picture in `images`; given {len(given)}")
        return given[0]

    def _source(self, picture: bytes | int) -> Any:
        return picture if isinstance(picture, bytes) else self.index.path(picture)

    def _unreadable(self, picture: bytes | int, error: ImageError) -> Refused:
        """Files of ours are told by their names in the index, not by their paths."""
        if isinstance(picture, bytes):
            return Refused(422, str(error))
        name = self.index.name(picture)
        reason = str(error).replace(str(self.index.path(picture)), "its file")
        return Refused(410, visible(f"{name!r} of the index cannot be shown: {reason}"))

    def _checked(self, work: Any, picture: bytes | int) -> Any:
        try:
            return work(self._source(picture))
        except ImageError as error:
            raise self._unreadable(picture, error) from None

    async def _ready(self, pictures: Sequence[bytes | int]) -> list[Ready]:
        """What the model reads of uploads and of pictures of the index. Raises Refused."""
        work = (self._decoding(self._checked, self.pictures.pixels, picture) for picture in pictures)
        read = await asyncio.gather(*work)
        places = (picture if isinstance(picture, int) else None for picture in pictures)
        return [Ready(pixels, place) for pixels, place in zip(read, places, strict=True)]

    async def _decoding(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self.pictures.run(work, *arguments))

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """A place among those that are worked on; bounds what is decoded and waits."""
        if self._busy >= self.limits.waiting:
            raise self._full()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def _answer(self, handler: Handler, item: Any) -> Any:
        try:
            return await asyncio.wrap_future(self.worker.submit(handler, item))
        except Busy:
            raise self._full() from None

    def _full(self) -> Refused:
        return Refused(503, f"{self.limits.waiting} requests wait already; try again in a second", _AGAIN)


def _result(hit: Hit) -> dict[str, Any]:
    """Where its file lies stays here."""
    found = {"rank": hit.rank, "id": hit.position, "name": hit.name, "score": hit.score}
    return found | {"attributes": dict(hit.attributes)} | ({"terms": dict(hit.terms)} if hit.terms else {})
