"""What bench_mi.py does with one workload: candidates, their check, times, memory, rows."""

import argparse
from collections.abc import Callable
from functools import partial

import mi_peers as peers
import numpy as np
import torch
from measure import Case, Row, Timing, single_row
from memory import peak_growth
from micro import Place, in_turns, rate_row, ratio_row, time_rows
from numpy.typing import NDArray
from torch import Tensor

from mimic_fast import ops

FUSED: dict[str, ops.Path] = {"cpu": "cpp", "cuda": "triton"}
FROM_CODES, FROM_VALUES = "from codes", "from values"
# Nats by which a candidate may differ from numpy; ours is float32 on a GPU.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}

Candidates = dict[str, Callable[[], NDArray[np.float64] | Tensor]]
NumpyPeer = Callable[..., NDArray[np.float64]]


def mi_rows(work: peers.Workload, args: argparse.Namespace, place: Place) -> list[Row]:
    """Checks all candidates on one workload, then times them in turns, then measures memory.

    Raises:
        AssertionError: If one finds another information; nothing is timed then.
    """
    torch.set_num_threads(1)
    codes = [peers.numpy_codes(values) for values in (work.x, work.y)]
    wide = [part.astype(np.float64) for part in codes]
    expected = peers.numpy_histogram(wide[0], wide[1], work.name)
    groups = {
        FROM_CODES: from_codes(work, codes, args),
        FROM_VALUES: from_values(work, args),
    }
    rows: list[Row] = []
    for mode, candidates in groups.items():
        check(candidates, expected, device=args.device)
        print(f"{work.name}, {mode}: all agree with numpy; timing", flush=True)
        rows += rows_of(in_turns(candidates, args, place), work, mode, place)
    return rows + memory_rows(work, codes, place)


def from_codes(
    work: peers.Workload, codes: list[NDArray[np.uint8]], args: argparse.Namespace
) -> Candidates:
    """Everyone gets the codes as it likes them best; the conversion is not timed."""
    x, y = (torch.from_numpy(part).to(args.device) for part in codes)
    fused = FUSED[args.device]
    found: Candidates = {
        f"mimic_fast {fused}": partial(ours, fused, work.name, x, y),
        "mimic_fast reference": partial(ours, "reference", work.name, x, y),
    }
    if work.name == "cross" and not args.no_compile:
        product = compiled_product(x.shape[1], args.device)
        found["one-hot product, compiled"] = lambda: product(x, y)
    if args.device == "cpu":
        for name, (peer, dtype) in numpy_peers(work.name).items():
            found[name] = partial(peer, *(part.astype(dtype) for part in codes), work.name)
    return found


def from_values(work: peers.Workload, args: argparse.Namespace) -> Candidates:
    """Equal-mass bins made within the clock: numpy's for numpy peers, torch's for torch's."""
    x, y = (torch.from_numpy(values).to(args.device) for values in (work.x, work.y))
    fused = FUSED[args.device]
    found: Candidates = {
        f"mimic_fast {fused}": partial(ours_binned, fused, work.name, x, y),
        "mimic_fast reference": partial(ours_binned, "reference", work.name, x, y),
    }
    if work.name == "cross" and not args.no_compile:
        product = compiled_product(x.shape[1], args.device)
        found["one-hot product, compiled"] = lambda: product(*binned("reference", x, y))
    if args.device == "cpu":
        for name, (peer, dtype) in numpy_peers(work.name).items():
            found[name] = partial(from_numpy_values, peer, dtype, work)
    return found


def from_numpy_values(peer: NumpyPeer, dtype: type, work: peers.Workload) -> NDArray[np.float64]:
    """Bins in numpy, then the peer."""
    codes = (peers.numpy_codes(values).astype(dtype) for values in (work.x, work.y))
    return peer(*codes, work.name)


def numpy_peers(workload: str) -> dict[str, tuple[NumpyPeer, type]]:
    """Those on numpy arrays, with the type of codes that each is fastest with."""
    found: dict[str, tuple[NumpyPeer, type]] = {
        "numpy.histogram2d, pair by pair": (peers.numpy_loop, np.float64),
        "numpy.histogram2d": (peers.numpy_histogram, np.float64),
        "numpy.bincount": (peers.numpy_bincount, np.int64),
        "fast-histogram": (peers.fast_histogram, np.float64),
    }
    if workload == "matched":
        found["sklearn.mutual_info_score"] = (peers.scikit_learn, np.int64)
    return found


def ours(path: ops.Path, workload: str, x: Tensor, y: Tensor) -> Tensor:
    """``ops`` on one path, from codes."""
    of = ops.cross_information if workload == "cross" else ops.matched_information
    with ops.force(path):
        return of(x, y, bins=peers.BINS)[0]


def ours_binned(path: ops.Path, workload: str, x: Tensor, y: Tensor) -> Tensor:
    """``ops`` on one path, from values."""
    return ours(path, workload, *binned(path, x, y))


def binned(path: ops.Path, x: Tensor, y: Tensor) -> list[Tensor]:
    """Equal-mass codes on one path."""
    with ops.force(path):
        return [ops.equal_mass_codes(values, bins=peers.BINS) for values in (x, y)]


def compiled_product(images: int, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The one-hot product under torch.compile."""
    torch._dynamo.reset()
    counts = torch.arange(images + 1, dtype=torch.float64, device=device)
    looked_up = torch.special.xlogy(counts, counts)
    product = torch.compile(peers.one_hot_product, fullgraph=True, dynamic=False)
    return lambda x, y: product(x, y, looked_up)


def check(candidates: Candidates, expected: NDArray[np.float64], *, device: str) -> None:
    """Compares every candidate's information with numpy's.

    Raises:
        AssertionError: If one differs by more than ``TOLERANCE``.
    """
    for name, candidate in candidates.items():
        found = candidate()
        nats = found.cpu().double().numpy() if isinstance(found, Tensor) else found
        off = float(np.abs(nats.ravel() - expected).max())
        assert off <= TOLERANCE[device], (
            f"{name}: off by {off:.2g} nats from numpy, at most {TOLERANCE[device]:.0e} allowed: "
            "nothing is timed"
        )


def rows_of(timings: dict[str, Timing], work: peers.Workload, mode: str, place: Place) -> list[Row]:
    """Seconds of each; of ours what it is ahead of the others, and how fast it counts."""
    own = timings[f"mimic_fast {FUSED[place.device]}"]
    rows: list[Row] = []
    for impl, timing in timings.items():
        case = case_of(work, impl, mode)
        rows += time_rows(case, timing, place)
        if timing is own:
            increments = work.pairs * work.x.shape[1]
            rows.append(rate_row(case, "G increments/s", increments / 1e9, own, place))
            rows += [
                ratio_row(case, f"speedup over {other}", own, seconds, place)
                for other, seconds in timings.items()
                if other != impl
            ]
    return rows


def memory_rows(work: peers.Workload, codes: list[NDArray[np.uint8]], place: Place) -> list[Row]:
    """Of ours and of the reference: bytes at the height, codes and result included."""
    x, y = map(torch.from_numpy, codes)
    held = x.nbytes + y.nbytes
    rows: list[Row] = []
    for path in ("cpp", "reference") if place.device == "cpu" else ():
        ours(path, work.name, x[:1], y[:1])
        grown = peak_growth(partial(ours, path, work.name, x, y))
        if grown is not None:
            case = case_of(work, f"mimic_fast {path}", FROM_CODES)
            rows.append(
                single_row(case, "peak_memory", "bytes", held + grown, machine=place.machine)
            )
    if rows:
        allowed = 1.1 * held + 4 * work.pairs + (1 << 20)
        case = case_of(work, "1.1 x codes + 4 bytes a pair + 1 MiB", FROM_CODES)
        rows.append(single_row(case, "peak_memory", "bytes", allowed, machine=place.machine))
    return rows


def case_of(work: peers.Workload, impl: str, mode: str) -> Case:
    """What a row is about."""
    dtype = "uint8" if mode == FROM_CODES else "float32"
    return Case(op=f"{work.name} information", impl=impl, mode=mode, shape=work.shape, dtype=dtype)
