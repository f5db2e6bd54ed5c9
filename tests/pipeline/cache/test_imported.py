"""Class means from a file: checked before any work, part of the fingerprint, whole without the URL; and out again."""

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
from pipeline.cache import build as build_module
from pipeline.cache import layout
from pipeline.cache.build import prepare
from pipeline.cache.commit import read_commits
from pipeline.cache.export import export_means
from pipeline.cache.identity import read_header
from pipeline.cache.imported import imported_sha256
from pipeline.cache.manifest import publish_manifest
from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheError, ConfigError
from pipeline.fingerprint import digest
from pipeline.shards.write import pack_shards
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, files, shard_urls
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
    """A config whose class means are a file of this test."""

    def make(**overrides: Any) -> Config:
        url = overrides.pop("url", None) or means_file(tmp_path / "means.json")
        return tiny_config(cache={"class_means": url, **overrides.pop("cache", {})}, **overrides)

    return make


def test_the_caches_means_are_those_of_the_file_and_no_eval_pass_is_made(importing: Import, tmp_path: Path) -> None:
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


def test_the_table_says_that_it_was_imported_and_that_counts_are_unknown(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    table = pq.read_table(Path(cache_section(config).url, layout.CLASS_MEANS))
    assert table["count"].to_pylist() == [None] * K
    assert table.schema.metadata[b"stillroom:imported"].decode() == digest((tmp_path / "means.json").read_bytes())
    mean_KD = np.stack(table["mean"].to_numpy()).astype(np.float64)
    # Computed in float64, stored as fp32.
    np.testing.assert_allclose(table["norm"], np.linalg.norm(mean_KD, axis=1), rtol=ulps(1))


def test_a_cache_of_imported_means_is_the_same_bytes_each_time(importing: Import, tmp_path: Path) -> None:
    one, other = importing(), importing(cache={"url": str(tmp_path / "other")})
    build(one)
    build(other)
    assert files(cache_section(one).url) == files(cache_section(other).url)


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
    ("keys", "told"),
    [
        ({"dim": D + 1}, r"not as wide[\s\S]*8 numbers[\s\S]*wanted: +7 numbers"),
        ({"classes": K + 1}, r"key '10'[\s\S]*class ids 0 to 9"),
        ({"classes": 0}, "no class"),
    ],
)
def test_a_file_of_another_teacher_is_refused_before_anything_is_written(
    keys: dict[str, int], told: str, importing: Import, tmp_path: Path
) -> None:
    url = means_file(tmp_path / "wrong.json", **keys)
    config = importing(url=url)
    with pytest.raises(ConfigError, match=told) as caught:
        build(config)
    assert caught.value.where == f"cache.class_means: {url}"
    assert not Path(cache_section(config).url).exists()


def test_a_file_that_could_not_hold_so_few_numbers_is_not_even_read(importing: Import, tmp_path: Path) -> None:
    (tmp_path / "huge.json").write_bytes(b" " * 6000)
    with pytest.raises(ConfigError, match=r"too large[\s\S]*6000 bytes[\s\S]*at most 5632 bytes for 10 classes of 7"):
        build(importing(url=str(tmp_path / "huge.json")))


@pytest.mark.parametrize("url", ["evall", "/nowhere/means.json", "pipe:cat means.json", "imported:0123"])
def test_a_word_or_url_that_is_no_file_is_refused_with_the_choices(url: str, importing: Import) -> None:
    config = importing(url=url)
    with pytest.raises(ConfigError, match="none, eval, view0, or the URL of a JSON file"):
        build(config)
    assert not Path(cache_section(config).url).exists()


def test_a_changed_file_is_refused_with_both_digests_and_nothing_is_written(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    before = files(cache_section(config).url)
    first = digest((tmp_path / "means.json").read_bytes())
    means_file(tmp_path / "means.json", shift=1)
    second = digest((tmp_path / "means.json").read_bytes())
    with pytest.raises(CacheError, match=rf"teacher\.class_means: imported:{first} -> imported:{second}"):
        build(config)
    assert files(cache_section(config).url) == before


@pytest.mark.parametrize(("begun", "told"), [("eval", "eval -> imported:"), ("none", "none -> imported:")])
def test_a_cache_begun_otherwise_takes_no_imported_means(
    begun: str, told: str, importing: Import, tiny_config: TinyConfig
) -> None:
    prepare(tiny_config(cache={"class_means": begun}))
    with pytest.raises(CacheError, match=rf"teacher\.class_means: {told}"):
        prepare(importing())


def test_a_build_killed_between_header_and_copy_resumes(
    importing: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = importing(cache={"url": str(tmp_path / "whole")}), importing()
    build(whole)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "keep_means", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert list(files(cache_section(config).url)) == [layout.HEADER]
    build(config)
    assert files(cache_section(config).url) == files(cache_section(whole).url)


def test_a_cache_is_whole_without_the_file_and_is_extended_by_its_own_copy(importing: Import, tmp_path: Path) -> None:
    config = importing()
    build(config)
    section = cache_section(config)
    more, kept = {"views": {"count": 5}}, tmp_path / "kept.json"
    (tmp_path / "means.json").unlink()
    assert open_cache(section.url).class_means() is not None
    with pytest.raises(ConfigError, match=r"no such file[\s\S]*the copy that a begun cache keeps as class_means\.json"):
        build(importing(url=str(tmp_path / "means.json"), **more))
    shutil.copyfile(Path(section.url, layout.IMPORTED_MEANS), kept)
    build(importing(url=f"{section.url}/{layout.IMPORTED_MEANS}", **more))
    cache = open_cache(section.url)
    assert cache.num_views == 5
    assert files(section.url)[layout.IMPORTED_MEANS] == kept.read_bytes()


def test_means_stay_those_of_the_file_when_shards_are_added(importing: Import) -> None:
    config = importing()
    assert isinstance(config.data.shards, tuple)
    build(importing(data={"shards": config.data.shards[:1]}))
    before = files(cache_section(config).url)[layout.CLASS_MEANS]
    build(config)
    assert open_cache(cache_section(config).url).manifest.num_shards == 2
    assert files(cache_section(config).url)[layout.CLASS_MEANS] == before


@pytest.mark.parametrize("damage", [b"{}", None], ids=["changed", "missing"])
def test_a_damaged_copy_is_found_when_a_manifest_is_published(damage: bytes | None, importing: Import) -> None:
    config = importing()
    build(config)
    url = cache_section(config).url
    path = Path(url, layout.IMPORTED_MEANS)
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(CacheError, match=r"class_means\.json[\s\S]*stillroom cache build CONFIG"):
        publish_manifest(url, shard_urls(config))
    path.unlink(missing_ok=True)
    build(config)
    assert path.exists()


def test_credentials_of_the_url_are_neither_kept_nor_told(importing: Import) -> None:
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
    own, imported = open_cache(built_cache.url).class_means(), open_cache(cache_section(config).url).class_means()
    assert own is not None
    assert imported is not None
    # Rounded to four decimals, then to fp32.
    np.testing.assert_allclose(imported.mean_KD, own.mean_KD, rtol=ulps(1), atol=0.5e-4)
    assert (imported.mean_KD != own.mean_KD).any()
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
    own, imported = open_cache(built_cache.url).class_means(), open_cache(cache_section(config).url).class_means()
    assert own is not None
    assert imported is not None
    np.testing.assert_array_equal(imported.mean_KD, own.mean_KD)


def test_exported_classes_stand_in_the_order_of_their_first_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # Labels 3 to 9, then 0, 9 …; one sample has none.
    samples = [(key, members) for key, members in digit_samples(35)][3:]
    samples.insert(0, ("unlabelled", {"png": samples[0][1]["png"]}))
    shards = pack_shards(samples, f"{tmp_path}/own-%02d.tar", shard_size=9)
    config = tiny_config(data={"shards": shards, "missing_labels": "ignore"}, views={"count": 1})
    build(config)
    export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert list(json.loads((tmp_path / "out.json").read_text())) == list("3456789012")


def test_classes_without_a_mean_are_left_out_and_told(importing: Import, tmp_path: Path) -> None:
    config = importing(url=means_file(tmp_path / "seven.json", classes=7))
    build(config)
    done = export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert (done.num_written, done.absent) == (7, (7, 8, 9))
    assert sorted(json.loads((tmp_path / "out.json").read_text())) == [str(name) for name in range(7)]


def test_a_cache_without_class_means_has_none_to_export(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(cache={"class_means": "none"})
    build(config)
    with pytest.raises(CacheError, match="has no class means"):
        export_means(cache_section(config).url, str(tmp_path / "out.json"), full_precision=False)
    assert not (tmp_path / "out.json").exists()


def test_verify_holds_the_means_to_the_file_and_the_file_to_the_header(importing: Import) -> None:
    config = importing()
    build(config)
    url = cache_section(config).url
    whole = verify_cache(url)
    assert (whole.ok, whole.unnamed) == (True, ())
    for name in (layout.IMPORTED_MEANS, layout.CLASS_MEANS):
        path = Path(url, name)
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert {problem.file for problem in verify_cache(url).problems} == {name}
        path.write_bytes(data)
