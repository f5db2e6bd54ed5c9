"""The ``stillroom`` command. Ray and torch are imported inside commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.entry import report_crashes, run_command
from jobs.observability.log import emit
from jobs.observability.streams import protect_streams

app = typer.Typer(
    name="stillroom",
    help="Distil image models at scale: cache a teacher's words on exact augmented views, train students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
shards_app = typer.Typer(help="WebDataset shards and their index.", no_args_is_help=True)
cache_app = typer.Typer(help="Teacher caches.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(cache_app, name="cache")

ConfigArgument = Annotated[str, typer.Argument(help="YAML file or URL.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, the value as YAML.", metavar="[K.K=V]...")
]
_NUM_NAMED = 10
CacheArgument = Annotated[str, typer.Argument(help="URL of the cache.", metavar="CACHE")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads.")]
PixelDriftOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=255,
        metavar="N",
        help="Levels of 255 by which canaries may differ here; sets data.allow_pixel_drift.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _run_job(name: str, config: str, overrides: list[str]) -> None:
    """Runs ``main`` of a job that uses Ray, and says so before the imports that take seconds."""

    def command() -> None:
        from importlib import import_module

        from jobs.ray.address import announce
        from pipeline.storage.config_files import load_config

        announce(load_config(config, overrides).ray.address)
        import_module(f"jobs.{name}").main(config, overrides)

    _run(command)


def _run(command: Callable[[], None]) -> None:
    raise typer.Exit(run_command(command, resume=shlex.join(["stillroom", *sys.argv[1:]])))


def _versions() -> str:
    """What a bug report needs."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "torchvision", "ray", "pyarrow", "webdataset", "fsspec", "timm", "numpy")
    lines = [f"stillroom {of('stillroom')}", f"python {platform.python_version()} on {platform.platform()}"]
    return "\n".join([*lines, *(f"{name} {of(name)}" for name in packages)])


def _with_drift(overrides: list[str] | None, levels: int | None) -> list[str]:
    return [*(overrides or []), *([] if levels is None else [f"data.allow_pixel_drift={levels}"])]


def _show_version(expected: bool) -> None:
    if expected:
        print(_versions())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Versions for a bug report.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for shards, cache, runs and results.json.")] = Path("runs/demo"),
) -> None:
    """Run the main job on real digits: shards, teacher, cache, students, a table. Needs no network."""

    def command() -> None:
        from jobs.demo import run_demo

        emit(f"results in {run_demo(out)}", event="end")

    _run(command)


@shards_app.command("pack")
def shards_pack(
    source: Annotated[str, typer.Argument(help="Folder or URL of images, one folder a class.", metavar="SRC")],
    out: Annotated[str, typer.Argument(help="New folder or URL for the shards.", metavar="OUT")],
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard, at most.")] = 10_000,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a shard, at most.")] = 256 << 20,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    val_share: Annotated[float, typer.Option(min=0, max=0.99, help="Share of each class for validation shards.")] = 0,
    labels: Annotated[Literal["folder", "none"], typer.Option(help="The first folder's name is the class.")] = "folder",
    classes: Annotated[str | None, typer.Option(help="classes.json of another packing, whose indexes to use.")] = None,
    name: Annotated[str, typer.Option(help="Stem of the shards' names.")] = "train",
    links_out: Annotated[
        bool, typer.Option("--links-out", help="Follow links that lead out of SRC too: pack whatever they name.")
    ] = False,
    bad_images: Annotated[
        Literal["fail", "skip", "pack"],
        typer.Option(help="Images that cannot be decoded: stop and name them, leave them out, or copy without a look."),
    ] = "fail",
) -> None:
    """Pack a folder tree of images into shuffled shards. Resumes by itself."""

    def command() -> None:
        from jobs.pack_shards import describe, pack
        from pipeline.shards.omissions import Omissions
        from pipeline.shards.pack_plan import PackSettings

        settings = PackSettings(name, shard_size, shard_bytes, seed, val_share, labels)
        omissions = Omissions()
        packing = pack(
            source,
            out,
            settings,
            classes_url=classes,
            links_out=links_out,
            bad_images=bad_images,
            omissions=omissions,
        )
        print(describe(packing, out, num_left_out=omissions.counts.total()))

    _run(command)


@shards_app.command("index")
def shards_index(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Index shards without a teacher: all that online training needs."""
    _run_job("index_shards", config, overrides or [])


@cache_app.command("build")
def cache_build(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Build a teacher cache with Ray tasks. Resumes by itself."""
    _run_job("build_cache", config, overrides or [])


@cache_app.command("plan")
def cache_plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a short sample with the real teacher.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a build would make and cost: rows, bytes, requests, teacher forwards, break-even. Writes nothing."""

    def command() -> None:
        from jobs.plan_cache import describe, report
        from pipeline.storage.config_files import load_config

        found = report(load_config(config, overrides or []), measured=measure)
        print(json.dumps(found.as_dict(), indent=2) if as_json else describe(found))

    _run(command)


@cache_app.command("inspect")
def cache_inspect(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Show what a cache holds, or how far its build has come."""

    def command() -> None:
        from pipeline.cache.ops.inspect import inspect_cache

        report = inspect_cache(cache).as_dict()
        print(json.dumps(report, indent=2) if as_json else _screen(report))

    _run(command)


@cache_app.command("means")
def cache_means(
    cache: Annotated[str, typer.Argument(help="URL of the cache.")],
    out: Annotated[str, typer.Option(help="JSON file or URL to write.")],
    full_precision: Annotated[bool, typer.Option(help="Every digit instead of four decimals.")] = False,
) -> None:
    """Write class means as the JSON that ND's authors use."""

    def command() -> None:
        from pipeline.cache.ops.export_means import export_means

        done = export_means(cache, out, full_precision=full_precision)
        absent = ", ".join(map(str, done.absent[:_NUM_NAMED])) + (", …" if len(done.absent) > _NUM_NAMED else "")
        without = f"; {len(done.absent)} classes have no mean: {absent}" if done.absent else ""
        emit(f"class means: {done.num_written} classes of {done.embedding_dim} numbers in {out}{without}", event="end")

    _run(command)


@cache_app.command("verify")
def cache_verify(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    config: Annotated[str | None, typer.Option(help="The build's YAML: asks its teacher again.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows to ask about, with --config.")] = 256,
    shards: Annotated[
        str | None, typer.Option(help="Where the images are, {a..b} braces allowed; default: where the build was.")
    ] = None,
    threads: ThreadsOption = 4,
    allow_pixel_drift: Annotated[
        int, typer.Option(min=0, max=255, metavar="N", help="Levels of 255 by which canaries may differ here.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a cache, its rows and its pixels; with --config, the teacher's words. Problems exit 1."""

    def command() -> None:
        from jobs.verify_cache import describe, read_config, verify

        if overrides and config is None:
            raise typer.BadParameter("overrides change a config: give --config too")
        built_with = read_config(config, overrides or [])
        report = verify(
            cache,
            shards=shards,
            threads=threads,
            config=built_with,
            num_rows=sample,
            allow_pixel_drift=allow_pixel_drift,
        )
        print(json.dumps(report.as_dict(), indent=2) if as_json else describe(report))
        if not report.ok:
            raise typer.Exit(1)

    _run(command)


@cache_app.command("relabel")
def cache_relabel(
    cache: CacheArgument,
    label: Annotated[
        str | None, typer.Option(help="Member extension that holds the class index; default: the cache's data.label.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Where the shards are, {a..b} braces allowed; default: where the build was.")
    ] = None,
    threads: ThreadsOption = 4,
) -> None:
    """Read the labels of a finished cache again from its shards, without the teacher."""

    def command() -> None:
        from jobs.relabel_cache import describe, relabel_cache

        print(describe(relabel_cache(cache, label=label, shards=shards, threads=threads)))

    _run(command)


@cache_app.command("gc")
def cache_gc(
    cache: CacheArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    min_age: Annotated[
        float, typer.Option(min=0, help="Minutes: younger files stay, since a running build commits them later.")
    ] = 60.0,
    former: Annotated[
        bool, typer.Option("--former", help="Also tables that an extension replaced; older runs may still read them.")
    ] = False,
    unused_header: Annotated[
        bool,
        typer.Option("--unused-header", help="Only the header of a cache without commits, so that another can begin."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --unused-header: also while a build is logged as running.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what no commit names: files of builders that were killed or lost a race."""

    def command() -> None:
        from jobs.collect_garbage import describe
        from pipeline.cache.ops.gc import collect_garbage, remove_unused_header

        if force and not unused_header:
            raise typer.BadParameter("--force is for --unused-header: give that too")
        if unused_header:
            report = remove_unused_header(cache, force=force, dry_run=dry_run)
        else:
            report = collect_garbage(cache, min_age_s=60 * min_age, former=former, dry_run=dry_run)
        print(json.dumps(report.as_dict(), indent=2) if as_json else describe(report))

    _run(command)


def _screen(report: dict[str, Any]) -> str:
    from jobs.observability.progress import duration

    def text(value: object) -> str:
        if value is None:
            return "-"
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items()) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def line(name: str, value: object) -> str:
        if name.endswith("_s") and isinstance(value, float):
            name, value = name.removesuffix("_s"), duration(value)
        return f"{name.replace('_', ' '):<20}{text(value)}"

    lines = [line(name, value) for name, value in report.items() if name != "warnings"]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report["warnings"])])


@app.command()
def train(
    config: ConfigArgument, overrides: OverridesArgument = None, allow_pixel_drift: PixelDriftOption = None
) -> None:
    """Train a student from a cache, from an online teacher, or from labels alone. Resumes by itself."""
    _run_job("train_student", config, _with_drift(overrides, allow_pixel_drift))


@app.command()
def distill(
    config: ConfigArgument, overrides: OverridesArgument = None, allow_pixel_drift: PixelDriftOption = None
) -> None:
    """Build what is missing of the cache, then train."""
    _run_job("distill", config, _with_drift(overrides, allow_pixel_drift))


@app.command()
def recipe(
    source: Annotated[
        str | None, typer.Argument(help="Name of a packaged recipe, or YAML file or URL.", metavar="RECIPE")
    ] = None,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the stages: networks, steps, losses, needed files.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--list", help="Show the packaged recipes.")] = False,
) -> None:
    """Run a whole experiment from one YAML: teacher, caches, students, one table. Resumes by itself."""

    def command() -> None:
        from jobs.recipe import DRY_RUN, describe_packaged, main

        if show_all:
            print(describe_packaged())
        elif source is None:
            raise typer.BadParameter("name a recipe, or give --list")
        else:
            main(source, [*(overrides or []), *([DRY_RUN] if dry_run else [])])

    _run(command)


@app.command()
def submit(
    command: Annotated[Literal["build", "train", "distill"], typer.Argument(help="What to run.")],
    config: ConfigArgument,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard: http://HOST:8265.", metavar="URL"
        ),
    ],
    overrides: OverridesArgument = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the log and exit as the job does.")] = True,
    working_dir: Annotated[Path, typer.Option(help="Folder that is uploaded and in which the job runs.")] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Of .gitignore: also not uploaded. Repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Variable of this shell for the job. Repeatable.")
    ] = None,
    pip: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requirements to install; default: what the nodes have.")
    ] = None,
    entrypoint_cpus: Annotated[float, typer.Option(min=0, help="Reserved for the driver.")] = 0,
    entrypoint_gpus: Annotated[float, typer.Option(min=0, help="Reserved for the driver.")] = 0,
    entrypoint_memory: Annotated[int, typer.Option(min=0, help="Bytes reserved for the driver.")] = 0,
    submission_id: Annotated[str | None, typer.Option(help="Of the job; default: a new one.")] = None,
) -> None:
    """Run a build, a training or both as a job of a Ray cluster. Submitting again goes on from what is committed."""

    def run() -> None:
        from jobs.submit import Submission
        from jobs.submit import submit as submit_job

        code = submit_job(
            Submission(
                command=command,
                source=config,
                overrides=overrides or [],
                address=address,
                working_dir=working_dir,
                excludes=exclude or [],
                env=env or [],
                pip=pip,
                num_cpus=entrypoint_cpus,
                num_gpus=entrypoint_gpus,
                memory_bytes=entrypoint_memory,
                submission_id=submission_id,
                wait=wait,
            )
        )
        if code:
            raise typer.Exit(code)

    _run(run)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="URL of a run.")],
    shards: Annotated[str, typer.Option(help="Validation shards, {a..b} braces allowed.")],
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="Which weights.")] = "last",
    threads: ThreadsOption = 1,
    without_teacher: Annotated[
        bool, typer.Option("--without-teacher", help="No agreement; the teacher's weights are not read.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained student: top-1, top-5, calibration, agreement with its teacher."""

    def command() -> None:
        from jobs.evaluate import describe
        from jobs.evaluate import evaluate as measure

        found = measure(run, shards, checkpoint=checkpoint, threads=threads, with_teacher=not without_teacher)
        print(json.dumps(found.as_dict(), indent=2) if as_json else describe(found))

    _run(command)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="URL of a run.")],
    out: Annotated[str, typer.Option(help="File or URL to write: .safetensors (weights), .pt2 (torch.export), .onnx.")],
    format: Annotated[
        Literal["safetensors", "pt2", "onnx"] | None, typer.Option(help="Where the suffix does not say it.")
    ] = None,
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="Which weights.")] = "last",
    with_normalization: Annotated[
        bool,
        typer.Option(
            "--with-normalization", help="The graph takes uint8 RGB [N,3,S,S]; default: float32, normalised before."
        ),
    ] = False,
) -> None:
    """Write a trained student as one file. A graph takes any batch size and is checked against the student."""

    def command() -> None:
        from jobs.export import describe
        from pipeline.student.export.exporters import export_run

        done = export_run(run, out, format=format, checkpoint_name=checkpoint, with_normalization=with_normalization)
        emit(describe(done), event="end")

    _run(command)


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(help="Code of an error; without it, all are listed.")] = None,
) -> None:
    """Print the cause and the remedy of an error code."""

    def command() -> None:
        from pipeline.core.error_codes import error_codes
        from pipeline.core.error_codes import explain as entry_of

        if code is None:
            print("\n".join(error_codes()))
            return
        entry = entry_of(code)
        print(f"{entry.code}\n  cause:  {entry.cause}\n  remedy: {entry.remedy}")

    _run(command)


def _hide_types(command: Any) -> None:
    """Leaves out of the help what says nothing: ``<bool>`` of a flag, ``<str>`` of an argument."""
    context = typer.Context(command)
    for parameter in command.get_params(context):
        if getattr(parameter, "is_bool_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument" and not parameter.type_descriptor.is_choice:
            parameter.display_type_rich = lambda ctx: None  # noqa: ARG005
    for subcommand in getattr(command, "commands", {}).values():
        _hide_types(subcommand)


def main() -> None:
    """Entry point of the console command."""
    protect_streams()
    report_crashes()
    command = typer.main.get_command(app)
    _hide_types(command)
    command()


if __name__ == "__main__":
    main()
