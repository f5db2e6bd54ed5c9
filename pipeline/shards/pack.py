"""A folder tree of images into shuffled shards: the same bytes for the same tree and settings, copied as they are.

All of the plan is made from one listing, names and sizes alone; then each shard is written by itself. A packing that
was killed goes on where it stopped: ``packing.json``, created first, says of what and how.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Literal

from pipeline import storage
from pipeline.core.errors import ShardError, StorageInputError
from pipeline.core.hashing import canonical_json, differences, digest, seal
from pipeline.core.redaction import redact
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.omissions import Omissions
from pipeline.shards.writer import Members, check_name, write_shard
from schemas.config import DataConfig

Labels = Literal["folder", "none"]
BadImages = Literal["fail", "skip", "pack"]

RECORD, CLASSES = "packing.json", "classes.json"
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_VAL = "val"
_READ_THREADS = 16
_READ_AHEAD = 64  # images; what is held at a time
_BLOCK = 512
_SPLIT = re.compile(
    r"(?P<role>train|val|test|dev|eval)(ing|id|idation|uation)?([-_]?(set|images|\d{4}))?", re.IGNORECASE
)
_NUM_NAMED = 3
_BAD_IMAGES = "images that cannot be decoded"
_MAX_PIXELS = DataConfig.model_validate({}).max_pixels


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How a tree becomes shards. A shard is closed at whichever of its two limits comes first.

    Attributes:
        name: the shards are called ``<name>-00000.tar`` and so on.
        shard_size: images; ``shard_bytes``: of the tar, unless a single image is larger.
        val_share: of each class, which goes into shards of their own, ``val-00000.tar`` and so on.
    """

    name: str = "train"
    shard_size: int = 10_000
    shard_bytes: int = 256 << 20
    seed: int = 0
    val_share: float = 0.0
    labels: Labels = "folder"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of the tree: its path below the source, its key and extension in the shard, its class."""

    path: str
    key: str
    extension: str
    label: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Packing:
    """What will be written.

    Attributes:
        shards: images by file name, in order.
        classes: index by folder name; empty without labels.
        skipped: paths of what is not packed, by reason.
    """

    source_url: str
    settings: PackSettings
    shards: dict[str, list[SourceImage]]
    classes: dict[str, int]
    skipped: dict[str, list[str]]

    @property
    def num_images(self) -> int:
        return sum(map(len, self.shards.values()))

    @property
    def paths(self) -> list[str]:
        return [image.path for images in self.shards.values() for image in images]

    def record(self) -> bytes:
        """Equal for packings that write the same bytes."""
        source = [[image.key, image.extension, image.size_bytes] for images in self.shards.values() for image in images]
        return seal(
            {
                "settings": asdict(self.settings),
                "classes": {_readable(name): index for name, index in self.classes.items()},
                "source": digest(canonical_json(source)),
                "num_images": self.num_images,
                "num_shards": len(self.shards),
            }
        )


def plan_packing(
    source_url: str,
    settings: PackSettings,
    *,
    out_url: str = "OUT",
    classes: Mapping[str, int] | None = None,
    links_out: bool = False,
) -> Packing:
    """Lists the tree. The class of an image is its first folder, as in torchvision's ``ImageFolder``.

    Args:
        out_url: where the shards will be written, for commands in messages.
        classes: the index of every class, where another tree has settled it; else the folders are numbered by name.
        links_out: also follow links that lead out of the tree.

    Raises:
        StorageInputError: a link leads out of the tree, or in circles.
        ShardError: there is nothing to pack, the first folders are splits such as train and val instead of classes, a
            class has no image, or there are fewer than two classes.
    """
    if settings.val_share and settings.name == _VAL:
        raise ShardError("training and validation shards would have the same names", where="name", got=settings.name)
    sizes = storage.sizes(source_url, links_out=links_out)
    usable, skipped = _sort_out(sizes, settings.labels)
    where = redact(source_url)
    if not usable:
        raise _nothing_to_pack(where, skipped, settings.labels)
    indexes: dict[str, int] = {}
    if settings.labels == "folder":
        _check_splits(usable, source_url, settings, out_url)
        indexes = _class_indexes(source_url, sorted({_class_of(path) for path in usable}), classes)
    keys = _keys(usable)
    images = [
        SourceImage(path, keys[path], _extension(path), indexes.get(_class_of(path)), sizes[path]) for path in usable
    ]
    for image in images:
        check_name(image.key, image.extension)
    return Packing(source_url, settings, _cut(images, settings), indexes, skipped)


def _extension(path: str) -> str:
    """Lower case, without the dot; empty where there is none."""
    stem, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def _class_of(path: str) -> str:
    return path.partition("/")[0]


def _sort_out(sizes: Mapping[str, int], labels: Labels) -> tuple[list[str], dict[str, list[str]]]:
    """The paths of images, and those of all else by reason."""
    usable, skipped = list[str](), defaultdict[str, list[str]](list)
    for path, size_bytes in sizes.items():
        reason = _reason_to_skip(path, size_bytes, labels)
        (usable if reason is None else skipped[reason]).append(path)
    return usable, dict(sorted(skipped.items()))


def _reason_to_skip(path: str, size_bytes: int, labels: Labels) -> str | None:
    extension = _extension(path)
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    if extension not in EXTENSIONS:
        return f".{extension}" if extension else "no extension"
    if not size_bytes:
        return "empty"
    return "in no class folder" if labels == "folder" and "/" not in path else None


def _nothing_to_pack(where: str, skipped: Mapping[str, Sequence[str]], labels: Labels) -> ShardError:
    loose = labels == "folder" and "in no class folder" in skipped
    return ShardError(
        "there are no images in class folders" if loose else "there are no images here",
        code="pack.no-images",
        where=where,
        got=emit_skipped(skipped) or "no files at all",
        expected=f"{'<class>/' if labels == 'folder' else ''}<name>.{{{','.join(EXTENSIONS)}}}",
        next_step="pass --labels none to pack images without labels" if loose else None,
    )


def emit_skipped(skipped: Mapping[str, Sequence[str]]) -> str:
    """``3 .txt (a.txt, …), 1 hidden (.x)``."""
    return ", ".join(
        f"{len(paths)} {reason} ({', '.join(paths[:_NUM_NAMED])}{', …' if len(paths) > _NUM_NAMED else ''})"
        for reason, paths in skipped.items()
    )


def split_folders(paths: Iterable[str]) -> list[str]:
    """The first folders of a tree of splits (``train``, ``val``, ``test`` …), training first; none if they are classes.

    A class may be called ``train`` too. So they are splits only where no other folder holds images, or where two
    different splits hold a class of the same name.
    """
    classes: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, slash, rest = path.partition("/")
        if slash:
            classes[folder].add(rest.partition("/")[0] if "/" in rest else "")
    roles = {folder: match["role"].lower() for folder in classes if (match := _SPLIT.fullmatch(folder))}
    shared = Counter(name for folder in roles for name in classes[folder] - {""})
    are_splits = len(roles) == len(classes) or (len({*roles.values()}) > 1 and max(shared.values(), default=0) > 1)
    # One folder of images without folders in it may be the only class that someone has so far.
    if not are_splits or (len(roles) == 1 and not shared):
        return []
    return sorted(roles, key=lambda folder: (roles[folder] != "train", folder))


def _check_splits(paths: Sequence[str], source_url: str, settings: PackSettings, out_url: str) -> None:
    """
    Raises:
        ShardError: the first folders are splits; the next step is one command for each.
    """
    splits = split_folders(paths)
    if not splits:
        return
    has_classes = any(path.startswith(f"{splits[0]}/") and path.count("/") > 1 for path in paths)
    commands = [
        pack_command(
            storage.join(source_url, folder),
            storage.join(out_url, folder),
            replace(
                settings,
                name=folder if number else settings.name,
                labels="folder" if has_classes else "none",
            ),
            classes_url=storage.join(out_url, splits[0], CLASSES) if number and has_classes else None,
        )
        for number, folder in enumerate(splits)
    ]
    raise ShardError(
        "these folders are splits, not classes",
        code="pack.splits-as-classes",
        where=redact(source_url),
        got=", ".join(f"{folder}/" for folder in splits),
        expected="a folder for each class",
        next_step="pack each split:\n" + "\n".join(f"{'':<10}{command}" for command in commands),
    )


def pack_command(source_url: str, out_url: str, settings: PackSettings, *, classes_url: str | None = None) -> str:
    """The command line that packs with these settings, quoted for a shell."""
    default = PackSettings()
    options = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in asdict(settings).items()
        if value != getattr(default, name)
    }
    if classes_url is not None:
        options["--classes"] = redact(classes_url)
    words = ["stillroom", "shards", "pack", redact(source_url), redact(out_url)]
    return shlex.join([*words, *(word for option in options.items() for word in option)])


def _class_indexes(source_url: str, found: list[str], settled: Mapping[str, int] | None) -> dict[str, int]:
    """
    Raises:
        ShardError: a class folder has no image or no index, or there is only one class.
    """
    where = redact(source_url)
    empty = sorted({name for name in storage.folders(source_url) if not name.startswith(".")} - {*found})
    if empty:
        raise ShardError(
            f"{len(empty)} class folders have no images",
            where=where,
            got=_named(empty),
            code="pack.empty-class",
            next_step="remove them, since they would take up class indexes; or fill them",
        )
    if settled is not None and (unknown := [name for name in found if name not in settled]):
        raise ShardError(
            "some class folders are not among the classes",
            code="pack.unknown-class",
            where=where,
            got=_named(unknown),
            expected=f"folders called {_named(sorted(settled))}",
            next_step="rename these folders, or pass the classes.json of the packing that has them",
        )
    indexes = dict(settled) if settled is not None else {name: index for index, name in enumerate(found)}
    if len(indexes) < 2:
        raise ShardError(
            "there is only one class",
            code="pack.one-class",
            where=where,
            got=_named(found),
            expected="a folder for each class",
            next_step=f"if the classes are the folders in it, name {storage.join(where, found[0])}; "
            "if it is one of several, name the folder above it; without classes pass --labels none",
        )
    return indexes


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")


def _keys(paths: Sequence[str]) -> dict[str, str]:
    """A WebDataset key for each path: less its extension, without dots in its last part, unique.

    Of two files whose keys would be equal (``a.jpg`` and ``a.png``, ``a.b.jpg`` and ``a_b.jpg``), the later in the
    listing gets a number.
    """
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        folder, slash, name = _readable(path).rpartition("/")
        base = key = folder + slash + name.rpartition(".")[0].replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken.add(key)
        keys[path] = key
    return keys


def _readable(path: str) -> str:
    """UTF-8, also for file names that are not."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _cut(images: list[SourceImage], settings: PackSettings) -> dict[str, list[SourceImage]]:
    """Shuffled shards by file name.

    The order is that of a hash of seed and path: an image's place does not depend on which others there are, nor on
    how a store lists them.
    """
    shuffled = sorted(images, key=lambda image: _draw(settings.seed, image.path))
    val = _first_of_each_class(shuffled, settings.val_share)
    train = [image for image in shuffled if image.path not in val]
    cuts = {_VAL: [image for image in shuffled if image.path in val], settings.name: train}
    return {
        f"{name}-{number:05d}.tar": shard
        for name, members in cuts.items()
        for number, shard in enumerate(_runs(members, settings))
    }


def _draw(seed: int, path: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{_readable(path)}".encode(), digest_size=16).digest()


def _first_of_each_class(shuffled: list[SourceImage], share: float) -> set[str]:
    """Paths of that share of every class, rounded."""
    by_class: defaultdict[int | None, list[str]] = defaultdict(list)
    for image in shuffled:
        by_class[image.label].append(image.path)
    return {path for paths in by_class.values() for path in paths[: round(share * len(paths))]}


def _runs(images: list[SourceImage], settings: PackSettings) -> Iterator[list[SourceImage]]:
    run: list[SourceImage] = []
    size_bytes = 0
    for image in images:
        added = _tar_bytes(image)
        if run and (len(run) == settings.shard_size or size_bytes + added > settings.shard_bytes):
            yield run
            run, size_bytes = [], 0
        run.append(image)
        size_bytes += added
    if run:
        yield run


def _tar_bytes(image: SourceImage) -> int:
    """A header and whole blocks for the image, the same for its label."""
    label = 0 if image.label is None else 2 * _BLOCK
    return _BLOCK + -(-image.size_bytes // _BLOCK) * _BLOCK + label


def write_packing(
    packing: Packing, out_url: str, *, bad_images: BadImages = "fail", omissions: Omissions | None = None
) -> Iterator[int]:
    """Writes the shards that are not there yet, then ``classes.json``. Yields the images of each shard as it is there.

    Args:
        bad_images: what to do with an image that cannot be decoded. fail: write all shards without one, then raise;
            skip: leave it out; pack: decode nothing, and copy it like the others.
        omissions: filled with the images that were left out.

    Raises:
        StorageInputError: there is something else in ``out_url``.
        ShardError: images cannot be decoded, under ``fail``, or no image of a shard can. The other shards are written,
            and stay.
    """
    present = _begin(packing, out_url)
    omissions = Omissions() if omissions is None else omissions
    unwritten: list[str] = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for name, images in packing.shards.items():
            url = storage.join(out_url, name)
            if name not in present and not _write(packing.source_url, images, url, pool, bad_images, omissions):
                unwritten.append(name)
            yield len(images)
    if bad_images == "fail" and omissions.counts:
        raise _bad_images_found(packing.source_url, omissions, is_whole_shard=False)
    if unwritten:
        raise _bad_images_found(packing.source_url, omissions, is_whole_shard=True)
    if packing.classes:
        storage.write(storage.join(out_url, CLASSES), json.dumps(packing.classes, indent=0).encode() + b"\n")


class _BadImageFoundError(Exception):
    """Ends the writing of a shard, so that nothing of it is published."""


def _write(
    source_url: str,
    images: Sequence[SourceImage],
    url: str,
    pool: ThreadPoolExecutor,
    bad_images: BadImages,
    omissions: Omissions,
) -> bool:
    """Whether the shard was written: not if it has a bad image under ``fail``, nor if it has no other."""

    def usable() -> Iterator[tuple[str, Members]]:
        num_bad = 0
        for key, members, reason, path in _samples(source_url, images, pool, checks=bad_images != "pack"):
            if reason is not None:
                omissions.add(_BAD_IMAGES, f"{path}: {reason}")
                num_bad += 1
            elif not num_bad or bad_images == "skip":
                yield key, members
        # At the end, so that one run names all bad images.
        if num_bad and (bad_images == "fail" or num_bad == len(images)):
            raise _BadImageFoundError

    try:
        write_shard(usable(), url)
    except _BadImageFoundError:
        return False
    return True


def _bad_images_found(source_url: str, omissions: Omissions, *, is_whole_shard: bool) -> ShardError:
    what = f"{omissions.counts[_BAD_IMAGES]} images cannot be used"
    return ShardError(
        f"{what}, among them all of a shard" if is_whole_shard else what,
        code="pack.bad-images",
        where=redact(source_url),
        got=", ".join(omissions.lines()),
        expected="whole JPEG, PNG or WebP images",
        next_step="repair or remove them and pack into a new folder"
        if is_whole_shard
        else "run the command again with --bad-images skip to leave them out (it resumes), "
        "or repair them and pack into a new folder",
    )


def _begin(packing: Packing, out_url: str) -> set[str]:
    """What an earlier run of the same packing has written."""
    present, url = set(storage.listing(out_url)), storage.join(out_url, RECORD)
    if present and RECORD not in present:
        raise StorageInputError(
            "this folder is not empty",
            code="pack.out-not-empty",
            where=redact(out_url),
            got=_named(sorted(present)),
            expected="a new or empty folder",
            next_step=f"run: {pack_command(packing.source_url, storage.join(out_url, 'shards'), packing.settings)}",
        )
    if not storage.create(url, packing.record()) and (stored := storage.read(url)) != packing.record():
        raise StorageInputError(
            "other images, or the same in another way, were packed here",
            code="pack.other-packing",
            where=redact(out_url),
            got=_changes(stored, packing.record()),
            expected="a folder for each packing, or the images and options that this one began with",
            next_step=f"run: {pack_command(packing.source_url, _next_folder(out_url), packing.settings)}",
        )
    return present


def _changes(stored: bytes, record: bytes) -> str:
    """``settings.seed: 0 -> 1; …`` between the packing that stands and this one."""
    try:
        old, new = json.loads(stored), json.loads(record)
        del old["digest"], new["digest"]
        changed = differences(old, new)
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{RECORD} that is damaged"
    # Without other settings, a digest of names and sizes says nothing to a reader.
    named = [text for text in changed if not text.startswith("source")]
    return "; ".join(named) if named else "images of other names or sizes"


def _next_folder(out_url: str) -> str:
    """``out-2`` for ``out``, or the first number that is free."""
    base = out_url.rstrip("/")
    return next(url for url in (f"{base}-{number}" for number in count(2)) if not storage.listing(url))


def _samples(
    source_url: str, images: Sequence[SourceImage], pool: ThreadPoolExecutor, *, checks: bool
) -> Iterator[tuple[str, Members, str | None, str]]:
    """Key, members, the reason why the image cannot be decoded if ``checks``, and path. Reads a few images ahead, so
    that a remote source keeps up."""
    for start in range(0, len(images), _READ_AHEAD):
        few = images[start : start + _READ_AHEAD]
        read = pool.map(lambda image: _read_and_check(source_url, image, checks=checks), few)
        for image, (data, reason) in zip(few, read, strict=True):
            label = {} if image.label is None else {"cls": str(image.label).encode()}
            yield image.key, {image.extension: data, **label}, reason, image.path


def _read_and_check(source_url: str, image: SourceImage, *, checks: bool) -> tuple[bytes, str | None]:
    data = _read(source_url, image)
    if checks:
        try:
            decode(data, max_pixels=_MAX_PIXELS)
        except BadImageError as error:
            return data, error.reason
    return data, None


def _read(source_url: str, image: SourceImage) -> bytes:
    """
    Raises:
        ShardError: the image has another size than when it was listed.
    """
    data = storage.read(storage.join(source_url, image.path))
    if len(data) != image.size_bytes:
        raise ShardError(
            "an image changed while it was packed",
            where=redact(storage.join(source_url, image.path)),
            got=f"{len(data)} bytes",
            expected=f"{image.size_bytes} bytes",
            next_step="pack into another folder when the images stay as they are",
        )
    return data
