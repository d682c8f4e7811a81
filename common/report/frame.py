"""The frame of an HTML page: one file, nothing fetched, readable without its script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def html_page(
    title: str,
    lead: str,
    sections: Sequence[tuple[str, str, str]],
    scripts: Sequence[str] = (),
    after: str = "",
) -> str:
    """The whole page.

    Args:
      title: plain text.
      lead: HTML, below the title.
      sections: id, heading and HTML of each.
      scripts: files of this folder that follow `sorting.js`, which makes tables sortable.
      after: HTML between the sections and the scripts.
    """
    links = "".join(f'<a href="#{key}">{text}</a>' for key, text, _ in sections)
    bodies = "".join(
        f'<section id="{key}"><h2>{text}</h2>{body}</section>' for key, text, body in sections
    )
    code = "".join(f"<script>{_asset(name)}</script>" for name in ("sorting.js", *scripts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('style.css')}</style></head>"
        f'<body><a class="skip" href="#{sections[0][0]}">Skip to content</a>'
        f"<header><h1>{escape(title)}</h1><p>{lead}</p></header>"
        f'<nav aria-label="Sections">{links}</nav><main>{bodies}</main>{after}{code}'
        "</body></html>\n"
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
