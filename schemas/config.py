"""Every YAML key: typed, frozen, with its meaning and unit. One ``Config``; each command names the sections it needs.

Unknown keys are refused. Nothing here touches a file, a network or a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Precision = Literal["fp32", "bf16", "fp16"]
Interpolation = Literal["bilinear", "bicubic"]
Optimizer = Literal["sgd", "adamw", "lamb", "rmsprop_tf", "soap"]
Triple = tuple[float, float, float]
Level = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, lt=1)]
_RAY_ADDRESS = re.compile(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^\s/:]+):[0-9]{1,5}")

_AUGMENTING = ("jitter", "randaugment", "erasing")
_OPTIMIZER_KEYS: Mapping[Optimizer, tuple[str, ...]] = {
    "sgd": (),
    "adamw": ("betas", "eps"),
    "lamb": ("betas", "eps"),
    "rmsprop_tf": ("eps", "alpha"),
    "soap": ("betas", "eps"),
}


class Section(BaseModel):
    """A frozen group of keys that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, values: Any) -> Any:
        """Pydantic takes true for 1, which nobody means."""
        given: dict[str, Any] = values if isinstance(values, dict) else {}
        wrong = [
            InitErrorDetails(
                type=PydanticCustomError("boolean", "Input should be a valid number"), loc=loc, input=value
            )
            for name, field in cls.model_fields.items()
            if name in given and _takes_numbers(field.annotation)
            for loc, value in _booleans(given[name], (name,))
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values


def local_path(path: str, *, key: str) -> str:
    """A path of this machine's file system, which no URL is: as a path it would name a folder such as ``s3:``."""
    if "://" in path:
        raise ValueError(f"{key} is {path!r}; wanted a local path")
    return path


def _takes_numbers(annotation: Any) -> bool:
    kinds = list(_kinds(annotation))
    return (int in kinds or float in kinds) and bool not in kinds


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of which an annotation is made."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _booleans(value: Any, loc: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], bool]]:
    """The booleans in a value or list, by place."""
    if isinstance(value, bool):
        yield loc, value
    elif isinstance(value, list | tuple):
        for position, part in enumerate(value):
            yield from _booleans(part, (*loc, position))


class DataConfig(Section):
    """Which images, which labels, and what to do with bad ones."""

    shards: str | tuple[str, ...] | None = Field(
        None, description="Training shards: URL with {a..b} braces, or a list."
    )
    val_shards: str | tuple[str, ...] | None = Field(None, description="Validation shards, same form.")
    image: str = Field("jpg;jpeg;png;webp", description="Member extensions that hold the image, first match wins.")
    label: str | None = Field(
        "cls", description="Member extension that holds the class index as text; null: no labels."
    )
    num_classes: int | None = Field(None, ge=2, description="K. Labels must lie in [0, K).")
    cache: str | tuple[str, ...] | None = Field(
        None, description="URL of a finished teacher cache to train from, or a list: one a teacher."
    )
    index: str | None = Field(None, description="URL of the folder with <shard_id>.parquet; default <run url>/index.")
    bad_samples: Literal["fail", "skip"] = Field(
        "fail", description="Images that cannot be used: stop, or record and skip."
    )
    max_bad_share: float = Field(
        0.1, ge=0, le=1, description="Under skip: a shard with a larger share of bad samples fails."
    )
    missing_labels: Literal["refuse", "ignore"] = Field(
        "refuse", description="Samples without a label: refuse for losses that need one, or average over the others."
    )
    max_pixels: int = Field(64_000_000, gt=0, description="Images with more pixels are not decoded (status too_large).")

    allow_pixel_drift: int = Field(
        0, ge=0, le=255, description="Levels by which block means of a canary may differ here from the cache's."
    )
    local_dir: str | None = Field(
        None, description="Folder on every node for copies of shards and cached views; default: the temporary folder."
    )
    local_bytes: int | None = Field(
        None, gt=0, description="Bytes a node keeps there at most; default: four fifths of what the disk has for it."
    )

    @field_validator("local_dir")
    @classmethod
    def _check_local_dir(cls, local_dir: str | None) -> str | None:
        return local_dir if local_dir is None else local_path(local_dir, key="local_dir")

    @property
    def caches(self) -> tuple[str, ...]:
        """The URLs of ``cache``."""
        return (self.cache,) if isinstance(self.cache, str) else self.cache or ()


class ModelConfig(Section):
    """How to build a network and what it eats. Mean, std and size come from the model's own config unless given."""

    model: str | None = Field(None, description="timm/NAME, torchvision/NAME or python:package.module:factory.")
    weights: str | None = Field("random", description="pretrained, random, or URL of .safetensors/.pt (weights_only).")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Checked before a weights URL is loaded.")
    mean: Triple | None = Field(None, description="Per-channel mean of [0,1] RGB.")
    std: Triple | None = Field(None, description="Per-channel standard deviation of [0,1] RGB.")
    interpolation: Interpolation | None = Field(None, description="How a box is resized to the input size.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed on to the model's constructor.")

    @property
    def weights_url(self) -> str | None:
        """The file that ``weights`` names, if it names one."""
        return None if self.weights in ("random", "pretrained") else self.weights


class AskedConfig(ModelConfig):
    """A network that is asked."""

    weights: str | None = Field(
        None, description="pretrained, random, or URL of .safetensors/.pt (weights_only). A teacher has no default."
    )
    precision: Precision = Field("fp32", description="Arithmetic of the forward pass (autocast below fp32).")
    batch_size: int = Field(64, ge=1, description="Rows per forward; the last batch of a mix group is padded to it.")
    class_means: str | None = Field(
        None, min_length=1, description="mode online, for nd: URL of a finished cache of this teacher with class means."
    )


class OtherTeacherConfig(AskedConfig):
    """One of several teachers online, beside the first."""

    size: int | None = Field(
        None, ge=1, description="Input height and width in pixels; default views.size, else the model's own."
    )


class TeacherConfig(AskedConfig):
    """The network that is asked, or the first of several."""

    mode: Literal["none", "cache", "online"] = Field("cache", description="What a student learns from, in training.")
    others: tuple[OtherTeacherConfig, ...] = Field(
        (), description="mode online: further teachers, asked about the same views; losses are summed over all."
    )

    @property
    def asked(self) -> dict[str, AskedConfig]:
        """All teachers of mode online, by the names of their sections."""
        return {"teacher": self, **{f"teacher.others.{number}": other for number, other in enumerate(self.others)}}


class JitterConfig(Section):
    """Colour jitter, in one of the 24 orders: drawn factors of brightness, contrast, saturation, and a shift of hue."""

    probability: float = Field(1.0, gt=0, le=1, description="Share of the views that are jittered.")
    brightness: float = Field(0.4, ge=0, le=1, description="b: the factor is uniform in 1 - b to 1 + b.")
    contrast: float = Field(0.4, ge=0, le=1, description="The same, away from the mean of the grey view.")
    saturation: float = Field(0.4, ge=0, le=1, description="The same, away from the grey view.")
    hue: float = Field(0.0, ge=0, le=0.5, description="h: the shift is uniform in -h to h turns of the colour circle.")

    @model_validator(mode="after")
    def _check_any(self) -> JitterConfig:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("brightness, contrast, saturation and hue are all 0, so nothing is jittered")
        return self


class RandAugmentConfig(Section):
    """Operations drawn with replacement from the 14 of Cubuk 2019, at a strength of 0 to 30."""

    num_ops: int = Field(2, ge=1, le=8, description="Operations on each view, one after another.")
    magnitude: float = Field(9.0, ge=0, le=30, description="Strength of an operation; 30 is the strongest.")
    magnitude_spread: float = Field(0.0, ge=0, le=30, description="The strength is uniform within magnitude ± this.")


class ErasingConfig(Section):
    """A box of one colour over a part of the view (Zhong 2017)."""

    probability: float = Field(0.25, gt=0, le=1, description="Share of the views that are erased in part.")
    area: tuple[float, float] = Field((0.02, 1 / 3), description="Area as a share of the view, drawn uniformly.")
    aspect: tuple[float, float] = Field((0.3, 10 / 3), description="Width / height, drawn log-uniformly.")
    fill: Literal["random"] | tuple[Level, Level, Level] = Field(
        "random", description="Its colour: drawn for each view, or [red, green, blue] from 0 to 255."
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> ErasingConfig:
        _check_area_and_aspect(self.area, self.aspect)
        return self


def _check_area_and_aspect(area: tuple[float, float], aspect: tuple[float, float]) -> None:
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"area is {list(area)}; wanted 0 < low <= high <= 1")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"aspect is {list(aspect)}; wanted 0 < low <= high")


class ViewsConfig(Section):
    """The plan of augmented views. All of it but count and size is part of the views id."""

    kind: Literal["eval", "crop", "function_matching"] = Field("crop", description="See docs/format.md.")
    count: int = Field(1, ge=1, le=65_535, description="V, views per image in a cache.")
    seed: int = Field(0, ge=0, lt=2**63, description="Views are a pure function of it and the sample id.")
    size: int | None = Field(None, ge=1, description="The teacher's input height and width in pixels.")
    area: tuple[float, float] = Field((0.05, 1.0), description="Box area as a share of the image, drawn uniformly.")
    aspect: tuple[float, float] = Field((0.75, 4 / 3), description="Box width / height, drawn log-uniformly.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    crop_fraction: float = Field(0.875, gt=0, le=1, description="Eval views: side of the centred box / shorter edge.")
    mix_group: int = Field(256, ge=2, description="Consecutive ok rows among which mixup partners are matched.")
    # Null options are left out of the views id, so a further one leaves the ids of present plans as they are.
    jitter: JitterConfig | None = Field(None, description="Colour jitter of the flipped crop.")
    randaugment: RandAugmentConfig | None = Field(None, description="RandAugment, after jitter.")
    erasing: ErasingConfig | None = Field(None, description="Random erasing, last of what is done to a view alone.")
    cutmix: float | None = Field(
        None, gt=0, le=1, description="Share of the mixed rows that show their partner in a box instead of a blend."
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> ViewsConfig:
        _check_area_and_aspect(self.area, self.aspect)
        if self.kind == "eval" and self.count != 1:
            raise ValueError(f"kind eval has one view, count is {self.count}")
        if self.kind == "eval" and (named := [name for name in _AUGMENTING if getattr(self, name) is not None]):
            raise ValueError(f"kind eval is never augmented, but {', '.join(named)} is set")
        if self.cutmix is not None and not self.mixes:
            raise ValueError(f"cutmix needs partners, and kind {self.kind} mixes nothing; wanted function_matching")
        return self

    @property
    def mixes(self) -> bool:
        return self.kind == "function_matching"


class StudentConfig(ModelConfig):
    """The network that learns."""

    size: int | None = Field(None, ge=1, description="Input height and width in pixels; default views.size.")
    views: ViewsConfig | None = Field(
        None, description="Views of the student alone, drawn anew each epoch; null: it sees what its teacher sees."
    )

    @model_validator(mode="after")
    def _check_views(self) -> StudentConfig:
        if self.views is None:
            return self
        if self.views.mixes:
            raise ValueError("views mix images, but the teacher's words are of one image alone; wanted crop or eval")
        # By value, since a run's own copy of its config names every key.
        defaults = {name: ViewsConfig.model_fields[name].default for name in ("count", "size")}
        if named := [name for name, default in defaults.items() if getattr(self.views, name) != default]:
            raise ValueError(
                f"views has {', '.join(named)}, which it does not take: every epoch has a view, in student.size"
            )
        return self


class CacheConfig(Section):
    """What is kept of the teacher's words, and where."""

    url: str = Field(description="Folder of the cache; any allowed URL.")
    logits: str = Field("fp16", description="fp32, fp16, int8, int4, topk:k or none: encoding of the logits.")
    embeddings: Literal["fp32", "fp16", "int8", "none"] = Field("none", description="Of the penultimate embedding.")
    class_means: str = Field(
        "none", min_length=1, description="none, eval (one extra eval pass), view0, or the URL of ND's JSON."
    )
    views_per_part: int = Field(5, ge=1, le=500, description="Views in one part: the unit of work and of loss.")

    @field_validator("logits")
    @classmethod
    def _check_logits(cls, logits: str) -> str:
        if not re.fullmatch(r"fp32|fp16|int8|int4|none|topk:[1-9][0-9]*", logits):
            raise ValueError(f"logits is {logits!r}; wanted fp32, fp16, int8, int4, none or topk:k, such as topk:16")
        return logits

    @property
    def class_means_url(self) -> str | None:
        """Where class means come from that the build does not make itself."""
        return None if self.class_means in ("none", "eval", "view0") else self.class_means


class LossSection(Section):
    """One term of the total loss."""

    weight: float = Field(1.0, ge=0, description="Factor of this term in the total.")
    warmup_epochs: int = Field(0, ge=0, description="The weight is scaled by min(1, epoch / warmup_epochs), 0-based.")


class CeLoss(LossSection):
    """Cross-entropy against the labels."""

    name: Literal["ce"]
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")


class KdLoss(LossSection):
    """Hinton 2015; FunMatch is this term alone."""

    name: Literal["kd"]
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")


class DistLoss(LossSection):
    """DIST, Huang 2022."""

    name: Literal["dist"]
    temperature: float = Field(1.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    inter_weight: float = Field(1.0, ge=0, description="β: relations among the classes of one sample.")
    intra_weight: float = Field(1.0, ge=0, description="γ: relations among the samples of one class.")
    gather: bool = Field(False, description="Relations over the global batch instead of each rank's own rows.")


class DkdLoss(LossSection):
    """DKD, Zhao 2022."""

    name: Literal["dkd"]
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    alpha: float = Field(1.0, ge=0, description="Weight of TCKD: target against not target.")
    beta: float = Field(8.0, ge=0, description="Weight of NCKD: the other classes among themselves.")


class HardLoss(LossSection):
    """Cross-entropy against the teacher's argmax."""

    name: Literal["hard"]


class NdLoss(LossSection):
    """Norm and direction, Wang 2023; needs class means and embedding norms."""

    name: Literal["nd"]


class ReviewKdLoss(LossSection):
    """ReviewKD, Chen 2021: feature maps of both networks; needs the teacher online."""

    name: Literal["review_kd"]
    student_layers: tuple[str, ...] = Field(
        min_length=1, description="Dotted names as in network.named_modules(), shallow to deep."
    )
    teacher_layers: tuple[str, ...] = Field(min_length=1, description="One beside each of the student's.")
    mid_channels: int = Field(256, ge=1, description="Channels in which levels are fused; most of the loss's cost.")
    embedding: bool = Field(True, description="The pooled embeddings are one more level, the deepest.")

    @model_validator(mode="after")
    def _check_pairs(self) -> ReviewKdLoss:
        pairs = len(self.student_layers), len(self.teacher_layers)
        if pairs[0] != pairs[1]:
            raise ValueError(f"{pairs[0]} student_layers and {pairs[1]} teacher_layers; wanted one beside each")
        for key in ("student_layers", "teacher_layers"):
            layers: tuple[str, ...] = getattr(self, key)
            if len({*layers}) < len(layers):
                raise ValueError(f"{key} names a layer twice: {', '.join(layers)}")
        return self


class SifnLoss(LossSection):
    """Longer embeddings step by step, whatever the teacher says; an ablation of the ND paper."""

    name: Literal["sifn"]
    increase: float = Field(1.0, gt=0, description="r: by how much the embedding's norm is to grow.")


class CosineLoss(LossSection):
    """1 - cosine of the student's and the teacher's embedding; needs cached embeddings or a teacher online."""

    name: Literal["cosine"]


class MseLoss(LossSection):
    """Mean squared difference of the same."""

    name: Literal["mse"]


LossConfig = Annotated[
    CeLoss | KdLoss | DistLoss | DkdLoss | HardLoss | NdLoss | SifnLoss | CosineLoss | MseLoss | ReviewKdLoss,
    Field(discriminator="name"),
]


class TrainConfig(Section):
    """Optimiser, schedule and order of training."""

    epochs: int = Field(1, ge=1, description="Passes over the training rows; epoch e sees one view of each.")
    global_batch_size: int = Field(256, ge=1, description="G, rows per optimiser step over all ranks.")
    accumulate: int = Field(1, ge=1, description="Micro-batches that a rank's rows of a full step are cut into.")
    precision: Precision = Field(
        "fp32", description="Below fp32: autocast, under fp16 with a scaled loss; losses stay fp32."
    )
    optimizer: Optimizer = Field("adamw", description="From torch, timm (lamb, rmsprop_tf), pytorch_optimizer (soap).")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and rmsprop_tf.")
    nesterov: bool = Field(False, description="sgd alone.")
    betas: tuple[Share, Share] | None = Field(
        None, description="adamw, lamb, soap: decay a step of both moments; default: the optimiser's own."
    )
    eps: float | None = Field(
        None, gt=0, description="All but sgd: added to the divisor; default: the optimiser's own."
    )
    alpha: Share | None = Field(
        None, description="rmsprop_tf: decay a step of the squared gradient; default: the optimiser's own."
    )
    weight_decay: float = Field(0.0, ge=0, description="On weights of two or more dimensions only.")
    warmup_steps: int = Field(0, ge=0, description="Step s of the warm-up has (s + 1) / warmup_steps of lr.")
    schedule: Literal["cosine", "constant", "step", "exponential"] = Field(
        "cosine", description="After warm-up; cosine ends at 0."
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="step: after each of these epochs, counted from the start, lr is multiplied by gamma."
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step and exponential: factor of lr.")
    decay_epochs: float | None = Field(None, gt=0, description="exponential: epochs between two factors gamma.")
    clip_norm: float | None = Field(None, gt=0, description="Global gradient norm.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay a step of averaged weights, which are then evaluated and kept as the model.",
    )
    freeze: tuple[str, ...] = Field((), description="Modules or parameters of the student, by name, that do not learn.")
    compile: bool = Field(False, description="torch.compile of the student.")
    channels_last: bool | None = Field(
        None, description="Memory layout of the student. Default: channels-last unless its backward can crash on a CPU."
    )
    deterministic: bool = Field(False, description="Deterministic algorithms alone, in all of torch.")
    seed: int = Field(0, ge=0, lt=2**63, description="Initial weights, order, dropout.")
    order: Literal["global", "pinned"] = Field("global", description="Shards permuted per epoch, or by the seed alone.")
    lanes: int | None = Field(None, ge=1, description="C; default: the largest divisor of G (pairs: G/2) up to 64.")
    tail: Literal["drop", "short"] = Field("drop", description="Rows beyond the last full global batch.")
    num_workers: int = Field(0, ge=0, description="Loader processes per rank.")
    eval_every_epochs: int = Field(1, ge=0, description="0: only after the last epoch.")
    eval_agreement: bool | None = Field(
        None,
        description="Agreement with the teacher in each evaluation; true: from a cache too, of the teacher that is "
        "named beside it. Default: of one online teacher.",
    )
    checkpoint_every_epochs: int = Field(1, ge=1, description="How much a killed run loses at most.")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="The same within long epochs.")
    keep_every_epochs: int | None = Field(None, ge=1, description="Epochs between checkpoints that are never replaced.")
    tensorboard: bool = Field(False, description="Event files in <run url>/tensorboard.")

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(one >= other for one, other in pairwise(milestones)):
            raise ValueError(f"milestones are {list(milestones)}; wanted each epoch once, in ascending order")
        return milestones

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        for schedule, key in (("step", "milestones"), ("exponential", "decay_epochs")):
            given = bool(getattr(self, key))
            if given and self.schedule != schedule:
                raise ValueError(f"{key} is for schedule {schedule}, and the schedule is {self.schedule}")
            if not given and self.schedule == schedule:
                raise ValueError(f"schedule {schedule} needs {key}")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> TrainConfig:
        for key in ("betas", "eps", "alpha"):
            if getattr(self, key) is not None and key not in _OPTIMIZER_KEYS[self.optimizer]:
                takers = [name for name, keys in _OPTIMIZER_KEYS.items() if key in keys]
                raise ValueError(f"{key} is for {', '.join(takers)}, and the optimizer is {self.optimizer}")
        return self


class RunConfig(Section):
    """Where a training run lives."""

    url: str = Field(description="Folder of the run; any allowed URL.")


class RayConfig(Section):
    """How work is spread."""

    address: str = Field("local", description="local, auto, none (no Ray: one process), or ray://host:port.")
    cpus_per_task: int = Field(1, ge=1, description="CPUs of one cache task; also its decode threads.")
    gpus_per_task: float = Field(0, ge=0, description="GPUs of one cache task; a fraction lets tasks share one.")
    resources_per_task: dict[str, float] = Field(
        default_factory=dict, description="Of the cluster's own resources, for one cache task, by name."
    )
    wait_s: float = Field(0, ge=0, description="Seconds to wait for nodes that an autoscaler is to add.")
    max_retries: int = Field(
        3, ge=0, description="Per part, for crashed workers and failing storage; five times as many for lost nodes."
    )
    part_timeout_s: float | None = Field(
        None, gt=0, description="Seconds after which an attempt at a part is ended and retried; null: never."
    )
    num_workers: int = Field(1, ge=1, description="DDP world size.")
    min_workers: int | None = Field(None, ge=1, description="The smallest world to go on in; null: num_workers.")
    resize_every_s: float = Field(300, gt=0, description="Seconds between looks for room for more workers.")
    cpus_per_worker: int = Field(1, ge=1, description="CPUs of one DDP worker.")
    use_gpu: bool = Field(False, description="One GPU per DDP worker, NCCL; else gloo.")
    max_failures: int = Field(0, ge=0, description="Restarts of a training whose worker died.")

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if address not in ("local", "auto", "none") and not _RAY_ADDRESS.fullmatch(address):
            raise ValueError(f"address is {address!r}; wanted local, auto, none, HOST:PORT or ray://HOST:PORT")
        return address

    @field_validator("resources_per_task")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(
                    f"{name} is Ray's own; wanted cpus_per_task, gpus_per_task, or the cluster's own names"
                )
            # Ray shares a unit among tasks, and gives several only as a whole; it counts in ten-thousandths.
            if not (0.0001 <= amount <= 1 or (amount >= 1 and amount == int(amount))):
                raise ValueError(f"{name} is {amount:g}; wanted 0.0001 to 1, or a whole number")
        return resources

    @model_validator(mode="after")
    def _check_part_timeout(self) -> RayConfig:
        if self.part_timeout_s is not None and self.address == "none":
            raise ValueError(
                "part_timeout_s ends a process of Ray, and address is none; wanted null, or another address"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> RayConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}; wanted at most num_workers, {self.num_workers}")
        return self


class Config(Section):
    """The one document. ``require`` says which sections a command cannot do without."""

    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig.model_validate({}))
    views: ViewsConfig = Field(default_factory=lambda: ViewsConfig.model_validate({}))
    cache: CacheConfig | None = None
    student: StudentConfig | None = None
    loss: tuple[LossConfig, ...] = ()
    train: TrainConfig = Field(default_factory=lambda: TrainConfig.model_validate({}))
    run: RunConfig | None = None
    ray: RayConfig = Field(default_factory=lambda: RayConfig.model_validate({}))

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, loss: tuple[LossSection, ...]) -> tuple[LossSection, ...]:
        if loss and not any(term.weight for term in loss):
            raise ValueError("every weight is 0, so there is nothing to learn")
        return loss
