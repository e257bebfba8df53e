"""Ranges of tensors: what any partition wrote, any other reads."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_fast.engines.flat_piece import FlatPiece
from mimic_fast.sharded_state import read_pieces, write_pieces


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of one: without any, torch warns of it."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@settings(max_examples=15)
@given(st.integers(1, 40), st.data())
def test_any_range_of_what_was_written_is_read(total, data):
    values = torch.randn(total, generator=torch.Generator().manual_seed(total))
    first = data.draw(st.integers(0, total - 1))
    last = data.draw(st.integers(first + 1, total))
    found = FlatPiece(torch.full((last - first,), torch.nan), offset=first, total=total)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        written = FlatPiece(values, offset=0, total=total)
        write_pieces(path, {"weights/a.b": written}, group=dist.group.WORLD)
        read_pieces(path, {"weights/a.b": found})

    assert torch.equal(found.values, values[first:last])


def test_copy_does_not_follow_its_original():
    live = FlatPiece(torch.zeros(3), offset=1, total=5)
    copy = live.on_cpu()
    live.values.fill_(1)

    assert not copy.values.any()
    assert (copy.offset, copy.total) == (1, 5)


@pytest.mark.parametrize(("offset", "total"), [(3, 5), (-1, 5), (0, 2)])
def test_values_outside_of_the_whole_are_refused(offset, total):
    with pytest.raises(ValueError, match="no range"):
        FlatPiece(torch.zeros(3), offset=offset, total=total)
