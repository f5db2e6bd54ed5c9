"""Loads the batches of a training, in loader processes or in the process itself, after a check of shared memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.cache.format.codec import depends_on_temperature
from pipeline.core.errors import ConfigError, ResourceError, StillroomError, TrainingError, first_line
from pipeline.student.data.batch import Batch, SharedMemoryBatch
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.prefetcher import Prefetcher, ranks_on_node
from schemas.cache_format import Output
from schemas.config import height_width

_PREFETCH_FACTOR = 2
"""Batches that each loader process prepares ahead."""
_FOLDER = Path("/dev/shm")  # noqa: S108 - where torch itself allocates it
_FP32_BYTES = 4
_DEATH_S = 5.0
"""What torch, too, waits for a loader process that sends nothing before it checks that the process is alive."""
# Batches travel as file descriptors over a Unix socket that multiprocessing creates: the kernel's limit for its path,
# and what multiprocessing appends to the temporary folder.
_MAX_SOCKET_PATH_BYTES = 107
_SOCKET_BELOW_TEMP = "/pymp-xxxxxxxx/listener-xxxxxxxx"


def load_batches(dataset: StepDataset, steps: range, *, num_workers: int, pin_memory: bool) -> Generator[Batch]:
    """The batches of these steps, in order, for any number of loader processes.

    Close the generator if not all batches are taken: it waits for threads, and a garbage collector must not, since it
    may run under a lock that they need to end.

    Raises:
        StillroomError: the error of the dataset, at its step, from any process.
        TrainingError: a loader process was killed; ``killed_loaders`` raises it where torch notices the death first.
    """
    others = multiprocessing.active_children()
    loader = DataLoader(
        _ErrorCapturingDataset(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCH_FACTOR if num_workers else None,
    )
    outcomes = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in others]
    ahead = Prefetcher(dataset.source, dataset.order, rank=dataset.rank, world_size=dataset.world_size, steps=steps)
    with ahead:
        try:
            for outcome in outcomes:
                if isinstance(outcome, StillroomError):
                    raise outcome
                batch = outcome.open() if isinstance(outcome, SharedMemoryBatch) else outcome
                ahead.advance(batch.step)
                yield batch
        except (EOFError, OSError):
            # A process that is killed closes its sockets before the system reports its death.
            _raise_if_killed(processes)
            raise
        finally:
            # Collected later, with an error's traceback, it would wait 5 s for each loader process.
            del outcomes


@contextmanager
def killed_loaders() -> Generator[None]:
    """Turns the death of a loader process into one error: torch raises it at any place of the main thread.

    Raises:
        TrainingError: a loader process was killed by a signal, which is named.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("DataLoader worker"):
            raise
        raise _killed(text.split(". ")[0].strip()) from error


def _raise_if_killed(processes: Sequence[BaseProcess]) -> None:
    ended = wait([process.sentinel for process in processes], _DEATH_S) if processes else ()
    for process in processes:
        if process.sentinel not in ended:
            continue
        process.join()
        if (code := process.exitcode or 0) < 0:
            raise _killed(f"process {process.pid} is killed by signal: {signal.strsignal(-code)}")


def _killed(got: str) -> TrainingError:
    return TrainingError(
        "a loader process was killed",
        code="train.loader-killed",
        where="train.num_workers",
        got=got,
        next_step="Killed: less memory (fewer train.num_workers, a smaller train.global_batch_size); Bus error: a "
        "larger /dev/shm, or train.num_workers=0; then run the command again: it resumes from its last checkpoint",
    )


class _ErrorCapturingDataset(Dataset[Batch | SharedMemoryBatch | StillroomError]):
    """Returns errors instead of raising them.

    A ``DataLoader`` turns an exception of its processes into a traceback; a returned error arrives unchanged.
    """

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch | SharedMemoryBatch | StillroomError:
        try:
            batch = self._dataset[step]
        except StillroomError as error:
            return error
        except RuntimeError as error:
            # Raised by torch, without a class: other programs have taken what was free at the start.
            if "shared memory" not in str(error):
                raise
            return TrainingError(
                "a loader process could not get shared memory for its batch",
                code="train.shared-memory",
                where="train.num_workers",
                got=first_line(error),
                next_step="lower train.num_workers (0 needs none), or enlarge /dev/shm; then run the command again: it "
                "continues from the last checkpoint",
            )
        return batch if get_worker_info() is None else SharedMemoryBatch.of(batch)


def check_loaders(dataset: StepDataset, *, num_workers: int) -> None:
    """Checks that this machine has what loader processes need to send their batches.

    Args:
        num_workers: loader processes of each rank; with 0 nothing is needed.

    Raises:
        ResourceError: ``/dev/shm`` has less free memory than the batches that all ranks of this machine hold at a time.
        ConfigError: the path of the temporary folder is too long for a socket.
    """
    if not num_workers:
        return
    _check_temporary_folder()
    if not _FOLDER.is_dir():
        return
    volume = os.statvfs(_FOLDER)
    ranks, batch = ranks_on_node(dataset.world_size), batch_bytes(dataset)
    # Those that the loaders hold or fill, and the batch in use.
    num_batches, free_bytes = _PREFETCH_FACTOR * num_workers + 1, volume.f_bavail * volume.f_frsize
    if (needed_bytes := ranks * num_batches * batch) <= free_bytes:
        return
    fitting = max((free_bytes // ranks // batch - 1) // _PREFETCH_FACTOR, 0)
    raise ResourceError(
        "the shared memory of this machine does not hold the batches of the loader processes",
        code="train.shared-memory",
        where=str(_FOLDER),
        got=f"{free_bytes:,} bytes free",
        expected=f"{needed_bytes:,} bytes: {ranks} ranks x {num_batches} batches (train.num_workers={num_workers}) "
        f"x {batch:,} bytes",
        next_step=f"set train.num_workers={fitting}, lower train.global_batch_size, or enlarge {_FOLDER}: docker run "
        f"--shm-size={_gigabytes(needed_bytes)}g, or in Kubernetes mount an emptyDir with medium: Memory there",
    )


def _gigabytes(num_bytes: int) -> int:
    return -(-num_bytes // 2**30)


def batch_bytes(dataset: StepDataset) -> int:
    """Bytes of shared memory that one full batch of this rank takes, without what aligns its tensors."""
    order = dataset.order
    lanes = len(order.lanes_of(dataset.rank, dataset.world_size))
    rows = min(lanes * order.units_per_lane_step * order.rows_per_unit, order.num_rows)
    pixels = sum(3 * math.prod(height_width(network.size)) for network in (dataset.student, *dataset.teachers))
    reads = dataset.source.reads
    outputs = sum(
        _output_bytes(output, reads[name]) for teacher in dataset.source.outputs for name, output in teacher.items()
    )
    return rows * (pixels + outputs)


def _output_bytes(output: Output, temperatures: Sequence[float]) -> int:
    """Of one row, decoded."""
    return _FP32_BYTES * math.prod(output.shape) * (len(temperatures) if depends_on_temperature(output) else 1)


def _check_temporary_folder() -> None:
    folder = tempfile.gettempdir()
    size_bytes = len(os.fsencode(folder + _SOCKET_BELOW_TEMP))
    if size_bytes <= _MAX_SOCKET_PATH_BYTES:
        return
    raise ConfigError(
        "the temporary folder has too long a path for the sockets of the loader processes",
        code="train.temp-dir-too-long",
        where="TMPDIR",
        got=f"{folder}: {size_bytes} bytes with the name of the socket",
        expected=f"at most {_MAX_SOCKET_PATH_BYTES} bytes",
        next_step="export TMPDIR=/tmp, or set train.num_workers=0",
    )
