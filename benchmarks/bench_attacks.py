"""How well the attacks take, what they cost, and what becomes of them.

    python benchmarks/bench_attacks.py --encoders benchmarks/encoders --downstream cifar10=DIR \
        --downstream gtsrb=DIR --label resnet_1m_simclr
    python benchmarks/bench_attacks.py --encoders benchmarks/encoders --downstream cifar10=DIR \
        --student badencoder=FILE --student adaptive=FILE --against badencoder --label clone_only

``--encoders`` holds ``clean/`` and one folder for each attack: ``encoder.safetensors``, its card
and ``attack.json``. Every attacked encoder is measured beside the clean one, on the same images:
accuracy, ASR, and the share that the clean encoder calls the target with and without the trigger.
An attack ``took`` if the ASR on the first set is at least 80 %; what did not is no test of a
defense.

``--student NAME=FILE`` adds an encoder made from the one in the folder NAME, as role ``purified``.
With ``--against NAME`` every other student's ASR is compared with that one's on the same images, on
the sets where both attacks have one target: paired difference with its 95 % interval.
``--probe fine_tune`` asks whether a backdoor survives, or comes back, when the downstream user
trains the encoder on.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from measure import Case, Machine, Row, append_rows, single_row, this_machine
from micro import results_file
from show_rows import tables
from torch import Tensor

from mimic_fast.config import DownstreamSettings, EvaluationSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.errors import UsageError
from mimic_fast.evaluation.attack_file import read_attack
from mimic_fast.evaluation.downstream import encode_split, open_downstream
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.metrics import paired_difference
from mimic_fast.evaluation.probes import fit_linear_probe
from mimic_fast.launch.arguments import downstream_values, named

TOOK = 0.8  # ASR on the first set from which on an attack is one
_CLEAN = "clean"
_MEASURED = ("clean_accuracy", "attack_success_rate", "base_rate", "robust_accuracy")


def main() -> None:
    """Measures, adds the rows and prints them."""
    args = parsed()
    settings = evaluation_settings(args)
    students = {name: Path(path) for name, path in (named(o, "--student") for o in args.student)}
    names = [path.parent.name for path in sorted(args.encoders.glob("*/attack.json"))]
    names = [name for name in names if name in (args.only or students or names)]
    if not names:
        raise UsageError(f"no folder in {args.encoders} has an attack.json")
    machine, rows = this_machine(threads=1), []
    for name in names:
        rows += attack_rows(
            args.encoders, name, students.get(name), settings, label=args.label, machine=machine
        )
        print(f"{name}: measured", flush=True)
    out = args.out or results_file("attacks", "cpu")
    append_rows(out, rows)
    if args.against:
        paired = paired_rows(
            args.encoders, students, args.against, settings, label=args.label, machine=machine
        )
        append_rows(out, paired)
        rows += paired
    print(tables(rows))
    print(f"rows added to {out}")


def evaluation_settings(args: argparse.Namespace) -> EvaluationSettings:
    """What is measured, on which sets."""
    return EvaluationSettings.model_validate(
        {
            "downstream": downstream_values(args.downstream),
            "probe": args.probe,
            "probe_labels": args.probe_labels,
            "cache": args.cache,
        }
    )


def attack_rows(
    encoders: Path,
    name: str,
    student: Path | None,
    settings: EvaluationSettings,
    *,
    label: str,
    machine: Machine,
) -> list[Row]:
    """Figures of one attack: of the attacked encoder, of the clean one, of the student."""
    folder = encoders / name
    attack = read_attack(folder)
    files = {"teacher": folder / "encoder.safetensors"}
    files |= {"clean": encoders / _CLEAN / "encoder.safetensors"}
    files |= {} if student is None else {"purified": student}
    loaded = {role: load_encoder(path) for role, path in files.items()}
    measured = evaluate_encoders(
        loaded, settings.model_copy(update={"attack": folder / "attack.json"}), seed=0
    )
    rows: list[Row] = []
    first = None
    for role in files:
        for entry in measured["encoders"][role]["downstream"]:
            attacked = entry["attacks"][0]
            if role == "teacher" and first is None and entry["probe"] != "fine_tune":
                first = attacked["attack_success_rate"]["value"]

            case = Case(
                op="attack",
                impl=f"{name}: {role}",
                mode=f"{entry['dataset']}, {entry['probe']}",
                shape=label,
            )
            figures = {**entry, **attacked}
            for metric in _MEASURED:
                share = figures[metric]
                for end in ("value", "low", "high"):
                    own = metric if end == "value" else f"{metric}_{end}"
                    rows.append(single_row(case, own, "", share[end], machine=machine))
            counts = figures["attack_success_rate"]["n"], figures["probe_train_images"]
            for metric, count in zip(("victims", "labeled"), counts, strict=True):
                rows.append(single_row(case, metric, "images", count, machine=machine))
    case = Case(op="attack", impl=f"{name}: teacher", mode="made", shape=label)
    facts = {} if first is None else {"took": float(first >= TOOK)}
    facts |= {key: attack.facts[key] for key in ("psnr_db", "poison_rate") if key in attack.facts}
    if "seconds" in attack.facts:
        rows.append(single_row(case, "wall_time", "s", attack.facts["seconds"], machine=machine))
    return rows + [
        single_row(case, key, "", value, machine=machine) for key, value in facts.items()
    ]


def paired_rows(
    encoders: Path,
    students: Mapping[str, Path],
    against: str,
    settings: EvaluationSettings,
    *,
    label: str,
    machine: Machine,
) -> list[Row]:
    """ASR of every other student minus that of ``against``, on the same images.

    A set on which their attacks have different targets, and so other victims, is left out.
    """
    rows: list[Row] = []
    for downstream in settings.downstream:
        known = {name: read_attack(encoders / name).targets[downstream.name] for name in students}
        if len(set(known.values())) > 1:
            print(f"{downstream.name}: different targets cannot be paired: {known}", flush=True)
            continue
        fooled = {
            name: fooled_images(encoders / name, path, downstream, settings)
            for name, path in students.items()
        }
        for name in students:
            if name == against:
                continue
            case = Case(
                op="attack", impl=f"{name} minus {against}", mode=downstream.name, shape=label
            )
            difference = paired_difference(fooled[name], fooled[against])
            for end in ("value", "low", "high"):
                metric = "attack_success_rate" + ("" if end == "value" else f"_{end}")
                value: float = getattr(difference, end)
                rows.append(single_row(case, metric, "", value, machine=machine))
            rows.append(single_row(case, "victims", "images", difference.n, machine=machine))
    return rows


def fooled_images(
    folder: Path, student: Path, downstream: DownstreamSettings, settings: EvaluationSettings
) -> Bool[Tensor, "victim"]:
    """Which victims the linear probe on the student calls the target once triggered."""
    attack = read_attack(folder)
    target = attack.targets[downstream.name]
    data = open_downstream(downstream, settings, seed=0)
    loaded: dict[str, Any] = {"purified": load_encoder(student)}
    common: dict[str, Any] = {"batch_size": settings.batch_size, "cache": settings.cache}
    train = encode_split(data.train, loaded, triggers={}, **common)
    triggers = {"purified": (attack.trigger,)}
    test = encode_split(data.test, loaded, triggers=triggers, **common)
    probe = fit_linear_probe(
        train.clean["purified"], train.labels, num_classes=data.num_classes, l2=settings.probe_l2
    )
    (triggered,) = test.triggered["purified"]
    return probe.predict(triggered)[test.labels != target] == target


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--encoders", type=Path, required=True, help="clean/ and a folder an attack"
    )
    parser.add_argument("--only", nargs="+", help="attacks to measure; none: all")
    parser.add_argument("--downstream", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--against", help="the student that the others are compared with")
    parser.add_argument("--probe", nargs="+", default=["linear"], help="as evaluation.probe")
    parser.add_argument("--probe-labels", type=int, default=10000, help="labeled images")
    parser.add_argument("--cache", type=Path, help="folder for features")
    parser.add_argument("--label", default="encoders", help="what they are, for the rows")
    parser.add_argument("--out", type=Path, help="CSV file; none: this month's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
