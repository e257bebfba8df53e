"""Clean encoders of the same family: what is normal. Found in a folder, scanned where need be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimic_fast.errors import MimicError, StoppedError, UsageError
from mimic_fast.files import sha256_file
from mimic_fast.scan.result import Scanned, read_scan

_OTHER_FAMILY = "is of another architecture or input size"
_NOT_ENCODERS = ("trigger", "parts")  # files and folders of our own that hold other tensors


@dataclass(kw_only=True, slots=True)
class References:
    """Clean encoders to compare with.

    Args:
        used: Their scans, by file digest.
        left_out: What cannot be compared, with the reason.
        waiting: Encoders that must still be scanned, by file digest.
    """

    used: dict[str, Scanned] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, Path] = field(default_factory=dict)


def find(folder: Path, wanted: Scanned, *, family: Callable[[Path], dict[str, Any]]) -> References:
    """Every comparable clean encoder under a folder; quick, before anything is scanned.

    Finished scans (``scan.json``) are read; encoders (``*.safetensors``) without one wait. Each
    encoder counts once, however often it is there, and the scanned one never.

    Args:
        folder: Holds encoders, scans, or runs with either, at any depth.
        wanted: What they are compared with: digest, family, images, protocol; scores not yet.
        family: Reads an encoder file and tells its family.

    Raises:
        UsageError: If the folder is missing or holds neither.
    """
    scans, encoders = reference_files(folder)
    found = References()
    for path in scans:
        name = str(path.relative_to(folder))
        try:
            _add(found, name, read_scan(path), wanted)
        except MimicError as error:  # one bad file must not cost the comparison with the others
            found.left_out[name] = str(error)
    for path in encoders:
        name = str(path.relative_to(folder))
        try:
            digest = sha256_file(path)
            if digest in found.used or digest in found.waiting or digest == wanted.sha256:
                continue
            if family(path) == wanted.family:
                found.waiting[digest] = path
            else:
                found.left_out[name] = _OTHER_FAMILY
        except OSError as error:
            found.left_out[name] = f"cannot be read: {error.strerror}"
        except MimicError as error:
            found.left_out[name] = str(error)
    return found


def complete(
    found: References, folder: Path, scanned: Scanned, *, scan: Callable[[Path], Scanned]
) -> None:
    """Scans the encoders that wait, and leaves out what has other scores than ``scanned``.

    Args:
        found: As from :func:`find`.
        folder: Where they were found.
        scanned: What they are compared with, measured.
        scan: Measures an encoder file like ``scanned``.

    Raises:
        StoppedError: If ``scan`` was stopped.
    """
    for path in found.waiting.values():
        name = str(path.relative_to(folder))
        try:
            _add(found, name, scan(path), scanned)
        except StoppedError:
            raise
        except MimicError as error:
            found.left_out[name] = str(error)
    found.waiting.clear()
    for digest, other in list(found.used.items()):
        if _kinds(other) != _kinds(scanned):
            found.left_out[other.name] = "has other scores"
            del found.used[digest]


def _kinds(scanned: Scanned) -> list[tuple[str, str, str]]:
    return [(score.name, score.unit, score.suspicious) for score in scanned.scores]


def reference_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Finished scans and encoders under a folder.

    Raises:
        UsageError: If the folder is missing or holds neither.
    """
    if not folder.is_dir():
        raise UsageError(f"references {folder} is not a folder; give one with clean encoders")
    scans = sorted(folder.rglob("scan.json"))
    encoders = sorted(path for path in folder.rglob("*.safetensors") if _is_encoder(path, folder))
    if not scans and not encoders:
        raise UsageError(f"references {folder} holds neither encoders nor scan.json files")
    return scans, encoders


def _is_encoder(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return not parts[-1].startswith(_NOT_ENCODERS) and not set(_NOT_ENCODERS) & set(parts[:-1])


def _add(found: References, name: str, other: Scanned, scanned: Scanned) -> None:
    reason = _why_not(other, scanned)
    if reason:
        found.left_out[name] = reason
    else:
        found.used.setdefault(other.sha256, other)


def _why_not(other: Scanned, scanned: Scanned) -> str:
    if other.sha256 == scanned.sha256:
        return "is the scanned encoder itself"
    if other.family != scanned.family:
        return _OTHER_FAMILY
    if other.protocol != scanned.protocol:
        return "was scanned with other settings"
    if other.images != scanned.images:
        return "was scanned on other images"
    return ""
