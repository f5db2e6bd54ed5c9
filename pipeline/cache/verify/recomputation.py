"""Computes teacher outputs again for a sample of rows, and compares them with the stored outputs.

In the numeric environment in which a part was built, the stored bits must be equal. In another environment, hardware
and libraries round differently: then an output may differ by the encoding's error of its row, plus the share of the
standard deviation of all outputs that the probe images of the header may drift.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.options import cutmix_boxes
from pipeline.augment.params import EVAL_VIEW
from pipeline.augment.random_bits import key_of, philox4x64, to_uniform
from pipeline.augment.stored_pixels import encoder_environment, other_encoder
from pipeline.cache.build.commit import read_commit
from pipeline.cache.build.context import BuildContext
from pipeline.cache.build.header_claim import MAX_DRIFT, check_same
from pipeline.cache.build.manifest import read_table
from pipeline.cache.build.statistics import log_softmax
from pipeline.cache.format import layout
from pipeline.cache.format.codec import (
    RowIdentity,
    column_name,
    decode,
    default_temperature,
    encode,
    is_sampled,
    with_column,
)
from pipeline.cache.format.header import replayable_plan
from pipeline.cache.read.reader import ShardEntry, TeacherCache, open_cache
from pipeline.cache.verify.images import ShardImages, single_view
from pipeline.cache.verify.report import Findings, Problem, Recomputed
from pipeline.core.errors import CacheError
from pipeline.shards.shard_urls import report_moved
from pipeline.tasks import TeacherOutputs, task_of
from pipeline.teacher.inference import Teacher
from pipeline.teacher.numerics import numeric_env
from pipeline.teacher.rendering import Mixing
from schemas.cache_format import Output

_BATCHES_AT_ONCE = 4
_MIN_ROWS_AT_ONCE = 256
_DECODED = (
    "teacher outputs: those of this cache are averages, or were decoded from a lossy encoding (--source compares)"
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A sampled row. Pixels, λ and box are the teacher's input.

    Attributes:
        file: path of the row's part.
        same_environment: whether the part was built in the current numeric environment.
        slot: position in the teacher's batch during the build: the last bits of a row may depend on it.
        partner: position of the row that it is mixed with, in the list of sampled rows.
        cutmix_box_4: the part of the view that comes from the partner, as fractions; width 0: a blend.
        stored: decoded rows by the name of the output.
    """

    shard: str
    view: int
    key: str
    file: str
    same_environment: bool
    slot: int
    partner: int
    pixels_CHW: Tensor
    mix_lambda: np.float32
    cutmix_box_4: NDArray[np.float32]
    stored: dict[str, NDArray[np.float32]]
    norm: np.float32


def recompute(
    cache_url: str,
    context: BuildContext,
    findings: Findings,
    *,
    num_rows: int,
    shard_urls: Mapping[str, str],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Recomputed:
    """Compares about ``num_rows`` rows, spread evenly over shards and views; of mixed views both rows of a pair.

    Args:
        context: with the teacher, and the header that it would write.
        findings: receives the problems.
        shard_urls: where the images are, by shard id; default: where the build read them.
        progress: called with the number of finished (shard, view) pairs and of all sampled pairs.
    """
    recomputed = Recomputed()
    with findings.capture(layout.HEADER), ThreadPoolExecutor(context.config.ray.cpus_per_task) as decoders:
        cache = open_cache(cache_url)
        if cache.header.teacher.keys() & {"decoded_from", "average"}:
            findings.not_checked[_DECODED] += 1
            return recomputed
        check_same(cache.header, context.header, cache_url)
        sampler = _RowSampler(cache, context, shard_urls, decoders, findings)
        rows: list[_Row] = []
        max_rows = max(_MIN_ROWS_AT_ONCE, _BATCHES_AT_ONCE * context.teacher.batch_size)
        for done, num_pairs in sampler.append_to(rows, num_rows, seed):
            if rows and (len(rows) >= max_rows or done == num_pairs):
                recomputed += _compare(rows, context, findings)
                rows.clear()
            if progress is not None:
                progress(done, num_pairs)
    return recomputed


def pick(num_rows: int, num_all: int, seed: int) -> NDArray[np.int64]:
    """Positions among all rows, ascending: a random one of each of ``num_rows`` runs of equal length. int64 [N]."""
    num_rows = min(num_rows, num_all)
    edges = np.arange(num_rows + 1, dtype=np.int64) * num_all // max(1, num_rows)
    counters_N4 = np.zeros((num_rows, 4), np.uint64)
    counters_N4[:, 0] = np.arange(num_rows)
    share_N = to_uniform(philox4x64(key_of("verify", seed)[None], counters_N4))[:, 0]
    return edges[:-1] + np.floor(share_N * np.diff(edges)).astype(np.int64)


class _RowSampler:
    """Samples rows, renders their pixels, and reads their stored outputs."""

    def __init__(
        self,
        cache: TeacherCache,
        context: BuildContext,
        shard_urls: Mapping[str, str],
        decoders: ThreadPoolExecutor,
        findings: Findings,
    ) -> None:
        self._cache, self._batch_size, self._shard_urls = cache, context.teacher.batch_size, shard_urls
        self._decoders, self._findings = decoders, findings
        self._plan = replayable_plan(cache.header)
        numerics = numeric_env(context.teacher.device, batch_size=self._batch_size)
        self._environment = {**numerics, **encoder_environment(self._plan)}
        table = read_table(cache.url, cache.manifest.parts)
        views = zip(table["shard_id"].to_pylist(), table["view"].to_pylist(), strict=True)
        self._part_of_view = dict(zip(views, table["path"].to_pylist(), strict=True))

    def append_to(self, rows: list[_Row], num_rows: int, seed: int) -> Iterator[tuple[int, int]]:
        """Appends the sampled rows of one (shard, view) pair after the other.

        Yields after each pair the number of finished pairs and of all pairs. Rows may be removed in between.
        """
        sampled = self._sample(num_rows, seed)
        for done, ((shard, view), ordinals) in enumerate(sampled.items(), start=1):
            entry = self._cache.shards[shard]
            file = self._part_of_view[entry.shard_id, view]
            with self._findings.capture(file, shard=entry.shard_id, view=view):
                self._append_view(rows, entry, view, ordinals, file)
            yield done, len(sampled)

    def _sample(self, num_rows: int, seed: int) -> dict[tuple[int, int], list[int]]:
        """(position of the shard, view) to ordinals among its ok rows."""
        views = list(range(self._cache.num_views))
        if (self._cache.shards[0].shard_id, EVAL_VIEW) in self._part_of_view:
            views.append(EVAL_VIEW)
        pairs = [(shard, view) for shard in range(len(self._cache.shards)) for view in views]
        ends = np.cumsum([self._cache.shards[shard].num_ok for shard, _ in pairs])
        num_all = int(ends[-1])
        # The partner of each row is compared as well.
        num_picked = num_rows if num_rows >= num_all or not self._plan.mixes else -(-num_rows // 2)
        sampled: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for position in pick(num_picked, num_all, seed).tolist():
            at = int(np.searchsorted(ends, position, side="right"))
            sampled[pairs[at]].append(position - (int(ends[at - 1]) if at else 0))
        return sampled

    def _append_view(self, rows: list[_Row], entry: ShardEntry, view: int, ordinals: list[int], file: str) -> None:
        columns = self._cache.view(entry.shard_id, view)
        url = self._shard_urls.get(entry.shard_id, self._cache.shard_url(entry))
        # In mix groups of two, the two rows of a pair are partners, whatever the matching.
        plan = self._plan.model_copy(update={"mix_group": 2})
        images = ShardImages(url, self._cache.index(entry), self._cache.header, plan, self._decoders)
        partner_N = np.searchsorted(columns.row_N, columns.mix_row_N)
        units = dict.fromkeys(tuple(sorted({row, int(partner_N[row])})) for row in ordinals)
        environment = read_commit(self._cache.url, _commit_path(file)).environment
        if view != EVAL_VIEW and (reason := other_encoder(environment)) is not None:
            self._findings.not_checked[f"recomputed rows: {reason}"] += sum(map(len, units))
            return
        same_environment = environment == self._environment
        for unit in units:
            with report_moved([url], "append --shards {}"):
                group = images.render(unit, single_view(view))
            start = len(rows)
            boxes_VN4 = cutmix_boxes(group.aug_params_VN)
            for position, ordinal in enumerate(unit):
                stored = {
                    name: stored_rows.take(np.array([ordinal])).decode(
                        temperature=default_temperature(stored_rows.output)
                    )[0]
                    for name, stored_rows in columns.outputs.items()
                    if column_name(stored_rows.output) == name
                }
                rows.append(
                    _Row(
                        shard=entry.shard_id,
                        view=view,
                        key=images.key(ordinal),
                        file=file,
                        same_environment=same_environment,
                        slot=ordinal % self._plan.mix_group % self._batch_size,
                        partner=start + int(group.partner_VN[0, position]),
                        pixels_CHW=group.pixels_VNCHW[0, position],
                        mix_lambda=group.mix_lambda_VN[0, position],
                        cutmix_box_4=np.zeros(4, np.float32) if boxes_VN4 is None else boxes_VN4[0, position],
                        stored=stored,
                        norm=columns.embedding_norm_N[ordinal],
                    )
                )


def _commit_path(part_path: str) -> str:
    owner = layout.owner(part_path)
    if owner is None:
        raise CacheError("this is not the path of a part", code="cache.part-path", got=part_path)
    return layout.commit_path(*owner)


def arrange(slots: list[int], batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Arranges rows in full batches with each row in its slot; free slots repeat row 0.

    Returns:
        The row at each position [M], and the position of each row [N].
    """
    num_in_slot: Counter[int] = Counter()
    position_N = np.empty(len(slots), np.int64)
    for row, slot in enumerate(slots):
        position_N[row] = num_in_slot[slot] * batch_size + slot
        num_in_slot[slot] += 1
    row_M = np.zeros(max(num_in_slot.values(), default=0) * batch_size, np.int64)
    row_M[position_N] = np.arange(len(slots))
    return row_M, position_N


def _infer(rows: list[_Row], teacher: Teacher) -> TeacherOutputs:
    """The teacher's outputs, each row in the slot of a batch that it had in the build."""
    row_M, position_N = arrange([row.slot for row in rows], teacher.batch_size)
    batched = [rows[row] for row in row_M]
    pixels_MCHW = torch.stack([row.pixels_CHW for row in batched])
    lambda_M = np.array([row.mix_lambda for row in batched], np.float32)
    if (lambda_M == 1).all():
        outputs = teacher.infer(pixels_MCHW)
    else:
        partner_M = position_N[[row.partner for row in batched]].astype(np.int32)
        box_M4 = np.stack([row.cutmix_box_4 for row in batched])
        outputs = teacher.infer(pixels_MCHW, Mixing(partner_M, lambda_M, box_M4 if box_M4.any() else None))
    return {name: values[position_N] for name, values in outputs.items()}


def _compare(rows: list[_Row], context: BuildContext, findings: Findings) -> Recomputed:
    new = _infer(rows, context.teacher)
    drift = MAX_DRIFT[context.teacher.precision]
    differs_N, largest = np.zeros(len(rows), np.bool_), 0.0
    same_N = np.array([row.same_environment for row in rows])
    identity = RowIdentity([f"{row.shard}/{row.key}" for row in rows], np.array([row.view for row in rows]))
    for output in with_column(context.header.outputs):
        deviation = max(float(new[output.name].std()), 1e-6)
        scale = 1.0 if is_sampled(output) else deviation
        stored_ND = np.stack([row.stored[output.name].ravel() for row in rows])
        new_ND = new[output.name].reshape(len(rows), -1)
        off_N, allowed_N = distance(
            stored_ND, new_ND, output, drift=drift * deviation, same_N=same_N, identity=identity
        )
        _add_problems(rows, output, off_N / scale, allowed_N / scale, findings)
        differs_N |= off_N > 0
        largest = max(largest, float(off_N.max()) / scale)
    embedding = task_of(context.config.data).embedding
    if embedding is not None:
        norm_N = np.linalg.norm(new[embedding].astype(np.float64), axis=1).astype(np.float32)
        off_N = np.abs(norm_N - np.array([row.norm for row in rows])) / np.maximum(norm_N, 1e-6)
        _add_problems(rows, None, off_N, np.where(same_N, 0.0, drift), findings)
        differs_N |= off_N > 0
    return Recomputed(
        rows=len(rows),
        same_environment=int(same_N.sum()),
        identical=int((~differs_N).sum()),
        largest_difference=largest,
    )


def distance(
    stored_ND: NDArray[np.float32],
    new_ND: NDArray[np.float32],
    output: Output,
    *,
    drift: float,
    same_N: NDArray[np.bool_],
    identity: RowIdentity | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest difference of each row from the new outputs, and the allowed one: 0 for rows of ``same_N``. Of
    sampled logits, those of cumulative probabilities."""
    encoded_ND = decode(encode(new_ND, output, identity=identity), output, temperature=default_temperature(output))
    encoded_ND = encoded_ND.reshape(new_ND.shape)
    if is_sampled(output):
        return _sampled_distance(stored_ND, encoded_ND, new_ND, output.temperatures[0], drift, same_N)
    from_encoded_N, from_new_N = (
        np.abs(stored_ND.astype(np.float64) - values_ND).max(1) for values_ND in (encoded_ND, new_ND)
    )
    encoding_error_N = np.abs(encoded_ND - new_ND.astype(np.float64)).max(1)
    is_exact_N = same_N | (from_encoded_N == 0)
    return np.where(is_exact_N, from_encoded_N, from_new_N), np.where(same_N, 0.0, encoding_error_N + drift)


def _sampled_distance(
    stored_ND: NDArray[np.float32],
    encoded_ND: NDArray[np.float32],
    new_ND: NDArray[np.float32],
    temperature: float,
    drift: float,
    same_N: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities that drift choose other samples, whose sum up to any class differs by one sample and the drift."""
    stored, encoded, new = (
        np.exp(log_softmax(values_ND, temperature)) for values_ND in (stored_ND, encoded_ND, new_ND)
    )
    from_encoded_N, from_new_N, error_N = (
        np.abs((first - second).cumsum(1)).max(1)
        for first, second in ((stored, encoded), (stored, new), (encoded, new))
    )
    is_exact_N = same_N | (from_encoded_N == 0)
    # A sample is at most twice the error of the encoding, which lies between its two sides. Logits that drift change a
    # probability by a factor of exp(2 drift / T) at most.
    allowed_N = 2 * error_N + np.expm1(2 * drift / temperature)
    return np.where(is_exact_N, from_encoded_N, from_new_N), np.where(same_N, 0.0, allowed_N)


def _add_problems(
    rows: list[_Row],
    output: Output | None,
    off_N: NDArray[np.floating],
    allowed_N: NDArray[np.floating],
    findings: Findings,
) -> None:
    """``output`` is None for the norms."""
    name = "embedding_norm" if output is None else output.name
    unit = "of the norm" if output is None else "of the standard deviation"
    if output is not None and is_sampled(output):
        unit = "of cumulative probability"
    for at in np.flatnonzero(~(off_N <= allowed_N)):
        row = rows[at]
        findings.add(
            Problem(
                row.file,
                f"{name} differs from the teacher's output",
                got=f"off by {off_N[at]:.3g} {unit}",
                expected="the same bits: the numeric environment is that of the build"
                if row.same_environment
                else f"at most {allowed_N[at]:.3g}",
                shard=row.shard,
                view=row.view,
                key=row.key,
                rows=1,
            )
        )
