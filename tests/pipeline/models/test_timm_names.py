"""Every name of timm: its embedding has the width that timm declares, or it is refused by code before any work."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.models.load import resolve
from pipeline.models.probe import probe_outputs
from pipeline.models.sources.base import BuiltModel
from schemas.config import ModelConfig
from tests.marks import slow
from tests.pipeline.models.factories import Plain
from tests.pipeline.models.loading import NORMALISED, load, refused

NO_CLASSIFIER = "model.no-classifier"
# Names without a single classifier.
REFUSED = ("efficientvim_*_dist", "*_enc")
# Each part is a test, so that the others run after a failure.
NUM_PARTS = 8


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("efficientvim_m1_dist", {}),
        slow("deepseek_vit_412m_enc", {}),
        ("test_resnet", {"features_only": True}),
    ],
)
def test_names_without_a_single_classifier_are_refused(name: str, kwargs: dict[str, Any]) -> None:
    for where in ("teacher", "student"):
        with torch.device("meta"):
            error = refused(f"timm/{name}", kwargs=kwargs, where=where)
        assert (error.code, error.where) == (NO_CLASSIFIER, f"{where}.model")


def test_a_head_of_another_width_than_timm_declares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model

    def widened(*args: Any, **kwargs: Any) -> Any:
        network: Any = build(*args, **kwargs)
        network.head_hidden_size += 1
        return network

    monkeypatch.setattr(timm, "create_model", widened)
    assert refused("timm/test_resnet").code == "model.embedding-width"


class Auxiliary(Plain):
    """Returns a second output in training mode, like GoogLeNet with ``aux_logits``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        logits_BK = super().forward(nn.functional.dropout(self.norm(x), training=self.training))
        return (logits_BK, logits_BK) if self.training else logits_BK


class Silent(Auxiliary):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits[0] if self.training else logits


class Failing(Auxiliary):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            raise FileNotFoundError("no such file: statistics")
        return super().forward(x)


HERE = "python:tests.pipeline.models.test_timm_names"


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        (f"{HERE}:Auxiliary", {}),
        ("torchvision/googlenet", {"aux_logits": True}),
    ],
)
def test_a_student_with_several_outputs_in_training_mode_is_refused(model: str, kwargs: dict[str, Any]) -> None:
    keys: dict[str, Any] = {"kwargs": kwargs, **NORMALISED}
    assert load(model, **keys).module.widths["logits"] == 7  # a teacher never trains
    error = refused(model, where="student", **keys)
    assert (error.code, error.where) == ("model.training-outputs", "student.model")
    assert "tuple" in str(error.got) or "GoogLeNetOutputs" in str(error.got)


def test_a_student_that_fails_in_training_mode_is_refused_with_its_error() -> None:
    error = refused(f"{HERE}:Failing", where="student", **NORMALISED)
    assert (error.code, error.got) == ("model.training-outputs", "FileNotFoundError: no such file: statistics")
    assert "fails in training mode" in error.what


def test_the_check_of_training_mode_changes_neither_statistics_nor_generators() -> None:
    before = torch.get_rng_state()
    student = load(f"{HERE}:Silent", where="student", **NORMALISED).module
    assert torch.equal(torch.get_rng_state(), before)
    fresh = nn.BatchNorm2d(3).state_dict()
    norm: Any = student.network.norm
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in norm.state_dict().items())
    assert not student.training


# ---- every name


# Classes of networks whose forward was checked in this process.
CHECKED: set[object] = set()


def width_of_heads(built: BuiltModel) -> int | None:
    """D according to the layers; None if a head is not a layer of torch."""
    widths: list[int] = []
    for name in built.heads:
        layer = built.network.get_submodule(name)
        if type(layer) is nn.Linear:
            widths.append(layer.in_features)
        elif type(layer) is nn.Conv2d:
            widths.append(layer.in_channels)
        else:
            return None
    return widths[0] if len(set(widths)) == 1 else sum(widths)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(NUM_PARTS))
@pytest.mark.usefixtures("without_initial_values")
def test_every_name_has_the_width_that_timm_declares_or_is_refused(part: int) -> None:
    assert len(timm.list_models()) > 1000
    names = timm.list_models()[part::NUM_PARTS]
    refused: dict[str, str] = {}
    wrong: dict[str, object] = {}
    for name in names:
        config = ModelConfig.model_validate({"model": f"timm/{name}", "weights": "random"})
        request = resolve(config, {"logits": 7}, True, "teacher")
        try:
            with torch.device("meta"):
                built = request.build()
            width = width_of_heads(built)
            if width is not None and width != built.embedding_dim:
                wrong[name] = f"{built.heads} read {width}, not {built.embedding_dim}"
            # A forward checks D once for every class of networks, and wherever a head is a module of timm.
            kind = (type(built.network), type(built.network.get_submodule(built.heads[0])), len(built.heads))
            if width is None or kind not in CHECKED:
                CHECKED.add(kind)
                assert built.declared.size is not None
                outputs = probe_outputs(built, request, size=built.declared.size)
                assert outputs["embedding"].shape[1] == built.embedding_dim
        except ModelError as error:
            refused[name] = error.code
        except Exception as error:
            wrong[name] = repr(error)
    assert wrong == {}
    expected = {name for name in names if any(fnmatch(name, pattern) for pattern in REFUSED)}
    assert refused == dict.fromkeys(expected, NO_CLASSIFIER)
