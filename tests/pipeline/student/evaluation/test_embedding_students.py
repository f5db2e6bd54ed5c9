"""Students that are trained by losses on embeddings alone: their metrics, exports and cached batches."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cosine_similarity

from jobs.run_ops import describe_evaluation
from pipeline.cache.read.reader import open_cache
from pipeline.student.evaluation.loaded_run import load_run
from pipeline.student.export.exporters import export_run
from pipeline.student.run import checkpoint
from pipeline.student.training.trainer import train
from schemas.config import Config
from stillroom import CachedDataset
from tests.errors import raises
from tests.pipeline.caches import build, cache_section
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.evaluation.test_evaluator import one_by_one, teacher_of
from tests.pipeline.student.runs import evaluated, evaluations, index_shards, run_config, state_of, summary_of
from tests.tolerances import magnitude_of, network_operations, reordered

COSINE = [{"name": "cosine"}, {"name": "mse"}]


@dataclass(frozen=True)
class Run:
    config: Config
    url: str
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(replays: Replay, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of width 16 and an online teacher of width 7, evaluated after each of four epochs; only read."""
    base, folder = replays("crop").config, tmp_path_factory.mktemp("run")
    keys: dict[str, Any] = {"loss": COSINE, "train": {"epochs": 4, "lr": 0.02}}
    config = run_config(base, folder, mode="online", data={"val_shards": base.data.shards}, **keys)
    index_shards(config, folder / "index")
    events: list[dict[str, Any]] = []
    train(config, report=events.append)
    return Run(config, str(folder), events)


def test_the_cosine_to_the_teacher_is_measured_and_selects_the_best_checkpoint(run: Run) -> None:
    lines = evaluations(Path(run.url))
    assert all(line[name] is None for line in lines for name in ("top1", "top5", "ece", "agreement", "kl"))
    cosines = [line["cosine"] for line in lines]
    assert cosines[-1] > cosines[0]
    (text,) = [event["text"] for event in run.events if "no loss reads" in event.get("text", "")]
    assert text.endswith("no accuracy is measured, and checkpoints/best.pt follows the cosine to the teacher")
    best, summary = state_of(run.url, checkpoint.BEST), summary_of(run.url)
    assert best["best"] == {"metric": "cosine", "value": max(cosines)}
    assert (summary["top1"], summary["best_top1"], summary["best_metric"]) == (None, None, "cosine")


def test_a_run_is_evaluated_by_the_cosine_of_a_loop_over_images(run: Run) -> None:
    config, evaluation = run.config, evaluated(run.config)
    trained, teacher = load_run(run.url, "last"), teacher_of(config)
    student_ND, _ = one_by_one(config, trained.student.module, trained.student.input, output="embedding")
    teacher_ND, _ = one_by_one(config, teacher.module, teacher.loaded.input, output="embedding")
    state = state_of(run.url)
    norm, linear = (
        {name.removeprefix(prefix): value for name, value in state["projectors"].items() if name.startswith(prefix)}
        for prefix in ("cosine.0.0.", "cosine.0.2.")
    )
    unit_ND = (student_ND - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt()
    projected_ND = (unit_ND * norm["weight"] + norm["bias"]) @ linear["weight"].T + linear["bias"]
    expected = cosine_similarity(projected_ND.double(), teacher_ND.double()).mean().item()
    # Errors of both networks, relative to an embedding, of which the projector's BatchNorm subtracts the mean.
    growth = magnitude_of((student_ND.abs() + norm["running_mean"].abs()) / (norm["running_var"] + 1e-5).sqrt())
    errors = (
        reordered(network_operations(module, torch.zeros(1, 3, 16, 16), backward=False))
        for module in (trained.student.module, teacher.module)
    )
    assert evaluation.metrics["cosine"] == pytest.approx(expected, rel=0, abs=growth * sum(errors))
    assert not evaluation.head_trained
    assert "cosine to the teacher" in describe_evaluation(evaluation)
    assert "not trained" in describe_evaluation(evaluation)


@pytest.mark.slow
def test_a_student_of_embeddings_is_exported_without_its_head(run: Run, tmp_path: Path) -> None:
    with raises("export.untrained-head") as caught:
        export_run(run.url, str(tmp_path / "student.pt2"))
    assert ".safetensors" in str(caught.value.next_step)
    done = export_run(run.url, str(tmp_path / "student.safetensors"))
    assert done.head_left_out
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert {*file.keys()} == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
        assert json.loads(file.metadata()["left_out"]) == ["fc.weight", "fc.bias"]


def test_a_dataset_has_the_embeddings_of_its_cache(replays: Replay) -> None:
    cache = replays("crop")
    with closing(CachedDataset(cache.url, global_batch_size=7, embeddings=True)) as data:
        batch = data[0]
    embedding_BD = batch.teacher_embeddings()
    assert embedding_BD.dtype == torch.float32
    reader, num_compared = open_cache(cache.url), 0
    for entry in reader.shards:
        columns, index = reader.view(entry.shard_id, 0), reader.index(entry)
        by_id = dict(zip(index.sample_ids(columns.row_N), torch.from_numpy(columns.decoded("embedding")), strict=True))
        for row, sample_id in enumerate(batch.sample_ids):
            if sample_id in by_id:
                assert torch.equal(embedding_BD[row], by_id[sample_id])
                num_compared += 1
    assert num_compared == 7


def test_embeddings_that_are_not_read_or_not_stored_are_refused(replays: Replay, tiny_config: TinyConfig) -> None:
    with (
        closing(CachedDataset(replays("crop").url, global_batch_size=7)) as data,
        raises("cache.embeddings-not-read") as caught,
    ):
        data[0].teacher_embeddings()
    assert "embeddings=True" in str(caught.value.next_step)
    config = tiny_config(views={"count": 1}, cache={"embeddings": "none"})
    build(config)
    with raises("cache.no-embeddings"):
        CachedDataset(cache_section(config).url, global_batch_size=7, embeddings=True)
