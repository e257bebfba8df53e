"""Every setting of a purification: frozen, validated, described; ``recipe.py`` reads TOML."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Preset = Literal["hardened", "mimic", "official"]
Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
JsonScalar = bool | int | float | str


class Frozen(BaseModel):
    """Base of all settings: nothing mutates, no key is ignored, no field goes unvalidated."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class EncoderSpec(Frozen):
    """What must be known to build an encoder before its weights are read."""

    architecture: str = Field(description="'timm:NAME' or 'torchvision:NAME', e.g. 'timm:resnet18'")
    arguments: dict[str, JsonScalar | list[int]] = Field(
        default_factory=dict, description="keyword arguments of that library's constructor"
    )
    stem: Literal["native", "small_stride1", "small_stride2"] = Field(
        default="native",
        description="ResNets only: 'small_*' has one 3x3 convolution and no pooling",
    )
    in_channels: int = Field(default=3, ge=1, description="image channels")
    image_size: int = Field(ge=8, description="height and width of the input, pixels")
    mean: tuple[float, ...] = Field(description="per-channel mean of the input, images in [0, 1]")
    std: tuple[float, ...] = Field(description="per-channel standard deviation, images in [0, 1]")

    @model_validator(mode="after")
    def _channels_agree(self) -> "EncoderSpec":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{name} needs {self.in_channels} values (in_channels), got {len(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if not self.architecture.startswith(("timm:", "torchvision:")):
            raise ValueError(
                f"architecture must be 'timm:NAME' or 'torchvision:NAME', got {self.architecture!r}"
            )
        return self


class EncoderSettings(Frozen):
    """The suspect encoder. What is not given is read from its card or recognised from its keys."""

    teacher: Path | None = Field(default=None, description="checkpoint of the suspect encoder")
    architecture: str | None = Field(default=None, description="as in EncoderSpec; None: recognise")
    arguments: dict[str, JsonScalar | list[int]] | None = Field(
        default=None, description="constructor arguments; None: recognise"
    )
    stem: Literal["native", "small_stride1", "small_stride2"] | None = Field(
        default=None, description="ResNet stem; None: recognise"
    )
    in_channels: int | None = Field(default=None, ge=1, description="image channels")
    image_size: int | None = Field(default=None, ge=8, description="input height and width, pixels")
    mean: tuple[float, ...] | None = Field(default=None, description="per-channel mean")
    std: tuple[float, ...] | None = Field(default=None, description="per-channel deviation")
    taps: tuple[str, ...] = Field(
        default=(), description="module paths to tap; empty: CNN stages or ViT blocks"
    )
    teacher_shard: bool = Field(
        default=False, description="cut the teacher over all processes, where it does not fit one"
    )


class DataSettings(Frozen):
    """The clean images and the two augmented views."""

    source: str | None = Field(
        default=None,
        description="image folder, tar shards (path or glob), video, Hugging Face data set on "
        "disk, or 'fashion-mnist:train'",
    )
    clean_set: Path | None = Field(
        default=None,
        description="clean_set.json of an earlier run: the same images in the same order, no draw",
    )
    clean_fraction: float = Field(
        default=0.04, gt=0, le=1, description="share of the source to draw; unused with clean_count"
    )
    clean_count: int | None = Field(default=None, ge=2, description="number of images to draw")
    pretraining_size: int | None = Field(
        default=None,
        ge=1,
        description="images the teacher was pre-trained on; None: size of the source",
    )
    budget: float = Field(
        default=0.05, gt=0, le=1, description="largest share of the pre-training size allowed"
    )
    allow_budget: bool = Field(default=False, description="permit more than the budget")
    stratified: bool = Field(default=False, description="draw the same share of every label")
    hold_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the clean set kept for agreement, never trained on",
    )
    max_item_mb: float = Field(default=256.0, gt=0, description="stored size allowed for one item")
    max_megapixels: float = Field(
        default=64.0,
        gt=0,
        le=178,
        description="pixels allowed in one image; more is a decompression bomb",
    )
    backend: Literal["auto", "torch", "dali"] = Field(
        default="auto", description="what makes the views; auto says which it took and why"
    )
    decode: Literal["auto", "once", "every_time"] = Field(
        default="auto",
        description="crop from squares decoded once, or from the stored files in every pass; "
        "auto: once with torch, every_time with dali",
    )
    cache: Literal["auto", "memory", "disk"] = Field(
        default="auto",
        description="where decoded squares are kept; disk: one mapped file for all processes of a "
        "machine; auto: memory for one process and up to 2 GiB",
    )
    cache_dir: Path | None = Field(
        default=None, description="folder of decoded squares (disk); None: the user's cache"
    )
    workers: int = Field(default=2, ge=1, description="threads that decode (every_time)")
    prefetch: int = Field(
        default=2, ge=0, description="batches made ahead of the step; 0: none, in the step's thread"
    )
    view_pool: int = Field(
        default=0,
        ge=0,
        description="distinct views of an image, taken in turn by later passes; 0: fresh ones",
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.2, 1.0), description="area share of random resized crops"
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3), description="aspect ratio (width / height) of random resized crops"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    jitter: tuple[float, float, float, float] = Field(
        default=(0.4, 0.4, 0.4, 0.1), description="brightness, contrast, saturation, hue strength"
    )
    jitter_probability: float = Field(default=0.8, ge=0, le=1, description="probability of jitter")
    grayscale: float = Field(default=0.2, ge=0, le=1, description="probability of grey")

    @model_validator(mode="after")
    def _ranges(self) -> "DataSettings":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must satisfy 0 < low <= high, got {self.crop_ratio}")
        if self.backend == "dali" and self.decode == "once":
            raise ValueError("backend 'dali' decodes every_time; use backend 'torch' for once")
        if min(self.jitter) < 0 or max(self.jitter[:3]) > 1 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter must lie in [0, 1] (hue [0, 0.5]), got {self.jitter}")
        return self


# What only a draw of clean images reads.
CLEAN_SET_FIELDS = (
    "clean_set",
    "clean_fraction",
    "clean_count",
    "pretraining_size",
    "budget",
    "allow_budget",
    "stratified",
    "hold_out",
)


class MutualInformationSettings(Frozen):
    """Step A: where the benign knowledge lies."""

    estimator: Literal["histogram", "dv", "infonce", "ksg"] = Field(
        default="histogram",
        description="binned pairs of directions; critics trained for the Donsker-Varadhan or the "
        "InfoNCE bound; nearest neighbors on 8 canonical directions",
    )
    pairs: Literal["canonical", "cross", "sliced"] = Field(
        default="canonical",
        description="directions the histogram pairs: canonical ones, all principal ones, random "
        "ones; only canonical ones estimate the mutual information",
    )
    slices: int = Field(default=512, ge=1, description="random pairs of directions (sliced)")
    source: Literal["teacher", "student"] = Field(
        default="teacher",
        description="whose activations are measured (the demo uses the student's)",
    )
    components: int = Field(default=64, ge=1, description="principal directions kept per layer")
    bins: Literal["auto"] | int = Field(
        default="auto", description="bins per axis; auto: largest with (K-1)^2/(2n) <= 0.125 nats"
    )
    shuffles: int = Field(default=20, ge=2, description="shuffled pairings for the noise floor")
    jackknife_groups: int = Field(
        default=20, ge=2, description="groups of the delete-group jackknife"
    )
    chunk: int = Field(default=64, ge=1, description="images per forward of step A")
    pool: Literal["mean", "class_token"] = Field(
        default="mean", description="how a ViT tap becomes one vector; CNN taps are always averaged"
    )
    base: float = Field(default=1000.0, ge=0, description="layer weight = base + gain * share")
    gain: float = Field(default=10000.0, ge=0, description="layer weight = base + gain * share")
    weighting: Literal["information", "uniform", "inverse"] = Field(
        default="information",
        description="share of a layer: p of its information, 1 / L, or (1 - p) / (L - 1); the sum "
        "of all weights is the same",
    )
    force: bool = Field(default=False, description="permit a K too large for the number of images")
    dv_epochs: int = Field(default=200, ge=1, description="epochs per critic (dv, infonce)")
    dv_batch: int = Field(
        default=128,
        ge=2,
        description="batch of a critic (dv, infonce); infonce stays below its logarithm",
    )

    @model_validator(mode="after")
    def _bins(self) -> "MutualInformationSettings":
        if self.bins != "auto" and not 2 <= self.bins <= 256:
            raise ValueError(f"bins must be 'auto' or 2..256, got {self.bins}")
        return self


class HardenSettings(Frozen):
    """Student-only perturbation: what the student imitates cannot hang on what is perturbed."""

    probability: float = Field(default=0.0, ge=0, le=1, description="share of images perturbed")
    area: tuple[float, float] = Field(
        default=(0.02, 0.25), description="rectangle area as a share of the image"
    )
    kinds: tuple[Literal["constant", "noise", "image"], ...] = Field(
        default=("constant", "noise", "image"),
        description="contents of the rectangle, drawn uniformly",
    )
    rectangles: int = Field(
        default=2, ge=0, le=64, description="rectangles per perturbed image; 0: none"
    )
    blend: float = Field(
        default=0.0, ge=0, le=1, description="most opacity of another image over a perturbed one"
    )
    waves: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="largest amplitude of a sinusoid added to a perturbed image, images in [0, 1]",
    )

    @model_validator(mode="after")
    def _does_something(self) -> "HardenSettings":
        if self.probability > 0 and not (self.rectangles or self.blend or self.waves):
            raise ValueError(
                "harden.probability is above 0 and rectangles, blend and waves are all 0; set one"
            )
        return self

    @model_validator(mode="after")
    def _area(self) -> "HardenSettings":
        low, high = self.area
        if not 0 < low <= high < 1:
            raise ValueError(f"harden.area must satisfy 0 < low <= high < 1, got {self.area}")
        if not self.kinds:
            raise ValueError("harden.kinds must name at least one of constant, noise, image")
        return self


class LossSettings(Frozen):
    """Step B: what the student minimizes."""

    clone: float = Field(default=1.0, ge=0, description="weight of the clone loss")
    clone_form: Literal["cosine", "mse"] = Field(
        default="cosine", description="minus the mean cosine, or the mean squared difference"
    )
    dense: float = Field(
        default=0.0,
        ge=0,
        description="weight of the clone loss between the positions of the last tap (tokens, map)",
    )
    attention_weight: float = Field(
        default=0.001,
        ge=0,
        description="a: lambda_l = (base + gain p_l) a / N_l, N_l the tap's positions; 0: none",
    )
    attention_form: Literal["sum", "mean"] = Field(
        default="sum",
        description="over positions; equal by construction: weight lambda_l a / N_l on the sum, "
        "lambda_l a on the mean, which is the demo's expression",
    )
    attention_power: float = Field(default=2.0, ge=1, description="p in sum_c |F_c|^p")
    contrastive: float = Field(default=0.0, ge=0, description="weight of NT-Xent on two views")
    teacher_view: Literal["same", "plain"] = Field(
        default="same", description="what the teacher sees: the student's view, or the whole image"
    )
    teacher_memory: bool = Field(
        default=True,
        description="keep the teacher's answers where it sees the same again (teacher_view "
        "'plain', or data.view_pool above 0), instead of running it in every step",
    )
    temperature: float = Field(default=0.5, gt=0, description="temperature of NT-Xent")
    projection: int = Field(default=128, ge=2, description="output width of the projection head")
    harden: HardenSettings = Field(default_factory=HardenSettings)

    @model_validator(mode="after")
    def _something_to_minimize(self) -> "LossSettings":
        if self.clone == self.dense == self.attention_weight == self.contrastive == 0:
            raise ValueError(
                "one of clone, dense, attention_weight and contrastive must be above 0"
            )
        return self


class OptimSettings(Frozen):
    """How it is minimized."""

    name: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="optimizer")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=1e-4, ge=0, description="weight decay")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum (sgd)")
    epochs: int = Field(default=100, ge=1, description="passes over the clean set")
    batch_size: int = Field(default=128, ge=2, description="images per step over all processes")
    accumulate: int = Field(
        default=1, ge=1, description="parts of a process's share of the batch, one after another"
    )
    warmup_epochs: float = Field(default=2.0, ge=0, description="linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="after warm-up")
    clip_norm: float = Field(default=5.0, ge=0, description="gradient norm limit; 0: none")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        default="fp32",
        description="autocast type (fp16 with a loss scale); losses are always fp32 or wider",
    )
    tf32: bool = Field(default=False, description="allow TF32 matrix products on GPU")
    channels_last: bool = Field(default=True, description="NHWC memory format for CNNs")
    activation_checkpointing: bool = Field(
        default=False, description="compute a block's activations again instead of keeping them"
    )
    compile: bool = Field(
        default=False, description="torch.compile every block of student and teacher"
    )
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of averaged weights; 0: off")
    max_nonfinite: int = Field(
        default=3, ge=1, description="non-finite steps in a row before exit 5"
    )


class StopSettings(Frozen):
    """When a purification has learned enough: told by held-out clean images, without labels."""

    rule: Literal["never", "record", "plateau"] = Field(
        default="never",
        description="record: measure the student on held-out images (held_out.jsonl); plateau: "
        "and end when their clone loss no longer falls",
    )
    every: int = Field(default=1, ge=1, description="passes between two measurements")
    patience: int = Field(default=10, ge=1, description="measurements without a lower loss")
    min_delta: float = Field(
        default=0.01, ge=0, lt=1, description="a lower loss is lower by this share at least"
    )
    cooldown: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="then the learning rate falls to zero over this share of the steps done",
    )


class RunSettings(Frozen):
    """Where results go and how the run survives."""

    out: Path | None = Field(default=None, description="run directory")
    resume: Literal["never", "auto"] = Field(default="never", description="auto: newest good state")
    engine: Engine = Field(
        default="ddp",
        description="ddp: whole student in every process; zero1, zero2, zero3 (DeepSpeed), fsdp2: "
        "optimizer, gradients or weights too are cut over the processes",
    )
    deepspeed: Path | None = Field(
        default=None,
        description="DeepSpeed's JSON in place of the built-in one, e.g. to offload (zero1-3)",
    )
    checkpoint_every: int = Field(default=200, ge=1, description="steps between run states")
    async_save: bool = Field(
        default=True, description="write states in the background while training goes on"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(), description="where metrics go besides metrics.jsonl"
    )
    keep: int = Field(default=2, ge=1, description="run states kept")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    force_op: Literal["reference", "compiled", "triton", "cpp"] | None = Field(
        default=None,
        description="what losses and histograms run on (compiled: losses only); None: the fastest",
    )


class DownstreamSettings(Frozen):
    """A labeled data set on which probes measure an encoder."""

    name: str = Field(description="name in the report")
    train: str = Field(description="data source for fitting probes")
    test: str = Field(description="data source for measuring")


class EvaluationSettings(Frozen):
    """Step D: what is measured when labels are at hand."""

    downstream: tuple[DownstreamSettings, ...] = Field(default=(), description="labeled sets")
    attack: Path | Annotated[tuple[Path, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="attack.json (trigger, reference, target), or its folder, which has the "
        "further targets of the encoder too; or a list of them",
    )
    student_only: bool = Field(
        default=False,
        description="purify: also train a student on the clean images alone",
    )
    clean: Path | None = Field(
        default=None, description="purify: a clean encoder to measure beside, where there is one"
    )
    probe: tuple[Literal["linear", "knn", "mlp", "fine_tune"], ...] = Field(
        default=("linear",),
        description="classifiers on frozen features; 'fine_tune' trains the encoder itself too",
    )
    probe_labels: int | None = Field(
        default=None, ge=2, description="labeled images for fitting; None: all"
    )
    probe_l2: float = Field(default=1e-3, ge=0, description="L2 penalty of the linear probe")
    mlp_epochs: int = Field(
        default=50, ge=1, description="passes over the labeled images of the MLP probe"
    )
    fine_tune_share: float = Field(
        default=0.1, gt=0, le=1, description="share of all labeled images of a set for 'fine_tune'"
    )
    fine_tune_epochs: int = Field(default=5, ge=1, description="its passes over them")
    fine_tune_lr: float = Field(default=0.01, gt=0, description="its learning rate (SGD, cosine)")
    cache: Path | None = Field(
        default=None,
        description="folder for features, by the digests of encoder, images and trigger: what was "
        "computed once is read; None: none",
    )
    test_images: int | None = Field(default=None, ge=2, description="test images; None: all")
    batch_size: int = Field(default=256, ge=1, description="images per forward")
    curve_every: int | None = Field(
        default=None,
        ge=1,
        description="purify: epochs between two measurements of the student on the first "
        "downstream set while it is trained; None: none",
    )
    scan: bool = Field(
        default=False, description="purify: scan teacher and purified encoder without a trigger"
    )
    scan_references: Path | None = Field(
        default=None, description="clean encoders, or their scans, that the scans compare with"
    )

    @property
    def attacks(self) -> tuple[Path, ...]:
        """``attack`` as it was given, as a list; empty without one."""
        if self.attack is None:
            return ()
        return self.attack if isinstance(self.attack, tuple) else (self.attack,)


class StudentSettings(Frozen):
    """What the student begins with."""

    init: Literal["random", "trusted"] = Field(
        default="random", description="random weights, or a clean checkpoint of your own"
    )
    checkpoint: Path | None = Field(
        default=None,
        description="the trusted checkpoint, of the suspect's architecture; never the suspect",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> "StudentSettings":
        if (self.init == "trusted") != (self.checkpoint is not None):
            raise ValueError(
                "student.init 'trusted' and student.checkpoint belong together; give both or none"
            )
        return self


class Settings(Frozen):
    """All settings of one run."""

    preset: Preset = Field(default="hardened", description="named starting point")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds everything")
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    student: StudentSettings = Field(default_factory=StudentSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    mi: MutualInformationSettings = Field(default_factory=MutualInformationSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    stop: StopSettings = Field(default_factory=StopSettings)
    run: RunSettings = Field(default_factory=RunSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
