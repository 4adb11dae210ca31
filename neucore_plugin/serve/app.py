"""The addresses of the service. Handlers check and decode; the model is asked in its own thread."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from neucore_plugin.common.errors import FileError, NeucoreError
from neucore_plugin.retrieval import GalleryIndex
from neucore_plugin.serve import forms, guard
from neucore_plugin.serve.answers import Json, Refused, problem
from neucore_plugin.serve.counters import Counters
from neucore_plugin.serve.feedback import TRIPLETS, Feedback
from neucore_plugin.serve.pages import api_page, search_page
from neucore_plugin.serve.pictures import LARGE, THUMBNAIL
from neucore_plugin.serve.service import Service

_ERRORS = {  # for the page that describes the addresses
    400: "damaged JSON or form",
    401: "the token is missing or wrong",
    403: "asked by a page of another site",
    404: "no such picture",
    408: "the request came too slowly",
    413: "the request is too large",
    422: "a value is not allowed, or a picture cannot be read",
    503: "too many requests wait; `Retry-After` says when to try again",
}


def create_app(
    index: GalleryIndex,
    *,
    access: guard.Access | None = None,
    limits: guard.Limits | None = None,
    feedback: Feedback | None = None,
    title: str = "Search",
    credit: str | None = None,
    version: str = "unknown",
) -> FastAPI:
    """The service over an index that has its model. Its threads begin with the application and end with it."""
    access, limits = access or guard.Access(), limits or guard.Limits()
    counters = Counters(len(index))
    service = Service(index, limits, counters, feedback)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="neucore serve",
        version=version,
        description="Composed image retrieval over one index: a reference picture and a text that says what should be "
        'different. Every error is `{"error": "one sentence"}`.',
        docs_url=None,
        redoc_url=None,
        lifespan=life,
        default_response_class=Json,
        responses={status: {"description": text} for status, text in _ERRORS.items()},
    )
    app.add_middleware(guard.Guard, access=access, limits=limits, counted=counters.count)
    page, policy = search_page(title, credit, limits)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        text, own = api_page(app.openapi())
        return HTMLResponse(text, headers={"Content-Security-Policy": own})

    @app.post("/search", summary="Pictures for references and texts", openapi_extra=_both(forms.SearchBody))
    async def search(request: Request) -> Response:
        body, uploads = await forms.read(request, forms.SearchBody)
        return Json(await service.search(body, uploads))

    @app.get("/similar", summary="Pictures that look like one of the index")
    async def similar(id: int = Query(ge=0, le=2**53), k: int = Query(12, ge=1, le=1000)) -> Response:
        return Json(await service.search(forms.SearchBody(images=[id], k=k), {}))

    @app.post(
        "/maps", summary="Where the concepts of a caption lie in two pictures", openapi_extra=_both(forms.MapsBody)
    )
    async def maps(request: Request) -> Response:
        body, uploads = await forms.read(request, forms.MapsBody)
        return Json(await service.maps(body, uploads))

    @app.get("/thumbnails/{id}", summary=f"A picture of the index, at most {THUMBNAIL} pixels long")
    async def thumbnail(request: Request, id: int = Path(ge=0, le=2**53)) -> Response:
        return await service.picture(request, id, THUMBNAIL)

    @app.get("/images/{id}", summary=f"A picture of the index, at most {LARGE} pixels long, as PNG or JPEG")
    async def image(request: Request, id: int = Path(ge=0, le=2**53)) -> Response:
        return await service.picture(request, id, LARGE)

    @app.post("/feedback", summary="Keep a vote on a result", status_code=201, openapi_extra=_both(forms.VoteBody))
    async def vote(request: Request) -> Response:
        body, uploads = await forms.read(request, forms.VoteBody)
        return Json(await service.vote(body, uploads), 201)

    @app.get("/feedback", summary="The votes as triplets, as `datasets: folder` trains from them")
    async def triplets() -> Response:
        kept = await asyncio.to_thread(service.feedback.triplets)
        return Json(kept, headers={"Content-Disposition": f'attachment; filename="{TRIPLETS}"'})

    @app.get("/health", summary="Whether the service works, and over what")
    async def health(request: Request) -> Response:
        if not service.worker.alive:
            raise Refused(503, "the model's thread has ended; restart the service", {"Retry-After": "30"})
        headers = dict(request.headers)
        inside = access.lets_in(headers)
        return Json({"status": "ok", "version": version, "login": not inside, **(service.about() if inside else {})})

    @app.get("/metrics", summary="Counters, for Prometheus")
    async def metrics() -> Response:
        return Response(counters.text(), media_type=counters.MEDIA)

    @app.post(
        "/login", summary="A cookie for the page, for the token", status_code=204, openapi_extra=_json(forms.LoginBody)
    )
    async def login(request: Request) -> Response:
        body, _ = await forms.read(request, forms.LoginBody)
        return guard.login(access, body.token, secure=request.url.scheme == "https")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(NeucoreError)
    async def wrong(_: Request, error: NeucoreError) -> Response:
        return problem(500 if isinstance(error, FileError) else 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        return problem(422, f"{fault['loc'][-1]}: {fault['msg'][:1].lower()}{fault['msg'][1:]}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        texts = {
            404: "there is nothing at this address; /docs lists all",
            405: f"{request.method} is not taken here; /docs lists what is",
        }
        return problem(error.status_code, texts.get(error.status_code, str(error.detail)), error.headers)

    return app


def _json(kind: type) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _both(kind: type) -> dict[str, Any]:
    """The body in both forms: in a form lists are fields that stand several times, and pictures may be files."""
    body = _json(kind)
    schema = kind.model_json_schema()
    for name in ("images", "not_image"):
        if name in schema["properties"]:
            file = {"type": "string", "format": "binary"}
            schema["properties"][name]["items"] = {"anyOf": [file, {"type": "string"}]}
    body["requestBody"]["content"]["multipart/form-data"] = {"schema": schema}
    return body
