"""The scan benchmark: its statistics against scikit-learn's, its halves, and the script itself."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.bench_scan import (
    Item,
    auc,
    best_limit,
    halves,
    left_out_rows,
    peers,
    scan_rows,
)
from benchmarks.measure import this_machine
from benchmarks.scan_encoders import check_kept, left_out, scan_settings
from mimic_fast.config import EncoderSpec
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch
from mimic_fast.files import sha256_file
from mimic_fast.mutual_information.finished_parts import tensor_digest
from mimic_fast.scan.result import Scanned, Score, write_scan
from mimic_fast.scan.scan import clean_images
from mimic_fast.scan.settings import protocol

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

    assert peers(odd, [*clean, odd]) == [other.scanned for other in clean]


def test_all_are_judged_by_as_many_references():
    clean, bad = collection(0, apart=4)
    known = {one.scanned.name for one in clean}

    skipped = []
    for one in bad:
        used = peers(one, clean)
        assert len(used) == len(peers(clean[0], clean)) == len(clean) - 1
        assert used == peers(one, clean)
        skipped += known - {other.name for other in used}
    assert len(set(skipped)) > 3  # not the same one for all


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


def attack(folder: Path, facts: dict[str, Any]) -> None:
    trigger = white_patch(image_size=16, channels=3)
    write_attack(folder, Attack(kind="badencoder", trigger=trigger, reference=None, facts=facts))


def rates(*values: float) -> dict[str, Any]:
    """``facts.measured`` with an ASR for each set; a clean encoder's stands first."""
    rows = [{"encoder": "clean", "attack_success_rate": {"value": 0.0}}]
    rows += [{"encoder": "teacher", "attack_success_rate": {"value": value}} for value in values]
    return {"measured": rows}


def test_attacks_that_did_not_take_are_left_out_by_name(tmp_path):
    folders = [tmp_path / name for name in ("clean", "took", "failed", "unmeasured")]
    folders[0].mkdir()
    attack(folders[1], rates(0.9, 0.1))
    attack(folders[2], rates(0.3, 0.99))
    attack(folders[3], {})

    failed = left_out(folders, took=0.8)

    assert failed == {folders[2]: 0.3, folders[3]: None}
    assert left_out(folders, took=0.2) == {folders[3]: None}
    assert left_out(folders, took=0) == {}
    rows = left_out_rows(failed, label="toy", machine=this_machine(threads=1))
    assert {(row["impl"], row["metric"], float(row["p50"])) for row in rows} == {
        ("failed", "encoders", 1), ("failed", "attack_success_rate", 0.3),
        ("unmeasured", "encoders", 1),
    }  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    """Forty small images."""
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(40):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    return tmp_path / "images"


SET = ("images=64", "batch_size=8")


def put(folder: Path, out: Path, source: Path, one: Scanned) -> Scanned:
    """An encoder and a finished scan of it, with the scores of ``one``."""
    spec = EncoderSpec(
        architecture="timm:resnet18",
        arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        stem="small_stride2",
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    path = folder / "encoder.safetensors"
    if not path.exists():
        export_encoder(build_encoder(spec, seed=0).eval(), folder, key_map=None, card={})
    settings = scan_settings(str(source), SET)
    changes = {
        "sha256": sha256_file(path),
        "protocol": protocol(settings),
        "images": tensor_digest(clean_images(settings, spec)[0]),
    }
    made = one.model_copy(update=changes)
    write(out, made)
    return made


def write(out: Path, one: Scanned) -> None:
    write_scan(out / "scan.json", one, verdict=None, references=(), left_out={}, trigger=None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"sha256": "1" * 64}, "another encoder file"),
        ({"protocol": {"steps": 1}}, "other settings"),
        ({"images": "others"}, "other images"),
    ],
)
def test_scans_of_something_else_are_refused(tmp_path, source, changes, reason):
    clean, _ = collection(0, apart=5)
    kept = put(tmp_path / "encoder", tmp_path / "run", source, clean[0].scanned)
    write(tmp_path / "run", kept.model_copy(update=changes))
    runs = {tmp_path / "encoder": tmp_path / "run", tmp_path / "new": tmp_path / "nothing"}
    settings = scan_settings(str(source), SET)

    if reason is None:
        check_kept(runs, settings)
        return
    with pytest.raises(UsageError, match=reason):
        check_kept(runs, settings)


def test_script_scans_what_is_missing_and_adds_rows(tmp_path, source):
    clean, bad = collection(0, apart=5)
    kept = {}
    for one in (*clean[:12], *bad[:3]):
        folder = tmp_path / "encoders" / one.name
        kept[one.name] = put(folder, tmp_path / "runs" / one.name, source, one.scanned)
        if one.backdoored:
            attack(folder, rates(0.5 if one is bad[2] else 0.9))
    (tmp_path / "runs" / "c0" / "scan.json").unlink()
    encoder = tmp_path / "encoders" / "c0" / "encoder.safetensors"
    whole = encoder.read_bytes()
    encoder.write_bytes(b"")
    out = tmp_path / "rows.csv"
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "bench_scan.py"), "--data", str(source)),
        *("--encoders", str(tmp_path / "encoders"), "--runs", str(tmp_path / "runs")),
        *("--out", str(out), *(part for value in SET for part in ("--set", value))),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    encoder.write_bytes(whole)
    write(tmp_path / "runs" / "c0", kept["c0"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert failed.returncode != 0  # c0's encoder was an empty file, and it had to be scanned
    assert "c0" in failed.stderr
    assert done.returncode == 0, done.stderr
    assert "b2: left out, ASR 0.500" in done.stdout
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert rows[0]["metric"] == "auc"
    assert float(rows[0]["p50"]) == 1
    assert "badencoder white_patch alone" in {row["mode"] for row in rows}
    assert ("b2", "left out") in {(row["impl"], row["mode"]) for row in rows}
