"""The comparison at a glance: one self-contained page of attacks against defenses.

Color is never alone: every cell has its numbers. The scale runs from dark blue to pale yellow in
lightness, so it reads in gray and for color-blind readers; print keeps it.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mimic_fast.comparison.figures import Figures
from mimic_fast.comparison.table import Entry, entries, groups, percent
from mimic_fast.evaluation.metrics import Measure
from mimic_fast.files import write_atomic

# Good to bad, evenly falling in lightness: anchors of a blue to yellow scale.
_SCALE = ((0xFD, 0xF3, 0xC0), (0x8F, 0xC3, 0xB0), (0x2F, 0x7F, 0xA3), (0x1B, 0x2F, 0x6B))
_STYLE = """
:root{color-scheme:light}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1.5rem;color:#1a1a1a;
background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.3rem 0;font-weight:600}
th,td{border:1px solid #fff;padding:.45rem .6rem;text-align:right;white-space:nowrap}
th{background:#f0f0f0;font-weight:600}
th[scope=row]{text-align:left}
td{-webkit-print-color-adjust:exact;print-color-adjust:exact}
td small{display:block;font-size:.78em}
@media print{body{max-width:none;padding:0}h2{break-after:avoid}table{break-inside:avoid}}
"""


def write_heat_map(path: Path, rows: Sequence[Figures]) -> None:
    """Writes the page.

    Raises:
        MachineError: If it cannot be written.
    """
    write_atomic(path, heat_map(rows).encode())


def heat_map(rows: Sequence[Figures]) -> str:
    """HTML: for each downstream set and probe one table of ASR and one of CA."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Comparison of defenses</title><style>{_STYLE}</style></head><body>",
        "<h1>Comparison of defenses</h1>",
        "<p>Percent, with the 95 % interval: of one seed over test images, of several over seeds. "
        "Light is good, dark is bad, in both tables.</p>",
    ]
    for dataset, probe in groups(rows):
        found = entries(rows, dataset=dataset, probe=probe)
        parts.append(f"<h2>{escape(dataset)}, {escape(probe)} probe</h2>")
        parts += _table(found, "Attack success rate (low is good)", success=True)
        parts += _table(found, "Clean accuracy (high is good)", success=False)
    if not rows:
        parts.append("<p>No cell is finished yet.</p>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _table(found: Sequence[Entry], caption: str, *, success: bool) -> list[str]:
    attacks = list(dict.fromkeys(entry.attack for entry in found))
    cells = {(entry.attack, entry.defense): entry for entry in found}
    best = {
        attack: max(entry.accuracy.value for entry in found if entry.attack == attack)
        for attack in attacks
    }
    lines = [
        f'<div class="wide"><table><caption>{escape(caption)}</caption>',
        '<tr><th scope="col">defense</th>'
        + "".join(f'<th scope="col">{escape(attack)}</th>' for attack in attacks)
        + "</tr>",
    ]
    for defense in dict.fromkeys(entry.defense for entry in found):
        line = [f'<tr><th scope="row">{escape(defense)}</th>']
        for attack in attacks:
            entry = cells.get((attack, defense))
            measure = None if entry is None else entry.success if success else entry.accuracy
            if measure is None:
                line.append("<td>-</td>")
                continue
            # Accuracy is bad by what it lacks to the attack's best, half of that being worst.
            lack = 0.0 if best[attack] == 0 else 2 * (1 - measure.value / best[attack])
            line.append(_cell(measure, measure.value if success else lack))
        lines.append("".join(line) + "</tr>")
    return [*lines, "</table></div>"]


def _cell(measure: Measure, badness: float) -> str:
    color = _color(badness)
    back = "".join(f"{part:02x}" for part in color)
    # Black contrasts more from this luminance on: (x + .05) / .05 = 1.05 / (x + .05) (WCAG 2).
    ink = "#000" if _luminance(color) > 0.179 else "#fff"
    value, _, interval = percent(measure).partition(" ")
    return f'<td style="background:#{back};color:{ink}">{value}<small>{interval}</small></td>'


def _luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance of sRGB, 0 to 1 (WCAG 2)."""
    parts = (part / 255 for part in color)
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _color(badness: float) -> tuple[int, int, int]:
    place = min(max(badness, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    share = place - low
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True)
    )
    return red, green, blue
