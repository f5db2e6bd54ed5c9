from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.core.config_loading import build_config, require
from pipeline.core.errors import ConfigError, StorageInputError
from pipeline.storage.config_files import load_config
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow

LOSSES = (
    "ce, bce, kd, dist, cwd, dkd, hard, nd, sifn, cosine, mse, smooth_l1, similarity, token_cosine, token_mse, "
    "review_kd"
)
TRAINING = """\
data:
  cache: s3://bucket/caches/r152
  num_classes: 10
loss:
  - {name: kd, weight: 1.0, temperature: 2}
  - name: ce
train:
  lr: 3e-4
  epochs: 5
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "train.yaml"


def load(path: Path, text: str, *overrides: str) -> Config:
    path.write_text(text)
    return load_config(str(path), overrides)


def refusal(path: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    assert caught.value.exit_code == 2
    assert not any(
        word in str(caught.value)
        for word in ("pydantic", "validation error", "Traceback", "input_value", "OmegaConf", "secret")
    )
    return caught.value


def test_a_document_becomes_a_config(yaml_file: Path) -> None:
    resources = '{spot: 0.01, "accelerator_type:H100": 1, disk: 3}'
    network = "{kwargs: {drop: true, sizes: [false]}}"
    config = load(yaml_file, f"{TRAINING}  nesterov: yes\nteacher: {network}\nray: {{resources_per_task: {resources}}}")
    assert (config.train.lr, config.train.nesterov) == (0.0003, True)
    assert [term.name for term in config.loss] == ["kd", "ce"]
    assert (config.data.num_classes, config.views.count) == (10, 1)
    assert config.teacher.kwargs == {"drop": True, "sizes": [False]}
    assert config.ray.resources_per_task == {"spot": 0.01, "accelerator_type:H100": 1, "disk": 3}


def test_a_document_is_read_from_any_allowed_url() -> None:
    storage.write("memory://configs/a.yaml", TRAINING.encode())
    assert load_config("memory://configs/a.yaml").train.epochs == 5


NETWORK = "student: {model: a, kwargs: {depth: 8, widths: [1, 2]}}"
LOSS = "loss: [{name: kd, temperature: 2}]"
# A mapping merges into a section; any other value, such as a list, a term of the loss or kwargs, is replaced.
OVERRIDES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("train: {lr: 1}", ["train.lr=3", "train.lr=2e-2"], {"train": {"lr": 0.02}}),
    ("train: {lr: fast}", ["train.lr=0.1"], {"train": {"lr": 0.1}}),
    ("train: {lr: 0.1}", ["train={epochs: 9}"], {"train": {"lr": 0.1, "epochs": 9}}),
    ("data: {label: x}", ["data.label=null"], {"data": {"label": None}}),
    ("data: {shards: x}", ["data.shards=[a.tar, b.tar]"], {"data": {"shards": ("a.tar", "b.tar")}}),
    ("train: {}", ["cache.url=memory://x?a=b"], {"train": {}, "cache": {"url": "memory://x?a=b"}}),
    ("views: {}", ["views.jitter.hue=0.1"], {"views": {"jitter": {"hue": 0.1}}}),
    ("views: {}", ["views.randaugment={}"], {"views": {"randaugment": {}}}),
    (LOSS, ["loss.0.weight=3"], {"loss": ({"name": "kd", "temperature": 2, "weight": 3},)}),
    (LOSS, ["loss.0={name: kd}"], {"loss": ({"name": "kd"},)}),
    (NETWORK, ["student.kwargs={}"], {"student": {"model": "a", "kwargs": {}}}),
    (NETWORK, ["student={kwargs: {}}"], {"student": {"model": "a", "kwargs": {}}}),
    (NETWORK, ["student.kwargs={b: 1}", "student.kwargs.c=3"], {"student": {"model": "a", "kwargs": {"b": 1, "c": 3}}}),
    ("student: {}", ["student.kwargs.drop.rate=0.1"], {"student": {"kwargs": {"drop": {"rate": 0.1}}}}),
]


@pytest.mark.parametrize(("text", "overrides", "expected"), OVERRIDES)
def test_overrides_are_yaml_and_the_last_one_wins(
    yaml_file: Path, text: str, overrides: list[str], expected: dict[str, Any]
) -> None:
    assert load(yaml_file, text, *overrides).model_dump(exclude_unset=True) == expected


def test_interpolation_is_resolved_after_overrides(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_TEST_BUCKET", "s3://mine")
    text = "views: {size: 32}\nstudent: {size: '${views.size}'}\nrun: {url: '${oc.env:STILLROOM_TEST_BUCKET}/r'}\n"
    config = load(yaml_file, text, "views.size=64")
    assert config.student is not None
    assert config.student.size == 64
    assert config.run is not None
    assert config.run.url == "s3://mine/r"


SCALED = "views: {kind: scale_crop, size: 32"


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("train:\n  lr: 1\n  epoch: 3\n", "unknown-key", ["train.epoch", "line 3", "did you mean epochs?"]),
        ("los: []\n", "unknown-key", ["los", "line 1", "did you mean loss?"]),
        ("zzzzzz: 1\n", "unknown-key", ["zzzzzz", "data, teacher, views, cache"]),
        ("loss:\n- name: kd\n  temprature: 3\n", "unknown-key", ["loss.0.temprature", "line 3", "mean temperature?"]),
        ("cache: {url: x, logit: fp16}\n", "unknown-key", ["cache.logit", "did you mean logits?"]),
        ("loss:\n- {name: ce}\n- {name: kdd}\n", "unknown-loss", ["loss.1.name", "'kdd'", LOSSES, "line 3"]),
        ("loss: [{weight: 1}]\n", "missing-key", ["loss.0.name", LOSSES]),
        ("cache: {logits: fp16}\n", "missing-key", ["cache.url", "line 1", "Folder of the cache"]),
        ("train: {lr: fast}\n", "wrong-value", ["train.lr", "'fast' (text)", "number"]),
        ("train: {epochs: 0}\n", "wrong-value", ["train.epochs", "got:      0", "greater than or equal to 1"]),
        ("train: {epochs: true}\n", "wrong-value", ["train.epochs", "line 1", "True (true/false)", "number"]),
        ("train: {clip_norm: false}\n", "wrong-value", ["train.clip_norm", "False (true/false)", "number"]),
        ("views: {area: [0.1, yes]}\n", "wrong-value", ["views.area.1", "True (true/false)", "number"]),
        ("loss: [{name: kd, temperature: true}]\n", "wrong-value", ["loss.0.temperature", "line 1", "number"]),
        ("train: 3\n", "wrong-value", ["train", "3 (a number)", "mapping"]),
        ("views:\n", "wrong-value", ["views", "null", "mapping"]),
        ("data: {shards: 3}\n", "wrong-value", ["data.shards", "text or list"]),
        ("data: {shards: [a, 1]}\n", "wrong-value", ["data.shards.1", "1 (a number)", "text"]),
        ("loss: {name: kd}\n", "wrong-value", ["loss", "a mapping", "list"]),
        (
            "views: {kind: evil}\n",
            "wrong-value",
            ["views.kind", "'evil'", "'eval', 'crop', 'function_matching' or 'scale_crop'"],
        ),
        ("views: {area: [2, 1]}\n", "conflicting-values", ["views", "area is [2.0, 1.0]", "0 < low <= high <= 1"]),
        ("views: {size: [224, 0]}\n", "wrong-value", ["views.size.1", "greater than or equal to 1"]),
        ("views: {size: [1, 2, 3]}\n", "wrong-value", ["views.size", "a list"]),
        ("views: {size: true}\n", "wrong-value", ["views.size", "True (true/false)", "number"]),
        ("views: {kind: scale_crop}\n", "conflicting-values", ["views.size is not given", "[512, 1024]"]),
        (
            "teacher: {mode: none}\nviews: {kind: eval}\nstudent: {model: timm/x, size: [32, 64]}\n",
            "conflicting-values",
            ["views.size is not given", "[32, 64]"],
        ),
        ("views: {scale: [0.5, 3]}\n", "conflicting-values", ["scale is given", "kind crop"]),
        ("views: {fill: [0, 0, 0]}\n", "conflicting-values", ["fill is given", "kind crop"]),
        (f"{SCALED}, area: [0.5, 1]}}\n", "conflicting-values", ["area is given", "kind scale_crop"]),
        (f"{SCALED}, scale: [2, 1]}}\n", "conflicting-values", ["scale is [2.0, 1.0]", "low <= high"]),
        (f"{SCALED}, scale: [0, 1]}}\n", "conflicting-values", ["scale is [0.0, 1.0]"]),
        (f"{SCALED}, scale: [0.5, 2, 0.4]}}\n", "conflicting-values", ["whole steps"]),
        (f"{SCALED}, cutmix: 0.5}}\n", "conflicting-values", ["cutmix needs partners"]),
        (f"{SCALED}, eval_box: letterbox, crop_fraction: 1}}\n", "conflicting-values", ["crop_fraction is given"]),
        ("student: {views: {kind: scale_crop}}\n", "conflicting-values", ["student", "crop or eval"]),
        ("cache: {url: x, logits: fp8}\n", "wrong-value", ["cache.logits", "logits is 'fp8'", "topk:k"]),
        ("views: {kind: eval, jitter: {}}\n", "conflicting-values", ["views", "never augmented, but jitter is set"]),
        ("views: {cutmix: 0.5}\n", "conflicting-values", ["views", "kind crop mixes nothing", "function_matching"]),
        ("views: {jitter: {hue: 0.6}}\n", "wrong-value", ["views.jitter.hue", "less than or equal to 0.5"]),
        ("views: {jitter: {hues: 0.1}}\n", "unknown-key", ["views.jitter.hues", "did you mean hue?"]),
        (
            "views: {jitter: {brightness: 0, contrast: 0, saturation: 0}}\n",
            "conflicting-values",
            ["views.jitter", "nothing is jittered"],
        ),
        ("views: {randaugment: {magnitude: 31}}\n", "wrong-value", ["magnitude", "less than or equal to 30"]),
        ("views: {erasing: {area: [0.5, 0.1]}}\n", "conflicting-values", ["views.erasing", "area is [0.5, 0.1]"]),
        ("views: {erasing: {fill: [0, 0, 256]}}\n", "wrong-value", ["views.erasing.fill.2", "equal to 255"]),
        ("teacher: {mean: [1, 2]}\n", "missing-key", ["teacher.mean.2"]),
        ("1: 2\n", "unknown-key", ["1", "line 1"]),
        ("ray: {resources_per_task: {GPU: 1}}\n", "wrong-value", ["cpus_per_task, gpus_per_task"]),
        ("ray: {resources_per_task: {spot: 0}}\n", "wrong-value", ["spot is 0"]),
        ("ray: {resources_per_task: {spot: 1.5}}\n", "wrong-value", ["spot is 1.5"]),
        ("ray: {resources_per_task: {spot: .inf}}\n", "wrong-value", ["finite"]),
        ("run: {url: '${nope.x}'}\n", "unresolved-value", ["run.url", "nope"]),
        ("run: {url: '???'}\n", "unresolved-value", ["run.url"]),
        ("train: {lr: 1, lr: 2}\n", "not-yaml", ["line 1, column 16", "duplicate key lr"]),
        ("train:\n  lr: [1,\n  epochs: 3\n", "not-yaml", ["line 4, column 1"]),
        ("a: b: c\n", "not-yaml", ["line 1, column 5"]),
        ("run: {url: !!python/object:os.system x}\n", "not-yaml", ["line 1, column 12"]),
        ("a: \x01\n", "not-yaml", ["special characters"]),
        ("", "empty", []),
        ("# nothing\n", "empty", []),
        ("- 1\n", "not-a-mapping", ["a list"]),
        ("train\n", "not-a-mapping", ["a single value"]),
        ("train: {}\n---\ntrain: {}\n", "several-documents", []),
    ],
)
def test_a_mistake_is_reported_with_its_code_and_its_position(
    yaml_file: Path, text: str, code: str, parts: list[str]
) -> None:
    error = refusal(yaml_file, text)
    assert error.code == f"config.{code}"
    assert str(yaml_file) in str(error.where)
    for part in parts:
        assert part in str(error)


def test_every_mistake_is_listed_with_its_line(yaml_file: Path) -> None:
    error = refusal(yaml_file, "train:\n  lr: fast\n  epoch: 3\nlos: []\nloss: [{name: kdd}]\n", "views.kind=evil")
    assert error.code == "config.several-problems"
    for line in (
        "train.lr, line 2: wrong value; got 'fast' (text); expected number",
        "train.epoch, line 3: unknown key; did you mean epochs?",
        "los, line 4: unknown key; did you mean loss?",
        "loss.0.name, line 5: unknown loss; got 'kdd'",
        "views.kind, override 'views.kind=evil': wrong value",
    ):
        assert line in str(error.got)
    assert len(str(error).splitlines()) <= 9


@pytest.mark.parametrize(
    ("override", "code", "parts"),
    [
        ("train.lr", "override-without-key", []),
        ("=3", "override-without-key", []),
        ("train..lr=3", "override-without-key", []),
        ("trian.lr=1", "unknown-key", ["trian", "did you mean train?"]),
        ("train.learning=1", "unknown-key", ["train.learning"]),
        ("train.lr=fast", "wrong-value", ["train.lr"]),
        ("train.lr=[1", "not-yaml", []),
        ("loss.7.weight=1", "override-list-item", []),
        ("loss.kd.weight=1", "override-list-item", []),
        ("loss={name: kd}", "wrong-value", ["a mapping"]),
        ("train.lr=${x", "override-interpolation", []),
    ],
)
def test_the_error_for_a_wrong_override_quotes_it(yaml_file: Path, override: str, code: str, parts: list[str]) -> None:
    error = refusal(yaml_file, TRAINING, override)
    assert error.code == f"config.{code}"
    assert f"override '{override}'" in str(error.where)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [("data.shards=${nope}", "unresolved-value", "data.shards"), ("train.lr.x=1", "wrong-value", "train.lr")],
)
def test_the_error_for_an_override_of_a_part_of_a_value_names_its_key(
    yaml_file: Path, override: str, code: str, key: str
) -> None:
    error = refusal(yaml_file, TRAINING, override)
    assert error.code == f"config.{code}"
    assert key in str(error)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{folder}/nowhere.yaml", "storage.missing-file"),
        ("{folder}", "storage.is-folder"),
        ("pipe:cat /etc/passwd", "storage.refused-url"),
        ("{folder}/train.yaml", "storage.too-large"),
    ],
)
def test_the_error_for_a_document_that_cannot_be_read_names_it_and_the_cause(
    source: str, cause: str, yaml_file: Path
) -> None:
    with yaml_file.open("wb") as file:
        file.truncate(100 << 30)  # zeros that take no disk space: reading them would fill the memory
    source = source.format(folder=yaml_file.parent)
    with raises("config.unreadable", ConfigError, where=source) as caught:
        load_config(source)
    assert isinstance(caught.value.__cause__, StorageInputError)
    assert caught.value.__cause__.code == cause


def test_bytes_that_are_not_text_are_refused(yaml_file: Path) -> None:
    yaml_file.write_bytes(b"train: \xff\xfe")
    with raises("config.not-utf8", ConfigError):
        load_config(str(yaml_file))


def test_no_message_shows_the_credentials_of_a_url(yaml_file: Path) -> None:
    secret = "s3://key:secret@bucket/x?token=secret"
    for text, override in (
        (f"train: {{lr: '{secret}'}}\n", "train.epochs=1"),
        ("train: {}\n", f"train.lr={secret}"),
        ("train: {}\n", f"train.lr=[s3://a/b,{secret}]"),
        ("train: {}\n", secret),
    ):
        assert "secret" not in str(refusal(yaml_file, text, override))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/name:os.mkdir", "!!python/tuple [1]"])
def test_yaml_creates_plain_values_only(tag: str, yaml_file: Path, tmp_path: Path) -> None:
    value = tag.format(tmp_path / "made")
    for text, override in ((f"data:\n  shards: {value}\n", "train.lr=1"), ("data: {}\n", f"data.shards={value}")):
        error = refusal(yaml_file, text, override)
        assert error.code == "config.not-yaml"
        assert "could not determine a constructor for the tag" in str(error.got)
    assert not (tmp_path / "made").exists()
    if "mkdir [" in tag:
        yaml.unsafe_load(value)  # the same text is dangerous to a loader that trusts it
        assert (tmp_path / "made").exists()


def test_exponentially_growing_aliases_are_refused_before_they_are_followed(yaml_file: Path) -> None:
    levels = "".join(f"    a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 60))
    assert refusal(yaml_file, f"teacher:\n  kwargs:\n    a0: &a0 [x]\n{levels}").code == "config.too-large"


@pytest.mark.parametrize("text", [slow(f"data: {'[' * 2000}{']' * 2000}\n"), "data: &here {shards: *here}\n"])
def test_too_deep_nesting_is_refused(text: str, yaml_file: Path) -> None:
    assert refusal(yaml_file, text).code == "config.too-deep"


def test_long_values_are_shortened_in_messages(yaml_file: Path) -> None:
    assert len(str(refusal(yaml_file, f"train: {{lr: {'x' * 5000}}}\n"))) < 500


def test_a_tree_is_checked_like_a_document() -> None:
    assert build_config({"train": {"lr": 1}}, where="demo").train.lr == 1
    with raises("config.unknown-key", ConfigError, where="demo", next_step="did you mean lr?"):
        build_config({"train": {"lrr": 1}}, where="demo")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
NAMES = st.sampled_from([*Config.model_fields, "name", "url", "lr", "weight", "kind", "kd"]) | st.text(max_size=4)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@settings(max_examples=50, deadline=None)
@given(tree=st.dictionaries(NAMES, TREES, max_size=4))
def test_any_tree_is_a_config_or_a_config_error(tree: dict[str, Any]) -> None:
    try:
        build_config(tree, where="x")
    except ConfigError as error:
        message = str(error)
    else:
        return
    assert "pydantic" not in message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab:[]{}-'\"&*!%#\n $?,0"), max_size=25), override=st.text("ab.=[]{}: $01", max_size=9)
)
def test_any_text_is_a_config_or_a_config_error(yaml_file: Path, text: str, override: str) -> None:
    for overrides in ([], [override]):
        with contextlib.suppress(ConfigError):
            assert isinstance(load(yaml_file, text, *overrides), Config)


def test_require_names_each_missing_key_and_its_description() -> None:
    config = build_config({"cache": {"url": "memory://x"}}, where="x")
    require(config, "cache.url", "views", "train.lr", command="stillroom cache build")
    with raises("config.missing-key", ConfigError) as caught:
        require(config, "cache.url", "teacher.model", "run.url", "loss", command="stillroom train")
    message = str(caught.value)
    assert "teacher.model: timm/NAME" in message
    assert f"loss: a list of terms, named {LOSSES}" in message
    assert "teacher.model=… run.url=… loss=…" in message
    assert "cache.url" not in message
