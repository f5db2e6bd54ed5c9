"""The ``stillroom`` command. Commands import Ray and torch when they run, so that ``--help`` responds at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.command_line import (
    CacheArgument,
    CheckpointOption,
    ConfigArgument,
    JsonOption,
    OverridesArgument,
    PixelDriftOption,
    RayArgument,
    RunArgument,
    ShardsOption,
    ThreadsOption,
    add_command,
    hide_types,
    print_report,
    run_job,
    show_version,
)
from jobs.entry import report_crashes
from jobs.observability.log import emit
from jobs.observability.streams import protect_streams

app = typer.Typer(
    name="stillroom",
    help="Distil image models at scale: cache a teacher's outputs for exact augmented views, train students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
shards_app = typer.Typer(help="WebDataset shards and their index.", no_args_is_help=True)
cache_app = typer.Typer(help="Teacher caches.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(cache_app, name="cache")


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Versions for a bug report.")
    ] = False,
) -> None: ...


@add_command(app, "demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for shards, cache, runs and results.json.")] = Path("runs/demo"),
) -> None:
    """Distil handwritten digits: shards, teacher, cache, students, table. Needs no network."""
    from jobs.demo import run_demo

    emit(f"results in {run_demo(out)}", event="end")


@add_command(shards_app, "pack")
def shards_pack(
    source: Annotated[str, typer.Argument(help="Folder or URL of images, with one folder per class.", metavar="SRC")],
    out: Annotated[str, typer.Argument(help="New folder or URL for the shards.", metavar="OUT")],
    shard_size: Annotated[int, typer.Option(min=1, help="Maximum number of images in a shard.")] = 10_000,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of a shard, bytes.")] = 256 << 20,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    val_share: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of each class in validation shards, 0 to 0.99.")
    ] = 0,
    labels: Annotated[
        Literal["folder", "none"] | None,
        typer.Option(help="Class of an image: the first folder (default), or none (with --masks or --coco)."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="classes.json of another packing, for its class indexes.")] = None,
    name: Annotated[str, typer.Option(help="Stem of the shards' names.")] = "train",
    links_out: Annotated[
        bool, typer.Option("--links-out", help="Follow links that lead out of SRC, and pack their targets.")
    ] = False,
    bad_images: Annotated[
        Literal["fail", "skip", "pack"],
        typer.Option(
            help="Images that cannot be decoded, or whose mask or boxes do not fit: stop and list them, omit them, or "
            "copy them unchecked."
        ),
    ] = "fail",
    masks: Annotated[
        str | None,
        typer.Option(help="Folder or URL of masks: the class indexes of the pixels of a/b.jpg are in its a/b.png."),
    ] = None,
    image_suffix: Annotated[
        str, typer.Option(help="With --masks: how names of images end, such as _leftImg8bit in b_leftImg8bit.png.")
    ] = "",
    mask_suffix: Annotated[str, typer.Option(help="With --masks: how names of masks end in place of that.")] = "",
    coco: Annotated[
        str | None, typer.Option(help="JSON file of COCO with the boxes of the images, which it names below SRC.")
    ] = None,
) -> None:
    """Pack a folder tree of images into shuffled shards. Resumes automatically."""
    from jobs.pack_shards import describe, pack
    from pipeline.shards.omissions import Omissions
    from pipeline.shards.pack_plan import PackSettings
    from pipeline.shards.pack_targets import TargetSource

    targets = TargetSource.of(masks=masks, coco=coco, image_suffix=image_suffix, mask_suffix=mask_suffix)
    labels = labels or ("folder" if targets is None else "none")
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
        targets=targets,
    )
    print(describe(packing, out, num_left_out=omissions.counts.total()))


@add_command(shards_app, "index")
def shards_index(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Index shards without a teacher: all that online training needs."""
    run_job("index_shards", config, overrides)


@add_command(cache_app, "build")
def cache_build(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Build a teacher cache with Ray tasks. Resumes automatically."""
    run_job("build_cache", config, overrides)


@add_command(cache_app, "plan")
def cache_plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Build a short sample with the teacher, and time it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a build: rows, bytes, requests, teacher forward passes, break-even. Writes nothing."""
    from jobs.plan_cache import describe, report
    from pipeline.storage.config_files import load_config

    print_report(report(load_config(config, overrides or []), measured=measure), describe, as_json=as_json)


@add_command(cache_app, "inspect")
def cache_inspect(cache: CacheArgument, as_json: JsonOption = False) -> None:
    """Show the contents of a cache, or the progress of its build."""
    from jobs.cache_ops import describe_cache
    from pipeline.cache.ops.inspect import inspect_cache

    print_report(inspect_cache(cache), describe_cache, as_json=as_json)


@add_command(cache_app, "means")
def cache_means(
    cache: CacheArgument,
    out: Annotated[str, typer.Option(help="JSON file or URL to write.")],
    full_precision: Annotated[bool, typer.Option(help="All digits instead of four decimals.")] = False,
) -> None:
    """Write class means in the JSON format of ND's authors (Wang 2023)."""
    from jobs.cache_ops import describe_means
    from pipeline.cache.ops.export_means import export_means

    emit(describe_means(export_means(cache, out, full_precision=full_precision), out), event="end")


@add_command(cache_app, "moments")
def cache_moments(
    cache: CacheArgument,
    overrides: RayArgument = None,
) -> None:
    """Compute mean and covariance of a cache's embeddings, for standardised targets, and store them in the cache."""
    from jobs.cache_moments import main

    main(cache, overrides or [])


@add_command(cache_app, "verify")
def cache_verify(
    cache: CacheArgument,
    overrides: OverridesArgument = None,
    config: Annotated[str | None, typer.Option(help="YAML of the build, whose teacher is run again.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="With --config: number of rows to recompute.")] = 256,
    shards: ShardsOption = None,
    threads: ThreadsOption = 4,
    allow_pixel_drift: Annotated[
        int,
        typer.Option(min=0, max=255, metavar="N", help="Levels of 255 by which canaries may differ on this machine."),
    ] = 0,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A cache from which this one was derived, to compare with. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check files, rows and pixels of a cache; with --config, also teacher outputs. Exit code 1: problems."""
    from jobs.cache_ops import describe_verification, verify
    from pipeline.storage.config_files import load_config

    if overrides and config is None:
        raise typer.BadParameter("overrides change a config: pass --config too")
    report = verify(
        cache,
        shards=shards,
        threads=threads,
        config=None if config is None else load_config(config, overrides or []),
        num_rows=sample,
        allow_pixel_drift=allow_pixel_drift,
        sources=source or [],
    )
    print_report(report, describe_verification, as_json=as_json)
    if not report.ok:
        raise typer.Exit(1)


@add_command(cache_app, "relabel")
def cache_relabel(
    cache: CacheArgument,
    label: Annotated[
        str | None, typer.Option(help="Member extension of the label; default: the cache's data.label.")
    ] = None,
    shards: ShardsOption = None,
    threads: ThreadsOption = 4,
) -> None:
    """Read the labels of a finished cache again from its shards, without the teacher."""
    from jobs.cache_ops import describe_relabelling, relabel_cache

    print(describe_relabelling(relabel_cache(cache, label=label, shards=shards, threads=threads)))


@add_command(cache_app, "copy")
def cache_copy(
    source: Annotated[str, typer.Argument(help="URL of a finished cache.", metavar="SRC")],
    destination: Annotated[str, typer.Argument(help="URL of the copy, in any store.", metavar="DST")],
    threads: ThreadsOption = 4,
    as_json: JsonOption = False,
) -> None:
    """Copy a finished cache, and compare the digest of every file on both sides. Repeat it to continue."""
    from jobs.cache_ops import copy, describe_copy

    print_report(copy(source, destination, threads=threads), describe_copy, as_json=as_json)


@add_command(cache_app, "convert")
def cache_convert(
    source: Annotated[str, typer.Argument(help="URL of a finished cache.", metavar="SRC")],
    destination: Annotated[str, typer.Argument(help="URL of the new cache.", metavar="DST")],
    overrides: RayArgument = None,
    logits: Annotated[str | None, typer.Option(help="Encoding of the logits, as in cache.logits; none: drop.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Encoding of the embeddings, as in cache.embeddings; none: drop.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Encoding of the patch tokens; none: drop.")] = None,
    views: Annotated[str | None, typer.Option(help="The first views alone, such as 0-9; whole blocks.")] = None,
    shards: Annotated[str | None, typer.Option(help="These shards alone: file names, {a..b} braces allowed.")] = None,
) -> None:
    """Encode the outputs of a cache again, or take some views or shards, without the teacher. Resumes automatically."""
    from jobs.cache_derive import main

    given = {"logits": logits, "embeddings": embeddings, "tokens": tokens}
    encodings = {key: kind for key, kind in given.items() if kind is not None}
    main(source, destination, overrides or [], encodings=encodings, views=views, shards=shards)


@add_command(cache_app, "merge")
def cache_merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="URLs of caches of one teacher over different shards or views; also keys of the ray section.",
            metavar="SRC... [RAY.K=V]...",
        ),
    ],
    out: Annotated[str, typer.Option(help="URL of the new cache.")],
) -> None:
    """Make one cache of several of the same teacher, without the teacher. Resumes automatically."""
    from jobs.cache_derive import merge_main

    merge_main(sources, out)


@add_command(cache_app, "average")
def cache_average(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="URLs of caches of several teachers over the same views; also keys of the ray section.",
            metavar="SRC... [RAY.K=V]...",
        ),
    ],
    out: Annotated[str, typer.Option(help="URL of the new cache.")],
    weights: Annotated[str | None, typer.Option(help="One for each cache, such as 2,1; default: equal.")] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The mean of probabilities at --temperature, not of logits.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="With --probabilities: the only one that losses can then use.")
    ] = None,
    logits: Annotated[str, typer.Option(help="Encoding of the result, as in cache.logits.")] = "fp16",
) -> None:
    """Average the logits of several teachers into a cache of one teacher. Resumes automatically."""
    from jobs.cache_derive import average_main

    average_main(sources, out, weights=weights, probabilities=probabilities, temperature=temperature, logits=logits)


@add_command(cache_app, "gc")
def cache_gc(
    cache: CacheArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files that would be removed.")] = False,
    min_age: Annotated[
        float,
        typer.Option(min=0, help="Minimum age of removed files, minutes; a running build may commit younger ones."),
    ] = 60.0,
    former: Annotated[
        bool,
        typer.Option(
            "--former", help="Also remove tables and moments of older manifests; older runs may still read them."
        ),
    ] = False,
    unused_header: Annotated[
        bool,
        typer.Option(
            "--unused-header",
            help="Only remove the header of a cache without commits, so that a different build can start.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --unused-header: even while a build is logged as running.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files that no commit refers to, left by builds that were killed or lost a race."""
    from jobs.cache_ops import describe_garbage
    from pipeline.cache.ops.gc import collect_garbage, remove_unused_header

    if force and not unused_header:
        raise typer.BadParameter("--force needs --unused-header")
    if unused_header:
        report = remove_unused_header(cache, force=force, dry_run=dry_run)
    else:
        report = collect_garbage(cache, min_age_s=60 * min_age, former=former, dry_run=dry_run)
    print_report(report, describe_garbage, as_json=as_json)


@add_command(app, "train")
def train(
    config: ConfigArgument, overrides: OverridesArgument = None, allow_pixel_drift: PixelDriftOption = None
) -> None:
    """Train a student from a cache, from an online teacher, or from labels alone. Resumes automatically."""
    run_job("train_student", config, overrides, allow_pixel_drift=allow_pixel_drift)


@add_command(app, "distill")
def distill(
    config: ConfigArgument, overrides: OverridesArgument = None, allow_pixel_drift: PixelDriftOption = None
) -> None:
    """Build the missing parts of the cache, then train."""
    run_job("distill", config, overrides, allow_pixel_drift=allow_pixel_drift)


@add_command(app, "recipe")
def recipe(
    source: Annotated[
        str | None, typer.Argument(help="Name of a packaged recipe, or YAML file or URL.", metavar="RECIPE")
    ] = None,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the stages: networks, steps, losses, required files.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--list", help="Show the packaged recipes.")] = False,
) -> None:
    """Run a whole experiment from one YAML: teacher, caches, students, one table. Resumes automatically."""
    from jobs.recipe import DRY_RUN, describe_packaged, main

    if show_all:
        print(describe_packaged())
    elif source is None:
        raise typer.BadParameter("name a recipe, or pass --list")
    else:
        main(source, [*(overrides or []), *([DRY_RUN] if dry_run else [])])


@add_command(app, "submit")
def submit(
    command: Annotated[Literal["build", "train", "distill"], typer.Argument(help="What to run.")],
    config: ConfigArgument,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's dashboard: http://HOST:8265.", metavar="URL"
        ),
    ],
    overrides: OverridesArgument = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log, and exit with the job's exit code.")
    ] = True,
    working_dir: Annotated[Path, typer.Option(help="Folder that is uploaded and in which the job runs.")] = Path(),
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Files not to upload, as in .gitignore. Repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Variable of this shell to pass to the job. Repeatable.")
    ] = None,
    pip: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requirements file to install; default: the nodes' packages.")
    ] = None,
    entrypoint_cpus: Annotated[float, typer.Option(min=0, help="CPUs reserved for the driver.")] = 0,
    entrypoint_gpus: Annotated[float, typer.Option(min=0, help="GPUs reserved for the driver.")] = 0,
    entrypoint_memory: Annotated[int, typer.Option(min=0, help="Bytes reserved for the driver.")] = 0,
    submission_id: Annotated[str | None, typer.Option(help="Id of the job; default: a new one.")] = None,
) -> None:
    """Run a build, a training or both as a job of a Ray cluster. Submitting again resumes from the committed work."""
    from jobs.submit import submit as submit_job

    code = submit_job(
        command,
        config,
        overrides or [],
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
    if code:
        raise typer.Exit(code)


@add_command(app, "evaluate")
def evaluate(
    run: RunArgument,
    shards: Annotated[str, typer.Option(help="Validation shards, {a..b} braces allowed.")],
    checkpoint: CheckpointOption = "last",
    threads: ThreadsOption = 1,
    without_teacher: Annotated[
        bool, typer.Option("--without-teacher", help="Do not measure agreement, which needs the teacher's weights.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Labelled training shards, for nearest neighbours and a linear probe of the embedding."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Parquet file or URL to write: hits and agreement of each image.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained student: the metrics of its task, and its agreement with its teacher."""
    from jobs.run_ops import describe_evaluation
    from jobs.run_ops import evaluate as evaluate_on

    evaluation = evaluate_on(
        run,
        shards,
        checkpoint=checkpoint,
        threads=threads,
        with_teacher=not without_teacher,
        reference=reference,
        rows_url=rows,
    )
    print_report(evaluation, describe_evaluation, as_json=as_json)


@add_command(app, "export")
def export(
    run: RunArgument,
    out: Annotated[str, typer.Option(help="File or URL to write: .safetensors (weights), .pt2 (torch.export), .onnx.")],
    format: Annotated[
        Literal["safetensors", "pt2", "onnx"] | None, typer.Option(help="Default: by the suffix of --out.")
    ] = None,
    checkpoint: CheckpointOption = "last",
    with_normalization: Annotated[
        bool,
        typer.Option("--with-normalization", help="The graph takes uint8 RGB [N,3,S,S]; default: normalised float32."),
    ] = False,
) -> None:
    """Write a trained student as one file. A graph takes any batch size, and is compared with the student."""
    from jobs.run_ops import describe_export
    from pipeline.student.export.exporters import export_run

    exported = export_run(run, out, format=format, checkpoint_name=checkpoint, with_normalization=with_normalization)
    emit(describe_export(exported), event="end")


@add_command(app, "explain")
def explain(
    code: Annotated[str | None, typer.Argument(help="Code of an error; default: list all codes.")] = None,
) -> None:
    """Print the cause and the remedy of an error code."""
    from pipeline.core.error_codes import error_codes
    from pipeline.core.error_codes import explain as entry_of

    if code is None:
        print("\n".join(error_codes()))
        return
    entry = entry_of(code)
    print(f"{entry.code}\n  cause:  {entry.cause}\n  remedy: {entry.remedy}")


def main() -> None:
    """Entry point of the console command."""
    protect_streams()
    report_crashes()
    command = typer.main.get_command(app)
    hide_types(command)
    command()


if __name__ == "__main__":
    main()
