"""Statistics of a part and of a cache: those of the task, and the fidelity of stored outputs to the fp32 ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import sample_keys
from pipeline.cache.format.codec import (
    LinearHead,
    RowIdentity,
    column_name,
    decode,
    default_temperature,
    encode,
    is_sampled,
)
from pipeline.tasks import Task, TeacherOutputs, output_roles, task_of
from pipeline.tasks.classification import predicted_classes
from pipeline.teacher.rendering import GroupViews
from schemas.cache_format import Header, Output, Statistics

_TEMPERATURES = {str(temperature): temperature for temperature in (1.0, 2.0, 4.0)}
_SAMPLE_ONE_IN = 64
_MAX_POSITIONS = 4096


@dataclass(slots=True)
class _Fidelity:
    """Fields of ``Statistics``, summed over sampled rows."""

    fidelity_rows: int = 0
    argmax_flips: float = 0
    kl_sum: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_TEMPERATURES, 0.0))
    pearson_sum: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_TEMPERATURES, 0.0))
    embedding_cosine_sum: float = 0.0
    token_cosine_sum: float = 0.0
    total_variation_sum: float = 0.0

    def add_logits(self, exact: TeacherOutputs, output: Output, head: LinearHead | None, identity: RowIdentity) -> None:
        exact_NK, name = exact[output.name], column_name(output)
        column = encode(exact[name], output if head is None else head.stored, identity=identity)
        stored_NK = decode(column, output, temperature=default_temperature(output), head=head)
        self.argmax_flips += int((predicted_classes(exact_NK) != predicted_classes(stored_NK)).sum())
        if is_sampled(output):
            # The KL of a row is infinite, since classes are missing.
            self.total_variation_sum += total_variation_sum(exact_NK, stored_NK, output.temperatures[0])
            return
        for key, temperature in _TEMPERATURES.items():
            stored_NK = decode(column, output, temperature=temperature, head=head)
            self.kl_sum[key] += kl_sum(exact_NK, stored_NK, temperature)
            self.pearson_sum[key] += pearson_sum(exact_NK, stored_NK, temperature)

    def add_map(self, exact: TeacherOutputs, output: Output, *_: object) -> None:
        """Means over the positions of a row, at most ``_MAX_POSITIONS`` of them: in even steps of the raster order."""
        exact_NKhw = exact[output.name]
        column = encode(exact_NKhw, output)
        step = -(-prod(output.shape[1:]) // _MAX_POSITIONS)
        exact_MK = _positions(exact_NKhw, step)
        share = len(exact_NKhw) / len(exact_MK)
        for key, temperature in _TEMPERATURES.items():
            stored_MK = _positions(decode(column, output, temperature=temperature), step)
            if temperature == default_temperature(output):
                flips = int((predicted_classes(exact_MK) != predicted_classes(stored_MK)).sum())
                self.argmax_flips += flips * share
            self.kl_sum[key] += kl_sum(exact_MK, stored_MK, temperature) * share
            self.pearson_sum[key] += pearson_sum(exact_MK, stored_MK, temperature) * share

    def add_embedding(self, exact: TeacherOutputs, output: Output, *_: object) -> None:
        exact_ND = exact[output.name]
        self.embedding_cosine_sum += cosine_sum(exact_ND, decode(encode(exact_ND, output), output))

    def add_tokens(self, exact: TeacherOutputs, output: Output, *_: object) -> None:
        exact_NPD = exact[output.name]
        stored_NPD, (num_tokens, width) = decode(encode(exact_NPD, output), output), output.shape
        self.token_cosine_sum += cosine_sum(exact_NPD.reshape(-1, width), stored_NPD.reshape(-1, width)) / num_tokens


_MEASURES: dict[str, Callable[[_Fidelity, TeacherOutputs, Output, LinearHead | None, RowIdentity], None]] = {
    "class": _Fidelity.add_logits,
    "map": _Fidelity.add_map,
    "embedding": _Fidelity.add_embedding,
    "tokens": _Fidelity.add_tokens,
}
"""How the fidelity of an output is measured, by its role; that of others is not."""


class StatisticsSum:
    """Sums over the views and groups of one part."""

    def __init__(self, outputs: Iterable[Output], task: Task, head: LinearHead | None = None) -> None:
        """``head`` is that of the cache, where it computes logits."""
        roles = output_roles(task)
        self._measured = [
            (measure, output)
            for output in outputs
            if (measure := _MEASURES.get(roles.get(output.name, ""))) is not None
        ]
        self._task_sums, self._fidelity, self._head = task.accumulate(), _Fidelity(), head

    def add(self, group: GroupViews, outputs: TeacherOutputs, *, position: int, view: int) -> None:
        """Adds the view at a position of one group. The task's statistics are of images that are not mixed."""
        if not group.mixes:
            self._task_sums.add(outputs, group.targets_of(position))
        self.add_fidelity(RowIdentity(group.sample_ids, view), outputs)

    def add_fidelity(self, rows: RowIdentity, outputs: TeacherOutputs) -> None:
        """Adds the sampled ones of some rows of a view to the fidelity alone."""
        # Keyed by the sample, so that the same rows are measured for any order of work.
        chosen_N = sample_keys(0, rows.sample_ids)[:, 0] % np.uint64(_SAMPLE_ONE_IN) == 0
        if not chosen_N.any():
            return
        self._fidelity.fidelity_rows += int(chosen_N.sum())
        chosen = {name: values[chosen_N] for name, values in outputs.items()}
        identity = rows.take(np.flatnonzero(chosen_N))
        for measure, output in self._measured:
            measure(self._fidelity, chosen, output, self._head, identity)

    def result(self) -> Statistics:
        fidelity = asdict(self._fidelity)
        if any(is_sampled(output) for _, output in self._measured):
            # Not zeros, which would be those of equal logits.
            fidelity |= {"kl_sum": {}, "pearson_sum": {}}
        return Statistics(**self._task_sums.result(), **fidelity)


class StatisticsFold:
    """The sums of all parts, added in the given order, in 64 bytes per part."""

    def __init__(self, task: Task) -> None:
        self._task_sums = task.accumulate()
        self._num_rows, self._num_flips = 0, cast("float", 0)
        self._kl, self._pearson = ({key: array("d") for key in _TEMPERATURES} for _ in range(2))
        self._cosine, self._token_cosine, self._total_variation = array("d"), array("d"), array("d")
        self._has_kl = False

    def add(self, part: Statistics) -> None:
        self._task_sums.add_part(part)
        self._num_rows += part.fidelity_rows
        self._num_flips += part.argmax_flips
        for sums, part_sums in ((self._kl, part.kl_sum), (self._pearson, part.pearson_sum)):
            for key, values in sums.items():
                values.append(part_sums.get(key, 0.0))
        self._cosine.append(part.embedding_cosine_sum)
        self._token_cosine.append(part.token_cosine_sum)
        self._total_variation.append(part.total_variation_sum)
        self._has_kl |= bool(part.kl_sum)

    def result(self) -> Statistics:
        # Not a running sum: Python's ``sum`` compensates for rounding from 3.12 on.
        return Statistics(
            **self._task_sums.result(),
            fidelity_rows=self._num_rows,
            argmax_flips=self._num_flips,
            kl_sum={key: float(sum(values)) for key, values in self._kl.items()} if self._has_kl else {},
            pearson_sum={key: float(sum(values)) for key, values in self._pearson.items()} if self._has_kl else {},
            embedding_cosine_sum=float(sum(self._cosine)),
            token_cosine_sum=float(sum(self._token_cosine)),
            total_variation_sum=float(sum(self._total_variation)),
        )


def mean_fidelity(header: Header, statistics: Statistics) -> dict[str, Any]:
    """Means over sampled rows of stored against fp32 outputs: KL and 1 − correlation at each temperature, share of rows
    (of maps, of positions) with another largest class, cosine of embeddings and of single tokens; of sampled logits,
    total variation in place of the first two. None or empty for outputs that are not stored."""
    roles = output_roles(task_of(header.data))
    measured = {roles.get(output.name) for output in header.outputs}
    samples = any(map(is_sampled, header.outputs))
    logits, embedding, tokens = (
        statistics.fidelity_rows if measured & roles_of else 0
        for roles_of in ({"class", "map"}, {"embedding"}, {"tokens"})
    )
    return {
        "kl_nats": {key: total / logits for key, total in statistics.kl_sum.items()} if logits else {},
        "pearson": {key: total / logits for key, total in statistics.pearson_sum.items()} if logits else {},
        "total_variation": statistics.total_variation_sum / logits if logits and samples else None,
        "argmax_flips": statistics.argmax_flips / logits if logits else None,
        "embedding_cosine": statistics.embedding_cosine_sum / embedding if embedding else None,
        "token_cosine": statistics.token_cosine_sum / tokens if tokens else None,
    }


def _positions(values_NKhw: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """[M,K]: every ``step``-th position of each map."""
    num_rows, num_classes, *_ = values_NKhw.shape
    chosen_NKP = values_NKhw.reshape(num_rows, num_classes, -1)[:, :, ::step]
    return np.ascontiguousarray(chosen_NKP.transpose(0, 2, 1)).reshape(-1, num_classes)


def kl_sum(exact_NK: NDArray[np.float32], stored_NK: NDArray[np.float32], temperature: float) -> float:
    """Nats: KL divergence of the softmax at T of the stored logits from that of the exact logits, summed over rows."""
    log_p, log_q = (log_softmax(values, temperature) for values in (exact_NK, stored_NK))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def total_variation_sum(exact_NK: NDArray[np.float32], stored_NK: NDArray[np.float32], temperature: float) -> float:
    """Half the sum of the differences between the softmaxes at T of a row, which is 0 to 1; summed over rows."""
    p, q = (np.exp(log_softmax(values, temperature)) for values in (exact_NK, stored_NK))
    return float(np.abs(p - q).sum() / 2)


def pearson_sum(exact_NK: NDArray[np.float32], stored_NK: NDArray[np.float32], temperature: float) -> float:
    """1 − Pearson correlation of the probabilities of a row at T (DIST's relation within a row, Huang 2022), summed."""
    p, q = (np.exp(log_softmax(values, temperature)) for values in (exact_NK, stored_NK))
    return float((1 - _cosines(p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True))).sum())


def cosine_sum(exact_ND: NDArray[np.float32], stored_ND: NDArray[np.float32]) -> float:
    return float(_cosines(exact_ND.astype(np.float64), stored_ND.astype(np.float64)).sum())


def _cosines(left_ND: NDArray[np.float64], right_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N]; 1 for two zero vectors, 0 for one."""
    norms = np.linalg.norm(left_ND, axis=1) * np.linalg.norm(right_ND, axis=1)
    same_N = (left_ND == right_ND).all(1)
    return np.where(same_N, 1.0, (left_ND * right_ND).sum(1) / np.where(norms > 0, norms, 1.0))


def log_softmax(values_NK: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """[N,K], at T, in float64."""
    scaled = values_NK.astype(np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
