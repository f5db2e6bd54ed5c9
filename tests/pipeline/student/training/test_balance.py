"""Imbalanced classes: priors, weights of rows, and the gradients of single terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from pipeline.student.distributed import DistributedContext
from pipeline.student.losses import ce
from pipeline.student.networks.student import StudentOutputs
from pipeline.student.supervision.class_frequencies import class_weights
from pipeline.student.training.config_checks import check_config
from pipeline.student.training.gradients import with_row_weights
from pipeline.student.training.setup import prepare
from pipeline.student.training.train_step import TrainStep
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.losses.batches import batch_share, loss_inputs
from tests.pipeline.student.runs import SMALL, metrics, run, run_config

CE = {"name": "ce"}


def test_ce_with_a_prior_is_the_cross_entropy_of_shifted_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BK, labels_B = torch.randn(5, 3, generator=generator), torch.tensor([0, 2, 1, -1, 0])
    prior_K = torch.tensor([0.7, 0.2, 0.1])
    for prior, tau in (("balanced", 1.0), ({"tau": 0.5}, 0.5)):
        # Of softmax(z)_k · prior_k^tau, normalised.
        expected = cross_entropy(logits_BK.double() + tau * prior_K.double().log(), labels_B, ignore_index=-1)
        found = ce(logits_BK, labels_B, prior=prior, log_prior_K=prior_K.log())
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(ce(logits_BK, labels_B, prior={"tau": 0.0}, log_prior_K=prior_K.log()), ce(logits_BK, labels_B))


def test_a_prior_is_that_of_the_labels_of_the_index(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    setup = prepare(run_config(cache.config, tmp_path, loss=[{**CE, "prior": "balanced"}]), DistributedContext())
    labels: list[int] = []
    for shard in range(len(setup.supervision.source.shard_ids)):
        labels += setup.supervision.source.targets(shard)["label"].tolist()
    shares = [max(labels.count(k), 0.5) for k in range(10)]
    expected = torch.tensor([share / sum(shares) for share in shares]).log()
    setup.close()
    torch.testing.assert_close(setup.supervision.log_priors["label"], expected)
    batch = loss_inputs(torch.randn(3, 10), torch.tensor([1, 2, 3]), log_priors=setup.supervision.log_priors)
    share = batch_share(world_size=1, num_rows=3, num_rows_global=3, num_labelled=3, num_labelled_global=3)
    _, values = setup.loss(batch, share, epoch=0)
    logits_BK, labels_B = batch.outputs["logits"], batch.targets["label"]
    torch.testing.assert_close(values["ce"], ce(logits_BK, labels_B, prior="balanced", log_prior_K=expected))
    with raises("loss.missing-input", got="None for log_prior_K"):
        setup.loss(replace(batch, log_priors={}), share, epoch=0)


def test_weights_of_classes_have_mean_one_over_the_rows_and_are_clipped() -> None:
    count_K = np.array([100, 25, 0, 1])
    weight_K, num_clipped = class_weights(count_K, power=0.5, max_weight=100)
    # 1/10, 1/5 and 1 times 126 rows over 10 + 5 + 1.
    np.testing.assert_allclose(weight_K, [0.1 * 126 / 16, 0.2 * 126 / 16, 1, 126 / 16])
    assert (weight_K * count_K).sum() == pytest.approx(126)
    assert num_clipped == 0
    clipped_K, num_clipped = class_weights(count_K, power=1.0, max_weight=2)
    np.testing.assert_allclose(clipped_K, [0.5, 126 / 75, 1, 2])
    # The rows of the first and the last class.
    assert num_clipped == 101


def test_each_row_has_its_weight_in_the_gradient_and_values_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    leaf_BK = torch.randn(4, 3, generator=generator).requires_grad_()
    labels_B, weight_B = torch.tensor([0, 2, -1, 1]), torch.tensor([0.5, 3.0, 2.0, 1.0])
    student = with_row_weights(StudentOutputs({"logits": leaf_BK}, {"nd": (leaf_BK * 2,)}, ()), weight_B)
    value = ce(student.outputs["logits"], labels_B) + student.projected["nd"][0].sum()
    assert value.item() == pytest.approx(ce(leaf_BK, labels_B).item() + 2 * leaf_BK.sum().item(), rel=1e-6)
    (gradient_BK,) = torch.autograd.grad(value, leaf_BK)
    # The labelled rows are three.
    loss_B = cross_entropy(leaf_BK, labels_B, ignore_index=-1, reduction="none")
    expected = (weight_B * loss_B).sum() / 3 + (weight_B[:, None] * leaf_BK * 2).sum()
    torch.testing.assert_close(gradient_BK, torch.autograd.grad(expected, leaf_BK)[0])


def test_a_balanced_training_weights_the_rows_of_rare_classes(replays: Replay, tmp_path: Path) -> None:
    """The first update of plain SGD is that of the weighted loss by hand, and the norms of the terms are recorded."""
    loss = [CE, {"name": "kd", "weight": 2.0, "temperature": 1.0}]
    train = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "balance": {"power": 1.0, "max_weight": 3.0}}
    keys: dict[str, Any] = {"loss": loss, "train": {**train, "gradient_norms_every_steps": 2}, "student": SMALL}
    setup = prepare(run_config(replays("crop").config, tmp_path / "step", **keys), DistributedContext())
    batch, step, student = setup.dataset[0], TrainStep(setup), setup.student.module
    assert setup.row_weights is not None
    weight_B = setup.row_weights.of_rows(batch)
    labels_B, teacher_BK = batch.targets["label"], batch.teacher_outputs[0].at("logits")
    assert teacher_BK is not None
    embeddings: list[Tensor] = []
    student.register_forward_hook(lambda _module, _args, outputs: embeddings.append(outputs.outputs["embedding"]))
    before = [parameter.detach().clone() for parameter in student.parameters()]
    result = step(batch)
    updates = [(old - new.detach()) / 0.1 for old, new in zip(before, student.parameters(), strict=True)]
    with torch.no_grad():
        for parameter, old in zip(student.parameters(), before, strict=True):
            parameter.copy_(old)
    mean, std = (torch.tensor(SMALL[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    outputs = student((batch.pixels_BCHW / 255 - mean) / std).outputs
    rows = {
        "ce": cross_entropy(outputs["logits"], labels_B, reduction="none"),
        "kd": 2 * kl_div(outputs["logits"].log_softmax(1), teacher_BK.softmax(1), reduction="none").sum(1),
    }
    by_hand = {term: (weight_B * loss_B).mean() for term, loss_B in rows.items()}
    for term, value in by_hand.items():
        (gradient_BD,) = torch.autograd.grad(value, outputs["embedding"], retain_graph=True)
        assert result.gradient_norms[term].item() == pytest.approx(gradient_BD.norm().item(), rel=1e-4)
    expected = torch.autograd.grad(by_hand["ce"] + by_hand["kd"], [*student.parameters()])
    for update, gradient in zip(updates, expected, strict=True):
        torch.testing.assert_close(update, gradient, rtol=1e-3, atol=1e-5)
    setup.close()


def test_gradient_norms_are_recorded_in_their_steps_alone(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    run(run_config(base, tmp_path, loss=[CE, {"name": "kd"}], train={"epochs": 1, "gradient_norms_every_steps": 2}))
    names = {"gradient_norm/ce", "gradient_norm/kd"}
    assert [names <= record.keys() for record in metrics(tmp_path)] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("loss", "head", "code"),
    [
        ({"name": "dist"}, None, "config.balance-relations"),
        ({"name": "similarity"}, None, "config.balance-relations"),
        (CE, "pair", "config.balance-head"),
    ],
)
def test_weights_of_rows_that_cannot_be_are_refused(
    replays: Replay, tmp_path: Path, loss: dict[str, Any], head: str | None, code: str
) -> None:
    config = run_config(replays("crop").config, tmp_path, loss=[loss], train={"balance": {"head": head}})
    with raises(code):
        prepare_checked(config)


def prepare_checked(config: Config) -> None:
    check_config(config)
    prepare(config, DistributedContext()).close()
