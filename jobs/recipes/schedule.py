"""The dry run of a recipe: what each stage would do, with counts if the document gives the number of images."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.recipes.document import Recipe, RunSpec
from pipeline import storage
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.models.summary import summarize_model
from pipeline.student.data.sources import planned_num_views
from pipeline.student.training.schedule import TrainingPlan, plan_training
from pipeline.tasks import task_of
from schemas.config import Config, LossSection, ModelConfig, size_text

_PRETRAINED = "pretrained"


def describe_plan(recipe: Recipe) -> str:
    """The text of ``--dry-run``. Builds every network without its weights; reads no data and downloads nothing.

    Raises:
        ConfigError: a stage cannot begin: its order of training is impossible, or a network lacks a key.
        ModelError: a network is unknown or cannot be built.
    """
    lines = [recipe.document.title, *_subset_lines(recipe), *_teacher_lines(recipe)]
    for name, config in recipe.caches.items():
        lines.append(_line("cache" if name == "cache" else f"cache {name}", _cache_text(config, recipe)))
    for name in dict.fromkeys(run.student for run in recipe.runs):
        lines += _student_lines(recipe, [run for run in recipe.runs if run.student == name])
    return "\n".join([*lines, *_needs(recipe)])


def _line(name: str, text: str) -> str:
    return f"{name:<26}  {text}"


def _subset_lines(recipe: Recipe) -> Iterator[str]:
    for name, tail in recipe.document.subsets.items():
        yield _line(f"subset {name}", f"imbalance {tail.imbalance:g}, seed {tail.seed}, of {_named(tail.shards)}")


def _teacher_lines(recipe: Recipe) -> Iterator[str]:
    config = recipe.teacher
    if config.student is not None:
        yield _line("teacher", f"{_model_text(config.student, config, 'teacher')}; trained here")
        yield _line("", _training_text(config, training_plan(recipe, config)))
    else:
        yield _line("teacher", f"{_model_text(config.teacher, config, 'teacher')}; weights {_weights(config.teacher)}")
    yield from _published_line(recipe, "teacher")


def _model_text(model: ModelConfig, config: Config, where: str) -> str:
    size = getattr(model, "size", None) or config.views.size
    summary = summarize_model(model, widths=task_of(config.data).widths, size=size, where=where)
    kwargs = f" {model.kwargs}" if model.kwargs else ""
    return (
        f"{model.model}{kwargs}: {summary.num_parameters / 1e6:.2f} M parameters, embedding {summary.embedding_dim}, "
        f"{size_text(summary.input.size)} pixels"
    )


def _cache_text(config: Config, recipe: Recipe) -> str:
    assert config.cache is not None
    views, cache = config.views, config.cache
    images = recipe.document.images
    forwards = (
        ""
        if images is None or not _reads_common_shards(recipe, config)
        else f", {images * views.count} teacher forwards"
    )
    return (
        f"{views.kind} x {views.count} views{forwards}, logits {cache.logits}, embeddings {cache.embeddings}, "
        f"class means {cache.class_means}: {cache.url}"
    )


def _student_lines(recipe: Recipe, runs: list[RunSpec]) -> Iterator[str]:
    name, first = runs[0].student, runs[0].config
    assert first.student is not None
    source = {"cache": "from its cache", "online": "from the online teacher", "none": "from labels"}[first.teacher.mode]
    yield _line(f"student {name}", f"{_model_text(first.student, first, 'student')}; {source}")
    yield _line("", f"loss {loss_text(first)}")
    for run in {run.epochs: run for run in runs}.values():
        yield _line("", _training_text(run.config, training_plan(recipe, run.config)))
    if (seeds := sorted({run.seed for run in runs})) != [0]:
        yield _line("", f"seeds {', '.join(map(str, seeds))}")
    yield from _published_line(recipe, name)


def _published_line(recipe: Recipe, name: str) -> Iterator[str]:
    if (number := recipe.published(name)) is not None:
        yield _line("", f"published {recipe.metrics.main.title} {number}")


def check_schedules(recipe: Recipe) -> None:
    """Checks the trainings whose number of images the document gives, as each would be checked at its start.

    Raises:
        ConfigError: as ``training_plan``.
    """
    for config in [*([recipe.teacher] if recipe.trains_teacher else []), *(run.config for run in recipe.runs)]:
        training_plan(recipe, config)


def training_plan(recipe: Recipe, config: Config) -> TrainingPlan | None:
    """The plan of a training; None if the document does not give the number of its images.

    Raises:
        ConfigError: as ``plan_training``; the error names the training.
    """
    images = recipe.document.images
    if images is None or not _reads_common_shards(recipe, config):
        return None
    try:
        return plan_training(config.train, config.views, images, num_views=_num_views(recipe, config))
    except ConfigError as error:
        assert config.run is not None
        raise ConfigError(
            error.what,
            code=error.code,
            where=f"{storage.last_name(config.run.url)}: {error.where}",
            got=error.got,
            expected=error.expected,
            next_step=f"{error.next_step}, or correct images ({images}) of the recipe",
        ) from error


def _num_views(recipe: Recipe, config: Config) -> int | None:
    """V of a training, which may read a cache of this recipe; None: views do not repeat."""
    cached = [
        cache.views.count
        for cache in recipe.caches.values()
        if cache.cache is not None and cache.cache.url in config.data.caches
    ]
    return planned_num_views(config, min(cached, default=config.views.count))


def _reads_common_shards(recipe: Recipe, config: Config) -> bool:
    """Whether a stage reads the shards of ``common``, the number of whose images is ``images``."""
    shards = recipe.document.common.get("data", {}).get("shards")
    return config.data.shards == (tuple(shards) if isinstance(shards, list) else shards)


def _training_text(config: Config, plan: TrainingPlan | None) -> str:
    train = config.train
    steps = "as many steps as the shards give" if plan is None else f"{plan.steps_per_epoch} steps"
    rates = f"{train.lr:g}" if plan is None else ", ".join(f"{lr:.3g} at {step}" for step, lr in plan.lr.items())
    of_image = f" ({train.views_per_image} views of each image)" if train.views_per_image > 1 else ""
    return (
        f"{train.epochs} epochs x {steps} of {train.global_batch_size} rows{of_image}, {train.optimizer}, "
        f"lr {rates} ({train.schedule}), weight decay {train.weight_decay:g}, {train.precision}"
    )


def loss_text(config: Config) -> str:
    """``1 ce + 2.5 kd(temperature=1, warmup_epochs=5) + 1 nd``"""
    return " + ".join(f"{term.weight:g} {term.name}{_options_text(term)}" for term in config.loss)


def _options_text(term: LossSection) -> str:
    options = term.model_dump(exclude={"name", "weight"}, exclude_unset=True)
    return f"({', '.join(f'{key}={_plain(value)}' for key, value in sorted(options.items()))})" if options else ""


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _needs(recipe: Recipe) -> Iterator[str]:
    """The shards and weights that the stages read or download."""
    data = recipe.document.common.get("data", {})
    for key in ("shards", "val_shards"):
        if key in data:
            yield _line(f"needs {key}", _named(data[key]))
    sections = [
        recipe.teacher.student or recipe.teacher.teacher,
        *(run.config.student for run in recipe.runs),
        *(teacher for run in recipe.runs for teacher in run.config.teacher.others),
    ]
    by_weights = {
        section.weights: section for section in sections if section and section.weights not in (None, "random")
    }
    for section in by_weights.values():
        yield _line("needs weights", _weights(section))


def _weights(section: ModelConfig) -> str:
    if section.weights_url is not None:
        return redact(section.weights_url)
    if section.weights != _PRETRAINED:
        return str(section.weights)
    return f"{_PRETRAINED}: its library downloads those of {section.model}"


def _named(shards: str | list[str] | tuple[str, ...]) -> str:
    return ", ".join(map(redact, [shards] if isinstance(shards, str) else shards))
