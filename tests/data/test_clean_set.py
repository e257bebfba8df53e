import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_fast.config import DataSettings
from mimic_fast.data.clean_set import (
    check_budget,
    draw_clean_set,
    load_clean_images,
    requested_count,
)
from mimic_fast.data.folder import open_folder
from mimic_fast.data.items import Source, decode_image
from mimic_fast.data.sources import open_split
from mimic_fast.errors import UnsafeInputError, UsageError


def data_settings(**values) -> DataSettings:
    return DataSettings(**{"allow_budget": True, **values})


def keys_of(clean_set) -> list[str]:
    return [item.key for item in clean_set.items]


@pytest.fixture(scope="module")
def source(make_source):
    return make_source(60, labels=[0] * 30 + [1] * 20 + [2] * 10)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(2, 60), stratified=st.booleans())
def test_draw_is_a_permutation_without_repeats(source, seed, count, stratified):
    wanted = data_settings(clean_count=count, stratified=stratified)
    clean_set = draw_clean_set(source, wanted, seed=seed)
    assert len(clean_set) == len(set(keys_of(clean_set))) == count == clean_set.requested
    for item in clean_set.items:
        assert source.keys[item.index] == item.key
        assert source.labels[item.index] == item.label
        assert hashlib.sha256(source.read(item.index)).hexdigest() == item.sha256
    assert draw_clean_set(source, wanted, seed=seed) == clean_set


@given(seed=st.integers(0, 1000), count=st.integers(2, 60))
def test_draw_stratified_gives_every_label_its_share(source, seed, count):
    clean_set = draw_clean_set(source, data_settings(clean_count=count, stratified=True), seed=seed)
    for label, size in enumerate((30, 20, 10)):
        drawn = sum(item.label == label for item in clean_set.items)
        assert abs(drawn - count * size / 60) < 1


@given(seed=st.integers(0, 1000), small=st.integers(2, 30), more=st.integers(0, 30))
def test_draw_of_fewer_is_the_beginning_of_a_larger_one(source, seed, small, more):
    few = draw_clean_set(source, data_settings(clean_count=small), seed=seed)
    many = draw_clean_set(source, data_settings(clean_count=small + more), seed=seed)
    assert many.items[:small] == few.items


@given(st.permutations(range(20)))
def test_draw_does_not_depend_on_the_order_of_the_source(make_source, order):
    base = make_source(20)
    shuffled = replace(
        base,
        keys=tuple(base.keys[index] for index in order),
        read=lambda position: base.read(order[position]),
    )
    wanted = data_settings(clean_count=9)
    one, two = (draw_clean_set(source, wanted, seed=5) for source in (base, shuffled))
    assert keys_of(one) == keys_of(two)
    assert one.sha256 == two.sha256


def test_draw_differs_between_seeds_and_covers_every_item(source):
    draws = [draw_clean_set(source, data_settings(clean_count=10), seed=s) for s in range(60)]
    assert len({clean_set.sha256 for clean_set in draws}) == 60
    counts = torch.zeros(60)
    for clean_set in draws:
        for item in clean_set.items:
            counts[item.index] += 1
    # 10 expected each; binomial(60, 1/6) exceeds these bounds with probability 1e-4 per item.
    assert counts.min() >= 1
    assert counts.max() <= 23


def test_draw_is_the_documented_one(source):
    clean_set = draw_clean_set(source, data_settings(clean_count=5), seed=7)
    ranked = sorted(source.keys, key=lambda key: hashlib.sha256(f"7:{key}".encode()).digest())
    assert keys_of(clean_set) == ranked[:5]


@pytest.mark.parametrize("stratified", [False, True])
def test_draw_hold_out_is_the_random_end(source, stratified):
    clean_set = draw_clean_set(
        source, data_settings(clean_count=40, hold_out=0.25, stratified=stratified), seed=0
    )
    assert clean_set.hold_out == 10
    assert {item.label for item in clean_set.items[-10:]} == {0, 1, 2}


def test_draw_corrupt_items_are_quarantined_and_replaced(make_source, encode_image):
    jpeg = encode_image(1, suffix="JPEG")
    bad = {
        3: jpeg[: len(jpeg) // 2],
        8: b"garbage",
        11: b"",
        15: jpeg[:-2],
    }
    events = []
    clean_set = draw_clean_set(
        make_source(20, contents=bad), data_settings(clean_count=16), seed=0, report=events.append
    )
    assert len(clean_set) == 16
    good = draw_clean_set(make_source(20), data_settings(clean_count=20), seed=0)
    names = {f"{index:04d}.png" for index in bad}
    assert keys_of(clean_set) == [key for key in keys_of(good) if key not in names]
    reasons = dict(clean_set.quarantined)
    assert set(reasons) == names
    assert reasons["0011.png"] == "is empty"
    assert "truncated" in reasons["0003.png"].lower()
    assert "truncated" in reasons["0015.png"]
    messages = [event.message for event in events if event.message]
    assert "quarantined 0011.png: is empty" in messages
    assert (events[-1].done, events[-1].total) == (16, 16)


def test_draw_stratified_replaces_within_the_label(make_source):
    labels = [0] * 10 + [1] * 10
    bad = dict.fromkeys(range(10, 15), b"x")
    wanted = data_settings(clean_count=10, stratified=True)
    clean_set = draw_clean_set(make_source(20, labels=labels, contents=bad), wanted, seed=0)
    assert [sum(item.label == label for item in clean_set.items) for label in (0, 1)] == [5, 5]


def test_draw_goes_on_with_fewer_if_good_images_run_out(make_source):
    events = []
    clean_set = draw_clean_set(
        make_source(10, contents={0: b"x"}),
        data_settings(clean_count=10),
        seed=0,
        report=events.append,
    )
    assert (len(clean_set), clean_set.requested, clean_set.fraction) == (9, 10, 0.9)
    assert events[-1].message == "only 9 of 10 requested images are good; going on with them"


def test_draw_with_fewer_than_two_good_images_raises(make_source):
    bad = dict.fromkeys(range(1, 10), b"garbage")
    with pytest.raises(UnsafeInputError, match=r"1 of 10 images can be decoded.*is not a JPEG"):
        draw_clean_set(make_source(10, contents=bad), data_settings(clean_count=5), seed=0)


def test_draw_over_budget_raises_unless_allowed(source):
    three = DataSettings(clean_count=3)
    assert len(draw_clean_set(source, three, seed=0)) == 3  # exactly 5 % of 60
    four = DataSettings(clean_count=4)
    with pytest.raises(UsageError, match=r"4 clean images are 6\.667% of 60 .* --allow-budget"):
        draw_clean_set(source, four, seed=0)
    allowed = draw_clean_set(source, four.model_copy(update={"allow_budget": True}), seed=0)
    assert len(allowed) == 4


def test_draw_budget_counts_the_declared_pretraining_size(source):
    wanted = DataSettings(clean_count=50, pretraining_size=1000)
    clean_set = draw_clean_set(source, wanted, seed=0)
    assert clean_set.fraction == 0.05
    with pytest.raises(UsageError, match="of 999 pre-training images"):
        draw_clean_set(source, DataSettings(clean_count=50, pretraining_size=999), seed=0)


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 3), (0.0666, 3), (0.35, 21), (1.0, 60)])
def test_draw_fraction_rounds_down(source, fraction, count):
    clean_set = draw_clean_set(source, data_settings(clean_fraction=fraction), seed=0)
    assert len(clean_set) == count


def counted(size: int) -> Source:
    return Source(
        name="counted",
        keys=("",) * size,
        labels=None,
        classes=None,
        read=lambda index: b"",
        decode=decode_image,
    )


@given(st.integers(40, 10_000))
def test_draw_fraction_at_the_budget_is_never_over_it(size):
    wanted = DataSettings(clean_fraction=0.05, budget=0.05)
    requested = requested_count(counted(size), wanted)
    check_budget(size, wanted, requested, name="counted")


@pytest.mark.parametrize("per_cent", range(2, 101))
def test_draw_fraction_of_a_hundred_is_its_per_cent(per_cent):
    assert requested_count(counted(100), DataSettings(clean_fraction=per_cent / 100)) == per_cent


def test_draw_impossible_requests_raise(source, make_source):
    with pytest.raises(UsageError, match="asks for 61 images; memory has 60"):
        draw_clean_set(source, data_settings(clean_count=61), seed=0)
    with pytest.raises(UsageError, match=r"0\.03 of the 60 images of memory draws 1, expected"):
        draw_clean_set(source, data_settings(clean_fraction=0.03), seed=0)
    with pytest.raises(UsageError, match=r"data\.stratified needs labels, and memory has none"):
        draw_clean_set(make_source(5), data_settings(clean_count=3, stratified=True), seed=0)


def test_load_clean_images_are_those_drawn_in_order(source):
    clean_set = draw_clean_set(source, data_settings(clean_count=12), seed=3)
    images = load_clean_images(source, clean_set, image_size=8, channels=3)
    expected = [source.decode(source.read(item.index)) for item in clean_set.items]
    assert torch.equal(images, torch.stack(expected))


def test_load_clean_images_finds_items_that_moved(tmp_path, encode_image):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encode_image(index))
    source = open_folder(tmp_path, name="data")
    clean_set = draw_clean_set(source, data_settings(clean_count=4), seed=0)
    before = load_clean_images(source, clean_set, image_size=8, channels=3)
    (tmp_path / "00.png").write_bytes(encode_image(99))
    later = open_folder(tmp_path, name="data")
    assert torch.equal(load_clean_images(later, clean_set, image_size=8, channels=3), before)


def test_load_clean_images_refuses_changed_and_missing_items(tmp_path, encode_image):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encode_image(index))
    source = open_folder(tmp_path, name="data")
    clean_set = draw_clean_set(source, data_settings(clean_count=3), seed=0)
    (tmp_path / "1.png").write_bytes(encode_image(7))
    with pytest.raises(UnsafeInputError, match=r"1\.png of data has changed since it was drawn"):
        load_clean_images(source, clean_set, image_size=8, channels=3)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UnsafeInputError, match=r"1\.png of data can no longer be read"):
        load_clean_images(source, clean_set, image_size=8, channels=3)
    with pytest.raises(UnsafeInputError, match=r"1\.png of the clean set is no longer in data"):
        load_clean_images(open_folder(tmp_path, name="data"), clean_set, image_size=8, channels=3)


def test_draw_of_reference_data_is_the_recorded_one(shared_data):
    # A changed draw would silently change every published result.
    source = open_split(str(shared_data / "cifar10"), "train")
    clean_set = draw_clean_set(source, DataSettings(stratified=True), seed=0)
    assert clean_set.sha256.startswith("d3e585693231266f")
    assert [sum(item.label == k for item in clean_set.items) for k in range(10)] == [200] * 10
