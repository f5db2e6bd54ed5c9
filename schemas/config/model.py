"""``teacher`` and ``student``: a network, its weights and its input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section, Triple
from schemas.config.size import SizeKey
from schemas.config.views import ViewsConfig

Precision = Literal["fp32", "bf16", "fp16"]
Interpolation = Literal["bilinear", "bicubic"]
Standardize = Literal["none", "mean_std", "phi_s"]


class ModelConfig(Section):
    """How to build a network, and its input. Mean, std and size default to the values in the model's config."""

    model: str | None = Field(None, description="timm/NAME, torchvision/NAME or python:package.module:factory.")
    weights: str | None = Field("random", description="pretrained, random, or URL of .safetensors/.pt (weights_only).")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Checked before a weights URL is loaded.")
    mean: Triple | None = Field(None, description="Per-channel mean of [0,1] RGB.")
    std: Triple | None = Field(None, description="Per-channel standard deviation of [0,1] RGB.")
    interpolation: Interpolation | None = Field(
        None, description="Interpolation that resizes the crop box to the input."
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed on to the model's constructor.")

    @property
    def weights_url(self) -> str | None:
        """The URL in ``weights``, if it is one."""
        return None if self.weights in ("random", "pretrained") else self.weights


class TeacherModelConfig(ModelConfig):
    """A network that produces teacher outputs."""

    weights: str | None = Field(
        None, description="pretrained, random, or URL of .safetensors/.pt (weights_only). A teacher has no default."
    )
    precision: Precision = Field("fp32", description="Arithmetic of the forward pass (autocast below fp32).")
    batch_size: int = Field(64, ge=1, description="Rows per forward; the last batch of a mix group is padded to it.")
    heads: tuple[str, ...] | None = Field(
        None, min_length=1, description="task heads: the heads that the teacher has, from data.heads; null: all."
    )
    embedding: Literal["penultimate", "output"] = Field(
        "penultimate",
        description="With text_head or task embedding: pooled features, or the output of timm's classifier (a CLIP "
        "tower's projection).",
    )
    text_head: str | None = Field(
        None, min_length=1, description="URL of class embeddings (.safetensors), which make logits of the embedding."
    )
    text_head_sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Checked before text_head is loaded."
    )
    tokens_layer: str | None = Field(
        None, min_length=1, description="Layer whose positions are the patch tokens, in named_modules(); default norm."
    )
    tokens_grid: int | None = Field(
        None, ge=1, description="mode online: side of the grid to which tokens are pooled; null: that of the layer."
    )
    class_means: str | None = Field(
        None, min_length=1, description="mode online, for nd: URL of a finished cache of this teacher with class means."
    )
    moments: str | None = Field(
        None, min_length=1, description="mode online, for standardize: URL of a cache of this teacher with moments."
    )


class OtherTeacherConfig(TeacherModelConfig):
    """A further online teacher."""

    size: SizeKey | None = Field(
        None, description="Input height and width in pixels; default views.size, else that of the model."
    )


class TeacherConfig(TeacherModelConfig):
    """The teacher, or the first of several."""

    mode: Literal["none", "cache", "online"] = Field("cache", description="Source of the supervision in training.")
    others: tuple[OtherTeacherConfig, ...] = Field(
        (), description="mode online: further teachers, for the same views; losses are summed over all."
    )
    standardize: Standardize | tuple[Standardize, ...] = Field(
        "none",
        description="Embeddings as losses compare them: mean_std or phi_s, by stored moments; or a list, one for each "
        "teacher.",
    )
    loss_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), description="Factor of the losses of each teacher, in the order of data.cache or teacher.others; default 1."
    )

    def standardizations(self, num_teachers: int) -> tuple[Standardize, ...]:
        """``standardize`` of each teacher."""
        return (self.standardize,) * num_teachers if isinstance(self.standardize, str) else self.standardize

    @property
    def standardizes(self) -> bool:
        """Whether losses take the embeddings of any teacher standardised."""
        return self.standardize not in ("none", ()) and {*self.standardizations(1)} != {"none"}

    @property
    def models(self) -> dict[str, TeacherModelConfig]:
        """All teachers of mode online, by the names of their sections."""
        return {"teacher": self, **{f"teacher.others.{number}": other for number, other in enumerate(self.others)}}


class StudentConfig(ModelConfig):
    """The network that is trained."""

    weights: str | None = Field(
        "random", description="pretrained, random, or URL of .safetensors/.pt (weights_only), or of a run."
    )
    size: SizeKey | None = Field(None, description="Input height and width in pixels; default views.size.")
    views: ViewsConfig | None = Field(
        None, description="Separate views for the student, new in each epoch; null: the views of the teacher."
    )

    @model_validator(mode="after")
    def _check_views(self) -> StudentConfig:
        if self.views is None:
            return self
        if self.views.kind == "scale_crop":
            raise ValueError(
                "views are of kind scale_crop, whose boxes depend on the teacher's input; expected crop or eval"
            )
        if self.views.mixes:
            raise ValueError("views mix images, but teacher outputs are per image; expected crop or eval")
        # By value, because the stored config of a run has every key.
        defaults = {name: ViewsConfig.model_fields[name].default for name in ("count", "size")}
        if named := [name for name, default in defaults.items() if getattr(self.views, name) != default]:
            raise ValueError(
                f"views has {', '.join(named)}, which it does not take: every epoch has a view, in student.size"
            )
        return self
