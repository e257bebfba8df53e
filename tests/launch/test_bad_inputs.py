"""Bad triggers, targets, labeled sets and encoders: one line, exit 2 or 4, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mimic_fast.evaluation.attack_file import Attack, write_attack
from mimic_fast.evaluation.triggers import white_patch
from tests.launch.conftest import picture


def images(folder: Path, counts: dict[str, int]) -> Path:
    """So many pictures in the subfolder of each class; "" is the folder itself."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(picture(number, label % 2))
    return folder


def splits(root: Path, train: dict[str, int], test: dict[str, int]) -> str:
    images(root / "train", train)
    images(root / "test", test)
    return f"toy={root}"


BOTH = {"dark": 45, "light": 45}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, encoders) -> Path:
    """Encoders, attacks and labeled sets, good and bad, that all tests only read."""
    root = tmp_path_factory.mktemp("inputs")
    good = encoders["resnet"]
    (root / "good").mkdir()
    for path in (good, good.with_suffix(".json")):
        (root / "good" / path.name.replace("resnet", "encoder")).write_bytes(path.read_bytes())
    for name, value in (("nan", float("nan")), ("overflow", 1e38)):
        (root / name).mkdir()
        tensors = load_file(good)
        last = [key for key, tensor in tensors.items() if tensor.ndim == 4][-1]
        tensors[last] = torch.full_like(tensors[last], value)
        save_file(tensors, root / name / "encoder.safetensors")
        card = json.loads(good.with_suffix(".json").read_bytes())
        (root / name / "encoder.json").write_text(json.dumps({"spec": card["spec"]}))
    attacks(root)
    splits(root / "sets" / "good", BOTH, BOTH)
    splits(root / "sets" / "one_in_train", {"dark": 40}, BOTH)
    splits(root / "sets" / "one_in_test", BOTH, {"dark": 40})
    splits(root / "sets" / "one_in_both", {"dark": 40}, {"dark": 40})
    splits(root / "sets" / "other_classes", BOTH, {"cat": 20, "dog": 20})
    splits(root / "sets" / "unlabeled", {"": 40}, BOTH)
    splits(root / "sets" / "unlabeled_test", BOTH, {"": 40})
    splits(root / "sets" / "no_test", BOTH, {})
    three = {"dark": 5, "gray": 5, "light": 5}
    splits(root / "sets" / "three", three, three)
    images(root / "few", {"dark": 3, "light": 3})
    (root / "note.txt").write_text("no image\n")
    return root


def attacks(root: Path) -> None:
    """``attacks/NAME/attack.json``, each with one thing wrong but the first."""
    names = ("good", "no_trigger", "damaged_trigger", "nan_trigger", "channels", "target")
    for name in (*names, "no_reference", "damaged_reference", "broken"):
        folder = root / "attacks" / name
        folder.mkdir(parents=True)
        reference = torch.full((3, 16, 16), 90, dtype=torch.uint8)
        trigger = white_patch(image_size=16, channels=3)
        targets = {"toy": 9 if name == "target" else 1}
        write_attack(
            folder, Attack(kind="test", trigger=trigger, reference=reference, targets=targets)
        )
        file = folder / "trigger.safetensors"
        if name == "no_trigger":
            file.unlink()
        if name == "damaged_trigger":
            file.write_bytes(file.read_bytes()[:-50])
        if name in ("nan_trigger", "channels"):
            tensors = load_file(file)
            if name == "nan_trigger":
                tensors["pattern"][0, 0, 0] = float("nan")
            else:
                tensors["pattern"] = torch.zeros(4, 16, 16)
            save_file(tensors, file)
        if name == "no_reference":
            (folder / "reference.png").unlink()
        if name == "damaged_reference":
            (folder / "reference.png").write_bytes(b"\x89PNG\r\n")
        if name == "broken":
            (folder / "attack.json").write_text("{")
    np.savez(root / "small.npz", mask=np.ones((1, 4, 5)), pattern=np.zeros((3, 4, 4)))
    np.savez(root / "channels.npz", mask=np.ones((1, 4, 4)), pattern=np.zeros((4, 4, 4)))
    np.savez(root / "objects.npz", mask=np.array([{}]), pattern=np.zeros((3, 4, 4)))
    (root / "torn.npz").write_bytes((root / "channels.npz").read_bytes()[:300])


@pytest.fixture
def refused(cli, inputs, tmp_path) -> Callable[..., None]:
    """``refused(code, says, *arguments)``: where ``{}`` is the folder of inputs."""

    def check(code: int, says: str, *arguments: str) -> None:
        before = sorted(inputs.rglob("*"))
        done = cli(*(argument.format(inputs) for argument in arguments))

        assert done.code == code, done.err
        assert says in done.error
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in files if path.parent.name != ".logs"] == []
        assert sorted(inputs.rglob("*")) == before

    return check


GOOD_SET = ("--downstream", "toy={}/sets/good")
EVALUATE = ("evaluate", "--out", "run", "--encoder", "teacher={}/good/encoder.safetensors")


@pytest.mark.parametrize(
    ("attack", "code", "says"),
    [
        ("gone", 2, "does not exist"),
        ("broken", 2, "JSON"),
        ("no_trigger", 2, "trigger.safetensors cannot be read: No such file"),
        ("damaged_trigger", 4, "is neither safetensors, .npz nor a picture"),
        ("nan_trigger", 2, "pattern must lie in [0, 1]"),
        ("channels", 2, "4 channels and the encoder takes 3"),
        ("target", 2, "target 9 of 'toy' is not one of its 2 classes"),
        ("no_reference", 2, "reference.png does not exist"),
        ("damaged_reference", 4, "reference.png cannot be decoded"),
    ],
)
def test_evaluate_refuses_a_bad_attack(refused, attack, code, says):
    refused(code, says, *EVALUATE, *GOOD_SET, "--attack", f"{{}}/attacks/{attack}")


SETS = [
    ("one_in_train", "train has classes dark, test has dark, light"),
    ("one_in_test", "train has classes dark, light, test has dark"),
    ("one_in_both", "are of one class"),
    ("other_classes", "train has classes dark, light, test has cat, dog"),
    ("unlabeled", "has no labels"),
    ("unlabeled_test", "has no labels"),
    ("no_test", "test"),
    ("gone", "gone"),
]


@pytest.mark.parametrize(("name", "says"), SETS)
def test_evaluate_refuses_a_bad_labeled_set(refused, name, says):
    refused(2, says, *EVALUATE, "--downstream", f"toy={{}}/sets/{name}")


def test_evaluate_refuses_fewer_labels_than_classes(refused):
    three = ("--downstream", "toy={}/sets/three", "--set", "evaluation.probe_labels=2")
    refused(2, "evaluation.probe_labels 2 is fewer than its 3 classes", *EVALUATE, *three)


QUICK = (
    *("--set", "data.clean_fraction=1", "--allow-budget", "--device", "cpu"),
    *("--set", "optim.epochs=1", "--set", "optim.batch_size=30"),
)
TRAIN = ("--data", "{}/sets/good/train", "--out", "run")
ATTACK = ("--reference", "class:1", "--device", "cpu", "--set", "optim.batch_size=30")


COMMANDS = {
    "evaluate": ("evaluate", "--encoder", *GOOD_SET, "--out", "run"),
    "scan": ("scan", "--encoder", *TRAIN, "--set", "batch_size=16", "--device", "cpu"),
    "attack": ("attack", "badencoder", "--encoder", *TRAIN, *ATTACK),
    "purify": ("purify", "--teacher", *TRAIN, *QUICK),
    "locate": ("locate", "--teacher", *TRAIN, *QUICK[:3]),
}


def with_encoder(command: str, name: str) -> list[str]:
    """The command line with the encoder's file after the option that takes it."""
    file = f"{{}}/{name}/encoder.safetensors"
    words = (
        (word, file) if word in ("--encoder", "--teacher") else (word,)
        for word in COMMANDS[command]
    )
    return [word for pair in words for word in pair]


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_not_finite_are_unsafe(refused, command):
    refused(4, "holds values that are not finite", *with_encoder(command, "nan"))


@pytest.mark.parametrize("command", ["evaluate", "scan", "attack"])
def test_features_that_overflow_are_unsafe(refused, command):
    refused(4, "features that are not finite", *with_encoder(command, "overflow"))


@pytest.mark.parametrize("command", ["purify", "locate"])
def test_feature_maps_that_overflow_fail_the_start_up_check(cli, inputs, tmp_path, command):
    done = cli(*(word.format(inputs) for word in with_encoder(command, "overflow")))

    assert done.code == 3, done.err
    assert "activations of 'layer4' must be finite" in done.error
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not written & {"mutual_information.json", "encoder.safetensors", "report.json"}


BADENCODER = ("attack", "badencoder", "--encoder", "{}/good/encoder.safetensors", *TRAIN)


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        (("--reference", "gone.png"), 2, "reference 'gone.png' is neither a file nor"),
        (("--reference", "class:99"), 2, "has no such label"),
        (("--reference", "typical:99"), 2, "has no such label"),
        (("--reference", "{}/note.txt"), 4, "decoded"),
        (("--trigger", "gone.npz"), 2, "trigger 'gone.npz' is neither a file nor one of"),
        (("--trigger", "{}/small.npz"), 2, "needs mask [1, H, W]"),
        (("--trigger", "{}/channels.npz"), 2, "4 channels and the encoder takes 3"),
        (("--trigger", "{}/objects.npz"), 4, "is not a plain .npz"),
        (("--trigger", "{}/torn.npz"), 4, "is not a plain .npz"),
        (("--trigger", "blended:{}/torn.npz"), 4, "is not a plain .npz"),
        (("--trigger", "frequency:-1"), 2, "is neither a file nor one of"),
        (("--downstream", "toy={}/sets/one_in_both"), 2, "are of one class"),
        (("--downstream", "toy={}/sets/unlabeled"), 2, "has no labels"),
    ],
    ids=lambda value: value[1].replace("{}/", "") if isinstance(value, tuple) else None,
)
def test_attack_refuses_bad_references_triggers_and_sets(refused, changed, code, says):
    reference = () if "--reference" in changed else ATTACK[:2]
    refused(code, says, *BADENCODER, *ATTACK[2:], *reference, *changed)


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        (("--target", "99"), 2, "has label 99; labels are 0..1"),
        (("--target", "-1"), 2, "target"),
        (("--target", "1", "--trigger", "{}/torn.npz"), 4, "is not a plain .npz"),
        (("--target", "1", "--data", "{}/sets/unlabeled/train"), 2, "has no labels"),
    ],
    ids=["99", "-1", "torn trigger", "unlabeled"],
)
def test_poisoning_refuses_bad_targets_and_triggers(refused, changed, code, says):
    data = () if "--data" in changed else ("--data", "{}/sets/good/train")
    spec = '{architecture = "timm:resnet18", image_size = 16, mean = [0.5, 0.5, 0.5]'
    spec = "spec=" + spec + ", std = [0.2, 0.2, 0.2]}"
    options = ("--set", spec.replace("{", "{{").replace("}", "}}"), "--out", "run")
    refused(code, says, "attack", "ctrl", *data, *options, "--set", "optim.batch_size=30", *changed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--data", "{}/few"), "has 6 images, a scan with batch_size"),
        (("--data", "gone"), "gone"),
        (("--references", "gone"), "references gone is not a folder"),
        (("--references", "{}/few"), "holds neither encoders nor scan.json files"),
    ],
    ids=["few", "no images", "no folder", "no references"],
)
def test_scan_refuses_what_is_not_enough(refused, changed, says):
    data = () if "--data" in changed else TRAIN[:2]
    encoder = ("--encoder", "{}/good/encoder.safetensors", "--device", "cpu", "--out", "run")
    refused(2, says, "scan", *encoder, *data, "--set", "batch_size=16", *changed)


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        (("--attack", "{}/attacks/gone"), 2, "does not exist"),
        (("--attack", "{}/attacks/target"), 2, "target 9 of 'toy'"),
        (("--attack", "{}/attacks/damaged_trigger"), 4, "is neither safetensors"),
        (("--attack", "{}/attacks/channels"), 2, "4 channels and the encoder takes 3"),
        (("--downstream", "toy={}/sets/one_in_both"), 2, "are of one class"),
        (("--downstream", "toy={}/sets/other_classes"), 2, "train has classes"),
        (("--downstream", "toy={}/sets/unlabeled"), 2, "has no labels"),
        (("--clean", "{}/gone.safetensors"), 2, "gone.safetensors does not exist"),
    ],
    ids=lambda value: value[1].rpartition("/")[2] if isinstance(value, tuple) else None,
)
def test_purify_refuses_a_bad_measurement_before_it_trains(refused, changed, code, says):
    downstream = () if "--downstream" in changed else GOOD_SET
    teacher = ("purify", "--teacher", "{}/good/encoder.safetensors")
    refused(code, says, *teacher, *TRAIN, *QUICK, *downstream, *changed)


MATRIX = """
[data]
source = "{}/sets/good/train"

[[evaluation.downstream]]
name = "toy"
train = "{}/sets/good/train"
test = "{}/sets/good/test"

[attacks.one]
encoder = "{}/good/encoder.safetensors"
attack = "{}/attacks/good"

[defenses.none]
kind = "none"
"""


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("good/encoder.safetensors", "gone.safetensors", 2, "gone.safetensors does not exist"),
        ("attacks/good", "attacks/gone", 2, "does not exist; give an attack.json or its folder"),
        ("attacks/good", "attacks/broken", 2, "attacks/broken/attack.json: JSON"),
        ("attacks/good", "attacks/damaged_trigger", 4, "is neither safetensors"),
        ("attacks/good", "attacks/no_trigger", 2, "trigger.safetensors cannot be read"),
        ('attack = "{}/attacks/good"', "", 2, "good/attack.json does not exist"),
        (
            'attack = "{}/attacks/good"',
            'clean = "{}/no"\nattack = "{}/attacks/good"',
            2,
            "/no does",
        ),
        ('kind = "none"', 'kind = "magic"', 2, "there is no defense of kind 'magic'"),
        ('kind = "none"', 'kind = "clean"', 2, "needs attacks.one.clean"),
        ('kind = "none"', 'kind = "purify"\npreset = "gone"', 2, "gone"),
        ("sets/good/test", "sets/gone/test", 2, "does not exist"),
        ("sets/good/test", "sets/other_classes/test", 2, "train has classes"),
        ("[data]", "[data", 2, "matrix.toml"),
    ],
    ids=str,
)
def test_compare_refuses_a_matrix_whose_parts_are_missing(
    cli, inputs, tmp_path, old, new, code, says
):
    assert old in MATRIX
    text = MATRIX.replace(old, new).replace("{}", str(inputs))
    (tmp_path / "matrix.toml").write_text(text)

    done = cli("compare", "matrix.toml", "--out", "run")

    assert done.code == code, done.err
    assert says in done.error
    assert not (tmp_path / "run").exists()
