"""Sizes as people write them: '80GB' is 80e9 bytes, '80GiB' is 80 * 2**30."""

import re

from mimic_fast.errors import UsageError

_UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_BY_LETTERS = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes of a size with its unit.

    Raises:
        UsageError: If it has no unit, an unknown one, or is not above 0.
    """
    match = _SIZE.fullmatch(text)
    factor = _BY_LETTERS.get(match[2].lower()) if match else None
    size = round(float(match[1]) * factor) if match and factor else 0
    if size <= 0:
        raise UsageError(
            f"expected a size above 0 with its unit ({', '.join(_UNITS)}), as in 80GB; got {text!r}"
        )
    return size


def shown_bytes(size: float) -> str:
    """In GB, or MB below one of them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
