"""What a scan finds, and its JSON form: scan.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mimic_fast.errors import UnsafeInputError, UsageError
from mimic_fast.files import write_atomic

SCHEMA = 1
_MAX_JSON = 2**24

Level = Literal["no sign", "unusual", "suspicious"]
LEVELS: tuple[Level, ...] = ("no sign", "unusual", "suspicious")


class Score(BaseModel):
    """One number about an encoder.

    Args:
        name: E.g. ``patch size at 0.95``.
        value: In ``unit``.
        unit: Of ``value``.
        suspicious: Which end points to a backdoor.
        reached: False where a size is only the largest that was tried.
        detail: How it came about: the probe, or the concentration on held-out images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    value: float
    unit: str
    suspicious: Literal["low", "high"]
    reached: bool = True
    detail: str = ""

    @model_validator(mode="after")
    def _has_a_log(self) -> "Score":
        # sizes are compared by their log, and a scan.json may come from anywhere
        if self.suspicious == "low" and self.value <= 0:
            raise ValueError(f"the size {self.name!r} must be above 0, got {self.value}")
        return self


class Scanned(BaseModel):
    """The scores of one encoder, and what they depend on.

    Args:
        name: Of the file.
        sha256: Of the file.
        family: Architecture and input; encoders compare where it is equal.
        images: Digest of the images looked at.
        source: Where they come from.
        protocol: Settings that decide the scores.
        scores: In a fixed order.
        seconds: Wall time of the measuring alone.
        device: What it ran on.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    family: dict[str, Any]
    images: str
    source: str
    protocol: dict[str, Any]
    scores: tuple[Score, ...]
    seconds: float = 0.0
    device: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One score beside the clean encoders'.

    Args:
        name: Of the score.
        low: Smallest among the references.
        median: Of the references.
        high: Largest among the references.
        deviations: How far towards the suspicious end, in the references' standard deviations of
            the log (sizes) or of Fisher's z (concentrations). None where the encoder, or all but
            a few references, reached the level at no size: there is no distance.
        chance: Probability that one more clean encoder lies as far out.
    """

    name: str
    low: float
    median: float
    high: float
    deviations: float | None
    chance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the scores say together.

    Args:
        level: One of three.
        chance: Of any clean encoder to be as far out in any score (Bonferroni).
        comparisons: Score by score.
        means: What may be concluded.
        does_not_mean: What may not.
    """

    level: Level
    chance: float
    comparisons: tuple[Comparison, ...]
    means: str
    does_not_mean: str


def scan_json(scanned: Scanned, verdict: Verdict | None) -> dict[str, Any]:
    """Scores and verdict (None where there is none) in JSON values, as in scan.json."""
    judged = None if verdict is None else asdict(verdict)
    return {"schema": SCHEMA, **scanned.model_dump(mode="json"), "verdict": judged}


def write_scan(
    path: Path,
    scanned: Scanned,
    *,
    verdict: Verdict | None,
    references: Sequence[Scanned],
    left_out: Mapping[str, str],
    trigger: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Writes scan.json and returns its content.

    Args:
        path: The file.
        scanned: The encoder's scores.
        verdict: None where there are no, or too few, references.
        references: The clean encoders compared with.
        left_out: References that could not be used, with the reason.
        trigger: What is known of the recovered trigger beside it.

    Raises:
        MachineError: If it cannot be written.
    """
    content = {
        **scan_json(scanned, verdict),
        "references": [
            {
                "name": other.name,
                "sha256": other.sha256,
                "scores": {score.name: score.value for score in other.scores},
            }
            for other in references
        ],
        "left_out": dict(left_out),
        "trigger": None if trigger is None else dict(trigger),
    }
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    return content


def read_scan(path: Path) -> Scanned:
    """The scores in a scan.json, read as untrusted data.

    Raises:
        UsageError: If the file is missing or not a scan.
        UnsafeInputError: If it is oversized.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UnsafeInputError(f"scan {path} is over {_MAX_JSON} bytes; not a scan.json")
        return Scanned.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"scan {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise UsageError(f"scan {path}: {where}: {first['msg']}; expected a scan.json") from None
