"""Pages and charts of results. Takes plain values, and hits and pictures of any kind; knows no model.

Names are imported on first use, so that importing this package costs neither torch nor jinja2.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Examples": "examples",
    "Interval": "curves",
    "Panel": "curves",
    "check_results": "table",
    "comparison_lines": "table",
    "comparison_page": "page",
    "interval_chart_svg": "curves",
    "line_chart_svg": "curves",
    "metric_columns": "table",
    "results_chart_svg": "charts",
    "row_label": "charts",
    "search_page": "page",
    "standalone": "curves",
    "study_page": "page",
    "table_lines": "table",
    "write_report": "page",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
