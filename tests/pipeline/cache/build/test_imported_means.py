"""Class means from a file: checked before any work, part of the fingerprint, independent of the URL, and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache.build.context import prepare
from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.header import read_header
from pipeline.cache.format.nd_json import parse_nd_json
from pipeline.cache.ops.export_means import export_means
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import digest
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.pipeline.caches import (
    TinyCache,
    build,
    cache_section,
    copy_of,
    digit_samples,
    files,
    open_built,
    read_commits,
    shard_urls,
)
from tests.pipeline.conftest import TinyConfig, tiny_config_of
from tests.tolerances import ulps

K, D = 10, 7
Import = Callable[..., Config]


def means_file(path: Path, *, classes: int = K, dim: int = D, shift: float = 0.0) -> str:
    """Class c has the mean (c + shift, c + shift + 1, …) / 8; classes are written last first."""
    table = {str(name): [(name + column + shift) / 8 for column in range(dim)] for name in reversed(range(classes))}
    path.write_text(json.dumps(table))
    return str(path)


@pytest.fixture
def importing(tiny_config: TinyConfig, tmp_path: Path) -> Import:
    """Builds configs whose class means are a file."""

    def configure(**overrides: Any) -> Config:
        url = overrides.pop("url", None) or means_file(tmp_path / "means.json")
        return tiny_config(cache={"class_means": url, **overrides.pop("cache", {})}, **overrides)

    return configure


@pytest.fixture(scope="module")
def built_importing(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """A cache of imported class means, whose file was removed after the build. To be read, never written."""
    folder = tmp_path_factory.mktemp("importing")
    url = means_file(folder / "means.json")
    config = tiny_config_of(digits_shards, f"{folder}/cache", {"cache": {"class_means": url}})
    build(config)
    Path(url).unlink()
    return TinyCache(f"{folder}/cache", config)


@pytest.fixture
def imported_cache(built_importing: TinyCache, tmp_path: Path) -> TinyCache:
    """A copy that the test may change, at the URL of ``importing``."""
    return copy_of(built_importing, tmp_path / "cache")


def test_the_caches_means_are_those_of_the_file_and_there_is_no_eval_pass(
    built_importing: TinyCache, tmp_path: Path
) -> None:
    url = built_importing.url
    means = open_cache(url).class_means()
    assert means is not None
    assert means.mean_KD.tolist() == [[(name + column) / 8 for column in range(D)] for name in range(K)]
    assert means.count_K is None
    assert {(commit.block.is_eval, commit.means) for commit in read_commits(url)} == {(False, None)}
    data = Path(means_file(tmp_path / "means.json")).read_bytes()
    assert files(url)[layout.IMPORTED_MEANS] == data
    assert imported_sha256(read_header(url)) == digest(data)
    table = pq.read_table(Path(url, layout.CLASS_MEANS))
    assert table["count"].to_pylist() == [None] * K
    assert table.schema.metadata[b"stillroom:imported"].decode() == digest(data)
    # Computed in float64, stored as fp32.
    norm_K = np.linalg.norm(means.mean_KD.astype(np.float64), axis=1)
    np.testing.assert_allclose(table["norm"], norm_K, rtol=ulps(1))


def test_everything_but_the_means_is_as_without_them(built_importing: TinyCache, built_cache: TinyCache) -> None:
    imported, computed = (
        {path: data for path, data in files(cache.url).items() if path.startswith("parts/") and "/eval." not in path}
        for cache in (built_importing, built_cache)
    )
    assert imported == computed
    assert read_header(built_importing.url).fingerprint != read_header(built_cache.url).fingerprint


def test_classes_that_the_file_lacks_have_no_mean_and_are_not_exported(importing: Import, tmp_path: Path) -> None:
    cache = open_built(importing(url=means_file(tmp_path / "seven.json", classes=7), views={"count": 1}))
    means = cache.class_means()
    assert means is not None
    assert np.isnan(means.mean_KD).all(axis=1).tolist() == [False] * 7 + [True] * 3
    done = export_means(cache.url, str(tmp_path / "out.json"), full_precision=False)
    assert (done.num_written, done.absent) == (7, (7, 8, 9))
    assert sorted(json.loads((tmp_path / "out.json").read_text())) == [str(name) for name in range(7)]


@pytest.mark.parametrize(
    ("keys", "code", "expected"),
    [
        ({"dim": D + 1}, "config.class-means-wrong-width", "7 numbers"),
        ({"classes": K + 1}, "config.class-means-unknown-class", "class ids 0 to 9"),
        ({"classes": 0}, "config.class-means-empty", '{"<class id>": [D numbers], …}'),
    ],
)
def test_a_file_of_another_teacher_is_refused_before_anything_is_written(
    keys: dict[str, int], code: str, expected: str, importing: Import, tmp_path: Path
) -> None:
    url = means_file(tmp_path / "wrong.json", **keys)
    config = importing(url=url)
    with pytest.raises(ConfigError) as caught:
        build(config)
    error = caught.value
    assert (error.code, error.where, error.expected) == (code, f"cache.class_means: {url}", expected)
    assert not Path(cache_section(config).url).exists()


def test_a_file_that_could_not_hold_so_few_numbers_is_not_even_read(importing: Import, tmp_path: Path) -> None:
    (tmp_path / "huge.json").write_bytes(b" " * 6000)
    with pytest.raises(ConfigError, match=r"config\.class-means-too-large[\s\S]*6000 bytes[\s\S]*at most 5632 bytes"):
        build(importing(url=str(tmp_path / "huge.json")))


@pytest.mark.parametrize("url", ["evall", "/nowhere/means.json", "pipe:cat means.json", "imported:0123"])
def test_a_value_that_names_no_file_is_refused_with_the_choices(url: str, importing: Import) -> None:
    config = importing(url=url)
    with pytest.raises(ConfigError, match=r"config\.class-means-unreadable[\s\S]*none, eval, view0, or"):
        build(config)
    assert not Path(cache_section(config).url).exists()


def test_a_changed_file_is_refused_with_both_digests_and_nothing_is_written(
    imported_cache: TinyCache, importing: Import, tmp_path: Path
) -> None:
    before = files(imported_cache.url)
    path = tmp_path / "means.json"
    first, second = (digest(Path(means_file(path, shift=shift)).read_bytes()) for shift in (0, 1))
    with pytest.raises(CacheError, match=rf"cache\.other-header[\s\S]*imported:{first} -> imported:{second}"):
        build(importing(url=str(path)))
    assert files(imported_cache.url) == before


@pytest.mark.parametrize("started_with", ["eval", "none"])
def test_a_cache_with_another_header_refuses_imported_means(
    started_with: str, importing: Import, tiny_config: TinyConfig
) -> None:
    prepare(tiny_config(cache={"class_means": started_with}))
    with pytest.raises(
        CacheError, match=rf"cache\.unused-header[\s\S]*teacher\.class_means: {started_with} -> imported:"
    ):
        prepare(importing())


def test_a_build_killed_between_header_and_copy_resumes_to_the_same_bytes(
    importing: Import, built_importing: TinyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = importing()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.build.context.store_means", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert list(files(cache_section(config).url)) == [layout.HEADER]
    build(config)
    assert files(cache_section(config).url) == files(built_importing.url)


def test_a_cache_is_extended_with_its_copy_of_the_file_and_its_means_stay(
    imported_cache: TinyCache, importing: Import, tmp_path: Path
) -> None:
    url, more = imported_cache.url, {"views": {"count": 4}}
    with pytest.raises(ConfigError, match=r"config\.class-means-unreadable[\s\S]*class_means\.json"):
        build(importing(url=str(tmp_path / "missing.json"), **more))
    before = files(url)
    assert open_built(importing(url=f"{url}/{layout.IMPORTED_MEANS}", **more)).num_views == 4
    after = files(url)
    assert all(after[name] == before[name] for name in (layout.IMPORTED_MEANS, layout.CLASS_MEANS))


@pytest.mark.parametrize(
    ("damage", "code"), [(b"{}", "cache.changed-file"), (None, "cache.missing-file")], ids=["changed", "missing"]
)
def test_a_damaged_copy_is_found_when_a_manifest_is_published(
    damage: bytes | None, code: str, imported_cache: TinyCache, importing: Import
) -> None:
    config = importing()
    path = Path(imported_cache.url, layout.IMPORTED_MEANS)
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(CacheError, match=r"class_means\.json[\s\S]*stillroom cache build CONFIG") as caught:
        publish_manifest(imported_cache.url, shard_urls(config))
    assert caught.value.code == code
    path.unlink(missing_ok=True)
    build(config)
    assert path.exists()


def test_credentials_of_the_url_are_neither_stored_nor_shown(importing: Import) -> None:
    with pytest.raises(ConfigError) as caught:
        build(importing(url="memory://me:secret@nowhere/means.json"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("full_precision", "rtol", "atol"), [(True, 0, 0), (False, ulps(1), 0.5e-4)])
def test_exported_means_are_the_means_within_rounding(
    built_cache: TinyCache, tmp_path: Path, full_precision: bool, rtol: float, atol: float
) -> None:
    out = str(tmp_path / "out.json")
    done = export_means(built_cache.url, out, full_precision=full_precision)
    assert (done.num_written, done.embedding_dim, done.absent) == (K, D, ())
    exported = parse_nd_json(storage.read(out), num_classes=K, embedding_dim=D, where=out).mean_CD
    means = open_cache(built_cache.url).class_means()
    assert means is not None
    # Rounded to four decimals, then to fp32.
    np.testing.assert_allclose(exported, means.mean_KD, rtol=rtol, atol=atol)
    assert np.array_equal(exported, means.mean_KD) is full_precision


def test_exported_classes_are_in_the_order_of_their_first_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # Labels 3 to 9, then 0, 9 …; one sample has none.
    samples = [(key, members) for key, members in digit_samples(35)][3:]
    samples.insert(0, ("unlabelled", {"png": samples[0][1]["png"]}))
    shards = pack_shards(samples, f"{tmp_path}/shard-%02d.tar", shard_size=9)
    cache = open_built(tiny_config(data={"shards": shards, "missing_labels": "ignore"}, views={"count": 1}))
    export_means(cache.url, str(tmp_path / "out.json"), full_precision=False)
    assert list(json.loads((tmp_path / "out.json").read_text())) == list("3456789012")


def test_a_cache_without_class_means_has_none_to_export(
    tiny_config: TinyConfig, digits_shards: list[str], tmp_path: Path
) -> None:
    few = {"data": {"shards": digits_shards[1:]}, "views": {"count": 1}}
    cache = open_built(tiny_config(cache={"class_means": "none"}, **few))
    with pytest.raises(CacheError, match=r"cache\.no-class-means"):
        export_means(cache.url, str(tmp_path / "out.json"), full_precision=False)
    assert not (tmp_path / "out.json").exists()


def test_verify_checks_the_means_against_the_file_and_the_file_against_the_header(imported_cache: TinyCache) -> None:
    url = imported_cache.url
    report = verify_cache(url)
    assert (report.ok, report.unnamed) == (True, ())
    for name in (layout.IMPORTED_MEANS, layout.CLASS_MEANS):
        path = Path(url, name)
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert {problem.file for problem in verify_cache(url).problems} == {name}
        path.write_bytes(data)
