"""Weights from a URL: every form of checkpoint, every fault of a file, and pickled code never runs."""

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
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.core.errors import InputError, ModelError, StorageInputError
from pipeline.core.hashing import weights_digest
from pipeline.models import LoadedModel, load_state, read_state
from tests.pipeline.models import loading
from tests.pipeline.models.factories import Plain
from tests.pipeline.models.loading import NORMALISED, PLAIN


def load(weights: str, *, model: str = PLAIN, **keys: Any) -> LoadedModel:
    return loading.load(model, weights=weights, size=32, **NORMALISED, **keys)


def refused(weights: str, **keys: Any) -> InputError:
    return loading.refused(PLAIN, weights=weights, size=32, **NORMALISED, **keys)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return loading.load(PLAIN, size=32, seed=99, **NORMALISED).module.network.state_dict()


def save(content: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


fill = partial(load_state, source="a test", where="teacher.weights")


def filled(network: nn.Module, url: str) -> nn.Module:
    """The network with the weights of a file."""
    fill(network, read_state(url, sha256=None, where="teacher.weights").state)
    return network


def test_weights_of_the_bare_library_model_load(tmp_path: Path) -> None:
    bare = timm.create_model("test_resnet", num_classes=7)
    url = save(bare.state_dict(), tmp_path / "bare.safetensors")
    loaded = load(url, model="timm/test_resnet")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images)["logits"], bare.eval()(images), rtol=0, atol=0)


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
def test_the_state_dict_of_a_checkpoint_is_found(state: dict[str, Tensor], tmp_path: Path, nesting: str) -> None:
    loaded = load(save(nest(nesting, state), tmp_path / "checkpoint.pt"))
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(state)
    assert loaded.notes == ()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_prefixes_shared_by_all_names_are_removed(
    state: dict[str, Tensor], tmp_path: Path, prefix: str, nesting: str | None
) -> None:
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    url = save(nest(nesting, prefixed) if nesting else prefixed, tmp_path / "checkpoint.pt")
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_a_prefix_shared_by_the_names_of_the_network_is_not_removed(state: dict[str, Tensor], prefix: str) -> None:
    network = nn.ModuleDict({prefix.rstrip("."): Plain(7)})
    names = {prefix + name: tensor for name, tensor in state.items()}
    for stored in (names, {f"module.{name}": tensor for name, tensor in names.items()}):
        fill(network, stored)
        assert weights_digest(network.state_dict()) == weights_digest(names)


def test_weights_of_compiled_submodules_and_of_averaged_models_load(state: dict[str, Tensor]) -> None:
    network = Plain(7)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    assert {"n_averaged", "module.fc.weight"} < set(averaged.state_dict())
    fill(Plain(7), averaged.state_dict())
    fill(network, {name.replace("stem.", "stem._orig_mod."): tensor for name, tensor in state.items()})
    assert weights_digest(network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("name", ["best.pth.tar", "lit.ckpt", "pytorch_model.bin", "weights", "weights.safetensors"])
@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors"])
def test_the_format_is_detected_from_the_content_and_not_from_the_name(
    state: dict[str, Tensor], tmp_path: Path, name: str, write: str
) -> None:
    path = tmp_path / name
    if write == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=write == "zip")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights_digest(load(str(path), sha256=sha256).module.network.state_dict()) == weights_digest(state)


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_values_next_to_weights_are_ignored(state: dict[str, Tensor], tmp_path: Path, legacy: bool) -> None:
    values = {"best": np.float64(76.1), "epoch": np.int64(3), "curve": np.arange(3.0), "size": np.dtype("V2000000000")}
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": state, **values}, path, _use_new_zipfile_serialization=not legacy)
    allowed = torch.serialization.get_safe_globals()
    assert weights_digest(load(str(path)).module.network.state_dict()) == weights_digest(state)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_of_several_state_dicts_the_first_in_the_documented_order_is_loaded(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = {"ema": {"model": other}, "state_dict_ema": other, "net": other, "state_dict": state, "raw": other}
    loaded = load(save(content, tmp_path / "both.pt"))
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(state)
    (note,) = loaded.notes
    assert note.startswith("teacher.weights: the state dict under state_dict was loaded")
    assert note.endswith("the file also has net, state_dict_ema, ema")


def test_a_mapping_without_tensors_is_skipped(state: dict[str, Tensor], tmp_path: Path) -> None:
    url = save({"model": {"name": "resnet8"}, "net": state}, tmp_path / "checkpoint.pt")
    assert weights_digest(load(url).module.network.state_dict()) == weights_digest(state)


def test_a_checkpoint_that_contains_itself_is_refused(tmp_path: Path) -> None:
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
def test_files_of_other_formats_are_refused(tmp_path: Path, data: bytes, code: str) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    error = refused(str(tmp_path / "x.pt"))
    assert (error.code, error.where) == (code, f"teacher.weights: {tmp_path / 'x.pt'}")
    assert error.next_step


class Recipe:
    """A class of a training script."""

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
def test_module_versions_are_those_of_the_file(tmp_path: Path, prefix: str) -> None:
    network = Versioned()
    wrapped: nn.Module = network
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    stored: Any = wrapped.state_dict()
    stored._metadata[prefix.rstrip(".")]["version"] = 1
    stored[f"{prefix}old.weight"] = stored.pop(f"{prefix}fc.weight")
    fresh = filled(Versioned(), save(stored, tmp_path / "old.pt"))
    assert weights_digest(fresh.state_dict()) == weights_digest(network.state_dict())


@pytest.mark.parametrize("length", [128, 640, 896, 33408])
def test_a_safetensors_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    network = nn.Linear(2, 3)
    data = safetensors.torch.save(network.state_dict())
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip().ljust(length)
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert (tmp_path / "x").read_bytes().startswith(b"\x80")
    fresh = filled(nn.Linear(2, 3), str(tmp_path / "x"))
    assert weights_digest(fresh.state_dict()) == weights_digest(network.state_dict())


def test_a_file_without_versions_has_the_current_ones_if_a_module_needs_them(tmp_path: Path) -> None:
    network = Versioned()
    fresh = filled(Versioned(), save(network.state_dict(), tmp_path / "x.safetensors"))
    assert weights_digest(fresh.state_dict()) == weights_digest(network.state_dict())


def test_half_precision_fills_a_full_precision_network_and_metadata_give_only_module_versions(tmp_path: Path) -> None:
    stored: Any = Plain(7).half().state_dict()
    for metadata in stored._metadata.values():
        metadata["assign_to_params_buffers"] = True
    network = filled(Plain(7), save(stored, tmp_path / "x.pt"))
    full = {name: tensor.float() for name, tensor in stored.items()}
    assert weights_digest(network.state_dict()) == weights_digest(full)


def test_an_error_of_a_module_during_loading_is_a_misfit() -> None:
    with pytest.raises(ModelError) as caught:
        fill(Versioned(), {"old.weight": torch.zeros(3, 2)})
    assert caught.value.code == "weights.misfit"


def test_checkpoints_older_than_batch_counters_load(tmp_path: Path) -> None:
    fresh = loading.load("timm/test_resnet", size=32, seed=4)
    full = fresh.module.network.state_dict()
    old = {name: tensor for name, tensor in full.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(full)
    loaded = load(save(old, tmp_path / "old.pth"), model="timm/test_resnet")
    assert weights_digest(loaded.module.network.state_dict()) == weights_digest(full)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tampered_weights_are_refused_before_parsing(state: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = Path(save(state, tmp_path / f"weights{suffix}"))
    data = bytearray(path.read_bytes())
    sha256 = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    path.write_bytes(data)
    error = refused(str(path), sha256=sha256)
    assert error.code == "weights.sha256-mismatch"
    assert (error.got, error.expected) == (hashlib.sha256(data).hexdigest(), sha256)


class Malice:
    """An ordinary loader creates a folder when it unpickles this."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_does_not_run(state: dict[str, Tensor], tmp_path: Path) -> None:
    url = save({"model": state, "extra": Malice(tmp_path / "owned")}, tmp_path / "evil.pt")
    error = refused(url)
    assert error.code == "weights.pickled-code"
    assert "mkdir" in str(error.got)
    assert not (tmp_path / "owned").exists()
    torch.load(url, weights_only=False)  # a loader that trusts the file runs its code
    assert (tmp_path / "owned").exists()


def _deflated(data: bytes) -> bytes:
    """The same archive, its records compressed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as stored, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record))
    return target.getvalue()


def test_compressed_archives_are_refused_although_torch_loads_them(tmp_path: Path) -> None:
    data = _deflated(_bytes({"w": torch.zeros(2_000_000)}, ".pt"))
    assert len(data) < 100_000
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].numel() == 2_000_000
    (tmp_path / "bomb.pt").write_bytes(data)
    error = refused(str(tmp_path / "bomb.pt"))
    assert error.code == "weights.damaged"
    assert "its records are compressed" in str(error.got)


def test_a_pickle_that_allocates_memory_of_a_given_size_is_refused(tmp_path: Path) -> None:
    class Hungry:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (1 << 24,)

    url = save({"w": torch.zeros(1), "extra": Hungry()}, tmp_path / "hungry.pt")
    assert len(torch.load(url, weights_only=True)["extra"]) == 1 << 24
    assert "bytearray" in str(refused(url).got)
    torch.save({"w": torch.zeros(1), "extra": Hungry()}, url, _use_new_zipfile_serialization=False)
    assert "bytearray" in str(refused(url).got)


def test_a_safetensors_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    for size_bytes in (1 << 60, 99_000_000, 2):
        (tmp_path / "x.safetensors").write_bytes(size_bytes.to_bytes(8, "little") + b"{")
        assert refused(str(tmp_path / "x.safetensors")).code == "weights.damaged"
    header = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert refused(str(tmp_path / "x.safetensors")).code == "weights.damaged"


def test_torchscript_archives_and_object_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", b"")
    error = refused(str(path))
    assert (error.code, error.got) == ("weights.pickled-code", "a TorchScript archive")
    assert "torch.jit.load" in str(error.next_step)
    array = np.array([Malice(tmp_path / "owned")], object)
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    assert refused(str(tmp_path / "array.npy")).code == "weights.unknown-format"
    (tmp_path / "array.npy").rename(tmp_path / "array.pt")
    assert refused(str(tmp_path / "array.pt")).code == "weights.unknown-format"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "num_classes", "misfits"),
    [
        (
            lambda state: {name.replace("stem", "trunk"): tensor for name, tensor in state.items()},
            7,
            ("2 missing (stem.weight, stem.bias)", "2 unexpected (trunk.weight, trunk.bias)"),
        ),
        (lambda state: state, 10, ("2 of another shape (", "fc.weight (7, 5) for (10, 5)", "fc.bias (7,) for (10,)")),
        (lambda _: {f"x{i}": torch.zeros(1) for i in range(50)}, 7, ("50 unexpected (x0, x1, x2, x3, …)",)),
    ],
    ids=["names", "shapes", "many"],
)
def test_misfits_are_counted_and_the_first_are_named(
    state: dict[str, Tensor], tmp_path: Path, change: Any, num_classes: int, misfits: tuple[str, ...]
) -> None:
    error = refused(save(change(state), tmp_path / "misfit.pt"), num_classes=num_classes)
    assert error.code == "weights.misfit"
    assert all(misfit in str(error.got) for misfit in misfits)


@pytest.mark.parametrize(
    ("content", "got"),
    [({}, "empty"), ([1, 2], "list"), ({"model": {"a": 1}}, "a: int"), (torch.zeros(3), "Tensor")],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, got: str) -> None:
    error = refused(save(content, tmp_path / "odd.pt"))
    assert error.code == "weights.no-state-dict"
    assert got in str(error.got)


TRUNCATED = ("weights.empty-file", "weights.damaged", "weights.unknown-format", "weights.pickled-code")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.99))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float) -> None:
    path = tmp_path_factory.mktemp("truncated") / f"weights{suffix}"
    data = _bytes(Plain(7).state_dict(), suffix)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError) as caught:
        read_state(str(path), sha256=None, where="teacher.weights")
    assert caught.value.code in TRUNCATED


def _bytes(state: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_the_error_for_a_misspelt_keyword_lists_the_valid_ones() -> None:
    error = refused("pretraind")
    assert (error.code, error.where, error.got) == ("weights.unknown-name", "teacher.weights", "pretraind")
    assert str(error.expected).startswith("pretrained, random, or ")


@pytest.mark.parametrize("url", ["{folder}/absent.pt", "pipe:cat weights.pt"])
def test_an_absent_file_and_a_command_are_refused_by_storage(url: str, tmp_path: Path) -> None:
    error = refused(url.format(folder=tmp_path))
    assert error.code == "weights.unreadable"
    assert isinstance(error.__cause__, StorageInputError)


def test_a_secret_in_a_url_is_not_in_the_message() -> None:
    url = "memory://weights/model.bin?token=swordfish"
    with fsspec.open(url, "wb") as handle:
        torch.save({"args": argparse.Namespace(lr=1)}, handle)
    error = refused(url)
    assert "model-weights.pt" in str(error.next_step)
    assert "swordfish" not in str(error)
