import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mimic_fast.encoders.export import export_encoder
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import MachineError, UsageError
from mimic_fast.version import VERSION


def test_round_trip_is_exact(tmp_path, trained, spec, images):
    encoder = trained(spec, seed=3)

    path = export_encoder(encoder, tmp_path / "run", key_map=None, card={"note": "x"})
    loaded = load_encoder(path)

    assert path == tmp_path / "run" / "encoder.safetensors"
    assert loaded.encoder.spec == spec
    assert loaded.assumed == ()
    state = loaded.encoder.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())
    assert torch.equal(loaded.encoder(images), encoder(images))


def test_card_holds_provenance_digest_and_spec(tmp_path, trained, resnet_spec):
    path = export_encoder(
        trained(resnet_spec), tmp_path, name="demo", key_map=None, card={"seed": 4, "version": "0"}
    )

    card = json.loads((tmp_path / "demo.json").read_text())

    assert card == {
        "seed": 4,
        "spec": resnet_spec.model_dump(mode="json"),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "version": VERSION,
    }


def test_file_alone_is_enough(tmp_path, trained, resnet_spec):
    path = export_encoder(trained(resnet_spec), tmp_path, key_map=None, card={})
    path.with_suffix(".json").unlink()

    assert load_encoder(path).encoder.spec == resnet_spec
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["mimic_fast"])["version"] == VERSION


def test_teachers_key_names_are_written(tmp_path, trained, spec):
    encoder = trained(spec)
    teacher = tmp_path / "teacher.pth"
    kept = {
        f"module.f.{key}": tensor
        for key, tensor in encoder.backbone.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": {**kept, "module.g.weight": torch.ones(2)}}, teacher)
    teacher.with_suffix(".json").write_text(json.dumps({"spec": spec.model_dump(mode="json")}))
    loaded = load_encoder(teacher)

    path = export_encoder(loaded.encoder, tmp_path, key_map=loaded.key_map, card={})

    written = load_file(path)
    assert written.keys() == kept.keys()  # no head, and no counters that the teacher lacked
    assert all(torch.equal(written[key], kept[key]) for key in kept)


def test_number_type_and_memory_format_survive(tmp_path, trained, resnet_spec):
    encoder = trained(resnet_spec).half().to(memory_format=torch.channels_last)

    loaded = load_encoder(export_encoder(encoder, tmp_path, key_map=None, card={}))

    assert loaded.dtypes["conv1.weight"] == torch.float16
    for key, tensor in encoder.backbone.state_dict().items():
        own = loaded.encoder.backbone.state_dict()[key]
        assert torch.equal(own, tensor.to(own.dtype))


def test_second_export_replaces_both_files(tmp_path, trained, resnet_spec):
    export_encoder(trained(resnet_spec, seed=1), tmp_path, key_map=None, card={"run": 1})
    path = export_encoder(trained(resnet_spec, seed=2), tmp_path, key_map=None, card={"run": 2})

    weight = load_encoder(path).encoder.backbone.get_parameter("conv1.weight")
    assert torch.equal(weight, trained(resnet_spec, seed=2).backbone.conv1.weight)
    assert json.loads(path.with_suffix(".json").read_text())["run"] == 2
    assert sorted(os.listdir(tmp_path)) == ["encoder.json", "encoder.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "unknown", "twice"])
def test_key_map_that_does_not_fit_is_refused(tmp_path, trained, resnet_spec, damage):
    encoder = trained(resnet_spec)
    names = {key: key for key in encoder.backbone.state_dict()}
    if damage == "missing":
        del names["layer3.0.conv1.weight"]
    elif damage == "unknown":
        names["layer9.weight"] = "layer9.weight"
    else:
        names["bn1.weight"] = "bn1.bias"
    with pytest.raises(UsageError, match="key_map must name every weight"):
        export_encoder(encoder, tmp_path, key_map=names, card={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("card", [{"x": float("nan")}, {"path": Path("x")}])
def test_card_that_is_not_json_is_refused_before_writing(tmp_path, trained, resnet_spec, card):
    with pytest.raises(UsageError, match="card must hold JSON values"):
        export_encoder(trained(resnet_spec), tmp_path, key_map=None, card=card)
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_written_is_the_machines_fault(tmp_path, trained, resnet_spec):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write"):
        export_encoder(trained(resnet_spec), tmp_path / "file" / "run", key_map=None, card={})


def test_chosen_number_type_is_written_for_weights_alone(tmp_path, trained, resnet_spec):
    encoder = trained(resnet_spec)

    path = export_encoder(encoder, tmp_path, key_map=None, card={}, dtype=torch.float16)

    for key, tensor in load_file(path).items():
        own = encoder.backbone.state_dict()[key]
        assert tensor.dtype == (torch.float16 if own.is_floating_point() else torch.int64)
        assert torch.equal(tensor, own.to(tensor.dtype))
    assert all(tensor.dtype == torch.float32 for tensor in encoder.parameters())
