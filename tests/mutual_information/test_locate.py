"""Step A whole: real encoders, real files, real processes, killed and resumed."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mimic_fast.config import DataSettings, EncoderSettings, EncoderSpec, Settings
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.errors import MachineError, SelfTestError, StoppedError, UsageError
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.ksg_layers import estimate_ksg
from mimic_fast.mutual_information.locate import (
    MutualInformation,
    locate,
    locate_layers,
    mutual_information_json,
)

QUICK = Settings.model_validate({"mi": {"chunk": 16}})
DV = Settings.model_validate(
    {"mi": {"estimator": "dv", "dv_epochs": 12, "dv_batch": 32, "chunk": 16}}
)
INFONCE = Settings.model_validate(
    {"mi": {"estimator": "infonce", "dv_epochs": 2, "dv_batch": 8, "chunk": 16}}
)
KSG = Settings.model_validate({"mi": {"estimator": "ksg", "shuffles": 2, "chunk": 16}})
CROSS = Settings.model_validate({"mi": {"pairs": "cross", "components": 8, "chunk": 16}})
SLICED = Settings.model_validate({"mi": {"pairs": "sliced", "slices": 40, "chunk": 16}})
CLASS_TOKEN = {"pool": "class_token"}


def run(
    tapped: TappedEncoder, images: Tensor, settings: Settings = QUICK, **changes: Any
) -> MutualInformation:
    found = locate_layers(
        tapped, images, settings, names=tapped.taps, **{"processes": SINGLE, **changes}
    )
    return replace(found, seconds=0.0)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_tap_of_a_resnet_and_a_vit_has_a_finite_weight(tapped, pictures, kind):
    encoder = tapped(kind)

    found = run(encoder, pictures(200))

    assert [layer.tap for layer in found.layers] == list(encoder.taps)
    assert all(math.isfinite(layer.weight) and layer.weight >= 1000 for layer in found.layers)
    assert math.fsum(layer.share for layer in found.layers) == pytest.approx(1)
    assert all(layer.low <= layer.raw <= layer.high for layer in found.layers)
    assert (found.estimator, found.source, found.images) == ("histogram", "teacher", 200)
    assert found.bins == 4


def test_the_last_stage_of_a_resnet_determines_its_features(tapped, pictures):
    found = run(tapped("resnet"), pictures(200))

    last = found.layers[-1]
    assert last.determines_features
    assert last.pairs is not None
    assert last.raw == pytest.approx(last.pairs * math.log(4))
    assert not found.layers[0].determines_features


def test_dv_gives_every_layer_a_finite_weight(tapped, pictures):
    found = run(tapped("resnet"), pictures(64), DV)

    assert all(math.isfinite(layer.weight) for layer in found.layers)
    assert any(layer.value > 0 for layer in found.layers)
    body = mutual_information_json(found)
    assert "bins" not in body
    assert "noise_floor" not in body["layers"][0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (CROSS, "histogram, cross pairs"),
        (SLICED, "histogram, sliced"),
        (KSG, "ksg"),
        (INFONCE, "infonce"),
    ],
    ids=["cross", "sliced", "ksg", "infonce"],
)
def test_every_estimator_weighs_every_tap_and_is_named(tapped, pictures, settings, name):
    encoder = tapped("resnet")

    found = run(encoder, pictures(80), settings)

    assert found.estimator == name
    assert [layer.tap for layer in found.layers] == list(encoder.taps)
    assert all(layer.low <= layer.raw <= layer.high for layer in found.layers)
    assert math.fsum(layer.share for layer in found.layers) == pytest.approx(1)
    assert mutual_information_json(found)["estimator"] == name
    if name == "infonce":
        assert all(layer.value <= math.log(8) + 1e-6 for layer in found.layers)


def test_too_few_images_are_refused_before_any_forward_pass(tapped, pictures):
    encoder = tapped("resnet")
    forwards = []
    encoder.encoder.backbone.register_forward_hook(lambda *_: forwards.append(1))

    with pytest.raises(SelfTestError, match="needs 72 clean images"):
        run(encoder, pictures(70))
    with pytest.raises(SelfTestError, match="'ksg' needs 8 clean images"):
        run(encoder, pictures(7), KSG)

    assert not forwards


def test_weights_that_are_not_finite_name_the_first_layer_they_reach(tapped, pictures):
    encoder = tapped("resnet")
    with torch.no_grad():
        encoder.encoder.backbone.get_submodule("layer3.0.bn1").weight[0] = math.nan

    for settings in (QUICK, DV):
        with pytest.raises(SelfTestError, match="'layer3' must be finite"):
            run(encoder, pictures(80), settings)


@pytest.mark.parametrize(
    ("settings", "polls_before_stop"),
    [(QUICK, 3), (DV, 20)],
    ids=["histogram", "dv"],
)
def test_a_stopped_step_a_goes_on_to_the_same_bits(
    tapped, pictures, tmp_path, settings, polls_before_stop
):
    encoder, images = tapped("resnet"), pictures(96)
    polls = iter([False] * polls_before_stop + [True])

    with pytest.raises(StoppedError, match="resume auto"):
        run(encoder, images, settings, state_dir=tmp_path, stop=lambda: next(polls))

    assert any(tmp_path.iterdir())
    forwards = []
    encoder.encoder.backbone.register_forward_hook(lambda *_: forwards.append(1))
    resumed = run(encoder, images, settings, state_dir=tmp_path)
    work = len(forwards)
    straight = run(encoder, images, settings)
    assert resumed == straight
    assert work < len(forwards) - work, "finished parts must not be computed again"


def test_parts_of_another_encoder_or_seed_are_not_picked_up(tapped, pictures, tmp_path):
    encoder, images = tapped("resnet"), pictures(80)
    run(encoder, images, state_dir=tmp_path)
    few = images[:40]
    run(encoder, few, DV, state_dir=tmp_path)
    with torch.no_grad():
        encoder.encoder.backbone.get_submodule("conv1").weight.mul_(-1)
    other_seed = DV.model_copy(update={"seed": 1})

    assert run(encoder, images, state_dir=tmp_path) == run(encoder, images)
    again = run(encoder, few, other_seed, state_dir=tmp_path)
    assert again == run(encoder, few, other_seed)


def worker(images: Tensor, spec: dict[str, Any]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    return located(
        images,
        spec,
        Processes(rank=dist.get_rank(), world=dist.get_world_size(), device=torch.device("cpu")),
    )


def located(images: Tensor, spec: dict[str, Any], here: Processes) -> list[dict[str, Any]]:
    encoder = build_encoder(EncoderSpec.model_validate(spec), seed=3)
    tapped = TappedEncoder(encoder, default_taps(encoder))
    # 7 chunks of 16 images and three taps: not the same share for every process
    found = [
        run(tapped, images, processes=here),
        run(tapped, images[:40], DV, processes=here),
        run(tapped, images[:40], INFONCE, processes=here),
    ]
    # a layer of ties, and one without any direction
    layers = [images[:, 0, :2, 0].float() // 64, torch.zeros(len(images), 3)]
    odd = estimate_histogram(
        layers,
        images[:, 0, 0, :5].float(),
        QUICK.mi,
        names=["tied", "dead"],
        seed=0,
        processes=here,
    )
    others = [
        estimate(
            layers,
            images[:, 0, 0, :5].float(),
            s.mi,
            names=["tied", "dead"],
            seed=0,
            processes=here,
        )
        for estimate, s in (
            (estimate_histogram, CROSS),
            (estimate_histogram, SLICED),
            (estimate_ksg, KSG),
        )
    ]
    return [*map(mutual_information_json, found), *map(asdict, [*odd, *chain(*others)])]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_bits(
    tapped, pictures, run_processes: Callable[..., list[Any]], world
):
    spec = tapped("vit").encoder.spec.model_dump(mode="json")
    images = pictures(101)

    found = run_processes(worker, world=world, images=images, spec=spec)

    assert found == [located(images, spec, SINGLE)] * world


def stopping_worker(images: Tensor, spec: dict[str, Any], folder: str) -> str:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    encoder = build_encoder(EncoderSpec.model_validate(spec), seed=3)
    tapped = TappedEncoder(encoder, default_taps(encoder))
    here = Processes(rank=rank, world=dist.get_world_size(), device=torch.device("cpu"))
    polls = iter([False, False, rank == 1])  # only one of them hears the signal
    try:
        run(tapped, images, processes=here, state_dir=Path(folder), stop=lambda: next(polls))
    except StoppedError as error:
        return str(error)
    return "went on"


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on_from_their_parts(
    tapped, pictures, run_processes: Callable[..., list[Any]], tmp_path
):
    encoder, images = tapped("vit"), pictures(101)
    spec = encoder.encoder.spec.model_dump(mode="json")

    said = run_processes(stopping_worker, world=2, images=images, spec=spec, folder=str(tmp_path))

    assert said == ["stopped in step A; go on with --resume auto"] * 2
    assert len(list(tmp_path.iterdir())) == 4  # two chunks of each process
    assert run(encoder, images, state_dir=tmp_path) == run(encoder, images)


def killed_worker(folder: str) -> None:
    """Runs step A on the job in ``folder`` until it kills itself at the fifth poll."""
    saved = torch.load(Path(folder) / "job.pt", weights_only=True)
    encoder = build_encoder(EncoderSpec.model_validate(saved["spec"]), seed=3)
    tapped = TappedEncoder(encoder, default_taps(encoder))
    polls = iter(range(5))

    def kill() -> bool:
        if next(polls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    run(tapped, saved["images"], state_dir=Path(folder) / "state", stop=kill)


def test_a_killed_step_a_goes_on_to_the_same_bits(tapped, pictures, tmp_path):
    encoder, images = tapped("vit"), pictures(101)
    spec = encoder.encoder.spec.model_dump(mode="json")
    torch.save({"images": images, "spec": spec}, tmp_path / "job.pt")

    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, check=False
    )

    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list((tmp_path / "state").iterdir())) == 4
    assert run(encoder, images, state_dir=tmp_path / "state") == run(encoder, images)


@pytest.fixture
def teacher_file(tapped, tmp_path: Path) -> Path:
    encoder = tapped("resnet").encoder
    return export_encoder(encoder, tmp_path / "teacher", key_map=None, card={})


@pytest.fixture
def image_folder(pictures, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, picture in enumerate(pictures(90)):
        pixels = picture.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def command(teacher_file, image_folder, tmp_path) -> Settings:
    return Settings.model_validate(
        {
            "encoder": {"teacher": teacher_file},
            "data": {"source": str(image_folder), "clean_count": 80, "allow_budget": True},
            "run": {"out": tmp_path / "run", "device": "cpu"},
        }
    )


def test_locate_writes_what_it_found(command):
    found = locate(command)

    out = command.run.out
    assert out is not None
    written = json.loads((out / "mutual_information.json").read_text())
    assert written == mutual_information_json(found)
    assert written["unit"] == "nats"
    assert [layer["tap"] for layer in written["layers"]] == [f"layer{n}" for n in (1, 2, 3, 4)]
    assert json.loads((out / "config.json").read_text())["seed"] == command.seed
    assert len(json.loads((out / "clean_set.json").read_text())["items"]) == 80
    with Image.open(out / "mutual_information.png") as picture:
        assert picture.width > 400


def test_locate_of_the_student_measures_a_random_one(command):
    student = command.model_copy(
        update={
            "mi": command.mi.model_copy(update={"source": "student"}),
            "run": command.run.model_copy(update={"out": None}),
        }
    )

    found = locate(student)

    assert found.source == "student"
    teacher = locate(command)
    assert [layer.raw for layer in found.layers] != [layer.raw for layer in teacher.layers]


def test_locate_says_what_is_missing_and_never_overwrites_a_run(command):
    no_teacher = command.model_copy(update={"encoder": EncoderSettings()})
    no_data = command.model_copy(update={"data": DataSettings()})
    assert command.run.out is not None
    command.run.out.mkdir()
    (command.run.out / "config.json").write_text("{}")

    with pytest.raises(UsageError, match="--teacher"):
        locate(no_teacher)
    with pytest.raises(UsageError, match="--data"):
        locate(no_data)
    with pytest.raises(UsageError, match="already holds a run"):
        locate(command)


def test_locate_where_nothing_can_be_written_is_the_machines_error(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_settings = command.run.model_copy(update={"out": tmp_path / "file" / "run"})

    with pytest.raises(MachineError, match="cannot write"):
        locate(command.model_copy(update={"run": run_settings}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed_worker(sys.argv[1])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (QUICK, "resnet18 has none, maps are averaged"),
        (DV, "the dv estimator takes whole maps"),
        (INFONCE, "the infonce estimator takes whole maps"),
    ],
    ids=["resnet", "dv", "infonce"],
)
def test_pool_that_is_ignored_is_named(tapped, pictures, settings, why):
    wish = settings.model_copy(update={"mi": settings.mi.model_copy(update=CLASS_TOKEN)})

    with pytest.warns(UserWarning, match=rf"mi\.pool.* is ignored: .*{why}"):
        found = run(tapped("resnet"), pictures(80), wish)

    assert found == run(tapped("resnet"), pictures(80), settings)


def test_what_was_assumed_of_the_encoder_is_said(command, tapped, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(tapped("resnet").encoder.backbone.state_dict(), plain)
    given = {"teacher": plain, "stem": "small_stride2", "image_size": 16}
    said: list[str] = []

    locate(
        command.model_copy(update={"encoder": EncoderSettings.model_validate(given)}),
        lambda event: said.append(event.message),
    )

    assumed = [text for text in said if text.startswith("assumed of plain.pth")]
    assert assumed == [
        "assumed of plain.pth: mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]; see encoder.*"
    ]


@pytest.mark.parametrize("settings", [KSG, DV], ids=["ksg", "dv"])
def test_pairs_that_are_ignored_are_named(tapped, pictures, settings):
    wish = settings.model_copy(update={"mi": settings.mi.model_copy(update={"pairs": "cross"})})

    with pytest.warns(UserWarning, match=r"mi\.pairs is ignored: the (ksg|dv) estimator"):
        found = run(tapped("resnet"), pictures(40), wish)

    assert found == run(tapped("resnet"), pictures(40), settings)
