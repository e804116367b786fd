"""Renders the page. Whatever a model wrote reaches it in two ways only: escaped by jinja2, or as JSON that the script
puts into text nodes; and the page may load nothing (its content security policy says so)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from aipo.errors import UserError
from aipo.record.checkpoints import write_atomically
from aipo.record.jsonl import plain

HERE = Path(__file__).parent
SCRIPTS = ("vendor/uPlot.iife.min.js", "common.js", "curves.js", "tokens.js")
STYLES = ("vendor/uPlot.min.css", "style.css")


def write_page(path: Path, template: str, data: Mapping[str, Any], **values: Any) -> Path:
    """One HTML file at ``path`` from a template beside this file; ``data`` is what its script gets.

    UserError where it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number, "visible": visible}
    page = environment.get_template(template).render(
        data=as_script(data),
        script=Markup("\n".join(read(name) for name in SCRIPTS)),
        style=Markup("\n".join(read(name) for name in STYLES)),
        **values,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}): choose another place") from error
    return path


def default_place(folders: Sequence[Path]) -> Path:
    """Where the page goes of itself: a comparison leaves the first folder's own report as it is."""
    return folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def as_script(data: Mapping[str, Any]) -> Markup:
    """JSON for a script element: nothing in it can end the element, whatever it holds."""
    text = json.dumps(
        plain(data), allow_nan=False, separators=(",", ":")
    )  # ASCII: no lone surrogate gets into the file
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None) -> str:
    """1234567 -> 1.23 M."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.4g}"


def visible(text: Any, longest: int = 300) -> str:
    """Control characters, and those that turn the direction of writing, by their names; other text as it is."""
    shown = "".join(
        f"⟨{ord(c):02X}⟩" if ord(c) < 32 or 127 <= ord(c) < 160 or c in TURNING or 0xD800 <= ord(c) < 0xE000 else c
        for c in str(text)[:longest]
    )
    return shown + (" …" if len(str(text)) > longest else "")


TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")
