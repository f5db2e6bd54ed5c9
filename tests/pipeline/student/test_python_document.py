"""The example of docs/tutorials/your-own-loop.md runs as printed, in one process and in two that train as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.marks import slow
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import assert_weights_close, run_config, training_error
from tests.pipeline.student.small_networks import Small
from tests.ranks import group, run_two_ranks

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "tutorials" / "your-own-loop.md"
OPTIONS: dict[str, Any] = {"global_batch_size": 8, "tail": "short", "epochs": 3}
NUM_STEPS = 15


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def distil() -> Callable[..., torch.nn.Module]:
    """The function that the document defines."""
    names: dict[str, Any] = {}
    exec(snippets()[0], names)
    return names["distil"]


def teach(cache_url: str, **place: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = distil()(Small(num_classes=10), cache_url, **OPTIONS, **place)
    return model.state_dict()


def teach_in_group(rendezvous: Path, rank: int, cache_url: str) -> dict[str, Tensor]:
    with group(rendezvous, rank):
        return teach(cache_url, rank=rank, world_size=2)


@pytest.mark.parametrize("kind", [slow("crop"), "function_matching"])
def test_two_ranks_train_as_one_process(replays: Replay, tmp_path: Path, kind: str) -> None:
    """The last step of an epoch has three rows: ``ddp_weight`` matters."""
    url = replays(kind).url
    alone = teach(url)
    together = run_two_ranks(teach_in_group, tmp_path, url)
    torch.manual_seed(0)
    untaught = Small(num_classes=10).state_dict()
    assert not any(torch.equal(value, untaught[name]) for name, value in alone.items())
    assert_weights_close(together, alone, training_error(run_config(replays(kind).config, tmp_path), NUM_STEPS))


def test_the_example_with_timm_runs_with_loader_processes(replays: Replay) -> None:
    changes = {
        '"resnet50", num_classes=1000': '"test_resnet", num_classes=10',
        "s3://bucket/caches/r152-fm50": replays("function_matching").url,
        "epochs=300": "epochs=1",
        '"cuda"': '"cpu"',
        "num_workers=8": "num_workers=2",
        "global_batch_size=1024": "global_batch_size=34",
    }
    code = snippets()[1]
    for written, small in changes.items():
        assert written in code
        code = code.replace(written, small)
    names: dict[str, Any] = {"distil": distil()}
    exec(code, names)
    assert names["student"](torch.zeros(2, 3, 32, 32)).shape == (2, 10)
