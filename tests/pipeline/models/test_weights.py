"""Weights from a URL: every form of checkpoint, every way they can be wrong, and never a line of pickled code."""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
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
from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.core.hashing import weights_digest
from pipeline.models import LoadedModel, load_model, load_state, read_state
from schemas.config import ModelConfig
from tests.errors import raises
from tests.pipeline.models.factories import Plain

HALF = (0.5, 0.5, 0.5)
PLAIN = "python:tests.pipeline.models.factories:Plain"


def load(weights: str, *, model: str = PLAIN, num_classes: int = 7, **keys: Any) -> LoadedModel:
    config = ModelConfig.model_validate({"model": model, "weights": weights, "mean": HALF, "std": HALF, **keys})
    return load_model(config, num_classes=num_classes, size=32)


def refused(weights: str, **keys: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(weights, **keys)
    return caught.value


def refusal(weights: str, **keys: Any) -> str:
    return str(refused(weights, **keys))


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


NESTINGS = [
    *("state_dict", "model", "student", "model_state_dict", "model_state", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "model.state_dict", "ema.model.net"),
]
PREFIXES = ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.net.", "a.b.c.d."]


def nest(path: str, content: Any) -> Any:
    for key in reversed(path.split(".")):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}, "lr": 0.1}}
    return content


@pytest.mark.parametrize("nesting", NESTINGS)
def test_checkpoints_of_training_loops_are_opened(state: dict[str, Tensor], tmp_path: Path, nesting: str) -> None:
    loaded = load(save(nest(nesting, state), tmp_path / "checkpoint.pt"))
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(state)
    assert loaded.notes == ()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_prefixes_that_all_names_share_are_removed(
    state: dict[str, Tensor], tmp_path: Path, prefix: str, nesting: str | None
) -> None:
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    url = save(nest(nesting, prefixed) if nesting else prefixed, tmp_path / "checkpoint.pt")
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_a_network_whose_own_names_share_a_prefix_keeps_them(state: dict[str, Tensor], prefix: str) -> None:
    network = nn.ModuleDict({prefix.rstrip("."): Plain(7)})
    names = {prefix + name: tensor for name, tensor in state.items()}
    for stored in (names, {f"module.{name}": tensor for name, tensor in names.items()}):
        load_state(network, stored, source="names", where="teacher.weights")
        assert weights_digest(network.state_dict()) == weights_digest(names)


def test_weights_of_compiled_submodules_and_of_averaged_models_load(state: dict[str, Tensor]) -> None:
    network = Plain(7)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    assert {"n_averaged", "module.fc.weight"} < set(averaged.state_dict())
    load_state(Plain(7), averaged.state_dict(), source="averaged", where="teacher.weights")
    names = {name.replace("stem.", "stem._orig_mod."): tensor for name, tensor in state.items()}
    load_state(network, names, source="compiled", where="teacher.weights")
    assert weights_digest(network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("name", ["best.pth.tar", "lit.ckpt", "pytorch_model.bin", "weights", "weights.safetensors"])
@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors"])
def test_the_content_of_a_file_decides_and_not_its_name(
    state: dict[str, Tensor], tmp_path: Path, name: str, write: str
) -> None:
    path = tmp_path / name
    if write == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=write == "zip")
    assert weights_digest(load(str(path)).module.network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_values_next_to_weights_do_not_matter_and_are_not_built(
    state: dict[str, Tensor], tmp_path: Path, legacy: bool
) -> None:
    values = {"best": np.float64(76.1), "epoch": np.int64(3), "curve": np.arange(3.0), "size": np.dtype("V2000000000")}
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": state, **values}, path, _use_new_zipfile_serialization=not legacy)
    allowed = torch.serialization.get_safe_globals()
    assert weights_digest(load(str(path)).module.network.state_dict()) == weights_digest(state)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_of_several_state_dicts_the_first_in_the_documented_order_is_loaded_and_named(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = {"ema": {"model": other}, "state_dict_ema": other, "net": other, "state_dict": state, "raw": other}
    loaded = load(save(content, tmp_path / "both.pt"))
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(state)
    (note,) = loaded.notes
    assert note.startswith("teacher.weights: the state dict under state_dict was loaded")
    assert note.endswith("the file also has net, state_dict_ema, ema")


def test_a_mapping_without_tensors_is_passed_over(state: dict[str, Tensor], tmp_path: Path) -> None:
    url = save({"model": {"name": "resnet8"}, "net": state}, tmp_path / "checkpoint.pt")
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    assert refused(save(content, tmp_path / "loop.pt")).code == "weights.no-state-dict"


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("weights.pt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "weights.empty-file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "weights.git-lfs-pointer"),
        (b"<!DOCTYPE html><html>quota</html>", "weights.html-page"),
        (b"\n\n<HTML><body>Sign in</body>", "weights.html-page"),
        (gzip.compress(b"weights", mtime=0), "weights.compressed-file"),
        (bz2.compress(b"weights"), "weights.compressed-file"),
        (lzma.compress(b"weights"), "weights.compressed-file"),
        (b'{"error": "Access denied"}', "weights.unknown-format"),
        (tar_of(b"weights"), "weights.unknown-format"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "weights.unknown-format"),
        (bytes(1000), "weights.unknown-format"),
    ],
)
def test_what_is_no_weights_file_is_named(tmp_path: Path, name: str, data: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(data)
    error = refused(str(tmp_path / name))
    assert (error.code, error.where) == (code, f"teacher.weights: {tmp_path / name}")
    assert error.next_step


class Recipe:
    """Stands for a class of a training script."""

    def __init__(self) -> None:
        self.lr = 0.1


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def _with_namespace(net: Plain) -> Any:
    return {"state_dict": net.state_dict(), "args": argparse.Namespace(lr=1, model="resnet8"), "epoch": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "write"),
    [
        (_with_namespace, torch.save),
        (_with_namespace, _legacy),
        (lambda net: {"net": net.state_dict(), "args": Recipe()}, _pickle),
        (lambda net: {"model": net, "epoch": 3}, torch.save),
        (lambda net: net, torch.save),
    ],
)
def test_the_command_of_the_message_converts_a_checkpoint_with_pickled_objects(
    state: dict[str, Tensor], tmp_path: Path, wrap: Any, write: Any
) -> None:
    network = Plain(7)
    network.load_state_dict(state)
    path = tmp_path / "it's a run.pt"
    write(wrap(network), path)
    error = refused(str(path))
    assert error.code == "weights.pickled-code"
    _, _, command = str(error.next_step).partition(": ")
    assert command.startswith("python -c ")
    subprocess.run(shlex.split(command.replace("python", sys.executable, 1)), check=True)
    converted = load(str(tmp_path / "it's a run-weights.pt"))
    assert weights_digest(converted.module.network.state_dict()) == weights_digest(state)


class Versioned(nn.Module):
    """Like torchvision's MNASNet: refuses files without versions, and renames the tensors of version 1."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError("a version is needed")
        if metadata["version"] == 1:
            state[f"{prefix}fc.weight"] = state.pop(f"{prefix}old.weight")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_versions_of_modules_are_those_of_the_file(tmp_path: Path, prefix: str) -> None:
    network = Versioned()
    wrapped: nn.Module = network
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    stored: Any = wrapped.state_dict()
    stored._metadata[prefix.rstrip(".")]["version"] = 1
    stored[f"{prefix}old.weight"] = stored.pop(f"{prefix}fc.weight")
    file = read_state(save(stored, tmp_path / "old.pt"), sha256=None, where="teacher.weights")
    fresh = Versioned()
    load_state(fresh, file.state, source="old.pt", where="teacher.weights")
    assert weights_digest(fresh.state_dict()) == weights_digest(network.state_dict())


@pytest.mark.parametrize("length", [128, 640, 896, 33408])
def test_a_safetensors_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    network = nn.Linear(2, 3)
    data = safetensors.torch.save(network.state_dict())
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip().ljust(length)
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert (tmp_path / "x").read_bytes().startswith(b"\x80")
    file = read_state(str(tmp_path / "x"), sha256=None, where="teacher.weights")
    assert weights_digest(dict(file.state)) == weights_digest(network.state_dict())


def test_a_file_without_versions_is_read_as_of_the_current_ones_where_a_module_needs_them(tmp_path: Path) -> None:
    network, fresh = Versioned(), Versioned()
    file = read_state(save(network.state_dict(), tmp_path / "x.safetensors"), sha256=None, where="teacher.weights")
    load_state(fresh, file.state, source="x", where="teacher.weights")
    assert weights_digest(fresh.state_dict()) == weights_digest(network.state_dict())


def test_metadata_of_a_file_changes_nothing_but_versions(tmp_path: Path) -> None:
    stored: Any = Plain(7).half().state_dict()
    for facts in stored._metadata.values():
        facts["assign_to_params_buffers"] = True
    network = Plain(7)
    file = read_state(save(stored, tmp_path / "x.pt"), sha256=None, where="teacher.weights")
    load_state(network, file.state, source="x.pt", where="teacher.weights")
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_what_a_module_raises_at_loading_is_an_error_of_the_weights() -> None:
    with pytest.raises(ModelError) as caught:
        load_state(Versioned(), {"old.weight": torch.zeros(3, 2)}, source="x", where="teacher.weights")
    assert caught.value.code == "weights.misfit"


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
    assert "torch.jit.load" in message
    array = np.array([Malice(tmp_path / "owned")], object)
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    assert refused(str(tmp_path / "array.npy")).code == "weights.unknown-format"
    (tmp_path / "array.npy").rename(tmp_path / "array.pt")
    assert refused(str(tmp_path / "array.pt")).code == "weights.unknown-format"
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


def test_a_misspelt_word_for_weights_gets_the_words_that_there_are() -> None:
    error = refused("pretraind")
    assert (error.code, error.where, error.got) == ("weights.unknown-name", "teacher.weights", "pretraind")
    assert str(error.expected).startswith("pretrained, random, or ")


def test_an_absent_file_and_a_command_are_refused_by_storage(tmp_path: Path) -> None:
    with raises("storage.missing-file"):
        load(str(tmp_path / "absent.pt"))
    with raises("storage.refused-url"):
        load("pipe:cat weights.pt")


def test_a_secret_in_a_url_stays_out_of_the_message() -> None:
    url = "memory://weights/model.bin?token=swordfish"
    with fsspec.open(url, "wb") as handle:
        torch.save({"args": argparse.Namespace(lr=1)}, handle)
    message = refusal(url)
    assert "model-weights.pt" in message
    assert "swordfish" not in message


def test_half_precision_files_fill_a_full_precision_network(state: dict[str, Tensor]) -> None:
    network = Plain(7)
    load_state(network, {name: tensor.half() for name, tensor in state.items()}, source="half", where="teacher.weights")
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(network.fc.weight.detach(), state["fc.weight"].half().float(), rtol=0, atol=0)
