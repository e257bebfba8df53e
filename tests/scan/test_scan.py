"""Whole scans of real files, and the command."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import MimicError, StoppedError, UsageError
from mimic_fast.evaluation.attack_file import Attack, read_attack, record_targets, write_attack
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.features import encode
from mimic_fast.evaluation.triggers import Trigger, white_patch
from mimic_fast.launch.commands.scan import scan as command
from mimic_fast.progress import Event, silent
from mimic_fast.scan.forms import ADDITIVE
from mimic_fast.scan.inversion import Inverted
from mimic_fast.scan.measure import Recovered
from mimic_fast.scan.result import read_scan
from mimic_fast.scan.scan import _as_trigger, _write_recovered, scan
from mimic_fast.scan.settings import ScanSettings

EASY = (0.3, 0.1)  # levels that an untrained encoder reaches within ten steps


def unmeasured(event: Event) -> None:
    """A reporter that fails as soon as the encoder is measured."""
    assert event.phase not in ("probe", "patch", "additive")


def changed(settings: ScanSettings, **changes) -> ScanSettings:
    return settings.model_copy(update=changes)


def into(settings: ScanSettings, out, **changes) -> ScanSettings:
    return changed(settings, run=settings.run.model_copy(update={"out": out, **changes}))


@pytest.fixture
def easy(small) -> ScanSettings:
    return changed(small, levels=EASY)


@pytest.fixture
def labeled(folder, tmp_path) -> DownstreamSettings:
    """Left and right half of the folder as two classes."""
    for index, path in enumerate(sorted(folder.glob("*.png"))):
        for split in ("train", "test"):
            place = tmp_path / "labeled" / split / ("even" if index % 2 else "odd")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    root = tmp_path / "labeled"
    return DownstreamSettings(name="halves", train=str(root / "train"), test=str(root / "test"))


def test_scan_leaves_scores_and_a_trigger_that_evaluate_reads(easy, labeled, tmp_path):
    result = scan(easy)

    assert result.verdict is None
    assert [score.name for score in result.scanned.scores] == [
        *("patch size at 0.3", "patch size at 0.1"),
        *("additive size at 0.3", "additive size at 0.1"),
        *("patch shift", "spectral shift"),
    ]
    content = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert content["verdict"] is None
    assert content["references"] == []
    assert content["trigger"]["form"] == "patch"
    assert read_scan(tmp_path / "scan" / "scan.json") == result.scanned
    attack = read_attack(tmp_path / "scan")
    assert attack.kind == "recovered"
    assert attack.reference is None
    assert (tmp_path / "scan" / "trigger.safetensors").exists()
    assert float(attack.trigger.mask.mean()) == pytest.approx(result.scanned.scores[0].value)
    measured = evaluate_encoders(
        {"teacher": load_encoder(easy.encoder.teacher)},
        EvaluationSettings(downstream=(labeled,), attack=tmp_path / "scan"),
        seed=0,
    )
    assert measured["attack"]["trigger"] == "recovered_patch"


def test_an_unreached_level_leaves_scores_and_no_trigger(small, tmp_path):
    result = scan(changed(small, levels=(0.999999,)))

    assert result.trigger is None
    assert not any(score.reached for score in result.scanned.scores if "size" in score.name)
    assert (tmp_path / "scan" / "scan.json").exists()
    assert not (tmp_path / "scan" / "attack.json").exists()


def test_stopped_at_many_places_and_resumed_is_the_same(easy, tmp_path):
    whole = scan(into(easy, tmp_path / "whole"))
    settings = into(easy, tmp_path / "parts", resume="auto")

    def stops(after: int) -> Iterator[bool]:
        yield from [False] * after
        while True:
            yield True

    stopped = 0
    for after in (0, 100, 600, 530, 3, 25, 31, 9):
        asked = stops(after)
        try:
            scan(settings, stop=lambda asked=asked: next(asked))
        except StoppedError:
            stopped += 1
    resumed = scan(settings)

    assert stopped >= 4
    assert resumed.scanned.scores == whole.scanned.scores
    assert whole.trigger is not None
    assert resumed.trigger is not None
    assert torch.equal(whole.trigger.mask, resumed.trigger.mask)
    assert torch.equal(whole.trigger.pattern, resumed.trigger.pattern)


def test_references_give_a_verdict_and_are_measured_once(small, encoder_file, tmp_path):
    # Sizes are at their largest for all (nothing is reached): the shifts decide, quickly.
    settings = changed(small, levels=(0.999999,))
    (tmp_path / "clean").mkdir()
    for seed in range(1, 6):
        for suffix in (".safetensors", ".json"):
            path = encoder_file(seed).with_suffix(suffix)
            shutil.copy(path, tmp_path / "clean" / path.name)
    settings = changed(settings, references=tmp_path / "clean")

    first = scan(settings)
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "scan").rglob("scan.json")}
    again = scan(into(settings, tmp_path / "scan", resume="auto"))

    assert first.verdict is not None
    assert first.verdict == again.verdict
    assert len(first.references.used) == 5
    references = [path for path in began if "references" in path.parts]
    assert len(references) == 5
    assert all(path.stat().st_mtime_ns == began[path] for path in references)
    content = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert content["verdict"]["level"] == first.verdict.level
    assert len(content["references"]) == 5


def test_an_attack_that_no_scan_wrote_is_not_overwritten(easy, tmp_path):
    real = white_patch(image_size=16, channels=3)
    for resume in ("never", "auto"):
        write_attack(tmp_path / "scan", Attack(kind="badencoder", trigger=real, reference=None))
        before = {path: path.read_bytes() for path in (tmp_path / "scan").iterdir()}

        with pytest.raises(UsageError, match="'badencoder'; give the scan another --out"):
            scan(into(easy, tmp_path / "scan", resume=resume), report=unmeasured)

        assert {path: path.read_bytes() for path in (tmp_path / "scan").iterdir()} == before
    (tmp_path / "scan" / "attack.json").unlink()
    with pytest.raises(UsageError, match=r"trigger\.safetensors"):
        scan(easy, report=unmeasured)


def test_what_evaluations_recorded_of_a_recovered_trigger_is_kept(tmp_path):
    trigger = Trigger(name="t", mask=torch.ones(1, 4, 4), pattern=torch.zeros(3, 4, 4))
    _write_recovered(tmp_path, trigger, {"size": 0.1}, silent)
    record_targets(tmp_path, {"cifar10": 7})

    _write_recovered(tmp_path, trigger, {"size": 0.1}, silent)
    assert read_attack(tmp_path).targets == {"cifar10": 7}

    told: list[str] = []
    _write_recovered(tmp_path, trigger, {"size": 0.2}, lambda event: told.append(event.message))
    assert read_attack(tmp_path).targets == {}  # of another trigger
    assert "dropped" in told[0]


def test_an_additive_trigger_beyond_the_range_of_pixels_can_be_read_back(tmp_path):
    pattern = torch.linspace(-1.7, 1.7, 48).reshape(3, 4, 4)
    inverted = Inverted(size=0.5, reached=True, mask=torch.ones(1, 4, 4), pattern=pattern)
    best = Recovered(form="additive", level=0.95, inverted=inverted, held_out=0.9)

    trigger = _as_trigger(best)
    write_attack(tmp_path, Attack(kind="recovered", trigger=trigger, reference=None))
    read = read_attack(tmp_path).trigger

    images = torch.rand(8, 3, 4, 4)
    shown = ADDITIVE.stamp(images, inverted.mask, pattern)
    assert torch.equal(ADDITIVE.stamp(images, read.mask, read.pattern), shown)


@pytest.mark.parametrize("held", ["nothing", "broken", "few"])
def test_references_are_read_before_anything_is_measured(small, encoder_file, tmp_path, held):
    folder = tmp_path / "clean"
    if held != "nothing":
        folder.mkdir()
        for suffix in (".safetensors", ".json"):
            shutil.copy(encoder_file(1).with_suffix(suffix), folder)
    if held == "broken":
        (folder / "scan.json").write_text("{")
    messages: list[str] = []

    def report(event) -> None:
        unmeasured(event)
        messages.append(event.message)

    with pytest.raises(UsageError, match="not a folder" if held == "nothing" else "too few"):
        scan(changed(small, references=folder), report=report, must_judge=True)

    assert any("reference scan.json left out" in text for text in messages) == (held == "broken")
    assert not (tmp_path / "scan" / "parts").exists()


def test_scans_of_references_can_be_shared(small, encoder_file, tmp_path):
    settings = changed(small, levels=(0.999999,), references=tmp_path / "clean")
    (tmp_path / "clean").mkdir()
    for suffix in (".safetensors", ".json"):
        shutil.copy(encoder_file(1).with_suffix(suffix), tmp_path / "clean")
    told: list[str] = []

    for name, seed in (("a", 0), ("b", 2)):
        encoder = settings.encoder.model_copy(update={"teacher": encoder_file(seed)})
        scan(
            into(changed(settings, encoder=encoder), tmp_path / name),
            report=lambda event: told.append(event.message),
            reference_scans=tmp_path / "shared",
        )

    assert sum("1.safetensors" in message for message in told) == 1
    assert len(list((tmp_path / "shared").glob("*/scan.json"))) == 1
    assert not (tmp_path / "a" / "references").exists()


def test_scan_changes_neither_the_file_nor_the_global_random_state(small):
    before = small.encoder.teacher.read_bytes()
    state = torch.get_rng_state()

    scan(changed(small, levels=(0.999999,)))

    assert small.encoder.teacher.read_bytes() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_gray_encoders_are_scanned(small, folder, tmp_path):
    from mimic_fast.encoders.build import build_encoder
    from mimic_fast.encoders.export import export_encoder

    spec = load_encoder(small.encoder.teacher).encoder.spec
    gray = spec.model_copy(update={"in_channels": 1, "mean": (0.5,), "std": (0.25,)})
    path = export_encoder(build_encoder(gray, seed=0).eval(), tmp_path, key_map=None, card={})
    encoder = small.encoder.model_copy(update={"teacher": path})

    result = scan(changed(small, encoder=encoder, levels=EASY))

    assert result.trigger is not None
    assert result.trigger.pattern.shape == (1, 16, 16)
    features = encode(load_encoder(path).encoder, torch.rand(4, 1, 16, 16), trigger=result.trigger)
    assert bool(features.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0.5, 0.9)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"levels": (1.0,)}, "levels"),
        ({"suspicious": 0.1}, "suspicious"),
        ({"images": 64, "batch_size": 64}, "two batches"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScanSettings.model_validate(changes)


def test_too_few_images_are_refused(small, folder, tmp_path):
    (tmp_path / "few").mkdir()
    for path in sorted(folder.glob("*.png"))[:20]:
        shutil.copy(path, tmp_path / "few")
    data = small.data.model_copy(update={"source": str(tmp_path / "few")})

    with pytest.raises(UsageError, match="20 images"):
        scan(changed(small, data=data))


def test_a_scan_that_is_there_is_not_overwritten(small, tmp_path):
    settings = changed(small, levels=(0.999999,))
    scan(settings)

    with pytest.raises(UsageError, match="--resume auto"):
        scan(settings)


# the command


def run(*arguments: object):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(item) for item in arguments])


@pytest.fixture
def options(small) -> list[object]:
    quick = ("images", "probe_images", "batch_size", "steps", "patch_starts", "additive_starts")
    values = [f"{name}={getattr(small, name)}" for name in quick]
    return [
        *("--encoder", small.encoder.teacher, "--data", small.data.source, "--device", "cpu"),
        *(part for value in (*values, "levels=[0.3, 0.1]") for part in ("--set", value)),
    ]


def test_command_prints_scores_and_says_that_there_is_no_verdict(options, tmp_path):
    done = run(*options, "--out", tmp_path / "out")

    assert done.exit_code == 0, done.output
    assert "patch size at 0.3" in done.output
    assert "no verdict" in done.output
    assert (tmp_path / "out" / "scan.json").exists()


def test_command_prints_one_json_object(options):
    done = run(*options, "--json")

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] is None


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--fail-on", "suspicious"], 2, "--references"),
        (["--references", "nowhere"], 2, "nowhere"),
        (["--data", "nowhere"], 2, "nowhere"),
        (["--encoder", "nowhere.safetensors"], 2, "nowhere.safetensors"),
        (["--set", "scan.stepz=3"], 2, "scan"),
        (["--set", "steps=0"], 2, "steps"),
    ],
)
def test_mistakes_are_one_line_and_the_documented_code(options, extra, code, message):
    done = run(*options, *extra)

    assert isinstance(done.exception, MimicError), done.output
    assert done.exception.exit_code == code
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_fail_on_needs_enough_references(options, encoder_file, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(encoder_file(1), tmp_path / "one")
    shutil.copy(encoder_file(1).with_suffix(".json"), tmp_path / "one")

    done = run(*options, "--references", tmp_path / "one", "--fail-on", "unusual")

    assert isinstance(done.exception, UsageError)
    assert "too few" in str(done.exception)


def test_images_that_cannot_be_decoded_are_left_out(small, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "000.png").write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(tmp_path / "some" / "large.jpg")
    data = small.data.model_copy(update={"source": str(tmp_path / "some")})
    messages: list[str] = []

    scan(
        changed(small, data=data, images=81, levels=(0.999999,)),
        report=lambda event: messages.append(event.message),
    )

    assert any("000.png" in message for message in messages)


def _scan_until_killed(settings: ScanSettings) -> None:
    torch.set_num_threads(1)

    def report(event) -> None:
        if event.phase == "patch" and event.done == 15:
            os.kill(os.getpid(), signal.SIGKILL)

    scan(settings, report=report)


def test_killed_in_the_middle_goes_on_to_the_same_scores(easy, tmp_path):
    whole = scan(into(easy, tmp_path / "whole"))
    settings = into(easy, tmp_path / "killed", resume="auto")
    process = multiprocessing.get_context("spawn").Process(
        target=_scan_until_killed, args=(settings,)
    )
    process.start()
    process.join(120)

    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "parts" / "patch_0.safetensors").exists()
    assert scan(settings).scanned.scores == whole.scanned.scores
