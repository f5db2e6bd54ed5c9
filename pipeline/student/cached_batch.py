"""The items of ``CachedDataset``: one rank's rows of one step, with pixels and teacher outputs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.augment.pixels import to_input
from pipeline.core.errors import ConfigError
from pipeline.student.data.batch import Batch
from pipeline.student.data.batch_summary import Summarised
from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.tasks import EMBEDDING, TOKENS, TaskHead
from pipeline.tasks.classification import LABEL, LOGITS


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CachedBatch(Summarised):
    """The B rows of one rank in one step: views, teacher outputs and labels. A short last step has fewer rows.

    Pixels stay uint8 until ``images`` is called: a quarter of the bytes on the way to a GPU, which then mixes them.

    Attributes:
        rows: the batch as ``stillroom train`` reads it; its pixels are not mixed yet.
        mean_C, std_C: of the student's input, on the scale of [0,1] RGB.
        num_classes: K.
        ddp_weight: factor of this rank's mean loss, rows · W / rows of all W ranks, with which DDP's mean of the
            gradients is the gradient of the mean over the global batch. 1 in one process.
    """

    rows: Batch
    mean_C: Tensor
    std_C: Tensor
    num_classes: int
    ddp_weight: float

    def __len__(self) -> int:
        return self.rows.num_rows

    @property
    def epoch(self) -> int:
        """Counted from 0."""
        return self.rows.epoch

    @property
    def step(self) -> int:
        """Counted from the first step of epoch 0."""
        return self.rows.step

    @property
    def sample_ids(self) -> list[str]:
        """``shard_id/key`` of each row."""
        return self.rows.sample_ids

    @property
    def labels_B(self) -> Tensor:
        """int64; -1 for a sample without a label."""
        return self.labels()

    def labels(self, head: str | None = None) -> Tensor:
        """int64 [B]; -1 for a sample without a label. Of a multilabel head [B,K], 1 for its classes.

        Args:
            head: its name, where the data have several.

        Raises:
            ConfigError: there is no such head.
        """
        column = _head(head).column
        if column not in self.rows.targets:
            raise _no_head(head, [name.removeprefix(f"{LABEL}_") for name in self.rows.targets])
        return self.rows.targets[column]

    @property
    def mixed_labels_B(self) -> Tensor:
        """int64; the label of each row's mixup partner, equal to ``labels_B`` for unmixed rows."""
        partner_B = self.rows.partner_B
        return self.labels_B if partner_B is None else self.labels_B[partner_B]

    @property
    def lambda_B(self) -> Tensor:
        """float32; the weight of a row in its mixed pixels and label; its partner has 1 − λ. 1 for unmixed rows."""
        lambda_B = self.rows.lambda_B
        return torch.ones(len(self), device=self.rows.pixels_BCHW.device) if lambda_B is None else lambda_B

    def images(self) -> Tensor:
        """float32 [B,3,S,S] in channels-last memory, mixed as for the teacher and normalised for the student.

        Computed at each call, on the device of the batch.
        """
        rows = self.rows
        return to_input(
            rows.pixels_BCHW,
            mean_C=self.mean_C,
            std_C=self.std_C,
            partner_B=rows.partner_B,
            lambda_B=rows.lambda_B,
            cutmix_box_B4=rows.cutmix_box_B4,
        )

    def teacher_logits(self, *, temperature: float = 1.0, teacher: int = 0, head: str | None = None) -> Tensor:
        """float32 [B,K], decoded for a loss at this temperature. Only ``topk`` and ``sampled`` logits depend on
        it. Most classes of sampled ones have no probability in a single row: T times -1000.

        Args:
            teacher: position in the list of caches.
            head: its name, where the data have several.

        Raises:
            ConfigError: the cache has no logits of this head, or they were not decoded for this temperature.
        """
        outputs = self.rows.teacher_outputs[teacher]
        name = _head(head).output
        logits_BK = outputs.at(name, temperature)
        if logits_BK is None:
            raise _no_logits(outputs, name, temperature)
        return logits_BK

    def teacher_embeddings(self, *, teacher: int = 0) -> Tensor:
        """float32 [B,D], in the teacher's width.

        Args:
            teacher: position in the list of caches.

        Raises:
            ConfigError: the dataset was opened without them.
        """
        embedding_BD = self.rows.teacher_outputs[teacher].at(EMBEDDING)
        if embedding_BD is None:
            raise ConfigError(
                "there are no embeddings of this teacher in the batch",
                code="cache.embeddings-not-read",
                where="teacher_embeddings",
                next_step="open the dataset with embeddings=True; the cache needs cache.embeddings other than none",
            )
        return embedding_BD

    def teacher_tokens(self, *, teacher: int = 0) -> Tensor:
        """float32 [B,P,D]: the teacher's patch tokens, in the order of pixels on its square grid.

        Args:
            teacher: position in the list of caches.

        Raises:
            ConfigError: the dataset was opened without them.
        """
        tokens_BPD = self.rows.teacher_outputs[teacher].at(TOKENS)
        if tokens_BPD is None:
            raise ConfigError(
                "there are no patch tokens of this teacher in the batch",
                code="cache.tokens-not-read",
                where="teacher_tokens",
                next_step="open the dataset with tokens=True; the cache needs cache.tokens other than none",
            )
        return tokens_BPD

    def teacher_norms(self, *, teacher: int = 0) -> Tensor:
        """float32 [B]: norms of the teacher's embeddings, an input of ``nd``."""
        norm_B = self.rows.teacher_outputs[teacher].norm_of(EMBEDDING)
        assert norm_B is not None, "a cache stores them"
        return norm_B

    def targets(self) -> Tensor:
        """float32 [B,K]: one-hot labels, mixed like the pixels. A missing label contributes zeros."""
        lambda_B1 = self.lambda_B[:, None]
        return lambda_B1 * self._one_hot(self.labels_B) + (1 - lambda_B1) * self._one_hot(self.mixed_labels_B)

    def _one_hot(self, labels_B: Tensor) -> Tensor:
        return one_hot(labels_B.clamp(min=0), self.num_classes) * (labels_B >= 0)[:, None].to(torch.float32)

    def to(self, device: torch.device | str) -> CachedBatch:
        """A copy of the batch on this device."""
        device = torch.device(device)
        mean_C, std_C = self.mean_C.to(device, non_blocking=True), self.std_C.to(device, non_blocking=True)
        return replace(self, rows=self.rows.to(device), mean_C=mean_C, std_C=std_C)

    def pin_memory(self) -> CachedBatch:
        """A copy in pinned memory; ``DataLoader(pin_memory=True)`` calls this."""
        return replace(
            self, rows=self.rows.pin_memory(), mean_C=self.mean_C.pin_memory(), std_C=self.std_C.pin_memory()
        )


def _head(name: str | None) -> TaskHead:
    return TaskHead(name, "class", None)


def _no_head(head: str | None, names: Sequence[str]) -> ConfigError:
    return ConfigError(
        "these data have no labels of this head",
        code="data.no-such-head",
        where="CachedBatch.labels",
        got=head,
        expected=f"one of {', '.join(names)}",
        next_step="name the head: batch.labels(HEAD), batch.teacher_logits(head=HEAD)",
    )


def _no_logits(outputs: TeacherOutputs, output: str, temperature: float) -> ConfigError:
    decoded = [f"{key:g}" for name, key in outputs.tensors if name == output and key is not None]
    heads = [name.removeprefix(f"{LOGITS}.") for name, _ in outputs.tensors if name.startswith(f"{LOGITS}.")]
    if not decoded and heads:
        return _no_head(output.removeprefix(LOGITS).removeprefix(".") or None, heads)
    if not decoded:
        return ConfigError(
            "there are no logits of this teacher",
            code="cache.logits-not-read",
            got="a cache built with cache.logits=none, or temperatures=()",
            next_step="use teacher_norms with nd, or build a cache with logits (into another cache.url)",
        )
    return ConfigError(
        "the logits of this cache depend on the temperature, and were not decoded for this one",
        code="cache.logits-not-read",
        got=f"temperature {temperature:g}",
        expected=f"one of {', '.join(decoded)}",
        next_step=f"open the dataset with CachedDataset(…, temperatures=({temperature:g},))",
    )
