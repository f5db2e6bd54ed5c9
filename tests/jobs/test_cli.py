"""The commands as a user runs them: exit codes, one message, no partial outputs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs.recipes.document import load_recipe
from pipeline.core.errors import ConfigError
from tests.errors import raises
from tests.jobs.conftest import Document, files_below
from tests.jobs.programs import run_python
from tests.pipeline.shards.tars import image_bytes

Stillroom = Callable[..., tuple[str, str]]


@pytest.fixture
def stillroom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stillroom:
    """Runs the console entry point in this process and checks its exit code: (standard output, standard error)."""

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["stillroom", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert int(caught.value.code or 0) == code, err
        return out, err

    return run


@pytest.fixture
def built(built_cache: Path, document: Document) -> str:
    """The path of ``document()``, whose cache is finished."""
    return document(cache={"url": str(built_cache)})


BAD_CONFIGS = {
    "missing shard": ({"data": {"shards": "/nowhere/a-{00..01}.tar"}}, "/nowhere/a-00.tar"),
    "a cache in another process's memory": (
        {"cache": {"url": "memory://cache"}, "ray": {"address": "local"}},
        "memory",
    ),
    "unknown model": ({"teacher": {"model": "timm/resnet5O", "kwargs": {}}}, "resnet50"),
    "label outside range": ({"data": {"num_classes": 5}}, "label"),
    "YAML typo": ({"data": {"num_clases": 10}}, "num_classes"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_input_to_a_build_is_one_message_and_exit_2_and_leaves_no_part_of_a_cache(
    name: str, stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    sections, text = BAD_CONFIGS[name]
    out, err = stillroom("cache", "build", document(**sections), code=2)
    assert out == ""
    assert err.count("error:") == 1
    assert text in err
    assert "Traceback" not in err
    assert not [
        path for path in files_below(tmp_path) if path.startswith(("cache/commits", "cache/manifest", "cache/parts"))
    ]


def test_training_from_an_unfinished_cache_names_the_command_that_finishes_it(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    (tmp_path / "cache" / "manifest.json").unlink()
    _, err = stillroom("train", built, f"data.cache={tmp_path / 'cache'}", code=2)
    assert "no manifest" in err
    assert "cache build" in err
    out, _ = stillroom("cache", "inspect", str(tmp_path / "cache"), "--json")
    assert (json.loads(out)["finished"], json.loads(out)["num_parts"]) == (False, 12)


def test_build_train_evaluate_inspect_from_one_yaml_with_overrides(
    stillroom: Stillroom, document: Document, shards: list[str], tmp_path: Path
) -> None:
    config = document(data={"cache": str(tmp_path / "cache")})
    stillroom("cache", "build", config, "views.count=2", "cache.logits=fp32")
    out, _ = stillroom("cache", "inspect", str(tmp_path / "cache"))
    assert "fp32 [10]" in out
    stillroom("train", config, "views.count=2", "train.epochs=1", "loss.0.temperature=3")
    request = ["evaluate", str(tmp_path / "run"), "--shards", shards[-1]]
    out, _ = stillroom(*request, "--json", "--rows", str(tmp_path / "rows.parquet"))
    evaluation = json.loads(out)
    assert evaluation["num_rows"] == 24
    assert 0 <= evaluation["agreement"] <= 1
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert {row["shard"] for row in rows} == {Path(shards[-1]).stem}
    assert len({row["sample"] for row in rows}) == 24
    for name in ("top1", "agreement", "balanced_accuracy"):
        assert sum(row[name] for row in rows) / 24 == pytest.approx(evaluation[name], rel=1e-12)
    _, err = stillroom(*request, "--rows", "https://example.com/rows.parquet", code=2)
    assert err.count("error:") == 1


@pytest.mark.slow
def test_allowed_drift_is_a_key_of_the_run_and_a_line_of_a_verification(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    config = document(data={"cache": str(tmp_path / "cache")}, train={"epochs": 1})
    stillroom("distill", config, "--allow-pixel-drift", "5")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["allow_pixel_drift"] == 5
    _, err = stillroom("train", config, "--allow-pixel-drift", "6", code=2)
    assert "data.allow_pixel_drift: 5 -> 6" in err
    out, _ = stillroom("cache", "verify", str(tmp_path / "cache"), "--allow-pixel-drift", "5")
    assert "pixel drift" not in out
    stillroom("train", config, "--allow-pixel-drift", "256", code=2)


def test_a_student_is_exported_and_wrong_requests_exit_2_with_one_message(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    config, run = document(data={"cache": str(tmp_path / "cache")}, train={"epochs": 1}), str(tmp_path / "run")
    stillroom("distill", config)
    out = tmp_path / "student.safetensors"
    _, err = stillroom("export", run, "--out", str(out))
    assert f"export: step 4 as safetensors in {out}" in err
    changes = [f"student.weights={out}", f"run.url={tmp_path / 'second'}"]
    stillroom("train", config, *changes)
    wrong = [[str(tmp_path), "--out", str(out)], [run, "--out", "a.pth"], [run, "--out", f"{out}/a.safetensors"]]
    (tmp_path / "second" / "summary.json").unlink()
    for arguments in [*wrong, [str(tmp_path / "second"), "--out", str(tmp_path / "b.safetensors")]]:
        _, err = stillroom("export", *arguments, code=2)
        assert err.count("error:") == 1
        assert "Traceback" not in err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.slow
def test_class_means_are_exported_as_json_and_imported_into_another_cache(
    stillroom: Stillroom, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A relative path is relative to the folder of the command.
    monkeypatch.chdir(tmp_path)
    out, err = stillroom("cache", "means", str(tmp_path / "cache"), "--out", "means.json")
    assert out == ""
    assert "10 classes of 8 numbers in means.json" in err
    table = json.loads((tmp_path / "means.json").read_text())
    assert {len(row) for row in table.values()} == {8}
    keys = ["cache.url=imported", "cache.class_means=means.json", "data.cache=imported", "loss=[{name: nd}]"]
    stillroom("distill", built, *keys)
    out, _ = stillroom("cache", "inspect", "imported", "--json")
    assert json.loads(out)["class_means"].startswith("imported:")
    _, err = stillroom("cache", "build", built, "cache.url=other", "cache.class_means=nowhere.json", code=2)
    assert f"{tmp_path}/nowhere.json" in err


def test_verify_exits_0_for_an_intact_cache_1_for_a_problem_and_2_without_a_cache(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    url = str(tmp_path / "cache")
    stillroom("cache", "verify", str(tmp_path / "nowhere"), code=2)
    out, _ = stillroom("cache", "verify", url, "--config", built, "--sample", "20", "ray.cpus_per_task=1")
    assert "20 rows, 20 with the same bits" in out
    part = next((tmp_path / "cache" / "parts").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    assert "run stillroom cache build CONFIG" in stillroom("cache", "verify", url, code=1)[0]
    out, _ = stillroom("cache", "verify", url, "--json", code=1)
    report = json.loads(out)
    assert (report["ok"], report["num_problems"]) == (False, 1)
    assert report["problems"][0]["file"] == str(part.relative_to(tmp_path / "cache"))
    _, err = stillroom("cache", "verify", url, "views.count=2", code=2)
    assert "--config" in err


@pytest.mark.usefixtures("built")
def test_gc_lists_on_a_dry_run_and_then_removes(stillroom: Stillroom, tmp_path: Path) -> None:
    url, stray = str(tmp_path / "cache"), tmp_path / "cache" / "parts" / ".tmp-1"
    stray.write_bytes(bytes(2_000_000))
    assert stillroom("cache", "gc", url)[0].splitlines()[-1].endswith("cache: 0 files, freed 0.0 MB")
    out, _ = stillroom("cache", "gc", url, "--min-age", "0", "--dry-run")
    assert ("would remove parts/.tmp-1" in out, stray.exists()) == (True, True)
    out, _ = stillroom("cache", "gc", url, "--min-age", "0", "--json")
    assert (json.loads(out)["freed_bytes"], stray.exists()) == (2_000_000, False)
    stillroom("cache", "gc", str(tmp_path), code=2)


def test_a_failed_first_build_is_corrected_by_the_command_that_its_message_prints(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    empty = document(cache={"class_means": "none"}, data={"max_pixels": 1})
    stillroom("cache", "build", empty, code=2)
    assert files_below(tmp_path / "cache").keys() == {"header.json"}
    assert not (tmp_path / "cache" / "log").exists() or not list((tmp_path / "cache" / "log").iterdir())
    _, err = stillroom("cache", "build", document(), code=2)
    command = re.search(r"stillroom (cache gc \S+ --unused-header)", err)
    assert command is not None
    stillroom("cache", "gc", str(tmp_path / "cache"), "--force", code=2)
    out, _ = stillroom(*command[1].split())
    assert "removed header.json" in out
    stillroom("cache", "build", document())
    stillroom(*command[1].split(), code=2)


def test_shards_index_writes_the_bytes_that_a_cache_build_writes(
    stillroom: Stillroom, built: str, tmp_path: Path
) -> None:
    stillroom("shards", "index", built, f"data.index={tmp_path / 'index'}")
    assert files_below(tmp_path / "index") == files_below(tmp_path / "cache" / "index")


def test_a_plan_is_one_json_object_or_a_text_and_needs_the_keys_of_a_build(
    stillroom: Stillroom, document: Document, tmp_path: Path
) -> None:
    out, _ = stillroom("cache", "plan", document(), "views.count=50", "--json")
    assert json.loads(out)["plan"]["break_even"]["forwards_per_image"] == 51
    assert "break-even" in stillroom("cache", "plan", document())[0]
    _, err = stillroom("cache", "plan", document(teacher={"model": None}), code=2)
    assert "no teacher.model" in err
    stillroom("cache", "plan", document(data={"shards": "/nowhere/a.tar"}), code=2)
    assert files_below(tmp_path).keys() == {"config.yaml"}


def test_packing_prints_the_data_section_and_refuses_a_folder_without_images(
    stillroom: Stillroom, tmp_path: Path
) -> None:
    for name in ("a/x.png", "b/y.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image_bytes())
    out, _ = stillroom("shards", "pack", str(tmp_path / "images"), str(tmp_path / "out"))
    assert f'shards: "{tmp_path}/out/train-00000.tar"' in out
    assert "num_classes: 2" in out
    _, err = stillroom("shards", "pack", str(tmp_path / "nowhere"), str(tmp_path / "other"), code=2)
    assert "no images here" in err


def test_an_unknown_run_and_an_unknown_command_exit_2(stillroom: Stillroom, tmp_path: Path) -> None:
    stillroom("evaluate", str(tmp_path), "--shards", "a.tar", code=2)
    stillroom("destil", "a.yaml", code=2)


def test_ctrl_c_exits_130_and_prints_the_command_that_resumes(
    stillroom: Stillroom, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.build_cache.build_cache", interrupted)
    config = document()
    _, err = stillroom("cache", "build", config, code=130)
    assert f"stillroom cache build {config}" in err


LIGHT_COMMAND = """
import sys
sys.argv[0] = "stillroom"
from jobs import cli
try: cli.main()
except SystemExit: pass
assert not {"torch", "ray", "pyarrow"} & sys.modules.keys()
"""


def test_help_and_version_need_neither_torch_nor_ray() -> None:
    done = run_python("-c", LIGHT_COMMAND, "--help")
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


def test_a_flag_has_no_type_in_the_help(stillroom: Stillroom) -> None:
    for command in (["cache", "plan"], ["submit"], []):
        out, _ = stillroom(*command, "--help")
        assert "<bool>" not in out
        assert "<str>" not in out.partition("Options")[0]
    assert "<path>" in stillroom("submit", "--help")[0]


def test_a_shell_completes_commands_without_torch_or_ray() -> None:
    completion = {"_STILLROOM_COMPLETE": "complete_bash", "COMP_WORDS": "stillroom cache b", "COMP_CWORD": "2"}
    done = run_python("-c", LIGHT_COMMAND, **completion)
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
    done = run_python("-c", program, document(ray={"address": "local"}))
    assert done.stdout == "starting Ray on this machine (ray.address=local) []\n", done.stderr


def test_recipes_of_the_package_are_listed_and_run_by_name_from_any_folder(
    stillroom: Stillroom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = stillroom("recipe", "--list")
    packaged = {path.stem for path in (Path(cli.__file__).parent / "configs").glob("*.yaml")} - {"demo"}
    assert {line.split()[0] for line in out.splitlines()} == packaged
    out, _ = stillroom("recipe", "cifar10", "only=[kd]", "--dry-run")
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
    with raises("recipe.unknown-name", ConfigError, got=name, next_step=next_step):
        load_recipe(name, [])
    _, err = stillroom("recipe", name, code=2)
    assert err.count("error:") == 1


def test_a_recipe_command_without_a_recipe_is_wrong_usage(stillroom: Stillroom) -> None:
    _, err = stillroom("recipe", code=2)
    assert "--list" in err
