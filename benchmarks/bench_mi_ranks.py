"""Whether the layers of real encoders keep their order, whoever estimates and whatever is drawn.

    python benchmarks/bench_mi_ranks.py --data 'DIR/train-*.tar'
    python benchmarks/bench_mi_ranks.py --data DIR --encoders benchmarks/encoders/drupe --seeds 2

For every encoder, estimator and seed, which draws the images and all else that is random: each
layer's share of the information. Then Spearman's rank correlation of the shares over the layers:
between two seeds of an estimator (mean over the pairs of seeds), and between an estimator and the
default on the same seed (mean over seeds). An encoder of four stages has four ranks: one exchange
of neighbors makes 0.8 of 1. In the rows of shares ``min`` is the largest. Shares, not times: other
work may run beside it.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measure import Case, Machine, Row, append_rows, single_row, spread_row, this_machine
from micro import results_file
from scipy.stats import spearmanr
from show_rows import tables

from mimic_fast.config import DataSettings, MutualInformationSettings
from mimic_fast.data.clean_set import clean_images
from mimic_fast.distributed import SINGLE
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.encoders.taps import TappedEncoder, default_taps
from mimic_fast.mutual_information.activations import StepA, pooled_activations
from mimic_fast.mutual_information.estimate import estimate_histogram
from mimic_fast.mutual_information.finished_parts import FinishedParts
from mimic_fast.mutual_information.ksg_layers import estimate_ksg
from mimic_fast.mutual_information.weights import weighted_layers
from mimic_fast.progress import silent

ENCODERS = ("badencoder", "blended", "drupe", "inactive", "adaptive")
ESTIMATORS = ("canonical", "cross", "sliced", "ksg")
# Interval and noise floor are not looked at here: no more of them than there must be.
_CHEAP = {"shuffles": 2, "jackknife_groups": 2}

Shares = Mapping[str, Sequence[Mapping[str, float]]]  # estimator, seed, tap


def main() -> None:
    """Measures every encoder, adds the rows to the file and prints them."""
    args = parsed()
    torch.set_num_threads(1)
    out = args.out or results_file("mi_tasks", "cpu")
    for folder in args.encoders:
        seeds = [seed_shares(folder, args.data, args.images, seed) for seed in range(args.seeds)]
        shares = {name: [found[name] for found in seeds] for name in ESTIMATORS}
        rows = rank_rows(folder.name, shares, args.images, this_machine(threads=1))
        append_rows(out, rows)
        print(tables(rows), flush=True)
    print(f"rows added to {out}")


def seed_shares(folder: Path, data: str, images: int, seed: int) -> dict[str, dict[str, float]]:
    """Each layer's share of the information on one draw of images, by estimator."""
    encoder = load_encoder(folder / "encoder.safetensors").encoder
    tapped = TappedEncoder(encoder.requires_grad_(False), default_taps(encoder))
    drawn = DataSettings.model_validate(
        {"source": data, "clean_count": images, "allow_budget": True}
    )
    squares = clean_images(drawn, encoder.spec, seed=seed).squares
    step = StepA(
        processes=SINGLE,
        parts=FinishedParts(folder=None, origin={}),
        report=silent,
        stop=lambda: False,
    )
    features, layers = pooled_activations(tapped, squares, chunk=64, pool="mean", step=step)
    found = {}
    for name in ESTIMATORS:
        pairs = "canonical" if name == "ksg" else name
        mi = MutualInformationSettings.model_validate({"pairs": pairs, **_CHEAP})
        estimate = estimate_ksg if name == "ksg" else estimate_histogram
        estimates = estimate(layers, features, mi, names=tapped.taps, seed=seed)
        weighted = weighted_layers(estimates, base=mi.base, gain=mi.gain)
        found[name] = {layer.tap: layer.share for layer in weighted}
    return found


def rank_rows(encoder: str, shares: Shares, images: int, machine: Machine) -> list[Row]:
    """Shares of every layer over seeds, and the rank correlations."""
    rows: list[Row] = []
    for name, by_seed in shares.items():
        case = Case(op="share of information", impl=name, mode=encoder, shape=f"{images} images")
        for tap in by_seed[0]:
            values = [found[tap] for found in by_seed]
            rows.append(spread_row(case, tap, "share", values, max(values), machine))
    for name, by_seed in shares.items():
        case = Case(op="rank correlation", impl=name, mode=encoder, shape=f"{images} images")
        between = [correlation(a, b) for a, b in combinations(by_seed, 2)]
        if between:
            rows.append(single_row(case, "between seeds", "", fmean(between), machine=machine))
        same = [correlation(a, b) for a, b in zip(by_seed, shares["canonical"], strict=True)]
        rows.append(single_row(case, "with canonical", "", fmean(same), machine=machine))
    return rows


def correlation(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Spearman's, over the layers."""
    found: Any = spearmanr(list(first.values()), [second[tap] for tap in first])
    return float(found.statistic)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    here = Path(__file__).parent / "encoders"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="any data source")
    parser.add_argument("--images", type=int, default=2000, help="drawn for each seed (2,000)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (3)")
    parser.add_argument(
        "--encoders",
        nargs="+",
        type=Path,
        default=[here / name for name in ENCODERS],
        metavar="DIR",
        help="folders with an encoder.safetensors",
    )
    parser.add_argument("--out", type=Path, help="CSV file to add rows to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
