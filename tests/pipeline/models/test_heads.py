"""A network with several heads is its backbone with one linear layer for each head; weights of either form load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.core.errors import ConfigError, ModelError
from pipeline.models import EmbeddingModel, LoadedModel, load_model, load_untrained
from pipeline.models.summary import check_weights, summarize_model
from schemas.config import Config, ModelConfig, TeacherConfig
from tests.errors import raises
from tests.pipeline.models.loading import FACTORIES, NORMALISED, images

HEADS = {"pair": 7, "even": 2}
WIDTHS = {f"logits.{head}": width for head, width in HEADS.items()}
CIFAR = "python:pipeline.models.cifar:resnet"
CIFAR_KWARGS: dict[str, Any] = {"depth": 8, "widths": [4, 4, 6, 7]}


def section(model: str, kwargs: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    declared = NORMALISED if model.startswith("python:") else {}
    return {"model": model, "kwargs": kwargs or {}, **declared, **keys}


def student(
    model: str, kwargs: dict[str, Any] | None = None, *, widths: dict[str, int] = WIDTHS, seed: int = 0, **keys: Any
) -> LoadedModel:
    config = ModelConfig.model_validate(section(model, kwargs, **keys))
    return load_model(config, widths=widths, size=64, seed=seed, where="student", allow_new_head=True)


def teacher(
    model: str, kwargs: dict[str, Any] | None = None, *, widths: dict[str, int] = WIDTHS, **keys: Any
) -> LoadedModel:
    config = TeacherConfig.model_validate({"weights": "random", **section(model, kwargs, **keys)})
    return load_model(config, widths=widths, size=64)


def saved(state: dict[str, Tensor], path: Path) -> str:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return str(path)


def outputs_of(model: EmbeddingModel) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(images())


SOURCES: list[tuple[str, dict[str, Any], Callable[[Any, Tensor], Tensor]]] = [
    ("timm/test_resnet", {}, lambda net, x: net.forward_head(net.forward_features(x), pre_logits=True)),
    ("timm/test_vit", {"img_size": 64}, lambda net, x: net.forward_head(net.forward_features(x), pre_logits=True)),
    ("torchvision/squeezenet1_1", {}, lambda net, x: net.features(x).mean((2, 3))),
    ("torchvision/shufflenet_v2_x0_5", {}, lambda net, x: nn.Sequential(*list(net.children())[:-1])(x).mean((2, 3))),
    (CIFAR, CIFAR_KWARGS, lambda net, x: net.layer3(net.layer2(net.layer1(net.bn1(net.conv1(x)).relu()))).mean((2, 3))),
]
NAMES = [model for model, _, _ in SOURCES]


@pytest.mark.parametrize(("model", "kwargs", "embed"), SOURCES, ids=NAMES)
def test_each_head_is_a_linear_layer_on_the_embedding_of_the_backbone(
    model: str, kwargs: dict[str, Any], embed: Callable[[Any, Tensor], Tensor]
) -> None:
    loaded = student(model, kwargs).module
    state = loaded.network.state_dict()
    with torch.no_grad():
        expected_BD = embed(cast("Any", loaded.network).backbone, images())
    outputs = outputs_of(loaded)
    assert list(outputs) == ["logits.pair", "logits.even", "embedding"]
    assert loaded.widths == {**WIDTHS, "embedding": expected_BD.shape[1]}
    torch.testing.assert_close(outputs["embedding"], expected_BD)
    for head in HEADS:
        weight, bias = (state.pop(f"heads.{head}.{name}") for name in ("weight", "bias"))
        torch.testing.assert_close(outputs[f"logits.{head}"], linear(outputs["embedding"], weight, bias))
    assert {name.partition(".")[0] for name in state} == {"backbone"}


def test_the_backbone_of_timm_is_the_network_that_timm_builds_without_classes() -> None:
    loaded = student("timm/test_resnet").module
    bare = timm.create_model("test_resnet", num_classes=0).eval()
    bare.load_state_dict(cast("Any", loaded.network).backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(loaded)["embedding"], bare(images()), rtol=0, atol=0)


def test_gradients_of_all_heads_reach_the_backbone_through_one_embedding() -> None:
    loaded = student(CIFAR, CIFAR_KWARGS).module
    outputs = loaded(images())
    total = sum(outputs[name].square().sum() for name in WIDTHS)
    assert isinstance(total, Tensor)
    (embedding_gradient_BD,) = torch.autograd.grad(total, outputs["embedding"], retain_graph=True)
    total.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    heads = cast("Any", loaded.network).heads
    expected_BD = sum(2 * outputs[f"logits.{head}"] @ heads[head].weight for head in HEADS)
    assert isinstance(expected_BD, Tensor)
    torch.testing.assert_close(embedding_gradient_BD, expected_BD)


def test_random_heads_are_a_function_of_the_seed() -> None:
    first, again, other = (student(CIFAR, CIFAR_KWARGS, seed=seed).module.network.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["heads.even.weight"], other["heads.even.weight"])


def test_a_summary_counts_the_parameters_of_all_heads_without_building_them_in_memory() -> None:
    config = ModelConfig.model_validate(section("timm/test_resnet"))
    summary = summarize_model(config, widths=WIDTHS, size=64, where="student")
    loaded = student("timm/test_resnet").module
    assert summary.embedding_dim == loaded.embedding_dim
    assert summary.num_parameters == sum(parameter.numel() for parameter in loaded.network.parameters())


# Networks of the user


@pytest.mark.parametrize(("factory", "scale"), [("TwoHeads", 1), ("TwoHeadsSelfDescribed", 2), ("decorated", 1)])
def test_a_factory_gets_the_heads_and_its_network_returns_a_dict(factory: str, scale: int) -> None:
    loaded = student(f"{FACTORIES}:{factory}").module
    outputs = outputs_of(loaded)
    network: Any = loaded.network
    stem = network.backbone.stem if factory == "decorated" else network.stem
    with torch.no_grad():
        features_BD = stem(images()).mean((2, 3))
    torch.testing.assert_close(outputs["embedding"], scale * features_BD)
    for head, layer in (network.classifiers if factory == "TwoHeadsSelfDescribed" else network.heads).items():
        torch.testing.assert_close(outputs[f"logits.{head}"], layer(features_BD))
    by_head = {name: output for name, output in outputs.items() if name != "embedding"}
    torch.testing.assert_close(loaded.eval().forward_heads(images()), by_head)


@pytest.mark.parametrize(
    ("factory", "code", "got"),
    [
        ("Plain", "model.constructor-failed", "TypeError"),
        ("UnnamedHeads", "model.no-named-heads", "no heads.even, heads.pair"),
        ("OneHeadIsMissing", "model.output-shape", "logits.even missing"),
        ("OneTensor", "model.output-shape", "one output (2, 9)"),
        ("OtherHeadsInTraining", "model.training-outputs", "NoneType"),
    ],
)
def test_a_network_without_the_heads_of_the_config_is_refused(factory: str, code: str, got: str) -> None:
    with raises(code, ModelError, where="student.model", exit_code=2) as caught:
        student(f"{FACTORIES}:{factory}")
    assert got in str(caught.value.got)


def test_a_head_cannot_have_the_name_of_an_attribute_of_a_module() -> None:
    with raises("model.reserved-head-name", ModelError, where="data.heads.type", exit_code=2):
        student("timm/test_resnet", widths={"logits.type": 3, "logits.even": 2})


# The heads of a teacher


def test_a_network_with_one_classifier_is_a_teacher_of_one_head() -> None:
    loaded = teacher("timm/test_resnet", heads=["even"])
    assert loaded.module.widths == {"logits.even": 2, "embedding": loaded.module.embedding_dim}
    assert loaded.module.heads == ("fc",)
    assert loaded.architecture["num_classes"] == {"even": 2}
    network: Any = loaded.module.network
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(loaded.module)["logits.even"], network(images()))
    assert (
        load_untrained(
            TeacherConfig.model_validate(section("timm/test_resnet", heads=["even"])), widths=WIDTHS, size=64
        ).architecture
        == loaded.architecture
    )


def test_the_architecture_has_the_classes_of_each_head() -> None:
    assert teacher(CIFAR, CIFAR_KWARGS).architecture == {"model": CIFAR, "kwargs": CIFAR_KWARGS, "num_classes": HEADS}


DATA = {"task": "heads", "heads": {head: {"num_classes": width} for head, width in HEADS.items()}}


@pytest.mark.parametrize(
    ("data", "heads"), [(DATA, ["pair", "odd"]), (DATA, ["pair", "pair"]), (DATA, []), ({}, ["pair"])]
)
@pytest.mark.parametrize("is_other", [False, True])
def test_a_teacher_has_heads_of_the_data_only(data: dict[str, Any], heads: list[str], is_other: bool) -> None:
    named = {"model": "timm/test_resnet", "heads": heads}
    with pytest.raises(ValueError, match=r"heads"):
        Config.model_validate({"data": data, "teacher": {"others": [named]} if is_other else named})


def test_a_teacher_of_several_heads_has_no_pretrained_weights() -> None:
    """The classes of a published classifier are not those of the heads; this is known before the download."""
    with raises("model.untrained-head", ModelError, where="teacher.weights", exit_code=2):
        teacher("timm/test_resnet.r160_in1k", weights="pretrained")


# Weights of one form in a network of the other

FORMS = [
    ("timm/test_resnet", {}),
    ("torchvision/squeezenet1_1", {}),
    (CIFAR, CIFAR_KWARGS),
    (f"{FACTORIES}:decorated", {}),
    ("timm/deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}),
]


LINEAR = [form for form in FORMS if form[0] != "torchvision/squeezenet1_1"]


@pytest.mark.parametrize(("model", "kwargs"), LINEAR, ids=[model for model, _ in LINEAR])
def test_a_network_with_one_classifier_takes_the_head_of_its_name(
    model: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    several = student(model, kwargs, seed=5).module
    weights = saved(several.network.state_dict(), tmp_path / "several.safetensors")
    loaded = teacher(model, kwargs, weights=weights, heads=["even"])
    expected, outputs = outputs_of(several), outputs_of(loaded.module)
    assert list(outputs) == ["logits.even", "embedding"]
    torch.testing.assert_close(outputs, {name: expected[name] for name in outputs})
    (note,) = loaded.notes
    assert "heads.pair.weight" in note
    config = TeacherConfig.model_validate(section(model, kwargs, weights=weights, heads=["even"]))
    check_weights(config, widths=WIDTHS, size=64, where="teacher")


@pytest.mark.parametrize(("model", "kwargs"), FORMS, ids=[model for model, _ in FORMS])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_student_with_heads_begins_with_the_backbone_of_a_classifier(
    model: str, kwargs: dict[str, Any], prefix: str, tmp_path: Path
) -> None:
    plain = student(model, kwargs, widths={"logits": 11}, seed=5).module
    state = {f"{prefix}{name}": tensor for name, tensor in plain.network.state_dict().items()}
    loaded = student(model, kwargs, weights=saved(state, tmp_path / "plain.safetensors"), seed=6)
    torch.testing.assert_close(outputs_of(loaded.module)["embedding"], outputs_of(plain)["embedding"])
    left_out, new = loaded.notes
    assert all(f"{head}.weight" in left_out for head in plain.heads)
    assert "no heads.pair.weight, heads.pair.bias, heads.even.weight, heads.even.bias in the file" in new
    fresh = student(model, kwargs, seed=6).module.network.state_dict()
    for name in ("heads.pair.weight", "heads.even.bias"):
        assert torch.equal(loaded.module.network.state_dict()[name], fresh[name])


@pytest.mark.parametrize(("model", "kwargs"), FORMS, ids=[model for model, _ in FORMS])
def test_a_backbone_without_heads_initialises_either_form(model: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    several = student(model, kwargs, seed=5).module
    state = {name: value for name, value in several.network.state_dict().items() if name.startswith("backbone.")}
    weights = saved(state, tmp_path / "backbone.safetensors")
    for widths in (WIDTHS, {"logits": 3}):
        loaded = student(model, kwargs, widths=widths, weights=weights)
        torch.testing.assert_close(outputs_of(loaded.module)["embedding"], outputs_of(several)["embedding"])
        assert len(loaded.notes) == 1


def test_weights_of_other_heads_keep_the_common_ones(tmp_path: Path) -> None:
    three = student(CIFAR, CIFAR_KWARGS, widths={**WIDTHS, "logits.order": 3}, seed=5).module
    weights = saved(three.network.state_dict(), tmp_path / "three.safetensors")
    loaded = teacher(CIFAR, CIFAR_KWARGS, weights=weights, heads=["pair", "even"])
    expected, outputs = outputs_of(three), outputs_of(loaded.module)
    assert all(torch.equal(expected[name], output) for name, output in outputs.items())
    (note,) = loaded.notes
    assert note == "teacher.weights: tensors of other heads are left out (heads.order.bias, heads.order.weight)"


@pytest.mark.parametrize("widths", [{**WIDTHS, "logits.order": 3}, {"logits.order": 3}, {"logits": 7}])
def test_a_teacher_whose_weights_lack_a_head_is_refused(widths: dict[str, int], tmp_path: Path) -> None:
    state = student(CIFAR, CIFAR_KWARGS).module.network.state_dict()
    weights = saved(state, tmp_path / "two.safetensors")
    missing = "heads.order.bias, heads.order.weight" if len(widths) > 1 else "fc.bias, fc.weight"
    with raises("model.untrained-head", ModelError, got=f"no {missing}", exit_code=2):
        teacher(CIFAR, CIFAR_KWARGS, widths=widths, weights=weights)


def test_a_classifier_that_is_not_linear_does_not_take_a_head(tmp_path: Path) -> None:
    """SqueezeNet has a ReLU after its classifier, so the head would return other logits."""
    model = "torchvision/squeezenet1_1"
    weights = saved(student(model).module.network.state_dict(), tmp_path / "several.safetensors")
    with raises("model.untrained-head", ModelError, got="no classifier.1.bias, classifier.1.weight"):
        teacher(model, weights=weights, heads=["even"])


def test_a_head_of_another_width_is_refused_for_a_student_too(tmp_path: Path) -> None:
    state = student(CIFAR, CIFAR_KWARGS).module.network.state_dict()
    weights = saved(state, tmp_path / "two.safetensors")
    with raises("weights.misfit", ModelError, exit_code=2) as caught:
        student(CIFAR, CIFAR_KWARGS, widths={**WIDTHS, "logits.even": 3}, weights=weights)
    assert "heads.even.weight (2, 7) for (3, 7)" in str(caught.value.got)


def test_a_text_head_is_a_single_head(tmp_path: Path) -> None:
    with raises("config.text-head-of-several-heads", ConfigError, where="teacher.text_head", exit_code=2):
        teacher("timm/test_resnet", text_head=str(saved({"weight": torch.ones(7, 4)}, tmp_path / "text.safetensors")))
