"""Figures that need the encoders or the images: drawn once, kept beside report.json.

``report.json`` names them, so that the page can be rendered anew without what they show.
"""

import base64
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimic_fast.files import write_atomic

FOLDER = "figures"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_MAX_BYTES = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure.

    Args:
        name: Of its file, without the ending.
        title: Heading in the report.
        caption: What it shows and how it was made.
        alt: What it shows, for who does not see it.
        svg: The drawing.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: bytes

    @property
    def uri(self) -> str:
        """As a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


def save_figures(out: Path, figures: Iterable[Figure]) -> list[dict[str, str]]:
    """Writes ``figures/NAME.svg``; returns what report.json says of them.

    Raises:
        MachineError: If the folder cannot be written.
    """
    entries: list[dict[str, str]] = []
    for figure in figures:
        write_atomic(out / FOLDER / f"{figure.name}.svg", figure.svg)
        entries.append(
            {
                "name": figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "alt": figure.alt,
            }
        )
    return entries


def load_figures(out: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """The figures that report.json names; one that is gone or no figure of ours is left out, said.

    Args:
        out: The run directory.
        entries: ``figures`` of report.json.
    """
    figures: list[Figure] = []
    for entry in entries:
        name = str(entry.get("name"))
        path = out / FOLDER / f"{name}.svg"
        try:
            if not _NAME.fullmatch(name) or path.stat().st_size > _MAX_BYTES:
                raise ValueError("not a figure of ours")
            figure = Figure(
                name=name,
                title=str(entry["title"]),
                caption=str(entry["caption"]),
                alt=str(entry["alt"]),
                svg=path.read_bytes(),
            )
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"figure {name!r} is left out of the report: {error}", stacklevel=2)
            continue
        figures.append(figure)
    return tuple(figures)
