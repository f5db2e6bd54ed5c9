"""Names, inputs and randomness: what a YAML section turns into, and how it is refused."""

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
from torch import Tensor, nn

from pipeline.core.errors import ConfigError, ModelError, StillroomError
from pipeline.core.hashing import canonical_json, weights_digest
from pipeline.models import LoadedModel, load_model
from schemas.config import ModelConfig
from tests.pipeline.models import factories

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = (0.5, 0.5, 0.5)
PLAIN = "python:tests.pipeline.models.factories:Plain"
OWN = {"mean": HALF, "std": HALF}


def load(
    model: str | None, *, size: int | None = 64, where: str = "teacher", seed: int = 0, **keys: Any
) -> LoadedModel:
    config = ModelConfig.model_validate({"model": model, **keys})
    return load_model(config, num_classes=7, size=size, where=where, seed=seed)


def refusal(kind: type[StillroomError], model: str | None, **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        load(model, **keys)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- what goes in


@pytest.mark.parametrize(
    ("model", "size", "mean", "std", "interpolation"),
    [
        ("timm/test_resnet", 160, HALF, HALF, "bilinear"),
        ("timm/test_efficientnet", 160, *IMAGENET, "bicubic"),
        ("torchvision/mobilenet_v3_small", 224, *IMAGENET, "bilinear"),
        ("torchvision/efficientnet_b0", 224, *IMAGENET, "bicubic"),
    ],
)
def test_a_library_model_says_what_it_eats(model: str, size: int, mean: Any, std: Any, interpolation: str) -> None:
    spec = load(model, size=None).input
    assert (spec.size, spec.mean, spec.std, spec.interpolation) == (size, mean, std, interpolation)


@pytest.mark.parametrize("model", ["timm/test_resnet", "torchvision/mobilenet_v3_small"])
def test_the_yaml_overrides_what_the_model_says(model: str) -> None:
    spec = load(model, size=48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic").input
    assert spec.size == 48
    assert spec.mean == (0.1, 0.2, 0.3)
    assert spec.std == (0.4, 0.5, 0.6)
    assert spec.interpolation == "bicubic"


def test_a_mean_of_zero_is_a_given_mean() -> None:
    assert load("timm/test_resnet", mean=(0, 0, 0), std=(1, 1, 1)).input.mean == (0, 0, 0)


def test_a_model_built_for_a_size_has_that_size() -> None:
    assert load("timm/test_vit", size=None, kwargs={"img_size": 64}).input.size == 64


def test_own_network_without_mean_std_or_size_names_all_three() -> None:
    message = refusal(ConfigError, PLAIN, size=None)
    assert "mean, std, size must be given" in message
    assert "Plain does not declare its input; std must be given" in refusal(ConfigError, PLAIN, size=32, mean=HALF)


def test_own_network_without_interpolation_gets_bilinear() -> None:
    assert load(PLAIN, **OWN).input.interpolation == "bilinear"
    assert load(PLAIN, **OWN, interpolation="bicubic").input.interpolation == "bicubic"


def test_a_std_of_zero_is_refused() -> None:
    assert "std must be above 0" in refusal(ConfigError, PLAIN, mean=HALF, std=(0.5, 0, 0.5))


# ---- names


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("timm/resnet81", "resnet18"),
        ("timm/resnet18.a1_in1m", "resnet18.a1_in1k"),
        ("torchvision/resnet81", "resnet18"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(model: str, near: str) -> None:
    message = refusal(ModelError, model)
    assert model in message
    assert near in message


@pytest.mark.parametrize("model", ["resnet18", "hub/resnet18", "timm/", "python:", "hf-hub:timm/resnet18", None])
def test_other_forms_are_answered_with_the_three_that_are(model: str | None) -> None:
    kind = ConfigError if model is None else ModelError
    assert "timm/NAME, torchvision/NAME or python:package.module:factory" in refusal(kind, model)


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/tmp/model", "a/b"]
)
def test_timm_never_reaches_for_another_repository(name: str) -> None:
    assert "only names of timm" in refusal(ModelError, f"timm/{name}")


def test_detection_models_are_not_classifiers() -> None:
    assert "no model of this name" in refusal(ModelError, "torchvision/fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18", PLAIN])
def test_kwargs_do_not_set_the_number_of_classes(model: str) -> None:
    assert "num_classes" in refusal(ConfigError, model, kwargs={"num_classes": 3}, **OWN)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("timm/resnet18", {"checkpoint_path": "/tmp/x.pt"}),
        ("timm/resnet18", {"pretrained_cfg_overlay": {"file": "/tmp/x.pt"}}),
        ("torchvision/resnet18", {"weights": "DEFAULT"}),
    ],
)
def test_kwargs_cannot_bring_weights_past_the_weights_key(model: str, kwargs: dict[str, Any]) -> None:
    assert next(iter(kwargs)) in refusal(ConfigError, model, kwargs=kwargs)


@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18", PLAIN])
def test_an_unknown_kwarg_is_named(model: str) -> None:
    message = refusal(ModelError, model, kwargs={"colour": "red"}, **OWN)
    assert "colour" in message
    assert "teacher.kwargs" in message


# ---- own networks


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no.such.module:factory", "No module named"),
        ("tests.pipeline.models.factories:nothing", "nothing"),
        ("tests.pipeline.models.factories", "not the name of a factory"),
        ("tests.pipeline.models.factories:not_callable", "is a int"),
        ("tests.pipeline.models.factories:not_a_network", "did not return a network"),
        ("tests.pipeline.models.factories:fails", "RuntimeError: no network for 7 classes today"),
        ("tests.pipeline.models.factories:Headless", "no nn.Linear at all"),
        ("tests.pipeline.models.factories:ProjectorRegisteredLast", "projector: Linear(in_features=5, out_features=3"),
        ("tests.pipeline.models.factories:SharedHead", "fc ran 2 times in one forward"),
        ("tests.pipeline.models.factories:Transposed", "logits (7, 2)"),
    ],
)
def test_an_own_network_that_cannot_serve_says_why(target: str, said: str) -> None:
    message = refusal(ModelError, f"python:{target}", **OWN)
    assert said in message
    assert "second line" not in message


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/tmp/net:build",
            "../net:build",
            ".net:build",
            "tests/net:build",
            "net.py/x:build",
            "https://host/net:build",
        ),
        *("net:build()", "net:a.b", "net:", ":build", "a b:c", "net;x:y", "a..b:c"),
    ],
)
def test_a_factory_is_named_and_never_a_path_or_an_expression(name: str) -> None:
    assert "not the name of a factory" in refusal(ModelError, f"python:{name}", **OWN)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("torch.hub:load", {"repo_or_dir": "{folder}", "source": "local", "model": "net"}),
        ("subprocess:Popen", {"args": ["touch", "{folder}/made"]}),
        ("os:mkdir", {"path": "{folder}/made"}),
        ("timm:create_model", {"model_name": "hf-hub:timm/resnet18.a1_in1k"}),
        ("torch:load", {"f": "{folder}/x.pt", "weights_only": False}),
        # What the module has imported itself.
        ("tests.pipeline.models.imported:load", {"repo_or_dir": "{folder}", "source": "local", "model": "net"}),
        ("tests.pipeline.models.imported:Popen", {"args": ["touch", "{folder}/made"]}),
        ("tests.pipeline.models.imported:make_folder", {"path": "{folder}/made"}),
    ],
)
def test_functions_that_run_what_a_config_brings_are_no_factories(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "hubconf.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'made')!r})\nnet = None\n")
    filled = yaml.safe_load(yaml.safe_dump(kwargs).replace("{folder}", str(tmp_path)))
    assert "must be your code" in refusal(ModelError, f"python:{name}", kwargs=filled, **OWN)
    assert not (tmp_path / "made").exists()


def test_building_a_model_adds_nothing_to_where_python_looks_for_modules(tmp_path: Path) -> None:
    (tmp_path / "beside_weights.py").write_text("build = None\n")
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(factories.Plain(7).state_dict(), weights)
    before = list(sys.path)
    assert load(PLAIN, weights=str(weights), **OWN).module.num_classes == 7
    assert sys.path == before
    assert "No module named" in refusal(ModelError, "python:beside_weights:build", weights=str(weights), **OWN)


@pytest.mark.parametrize("network", ["Poisoned", "PoisonedEmbedding"])
def test_a_network_that_answers_with_nan_is_refused(network: str) -> None:
    said = refusal(ModelError, f"python:tests.pipeline.models.factories:{network}", **OWN)
    assert "the network returns NaN or infinity" in said
    assert "check the weights" in said


def test_kwargs_reach_the_factory() -> None:
    assert load(PLAIN, kwargs={"width": 9}, **OWN).module.embedding_dim == 9


def test_an_own_network_has_nothing_to_download() -> None:
    assert "no pretrained weights" in refusal(ModelError, PLAIN, weights="pretrained", **OWN)


# ---- size


@pytest.mark.parametrize(
    ("model", "where", "advice"),
    [
        ("timm/vit_tiny_patch16_224", "teacher", ("set views.size to 224", "{img_size: 64}")),
        ("torchvision/vit_b_16", "student", ("set student.size to 224", "student.kwargs: {image_size: 64}")),
    ],
)
def test_a_size_that_does_not_fit_is_answered_with_both_ways_out(
    model: str, where: str, advice: tuple[str, ...]
) -> None:
    message = refusal(ModelError, model, where=where)
    assert "64×64" in message
    assert all(part in message for part in advice)


def test_three_channels_are_what_is_fed() -> None:
    assert "does not run" in refusal(ModelError, "timm/test_resnet", kwargs={"in_chans": 1})


# ---- randomness and fingerprint


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_random_weights_are_a_function_of_the_seed(seed: int) -> None:
    first, again, other = (
        weights_digest(load(PLAIN, seed=s, **OWN).module.network.state_dict()) for s in (seed, seed, seed ^ 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("model", ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_random_weights_do_not_depend_on_what_was_drawn_before(model: str) -> None:
    first = weights_digest(load(model).module.network.state_dict())
    torch.rand(5)
    assert weights_digest(load(model).module.network.state_dict()) == first
    assert weights_digest(load(model, seed=1).module.network.state_dict()) != first


def test_loading_leaves_the_global_generator_where_it_was() -> None:
    before = torch.get_rng_state()
    load("timm/test_resnet")
    with pytest.raises(ModelError):
        load("timm/test_resnet", kwargs={"colour": "red"})
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_are_timms_own_under_the_same_seed() -> None:
    ours = load("timm/test_resnet", seed=5).module.network.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = timm.create_model("test_resnet", num_classes=7).state_dict()
    assert weights_digest(ours) == weights_digest(theirs)


def test_the_architecture_is_json_and_copies_what_it_was_given() -> None:
    kwargs = {"width": 9}
    found = load(PLAIN, kwargs=kwargs, **OWN).architecture
    kwargs["width"] = 10
    assert canonical_json(found) == canonical_json({"model": PLAIN, "kwargs": {"width": 9}, "num_classes": 7})


def test_kwargs_that_are_not_plain_yaml_are_refused() -> None:
    assert "plain YAML" in refusal(ConfigError, PLAIN, kwargs={"width": float("nan")}, **OWN)


def test_the_network_comes_in_eval_mode_without_a_gradient() -> None:
    module = load("timm/test_resnet").module
    assert not any(part.training for part in module.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_the_dry_forward_leaves_running_statistics_alone() -> None:
    fresh = nn.BatchNorm2d(1).running_mean
    for name, tensor in load("timm/test_resnet").module.network.state_dict().items():
        if name.endswith("running_mean"):
            assert isinstance(fresh, Tensor)
            assert torch.equal(tensor, fresh.expand_as(tensor))


def test_sha256_without_a_url_is_a_contradiction() -> None:
    assert "sha256" in refusal(ConfigError, "timm/test_resnet", sha256="0" * 64)
