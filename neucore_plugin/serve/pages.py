"""The two pages: one to search with (page/), made self-contained; one that lists the addresses, from their schema."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from neucore_plugin.serve.guard import Limits, page_policy

_FOLDER = Path(__file__).parent / "page"


@lru_cache(maxsize=1)
def _engine() -> Environment:
    loader = FileSystemLoader(_FOLDER)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _page(template: str, script: str = "", **values: Any) -> tuple[str, str]:
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    text = _engine().get_template(template).render(style=Markup(style), script=Markup(script), **values)
    return text, page_policy(script, style)


def search_page(title: str, credit: str | None, limits: Limits) -> tuple[str, str]:
    """The page and its Content-Security-Policy. credit: what must be said of the pictures' origin."""
    script = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("parts.js", "page.js"))
    return _page("search.html.j2", script, title=title, credit=credit, most=limits.body_bytes)


def api_page(schema: dict[str, Any]) -> tuple[str, str]:
    """The addresses of an OpenAPI schema, and the page's Content-Security-Policy. No script, nothing from elsewhere."""
    return _page("docs.html.j2", schema=schema)
