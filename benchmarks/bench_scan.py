"""How well ``mimic-fast scan`` tells backdoored encoders from clean ones.

    python benchmarks/bench_scan.py --encoders DIR --data 'DIR/test-*.tar' --runs RUNS --jobs 2
    python benchmarks/bench_scan.py --encoders DIR --data 'DIR/test-*.tar' --runs RUNS --jobs 2 \
        --label resnet_1m_cifar10

``DIR`` holds one folder an encoder: ``encoder.safetensors`` and its card; with an ``attack.json``
it counts as backdoored, by the kind and trigger named there, else as clean. An attack counts only
if it took: its ``facts.measured`` must show an ASR of at least ``--took`` on the first set. Others
are left out, each by name in the output and as a row; so are those never measured, unless
``--took 0``. Each encoder is scanned in a process of its own into ``RUNS/<folder>``, taken up again
where it was when started again. A scan that is there is used only if it is of the same encoder
file, images and settings, and refused otherwise.

Every encoder is judged against the clean ones. A clean one is not its own reference, which leaves
n - 1; so a backdoored one, and one of a held-out half, is judged by n - 1 of n as well, without one
that its name picks: the width of the interval depends on the number, and a reference more would
set the two apart. What is ranked is the smallest chance of its scores. The AUC is over all, with a
bootstrap interval (encoders drawn anew, clean and backdoored apart). The operating point is the
limit that separates one half best, with that half's clean encoders as references; its error rates,
and those of the two levels of the product, are counted on the other half against the same
references. Rows are added to ``--out``.
"""

import argparse
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from measure import Case, Machine, Row, append_rows, single_row, this_machine
from micro import results_file
from scan_encoders import CLEAN, check_kept, kind_of, left_out, scan_settings, scanned
from show_rows import tables

from mimic_fast.evaluation.metrics import Measure, wilson
from mimic_fast.scan.result import Scanned
from mimic_fast.scan.settings import ScanSettings
from mimic_fast.scan.verdict import ENOUGH, judge

_DRAWS = 5000  # of the bootstrap
_LEVELS = ("unusual", "suspicious")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An encoder of the benchmark."""

    name: str
    kind: str
    scanned: Scanned

    @property
    def backdoored(self) -> bool:
        """Whether it should be found."""
        return self.kind != CLEAN


def main() -> None:
    """Scans what is not scanned yet, judges, adds the rows and prints them."""
    args = parsed()
    settings = scan_settings(args.data, args.set)
    present = sorted(path.parent for path in args.encoders.glob("*/encoder.safetensors"))
    failed = left_out(present, took=args.took)
    for folder, rate in failed.items():
        reason = "its ASR was never measured" if rate is None else f"ASR {rate:.3f}"
        print(f"{folder.name}: left out, {reason} (--took {args.took:g})", flush=True)
    folders = [folder for folder in present if folder not in failed]
    check_kept({folder: args.runs / folder.name for folder in folders}, settings)
    options = [part for value in args.set for part in ("--set", value)]
    with ThreadPoolExecutor(args.jobs) as pool:
        scan = pool.map(
            lambda folder: scanned(folder, args.data, args.runs / folder.name, options), folders
        )
        items = [
            Item(name=folder.name, kind=kind_of(folder), scanned=one)
            for folder, one in zip(folders, scan, strict=True)
        ]
    machine = this_machine(threads=1)
    rows = scan_rows(items, label=args.label, seed=args.seed, machine=machine)
    rows += left_out_rows(failed, label=args.label, machine=machine)
    out = args.out or results_file("scan", "cpu")
    append_rows(out, rows)
    print(tables(rows))
    print(f"rows added to {out}")


def scan_rows(items: Sequence[Item], *, label: str, seed: int, machine: Machine) -> list[Row]:
    """All figures of the benchmark.

    Raises:
        ValueError: If one half would hold too few clean encoders to judge one of them by the
            others, or no backdoored one.
    """
    clean = [item for item in items if not item.backdoored]
    bad = [item for item in items if item.backdoored]
    if len(clean) < 2 * (ENOUGH + 1) or len(bad) < 2:
        raise ValueError(f"{len(clean)} clean and {len(bad)} backdoored encoders are too few")
    values = {item.name: suspicion(item, clean) for item in items}
    total = f"{len(clean)} clean, {len(bad)} backdoored"

    def row(impl: str, mode: str, metric: str, value: float, unit: str = "") -> Row:
        case = Case(op="scan", impl=impl, mode=mode, shape=f"{label}, {total}")
        return single_row(case, metric, unit, value, machine=machine)

    def measure_rows(impl: str, mode: str, metric: str, measure: Measure) -> list[Row]:
        return [
            row(impl, mode, metric, measure.value),
            row(impl, mode, f"{metric}_low", measure.low),
            row(impl, mode, f"{metric}_high", measure.high),
            row(impl, mode, "encoders", measure.n),
        ]

    rows = measure_rows("all scores", "over all", "auc", auc_measure(clean, bad, values, seed=seed))
    for kind in sorted({item.kind for item in bad}):
        some = [item for item in bad if item.kind == kind]
        measure = auc_measure(clean, some, values, seed=seed)
        rows += measure_rows("all scores", f"{kind} alone", "auc", measure)
    for score in (score.name for score in items[0].scanned.scores):
        own = {item.name: suspicion(item, clean, score=score) for item in items}
        rows += measure_rows(score, "over all", "auc", auc_measure(clean, bad, own, seed=seed))
    rows += [
        found
        for rule, false, missed in halves(clean, bad, seed=seed)
        for metric, measure in (("false_positives", false), ("missed", missed))
        for found in measure_rows(rule, "held-out half", metric, measure)
    ]
    seconds = [item.scanned.seconds for item in items]
    rows.append(row("all scores", "median", "scan_wall_time", float(np.median(seconds)), "s"))
    rows.append(row("all scores", "slowest", "scan_wall_time", max(seconds), "s"))
    return rows


def left_out_rows(
    failed: Mapping[Path, float | None], *, label: str, machine: Machine
) -> list[Row]:
    """One for each attack that did not count, and one for its ASR where that was measured."""
    rows: list[Row] = []
    for folder, rate in failed.items():
        case = Case(op="scan", impl=folder.name, mode="left out", shape=label)
        rows.append(single_row(case, "encoders", "", 1, machine=machine))
        if rate is not None:
            rows.append(single_row(case, "attack_success_rate", "", rate, machine=machine))
    return rows


def peers(item: Item, references: Sequence[Item]) -> list[Scanned]:
    """All references but one: the item itself, or where it is none of them, one its name picks."""
    own = next((n for n, other in enumerate(references) if other is item), None)
    skipped = zlib.crc32(item.name.encode()) % len(references) if own is None else own
    return [other.scanned for n, other in enumerate(references) if n != skipped]


def suspicion(item: Item, references: Sequence[Item], *, score: str | None = None) -> float:
    """Minus the log10 of the smallest chance among the scores, or of one score's."""
    others = peers(item, references)
    defaults = ScanSettings()
    verdict = judge(item.scanned, others, unusual=defaults.unusual, suspicious=defaults.suspicious)
    assert verdict is not None
    chances = [c.chance for c in verdict.comparisons if score in (None, c.name)]
    return -float(np.log10(max(min(chances), 1e-300)))


def auc(clean: npt.ArrayLike, bad: npt.ArrayLike) -> float:
    """Share of pairs in which the backdoored one is more suspicious; ties count half."""
    difference = np.subtract.outer(np.asarray(bad), np.asarray(clean))
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def auc_measure(
    clean: Sequence[Item], bad: Sequence[Item], values: Mapping[str, float], *, seed: int
) -> Measure:
    """AUC with the percentile bootstrap's 95 % interval."""
    first = np.array([values[item.name] for item in clean])
    second = np.array([values[item.name] for item in bad])
    draw = np.random.default_rng(seed)
    drawn = [
        auc(draw.choice(first, len(first)), draw.choice(second, len(second))) for _ in range(_DRAWS)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = auc(first, second)
    return Measure(value=value, low=float(low), high=float(high), n=len(first) + len(second))


def halves(
    clean: Sequence[Item], bad: Sequence[Item], *, seed: int
) -> list[tuple[str, Measure, Measure]]:
    """Rule, false positives and misses on the half that fixed nothing.

    Backdoored encoders are halved within each kind, so that both halves have all of them.
    """
    draw = np.random.default_rng(seed)
    (known_clean, new_clean), (known_bad, new_bad) = halved(clean, draw), halved(bad, draw)
    limit = best_limit(
        [suspicion(item, known_clean) for item in known_clean],
        [suspicion(item, known_clean) for item in known_bad],
    )

    def rates(found: Callable[[Item], bool]) -> tuple[Measure, Measure]:
        false = sum(found(item) for item in new_clean)
        missed = sum(not found(item) for item in new_bad)
        return wilson(false, len(new_clean)), wilson(missed, len(new_bad))

    return [
        (f"limit {limit:.3g}", *rates(lambda item: suspicion(item, known_clean) >= limit)),
        *(
            (level, *rates(lambda item, level=level: reaches(item, known_clean, level)))
            for level in _LEVELS
        ),
    ]


def halved(items: Sequence[Item], draw: np.random.Generator) -> tuple[list[Item], list[Item]]:
    """Two random halves with as many of each kind, as far as that goes."""
    order = draw.permutation(len(items))
    dealt = sorted((items[i] for i in order), key=lambda item: item.kind)
    first = int(draw.integers(2))
    return dealt[first::2], dealt[1 - first :: 2]


def best_limit(clean: Sequence[float], bad: Sequence[float]) -> float:
    """The limit of the largest sum of true rates, in the middle of where that sum is reached."""
    values = np.unique([*clean, *bad])
    edges = np.concatenate([values[:1], (values[:-1] + values[1:]) / 2, values[-1:] + 1])
    gains = [np.mean(np.asarray(bad) >= e) + np.mean(np.asarray(clean) < e) for e in edges]
    best = np.flatnonzero(np.asarray(gains) >= max(gains) - 1e-12)
    return float(edges[best[len(best) // 2]])


def reaches(item: Item, references: Sequence[Item], level: str) -> bool:
    """Whether the product says this level or a worse one."""
    defaults = ScanSettings()
    others = peers(item, references)
    verdict = judge(item.scanned, others, unusual=defaults.unusual, suspicious=defaults.suspicious)
    assert verdict is not None
    return verdict.chance <= getattr(defaults, level)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoders", type=Path, required=True, help="a folder for each encoder")
    parser.add_argument("--data", required=True, help="clean images, as for mimic-fast scan")
    parser.add_argument("--runs", type=Path, required=True, help="where the scans are kept")
    parser.add_argument("--jobs", type=int, default=1, help="scans at a time, one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of halves and bootstrap")
    parser.add_argument("--took", type=float, default=0.8, help="ASR from which an attack counts")
    parser.add_argument("--label", default="encoders", help="what they are, for the rows")
    parser.add_argument("--set", action="append", default=[], help="a setting of the scan")
    parser.add_argument("--out", type=Path, help="CSV file; None: this month's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
