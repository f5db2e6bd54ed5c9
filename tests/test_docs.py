"""The documents against the code: keys, commands, targets, files and the snippet are those that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from numpy.typing import NDArray

from jobs.cli import app
from pipeline.cache.format.codec import RowIdentity, decode, encode, is_fixed, stored_outputs
from pipeline.cache.read.reader import open_cache
from pipeline.shards.writer import pack_shards
from pipeline.tasks import OutputSpec
from schemas.config import Config
from tests.docs import config_tables
from tests.docs.error_codes import all_codes
from tests.docs.pages import generated_files
from tests.jobs.conftest import config_of, tree_below
from tests.pipeline.caches import build, digit_samples
from tests.tolerances import magnitude_of, ulps

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*PAGES, *(ROOT / name for name in NAMES), ROOT / "infra" / "README.md"]
_PATH = re.compile(
    r"(?:jobs|pipeline|schemas|stillroom|tests|docs|infra|examples)/[\w./-]*\w|[A-Z]+\.md|pyproject\.toml|\.ci/run"
)
_SECTIONS = "data|teacher|student|views|cache|train|run"
_KEY = re.compile(rf"(?:{_SECTIONS})\.[a-z_]+")
# The pages that list former paths.
_FORMER = {"upgrading.md"}


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> str:
    if not request.param.exists():
        pytest.skip(f"{request.param.name} is not here")
    return request.param.read_text()


def fences(text: str) -> list[str]:
    """The bodies of fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def code_lines(text: str) -> Iterator[str]:
    """Every line of code, without comments."""
    for piece in (*spans(text), *fences(text)):
        yield from (line.partition("#")[0].strip() for line in piece.splitlines())


def documented_defaults() -> dict[str, Any]:
    """``section.key`` to the default that docs/reference/config.md states; losses as ``loss`` and ``loss: kd``."""
    defaults: dict[str, Any] = {}
    section = ""
    for line in (ROOT / "docs" / "reference" / "config.md").read_text().splitlines():
        if heading := re.match(r"#+ (.+)", line):
            section = heading[1]
        if row := re.match(r"\| `(\w+)` \| .+ \| (required|`.*`) \| .+ \|$", line):
            defaults[f"{section}.{row[1]}"] = row[2] if row[2] == "required" else yaml.safe_load(row[2].strip("`"))
    return defaults


@cache
def coded_defaults() -> dict[str, Any]:
    """The same from schemas/config/."""
    return {
        f"{heading}.{key}": default
        for heading, model in config_tables.sections().items()
        for key, _, default, _ in config_tables.rows(heading, model)
    }


def test_every_key_is_documented_with_its_default_and_no_other_is() -> None:
    assert documented_defaults() == coded_defaults()


def test_every_loss_has_a_part_of_the_document() -> None:
    text = (ROOT / "docs" / "reference" / "config.md").read_text()
    assert set(re.findall(r"^### loss: (\w+)$", text, re.MULTILINE)) == config_tables.losses().keys()


def test_every_make_target_that_is_mentioned_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = {
        word
        for line in code_lines(document)
        if line.startswith("make ")
        for word in re.split(r"[\s|]+", line)[1:]
        if word and "=" not in word
    }
    assert mentioned <= targets


def test_every_command_that_is_mentioned_exists(document: str) -> None:
    root: Any = typer.main.get_command(app)
    commands: dict[str, Any] = root.commands
    subcommands = {name: set(getattr(command, "commands", {})) for name, command in commands.items()}
    for line in code_lines(document):
        for name, rest in re.findall(r"(?<![\w/.-])(?<!from )stillroom ([a-z]+)(?: ([a-z]+))?", line):
            assert name in subcommands, line
            assert not subcommands[name] or rest in subcommands[name], line


def test_every_module_that_is_run_exists(document: str) -> None:
    for name in re.findall(r"python -m ((?:jobs|tests|pipeline)[\w.]*)", document):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or name == "jobs.NAME", name


def test_every_file_that_is_mentioned_exists(document: str, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["document"].name in _FORMER:
        return
    mentioned = {span for span in spans(document) if _PATH.fullmatch(span.rstrip("/"))}
    missing = {path for path in mentioned if not (ROOT / path).exists()}
    assert not missing


def anchor_of(heading: str) -> str:
    """As GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_link_leads_to_a_file_and_to_a_heading_in_it() -> None:
    for path in filter(Path.exists, DOCUMENTS):
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", path.read_text()):
            linked = path.parent / target if target else path
            assert linked.exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                assert anchor in {anchor_of(heading) for heading in headings}, f"{path.name}: {target}#{anchor}"


def test_the_site_has_every_page_in_its_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_another_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", path.read_text())
        sources = [re.search(r"""(?:src|href)=["']?(https?:)?//""", tag) for tag in tags if "canonical" not in tag]
        assert not any(sources), path.relative_to(tmp_path)


def test_every_generated_page_is_current() -> None:
    stale = [path.relative_to(ROOT) for path, text in generated_files().items() if path.read_text() != text]
    assert not stale, "run: python -m tests.docs"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def configs(text: str) -> list[dict[str, Any]]:
    """YAML blocks that are parts of a config."""
    blocks = [yaml.safe_load(body) for body in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    return [block for block in blocks if isinstance(block, dict) and block.keys() <= Config.model_fields.keys()]


def test_every_config_that_is_shown_is_valid(document: str) -> None:
    for config in configs(document):
        Config.model_validate(config)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_examples_is_valid(path: Path) -> None:
    Config.model_validate(yaml.safe_load(path.read_text()))


def test_every_key_that_is_mentioned_exists(document: str) -> None:
    mentioned = {
        # A code of an error may have hyphens.
        span if "-" in span and re.fullmatch(r"[\w.-]+", span) else match[0]
        for span in spans(document)
        if (match := _KEY.match(span)) and not re.match(r"(/|\.(?:json|py|yaml|parquet|pt))", span[match.end() :])
    }
    assert mentioned - coded_defaults().keys() - all_codes() == set()


def decoding_error(logits_NK: NDArray[np.float32]) -> float:
    """Of equal exponents, at most: exp, factor, difference, and three operations between levels. A distance below the
    top is at most twice the largest logit."""
    return ulps(6, 2 * magnitude_of(logits_NK))


def format_snippet() -> dict[str, Any]:
    """The functions of the code on the page of the format."""
    page = (ROOT / "docs" / "reference" / "format.md").read_text()
    snippet = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    return names


@pytest.mark.parametrize("embeddings", ["int8", "fp16"])
def test_the_snippet_of_the_format_computes_logits_from_embeddings(tmp_path: Path, embeddings: str) -> None:
    shards = pack_shards(digit_samples(12), f"{tmp_path}/digits-%02d.tar", shard_size=12)
    cache = {"logits": "head", "embeddings": embeddings}
    build(config_of(tree_below(tmp_path, shards, views={"size": 8, "count": 1}, cache=cache)))
    opened = open_cache(str(tmp_path / "cache"))
    (shard,) = opened.shards
    read = format_snippet()["read_logits"](opened.url, shard.shard_id, 0)
    columns = opened.view(shard.shard_id, 0)
    magnitude = np.abs(columns.decoded("embedding")).max() * opened.header.embedding_dim
    error = ulps(2 * opened.header.embedding_dim + 2, float(magnitude))
    np.testing.assert_allclose(read, columns.decoded("logits"), rtol=0, atol=error)


@pytest.mark.parametrize("logits", ["fp16", "int8", "topk:3"])
def test_the_snippet_of_the_format_decodes_maps(logits: str) -> None:
    (output,) = stored_outputs([OutputSpec("logits", (7, 3, 5), logits)])
    values_NKhw = np.random.default_rng(0).normal(0, 3, (4, 7, 3, 5)).astype(np.float32)
    stored = encode(values_NKhw, output)
    row_dtype = np.dtype([(field.name, field.dtype, (field.count,)) for field in output.fields])
    rows, unpack = np.frombuffer(b"".join(stored.to_pylist()), row_dtype), format_snippet()["unpack"]
    for temperature in (1.0, 3.0):
        unpacked = unpack(rows, output.model_dump(), temperature).reshape(values_NKhw.shape)
        expected = decode(stored, output, temperature=temperature)
        np.testing.assert_allclose(unpacked, expected, rtol=0, atol=decoding_error(unpacked))


@pytest.mark.parametrize("logits", ["fp32", "fp16", "int8", "int8t", "int4", "topk:5", "sampled:5@1"])
def test_the_snippet_of_the_format_reads_what_the_reader_reads(tmp_path: Path, logits: str) -> None:
    shards = pack_shards(digit_samples(12), f"{tmp_path}/digits-%02d.tar", shard_size=7)
    # int8t and int4 want many classes, and an odd number leaves half a byte of int4 over.
    sections = {"data": {"num_classes": 257}, "views": {"size": 8}, "cache": {"logits": logits}}
    build(config_of(tree_below(tmp_path, shards, **sections)))
    names = format_snippet()
    cache = open_cache(str(tmp_path / "cache"))
    output = cache.header.output("logits")
    assert output is not None
    for shard in cache.shards:
        for view in range(3):
            read = names["read_logits"](cache.url, shard.shard_id, view)
            expected = cache.view(shard.shard_id, view).decoded("logits")
            np.testing.assert_allclose(read, expected, rtol=0, atol=decoding_error(read))
    stored = encode(read, output, identity=RowIdentity([str(row) for row in range(len(read))], 0))
    for temperature in (1.0,) if is_fixed(output) else (0.5, 1.0, 3.0, 4.0, 20.0):
        row_dtype = np.dtype([(field.name, field.dtype, (field.count,)) for field in output.fields])
        rows = np.frombuffer(b"".join(stored.to_pylist()), row_dtype)
        unpacked = names["unpack"](rows, output.model_dump(), temperature)
        expected = decode(stored, output, temperature=temperature)
        np.testing.assert_allclose(unpacked, expected, rtol=0, atol=decoding_error(unpacked))
