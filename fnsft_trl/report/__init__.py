"""Reports: text, tables and figures as Markdown, as one HTML file, and the numbers as results.json."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Report": "report",
        "format_table": "report",
    },
)
