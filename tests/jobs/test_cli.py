"""The commands as a user runs them: exit codes, one message, no partial outputs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.build_cache import build_cache
from jobs.recipes.document import load_recipe
from pipeline.core.errors import ConfigError
from pipeline.models.cifar import resnet
from tests.jobs.conftest import Document, config_of, files_below, tree_below
from tests.pipeline.shards.tars import image_bytes

Stillroom = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stillroom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stillroom:
    """Runs the console entry point in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillroom", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def default_cache(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of ``document()``, built once. Tests only read it."""
    folder = tmp_path_factory.mktemp("default")
    build_cache(config_of(tree_below(folder, shards)))
    return folder / "cache"


@pytest.fixture
def built(default_cache: Path, document: Document, tmp_path: Path) -> str:
    """The path of ``document()``, whose cache is finished."""
    shutil.copytree(default_cache, tmp_path / "cache")
    return document()


BAD_CONFIGS = {
    "missing shard": ({"data": {"shards": "/nowhere/a-{00..01}.tar"}}, "/nowhere/a-00.tar"),
    "refused URL": ({"data": {"shards": "pipe:cat a.tar"}}, "refused"),
    "chained URL": ({"cache": {"url": "simplecache::s3://b/c"}}, "refused"),
    "a cache in another process's memory": (
        {"cache": {"url": "memory://cache"}, "ray": {"address": "local"}},
        "memory",
    ),
    "unknown protocol": ({"data": {"shards": "ftp://host/a.tar"}}, "ftp"),
    "unknown model": ({"teacher": {"model": "timm/resnet5O", "kwargs": {}}}, "resnet50"),
    "label outside range": ({"data": {"num_classes": 5}}, "label"),
    "YAML typo": ({"data": {"num_clases": 10}}, "num_classes"),
    "wrong type": ({"views": {"count": "many"}}, "views.count"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_input_to_a_build_is_one_message_and_exit_2_and_leaves_no_part_of_a_cache(
    name: str, stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    sections, text = BAD_CONFIGS[name]
    code, out, err = stillroom("cache", "build", document(**sections))
    assert code == 2
    assert out == ""
    assert err.count("error:") == 1
    assert text in err
    assert "Traceback" not in err
    assert not [
        path for path in files_below(tmp_path) if path.startswith(("cache/commits", "cache/manifest", "cache/parts"))
    ]


def test_a_teacher_with_other_classes_than_its_weights_is_refused(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    torch.save(resnet(num_classes=7, depth=8, widths=(4, 4, 6, 8)).state_dict(), tmp_path / "seven.pt")
    code, _, err = stillroom("cache", "build", document(teacher={"weights": str(tmp_path / "seven.pt")}))
    assert code == 2
    assert "fc.weight (7, 8) for (10, 8)" in err


def test_training_from_an_unfinished_cache_names_the_command_that_finishes_it(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    (tmp_path / "cache" / "manifest.json").unlink()
    code, _, err = stillroom("train", built, f"data.cache={tmp_path / 'cache'}")
    assert code == 2
    assert "no manifest" in err
    assert "cache build" in err
    code, out, _ = stillroom("cache", "inspect", str(tmp_path / "cache"), "--json")
    assert code == 0
    assert (json.loads(out)["finished"], json.loads(out)["num_parts"]) == (False, 12)


def test_a_cache_of_another_teacher_is_refused_with_the_difference(stillroom: Stillroom, built: str) -> None:
    code, _, err = stillroom("cache", "build", built, "teacher.precision=bf16")
    assert code == 2
    assert "teacher.precision: fp32 -> bf16" in err


def test_build_train_evaluate_inspect_from_one_yaml_with_overrides(
    stillroom: Stillroom, document: Document, shards: list[str], tmp_path: Path
) -> None:
    config = document(data={"cache": str(tmp_path / "cache")})
    assert stillroom("cache", "build", config, "views.count=2", "cache.logits=fp32")[0] == 0
    code, out, _ = stillroom("cache", "inspect", str(tmp_path / "cache"))
    assert code == 0
    assert "fp32 [10]" in out
    assert stillroom("train", config, "views.count=2", "train.epochs=1", "loss.0.temperature=3")[0] == 0
    code, out, _ = stillroom("evaluate", str(tmp_path / "run"), "--shards", shards[-1], "--json")
    evaluation = json.loads(out)
    assert code == 0
    assert evaluation["num_rows"] == 24
    assert 0 <= evaluation["agreement"] <= 1


@pytest.mark.slow
def test_allowed_drift_is_a_key_of_the_run_and_a_line_of_a_verification(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    config = document(data={"cache": str(tmp_path / "cache")}, train={"epochs": 1})
    assert stillroom("distill", config, "--allow-pixel-drift", "5")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["allow_pixel_drift"] == 5
    code, _, err = stillroom("train", config, "--allow-pixel-drift", "6")
    assert (code, "data.allow_pixel_drift: 5 -> 6" in err) == (2, True)
    code, out, _ = stillroom("cache", "verify", str(tmp_path / "cache"), "--allow-pixel-drift", "5")
    assert (code, "pixel drift" in out) == (0, False)
    assert stillroom("train", config, "--allow-pixel-drift", "256")[0] == 2


def test_a_student_is_exported_and_wrong_requests_exit_2_with_one_message(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    config, run = document(data={"cache": str(tmp_path / "cache")}, train={"epochs": 1}), str(tmp_path / "run")
    assert stillroom("distill", config)[0] == 0
    out = tmp_path / "student.safetensors"
    code, _, err = stillroom("export", run, "--out", str(out))
    assert code == 0
    assert f"export: step 4 as safetensors in {out}" in err
    changes = [f"student.weights={out}", f"run.url={tmp_path / 'second'}"]
    assert stillroom("train", config, *changes)[0] == 0
    wrong = [[str(tmp_path), "--out", str(out)], [run, "--out", "a.pth"], [run, "--out", f"{out}/a.safetensors"]]
    (tmp_path / "second" / "summary.json").unlink()
    for arguments in [*wrong, [str(tmp_path / "second"), "--out", str(tmp_path / "b.safetensors")]]:
        code, _, err = stillroom("export", *arguments)
        assert code == 2
        assert err.count("error:") == 1
        assert "Traceback" not in err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.slow
def test_class_means_are_exported_as_json_and_imported_into_another_cache(
    stillroom: Stillroom, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A relative path is relative to the folder of the command.
    monkeypatch.chdir(tmp_path)
    code, out, err = stillroom("cache", "means", str(tmp_path / "cache"), "--out", "means.json")
    assert (code, out) == (0, "")
    assert "10 classes of 8 numbers in means.json" in err
    table = json.loads((tmp_path / "means.json").read_text())
    assert {len(row) for row in table.values()} == {8}
    keys = ["cache.url=imported", "cache.class_means=means.json", "data.cache=imported", "loss=[{name: nd}]"]
    assert stillroom("distill", built, *keys)[0] == 0
    code, out, _ = stillroom("cache", "inspect", "imported", "--json")
    assert json.loads(out)["class_means"].startswith("imported:")
    code, _, err = stillroom("cache", "build", built, "cache.url=other", "cache.class_means=nowhere.json")
    assert code == 2
    assert f"{tmp_path}/nowhere.json" in err


def test_verify_exits_0_for_an_intact_cache_1_for_a_problem_and_2_without_a_cache(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    url = str(tmp_path / "cache")
    assert stillroom("cache", "verify", str(tmp_path / "nowhere"))[0] == 2
    code, out, _ = stillroom("cache", "verify", url, "--config", built, "--sample", "20", "ray.cpus_per_task=1")
    assert code == 0
    assert "20 rows, 20 with the same bits" in out
    part = next((tmp_path / "cache" / "parts").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    assert "run stillroom cache build CONFIG" in stillroom("cache", "verify", url)[1]
    code, out, _ = stillroom("cache", "verify", url, "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["ok"], report["num_problems"]) == (False, 1)
    assert report["problems"][0]["file"] == str(part.relative_to(tmp_path / "cache"))
    code, _, err = stillroom("cache", "verify", url, "views.count=2")
    assert (code, "give --config too" in err) == (2, True)


@pytest.mark.usefixtures("built")
def test_gc_lists_on_a_dry_run_and_then_removes(stillroom: Stillroom, tmp_path: Path) -> None:
    url, stray = str(tmp_path / "cache"), tmp_path / "cache" / "parts" / ".tmp-1"
    stray.write_bytes(bytes(2_000_000))
    assert stillroom("cache", "gc", url)[1].splitlines()[-1].endswith("cache: 0 files, freed 0.0 MB")
    code, out, _ = stillroom("cache", "gc", url, "--min-age", "0", "--dry-run")
    assert (code, "would remove parts/.tmp-1" in out, stray.exists()) == (0, True, True)
    code, out, _ = stillroom("cache", "gc", url, "--min-age", "0", "--json")
    assert (code, json.loads(out)["freed_bytes"], stray.exists()) == (0, 2_000_000, False)
    assert stillroom("cache", "gc", str(tmp_path))[0] == 2


def test_a_failed_first_build_is_corrected_by_the_command_that_its_message_prints(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    empty = document(cache={"class_means": "none"}, data={"max_pixels": 1})
    assert stillroom("cache", "build", empty)[0] == 2
    assert files_below(tmp_path / "cache").keys() == {"header.json"}
    assert not (tmp_path / "cache" / "log").exists() or not list((tmp_path / "cache" / "log").iterdir())
    code, _, err = stillroom("cache", "build", document())
    command = re.search(r"stillroom (cache gc \S+ --unused-header)", err)
    assert code == 2
    assert command is not None
    assert stillroom("cache", "gc", str(tmp_path / "cache"), "--force")[0] == 2
    code, out, _ = stillroom(*command[1].split())
    assert (code, "removed header.json" in out) == (0, True)
    assert stillroom("cache", "build", document())[0] == 0
    assert stillroom(*command[1].split())[0] == 2


@pytest.mark.slow
def test_verify_names_the_keys_in_which_a_config_differs_from_the_cache(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    url = str(tmp_path / "cache")
    code, out, _ = stillroom("cache", "verify", url, "teacher.precision=bf16", "--config", built)
    assert code == 1
    assert "teacher.precision: fp32 -> bf16" in out


def test_shards_index_writes_the_bytes_that_a_cache_build_writes(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    assert stillroom("shards", "index", built, f"data.index={tmp_path / 'index'}")[0] == 0
    assert files_below(tmp_path / "index") == files_below(tmp_path / "cache" / "index")


def test_a_plan_is_one_json_object_or_a_text_and_needs_the_keys_of_a_build(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    code, out, _ = stillroom("cache", "plan", document(), "views.count=50", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["break_even"]["forwards_per_image"] == 51
    assert "break-even" in stillroom("cache", "plan", document())[1]
    code, _, err = stillroom("cache", "plan", document(teacher={"model": None}))
    assert code == 2
    assert "no teacher.model" in err
    assert stillroom("cache", "plan", document(data={"shards": "/nowhere/a.tar"}))[0] == 2
    assert files_below(tmp_path).keys() == {"config.yaml"}


def test_packing_prints_the_data_section_and_refuses_a_folder_without_images(
    stillroom: Stillroom, tmp_path: Path
) -> None:
    for name in ("a/x.png", "b/y.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image_bytes())
    code, out, _ = stillroom("shards", "pack", str(tmp_path / "images"), str(tmp_path / "out"))
    assert code == 0
    assert f'shards: "{tmp_path}/out/train-00000.tar"' in out
    assert "num_classes: 2" in out
    code, _, err = stillroom("shards", "pack", str(tmp_path / "nowhere"), str(tmp_path / "other"))
    assert code == 2
    assert "no images here" in err


def test_an_unknown_run_and_an_unknown_command_exit_2(stillroom: Stillroom, tmp_path: Path) -> None:
    assert stillroom("evaluate", str(tmp_path), "--shards", "a.tar")[0] == 2
    assert stillroom("destil", "a.yaml")[0] == 2


def test_ctrl_c_exits_130_and_prints_the_command_that_resumes(
    stillroom: Stillroom, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.build_cache.build_cache", interrupted)
    config = document()
    code, _, err = stillroom("cache", "build", config)
    assert code == 130
    assert f"stillroom cache build {config}" in err


def test_help_and_version_need_neither_torch_nor_ray() -> None:
    program = (
        "import sys; sys.argv = ['stillroom', '--help']\n"
        "from jobs import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pyarrow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


def test_a_flag_has_no_type_in_the_help(stillroom: Stillroom) -> None:
    for command in (["cache", "plan"], ["submit"], []):
        code, out, _ = stillroom(*command, "--help")
        assert code == 0
        assert "<bool>" not in out
        assert "<str>" not in out.partition("Options")[0]
    assert "<path>" in stillroom("submit", "--help")[1]


def test_a_shell_completes_commands_without_torch_or_ray() -> None:
    program = (
        "import sys; sys.argv = ['stillroom']\n"
        "from jobs import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pyarrow'} & sys.modules.keys()"
    )
    completion = {"_STILLROOM_COMPLETE": "complete_bash", "COMP_WORDS": "stillroom cache b", "COMP_CWORD": "2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, **completion}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "build"), done.stderr


def test_a_job_reports_the_start_of_ray_before_it_imports_ray(document: Document) -> None:
    program = (
        "import sys; sys.argv = ['stillroom', 'cache', 'build', *sys.argv[1:]]\n"
        "import jobs.observability.log as log\n"
        "from jobs import cli\n"
        "def emit(text, **more):\n"
        "    print(text, sorted({'torch', 'ray'} & sys.modules.keys()))\n"
        "    raise KeyboardInterrupt\n"
        "import jobs.ray.address as address; address.emit = emit\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", program, document(ray={"address": "local"})]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.stdout == "starting Ray on this machine (ray.address=local) []\n", done.stderr


def test_recipes_of_the_package_are_listed_and_run_by_name_from_any_folder(
    stillroom: Stillroom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = stillroom("recipe", "--list")
    assert code == 0
    packaged = {path.stem for path in (Path(cli.__file__).parent / "configs").glob("*.yaml")} - {"demo"}
    assert {line.split()[0] for line in out.splitlines()} == packaged
    code, out, _ = stillroom("recipe", "cifar10", "only=[kd]", "--dry-run")
    assert code == 0
    assert "student kd" in out
    assert "student labels" not in out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "next_step"),
    [("cifar100", "stillroom recipe cifar10"), ("demo", "stillroom demo"), ("x", "stillroom recipe --list")],
)
def test_an_unknown_recipe_is_one_message_with_the_command_to_run(
    name: str, next_step: str, stillroom: Stillroom
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, [])
    assert (caught.value.code, caught.value.got, caught.value.next_step) == ("recipe.unknown-name", name, next_step)
    code, _, err = stillroom("recipe", name)
    assert code == 2
    assert err.count("error:") == 1


def test_a_recipe_command_without_a_recipe_is_wrong_usage(stillroom: Stillroom) -> None:
    code, _, err = stillroom("recipe")
    assert code == 2
    assert "--list" in err
