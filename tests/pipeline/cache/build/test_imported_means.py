"""Class means from a file: checked before any work, part of the fingerprint, independent of the URL, and exported."""

from __future__ import annotations

import json
import shutil
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
from pipeline.cache.ops.export_means import export_means
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import digest
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, files, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig
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


def test_the_caches_means_are_those_of_the_file_and_there_is_no_eval_pass(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    url = cache_section(config).url
    means = open_cache(url).class_means()
    assert means is not None
    assert means.mean_KD.tolist() == [[(name + column) / 8 for column in range(D)] for name in range(K)]
    assert means.count_K is None
    assert {(commit.block.is_eval, commit.means) for commit in read_commits(url)} == {(False, None)}
    data = (tmp_path / "means.json").read_bytes()
    assert files(url)[layout.IMPORTED_MEANS] == data
    assert imported_sha256(read_header(url)) == digest(data)


def test_the_table_records_that_it_was_imported_and_that_counts_are_unknown(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    table = pq.read_table(Path(cache_section(config).url, layout.CLASS_MEANS))
    assert table["count"].to_pylist() == [None] * K
    assert table.schema.metadata[b"stillroom:imported"].decode() == digest((tmp_path / "means.json").read_bytes())
    mean_KD = np.stack(table["mean"].to_numpy()).astype(np.float64)
    # Computed in float64, stored as fp32.
    np.testing.assert_allclose(table["norm"], np.linalg.norm(mean_KD, axis=1), rtol=ulps(1))


def test_a_cache_of_imported_means_is_the_same_bytes_each_time(importing: Import, tmp_path: Path) -> None:
    first, second = importing(), importing(cache={"url": str(tmp_path / "second")})
    build(first)
    build(second)
    assert files(cache_section(first).url) == files(cache_section(second).url)


def test_everything_but_the_means_is_as_without_them(
    importing: Import, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = importing()
    plain = tiny_config(cache={"class_means": "none", "url": str(tmp_path / "plain")})
    build(config)
    build(plain)
    parts = [
        {path: data for path, data in files(cache_section(it).url).items() if path[:5] == "parts"}
        for it in (config, plain)
    ]
    assert parts[0] == parts[1]
    assert read_header(cache_section(config).url).fingerprint != read_header(cache_section(plain).url).fingerprint


def test_classes_that_the_file_lacks_have_no_mean(importing: Import, tmp_path: Path) -> None:
    config = importing(url=means_file(tmp_path / "seven.json", classes=7))
    build(config)
    means = open_cache(cache_section(config).url).class_means()
    assert means is not None
    assert np.isnan(means.mean_KD).all(axis=1).tolist() == [False] * 7 + [True] * 3


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


def test_a_changed_file_is_refused_with_both_digests_and_nothing_is_written(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    before = files(cache_section(config).url)
    first = digest((tmp_path / "means.json").read_bytes())
    means_file(tmp_path / "means.json", shift=1)
    second = digest((tmp_path / "means.json").read_bytes())
    with pytest.raises(CacheError, match=rf"cache\.other-header[\s\S]*imported:{first} -> imported:{second}"):
        build(config)
    assert files(cache_section(config).url) == before


@pytest.mark.parametrize("begun", ["eval", "none"])
def test_a_cache_with_another_header_refuses_imported_means(
    begun: str, importing: Import, tiny_config: TinyConfig
) -> None:
    prepare(tiny_config(cache={"class_means": begun}))
    with pytest.raises(CacheError, match=rf"cache\.unused-header[\s\S]*teacher\.class_means: {begun} -> imported:"):
        prepare(importing())


def test_a_build_killed_between_header_and_copy_resumes(
    importing: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, config = importing(cache={"url": str(tmp_path / "reference")}), importing()
    build(reference)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.build.context.store_means", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert list(files(cache_section(config).url)) == [layout.HEADER]
    build(config)
    assert files(cache_section(config).url) == files(cache_section(reference).url)


def test_a_cache_reads_without_the_file_and_is_extended_with_its_copy(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    section = cache_section(config)
    more, copy = {"views": {"count": 5}}, tmp_path / "copy.json"
    (tmp_path / "means.json").unlink()
    assert open_cache(section.url).class_means() is not None
    with pytest.raises(ConfigError, match=r"config\.class-means-unreadable[\s\S]*class_means\.json"):
        build(importing(url=str(tmp_path / "means.json"), **more))
    shutil.copyfile(Path(section.url, layout.IMPORTED_MEANS), copy)
    build(importing(url=f"{section.url}/{layout.IMPORTED_MEANS}", **more))
    cache = open_cache(section.url)
    assert cache.num_views == 5
    assert files(section.url)[layout.IMPORTED_MEANS] == copy.read_bytes()


def test_means_stay_those_of_the_file_when_shards_are_added(importing: Import) -> None:
    config = importing()
    assert isinstance(config.data.shards, tuple)
    build(importing(data={"shards": config.data.shards[:1]}))
    before = files(cache_section(config).url)[layout.CLASS_MEANS]
    build(config)
    assert open_cache(cache_section(config).url).manifest.num_shards == 2
    assert files(cache_section(config).url)[layout.CLASS_MEANS] == before


@pytest.mark.parametrize(
    ("damage", "code"), [(b"{}", "cache.changed-file"), (None, "cache.missing-file")], ids=["changed", "missing"]
)
def test_a_damaged_copy_is_found_when_a_manifest_is_published(
    damage: bytes | None, code: str, importing: Import
) -> None:
    config = importing()
    build(config)
    url = cache_section(config).url
    path = Path(url, layout.IMPORTED_MEANS)
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(CacheError, match=r"class_means\.json[\s\S]*stillroom cache build CONFIG") as caught:
        publish_manifest(url, shard_urls(config))
    assert caught.value.code == code
    path.unlink(missing_ok=True)
    build(config)
    assert path.exists()


def test_credentials_of_the_url_are_neither_stored_nor_shown(importing: Import) -> None:
    with pytest.raises(ConfigError) as caught:
        build(importing(url="memory://me:secret@nowhere/means.json"))
    assert "secret" not in str(caught.value)


def test_exported_means_are_the_means_within_rounding_and_come_back(
    built_cache: TinyCache, importing: Import, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.json")
    done = export_means(built_cache.url, out, full_precision=False)
    assert (done.num_written, done.embedding_dim, done.absent) == (K, D, ())
    config = importing(url=out)
    build(config)
    exported, imported = open_cache(built_cache.url).class_means(), open_cache(cache_section(config).url).class_means()
    assert exported is not None
    assert imported is not None
    # Rounded to four decimals, then to fp32.
    np.testing.assert_allclose(imported.mean_KD, exported.mean_KD, rtol=ulps(1), atol=0.5e-4)
    assert (imported.mean_KD != exported.mean_KD).any()
    again = str(tmp_path / "again.json")
    export_means(cache_section(config).url, again, full_precision=False)
    assert storage.read(again) == storage.read(out)


def test_exported_in_full_the_means_come_back_bit_by_bit(
    built_cache: TinyCache, importing: Import, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.json")
    export_means(built_cache.url, out, full_precision=True)
    config = importing(url=out)
    build(config)
    exported, imported = open_cache(built_cache.url).class_means(), open_cache(cache_section(config).url).class_means()
    assert exported is not None
    assert imported is not None
    np.testing.assert_array_equal(imported.mean_KD, exported.mean_KD)


def test_exported_classes_are_in_the_order_of_their_first_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # Labels 3 to 9, then 0, 9 …; one sample has none.
    samples = [(key, members) for key, members in digit_samples(35)][3:]
    samples.insert(0, ("unlabelled", {"png": samples[0][1]["png"]}))
    shards = pack_shards(samples, f"{tmp_path}/shard-%02d.tar", shard_size=9)
    config = tiny_config(data={"shards": shards, "missing_labels": "ignore"}, views={"count": 1})
    build(config)
    export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert list(json.loads((tmp_path / "out.json").read_text())) == list("3456789012")


def test_classes_without_a_mean_are_left_out_and_reported(importing: Import, tmp_path: Path) -> None:
    config = importing(url=means_file(tmp_path / "seven.json", classes=7))
    build(config)
    done = export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert (done.num_written, done.absent) == (7, (7, 8, 9))
    assert sorted(json.loads((tmp_path / "out.json").read_text())) == [str(name) for name in range(7)]


def test_a_cache_without_class_means_has_none_to_export(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(cache={"class_means": "none"})
    build(config)
    with pytest.raises(CacheError, match=r"cache\.no-class-means"):
        export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert not (tmp_path / "out.json").exists()


def test_verify_checks_the_means_against_the_file_and_the_file_against_the_header(importing: Import) -> None:
    config = importing()
    build(config)
    url = cache_section(config).url
    report = verify_cache(url)
    assert (report.ok, report.unnamed) == (True, ())
    for name in (layout.IMPORTED_MEANS, layout.CLASS_MEANS):
        path = Path(url, name)
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert {problem.file for problem in verify_cache(url).problems} == {name}
        path.write_bytes(data)
