"""The matrix of a comparison: which attacks, which defenses, on which images, with which seeds."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from mimic_fast.config import EncoderSettings, EvaluationSettings, Frozen

# Kinds of defense that give an encoder as it is: no images are read and nothing is drawn.
AS_IT_IS = ("none", "clean")


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed stands twice")
    return seeds


# Names become folders and lines of a table.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**31)], ...],
    Field(min_length=1),
    AfterValidator(_each_once),
]


class AttackedSettings(Frozen):
    """An attacked encoder that defenses are tried on."""

    encoder: Path = Field(description="the backdoored checkpoint")
    attack: Path | None = Field(
        default=None, description="its attack.json or folder; None: the encoder's own folder"
    )
    clean: Path | None = Field(
        default=None, description="the clean encoder to measure beside, for chance and fidelity"
    )

    loading: EncoderSettings = Field(
        default_factory=EncoderSettings,
        description="how both are read where they have no card: fields of 'encoder' in a recipe",
    )

    @model_validator(mode="after")
    def _one_checkpoint(self) -> "AttackedSettings":
        if self.loading.teacher is not None:
            raise ValueError("loading.teacher is not read here; name it as attacks.NAME.encoder")
        return self

    @property
    def attack_file(self) -> Path:
        """Where ``attack.json`` is looked for."""
        return self.encoder.parent if self.attack is None else self.attack


class DefenseSettings(Frozen):
    """A defense and how it is set."""

    kind: str = Field(description="what it is: see docs/compare.md")
    preset: str | None = Field(default=None, description="of a purification; None: the default")
    seeds: Seeds | None = Field(default=None, description="its own seeds; None: the matrix's")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="sections of a recipe: what differs from the preset"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="what this kind alone knows; most kinds have none"
    )


class CleanImages(Frozen):
    """Which clean images; what is not given is as the defense's preset has it."""

    source: str | None = Field(default=None, description="as data.source of a purification")
    clean_set: Path | None = Field(default=None, description="manifest to use instead of a draw")
    clean_count: int | None = Field(default=None, ge=2, description="images")
    clean_fraction: float | None = Field(default=None, gt=0, le=1, description="of the source")
    allow_budget: bool | None = Field(default=None, description="permit more than data.budget")
    stratified: bool | None = Field(default=None, description="the same share of every label")


class MatrixSettings(Frozen):
    """A comparison."""

    seeds: Seeds = Field(default=(0,), description="seeds of every defense")
    data: CleanImages = Field(
        default_factory=CleanImages, description="clean images for every defense"
    )
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="labeled sets and probes"
    )
    evaluation_seed: int = Field(
        default=0, ge=0, lt=2**31, description="draws labeled and test images, once for all cells"
    )
    attacks: dict[Name, AttackedSettings] = Field(min_length=1, description="by name")
    defenses: dict[Name, DefenseSettings] = Field(min_length=1, description="by name")
    results: Path | None = Field(
        default=None,
        description="CSV file of finished cells, added to and read again: what it has is not run",
    )

    @model_validator(mode="after")
    def _measurable(self) -> "MatrixSettings":
        if not self.evaluation.downstream:
            raise ValueError("evaluation.downstream is empty: name a labeled set")
        if self.data.source is None and any(d.kind not in AS_IT_IS for d in self.defenses.values()):
            raise ValueError("data.source is missing: name the clean images")
        return self
