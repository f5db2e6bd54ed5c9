"""Teacher inference: batches of a fixed size in, fp32 outputs by name out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.pixels import to_input
from pipeline.core.errors import ResourceError, first_line
from pipeline.models import LoadedModel, forward_with_maps, load_model, move_to_device, register_map_hooks
from pipeline.tasks import TOKENS, TeacherOutputs
from pipeline.teacher.maps import MapGrid, map_sizes
from pipeline.teacher.numerics import autocast
from pipeline.teacher.rendering import GroupViews, Mixing
from pipeline.teacher.tokens import TokenPlan, TokenRequest
from schemas.config import Precision, Size, TeacherModelConfig


class Teacher:
    """A frozen network in eval mode on one device. A process can reuse it for as long as it runs.

    Args:
        tokens: of which layer it returns the patch tokens; None: it returns none.
        grid: to which its maps are brought; None: it returns none.

    Attributes:
        map_sizes: height and width of the network's maps before that, by name of the output, after a forward.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: torch.device,
        precision: Precision,
        batch_size: int,
        tokens: TokenPlan | None = None,
        grid: MapGrid | None = None,
    ) -> None:
        self.loaded = loaded
        self.device = device
        self.precision: Precision = precision
        self.batch_size = batch_size
        self.tokens, self.grid = tokens, grid
        self.map_sizes: dict[str, tuple[int, int]] = {}
        self._token_maps = () if tokens is None else (tokens.feature_map,)
        if tokens is not None:
            register_map_hooks(loaded.module.network, self._token_maps)
        self.module = loaded.module.eval().requires_grad_(False)
        move_to_device(self.module, device)
        self._mean_C = torch.tensor(loaded.input.mean, device=device)
        self._std_C = torch.tensor(loaded.input.std, device=device)

    @torch.inference_mode()
    def forward(
        self,
        pixels_BCHW: Tensor,
        partner_B: Tensor | None = None,
        lambda_B: Tensor | None = None,
        cutmix_box_B4: Tensor | None = None,
        partner_pixels_NCHW: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One forward of a batch of any size. Arguments are those of ``to_input``, on any device.

        Returns:
            fp32 outputs by name, [B,…] each, on the teacher's device.
        """
        images_BCHW = to_input(
            pixels_BCHW.to(self.device, non_blocking=True),
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=None if partner_B is None else partner_B.to(self.device),
            lambda_B=None if lambda_B is None else lambda_B.to(self.device),
            cutmix_box_B4=None if cutmix_box_B4 is None else cutmix_box_B4.to(self.device),
            partner_pixels_NCHW=partner_pixels_NCHW,
        )
        with autocast(self.device, self.precision):
            outputs, maps = forward_with_maps(self._token_maps, self.module, images_BCHW)
        named = {name: tensor.float() for name, tensor in outputs.items()}
        if self.grid is not None:
            self.map_sizes = map_sizes(named)
            named = self.grid.apply(named)
        return named if self.tokens is None else {**named, TOKENS: self.tokens.tokens(*maps)}

    def infer(self, pixels_NCHW: Tensor, mixing: Mixing | None = None) -> TeacherOutputs:
        """``infer_on_device``, then waits and copies the outputs to the CPU."""
        outputs = self.infer_on_device(pixels_NCHW, mixing)
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    @torch.inference_mode()
    def infer_on_device(self, pixels_NCHW: Tensor, mixing: Mixing | None = None) -> dict[str, Tensor]:
        """Runs N rows in batches of exactly ``batch_size``, so that the arithmetic of a row does not depend on N.

        The last batch is padded. A partner may lie in another batch. A GPU may still be computing when this returns.

        Args:
            pixels_NCHW: uint8.
            mixing: None: rows are not mixed.

        Returns:
            fp32 outputs by name, [N,…] each, on the teacher's device.

        Raises:
            ResourceError: a batch does not fit into the device's memory; it names a batch size that does.
        """
        try:
            return self._run_batches(self.batch_size, pixels_NCHW, mixing)
        except torch.OutOfMemoryError as error:
            message = first_line(error)
        # Outside of the handler, whose frames still hold the memory that ran out.
        raise self._out_of_memory_error(pixels_NCHW[:1], message)

    def _run_batches(self, batch_size: int, pixels_NCHW: Tensor, mixing: Mixing | None) -> dict[str, Tensor]:
        # One copy to the device for each call, without waiting, so that a GPU is not idle between batches.
        pixels_NCHW = pixels_NCHW.to(self.device, non_blocking=True)
        partners_N, weights_N, boxes_N4 = (self._to_device(values) for values in mixing or (None, None, None))
        batches: list[dict[str, Tensor]] = []
        for rows_B in torch.arange(len(pixels_NCHW), device=self.device).split(batch_size):
            padded_B = torch.cat([rows_B, rows_B[-1:].expand(batch_size - len(rows_B))])
            outputs = self.forward(
                _take_rows(pixels_NCHW, padded_B),
                None if partners_N is None else torch.arange(batch_size, device=self.device),
                None if weights_N is None else weights_N[padded_B],
                None if boxes_N4 is None else boxes_N4[padded_B],
                None if partners_N is None else _take_rows(pixels_NCHW, partners_N[padded_B].long()),
            )
            batches.append({name: tensor[: len(rows_B)] for name, tensor in outputs.items()})
        return {name: torch.cat([outputs[name] for outputs in batches]) for name in batches[0]}

    def _to_device(self, values_N: NDArray[np.generic] | None) -> Tensor | None:
        return None if values_N is None else torch.from_numpy(values_N).to(self.device, non_blocking=True)

    def _out_of_memory_error(self, pixels_1CHW: Tensor, message: str) -> ResourceError:
        sizes = [self.batch_size >> halvings for halvings in range(1, self.batch_size.bit_length())]
        fits = next((size for size in sizes if self._fits(size, pixels_1CHW)), None)
        return ResourceError(
            "the teacher runs out of memory at this batch size",
            code="model.out-of-memory",
            where=f"teacher.batch_size={self.batch_size}",
            got=message,
            expected="memory for a single row" if fits is None else f"teacher.batch_size={fits}, which ran just now",
            next_step="use a device with more memory, a smaller views.size or a lower teacher.precision"
            if fits is None
            else f"set teacher.batch_size={fits}, or give each task more of the device (ray.gpus_per_task)",
        )

    def _fits(self, batch_size: int, pixels_1CHW: Tensor) -> bool:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            # Mixed with itself, since mixing needs a second batch of pixels.
            self._run_batches(batch_size, pixels_1CHW, Mixing(np.zeros(1, np.int32), np.ones(1, np.float32)))
        except torch.OutOfMemoryError:
            return False
        return True

    def state(self) -> dict[str, Tensor]:
        return self.module.network.state_dict()


def _take_rows(pixels_NCHW: Tensor, rows_B: Tensor) -> Tensor:
    """Rows in channels-last memory, in which convolutions are fastest."""
    return pixels_NCHW[rows_B].contiguous(memory_format=torch.channels_last)


def load_teacher(
    config: TeacherModelConfig,
    *,
    widths: Mapping[str, int],
    size: Size | None,
    device: torch.device,
    where: str = "teacher",
    tokens: TokenRequest | None = None,
    grid: int | None = None,
) -> Teacher:
    """The teacher of a config on a device.

    Args:
        widths: as in ``load_model``.
        where: YAML section of ``config``, for messages.
        tokens: None: without patch tokens.
        grid: pixels of the input, along an axis, for each position of its maps; None: it returns none.

    Raises:
        ConfigError, ModelError, StorageInputError: as in ``load_model`` and ``TokenRequest.plan``.
    """
    loaded = load_model(config, widths=widths, size=size, where=where)
    plan = None if tokens is None else tokens.plan(loaded)
    maps = MapGrid.of(grid, loaded.input.size)
    return Teacher(
        loaded, device=device, precision=config.precision, batch_size=config.batch_size, tokens=plan, grid=maps
    )


@dataclass(frozen=True, slots=True)
class GroupOutputs:
    """A mix group and the teacher outputs of its V views, which a GPU may still be copying: read them by ``outputs``.

    Attributes:
        tensors: by name of the output, [V,N,…] each.
        submit_s: seconds that it took to start the work; on a GPU this does not include the computation.
        started, copied: events around the work of a GPU; None on a CPU.
    """

    group: GroupViews
    tensors: Mapping[str, Tensor]
    submit_s: float
    started: torch.cuda.Event | None
    copied: torch.cuda.Event | None

    def busy_s(self) -> float:
        """Waits for the outputs. Seconds that the device worked, including the copies in both directions."""
        if self.started is None or self.copied is None:
            return self.submit_s
        self.copied.synchronize()
        return self.started.elapsed_time(self.copied) / 1e3

    def outputs(self) -> list[TeacherOutputs]:
        """Waits for the outputs. One item for each view."""
        if self.copied is not None:
            self.copied.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        return [{name: array[view] for name, array in arrays.items()} for view in range(len(self.group.pixels_VNCHW))]


def run_inference(groups: Iterator[GroupViews], teacher: Teacher) -> Iterator[GroupOutputs]:
    """Each group with its teacher outputs, collected on the device and copied to the CPU at once."""
    for group in groups:
        started, start_s = _record_event(teacher.device), time.monotonic()
        views = [
            teacher.infer_on_device(pixels_NCHW, mixing)
            for pixels_NCHW, mixing in zip(group.pixels_VNCHW, group.mixing, strict=True)
        ]
        # Without waiting: the next group is queued behind this one. torch uses page-locked memory for such a copy.
        tensors = {
            name: torch.stack([outputs[name] for outputs in views]).to("cpu", non_blocking=True) for name in views[0]
        }
        submit_s = time.monotonic() - start_s
        yield GroupOutputs(group, tensors, submit_s, started, _record_event(teacher.device))


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event after all work that was queued on the device so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
