"""Ask the teacher again about some rows of a cache, and compare what it says with what is stored.

Where the numeric environment is the part's own, stored numbers must be the same bits. Elsewhere hardware and libraries
round differently: an answer may then lie off by the encoding's error of that row, and by the share of the standard
deviation of all answers that is allowed to the probe images of the header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cache.build.header_claim import MAX_DRIFT, check_same
from pipeline.cache.format import layout
from pipeline.cache.format.codec import decode, encode
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify.report import Findings, Problem, Recomputed
from pipeline.cache.verify.sample import LiveTeacher, Pool, Sample, arrange
from pipeline.teacher.inference import InferenceOutputs, Teacher
from schemas.cache_format import Output

_BATCHES_AT_ONCE = 4
_MIN_ROWS_AT_ONCE = 256


def recompute(
    cache_url: str,
    live: LiveTeacher,
    *,
    num_rows: int,
    shard_urls: Mapping[str, str],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Findings, Recomputed]:
    """Compares about ``num_rows`` rows, spread evenly over shards and views; of mixed views, both rows of a pair.

    Args:
        shard_urls: where the images are, by shard id; others are where the build found them.
    """
    findings = Findings()
    found = Recomputed()
    with findings.told(layout.HEADER), ThreadPoolExecutor(live.config.ray.cpus_per_task) as decoders:
        cache = open_cache(cache_url)
        check_same(cache.header, live.header, cache_url)
        sample = Sample(cache, live, shard_urls, decoders, findings)
        pool = Pool()
        limit = max(_MIN_ROWS_AT_ONCE, _BATCHES_AT_ONCE * live.teacher.batch_size)
        for done, expected in sample.fill(pool, num_rows, seed):
            if len(pool.rows) >= limit or done == expected:
                found = found.plus(_compare(pool, live, findings))
                pool = Pool()
            if progress is not None:
                progress(done, expected)
    return findings, found


def _ask(pool: Pool, teacher: Teacher) -> InferenceOutputs:
    """What the teacher says of the rows, each at the place in a batch that it had in the build."""
    order, place = arrange([row.slot for row in pool.rows], teacher.batch_size)
    pixels_MCHW = torch.stack([pool.rows[row].pixels_CHW for row in order])
    lambda_M = np.array([pool.rows[row].mix_lambda for row in order], np.float32)
    if (lambda_M == 1).all():
        answers = teacher.infer(pixels_MCHW)
    else:
        partner_M = place[np.array(pool.partner)[order]].astype(np.int32)
        cutmix_box_M4 = np.stack([pool.rows[row].cutmix_box_4 for row in order])
        answers = teacher.infer(pixels_MCHW, partner_M, lambda_M, cutmix_box_M4 if cutmix_box_M4.any() else None)
    return InferenceOutputs(answers.logits_NK[place], answers.embedding_ND[place])


def _compare(pool: Pool, live: LiveTeacher, findings: Findings) -> Recomputed:
    if not pool.rows:
        return Recomputed()
    answers = _ask(pool, live.teacher)
    made = {"logits": answers.logits_NK, "embedding": answers.embedding_ND}
    drift = MAX_DRIFT[live.teacher.precision]
    differs_N, largest = np.zeros(len(pool.rows), np.bool_), 0.0
    same_N = np.array([row.same_environment for row in pool.rows])
    for output in live.header.outputs:
        scale = max(float(made[output.name].std()), 1e-6)
        stored_ND = np.stack([row.stored[output.name] for row in pool.rows])
        off_N, allowed_N = distance(stored_ND, made[output.name], output, drift=drift * scale, same_N=same_N)
        _emit(pool, output.name, off_N / scale, allowed_N / scale, findings)
        differs_N |= off_N > 0
        largest = max(largest, float(off_N.max()) / scale)
    norm_N = np.linalg.norm(answers.embedding_ND.astype(np.float64), axis=1).astype(np.float32)
    off_N = np.abs(norm_N - np.array([row.norm for row in pool.rows])) / np.maximum(norm_N, 1e-6)
    _emit(pool, "embedding_norm", off_N, np.where(same_N, 0.0, drift), findings)
    differs_N |= off_N > 0
    return Recomputed(
        rows=len(pool.rows),
        same_environment=int(same_N.sum()),
        identical=int((~differs_N).sum()),
        largest_difference=largest,
    )


def distance(
    stored_ND: NDArray[np.float32],
    made_ND: NDArray[np.float32],
    output: Output,
    *,
    drift: float,
    same_N: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far each row is off at most, and how far it may be: nothing at all for rows of ``same_N``."""
    kept_ND = decode(encode(made_ND, output), output)
    bits_N, exact_N = (np.abs(stored_ND.astype(np.float64) - values_ND).max(1) for values_ND in (kept_ND, made_ND))
    encoding_N = np.abs(kept_ND - made_ND.astype(np.float64)).max(1)
    return np.where(same_N | (bits_N == 0), bits_N, exact_N), np.where(same_N, 0.0, encoding_N + drift)


def _emit(
    pool: Pool, name: str, off_N: NDArray[np.floating], allowed_N: NDArray[np.floating], findings: Findings
) -> None:
    unit = "of their standard deviation" if name != "embedding_norm" else "of itself"
    for at in np.flatnonzero(~(off_N <= allowed_N)):
        row = pool.rows[at]
        findings.add(
            Problem(
                row.file,
                f"{name} is not what the teacher says",
                got=f"off by {off_N[at]:.3g} {unit}",
                expected="the same bits: the numeric environment is the part's own"
                if row.same_environment
                else f"at most {allowed_N[at]:.3g}",
                shard=row.shard,
                view=row.view,
                key=row.key,
                rows=1,
            )
        )
