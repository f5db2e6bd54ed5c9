"""The state that a process reuses from part to part: its config, its teacher, and the header of the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline import storage
from pipeline.cache.build.encodings import resolve, with_encodings
from pipeline.cache.build.header_claim import claim, head_of, make_header, token_request
from pipeline.cache.build.imported_means import ImportedMeans, read_means, store_means
from pipeline.cache.format.codec import LinearHead, stored_outputs
from pipeline.cache.format.head_file import store_head
from pipeline.core.config_loading import require
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.models import selected_widths
from pipeline.models.load import require_weights
from pipeline.models.weights import weights_read_errors
from pipeline.tasks import network_keys, planned_outputs, task_of
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.numerics import check_gpu, pick_device, pin_numerics, precision_warnings, visible_gpus
from schemas.cache_format import Header
from schemas.config import CacheConfig, Config, TeacherConfig


@dataclass(frozen=True, slots=True)
class BuildContext:
    """A config with its loaded teacher.

    Attributes:
        header: what this config and this teacher write to a new cache; after ``claimed``, the header of the cache.
        imported: class means from a file, where the config names one.
        gpus: the GPUs that were visible when the teacher was loaded.
        head: computes the cache's logits from its embeddings, under ``cache.logits: head``.
    """

    config: Config
    cache: CacheConfig
    teacher: Teacher
    header: Header
    imported: ImportedMeans | None
    gpus: str | None
    head: LinearHead | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made on behalf of the user. The header's forward has shown the sizes of the teacher's maps."""
        teacher = self.teacher
        maps = () if teacher.grid is None else teacher.grid.notes(teacher.map_sizes, key="cache.grid")
        return (*teacher.loaded.notes, *maps)

    def claimed(self) -> BuildContext:
        """Claims the cache. Every part does so, because the folder may have been emptied since the last part."""
        return replace(self, header=claim(self.cache.url, self.header))


def cache_config(config: Config) -> CacheConfig:
    """The cache section, checked against the sections that it depends on. Reads nothing: under ``cache.logits: auto``
    it has the encoding of a new cache, see ``with_encodings``.

    Raises:
        ConfigError: a key that a build needs is missing, two keys contradict each other, or the task has no networks.
    """
    keys, task = network_keys(config.data), task_of(config.data)
    require(config, "data.shards", *keys, "teacher.model", "cache.url", command="cache build")
    assert config.cache is not None
    cache = resolve(config, config.cache)
    require_weights(config.teacher, where="teacher")
    if config.teacher.others:
        raise ConfigError(
            "a cache stores the outputs of one teacher",
            code="config.several-teachers",
            where="teacher.others",
            got=f"{len(config.teacher.others)} more than teacher.model",
            next_step="append teacher.others=[], and build one cache for each other teacher, from one config each",
        )
    if cache.class_means != "none" and (task.embedding is None or not task.heads):
        raise ConfigError(
            f"class means are those of classes, and networks of task {task.name} have none",
            code="config.class-means-without-classes",
            where="cache.class_means",
            got=redact(cache.class_means),
            expected="none",
            next_step="set cache.class_means=none",
        )
    if config.views.mixes and cache.class_means == "view0":
        raise ConfigError(
            "class means of mixed images are meaningless",
            code="config.class-means-of-mixed-views",
            where="cache.class_means",
            got="view0",
            expected="eval, none or the URL of a file under views.kind=function_matching",
        )
    if cache.computes_class_means and not (task.members and task.num_classes):
        raise ConfigError(
            "class means need labels",
            code="config.class-means-without-labels",
            where="data.label",
            got="null",
            expected="a member extension",
            next_step="set data.label, or cache.class_means=none",
        )
    _check_tokens(config.teacher, cache)
    if cache.grid is not None and task.grid(None) is None:
        raise ConfigError(
            f"a grid is that of maps, and the outputs of task {task.name} have no positions",
            code="config.grid-without-maps",
            where="cache.grid",
            got=cache.grid,
            expected="null",
            next_step="remove cache.grid; that of patch tokens is cache.tokens_grid",
        )
    # Fails before a teacher is loaded if an encoding needs more classes, or stores no maps.
    stored_outputs(planned_outputs(task, cache, selected_widths(task.widths, config.teacher), tokens=None))
    return cache


def _check_tokens(teacher: TeacherConfig, cache: CacheConfig) -> None:
    if teacher.tokens_layer is not None and cache.tokens == "none":
        raise ConfigError(
            "this cache would store no patch tokens, and a layer is named for them",
            code="config.tokens-unused",
            where="teacher.tokens_layer",
            got=f"{teacher.tokens_layer}, with cache.tokens=none",
            next_step="set cache.tokens=fp16, or remove teacher.tokens_layer",
        )
    if teacher.tokens_grid not in (None, cache.tokens_grid):
        raise ConfigError(
            "this grid of patch tokens is not that of the cache",
            code="config.tokens-unused",
            where="teacher.tokens_grid",
            got=f"{teacher.tokens_grid}, with cache.tokens_grid={cache.tokens_grid}",
            next_step="set cache.tokens_grid: that of the teacher section is for teacher.mode=online",
        )


def prepare(config: Config) -> tuple[str, ...]:
    """Loads the teacher and claims the cache: the first step of every build, before any work.

    Returns notes for the user about how the teacher's weights were read, about its precision, and how its maps change.

    Raises:
        CacheError: the cache was started with a different teacher, plan, encoding or source of class means.
        ConfigError: the config imports class means, and the file does not fit this teacher.
    """
    if cache_config(config).class_means_url is not None:
        # The file at the URL may have changed since this process last built a cache.
        load_context.cache_clear()
    context = current_context(config).claimed()
    if context.imported is not None:
        store_means(context.cache.url, context.imported)
    if context.head is not None:
        store_head(context.cache.url, context.head)
    slow = precision_warnings(context.teacher.device, {"teacher.precision": config.teacher.precision})
    return (*context.notes, *slow)


def current_context(config: Config) -> BuildContext:
    """The context of this process for the config, loaded again if a file of the teacher was replaced."""
    config = with_encodings(config)
    # Every time: another job in this process may have set the number of threads.
    pin_numerics(config.ray.cpus_per_task)
    urls = {"teacher.weights": config.teacher.weights_url, "teacher.text_head": config.teacher.text_head}
    stamps: list[str] = []
    for where, url in urls.items():
        if url is not None:
            with weights_read_errors(url, where=where):
                stamps.append(storage.stamp(url))
    context = load_context(config.model_dump_json(), tuple(stamps))
    check_gpu(context.teacher.device, context.gpus)
    return context


@lru_cache(maxsize=1)
def load_context(config_json: str, stamps: tuple[str, ...]) -> BuildContext:  # noqa: ARG001 - part of the cache key
    """Loads the teacher. A process calls this once for any number of parts."""
    config = Config.model_validate_json(config_json)
    cache, task = cache_config(config), task_of(config.data)
    teacher = load_teacher(
        config.teacher,
        widths=task.widths,
        size=config.views.size,
        device=pick_device(config.ray.gpus_per_task > 0),
        tokens=token_request(config),
        grid=task.grid(cache.grid),
    )
    imported = None
    if cache.class_means_url is not None:
        assert task.embedding is not None, "class means are those of embeddings"
        imported = read_means(
            cache.class_means_url, num_classes=task.num_classes, embedding_dim=teacher.module.widths[task.embedding]
        )
    head = head_of(teacher, cache, config.data)
    header = make_header(teacher, plan=config.views, cache=cache, data=config.data, imported=imported, head=head)
    return BuildContext(config, cache, teacher, header, imported, visible_gpus(), head)
