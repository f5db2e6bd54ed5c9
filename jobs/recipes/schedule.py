"""The dry run of a recipe: what each stage would do, counted where the document says how many images there are."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.recipes.document import Recipe, RunSpec
from pipeline.core.redaction import redact
from pipeline.models.summary import summarize_model
from pipeline.student.training.schedule import TrainingPlan, plan_training
from schemas.config import Config, LossSection, ModelConfig

_PRETRAINED = "pretrained"


def describe_plan(recipe: Recipe) -> str:
    """The screen that ``--dry-run`` prints. Builds every network without its weights; reads no data, fetches nothing.

    Raises:
        ConfigError: a stage could not begin: no such order of training, or a key that a network needs is missing.
        ModelError: a network is unknown, or cannot be built as asked.
    """
    lines = [recipe.document.title, *_subset_lines(recipe), *_teacher_lines(recipe)]
    for name, config in recipe.caches.items():
        lines.append(_line("cache" if name == "cache" else f"cache {name}", _cache_text(config, recipe)))
    for name in dict.fromkeys(spec.student for spec in recipe.specs):
        lines += _student_lines(recipe, [spec for spec in recipe.specs if spec.student == name])
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
        yield _line("", _training_text(config, plan_of(recipe, config)))
    else:
        yield _line("teacher", f"{_model_text(config.teacher, config, 'teacher')}; weights {_weights(config.teacher)}")
    if "teacher" in recipe.document.published:
        yield _line("", f"published top-1 {recipe.document.published['teacher']:.2f} %")


def _model_text(model: ModelConfig, config: Config, where: str) -> str:
    assert config.data.num_classes is not None
    size = getattr(model, "size", None) or config.views.size
    outline = summarize_model(model, num_classes=config.data.num_classes, size=size, where=where)
    kwargs = f" {model.kwargs}" if model.kwargs else ""
    return (
        f"{model.model}{kwargs}: {outline.num_parameters / 1e6:.2f} M parameters, embedding {outline.embedding_dim}, "
        f"{outline.input.size} pixels"
    )


def _cache_text(config: Config, recipe: Recipe) -> str:
    assert config.cache is not None
    views, kept = config.views, config.cache
    images = recipe.document.images
    forwards = "" if images is None or not _of_all(recipe, config) else f", {images * views.count} teacher forwards"
    return (
        f"{views.kind} x {views.count} views{forwards}, logits {kept.logits}, embeddings {kept.embeddings}, "
        f"class means {kept.class_means}: {kept.url}"
    )


def _student_lines(recipe: Recipe, specs: list[RunSpec]) -> Iterator[str]:
    first = specs[0].config
    assert first.student is not None
    learns = {"cache": "from its cache", "online": "from the teacher itself", "none": "from labels"}[first.teacher.mode]
    yield _line(f"student {specs[0].student}", f"{_model_text(first.student, first, 'student')}; {learns}")
    yield _line("", f"loss {loss_text(first)}")
    for spec in {spec.epochs: spec for spec in specs}.values():
        yield _line("", _training_text(spec.config, plan_of(recipe, spec.config)))
    if (seeds := sorted({spec.seed for spec in specs})) != [0]:
        yield _line("", f"seeds {', '.join(map(str, seeds))}")
    if specs[0].student in recipe.document.published:
        yield _line("", f"published top-1 {recipe.document.published[specs[0].student]:.2f} %")


def plan_of(recipe: Recipe, config: Config) -> TrainingPlan | None:
    """None where the document does not say how many images this stage trains on."""
    images = recipe.document.images
    return None if images is None or not _of_all(recipe, config) else plan_training(config.train, config.views, images)


def _of_all(recipe: Recipe, config: Config) -> bool:
    """Whether a stage reads the shards of ``common``, whose images ``images`` counts."""
    return config.data.shards == recipe.document.common.get("data", {}).get("shards")


def _training_text(config: Config, plan: TrainingPlan | None) -> str:
    train = config.train
    steps = "as many steps as the shards give" if plan is None else f"{plan.steps_per_epoch} steps"
    rates = f"{train.lr:g}" if plan is None else ", ".join(f"{lr:.3g} at {step}" for step, lr in plan.lr.items())
    return (
        f"{train.epochs} epochs x {steps} of {train.global_batch_size} rows, {train.optimizer}, "
        f"lr {rates} ({train.schedule}), weight decay {train.weight_decay:g}, {train.precision}"
    )


def loss_text(config: Config) -> str:
    """``1 ce + 2.5 kd(temperature=1, warmup_epochs=5) + 1 nd``"""
    return " + ".join(f"{term.weight:g} {term.name}{_options(term)}" for term in config.loss)


def _options(term: LossSection) -> str:
    given = term.model_dump(exclude={"name", "weight"}, exclude_unset=True)
    return f"({', '.join(f'{key}={_plain(value)}' for key, value in sorted(given.items()))})" if given else ""


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _needs(recipe: Recipe) -> Iterator[str]:
    """What has to be there, or will be fetched, before the stages can run."""
    data = recipe.document.common.get("data", {})
    for key in ("shards", "val_shards"):
        if key in data:
            yield _line(f"needs {key}", _named(data[key]))
    sections = [
        recipe.teacher.student or recipe.teacher.teacher,
        *(spec.config.student for spec in recipe.specs),
        *(other for spec in recipe.specs for other in spec.config.teacher.others),
    ]
    expected = {section.weights: section for section in sections if section and section.weights not in (None, "random")}
    for section in expected.values():
        yield _line("needs weights", _weights(section))


def _weights(section: ModelConfig) -> str:
    if section.weights_url is not None:
        return redact(section.weights_url)
    if section.weights != _PRETRAINED:
        return str(section.weights)
    return f"{_PRETRAINED}: its library downloads those of {section.model}"


def _named(shards: str | list[str] | tuple[str, ...]) -> str:
    return ", ".join(map(redact, [shards] if isinstance(shards, str) else shards))
