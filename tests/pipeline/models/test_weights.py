"""Weights from a URL: both formats, every way they can be wrong, and never a line of pickled code."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ModelError, StorageInputError
from pipeline.fingerprint import weights_digest
from pipeline.models import LoadedModel, load_model, load_state, read_state
from schemas.config import ModelConfig
from tests.pipeline.models.factories import Plain

HALF = (0.5, 0.5, 0.5)
PLAIN = "python:tests.pipeline.models.factories:Plain"


def load(weights: str, *, model: str = PLAIN, num_classes: int = 7, **keys: Any) -> LoadedModel:
    config = ModelConfig.model_validate({"model": model, "weights": weights, "mean": HALF, "std": HALF, **keys})
    return load_model(config, num_classes=num_classes, size=32)


def refusal(weights: str, **keys: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(weights, **keys)
    return str(caught.value)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return load_model(
        ModelConfig.model_validate({"model": PLAIN, "mean": HALF, "std": HALF}), num_classes=7, size=32, seed=99
    ).module.network.state_dict()


def save(content: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_saved_weights_come_back_bit_for_bit(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    url = save(state, tmp_path / f"weights{suffix}")
    sha256 = hashlib.sha256(Path(url).read_bytes()).hexdigest()
    assert weights_digest(load(url, sha256=sha256).module.network.state_dict()) == weights_digest(state)


def test_weights_of_the_bare_library_model_load(tmp_path: Path) -> None:
    import timm

    bare = timm.create_model("test_resnet", num_classes=7)
    url = save(bare.state_dict(), tmp_path / "bare.safetensors")
    loaded = load(url, model="timm/test_resnet")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images)[0], bare.eval()(images), rtol=0, atol=0)


def test_weights_are_read_from_any_allowed_url(state: dict[str, Tensor]) -> None:
    url = "memory://weights/student.safetensors"
    with fsspec.open(url, "wb") as handle:
        handle.write(safetensors.torch.save(state))
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("nesting", ["model", "state_dict", "student"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_training_loops_are_opened(
    state: dict[str, Tensor], tmp_path: Path, nesting: str, prefix: str
) -> None:
    nested = {nesting: {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3, "optimizer": {"lr": 0.1}}
    url = save(nested, tmp_path / "checkpoint.pt")
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


def test_checkpoints_older_than_batch_counters_load(tmp_path: Path) -> None:
    fresh = load_model(ModelConfig.model_validate({"model": "timm/test_resnet"}), num_classes=7, size=32, seed=4)
    full = fresh.module.network.state_dict()
    old = {name: tensor for name, tensor in full.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(full)
    loaded = load(save(old, tmp_path / "old.pth"), model="timm/test_resnet")
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(full)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tampered_weights_are_refused_before_they_are_parsed(
    state: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    path = Path(save(state, tmp_path / f"weights{suffix}"))
    data = bytearray(path.read_bytes())
    sha256 = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    path.write_bytes(data)
    message = refusal(str(path), sha256=sha256)
    assert "sha256 differs" in message
    assert sha256 in message
    assert hashlib.sha256(data).hexdigest() in message


class Malice:
    """Unpickled with an ordinary loader, this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_does_not_run(state: dict[str, Tensor], tmp_path: Path) -> None:
    url = save({"model": state, "extra": Malice(tmp_path / "owned")}, tmp_path / "evil.pt")
    message = refusal(url)
    assert "pickled code is never run" in message
    assert "mkdir" in message
    assert not (tmp_path / "owned").exists()
    torch.load(url, weights_only=False)  # the same file is dangerous to a loader that trusts it
    assert (tmp_path / "owned").exists()


def _deflated(data: bytes) -> bytes:
    """The same archive, its records compressed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as stored, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record))
    return target.getvalue()


def test_archives_that_would_be_inflated_are_refused_which_torch_itself_would_load(tmp_path: Path) -> None:
    data = _deflated(_bytes({"w": torch.zeros(10_000_000)}, ".pt"))
    assert len(data) < 100_000
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].numel() == 10_000_000
    (tmp_path / "bomb.pt").write_bytes(data)
    assert "its records are compressed" in refusal(str(tmp_path / "bomb.pt"))


def test_a_pickle_that_asks_for_memory_by_a_number_is_refused(tmp_path: Path) -> None:
    class Hungry:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (1 << 24,)

    url = save({"w": torch.zeros(1), "extra": Hungry()}, tmp_path / "hungry.pt")
    assert len(torch.load(url, weights_only=True)["extra"]) == 1 << 24
    assert "bytearray" in refusal(url)
    torch.save({"w": torch.zeros(1), "extra": Hungry()}, url, _use_new_zipfile_serialization=False)
    assert "bytearray" in refusal(url)


def test_a_safetensors_header_that_is_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    for size_bytes in (1 << 60, 99_000_000, 2):
        (tmp_path / "x.safetensors").write_bytes(size_bytes.to_bytes(8, "little") + b"{")
        assert "damaged or of another format" in refusal(str(tmp_path / "x.safetensors"))
    header = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged or of another format" in refusal(str(tmp_path / "x.safetensors"))


def test_networks_and_arrays_with_code_in_them_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", b"")
    message = refusal(str(path))
    assert "a TorchScript archive" in message
    assert "weights_only" not in message
    array = np.array([Malice(tmp_path / "owned")], object)
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    assert "weights of this kind are not read" in refusal(str(tmp_path / "array.npy"))
    (tmp_path / "array.npy").rename(tmp_path / "array.pt")
    refusal(str(tmp_path / "array.pt"))
    assert not (tmp_path / "owned").exists()


def test_what_does_not_fit_is_counted_and_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    renamed = {name.replace("stem", "trunk"): tensor for name, tensor in state.items()}
    message = refusal(save(renamed, tmp_path / "renamed.pt"))
    assert "2 missing (stem.weight, stem.bias)" in message
    assert "2 unexpected (trunk.weight, trunk.bias)" in message


def test_weights_for_other_classes_name_both_shapes(state: dict[str, Tensor], tmp_path: Path) -> None:
    message = refusal(save(state, tmp_path / "seven.safetensors"), num_classes=10)
    assert "2 of another shape" in message
    assert "fc.weight (7, 5) for (10, 5)" in message
    assert "fc.bias (7,) for (10,)" in message


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    message = refusal(save({f"x{i}": torch.zeros(1) for i in range(50)}, tmp_path / "x.pt"))
    assert "50 unexpected (x0, x1, x2, x3, …)" in message
    assert "x4" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [({}, "empty"), ([1, 2], "list"), ({"model": {"a": 1}}, "a: int"), (torch.zeros(3), "Tensor")],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    message = refusal(save(content, tmp_path / "odd.pt"))
    assert "does not hold a state dict" in message
    assert said in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.99))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / f"weights{suffix}"
    data = _bytes(Plain(7).state_dict(), suffix)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"damaged|more than tensors"):
        read_state(str(path), sha256=None, where="teacher.weights")


def _bytes(state: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("weights", ["pretraind", "weights.npz", "s3://bucket/model.ckpt"])
def test_other_kinds_of_weights_are_answered_with_those_that_are(weights: str) -> None:
    assert "pretrained, random, or a URL that ends in .safetensors, .pt, .pth" in refusal(weights)


def test_an_absent_file_and_a_command_are_refused_by_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageInputError, match="no such file"):
        load(str(tmp_path / "absent.pt"))
    with pytest.raises(StorageInputError, match="refused"):
        load("pipe:cat weights.pt")


def test_a_secret_in_a_url_stays_out_of_the_message() -> None:
    message = refusal("https://user:hunter2@host/model.bin?token=swordfish")
    assert "hunter2" not in message
    assert "swordfish" not in message


def test_half_precision_files_fill_a_full_precision_network(state: dict[str, Tensor]) -> None:
    network = Plain(7)
    load_state(network, {name: tensor.half() for name, tensor in state.items()}, source="half", where="teacher.weights")
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(network.fc.weight.detach(), state["fc.weight"].half().float(), rtol=0, atol=0)
