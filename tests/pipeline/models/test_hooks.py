"""Embeddings and feature maps captured by hooks: exact gradients, and no state between forwards, copies or threads."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models import EmbeddingModel, find_maps, forward_with_maps, register_map_hooks
from tests.pipeline.models.loading import PLAIN, build, images, run

Capture = Callable[[EmbeddingModel, Tensor], Tensor]
RESNET = "timm/test_resnet"
LAYERS = {PLAIN: "stem", RESNET: "layer1"}


def capture_map(name: str) -> tuple[EmbeddingModel, Capture]:
    model = build(name)
    maps = find_maps(model, [LAYERS[name]], size=64, where="a test")
    register_map_hooks(model.network, maps)
    return model, lambda model, batch: forward_with_maps(maps, model, batch)[1][0]


def capture_embedding(name: str) -> tuple[EmbeddingModel, Capture]:
    return build(name), lambda model, batch: model(batch)["embedding"]


both = pytest.mark.parametrize("capturing", [capture_embedding, capture_map])


@pytest.mark.parametrize(
    ("capturing", "of_stem"), [(capture_embedding, lambda x: x.mean((2, 3))), (capture_map, lambda x: x)]
)
def test_the_gradient_equals_that_of_the_bare_modules(capturing: Any, of_stem: Callable[[Tensor], Tensor]) -> None:
    model, capture = capturing(PLAIN)
    capture(model, images()).square().sum().backward()
    stem = model.network.stem
    (expected,) = torch.autograd.grad(of_stem(stem(images())).square().sum(), [stem.weight])
    torch.testing.assert_close(stem.weight.grad, expected)


@both
def test_no_output_outlives_its_forward(capturing: Any) -> None:
    model, capture = capturing(RESNET)
    output = capture(model, images())
    alive = weakref.ref(output)
    del output
    assert alive() is None


@both
def test_a_failed_forward_does_not_affect_the_next_one(capturing: Any) -> None:
    model, capture = capturing(PLAIN)
    expected = capture(model, images())
    with pytest.raises(RuntimeError):
        capture(model, torch.zeros(1, 1, 8, 8))
    model(images(rows=1))
    assert torch.equal(capture(model, images()), expected)


@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_outputs_of_its_weights(capturing: Any, duplicate: Any) -> None:
    model, capture = capturing(PLAIN)
    clone = duplicate(model)
    with torch.no_grad():
        clone.network.stem.weight.zero_()
        clone.network.stem.bias.fill_(2.0)
        original, copied = capture(model, images()), capture(clone, images())
        logits_BK, embedding_BD = run(clone, images())
        torch.testing.assert_close(clone.network.fc(embedding_BD), logits_BK)
    assert torch.equal(copied, torch.full_like(copied, 2.0))
    assert not torch.allclose(original, copied)


@both
def test_threads_that_share_a_model_get_separate_outputs(capturing: Any) -> None:
    model, capture = capturing(RESNET)

    def forward(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return capture(model, batch)

    batches = [images(rows=2) * scale for scale in range(1, 17)]
    expected = [forward(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(forward, batches)), expected)
