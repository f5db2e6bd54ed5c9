"""``loss``: one section for each loss."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section

# Keys of sections that are no arguments of the loss.
_NOT_ARGUMENTS = frozenset({"name", "weight", "warmup_epochs", "heads", "allow_two_classes"})


class LossSection(Section):
    """One term of the total loss."""

    network_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that define modules or outputs of the networks."""

    weight: float = Field(1.0, ge=0, description="Factor of this term in the total.")
    warmup_epochs: int = Field(0, ge=0, description="The weight is scaled by min(1, epoch / warmup_epochs), 0-based.")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the loss that the section determines, by name."""
        return self.model_dump(exclude={*_NOT_ARGUMENTS, *self.network_keys})

    @property
    def relates_rows(self) -> bool:
        """Whether the loss compares rows of a batch with each other; others are means over rows."""
        return False


class HeadLossSection(LossSection):
    """One term that is computed for heads, each with its logits or its target, and summed over them."""

    heads: tuple[str, ...] = Field(
        (), description="task heads: the names of the heads; default: all of a kind that the loss takes."
    )


class RelationLossSection(HeadLossSection):
    """A loss on the relations among classes, of which a head of two classes has none."""

    allow_two_classes: bool = Field(
        False, description="Train heads of two classes too, whose relations are empty: for measurements."
    )


class PriorConfig(Section):
    """Logit adjustment with a factor."""

    tau: float = Field(1.0, ge=0, description="Factor of the logarithms of the classes' frequencies.")


class CeLoss(HeadLossSection):
    """Cross-entropy against the labels."""

    name: Literal["ce"]
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    prior: Literal["balanced"] | PriorConfig | None = Field(
        None, description="balanced, or {tau: 1.0}: logits plus tau times the logarithms of the classes' frequencies."
    )
    aux_weight: float = Field(
        0.0, ge=0, description="task segmentation: factor of the same loss of the student's auxiliary head."
    )


class BceLoss(HeadLossSection):
    """Binary cross-entropy against the labels of multilabel heads."""

    name: Literal["bce"]
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="ε: a target t becomes t · (1 - ε) + ε / 2.")


class KdLoss(HeadLossSection):
    """Hinton 2015; FunMatch is this term alone. Sigmoids of multilabel heads, else softmaxes."""

    name: Literal["kd"]
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    aux_weight: float = Field(
        0.0, ge=0, description="task segmentation: factor of the same loss of the student's auxiliary head."
    )


class DistLoss(RelationLossSection):
    """DIST, Huang 2022."""

    name: Literal["dist"]
    temperature: float = Field(1.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    inter_weight: float = Field(1.0, ge=0, description="β: relations among the classes of one sample.")
    intra_weight: float = Field(1.0, ge=0, description="γ: relations among the samples of one class.")
    gather: bool = Field(False, description="Relations over the global batch instead of the rows of each rank.")
    aux_weight: float = Field(
        0.0, ge=0, description="task segmentation: factor of the same loss of the student's auxiliary head."
    )

    @property
    def relates_rows(self) -> bool:
        return self.intra_weight > 0


class CwdLoss(HeadLossSection):
    """CWD, Shu 2021: softmaxes over the positions of a class."""

    name: Literal["cwd"]
    temperature: float = Field(1.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    aux_weight: float = Field(
        0.0, ge=0, description="task segmentation: factor of the same loss of the student's auxiliary head."
    )


class DkdLoss(RelationLossSection):
    """DKD, Zhao 2022."""

    name: Literal["dkd"]
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is scaled by T².")
    alpha: float = Field(1.0, ge=0, description="Weight of TCKD: target class against the others.")
    beta: float = Field(8.0, ge=0, description="Weight of NCKD: relations among the other classes.")


class HardLoss(HeadLossSection):
    """Cross-entropy against the teacher's argmax."""

    name: Literal["hard"]


class NdLoss(HeadLossSection):
    """Norm and direction, Wang 2023; needs class means and embedding norms."""

    name: Literal["nd"]


class ReviewKdLoss(LossSection):
    """ReviewKD, Chen 2021: feature maps of both networks; needs an online teacher."""

    network_keys: ClassVar[frozenset[str]] = frozenset(
        {"student_layers", "teacher_layers", "mid_channels", "embedding"}
    )

    name: Literal["review_kd"]
    student_layers: tuple[str, ...] = Field(
        min_length=1, description="Dotted names as in network.named_modules(), shallow to deep."
    )
    teacher_layers: tuple[str, ...] = Field(min_length=1, description="One for each of student_layers.")
    mid_channels: int = Field(
        256, ge=1, description="Channels of the fused levels; they determine most of the cost of the loss."
    )
    embedding: bool = Field(True, description="Use the pooled embeddings as one more level, the deepest.")

    @model_validator(mode="after")
    def _check_pairs(self) -> ReviewKdLoss:
        pairs = len(self.student_layers), len(self.teacher_layers)
        if pairs[0] != pairs[1]:
            raise ValueError(f"{pairs[0]} student_layers and {pairs[1]} teacher_layers; expected the same number")
        for key in ("student_layers", "teacher_layers"):
            layers: tuple[str, ...] = getattr(self, key)
            if len({*layers}) < len(layers):
                raise ValueError(f"{key} names a layer twice: {', '.join(layers)}")
        return self


class SifnLoss(LossSection):
    """Increases the norm of embeddings step by step, independent of the teacher; an ablation of the ND paper."""

    name: Literal["sifn"]
    increase: float = Field(1.0, gt=0, description="r: target increase of the embedding norm.")


class CosineLoss(LossSection):
    """1 - cosine of the student's and the teacher's embedding; needs cached embeddings or an online teacher."""

    name: Literal["cosine"]


class MseLoss(LossSection):
    """Mean squared difference of the student's and the teacher's embedding; needs the same."""

    name: Literal["mse"]


class SmoothL1Loss(LossSection):
    """Mean squared difference of the embeddings below beta, mean absolute difference above; needs the same."""

    name: Literal["smooth_l1"]
    beta: float = Field(
        1.0, gt=0, description="Where the square turns into an absolute value, in units of the embedding."
    )


class TokenLossSection(LossSection):
    """A loss on patch tokens."""

    network_keys: ClassVar[frozenset[str]] = frozenset({"student_layer"})

    student_layer: str = Field(
        "norm", min_length=1, description="The student's layer whose positions are its tokens, in named_modules()."
    )


class TokenCosineLoss(TokenLossSection):
    """1 - cosine of the student's and the teacher's patch tokens; needs cached tokens or an online teacher."""

    name: Literal["token_cosine"]


class TokenMseLoss(TokenLossSection):
    """Mean squared difference of the student's and the teacher's patch tokens; needs the same."""

    name: Literal["token_mse"]


class SimilarityLoss(LossSection):
    """SEED, Fang 2021: similarities to the other rows of the batch, as probabilities; needs the same."""

    name: Literal["similarity"]
    student_temperature: float = Field(0.1, gt=0, description="T of the softmax of the student's cosines.")
    teacher_temperature: float = Field(0.05, gt=0, description="T of the softmax of the teacher's cosines.")
    gather: bool = Field(False, description="Relations over the global batch instead of the rows of each rank.")

    @property
    def relates_rows(self) -> bool:
        return True


LossConfig = Annotated[
    CeLoss
    | BceLoss
    | KdLoss
    | DistLoss
    | CwdLoss
    | DkdLoss
    | HardLoss
    | NdLoss
    | SifnLoss
    | CosineLoss
    | MseLoss
    | SmoothL1Loss
    | SimilarityLoss
    | TokenCosineLoss
    | TokenMseLoss
    | ReviewKdLoss,
    Field(discriminator="name"),
]
