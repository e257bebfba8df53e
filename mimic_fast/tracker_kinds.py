"""The trackers there are, made as Accelerate's own, each keeping to the run directory."""

import logging
from pathlib import Path
from typing import Any

from mimic_fast.files import machine_errors

# What must be importable for each; MLflow keeps its runs in a database file.
PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}

_PROJECT = "mimic_fast"


def make_tracker(name: str, out: Path, *, known: str | None, new: str, step: int) -> Any:
    """A tracker that has not started.

    Args:
        name: Of ``PACKAGES``.
        out: Run directory.
        known: Id of the run to go on with; None begins one.
        new: Id of a run that begins, where the tracker takes one.
        step: Steps done before.
    """
    if name == "tensorboard":
        return _tensorboard(out, known, step)
    return _wandb(out, known or new) if name == "wandb" else _mlflow(out, known)


def run_id(tracker: Any) -> str:
    """By what a started tracker's run is known."""
    if tracker.name == "mlflow":
        return tracker.tracker.info.run_id
    return tracker.tracker.id if tracker.name == "wandb" else tracker.name


def tracker_errors(name: str) -> tuple[type[Exception], ...]:
    """What a tracker raises when its folder, server or database fails it."""
    if name == "wandb":
        import wandb

        return OSError, wandb.Error
    if name == "mlflow":
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        return OSError, MlflowException, SQLAlchemyError
    return (OSError,)


def _tensorboard(out: Path, known: str | None, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Hides what a killed run told of later steps.
    purge = {} if known is None else {"purge_step": step + 1}
    return TensorBoardTracker("tensorboard", logging_dir=out, **purge)


def _wandb(out: Path, name: str) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    # The user's WANDB_MODE or `wandb online` stand; W&B's own default, online, does not.
    chosen = wandb.setup().settings
    mode = chosen.mode if "mode" in chosen.model_fields_set else "offline"
    settings = wandb.Settings(
        silent=mode == "offline",
        console="off",
        save_code=False,
        disable_git=True,
        x_disable_meta=True,  # host, user and command line
    )
    return WandBTracker(
        _PROJECT, dir=str(out), mode=mode, id=name, resume="allow", settings=settings
    )


def _mlflow(out: Path, known: str | None) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    folder = (out / "mlflow").resolve()
    tags = {"mlflow.source.name": _PROJECT}  # not the command's path
    run = {"run_id": known, "run_name": folder.parent.name, "tags": tags}
    if mlflow.is_tracking_uri_set():
        return MLflowTracker(_PROJECT, **run)

    def forget() -> None:
        """Leaves nothing that a next run would take for the user's choice."""
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]

    class InRunDirectory(MLflowTracker):
        def start(self) -> None:
            # Its stores in plain files are no longer kept up; a database needs no server either.
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            try:
                super().start()
            except BaseException:
                forget()
                raise

        def finish(self) -> None:
            try:
                super().finish()
            finally:
                forget()

    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # it tells of every table
    return InRunDirectory(_PROJECT, logging_dir=str(folder / "artifacts"), **run)
