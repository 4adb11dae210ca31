"""What a request may say: a JSON object, or a form with uploaded pictures; checked before any work is done.

A form has a field for each key, or one field `query` with all of them as JSON.

A picture is uploaded, or is one of the index, by its name (a text) or its id (a whole number): never a path.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from neucore_plugin.common.errors import first_few, nearest
from neucore_plugin.common.files import parse_json
from neucore_plugin.serve.answers import Refused

Text = Annotated[str, Field(max_length=2000)]


def _picture(given: Any) -> str | int:
    """Of the index. Its name may hold half letters, which pydantic's own texts refuse."""
    if (isinstance(given, str) and len(given) <= 4096) or (type(given) is int and given >= 0):
        return given
    raise ValueError("a picture of the index is its name (a text) or its id (a whole number from 0 on)")


_EITHER = {"anyOf": [{"type": "string", "title": "name"}, {"type": "integer", "title": "id", "minimum": 0}]}
Picture = Annotated[Any, AfterValidator(_picture), WithJsonSchema(_EITHER)]
Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SearchBody(_Body):
    """A query: reference pictures, a text, or both."""

    images: list[Picture] = Field(
        [], max_length=16, description="references: names or ids of the index; in a form also files"
    )
    text: Text = Field("", description="relative caption: what should be different from the reference")
    then: list[Text] = Field(
        [], max_length=16, description="further captions of the same references, each counts as much as the first"
    )
    not_text: list[Text] = Field([], max_length=16, description="captions of what is not wanted")
    not_image: list[Picture] = Field([], max_length=16, description="pictures of what is not wanted, given likewise")
    k: int = Field(12, ge=1, le=1000, description="number of results")
    filter: Text = Field("", description="condition on attributes, such as category == 'dress' and price < 50")
    exclude: list[Picture] = Field([], max_length=1000, description="names or ids that are not wanted as results")
    explain: bool = Field(False, description="say which words were taken as concepts, and the terms of each score")


class MapsBody(_Body):
    """Where the concepts of a caption lie in a reference and in a result."""

    images: list[Picture] = Field(
        [], max_length=1, description="the reference: a name or an id of the index; in a form also a file"
    )
    text: Text = Field(description="the relative caption")
    result: Picture = Field(description="the result, of the index: its name or id")


class VoteBody(_Body):
    """Whether a result is what a query asked for."""

    images: list[Picture] = Field(
        [], max_length=1, description="the reference: a name or an id of the index; in a form also a file"
    )
    text: Text = Field(description="the relative caption")
    result: Picture = Field(description="the result that is judged, of the index")
    good: bool = Field(description="true: it is a right answer; false: it is none, also if it was voted one before")

    @model_validator(mode="after")
    def _says_something(self) -> "VoteBody":
        if not self.text.strip():
            raise ValueError("a vote needs the caption of its query")
        return self


class LoginBody(_Body):
    """The token, for the page."""

    token: str = Field(max_length=4096)


async def read(request: Request, kind: type[Body]) -> tuple[Body, dict[str, list[bytes]]]:
    """The checked body, and what was uploaded by field. Raises Refused."""
    form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if form == "application/json":
        return _checked(kind, _json(await request.body())), {}
    if form != "multipart/form-data":
        raise Refused(415, "send application/json, or multipart/form-data to upload pictures")
    given: dict[str, Any] = {}
    uploads: dict[str, list[bytes]] = {}
    pictures = [name for name in ("images", "not_image") if name in kind.model_fields]
    try:
        async with request.form(max_files=32, max_fields=1200, max_part_size=1 << 16) as parts:
            for name, value in parts.multi_items():
                if isinstance(value, UploadFile):
                    if name not in pictures:
                        raise Refused(422, f"{name[:80]!r} takes no file.{nearest(name[:80], pictures)}")
                    uploads.setdefault(name, []).append(await value.read())
                else:
                    given.setdefault(name, []).append(value)
    except MultiPartException as error:
        raise Refused(400, f"the form is damaged ({error.message})") from None
    except (ValueError, KeyError, UnicodeError) as error:
        raise Refused(400, f"the form is damaged ({error})") from None
    if list(given) == ["query"]:  # what no field of a form can say, as JSON
        return _checked(kind, _json(given["query"][0].encode("utf-8", "surrogatepass"))), uploads
    return _checked(kind, {name: _value(kind, name, values) for name, values in given.items()}), uploads


def _json(data: bytes) -> Any:
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise Refused(400, f"the body is no valid JSON ({error})") from None


def _value(kind: type[BaseModel], name: str, values: Sequence[str]) -> Any:
    """The fields of a form as JSON has them: there all are texts, and a list is a field that stands several times."""
    field = kind.model_fields.get(name)
    if field is None or getattr(field.annotation, "__origin__", None) is list:
        return list(values)
    if len(values) > 1:
        raise Refused(422, f"{name} stands {len(values)} times; give it once")
    text = values[0]
    if field.annotation is bool:
        return {"true": True, "1": True, "on": True, "false": False, "0": False, "": False}.get(text.lower(), text)
    if field.annotation is int and text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    return text


def _checked(kind: type[Body], given: Any) -> Body:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Refused(422, first_few([_told(kind, fault) for fault in error.errors()], 3, "; ")) from None


def _told(kind: type[BaseModel], fault: Any) -> str:
    """One fault as a sentence: the field, what is wrong, and what was given."""
    name = str(fault["loc"][0])[:80] if fault["loc"] else "the body"
    if fault["type"] == "extra_forbidden":
        return f"{name!r} is not known.{nearest(name, kind.model_fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = fault["input"]
    shown = f", given {given!r:.80}" if isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}"
