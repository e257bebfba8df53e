"""The encoders of the scan benchmark: which count, their kinds, and their scans."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import read_attack, recorded
from mimic_fast.files import sha256_file
from mimic_fast.mutual_information.finished_parts import tensor_digest
from mimic_fast.recipe import load_recipe
from mimic_fast.scan.result import Scanned, read_scan
from mimic_fast.scan.scan import clean_images
from mimic_fast.scan.settings import ScanSettings, protocol

CLEAN = "clean"


def scan_settings(data: str, overrides: Sequence[str]) -> ScanSettings:
    """What the scans are made with."""
    return load_recipe(ScanSettings, None, overrides=overrides, values={"data": {"source": data}})


def check_kept(runs: Mapping[Path, Path], settings: ScanSettings) -> None:
    """Refuses finished scans that this call would not make; before hours go into the others.

    Args:
        runs: Where an encoder's scan is or will be, by its folder.
        settings: What the scans are made with.

    Raises:
        UsageError: If one is of another encoder file, of other images or made otherwise.
    """
    digests: dict[str, str] = {}  # of the images, by the encoders' family
    for folder, out in runs.items():
        path = out / "scan.json"
        if not path.exists():
            continue
        kept = read_scan(path)
        reason = ""
        if kept.sha256 != sha256_file(folder / "encoder.safetensors"):
            reason = "is of another encoder file"
        elif kept.protocol != protocol(settings):
            reason = "was made with other settings"
        else:
            key = str(kept.family)
            if key not in digests:
                spec = load_encoder(folder / "encoder.safetensors").encoder.spec
                digests[key] = tensor_digest(clean_images(settings, spec)[0])
            if kept.images != digests[key]:
                reason = "was made on other images"
        if reason:
            raise UsageError(f"{path} {reason}; remove it or give another --runs")


def scanned(folder: Path, data: str, out: Path, options: Sequence[str]) -> Scanned:
    """The scan of one encoder, made in a process with one thread unless it is there.

    Raises:
        RuntimeError: If the scan failed.
    """
    if not (out / "scan.json").exists():
        command = [
            *(sys.executable, "-m", "mimic_fast", "scan", "--resume", "auto"),
            *("--encoder", str(folder / "encoder.safetensors"), "--data", data, "--out", str(out)),
            *options,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder}: {done.stderr.strip().splitlines()[-1:]}")
        print(f"{folder.name}: scanned", flush=True)
    return read_scan(out / "scan.json")


def measured_asr(folder: Path) -> float | None:
    """ASR of the attacked encoder on the first set, as ``attack.json`` records it, or None."""
    rows = recorded(folder).facts.get("measured") or ()
    first = next((row for row in rows if row["encoder"] == "teacher"), {})
    return first.get("attack_success_rate", {}).get("value")


def left_out(folders: Sequence[Path], *, took: float) -> dict[Path, float | None]:
    """Attacked encoders whose attack did not take, with the ASR, or was never measured (None)."""
    attacked = [folder for folder in folders if (folder / "attack.json").exists()]
    rates = {folder: measured_asr(folder) for folder in attacked}
    return {
        folder: rate for folder, rate in rates.items() if took > 0 and (rate is None or rate < took)
    }


def kind_of(folder: Path) -> str:
    """The attack's kind and trigger, or ``clean``."""
    if not (folder / "attack.json").exists():
        return CLEAN
    attack = read_attack(folder)
    return f"{attack.kind} {attack.trigger.name}"
