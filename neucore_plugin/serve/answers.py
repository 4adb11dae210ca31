"""Answers: JSON that can say any file name, and one sentence for whatever is refused."""

import json
from typing import Any

from starlette.responses import Response


class Json(Response):
    """JSON in ASCII: a name that is no UTF-8 is said by escapes, and an infinite number is an error of ours."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """The answer to what went wrong."""
    return Json({"error": " ".join(text.split())}, status, headers)


class Refused(Exception):
    """A request that is answered by a status and one sentence."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers or {}

    def response(self) -> Response:
        """What is sent."""
        return problem(self.status, str(self), self.headers)
