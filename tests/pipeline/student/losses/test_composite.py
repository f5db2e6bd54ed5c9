"""The composition: weights of the terms by epoch, and gradients of ranks that add up to those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.student.losses import (
    LOSSES,
    PARAMETERS,
    BatchShare,
    ClassDirections,
    CompositeLoss,
    LossInputs,
    Parameter,
    TeacherInputs,
    ce,
    cosine,
    dist,
    dkd,
    hcl,
    kd,
    mse,
    nd,
    sifn,
)
from pipeline.tasks import TargetColumn
from pipeline.tasks.classification import Classification
from schemas.config import Config, HeadLossSection
from tests.errors import raises
from tests.pipeline.student.losses.batches import SEEDS, batch_share, law, loss_inputs, teacher_outputs
from tests.tolerances import log_softmax_error, ulps

K, D, WIDTH = 5, 4, 3
TASK = Classification("cls", K)
WEIGHTS_FN = torch.linspace(-1, 1, WIDTH * (K + D)).reshape(WIDTH, K + D)
CE = {"name": "ce", "label_smoothing": 0.1}
KD_PLUS_PLUS = [
    CE,
    {"name": "kd", "weight": 2.5, "temperature": 4.0, "warmup_epochs": 4},
    {"name": "nd", "weight": 0.5},
]
REVIEW = {"name": "review_kd", "weight": 3.0, "student_layers": ["a", "b"], "teacher_layers": ["c", "d"]}
REVIEW_PLUS_PLUS = [CE, REVIEW, {"name": "nd", "weight": 0.5}]
DKD_PLUS_PLUS = [
    CE,
    {"name": "dkd", "alpha": 2.5, "beta": 4.0, "warmup_epochs": 4},
    {"name": "nd", "weight": 3.5},
]
DIST = {"name": "dist", "weight": 2.0, "temperature": 4.0, "inter_weight": 0.25, "intra_weight": 3.0}
DIST_PLUS_PLUS = [CE, DIST, {"name": "nd"}]
OTHER_LOSSES = [
    *({"name": name} for name in ("hard", "cosine", "mse", "token_cosine", "token_mse")),
    {"name": "sifn", "increase": 0.5},
]
PROJECTED = ("nd", "cosine", "mse", "smooth_l1")


def compose(*sections: dict[str, Any]) -> CompositeLoss:
    return CompositeLoss(Config.model_validate({"loss": list(sections)}).loss, TASK, where="a test")


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of a global batch for a linear student; rows 2i and 2i+1 are mixed where it is mixed."""

    features_BF: Tensor
    labels_B: Tensor
    teacher_BK: Tensor
    teacher_BD: Tensor
    lambda_B: Tensor | None
    class_means_KD: Tensor

    @classmethod
    def random(cls, seed: int, num_rows: int, *, missing: float, mixed: bool) -> GlobalBatch:
        generator = torch.Generator().manual_seed(seed)
        labels_B = torch.randint(K, (num_rows,), generator=generator)
        labels_B[torch.rand(num_rows, generator=generator) < missing] = -1
        return cls(
            torch.randn(num_rows, WIDTH, generator=generator),
            labels_B,
            torch.randn(num_rows, K, generator=generator),
            torch.randn(num_rows, D, generator=generator),
            0.5 + torch.rand(num_rows, generator=generator) / 2 if mixed else None,
            torch.randn(K, D, generator=generator),
        )

    def inputs(self, rows: slice, weights_FN: Tensor) -> LossInputs:
        student_BN = self.features_BF[rows] @ weights_FN
        return loss_inputs(
            student_BN[:, :K],
            self.labels_B[rows],
            embedding_BD=student_BN[:, K:],
            teachers=(
                TeacherInputs(
                    outputs=teacher_outputs(
                        {None: self.teacher_BK[rows]},
                        self.teacher_BD[rows].norm(dim=1),
                        self.teacher_BD[rows],
                        _as_tokens(self.teacher_BD[rows]),
                    ),
                    projected=dict.fromkeys(PROJECTED, student_BN[:, K:])
                    | dict.fromkeys(("token_cosine", "token_mse"), _as_tokens(student_BN[:, K:])),
                    class_directions={"label": ClassDirections.of(self.class_means_KD)},
                    student_maps=_as_maps(student_BN),
                    teacher_maps=_as_maps(self.teacher_BK[rows]),
                ),
            ),
            partner_B=None if self.lambda_B is None else _partners(student_BN),
            lambda_B=None if self.lambda_B is None else self.lambda_B[rows],
        )


def _partners(rows_BN: Tensor) -> Tensor:
    """int64 ``[B]``: rows 2i and 2i + 1 are partners."""
    return torch.arange(len(rows_BN)) ^ 1


def _as_maps(x_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The first numbers of each row as a level of four positions and one of one."""
    return x_BN[:, :4].reshape(-1, 1, 2, 2), x_BN[:, :3, None, None]


def _as_tokens(x_BD: Tensor) -> Tensor:
    """Two positions: each row, and the same with zeros in its second half."""
    return torch.stack([x_BD, x_BD * (torch.arange(D) < D // 2)], dim=1)


def gradient(loss: CompositeLoss, batch: GlobalBatch, sizes: Sequence[int]) -> Tensor:
    """The mean over ranks of the gradient by the student's weights: what DDP hands to the optimiser."""
    weights_FN = WEIGHTS_FN.clone().requires_grad_()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    ranks = [batch.inputs(slice(end - size, end), weights_FN) for end, size in zip(ends, sizes, strict=True)]
    num_labelled_global = torch.stack([num_labelled(rank) for rank in ranks]).sum()
    gradients: list[Tensor] = []
    for rank, size in zip(ranks, sizes, strict=True):
        share = batch_share(
            world_size=len(sizes),
            num_rows=size,
            num_rows_global=sum(sizes),
            num_labelled=num_labelled(rank),
            num_labelled_global=num_labelled_global,
        )
        total, values = loss(rank, share, epoch=1)
        assert not any(value.requires_grad for value in values.values())
        gradients.append(torch.autograd.grad(total, weights_FN, retain_graph=True)[0])
    return torch.stack(gradients).mean(dim=0)


def gradient_error(batch: GlobalBatch, sections: Sequence[dict[str, Any]], num_ranks: int) -> float:
    """The largest error of an entry of ``gradient``: a mean over rows of features times gradients of logits, embeddings
    and maps.

    Logits: differences of probabilities, times T. Embeddings: differences of two unit vectors over a norm, in at most
    40 operations, of which the rounding grows where the sums that make the embedding, or a mixed class mean, cancel.
    Squared errors: twice the difference. Then the shares of the ranks and the sums over rows and ranks.
    """
    features_BF, weights_FN = batch.features_BF.double(), WEIGHTS_FN.double()
    student_BN = features_BF @ weights_FN
    norm_B = student_BN[:, K:].norm(dim=1)
    cancelled_B = (features_BF.abs() @ weights_FN.abs())[:, K:].norm(dim=1) / norm_B
    if batch.lambda_B is not None:
        means_BD = batch.class_means_KD[batch.labels_B.clamp_min(0)]
        parts = (
            batch.lambda_B[:, None] * means_BD,
            (1 - batch.lambda_B)[:, None] * means_BD[_partners(means_BD)],
        )
        cancelled_B = cancelled_B + (parts[0].norm(dim=1) + parts[1].norm(dim=1)) / (parts[0] + parts[1]).norm(dim=1)
    temperature = max(section.get("temperature", 1.0) for section in sections)
    of_logits = 2 * temperature * (log_softmax_error(student_BN) + log_softmax_error(batch.teacher_BK) + ulps(K + 12))
    of_embeddings = (ulps(40) * cancelled_B * 2 / norm_B).max().item()
    largest = max(side.abs().max().item() for side in (student_BN, batch.teacher_BD, batch.teacher_BK))
    of_sums = ulps(len(student_BN) + num_ranks + 10, temperature + 2 / norm_B.min().item() + 4 * largest)
    keys = ("weight", "alpha", "beta")
    weight = sum(max(section.get(key, 1.0) for key in keys) for section in sections)
    return features_BF.abs().max().item() * weight * (of_logits + of_embeddings + of_sums)


@law
@given(
    seed=SEEDS,
    pairs=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    missing=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    mixed=st.booleans(),
    sections=st.sampled_from([[*KD_PLUS_PLUS, REVIEW], DKD_PLUS_PLUS, OTHER_LOSSES]),
)
def test_the_mean_over_ranks_of_any_split_is_the_gradient_of_the_global_batch(
    seed: int, pairs: list[int], missing: float, mixed: bool, sections: list[dict[str, Any]]
) -> None:
    sizes = [2 * num if mixed else num for num in pairs]
    batch = GlobalBatch.random(seed, sum(sizes), missing=missing, mixed=mixed)
    loss = compose(*sections)
    # Both are fp32.
    error = gradient_error(batch, sections, len(sizes)) + gradient_error(batch, sections, 1)
    assert (gradient(loss, batch, sizes) - gradient(loss, batch, [sum(sizes)])).abs().max() <= error


class DepthLoss(HeadLossSection):
    """Of a loss on a target that is no label."""

    name: Literal["depth"] = "depth"


class LabelAndDepth(Classification):
    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        return (*super().columns, TargetColumn("depth", pa.int32(), -1))


def depth(student_BK: Tensor, depth_B: Tensor) -> Tensor:
    has_depth_B = depth_B != -1
    return torch.where(has_depth_B, (student_BK.sum(1) - depth_B) ** 2, 0.0).sum() / has_depth_B.sum().clamp_min(1)


def test_each_term_averages_over_the_rows_of_all_ranks_that_have_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "depth", depth)
    monkeypatch.setitem(PARAMETERS, "depth_B", Parameter("target", "depth"))
    task = LabelAndDepth("cls", K)
    loss = CompositeLoss((*Config.model_validate({"loss": [{"name": "ce"}]}).loss, DepthLoss()), task, where="a test")
    assert loss.targets == ("label", "depth")
    student_BK = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    targets = {"label": torch.tensor([0, -1, 2, 1, -1]), "depth": torch.tensor([-1, 4, -1, 1, 2])}

    def total(rows: slice, world_size: int) -> Tensor:
        chunk = {name: target[rows] for name, target in targets.items()}
        share = BatchShare(
            world_size=world_size,
            num_rows=len(chunk["label"]),
            num_rows_global=5,
            num_labelled={name: (target != -1).sum() for name, target in chunk.items()},
            num_labelled_global={"label": 3, "depth": 3},
        )
        return loss(LossInputs(outputs={"logits": student_BK[rows]}, targets=chunk), share, epoch=0)[0]

    by_hand = (
        cross_entropy(student_BK, targets["label"], ignore_index=-1)
        + torch.stack([(student_BK[row].sum() - targets["depth"][row]) ** 2 for row in (1, 3, 4)]).mean()
    )
    torch.testing.assert_close(total(slice(0, 5), 1), by_hand)
    torch.testing.assert_close((total(slice(0, 2), 2) + total(slice(2, 5), 2)) / 2, by_hand)


@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_term_without_a_label_on_any_rank_leaves_the_others_as_they_are(zero: int | Tensor) -> None:
    batch = inputs(missing=1.0)
    share = batch_share(world_size=2, num_rows=6, num_rows_global=12, num_labelled=zero, num_labelled_global=zero)
    total, values = compose({"name": "ce"}, {"name": "kd"})(batch, share, epoch=0)
    torch.testing.assert_close(total, values["kd"])


def num_labelled(inputs: LossInputs) -> Tensor:
    """Rows that have a label, and whose mixup partner has one."""
    labelled_B = inputs.targets["label"] >= 0
    return (labelled_B if inputs.partner_B is None else labelled_B & labelled_B[inputs.partner_B]).sum()


def one_rank(inputs: LossInputs) -> BatchShare:
    num_rows, labelled = len(inputs.targets["label"]), int(num_labelled(inputs))
    return batch_share(
        world_size=1,
        num_rows=num_rows,
        num_rows_global=num_rows,
        num_labelled=labelled,
        num_labelled_global=labelled,
    )


def inputs(*, mixed: bool = False, missing: float = 0.0) -> LossInputs:
    return GlobalBatch.random(0, 6, missing=missing, mixed=mixed).inputs(slice(None), WEIGHTS_FN)


def nd_of(batch: LossInputs, number: int = 0, **mixed: Any) -> Tensor:
    """ND by hand from the parts of the batch."""
    teacher = batch.teachers[number]
    return nd(
        teacher.projected["nd"],
        teacher.outputs.norm_B,
        teacher.class_directions["label"],
        batch.targets["label"],
        **mixed,
    )


def terms_by_hand(batch: LossInputs) -> dict[str, Tensor]:
    """Each term of the compositions above; labels are mixed with those of rows 2i and 2i + 1 for each other."""
    (teacher,) = batch.teachers
    assert teacher.student_maps is not None
    assert teacher.teacher_maps is not None
    mixed: dict[str, Any] = {}
    if batch.lambda_B is not None:
        mixed = {"mixed_labels_B": batch.targets["label"][[1, 0, 3, 2, 5, 4]], "lambda_B": batch.lambda_B}
    logits = batch.outputs["logits"], teacher.outputs.at("logits")
    return {
        "ce": ce(batch.outputs["logits"], batch.targets["label"], label_smoothing=0.1, **mixed),
        "kd": kd(*logits, temperature=4.0),
        "dkd": dkd(*logits, batch.targets["label"], temperature=4.0, alpha=2.5, beta=4.0, **mixed),
        "dist": dist(*logits, temperature=4.0, inter_weight=0.25, intra_weight=3.0),
        "review_kd": hcl(teacher.student_maps, teacher.teacher_maps),
        "nd": nd_of(batch, **mixed),
    }


@pytest.mark.parametrize(
    ("sections", "weights", "is_mixed"),
    [
        # A quarter warm in epoch 1 of 4.
        (KD_PLUS_PLUS, {"ce": 1, "kd": 2.5 / 4, "nd": 0.5}, False),
        (REVIEW_PLUS_PLUS, {"ce": 1, "review_kd": 3, "nd": 0.5}, False),
        (DKD_PLUS_PLUS, {"ce": 1, "dkd": 1 / 4, "nd": 3.5}, True),
        (DIST_PLUS_PLUS, {"ce": 1, "dist": 2, "nd": 1}, False),
    ],
    ids=["KD++", "ReviewKD++", "DKD++", "DIST++"],
)
def test_a_composition_is_the_weighted_sum_of_its_terms(
    sections: list[dict[str, Any]], weights: dict[str, float], is_mixed: bool
) -> None:
    batch = inputs(mixed=True, missing=0.3) if is_mixed else inputs()
    total, values = compose(*sections)(batch, one_rank(batch), epoch=1)
    expected = terms_by_hand(batch)
    torch.testing.assert_close(values, {name: expected[name] for name in weights})
    torch.testing.assert_close(total, torch.stack([weight * expected[name] for name, weight in weights.items()]).sum())


def test_each_loss_on_embeddings_takes_the_embedding_of_its_projector() -> None:
    batch, generator = inputs(), torch.Generator().manual_seed(1)
    projected = {name: torch.randn(6, D, generator=generator) for name in PROJECTED}
    (teacher,) = batch.teachers
    batch = replace(
        batch,
        teachers=(replace(teacher, projected={**teacher.projected, **projected}),),
        outputs={"logits": torch.ones(6, K), "embedding": torch.ones(6, 2)},
    )
    loss = compose(*OTHER_LOSSES, {"name": "nd"})
    assert (loss.projected, [*loss.token_layers]) == (("cosine", "mse", "nd"), ["token_cosine", "token_mse"])
    _, values = loss(batch, one_rank(batch), epoch=0)
    torch.testing.assert_close(values["cosine"], cosine(projected["cosine"], teacher.outputs.at("embedding")))
    torch.testing.assert_close(values["mse"], mse(projected["mse"], teacher.outputs.at("embedding")))
    torch.testing.assert_close(values["nd"], nd_of(batch))
    torch.testing.assert_close(values["sifn"], sifn(torch.ones(6, 2), increase=0.5))


def test_a_gathered_term_is_not_weighted_by_the_rows_of_the_rank() -> None:
    batch = replace(inputs(), sum_over_ranks=lambda sums: sums)
    share = batch_share(world_size=2, num_rows=6, num_rows_global=8, num_labelled=6, num_labelled_global=8)
    total, values = compose({"name": "dist", "gather": True})(batch, share, epoch=0)
    torch.testing.assert_close(total, values["dist"])


@pytest.mark.parametrize(
    ("warmup_epochs", "epoch", "share"),
    [(0, 0, 1.0), (4, 0, 0.0), (4, 1, 0.25), (4, 3, 0.75), (4, 4, 1.0), (4, 9, 1.0)],
)
def test_warm_up_rises_from_zero_in_the_first_epoch_to_the_full_weight(
    warmup_epochs: int, epoch: int, share: float
) -> None:
    batch = inputs()
    loss = compose({"name": "kd", "weight": 3.0, "warmup_epochs": warmup_epochs})
    total, values = loss(batch, one_rank(batch), epoch=epoch)
    torch.testing.assert_close(total, 3 * share * values["kd"])
    assert values["kd"] > 0


def test_terms_of_one_loss_have_separate_names_and_read_the_logits_decoded_for_their_temperatures() -> None:
    batch = inputs()
    outputs = {
        temperature: torch.randn(6, K, generator=torch.Generator().manual_seed(seed))
        for seed, temperature in enumerate((1.0, 4.0))
    }
    batch = replace(batch, teachers=(replace(batch.teachers[0], outputs=teacher_outputs(outputs, torch.ones(6))),))
    loss = compose({"name": "kd", "temperature": 4.0}, {"name": "dist"}, {"name": "kd", "temperature": 1.0})
    assert loss.teacher_outputs == {"logits": (1.0, 4.0)}
    _, values = loss(batch, one_rank(batch), epoch=0)
    assert list(values) == ["kd", "dist", "kd_2"]
    torch.testing.assert_close(values["kd"], kd(batch.outputs["logits"], outputs[4.0], temperature=4.0))
    torch.testing.assert_close(values["dist"], dist(batch.outputs["logits"], outputs[1.0], temperature=1.0))
    torch.testing.assert_close(values["kd_2"], kd(batch.outputs["logits"], outputs[1.0], temperature=1.0))


def with_teachers(batch: LossInputs, num: int) -> LossInputs:
    """The same rows with teachers of different widths."""
    generator = torch.Generator().manual_seed(5)
    teachers = [
        TeacherInputs(
            outputs=teacher_outputs(
                {None: torch.randn(6, K, generator=generator)}, 4 * torch.rand(6, generator=generator)
            ),
            projected={"nd": torch.randn(6, 3 + number, generator=generator)},
            class_directions={"label": ClassDirections.of(torch.randn(K, 3 + number, generator=generator))},
        )
        for number in range(num)
    ]
    return replace(batch, teachers=tuple(teachers))


def test_losses_of_several_teachers_are_summed_and_reported_one_by_one() -> None:
    batch = with_teachers(inputs(), 3)
    total, values = compose({"name": "kd", "weight": 2.0}, {"name": "ce"}, {"name": "nd", "weight": 0.5})(
        batch, one_rank(batch), epoch=0
    )
    kds = [kd(batch.outputs["logits"], teacher.outputs.at("logits"), temperature=4.0) for teacher in batch.teachers]
    nds = [nd_of(batch, number) for number in range(3)]
    expected_ce = ce(batch.outputs["logits"], batch.targets["label"])
    assert list(values) == ["kd", "kd/0", "kd/1", "kd/2", "ce", "nd", "nd/0", "nd/1", "nd/2"]
    for number in range(3):
        torch.testing.assert_close(values[f"kd/{number}"], kds[number])
        torch.testing.assert_close(values[f"nd/{number}"], nds[number])
    torch.testing.assert_close(values["kd"], kds[0] + kds[1] + kds[2])
    # Labels count once for any number of teachers.
    torch.testing.assert_close(values["ce"], expected_ce)
    torch.testing.assert_close(total, 2 * sum(kds) + expected_ce + 0.5 * sum(nds))


def test_logits_that_no_term_reads_get_a_zero_gradient_whatever_they_are() -> None:
    student_BK = torch.full((6, K), torch.inf, requires_grad=True)
    batch = replace(inputs(), outputs={"logits": student_BK})
    total, values = compose({"name": "nd"})(batch, one_rank(batch), epoch=0)
    total.backward()
    assert total == values["nd"]
    assert torch.equal(student_BK.grad, torch.zeros(6, K))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("ce", {"label", "head"}),
        ("cosine", {"embedding", "projector"}),
        ("dist", {"logits", "head"}),
        ("dkd", {"label", "logits", "head"}),
        ("hard", {"logits", "head"}),
        ("kd", {"logits", "head"}),
        ("mse", {"embedding", "projector"}),
        ("nd", {"label", "class means", "projector"}),
        ("review_kd", set[str]()),
        ("sifn", set[str]()),
        ("similarity", {"embedding"}),
        ("smooth_l1", {"embedding", "projector"}),
        ("token_cosine", {"tokens"}),
        ("token_mse", {"tokens"}),
    ],
)
def test_a_loss_declares_what_it_needs(name: str, needs: set[str]) -> None:
    loss = compose(REVIEW if name == "review_kd" else {"name": name})
    flags = {"class means": bool(loss.heads_of_class_means), "projector": loss.projected, "head": loss.trains_head}
    assert {*loss.targets, *loss.teacher_outputs, *(name for name, flag in flags.items() if flag)} == needs


def test_every_registered_loss_can_be_built_from_its_required_keys_alone_and_called() -> None:
    """Only layers of feature maps have no default."""
    batch = inputs()
    required = {"review_kd": {key: REVIEW[key] for key in ("student_layers", "teacher_layers")}}
    for name in LOSSES:
        total, _ = compose({"name": name, **required.get(name, {})})(batch, one_rank(batch), epoch=0)
        assert total.isfinite()


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ({"name": "nd"}, "class_directions, student_BD, teacher_norm_B"),
        ({"name": "kd", "temperature": 2.0}, "teacher_BK"),
        ({"name": "dist", "gather": True}, "sum_over_ranks, teacher_BK"),
        ({"name": "similarity", "gather": True}, "embedding_BD, join_over_ranks, teacher_BD"),
    ],
)
def test_missing_inputs_of_a_term_are_refused_by_name(section: dict[str, Any], missing: str) -> None:
    batch = loss_inputs(torch.zeros(2, K), torch.zeros(2, dtype=torch.int64))
    with raises("loss.missing-input", got=f"None for {missing}"):
        compose(section)(batch, one_rank(batch), epoch=0)


def test_an_empty_loss_section_is_refused_with_an_example() -> None:
    with raises("config.no-loss", where="train.yaml") as caught:
        CompositeLoss((), TASK, where="train.yaml")
    assert "name: kd" in str(caught.value.next_step)
