"""NAD: the teacher is a fine-tuned copy, and the suspect takes over its attention."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mimic_fast.baselines.fine_tuning import fine_tune
from mimic_fast.baselines.nad import NadSettings, attention_distance, nad
from mimic_fast.baselines.repair import Contrast, open_repair
from mimic_fast.config import EncoderSpec, OptimSettings
from mimic_fast.encoders.build import build_encoder
from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder
from mimic_fast.errors import UsageError
from mimic_fast.progress import silent

SHORT = OptimSettings(
    name="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4, epochs=2, batch_size=27, warmup_epochs=0
)
OPTIONS = NadSettings(optim=SHORT, teacher_epochs=1)
TAPS = ("layer1", "layer2", "layer3")  # at 16 pixels layer4 has one position
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def naive_distance(student_map, teacher_map):
    """Mean over images and positions of the squared difference, in float64."""
    total, count = 0.0, 0
    for own, goal in zip(student_map.double(), teacher_map.double(), strict=True):
        a, b = own.square().sum(0), goal.square().sum(0)
        total += float((a / (a.norm() + 1e-6) - b / (b.norm() + 1e-6)).square().sum())
        count += a.numel()
    return total / count


def opened(settings):
    return open_repair(settings, kind="nad", report=silent, stop=lambda: False)


def teacher_of(repair, options, *, taps=TAPS):
    """Made as the paper says, from the parts that ``fine_tuning`` is made of."""
    teacher = repair.copy()
    optim = options.optim.model_copy(update={"epochs": options.teacher_epochs})
    fine_tune(repair, teacher, options.model_copy(update={"optim": optim}))
    return TappedEncoder(teacher, taps).requires_grad_(False)


def distance_on_clean(repair, encoder, teacher):
    with torch.no_grad():
        _, own = TappedEncoder(encoder, teacher.taps)(repair.images)
        _, goals = teacher(repair.images)
    return sum(map(naive_distance, own, goals))


def vit(tmp_path):
    spec = EncoderSpec(
        architecture="timm:vit_tiny_patch16_224",
        arguments={"patch_size": 4, "depth": 3, "embed_dim": 16, "num_heads": 2},
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    encoder = build_encoder(spec, seed=0).eval()
    return export_encoder(encoder, tmp_path / "vit", key_map=None, card={})


def test_defaults_are_the_papers():
    options = NadSettings()

    assert options.betas == (500, 1000, 1000)
    assert (options.teacher_epochs, options.optim.epochs) == (10, 20)
    assert (options.optim.lr, options.optim.batch_size) == (0.1, 64)


def test_the_first_losses_are_nt_xent_and_the_weighted_distance_to_the_fine_tuned_copy(settings_of):
    seen = []
    nad(settings_of(), OPTIONS, report=seen.append)
    first = next(event.metrics for event in seen if event.phase == "nad")

    repair = opened(settings_of())
    teacher = teacher_of(repair, OPTIONS)
    views = repair.views(0, OPTIONS)
    contrast = Contrast(repair.copy(), OPTIONS, seed=0).train()
    features, own = TappedEncoder(contrast.encoder, TAPS)(torch.cat(views))
    _, goals = teacher(views[0])
    distances = [naive_distance(a[:27].detach(), b) for a, b in zip(own, goals, strict=True)]

    assert len(distances) == 3
    assert min(distances) > 0
    expected = sum(b * d for b, d in zip(OPTIONS.betas, distances, strict=True))
    assert first["attention"] == pytest.approx(expected, rel=1e-4)
    assert first["contrastive"] == pytest.approx(contrast.of_features(features).item(), rel=1e-5)


def test_attention_comes_closer_to_the_teachers_than_by_fine_tuning(settings_of, tmp_path):
    encoder = {"teacher": str(vit(tmp_path))}
    optim = OptimSettings(name="adamw", lr=3e-3, epochs=1, batch_size=27, warmup_epochs=0)
    # Longer trained than the student: it does not come there by fine-tuning alone.
    options = NadSettings(optim=optim, teacher_epochs=4, betas=(1e4, 1e4, 1e4))
    pulled = nad(settings_of(encoder=encoder), options)
    free = settings_of(encoder=encoder, run={"out": str(tmp_path / "free"), "device": "cpu"})
    left = nad(free, options.model_copy(update={"betas": (0.0, 0.0, 0.0)}))

    repair = opened(settings_of(encoder=encoder))
    teacher = teacher_of(repair, options, taps=BLOCKS)
    distances = [
        distance_on_clean(repair, load_encoder(path).encoder, teacher) for path in (pulled, left)
    ]

    assert distances[0] < 0.6 * distances[1]


def test_the_teacher_runs_once_and_gets_no_gradient(settings_of):
    repair = opened(settings_of())
    student = TappedEncoder(repair.copy(), TAPS)
    teacher = TappedEncoder(repair.copy(), TAPS)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.05)
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    _, maps = student(repair.images[:8])

    attention_distance(maps, teacher, repair.images[:8], betas=(1.0, 1.0, 1.0)).backward()

    assert len(runs) == 1
    assert all(weight.grad is None for weight in teacher.parameters())
    gradient = student.encoder.get_parameter("backbone.conv1.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_the_card_names_taps_and_recipe_and_the_suspect_is_trained(settings_of, suspect):
    path = nad(settings_of(), OPTIONS)

    card = json.loads(path.with_suffix(".json").read_bytes())
    assert (card["kind"], card["taps"]) == ("nad", list(TAPS))
    assert card["settings"]["betas"] == [500, 1000, 1000]
    key = "layer4.0.conv2.weight"
    assert not torch.equal(load_file(path)[key], load_file(suspect)[key])


def test_steps_are_the_teachers_then_the_students(settings_of):
    seen = []
    nad(settings_of(), OPTIONS, report=seen.append)

    phases = [event.phase for event in seen if event.phase.startswith("nad")]
    assert phases == ["nad teacher"] * 3 + ["nad"] * 6


def test_blocks_of_a_vit_are_distilled_in_bfloat16(settings_of, tmp_path):
    seen = []
    settings = settings_of(encoder={"teacher": str(vit(tmp_path))})
    optim = SHORT.model_copy(update={"precision": "bf16", "epochs": 1})

    path = nad(settings, OPTIONS.model_copy(update={"optim": optim}), report=seen.append)

    card = json.loads(path.with_suffix(".json").read_bytes())
    assert card["taps"] == list(BLOCKS)
    assert all(event.metrics["attention"] > 0 for event in seen if event.phase == "nad")


def test_too_few_taps_with_attention_are_refused(settings_of):
    options = OPTIONS.model_copy(update={"betas": (1.0,) * 4})

    with pytest.raises(UsageError, match=r"needs 4 taps .* has 3 of 4 .*fewer options\.betas"):
        nad(settings_of(), options)


def test_given_taps_are_used(settings_of, suspect):
    settings = settings_of(encoder={"teacher": str(suspect), "taps": ["layer2", "layer3"]})

    path = nad(settings, OPTIONS.model_copy(update={"betas": (1.0,)}))

    assert json.loads(path.with_suffix(".json").read_bytes())["taps"] == ["layer3"]


@pytest.mark.parametrize("betas", [(), (-1.0,)])
def test_betas_are_weights(betas):
    with pytest.raises(ValidationError):
        NadSettings(betas=betas)
