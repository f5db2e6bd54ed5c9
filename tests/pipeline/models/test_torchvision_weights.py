"""The same torchvision weights by name and by URL give the same network, for every classifier."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.models import LoadedModel, WeightsFile, load_untrained
from pipeline.models.load import resolve
from pipeline.models.sources.torchvision import input_transform
from pipeline.models.summary import check_weights, summarize_model
from schemas.config import ModelConfig
from tests.marks import slow
from tests.pipeline.models.loading import load

# Networks of full size.
pytestmark = pytest.mark.long

Publish = Callable[[Mapping[str, Tensor]], None]
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
MAX_COMPARED = 100_000_000  # parameters


def published_state(name: str) -> dict[str, Tensor]:
    """Random values under the names, shapes and versions of the published file."""
    published: Any = models.get_model_weights(name)["DEFAULT"]
    extra: dict[str, Any] = {"aux_logits": True, "init_weights": False} if name in WITH_AUXILIARY_HEADS else {}
    if name.startswith("vit_"):
        extra = {"image_size": published.meta["min_size"][0]}
    network = models.get_model(name, weights=None, **extra)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
        else:
            tensor.fill_(key.endswith(("weight", "running_var")))
    return network.state_dict()


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Replaces the download; torchvision does the rest."""

    def use(state: Mapping[str, Tensor]) -> None:
        def get_state_dict(*_args: Any, **_kwargs: Any) -> Any:
            copy: Any = OrderedDict((name, tensor.clone()) for name, tensor in state.items())
            copy._metadata = getattr(state, "_metadata", None)
            return copy

        monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)

    return use


def load_classifier(name: str, weights: str, **keys: Any) -> LoadedModel:
    return load(f"torchvision/{name}", weights=weights, num_classes=1000, size=min_size(name), **keys)


def min_size(name: str) -> int:
    return max(64, *models.get_model_weights(name)["DEFAULT"].meta["min_size"])


def images(name: str) -> Tensor:
    size = min_size(name)
    return torch.linspace(-200, 200, 2 * 3 * size * size).reshape(2, 3, size, size).sin()


def logits(name: str, network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(images(name))


def torchvision_model(name: str) -> nn.Module:
    """By the builder of torchvision; auxiliary heads have no outputs in eval mode."""
    return models.get_model(name, weights="DEFAULT", progress=False).eval()


def check_logits(name: str, publish: Publish, url: Path) -> None:
    state = published_state(name)
    publish(state)
    if url.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), url)
    else:
        torch.save(state, url)
    published = torchvision_model(name)
    expected = logits(name, published)
    assert expected.std() > 0
    for weights in ("pretrained", str(url)):
        loaded = load_classifier(name, weights)
        torch.testing.assert_close(logits(name, loaded.module.network), expected, rtol=0, atol=0)
        assert input_transform(loaded.module.network) == input_transform(published)


def check_structure(name: str, publish: Publish) -> None:
    """Compares every argument of every layer, names, shapes and flags: everything but the values of the weights."""
    # The constructor of a RegNet computes with tensors, which have no values on the meta device.
    with torch.device("cpu" if name.startswith("regnet_") else "meta"):
        state = published_state(name)
        publish(state)
        published = torchvision_model(name)
        config = ModelConfig.model_validate({"model": f"torchvision/{name}", "weights": "pretrained"})
        request = resolve(config, {"logits": 1000}, False, "teacher")
        built = [request.build(), replace(request, read=lambda: WeightsFile(state)).build()]
    for network in (model.network for model in built):
        assert repr(network) == repr(published)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in published.state_dict().items()}
        assert input_transform(network) == input_transform(published)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("googlenet", "weights.pth"),
        slow("googlenet", "weights.safetensors"),
        slow("mnasnet0_5", "weights.pth"),
        ("mnasnet0_5", "weights.safetensors"),
    ],
)
def test_weights_by_name_and_by_url_give_torchvisions_logits(
    name: str, file: str, publish: Publish, tmp_path: Path
) -> None:
    check_logits(name, publish, tmp_path / file)


def size_of(name: str) -> int:
    return models.get_model_weights(name)["DEFAULT"].meta["num_params"]


CLASSIFIERS = sorted(models.list_models(module=models), key=size_of)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("without_initial_values")
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if size_of(name) <= MAX_COMPARED])
def test_every_classifier_has_the_same_logits_by_name_and_by_url(name: str, publish: Publish, tmp_path: Path) -> None:
    check_logits(name, publish, tmp_path / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("without_initial_values")
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if size_of(name) > MAX_COMPARED])
def test_every_large_classifier_has_the_same_structure_by_name_and_by_url(name: str, publish: Publish) -> None:
    check_structure(name, publish)


def test_a_vit_of_another_size_is_built_for_its_file_and_by_name_for_the_published_one(publish: Publish) -> None:
    check_structure("vit_h_14", publish)  # published for 518 pixels, while the constructor's default is 224


@pytest.mark.slow
def test_a_vit_is_built_for_its_weights_even_if_they_cannot_be_read(tmp_path: Path) -> None:
    """Otherwise the fingerprint of a finished cache would differ, and a plan would refuse what a build accepts."""
    url = str(tmp_path / "swag.safetensors")
    config = ModelConfig.model_validate({"model": "torchvision/vit_b_16", "weights": url})
    safetensors.torch.save_file(models.vit_b_16(image_size=64).state_dict(), url)
    for size in (64, None):
        check_weights(config, widths={"logits": 1000}, size=size, where="teacher")
    (tmp_path / "swag.safetensors").unlink()
    for sizes in ({"size": 64}, {"size": None, "likely_size": 64}):
        assert load_untrained(config, widths={"logits": 1000}, **sizes).input.size == 64
    published = ModelConfig.model_validate({"model": "torchvision/vit_h_14", "weights": "pretrained"})
    assert summarize_model(published, widths={"logits": 1000}, size=None, where="teacher").input.size == 518


@pytest.mark.slow
def test_files_of_old_densenets_load(publish: Publish, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in published_state("densenet121").items() if "num_batches" not in key}
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): tensor for key, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    publish(old)
    torch.save(old, tmp_path / "old.pth")
    expected = logits("densenet121", torchvision_model("densenet121"))
    for weights in ("pretrained", str(tmp_path / "old.pth")):
        torch.testing.assert_close(
            logits("densenet121", load_classifier("densenet121", weights).module.network), expected
        )


def test_choices_on_behalf_of_the_user_are_noted_and_kwargs_override_them(publish: Publish, tmp_path: Path) -> None:
    state = published_state("googlenet")
    publish(state)
    url = str(tmp_path / "weights.pth")
    torch.save(state, url)
    transformed, left_out = load_classifier("googlenet", url).notes
    assert "transform_input is true" in transformed
    assert "20 tensors of auxiliary heads are left out" in left_out
    assert load_classifier("googlenet", "pretrained").notes == ()
    for weights in ("pretrained", url):
        loaded = load_classifier("googlenet", weights, kwargs={"transform_input": False, "aux_logits": True})
        assert input_transform(loaded.module.network) == {"transform_input": False}
        assert "transform_input" not in "".join(loaded.notes)
        assert loaded.module.network.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("transforms", "exported"),
    [(None, True), slow(None, False), slow(True, True), (True, False), (False, True), slow(False, False)],
)
def test_a_student_as_a_teacher_has_the_input_transform_of_its_training(
    tmp_path: Path, transforms: bool | None, exported: bool
) -> None:
    network = load_classifier("googlenet", "random", kwargs={"transform_input": bool(transforms)}).module.network
    recorded = {} if transforms is None else input_transform(network)  # None: a file of an older version
    url = tmp_path / "student"
    if exported:
        texts = {key: json.dumps(value) for key, value in recorded.items()}
        safetensors.torch.save_file(network.state_dict(), url, {"run_config_sha256": "0", **texts})
    else:
        torch.save({"model": network.state_dict(), "projectors": {}, **recorded}, url)
    loaded = load_classifier("googlenet", str(url))
    torch.testing.assert_close(logits("googlenet", loaded.module.network), logits("googlenet", network))
    assert input_transform(loaded.module.network) == {"transform_input": bool(transforms)}
    assert loaded.notes == ()
