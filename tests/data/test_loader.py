import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimic_fast.config import EncoderSpec, Settings
from mimic_fast.data.augment import augmented_view, plain_view
from mimic_fast.data.clean_set import clean_images
from mimic_fast.data.harden import hardened
from mimic_fast.data.loader import Batch, Loader, TrainingImages, _without_gradient, choose_backend
from mimic_fast.data.order import epoch_order
from mimic_fast.distributed import SINGLE, Processes
from mimic_fast.errors import UnsafeInputError, UsageError

SIZE = 24
COUNT = 20
SPEC = EncoderSpec(architecture="timm:resnet18", image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
CPU = torch.device("cpu")
WAYS = {
    "squares": {"backend": "torch", "decode": "once"},
    "files": {"backend": "torch", "decode": "every_time"},
    "dali": {"backend": "dali"},
}


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A picture with detail at every scale, so that resampling shows and JPEG does little."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEG and PNG files of several shapes, one of them gray."""
    root = tmp_path_factory.mktemp("images")
    for index in range(COUNT):
        height, width = 60 + 7 * (index % 5), 96 - 9 * (index % 4)
        image = Image.fromarray(smooth(index, height, width))
        if index == 3:
            image = image.convert("L")
        data = io.BytesIO()
        image.save(data, "PNG" if index % 6 == 5 else "JPEG", quality=95)
        (root / f"{index:02d}.{'png' if index % 6 == 5 else 'jpg'}").write_bytes(data.getvalue())
    return root


def settings(folder: Path, **sections: dict[str, Any]) -> Settings:
    data = {
        "source": str(folder),
        "clean_count": COUNT,
        "allow_budget": True,
        **sections.pop("data", {}),
    }
    optim = {"batch_size": 8, **sections.pop("optim", {})}
    return Settings.model_validate({"data": data, "optim": optim, "seed": 3, **sections})


def images(run: Settings) -> TrainingImages:
    found = clean_images(run.data, SPEC, seed=run.seed)
    return TrainingImages(squares=found.squares, files=found.files)


def batches(
    run: Settings, first: int = 0, last: int = 5, processes: Processes = SINGLE
) -> list[Batch]:
    loader = Loader(images(run), settings=run, image_size=SIZE, processes=processes)
    with loader.batches(first, last) as made:
        return list(made)


def ranks(world: int) -> list[Processes]:
    return [Processes(rank=r, world=world, device=CPU) for r in range(world)]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def equal(one: Batch, other: Batch) -> bool:
    names = ("v1", "v2", "ids", "plain", "student")
    return all(same(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture(params=list(WAYS))
def way(request) -> dict[str, str]:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return WAYS[request.param]


def test_squares_give_the_augmented_views_of_their_items(folder):
    run = settings(folder, loss={"contrastive": 1.0})
    pool = images(run).squares

    for batch in batches(run):
        for view, found in ((1, batch.v1), (2, batch.v2)):
            for place, item in enumerate(batch.ids.tolist()):
                epochs = [
                    e for e in range(3) if item in epoch_order(COUNT, seed=3, epoch=e).tolist()
                ]
                candidates = [
                    augmented_view(
                        pool[[item]],
                        torch.tensor([item]),
                        settings=run.data,
                        image_size=SIZE,
                        seed=3,
                        epoch=epoch,
                        view=view,
                    )[0]
                    for epoch in epochs
                ]
                assert found is not None
                assert any(torch.allclose(found[place], c, atol=1e-5) for c in candidates)


def test_every_backend_serves_the_same_items_seen_the_same_way(folder, way):
    plain = {"jitter_probability": 0.0, "grayscale": 0.0, "crop_scale": (0.5, 1.0)}
    loss = {"contrastive": 1.0}
    reference = batches(settings(folder, data={**plain, **WAYS["squares"]}, loss=loss))

    found = batches(settings(folder, data={**plain, **way}, loss=loss))

    for one, other in zip(reference, found, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.v2 is not None
        assert other.v2 is not None
        for expected, view in ((one.v1, other.v1), (one.v2, other.v2)):
            # From the file, or from its square of 27 pixels: the same place at another sharpness.
            assert view.shape == expected.shape
            assert view.is_contiguous() or view.is_contiguous(memory_format=torch.channels_last)
            assert (view - expected).abs().mean() < 0.02
            mirrored = (view.flip(3) - expected).abs().mean()
            assert mirrored > 2 * (view - expected).abs().mean()


def test_dali_and_pillow_cut_alike(folder):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    still = {"jitter_probability": 0.0, "grayscale": 0.0}
    pillow, dali = (
        batches(settings(folder, data={**still, **WAYS[way]})) for way in ("files", "dali")
    )

    for one, other in zip(pillow, dali, strict=True):
        difference = (one.v1 - other.v1).abs() * 255
        assert difference.mean() < 0.5  # both round to 8 bits, torch twice
        assert (difference > 3).double().mean() < 0.02
        assert difference.max() < 12


def test_resumed_loader_goes_on_with_the_identical_batches(folder, way):
    loss = {"contrastive": 1.0, "teacher_view": "plain", "harden": {"probability": 0.5}}
    run = settings(folder, data=way, loss=loss)

    whole = batches(run)

    for first in (1, 2, 4):
        for one, other in zip(whole[first:], batches(run, first), strict=True):
            assert equal(one, other)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(folder, way, world):
    run = settings(folder, data=way, loss={"harden": {"probability": 0.5}})
    shares = [batches(run, processes=processes) for processes in ranks(world)]

    for step, whole in enumerate(batches(run)):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        for name in ("v1", "student"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


def test_prefetching_changes_nothing(folder, way):
    one, other = (batches(settings(folder, data={**way, "prefetch": depth})) for depth in (0, 3))

    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("depth", [0, 2])
def test_step_between_two_batches_has_its_gradients(folder, depth):
    run = settings(folder, data={"prefetch": depth}, loss={"harden": {"probability": 0.5}})
    weight = torch.ones((), requires_grad=True)
    loader = Loader(images(run), settings=run, image_size=SIZE, processes=SINGLE)

    with loader.batches(0, 3) as made:
        for batch in made:
            assert torch.is_grad_enabled()
            assert not batch.v1.requires_grad
            (weight * batch.v1).mean().backward()
        assert torch.is_grad_enabled()
    with loader.batches(0, 3) as made:
        next(made)  # and is left early

    assert torch.is_grad_enabled()
    assert weight.grad is not None
    assert weight.grad > 0


@pytest.mark.parametrize("mode", [True, False])
def test_batches_are_made_without_gradients_and_the_callers_mode_stays(mode):
    seen: list[bool] = []

    def made() -> Iterator[Batch]:
        for _ in range(2):
            seen.append(torch.is_grad_enabled())
            yield Batch(v1=torch.ones(1, 3, 2, 2), v2=None, ids=torch.arange(1))
        raise ValueError("third")

    with torch.set_grad_enabled(mode):
        batches = _without_gradient(made())
        for _ in range(2):
            next(batches)
            assert torch.is_grad_enabled() == mode
        with pytest.raises(ValueError, match="third"):
            next(batches)
        assert torch.is_grad_enabled() == mode

    assert seen == [False, False]


def test_losses_decide_which_views_are_made(folder):
    (batch,) = batches(settings(folder, loss={"harden": {"probability": 0}}), last=1)
    assert (batch.v2, batch.plain, batch.student) == (None, None, None)

    loss = {"contrastive": 0.5, "teacher_view": "plain", "harden": {"probability": 1.0}}
    run = settings(folder, loss=loss)
    pool = images(run).squares
    (batch,) = batches(run, last=1)
    assert batch.v2 is not None
    assert batch.plain is not None
    assert torch.equal(batch.plain, plain_view(pool[batch.ids], image_size=SIZE))
    expected = hardened(batch.v1, batch.ids, pool, settings=run.loss.harden, seed=3, epoch=0)
    assert batch.student is not None
    assert torch.equal(batch.student, expected)


def test_view_pool_repeats_its_views_and_nothing_else(folder):
    run = settings(folder, data={"view_pool": 2}, loss={"harden": {"probability": 1.0}})
    seen: dict[int, list[Tensor]] = {}
    students: dict[int, list[Tensor]] = {}
    for batch in batches(run, last=10):  # four passes
        assert batch.student is not None
        for item, view, student in zip(batch.ids.tolist(), batch.v1, batch.student, strict=True):
            seen.setdefault(item, []).append(view)
            students.setdefault(item, []).append(student)

    assert {len(views) for views in seen.values()} == {4}
    for item, views in seen.items():
        assert torch.equal(views[0], views[2])
        assert torch.equal(views[1], views[3])
        assert not torch.equal(views[0], views[1])
        assert not torch.equal(students[item][0], students[item][2])  # fresh in every pass


def test_file_that_changed_since_it_was_drawn_is_refused(folder, way, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = settings(tmp_path, data=way)
    found = images(run)
    other = io.BytesIO()
    Image.fromarray(smooth(99, 70, 70)).save(other, "JPEG")
    assert found.files is not None
    changed = found.files.items[0].key
    (tmp_path / changed).write_bytes(other.getvalue())

    loader = Loader(found, settings=run, image_size=SIZE, processes=SINGLE)
    with loader.batches(0, 3) as made:
        if way == WAYS["squares"]:
            assert len(list(made)) == 3  # nothing is read again
        else:
            with pytest.raises(UnsafeInputError, match="has changed since it was drawn"):
                list(made)


def test_automatic_choice_says_why(folder):
    run = settings(folder)
    backend, reason = choose_backend(images(run), settings=run, image_size=SIZE, device=CPU)

    assert backend.name == "torch, decoded once"
    assert reason == "the decoded images are small enough to be kept"


def test_dali_is_refused_where_it_cannot_run(folder):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    run = settings(folder, data={"backend": "dali"})
    found = images(run)

    without = TrainingImages(squares=found.squares)
    with pytest.raises(UsageError, match=r"decoded once; leave data\.backend"):
        choose_backend(without, settings=run, image_size=SIZE, device=CPU)


def test_clean_set_of_another_run_is_taken_as_it_is(folder, tmp_path):
    from mimic_fast.data.clean_set import write_clean_set

    run = settings(folder, data={"clean_count": 12})
    first = clean_images(run.data, SPEC, seed=3)
    path = write_clean_set(first.clean_set, tmp_path)

    again = settings(folder, data={"clean_set": path, "clean_count": 5})
    second = clean_images(again.data, SPEC, seed=77)

    assert second.clean_set.items == first.clean_set.items
    assert torch.equal(second.squares, first.squares)
    assert (
        second.clean_set.sha256
        == hashlib.sha256(
            __import__("json")
            .dumps([[i.key, i.sha256] for i in first.clean_set.items], separators=(",", ":"))
            .encode()
        ).hexdigest()
    )
