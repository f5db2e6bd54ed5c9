"""Accuracy and agreement against a loop over single images."""

from __future__ import annotations

import math
import shutil
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.augment.pixels import apply_view
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import StorageInputError
from pipeline.models import InputSpec, LoadedModel, load_model
from pipeline.shards.decode import decode
from pipeline.shards.index import index_shard
from pipeline.shards.tar import ShardReader
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import Evaluator, build_evaluator, evaluate_run
from pipeline.student.export.exporters import export_run
from pipeline.student.run import checkpoint
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from pipeline.teacher.inference import Teacher, load_teacher
from schemas.config import Config, StudentConfig, ViewsConfig
from tests.errors import raises
from tests.pipeline.caches import TinyCache, shard_urls
from tests.pipeline.student.conftest import PLANS, Replay
from tests.pipeline.student.runs import (
    CE,
    NORMALISED,
    evaluated,
    evaluations,
    index_shards,
    run_config,
    state_of,
    summary_of,
)
from tests.tolerances import log_softmax_error, magnitude_of, network_operations, reordered, ulps

CPU = torch.device("cpu")


def network(seed: int = 0, size: int = 12) -> LoadedModel:
    return load_model(
        StudentConfig.model_validate(NORMALISED), widths={"logits": 10}, size=size, seed=seed, where="student"
    )


def evaluator(config: Config, **data: Any) -> Evaluator:
    shards = tuple(shard_urls(config).values())
    return build_evaluator(
        shards, config.data.model_copy(update=data), config.views, DistributedContext(), num_threads=2
    )


def teacher_of(config: Config) -> Teacher:
    return load_teacher(config.teacher, widths={"logits": 10}, size=config.views.size, device=CPU)


def one_by_one(
    config: Config, module: Any, spec: InputSpec, *, output: str = "logits", target: str = "label"
) -> tuple[Tensor, Tensor]:
    """Logits (or another output) and labels (or another target), image by image: the central square of 7/8 of the
    shorter side, resized, normalised."""
    logits, labels = list[Tensor](), list[int]()
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    for url in shard_urls(config).values():
        index = index_shard(Path(url), config.data, where=url)
        with closing(ShardReader(Path(url), where=url)) as reader:
            for row in range(len(index)):
                image = decode(reader.read(int(index.offset[row]), int(index.size[row])), max_pixels=10**6)
                height, width = image.shape[1:]
                side = round(0.875 * min(height, width))
                box = ((width - side) // 2, (height - side) // 2, side, side)
                view = apply_view(image, box, False, size=spec.size, interpolation=spec.interpolation)
                with torch.no_grad():
                    logits.append(module(((view / 255 - mean) / std)[None])[output][0])
                labels.append(int(index.targets[target][row]))
    return torch.stack(logits), torch.tensor(labels)


@pytest.mark.parametrize("kind", ["crop", "everything"])
def test_accuracy_and_agreement_are_those_of_a_loop_over_images(replays: Replay, kind: str) -> None:
    """For any training views: eval views are never augmented."""
    config = replays("crop").config
    views = ViewsConfig.model_validate({**config.views.model_dump(), **PLANS[kind]})
    config = config.model_copy(update={"views": views})
    teacher = teacher_of(config)
    # The teacher's weights on smaller images: a student that agrees for some images.
    student = load_model(config.teacher, widths={"logits": 10}, size=12)
    student_NK, label_N = one_by_one(config, student.module, student.input)
    teacher_NK, _ = one_by_one(config, teacher.module, teacher.loaded.input)
    evaluation = evaluator(config)(student.module, student.input, teacher)
    metrics = evaluation.metrics
    assert evaluation.num_rows == len(label_N) == 35
    assert metrics["top1"] == pytest.approx((student_NK.argmax(1) == label_N).double().mean().item())
    assert metrics["top5"] == pytest.approx(
        (student_NK.topk(5).indices == label_N[:, None]).any(1).double().mean().item()
    )
    agrees_N = student_NK.argmax(1) == teacher_NK.argmax(1)
    assert metrics["agreement"] == pytest.approx(agrees_N.double().mean().item())
    assert metrics["teacher_top1"] == pytest.approx((teacher_NK.argmax(1) == label_N).double().mean().item())
    student_error, teacher_error = logits_error(student, student_NK), logits_error(teacher.loaded, teacher_NK)
    assert metrics["ece"] == pytest.approx(
        calibration_error(student_NK, label_N), rel=0, abs=ece_error(student_NK, student_error)
    )
    # By a teacher's logit, KL changes by no more than p times the largest log(p / q), by a student's by q - p.
    log_p_NK, log_q_NK = (logits_NK.log_softmax(1) for logits_NK in (teacher_NK, student_NK))
    error = 2 * student_error + 2 * magnitude_of(log_p_NK - log_q_NK) * teacher_error
    assert metrics["kl"] == pytest.approx(divergence(teacher_NK, student_NK), rel=0, abs=error)
    assert 0 < metrics["agreement"] < 1


def test_hits_and_agreement_of_each_image_are_stored_with_its_shard_and_key(replays: Replay) -> None:
    config = replays("crop").config
    teacher = teacher_of(config)
    student = load_model(config.teacher, widths={"logits": 10}, size=12)
    student_NK, label_N = one_by_one(config, student.module, student.input)
    teacher_NK, _ = one_by_one(config, teacher.module, teacher.loaded.input)
    images = evaluator(config)(student.module, student.input, teacher).images
    assert images is not None
    assert images["top1"].to_pylist() == (student_NK.argmax(1) == label_N).double().tolist()
    assert images["agreement"].to_pylist() == (student_NK.argmax(1) == teacher_NK.argmax(1)).double().tolist()
    expected: list[tuple[str, str]] = []
    for shard, url in shard_urls(config).items():
        with tarfile.open(url) as tar:
            expected += [(shard, key) for key in dict.fromkeys(Path(name).stem for name in tar.getnames())]
    assert [(row["shard"], row["sample"]) for row in images.to_pylist()] == expected


def logits_error(loaded: LoadedModel, logits_NK: Tensor) -> float:
    """Of a network in batches of other sizes."""
    images_BCHW = torch.zeros(1, 3, loaded.input.size, loaded.input.size)
    return reordered(network_operations(loaded.module.eval(), images_BCHW, backward=False), magnitude_of(logits_NK))


def ece_error(logits_NK: Tensor, error: float) -> float:
    """A confidence changes by at most half of what logits differ by, 2 · error; its softmax in fp32 takes K + 4
    operations, and a bin sums over rows."""
    num_rows, num_classes = logits_NK.shape
    return error + log_softmax_error(logits_NK) + ulps(num_classes + num_rows + 3)


def calibration_error(logits_NK: Tensor, label_N: Tensor) -> float:
    """Guo 2017 in float64: rows sorted into 15 bins of their confidence; empty bins contribute nothing."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row_K, label in zip(logits_NK.double().softmax(1).tolist(), label_N.tolist(), strict=True):
        confidence = max(row_K)
        bins[min(int(confidence * 15), 14)].append((confidence, row_K.index(confidence) == label))
    gaps = [abs(sum(right for _, right in rows) - sum(sure for sure, _ in rows)) for rows in bins]
    return sum(gaps) / len(label_N)


def divergence(teacher_NK: Tensor, student_NK: Tensor) -> float:
    """Mean KL(teacher ‖ student), class by class."""
    total = 0.0
    for teacher_K, student_K in zip(teacher_NK.double().softmax(1), student_NK.double().softmax(1), strict=True):
        total += sum(p * math.log(p / q) for p, q in zip(teacher_K.tolist(), student_K.tolist(), strict=True))
    return total / len(teacher_NK)


def test_logits_between_0_and_1_are_not_taken_for_probabilities(replays: Replay) -> None:
    """torchmetrics would take them for probabilities."""
    config, student = replays("crop").config, network()
    with torch.no_grad():
        student.module.network.fc.weight.mul_(1e-3)
        student.module.network.fc.bias.copy_(torch.linspace(0.1, 0.9, 10))
    logits_NK, label_N = one_by_one(config, student.module.eval(), student.input)
    assert 0 < logits_NK.min() < logits_NK.max() < 1
    metrics = evaluator(config)(student.module, student.input).metrics
    error = ece_error(logits_NK, logits_error(student, logits_NK))
    assert metrics["ece"] == pytest.approx(calibration_error(logits_NK, label_N), rel=0, abs=error)


def test_a_teacher_agrees_with_itself(replays: Replay) -> None:
    config = replays("crop").config
    teacher = teacher_of(config)
    metrics = evaluator(config)(teacher.module, teacher.loaded.input, teacher).metrics
    assert metrics["agreement"] == 1
    # Of distributions whose logits differ by at most d, KL is at most d² / 2.
    logits_NK, _ = one_by_one(config, teacher.module, teacher.loaded.input)
    assert metrics["kl"] == pytest.approx(0, abs=(2 * logits_error(teacher.loaded, logits_NK)) ** 2 / 2)
    assert metrics["top1"] == metrics["teacher_top1"]


def test_without_labels_agreement_is_all_that_is_measured(replays: Replay) -> None:
    config = replays("crop").config
    teacher = teacher_of(config)
    evaluation = evaluator(config, label=None)(teacher.module, teacher.loaded.input, teacher)
    assert evaluation.num_rows == 35
    measured = {key for key, value in evaluation.metrics.items() if value is not None}
    assert measured == {"agreement", "kl"}
    assert evaluation.images is not None
    assert evaluation.images["top1"].null_count == 35
    assert evaluation.images["agreement"].null_count == 0
    assert evaluation.metrics["agreement"] == 1


def test_ties_are_broken_by_class_index(replays: Replay) -> None:
    """All logits of a row are equal: class 0 is predicted, and classes 0 to 4 are the top five."""
    config, student, teacher = replays("crop").config, network(), teacher_of(replays("crop").config)
    for parameter in (*student.module.network.parameters(), *teacher.module.network.parameters()):
        torch.nn.init.zeros_(parameter)
    _, label_N = one_by_one(config, student.module.eval(), student.input)
    metrics = evaluator(config)(student.module, student.input, teacher).metrics
    share_of_0 = (label_N == 0).double().mean().item()
    assert (metrics["top1"], metrics["teacher_top1"], metrics["agreement"]) == pytest.approx(
        (share_of_0, share_of_0, 1)
    )
    assert metrics["top5"] == pytest.approx((label_N < 5).double().mean().item())


def test_rows_that_are_not_finite_stop_an_evaluation_with_their_number(replays: Replay) -> None:
    config, student = replays("crop").config, network()
    student_NK, _ = one_by_one(config, student.module.eval(), student.input)
    first_shard_NK = student_NK[:20]
    limit = first_shard_NK[:, 0].median()
    num_bad = int((first_shard_NK[:, 0] > limit).sum())
    assert 0 < num_bad < 20
    student.module.network.fc.register_forward_hook(
        lambda _, __, logits_BK: logits_BK.masked_fill(logits_BK[:, :1] > limit, torch.nan)
    )
    with raises("evaluate.student-not-finite", got=f"NaN or infinity in {num_bad} of 20 rows", exit_code=1) as caught:
        evaluator(config)(student.module, student.input)
    assert str(caught.value.where).startswith(next(iter(shard_urls(config).values())))


def test_a_teacher_that_is_not_finite_stops_an_evaluation(replays: Replay) -> None:
    config, teacher, student = replays("crop").config, teacher_of(replays("crop").config), network()
    for parameter in teacher.module.network.parameters():
        torch.nn.init.constant_(parameter, math.inf)
    with raises("evaluate.teacher-not-finite") as caught:
        evaluator(config)(student.module, student.input, teacher)
    assert "teacher.weights" in str(caught.value.next_step)


def test_a_checkpoint_that_is_not_finite_is_neither_evaluated_nor_exported(replays: Replay, tmp_path: Path) -> None:
    config = trained(replays("crop"), tmp_path / "run", train={"epochs": 1})
    url = tmp_path / "run" / checkpoint.LAST
    state = torch.load(url, weights_only=True)
    state["model"]["conv1.bias"][0] = math.nan
    torch.save(state, url)
    assert config.data.val_shards is not None
    for use in (
        lambda shards: evaluate_run(str(tmp_path / "run"), shards, checkpoint_name="last", num_threads=1, device=CPU),
        lambda _: export_run(str(tmp_path / "run"), str(tmp_path / "student.safetensors")),
    ):
        with raises("weights.not-finite") as caught:
            use(config.data.val_shards)
        assert "conv1.bias" in str(caught.value.got)


def test_evaluation_leaves_no_trace_in_the_model(replays: Replay) -> None:
    student = network()
    student.module.train()
    student.module.network.conv2.eval()
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    evaluator(replays("crop").config)(student.module, student.input)
    assert student.module.training
    assert not student.module.network.conv2.training
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())


def test_the_size_of_a_batch_changes_no_count(replays: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    config, student = replays("crop").config, network()
    whole = evaluator(config)(student.module, student.input)
    monkeypatch.setattr("pipeline.student.evaluation.evaluator.BATCH_SIZE", 3)
    evaluation = evaluator(config)(student.module, student.input)
    # A mean of confidences is no count: convolutions round otherwise in another batch.
    logits_NK, _ = one_by_one(config, student.module.eval(), student.input)
    error = ece_error(logits_NK, logits_error(student, logits_NK))
    assert evaluation.metrics["ece"] == pytest.approx(whole.metrics["ece"], rel=0, abs=error)
    assert {**evaluation.as_dict(), "ece": 0} == {**whole.as_dict(), "ece": 0}


def test_bad_images_follow_the_configs_rule(replays: Replay) -> None:
    config, student = replays("crop").config, network()
    with raises("shard.bad-samples") as caught:
        evaluator(config, max_pixels=5)(student.module, student.input)
    assert "20 of 20 samples" in str(caught.value)
    with raises("data.no-validation-images"):
        evaluator(config, max_pixels=5, bad_samples="skip", max_bad_share=1.0)(student.module, student.input)


def trained(cache: TinyCache, url: Path, **sections: Any) -> Config:
    config = run_config(cache.config, url, loss=CE, data={"val_shards": cache.config.data.shards}, **sections)
    train(config)
    return config


def test_a_run_evaluates_as_it_did_while_it_was_trained(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    config = trained(cache, tmp_path, student=NORMALISED, train={"epochs": 3, "lr": 0.05})
    summary = summary_of(tmp_path)
    for name, key in (("last", "top1"), ("best", "best_top1")):
        evaluation = evaluated(config, name)
        assert evaluation.metrics["top1"] == summary[key]
        assert evaluation.metrics["agreement"] is not None
        assert evaluation.metrics["kl"] is not None


def test_averaged_weights_are_evaluated_and_stored_as_the_model(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    config = trained(cache, tmp_path, student=NORMALISED, train={"epochs": 2, "lr": 0.05, "ema": 0.9})
    state = state_of(tmp_path)
    assert not torch.equal(state["model"]["fc.weight"], state["raw"]["fc.weight"])
    student = network(size=16)
    evaluation: dict[str, float | None] = {}
    for name in ("model", "raw"):
        student.module.network.load_state_dict(state[name])
        evaluation[name] = evaluator(config)(student.module, student.input).metrics["ece"]
    lines = evaluations(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["ece"] == evaluation["model"] != evaluation["raw"]
    assert evaluated(config).metrics["ece"] == evaluation["model"]


def test_precomputed_embeddings_are_left_out_where_no_metric_needs_them(replays: Replay) -> None:
    config = replays("crop").config
    teacher = teacher_of(config)
    assert evaluator(config).precompute(teacher).size_bytes == 4 * 10 * 35


def test_precomputed_teacher_outputs_give_the_metrics_of_an_evaluation_with_the_teacher(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another code path; student and teacher take images of different sizes."""
    cache = replays("crop")
    keys: dict[str, Any] = {
        "loss": [{"name": "kd"}, {"name": "mse"}],
        "student": {**NORMALISED, "size": 24},
        "data": {"val_shards": cache.config.data.shards},
    }
    train(run_config(cache.config, tmp_path / "without", **keys))
    batches: list[int] = []
    infer = Teacher.infer_on_device

    def counting(self: Teacher, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        batches.append(len(pixels_NCHW))
        return infer(self, pixels_NCHW)

    monkeypatch.setattr(Teacher, "infer_on_device", counting)
    events: list[dict[str, Any]] = []
    config = run_config(cache.config, tmp_path / "with", **keys, train={"eval_agreement": True})
    train(config, report=events.append)
    evaluation = evaluations(tmp_path / "with")
    assert len(evaluation) == 2
    assert sum(batches) == evaluation[0]["num_rows"]
    (event,) = (event for event in events if event["kind"] == "validation-teacher")
    width = 10 + open_cache(cache.url).header.embedding_dim
    assert event["size_bytes"] == 4 * width * evaluation[0]["num_rows"]
    last = evaluated(config)
    assert {**last.measured()} == {name: value for name, value in evaluation[-1].items() if name in last.measured()}
    assert None not in (last.metrics["cosine"], last.metrics["agreement"])
    without, with_teacher = (state_of(tmp_path / name)["model"] for name in ("without", "with"))
    assert all(torch.equal(value, with_teacher[name]) for name, value in without.items())
    lines = evaluations(tmp_path / "without")
    assert all(line["agreement"] is None and line["cosine"] is None for line in lines)


@pytest.mark.parametrize(("measured", "epochs"), [(False, 1), (True, 4)])
def test_agreement_with_an_online_teacher_is_measured_or_left_out_for_any_named_caches(
    replays: Replay, tmp_path: Path, *, measured: bool, epochs: int
) -> None:
    base = replays("crop").config
    unread = ["other", "another"]
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards, "cache": unread},
        "train": {"eval_agreement": measured, "epochs": epochs},
    }
    config = run_config(base, tmp_path, mode="online", **keys)
    index_shards(config, tmp_path / "index")
    train(config)
    evaluation = evaluations(tmp_path)
    assert [line["agreement"] is not None for line in evaluation] == [measured] * epochs
    assert not measured or 0 < evaluation[-1]["kl"] < evaluation[0]["kl"]


@pytest.mark.parametrize(
    ("missing", "changes"),
    [
        ("data.val_shards", {"data": {"val_shards": None}}),
        ("a teacher", {"teacher": {"mode": "none"}, "loss": CE}),
        ("the teacher's network", {"teacher": {"weights": None}}),
        ("a single teacher", {"data": {"cache": ["other", "another"]}}),
    ],
)
def test_agreement_that_cannot_be_measured_is_refused_before_any_work(
    replays: Replay, tmp_path: Path, missing: str, changes: dict[str, Any]
) -> None:
    base = replays("crop").config
    keys: dict[str, Any] = {"data": {"val_shards": base.data.shards}, "train": {"eval_agreement": True}}
    for section, keys_of in changes.items():
        keys[section] = {**keys.get(section, {}), **keys_of} if isinstance(keys_of, dict) else keys_of
    with raises("config.eval-agreement") as caught:
        train(run_config(base, tmp_path, **keys))
    assert missing in caught.value.what
    assert not list(tmp_path.iterdir())


def test_agreement_with_a_teacher_whose_weights_are_missing_is_refused_before_the_first_step(
    replays: Replay, tmp_path: Path
) -> None:
    base = replays("crop").config
    keys: dict[str, Any] = {"data": {"val_shards": base.data.shards}, "train": {"eval_agreement": True}}
    gone = {"teacher": {"weights": str(tmp_path / "gone.pt")}}
    config = run_config(base, tmp_path / "run", **keys, **gone)
    for refuses in (train, check_training):
        with pytest.raises(StorageInputError) as caught:
            refuses(config)
        assert "gone.pt" in f"{caught.value.where}{caught.value.got}"
    assert not (tmp_path / "run").exists()


def test_a_validation_shard_that_is_replaced_after_the_teachers_outputs_were_computed_is_an_error(
    replays: Replay, tmp_path: Path
) -> None:
    base = replays("crop").config
    assert base.data.shards is not None
    copies = [str(shutil.copy(url, tmp_path)) for url in shard_urls(base).values()]
    config = run_config(
        base, tmp_path / "run", data={"val_shards": copies}, train={"epochs": 3, "eval_agreement": True}
    )

    def replace(event: dict[str, Any]) -> None:
        if event["kind"] == "eval" and event["epoch"] == 1:
            shutil.copy(copies[0], copies[1])

    with raises("shard.replaced"):
        train(config, report=replace)
    assert state_of(tmp_path / "run")["step"] == 10


def test_another_architecture_than_the_caches_teacher_is_refused_before_training(
    replays: Replay, tmp_path: Path
) -> None:
    kwargs = {"depth": 8, "widths": [4, 4, 6, 8]}
    with raises("cache.other-teacher") as caught:
        trained(replays("crop"), tmp_path, teacher={"kwargs": kwargs})
    assert "kwargs.widths: [4, 4, 6, 7] -> [4, 4, 6, 8]" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_weights_than_the_caches_teachers_are_refused(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    teacher = load_model(cache.config.teacher, widths={"logits": 10}, size=16, seed=1)
    torch.save(teacher.module.network.state_dict(), tmp_path / "other.pt")
    config = trained(cache, tmp_path / "run", teacher={"weights": str(tmp_path / "other.pt")}, train={"epochs": 1})
    with raises("cache.other-teacher"):
        evaluated(config)
    with raises("cache.other-teacher"):
        check_training(config)


def test_a_missing_checkpoint_is_refused_with_how_to_get_it(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    config = run_config(cache.config, tmp_path)
    train(config)
    shards = cache.config.data.shards
    assert shards is not None
    with raises("run.no-checkpoint") as caught:
        evaluate_run(str(tmp_path), shards, checkpoint_name="best", num_threads=1, device=CPU)
    assert "data.val_shards" in str(caught.value.next_step)
    with raises("run.not-found"):
        evaluate_run(str(tmp_path / "nowhere"), shards, checkpoint_name="last", num_threads=1, device=CPU)


def test_ranks_have_disjoint_shards_and_no_shards_are_no_images(replays: Replay) -> None:
    config, student = replays("crop").config, network()
    whole = evaluator(config)
    ranks = [replace(whole, distributed=DistributedContext(rank=rank, size=3)) for rank in range(3)]
    assert [rank.rank_urls for rank in ranks] == [whole.urls[:1], whole.urls[1:], []]
    with raises("data.no-validation-images"):
        replace(whole, urls=[])(student.module, student.input)
