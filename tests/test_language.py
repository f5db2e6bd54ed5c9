"""Words that were replaced by terms of the field stay out of the product code and of the documentation.

A pattern is listed only if it has no legitimate use: names that no longer exist, and private expressions.
CONTRIBUTING.md has the rules; docs/upgrading.md lists former names and is exempt.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_EXEMPT = {"docs/upgrading.md"}
_SUFFIXES = {".py", ".md", ".yaml", ".toml"}
# Pattern to the term to use instead.
REPLACED = {
    # Names.
    r"StoredWords|TeacherWords": "EncodedTeacherOutputs, TeacherOutputs",
    r"\bwords_[A-Z0-9]+\b": "random_bits_… for random numbers, the array's name elsewhere",
    r"\bLessons?\b|LessonFacts|open_lessons|facts_of": "Supervision, SupervisionSpec, open_supervision, resolve_spec",
    r"AskedConfig|AskedTeacher|ask_groups|StudentAnswer": "TeacherModelConfig, run_inference, StudentOutputs",
    r"KeptCommit|\bStanding\b": "CompressedCommit, CommitSummary",
    r"Speedometer|\bUpdater\b": "ThroughputMeter, OptimizerStep",
    r"is_leaving|\bleads\(": "preemption_pending, is_main_rank",
    r"survey_ground|\bcrowding\b": "collect_plan_inputs, over_budget",
    r"ShardDraws|drawn_columns": "ShardAugParams, aug_param_columns",
    r"PassingStorageError": "TransientStorageError",
    r"patience_s|\bwithdraw\b": "timeout_s, revoke",
    # Prose: a teacher produces outputs, a network takes an input, data are stored.
    r"\bone's own\b": "your own, or name the owner",
    r"\bwhoever\b|\bstrangers?\b": "the user, untrusted data",
    r"\bmade again\b": "repeated, rebuilt",
    r"teacher's words|\bits words\b": "teacher outputs",
    r"\bheard\b|\bnobody\b": "received, observed; no process, no user",
    r"\bmates\b": "mixup partners",
    r"\bpatience\b|\badvice\b": "timeout; warnings",
    r"\bhis\b": "its, for a network or a process",
    r"_Outcomes\b|_Parcel\b": "ErrorCapturingDataset, SharedMemoryBatch",
    r"\bmended?\b": "fix",
    r"\banew\b|\bfor ever\b|\bfor good\b": "again; without limit; permanently",
    r"\bsomebody\b": "the user, the recipient, an untrusted source",
    r"\btells\b|\btold\b|\bsays\b|\bsaid\b": "report, state, describe",
    r"\basked\b|\basks\b|\bspeaks\b": "request, query, prompt; a teacher runs on an input",
    r"\bknows\b|\blearnt\b": "has, stores, is registered",
    r"\beats?\b|\beaten\b": "expects, input_spec",
    r"\bdrawn\b": "sampled",
    r"\btheirs\b|\bours\b": "name the owner",
    r"\bbeside\b|\bof its own\b": "next to, in addition to; separate",
    r"\bby itself\b|what is there\b": "automatically; existing files",
    r"\bcome and go\b": "are added and lost",
    r"\bgo(?:es)? on\b|\bwent on\b|\btaken away\b": "continue, resume; preempted",
    r"\bgo together\b|\balike\b|\bseen to it\b": "compatible; equal; ensured by",
    r"\bhim\b|\banybody\b|\bcolleagues?\b|\bin the midst\b": "name the process or the user; in the middle",
    r"\ba teacher online\b|\bteachers online\b": "online teacher",
    r"\bbridge\b|\bpieces?\b|\bdense\(\)": "projector; micro-batches, chunks; decode()",
    r"check_\w+_serves?\b|check_begun|failures\.repeated": "check_cached_outputs, …; check_same_config; with_retries",
    r"\b(?:ms|µs) a (?:row|view|part|task|image|shard)\b|\bbytes a (?:view|part|task|image|shard)\b": "per row",
}


@cache
def texts() -> dict[str, str]:
    """Product code, manifests and documentation by path; generated pages repeat the docstrings."""
    folders = ("pipeline", "jobs", "schemas", "stillroom", "docs", "examples", "infra")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in _SUFFIXES or path.name == "Dockerfile"]
    by_name = {str(path.relative_to(ROOT)): path.read_text() for path in [*paths, *ROOT.glob("*.md")]}
    return {name: text for name, text in by_name.items() if name not in _EXEMPT}


def uses(pattern: str) -> list[str]:
    expression = re.compile(pattern, re.IGNORECASE if pattern.islower() else 0)
    return [f"{name}: {match[0]}" for name, text in texts().items() for match in expression.finditer(text)]


@pytest.mark.parametrize("pattern", REPLACED)
def test_a_replaced_word_is_not_used(pattern: str) -> None:
    assert not uses(pattern), f"use: {REPLACED[pattern]}"
