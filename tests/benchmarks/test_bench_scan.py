"""The scan benchmark: its statistics against scikit-learn's, its halves, and the script itself."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.bench_scan import Item, auc, best_limit, halves, scan_rows, suspicion
from benchmarks.measure import this_machine
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch
from mimic_fast.scan.result import Scanned, Score, write_scan

ROOT = Path(__file__).parents[2]


def item(name: str, kind: str, size: float) -> Item:
    scanned = Scanned(
        name=name,
        sha256="0" * 64,
        family={},
        images="",
        source="",
        protocol={},
        scores=(Score(name="patch size at 0.95", value=size, unit="share", suspicious="low"),),
        seconds=2.0,
    )
    return Item(name=name, kind=kind, scanned=scanned)


def collection(seed: int, *, apart: float) -> tuple[list[Item], list[Item]]:
    draw = np.random.default_rng(seed)
    clean = [item(f"c{n}", "clean", float(np.exp(draw.normal(-2.5, 0.1)))) for n in range(21)]
    bad = [
        item(f"b{n}", "badencoder" if n % 2 else "drupe", float(np.exp(draw.normal(-apart, 0.1))))
        for n in range(11)
    ]
    return clean, bad


def test_auc_is_scikit_learns_with_ties():
    draw = np.random.default_rng(0)
    clean, bad = draw.integers(0, 8, 40).tolist(), draw.integers(3, 11, 25).tolist()

    expected = roc_auc_score([0] * 40 + [1] * 25, clean + bad)

    assert auc(clean, bad) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("clean", "bad", "low", "high"), [((1, 2, 3), (5, 6), 3, 5), ((1, 4), (3, 6), 4, 6)]
)
def test_limit_lies_between_what_it_separates(clean, bad, low, high):
    assert low < best_limit(clean, bad) <= high


def test_an_item_is_not_its_own_reference():
    clean, _ = collection(0, apart=4)
    odd = item("odd", "clean", 1e-4)

    assert suspicion(odd, [*clean, odd]) == pytest.approx(suspicion(odd, clean))


def test_halves_share_no_encoder_and_find_what_is_far_apart():
    clean, bad = collection(0, apart=5)

    for rule, false, missed in halves(clean, bad, seed=1):
        assert false.n in (10, 11), rule
        assert missed.n in (5, 6), rule
        assert missed.value == 0, rule
        assert false.value <= 0.3, rule


def test_rows_have_an_interval_around_every_share():
    clean, bad = collection(1, apart=2.7)

    rows = scan_rows([*clean, *bad], label="toy", seed=0, machine=this_machine(threads=1))

    found = {(row["impl"], row["mode"], row["metric"]): float(row["p50"]) for row in rows}
    key = ("all scores", "over all")
    assert 0.5 < found[*key, "auc_low"] <= found[*key, "auc"] <= found[*key, "auc_high"] <= 1
    assert ("all scores", "drupe alone", "auc") in found
    assert found["suspicious", "held-out half", "encoders"] > 0
    with pytest.raises(ValueError, match="too few"):
        scan_rows(bad, label="toy", seed=0, machine=this_machine(threads=1))


def test_script_scans_what_is_missing_and_adds_rows(tmp_path):
    clean, bad = collection(0, apart=5)
    for one in (*clean[:12], *bad[:2]):
        folder = tmp_path / "encoders" / one.name
        folder.mkdir(parents=True)
        (folder / "encoder.safetensors").write_bytes(b"")
        if one.backdoored:
            trigger = white_patch(image_size=16, channels=3)
            write_attack(folder, Attack(kind=one.kind, trigger=trigger, reference=None))
        if one is not clean[0]:
            path = tmp_path / "runs" / one.name / "scan.json"
            write_scan(path, one.scanned, verdict=None, references=(), left_out={}, trigger=None)
    out = tmp_path / "rows.csv"
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_scan.py"), "--data", str(tmp_path)),
        *("--encoders", str(tmp_path / "encoders"), "--runs", str(tmp_path / "runs")),
        *("--out", str(out)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    write_scan(
        tmp_path / "runs" / "c0" / "scan.json",
        clean[0].scanned,
        verdict=None,
        references=(),
        left_out={},
        trigger=None,
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert failed.returncode != 0  # c0's encoder is an empty file, and it had to be scanned
    assert "c0" in failed.stderr
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert rows[0]["metric"] == "auc"
    assert float(rows[0]["p50"]) == 1
    assert "badencoder white_patch alone" in {row["mode"] for row in rows}
