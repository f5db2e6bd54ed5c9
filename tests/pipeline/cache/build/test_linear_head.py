"""``cache.logits: head``: logits of a linear head from stored embeddings; heads that are not linear are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from jobs.cache_ops import verify
from jobs.plan_cache import report
from pipeline import storage
from pipeline.cache.build.context import current_context, prepare
from pipeline.cache.build.header_claim import check_without_weights
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.codec import LinearHead, decode, encode, row_bytes, stored_outputs
from pipeline.cache.format.head_file import read_head
from pipeline.cache.ops.copy import copy_cache
from pipeline.cache.ops.gc import remove_unused_header
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, ConfigError, ModelError
from pipeline.core.hashing import digest
from pipeline.tasks import OutputSpec
from schemas.cache_format import Output
from schemas.config import CacheConfig, Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, files, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig, build_tiny

KINDS = ("int8", "fp16", "fp32")
TEACHERS = "python:tests.pipeline.cache.teachers"
FACTORIES = "python:tests.pipeline.models.factories"


@pytest.fixture(scope="session")
def int8_cache(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Never written to."""
    url = str(tmp_path_factory.mktemp("head") / "cache")
    return build_tiny(digits_shards, url, {"cache": {"logits": "head", "embeddings": "int8"}})


def embedding_output(kind: str, width: int) -> Output:
    return stored_outputs([OutputSpec("embedding", (width,), kind)])[0]


def head_of_file(url: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    tensors = safetensors.torch.load(storage.read(storage.join(url, layout.HEAD)))
    return tensors["weight"].double().numpy(), tensors["bias"].double().numpy()


def network_of(config: Config) -> torch.nn.Module:
    return current_context(config).teacher.module.network


@pytest.mark.parametrize("kind", KINDS)
@given(
    arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32), fill=st.sampled_from([0.0, 2.5])),
)
def test_a_device_rounds_embeddings_to_the_bits_of_a_cache(kind: str, values_BD: NDArray[np.float32]) -> None:
    output = embedding_output(kind, 5)
    identity = LinearHead(torch.eye(5), torch.zeros(5), output)
    got_BD = identity.logits_of_exact(torch.from_numpy(values_BD)).numpy()
    np.testing.assert_array_equal(got_BD, decode(encode(values_BD, output), output))


def test_logits_are_w_times_the_stored_embedding_plus_b(int8_cache: TinyCache) -> None:
    cache = open_cache(int8_cache.url)
    weight_KD, bias_K = head_of_file(int8_cache.url)
    network = network_of(int8_cache.config)
    assert isinstance(network.fc, torch.nn.Linear)
    np.testing.assert_array_equal(weight_KD, network.fc.weight.double().numpy())
    np.testing.assert_array_equal(bias_K, network.fc.bias.double().numpy())
    for shard in cache.shards:
        for view in range(cache.num_views):
            columns = cache.view(shard.shard_id, view)
            embedding_ND = columns.decoded("embedding").astype(np.float64)
            expected_NK = embedding_ND @ weight_KD.T + bias_K
            # 7 products and sums in float32.
            bound_NK = 16 * 2.0**-24 * (np.abs(embedding_ND) @ np.abs(weight_KD).T + np.abs(bias_K))
            logits_NK = columns.logits_NK
            assert logits_NK is not None
            assert logits_NK.dtype == np.float32
            assert (np.abs(logits_NK - expected_NK) <= bound_NK).all()
            few = columns.outputs["logits"].take(np.array([3, 1])).decode()
            assert (np.abs(few - expected_NK[[3, 1]]) <= bound_NK[[3, 1]]).all()


def test_a_row_has_the_bytes_of_its_embedding(int8_cache: TinyCache) -> None:
    cache = open_cache(int8_cache.url)
    assert {output.name: row_bytes(output) for output in cache.header.outputs} == {"logits": 0, "embedding": 15}
    (commit, *_) = read_commits(int8_cache.url)
    columns = pq.read_schema(Path(int8_cache.url) / commit.part.path).names
    assert "embedding" in columns
    assert "logits" not in columns
    assert report(int8_cache.config, measured=False).plan.size.outputs == {"logits": 0, "embedding": 15}


def test_the_header_names_the_head_which_is_part_of_the_fingerprint(
    int8_cache: TinyCache, tiny_config: TinyConfig
) -> None:
    header = open_cache(int8_cache.url).header
    sha256 = digest(files(int8_cache.url)[layout.HEAD])
    assert (header.teacher["head"], header.teacher["logits"]) == (sha256, "head")
    other = tiny_config(cache={"logits": "fp16", "embeddings": "int8"})
    body = current_context(other).header.teacher
    assert header.teacher == {**body, "logits": "head", "head": sha256}
    assert header.fingerprint != current_context(other).header.fingerprint
    check_without_weights(header, int8_cache.config)


@pytest.mark.parametrize("kind", KINDS)
def test_fidelity_is_that_of_the_computed_logits(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("pipeline.cache.build.statistics._SAMPLE_ONE_IN", 1)
    caches: list[TeacherCache] = []
    for name, keys in (("exact", {"logits": "fp32"}), ("head", {"logits": "head", "embeddings": kind})):
        cache = {**keys, "url": str(tmp_path / name), "class_means": "none"}
        config = tiny_config(views={"kind": "crop", "count": 1}, cache=cache)
        build(config)
        caches.append(open_cache(cache["url"]))
    exact_NK, got_NK = (
        np.concatenate([cache.view(shard.shard_id, 0).decoded("logits") for shard in cache.shards]).astype(np.float64)
        for cache in caches
    )
    statistics = caches[1].manifest.statistics
    assert statistics.fidelity_rows == len(exact_NK)
    for temperature in (1.0, 2.0, 4.0):
        p, q = (np.exp(values / temperature) for values in (exact_NK, got_NK))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        assert statistics.kl_sum[str(temperature)] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6, abs=1e-12)
    assert statistics.argmax_flips == (got_NK.argmax(1) != exact_NK.argmax(1)).sum()
    assert (statistics.kl_sum["1.0"] > 1e-9) == (kind != "fp32")
    # Of the teacher's own logits, before they are encoded.
    assert statistics.top1_hits == caches[0].manifest.statistics.top1_hits


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (f"{TEACHERS}:Doubled", "a logit of"),
        (f"{FACTORIES}:SelfDescribed", "no layer of the network whose input is the embedding"),
        (f"{TEACHERS}:Cosine", "a logit of"),
    ],
)
def test_a_head_that_is_not_linear_is_refused_with_numbers(tiny_config: TinyConfig, model: str, got: str) -> None:
    config = tiny_config(cache={"logits": "head", "embeddings": "int8"}, teacher={"model": model, "kwargs": {}})
    with raises("model.head-not-linear", ModelError) as caught:
        prepare(config)
    assert got in str(caught.value.got)
    assert model in str(caught.value.where)
    assert not Path(cache_section(config).url).exists()


def test_two_layers_on_the_embedding_are_refused(tiny_config: TinyConfig) -> None:
    kwargs = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 16, "patch_size": 8}
    teacher = {"model": "timm/deit_tiny_distilled_patch16_224", "kwargs": kwargs}
    config = tiny_config(cache={"logits": "head", "embeddings": "int8"}, teacher=teacher)
    with raises("model.head-not-linear", ModelError, got="2 layers: head, head_dist whose input is the embedding"):
        prepare(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_convolution_of_positions_is_linear_too(tiny_config: TinyConfig, precision: str) -> None:
    """The mean of the outputs is the output for the mean; in bf16 the head is compared in fp32."""
    teacher = {"model": f"{FACTORIES}:Tokens", "kwargs": {}, "precision": precision}
    context = current_context(tiny_config(cache={"logits": "head", "embeddings": "fp32"}, teacher=teacher))
    assert context.head is not None
    assert len(context.head.weight_KD) == 10


def test_a_head_needs_embeddings() -> None:
    with pytest.raises(ValueError, match=r"embeddings is none; expected int8, fp16 or fp32"):
        CacheConfig.model_validate({"url": "x", "logits": "head"})


def test_several_heads_are_refused(tiny_config: TinyConfig) -> None:
    heads = {"color": {"num_classes": 3}, "shape": {"num_classes": 3}}
    data = {"task": "heads", "num_classes": None, "label": "json", "heads": heads}
    with raises("config.head-of-several-heads", ConfigError):
        prepare(tiny_config(data=data, cache={"logits": "head", "embeddings": "int8"}))


def test_verify_finds_nothing_and_recomputes_the_embedding(int8_cache: TinyCache) -> None:
    found = verify(int8_cache.url, config=int8_cache.config, num_rows=20)
    assert (found.problems, found.num_unnamed) == ([], 0)
    assert found.recomputed is not None
    assert found.recomputed.identical == found.recomputed.rows


@pytest.mark.parametrize(("damage", "code"), [("missing", "cache.missing-file"), ("changed", "cache.changed-file")])
def test_a_damaged_head_is_found(int8_cache: TinyCache, tmp_path: Path, damage: str, code: str) -> None:
    cache = copy_of(int8_cache, tmp_path / "cache")
    path = Path(cache.url) / layout.HEAD
    data = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    opened = open_cache(cache.url)
    with raises(code, CacheError):
        opened.view(opened.shards[0].shard_id, 0)
    with raises(code, CacheError):
        publish_manifest(cache.url, shard_urls(cache.config))
    (problem,) = verify_cache(cache.url).problems
    assert problem.file == layout.HEAD


def test_a_head_of_another_size_is_refused() -> None:
    stored = embedding_output("int8", 3)
    for weight, bias in (
        (torch.zeros(2, 4), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3)),
        (torch.full((2, 3), torch.inf), torch.zeros(2)),
        (torch.zeros(2, 3).double(), torch.zeros(2).double()),
    ):
        data = LinearHead(weight, bias, stored).to_bytes()
        with raises("cache.invalid-head", CacheError, where="head"):
            LinearHead.parse(data, num_classes=2, stored=stored, where="head")
    with raises("cache.invalid-head", CacheError):
        LinearHead.parse(b"0123456789", num_classes=2, stored=stored, where="head")


@pytest.mark.parametrize("change", [{"head": None}, {"embedding": None}, {"embedding": "head"}])
def test_a_header_that_names_no_head_or_embedding_is_refused(
    int8_cache: TinyCache, change: dict[str, str | None]
) -> None:
    header = open_cache(int8_cache.url).header
    if "head" in change:
        header = header.model_copy(update={"teacher": {**header.teacher, "head": None}})
    else:
        logits, embedding = header.outputs
        computed = [embedding.model_copy(update={"encoding": "head"})] if change["embedding"] else []
        header = header.model_copy(update={"outputs": (logits, *computed)})
    with raises("cache.invalid-head", CacheError):
        read_head(int8_cache.url, header)


def test_the_plan_counts_the_file_of_the_head(int8_cache: TinyCache) -> None:
    config = int8_cache.config
    assert report(config, measured=False).plan.traffic.num_objects == len(files(int8_cache.url))


def test_views_are_added_labels_read_again_and_all_is_copied(int8_cache: TinyCache, tmp_path: Path) -> None:
    cache = copy_of(int8_cache, tmp_path / "cache")
    views = cache.config.views.model_copy(update={"count": cache.config.views.count + 1})
    head = files(cache.url)[layout.HEAD]
    # The encoding is that of the header.
    section = cache_section(cache.config).model_copy(update={"logits": "auto"})
    build(cache.config.model_copy(update={"views": views, "cache": section}))
    assert open_cache(cache.url).num_views == views.count
    relabel(cache.url)
    copy_cache(cache.url, str(tmp_path / "copy"))
    assert files(str(tmp_path / "copy"))[layout.HEAD] == head
    for url in (cache.url, str(tmp_path / "copy")):
        report = verify_cache(url)
        assert (report.problems, report.num_unnamed) == ([], 0)


def test_an_unused_head_is_removed_with_its_header(tiny_config: TinyConfig) -> None:
    config = tiny_config(cache={"logits": "head", "embeddings": "int8"})
    prepare(config)
    url = cache_section(config).url
    assert layout.HEAD in files(url)
    remove_unused_header(url, force=True)
    assert files(url) == {}
