"""A YAML section becomes a network with its input and fingerprint, or is refused with a code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.hashing import canonical_json, weights_digest
from tests.marks import slow
from tests.pipeline.models import factories
from tests.pipeline.models.loading import FACTORIES, HALF, NORMALISED, PLAIN, load, refused

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# ---- the input


@pytest.mark.parametrize(
    ("model", "size", "mean", "std", "interpolation"),
    [
        ("timm/test_resnet", 160, HALF, HALF, "bilinear"),
        ("timm/test_efficientnet", 160, *IMAGENET, "bicubic"),
        ("torchvision/mobilenet_v3_small", 224, *IMAGENET, "bilinear"),
        ("torchvision/efficientnet_b0", 224, *IMAGENET, "bicubic"),
    ],
)
def test_a_library_model_declares_its_input(model: str, size: int, mean: Any, std: Any, interpolation: str) -> None:
    spec = load(model, size=None).input
    assert (spec.size, spec.mean, spec.std, spec.interpolation) == (size, mean, std, interpolation)


@pytest.mark.parametrize("model", ["timm/test_resnet", "torchvision/mobilenet_v3_small"])
def test_the_yaml_overrides_the_declared_input(model: str) -> None:
    std = (0.4, 0.5, 0.6)
    for mean in ((0.1, 0.2, 0.3), (0, 0, 0)):
        spec = load(model, size=48, mean=mean, std=std, interpolation="bicubic").input
        assert (spec.size, spec.mean, spec.std, spec.interpolation) == (48, mean, std, "bicubic")


def test_a_model_built_for_a_size_has_that_size() -> None:
    assert load("timm/test_vit", size=None, kwargs={"img_size": 64}).input.size == 64


@pytest.mark.parametrize(("keys", "missing"), [({"size": None}, "mean, std, size"), ({"mean": HALF}, "std")])
def test_a_user_network_must_be_given_mean_std_and_size(keys: dict[str, Any], missing: str) -> None:
    error = refused(PLAIN, **keys)
    assert (error.code, error.where, error.got) == ("config.model-input-missing", "teacher", f"no {missing}")


# ---- names


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("timm/resnet81", "resnet18"),
        ("timm/resnet18.a1_in1m", "resnet18.a1_in1k"),
        ("torchvision/resnet81", "resnet18"),
    ],
)
def test_the_error_for_an_unknown_name_has_the_nearest_name(model: str, near: str) -> None:
    error = refused(model)
    assert (error.code, error.got) == ("model.unknown-name", model)
    assert near in str(error.expected)


@pytest.mark.parametrize("model", ["resnet18", "hub/resnet18", "timm/", "python:", "hf-hub:timm/resnet18", None])
def test_the_error_for_an_unknown_source_has_the_three_forms(model: str | None) -> None:
    error = refused(model)
    assert error.code == ("config.model-missing" if model is None else "model.unknown-source")
    assert error.expected == "timm/NAME, torchvision/NAME or python:package.module:factory"


@pytest.mark.parametrize(
    ("model", "keys", "code"),
    [
        ("torchvision/fasterrcnn_resnet50_fpn", {}, "model.unknown-name"),
        ("timm/test_resnet", {"kwargs": {"in_chans": 1}}, "model.forward-failed"),
        ("timm/test_resnet", {"sha256": "0" * 64}, "config.sha256-without-url"),
        (PLAIN, {"std": (0.5, 0, 0.5)}, "config.std-not-positive"),
        (PLAIN, {"kwargs": {"width": float("nan")}}, "config.kwargs-not-plain"),
        (PLAIN, {"weights": "pretrained"}, "weights.no-pretrained"),
        # timm would take these from another repository or folder.
        *[
            (f"timm/{name}", {}, "model.hub-name")
            for name in ("hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/tmp/model", "a/b")
        ],
        # A factory is a name, and never a path or an expression.
        *[
            (f"python:{name}", {}, "model.factory-name")
            for name in (
                *("/tmp/net:build", "../net:build", ".net:build", "tests/net:build", "net.py/x:build"),
                *("https://host/net:build", "net:build()", "net:a.b", "net:", ":build", "a b:c", "net;x:y", "a..b:c"),
            )
        ],
    ],
)
def test_a_section_that_defines_no_network_is_refused(model: str, keys: dict[str, Any], code: str) -> None:
    assert refused(model, **{**NORMALISED, **keys}).code == code


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        *((model, {"num_classes": 3}) for model in ("timm/resnet18", "torchvision/resnet18", PLAIN)),
        ("timm/resnet18", {"checkpoint_path": "/tmp/x.pt"}),
        ("timm/resnet18", {"pretrained_cfg_overlay": {"file": "/tmp/x.pt"}}),
        ("torchvision/resnet18", {"weights": "DEFAULT"}),
    ],
)
def test_kwargs_set_neither_the_number_of_classes_nor_weights(model: str, kwargs: dict[str, Any]) -> None:
    error = refused(model, kwargs=kwargs, **NORMALISED)
    assert (error.code, error.where) == ("config.reserved-kwargs", "teacher.kwargs")
    assert next(iter(kwargs)) in error.what


@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18", PLAIN])
def test_the_error_for_an_unknown_kwarg_has_its_name(model: str) -> None:
    error = refused(model, kwargs={"colour": "red"}, **NORMALISED)
    assert error.code == "model.constructor-failed"
    assert "colour" in str(error.got)
    assert "teacher.kwargs" in str(error.next_step)


# ---- networks of the user


@pytest.mark.parametrize(
    ("model", "code", "got"),
    [
        ("python:no.such.module:factory", "model.factory-import", "No module named"),
        (f"{FACTORIES}:nothing", "model.factory-import", "nothing"),
        (FACTORIES, "model.factory-name", FACTORIES),
        (f"{FACTORIES}:not_callable", "model.factory-not-callable", "is a int"),
        (f"{FACTORIES}:not_a_network", "model.not-a-network", "Tensor"),
        (f"{FACTORIES}:fails", "model.constructor-failed", "RuntimeError: no network for 7 classes today"),
        (f"{FACTORIES}:Headless", "model.no-linear-head", "no nn.Linear at all"),
        (
            f"{FACTORIES}:ProjectorRegisteredLast",
            "model.no-linear-head",
            "projector: Linear(in_features=5, out_features=3",
        ),
        (f"{FACTORIES}:SharedHead", "model.forward-failed", "fc ran 2 times in one forward"),
        (f"{FACTORIES}:Transposed", "model.output-shape", "logits (7, 2)"),
    ],
)
def test_a_user_network_that_cannot_be_used_is_refused_with_the_cause(model: str, code: str, got: str) -> None:
    error = refused(model, **NORMALISED)
    assert error.code == code
    assert got in str(error.got)
    assert "second line" not in str(error)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("torch.hub:load", {"repo_or_dir": "{folder}", "source": "local", "model": "net"}),
        ("subprocess:Popen", {"args": ["touch", "{folder}/created"]}),
        ("os:mkdir", {"path": "{folder}/created"}),
        ("timm:create_model", {"model_name": "hf-hub:timm/resnet18.a1_in1k"}),
        ("torch:load", {"f": "{folder}/x.pt", "weights_only": False}),
        # Imports of a user module.
        ("tests.pipeline.models.imported:load", {"repo_or_dir": "{folder}", "source": "local", "model": "net"}),
        ("tests.pipeline.models.imported:Popen", {"args": ["touch", "{folder}/created"]}),
        ("tests.pipeline.models.imported:make_folder", {"path": "{folder}/created"}),
    ],
)
def test_functions_that_run_code_of_a_config_are_not_factories(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "hubconf.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'created')!r})\nnet = None\n")
    filled = yaml.safe_load(yaml.safe_dump(kwargs).replace("{folder}", str(tmp_path)))
    assert refused(f"python:{name}", kwargs=filled, **NORMALISED).code == "model.foreign-factory"
    assert not (tmp_path / "created").exists()


def test_building_a_model_does_not_extend_the_import_path(tmp_path: Path) -> None:
    (tmp_path / "next_to_weights.py").write_text("build = None\n")
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(factories.Plain(7).state_dict(), weights)
    before = list(sys.path)
    assert load(PLAIN, weights=str(weights), **NORMALISED).module.widths["logits"] == 7
    assert sys.path == before
    assert refused("python:next_to_weights:build", weights=str(weights), **NORMALISED).code == "model.factory-import"


@pytest.mark.parametrize("network", ["NanLogits", "NanEmbedding"])
def test_a_network_that_returns_nan_is_refused(network: str) -> None:
    error = refused(f"{FACTORIES}:{network}", **NORMALISED)
    assert error.code == "model.not-finite"
    assert "check the weights" in str(error.next_step)


def test_kwargs_reach_the_factory_and_interpolation_is_bilinear_by_default() -> None:
    loaded = load(PLAIN, kwargs={"width": 9}, **NORMALISED)
    assert (loaded.module.embedding_dim, loaded.input.interpolation) == (9, "bilinear")


# ---- size


@pytest.mark.parametrize(
    ("model", "where", "steps"),
    [
        ("timm/vit_tiny_patch16_224", "teacher", ("set views.size to 224", "{img_size: 64}")),
        ("timm/vit_tiny_patch16_224", "student", ("set student.size to 224", "student.kwargs: {img_size: 64}")),
        slow("torchvision/vit_b_16", "student", ("set student.size to 224", "student.kwargs: {image_size: 64}")),
    ],
)
def test_the_error_for_a_size_that_does_not_fit_has_both_remedies(
    model: str, where: str, steps: tuple[str, ...]
) -> None:
    error = refused(model, where=where)
    assert error.code == "model.forward-failed"
    assert "64×64" in error.what
    assert all(step in str(error.next_step) for step in steps)


# ---- randomness and fingerprint


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_random_weights_are_a_function_of_the_seed(seed: int) -> None:
    first, again, other = (
        weights_digest(load(PLAIN, seed=s, **NORMALISED).module.network.state_dict()) for s in (seed, seed, seed ^ 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("model", ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_random_weights_do_not_depend_on_the_global_generator(model: str) -> None:
    first = weights_digest(load(model).module.network.state_dict())
    torch.rand(5)
    assert weights_digest(load(model).module.network.state_dict()) == first
    assert weights_digest(load(model, seed=1).module.network.state_dict()) != first


def test_loading_does_not_change_the_global_generator() -> None:
    before = torch.get_rng_state()
    load("timm/test_resnet")
    refused("timm/test_resnet", kwargs={"colour": "red"})
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_equal_those_of_timm_under_the_same_seed() -> None:
    loaded = load("timm/test_resnet", seed=5).module.network.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = timm.create_model("test_resnet", num_classes=7).state_dict()
    assert weights_digest(loaded) == weights_digest(expected)


def test_the_architecture_is_a_json_copy_of_the_config() -> None:
    kwargs = {"width": 9}
    architecture = load(PLAIN, kwargs=kwargs, **NORMALISED).architecture
    kwargs["width"] = 10
    assert canonical_json(architecture) == canonical_json({"model": PLAIN, "kwargs": {"width": 9}, "num_classes": 7})


def test_the_trial_forward_leaves_a_network_in_eval_mode_without_gradients_and_with_fresh_statistics() -> None:
    module = load("timm/test_resnet").module
    assert not any(part.training for part in module.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    means = [tensor for name, tensor in module.network.state_dict().items() if name.endswith("running_mean")]
    assert means
    assert not any(mean.any() for mean in means)
