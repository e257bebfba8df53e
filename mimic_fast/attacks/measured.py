"""The attack's success on labeled sets, measured once it is made and kept in ``attack.json``.

Of an attack with several targets each is measured, and has its figures in its own file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimic_fast.config import EncoderSettings, EvaluationSettings, RunSettings
from mimic_fast.encoders.ingest import load_encoder
from mimic_fast.evaluation.attack_file import attack_files, attack_path, record_facts
from mimic_fast.evaluation.evaluate import evaluate_encoders
from mimic_fast.evaluation.features import place
from mimic_fast.progress import Reporter, silent

_AUTO = RunSettings()


def measure_attack(
    attack: Path,
    encoder: Path,
    *,
    clean: Path | None,
    settings: EvaluationSettings,
    loading: EncoderSettings,
    run: RunSettings = _AUTO,
    seed: int,
    report: Reporter = silent,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Measures the backdoored encoder and, where there is one, the clean one that it came from.

    Args:
        attack: Its ``attack.json``, or the folder. It and those of further targets there get the
            target classes and, under ``facts.measured``, what is returned of them.
        encoder: The backdoored checkpoint.
        clean: The clean checkpoint; None for poisoning attacks, which start from none.
        settings: Downstream sets and probes; its own ``attack`` is replaced.
        loading: How encoders are read.
        run: Its device is where they are measured.
        seed: Draws labeled and test images.
        report: Told the number of images done.
        stop: Polled between images and batches.

    Returns:
        A row for each encoder (``teacher`` is the backdoored one), downstream set, probe and
        target: ``dataset``, ``probe``, ``encoder``, ``trigger``, ``target``, ``clean_accuracy``,
        ``attack_success_rate``, both shares with their 95 % intervals; the latter is absent where
        every test image is of the target class.

    Raises:
        UsageError: As ``evaluate_encoders``.
        UnsafeInputError: If an encoder's features are not finite.
        StoppedError: If ``stop`` told so.
    """
    files = {"teacher": encoder} | ({} if clean is None else {"clean": clean})
    loaded = {role: load_encoder(path, loading) for role, path in files.items()}
    place((one.encoder for one in loaded.values()), run)
    measured = evaluate_encoders(
        loaded,
        settings.model_copy(update={"attack": attack_path(attack).parent}),
        seed=seed,
        report=report,
        stop=stop,
    )
    rows = [
        _row(role, entry, attacked)
        for role in files
        for entry in measured["encoders"][role].get("downstream", ())
        for attacked in entry["attacks"]
    ]
    targets = attack_files(attack_path(attack).parent)
    for path, named in zip(targets, measured["attacks"], strict=True):
        own = [row for row in rows if row["trigger"] == named["trigger"]]
        record_facts(path, {"measured": own})
    return rows


def _row(role: str, entry: dict[str, Any], attacked: dict[str, Any]) -> dict[str, Any]:
    row = {"encoder": role, **{name: entry[name] for name in ("dataset", "probe")}}
    row |= {name: attacked[name] for name in ("trigger", "target")}
    row["clean_accuracy"] = entry["clean_accuracy"]
    if "attack_success_rate" in attacked:
        row["attack_success_rate"] = attacked["attack_success_rate"]
    return row
