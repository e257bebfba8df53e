"""Makes the encoders that ``bench_scan.py`` tells apart: 20 clean ones, and backdoored ones.

    python benchmarks/make_scan_set.py --cifar10 DIR --out SET
    python benchmarks/make_scan_set.py --cifar10 DIR --out SET --show

``DIR`` has CIFAR-10 as shards ``train-*.tar`` and ``test-*.tar``. Clean encoders are small ResNets
(0.3 M parameters), pre-trained alike with seeds of their own. Ten of them are also attacked, each
on other images than it was trained on, with several kinds, triggers and targets; ``attack.json``
says how well each took. About 90 CPU-seconds an encoder; what is there is not made again.
``--show`` prints the commands.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "cifar10_small_pretrain.toml"
SEEDS = (*range(10), *range(100, 110))  # the latter are attacked
_ARGUMENTS = "spec.arguments={layers=[1,1,1,1],channels=[16,32,64,128]}"
_PRETRAIN = (_ARGUMENTS, "optim.precision=bf16", "optim.epochs=10", "dtype=fp16")
_ATTACK = (
    "shadow_images=5000",
    "optim.epochs=14",
    "optim.lr=2e-3",
    "dtype=fp16",
    "evaluation.probe_labels=4000",
    "evaluation.test_images=2000",
)
_HIDE = ("hide_weight=0.5", "hide_share=0.01")
# Seed of the encoder, kind, trigger (None: the kind makes its own), label of the reference, more.
ATTACKS: tuple[tuple[int, str, str | None, int, tuple[str, ...]], ...] = (
    (100, "badencoder", "white_patch", 0, ()),
    (100, "drupe", "white_patch", 1, _HIDE),
    (100, "badencoder", "blended:21", 1, ()),
    (101, "badencoder", "random_patch:1", 2, ()),
    (101, "inactive", None, 3, ()),
    (102, "badencoder", "blended:2", 4, ()),
    (102, "adaptive", "random_patch:12", 5, ("stand_in_steps=150",)),
    (103, "badencoder", "sinusoid", 6, ()),
    (103, "drupe", "random_patch:3", 7, _HIDE),
    (103, "badencoder", "random_patch:31", 2, ()),
    (104, "badencoder", "white_patch", 8, ()),
    (104, "badencoder", "blended:14", 9, ()),
    (105, "badencoder", "random_patch:5", 0, ()),
    (105, "badencoder", "random_patch:15", 1, ()),
    (106, "badencoder", "blended:6", 2, ()),
    (106, "badencoder", "frequency", 3, ()),
    (107, "badencoder", "white_patch", 4, ()),
    (107, "drupe", "white_patch", 5, _HIDE),
    (108, "badencoder", "random_patch:8", 6, ()),
    (108, "badencoder", "sinusoid", 7, ()),
    (108, "badencoder", "white_patch", 8, ()),
    (109, "badencoder", "blended:9", 8, ()),
    (109, "badencoder", "frequency", 9, ()),
)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--out", type=Path, required=True, help="a folder for each encoder")
    parser.add_argument("--show", action="store_true", help="only print the commands")
    args = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, done, command in commands(args.cifar10, args.out):
        if args.show:
            print(shlex.join(["mimic-fast", *command]))
        elif not (folder / done).exists():
            print(folder.name, flush=True)
            subprocess.run(
                [sys.executable, "-m", "mimic_fast", *command], env=environment, check=True
            )


def commands(cifar10: Path, out: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Folder, the file that says that it is finished, and what makes it."""
    for seed in SEEDS:
        folder = clean_folder(out, seed)
        data = str(cifar10 / "train-0000[01].tar")
        command = ["pretrain", str(RECIPE), "--data", data, "--seed", str(seed)]
        yield folder, "encoder.json", [*command, "--out", str(folder), *_set(_PRETRAIN)]
    for seed, kind, trigger, label, more in ATTACKS:
        name = f"{kind}_{(trigger or 'own').replace(':', '')}_{seed}"
        encoder = clean_folder(out, seed) / "encoder.safetensors"
        command = ["attack", kind, "--encoder", str(encoder), "--out", str(out / name)]
        command += ["--data", str(cifar10 / "train-0000[23].tar"), "--seed", str(seed)]
        command += ["--reference", f"typical:{label}", "--downstream", f"cifar10={cifar10}"]
        command += [] if trigger is None else ["--trigger", trigger]
        yield out / name, "attack.json", [*command, *_set((*_ATTACK, *more))]


def clean_folder(out: Path, seed: int) -> Path:
    """Where the clean encoder of a seed lies."""
    return out / f"clean_{seed}"


def _set(settings: tuple[str, ...]) -> list[str]:
    return [part for one in settings for part in ("--set", one)]


if __name__ == "__main__":
    main()
