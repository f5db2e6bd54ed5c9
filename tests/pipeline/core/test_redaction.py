"""No output shows a credential of a URL: not errors, echoed values, or the command that resumes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.entry import run_command
from pipeline.core.errors import StillroomError
from pipeline.core.redaction import redact, redact_text

SECRET = "HUSH4711"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host/a?X-Amz-Signature=secret#secret", "https://host/a"),
        ("https://user:sec@ret@host", "https://host"),
        ("https://host/a@b", "https://host/a@b"),
        ("http://host:8265/a@b", "http://host:8265/a@b"),
        ("http://[::1]:8265/a@b", "http://[::1]:8265/a@b"),
        ("hf://datasets/user/name@revision/a", "hf://datasets/user/name@revision/a"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("abfss://container:secret@account/a", "abfss://account/a"),
        # Secret keys of S3 contain slashes.
        ("s3://key:sec/ret@bucket/a", "s3://bucket/a"),
        ("s3://key:sec?ret@bucket/a", "s3://bucket/a"),
        ("folder/a?b", "folder/a?b"),
    ],
)
def test_redaction_drops_user_password_query_and_fragment(url: str, shown: str) -> None:
    assert redact(url) == shown


@given(user=st.text("abc:@", min_size=1), query=st.text("abc=&?#@/"))
def test_redaction_leaves_host_and_path(user: str, query: str) -> None:
    assert redact(f"https://{user}@host/path?{query}") == "https://host/path"


@settings(max_examples=60)
@given(
    before=st.text("ab:/[{,.= \n'", max_size=8),
    # Two slashes at the start would make the user a URL.
    password=st.text("ab/?#@+=,", max_size=8)
    .filter(lambda text: not text.startswith("//"))
    .map(lambda text: text + SECRET),
    query=st.text("ab:/?#@+=,", max_size=8),
)
def test_no_part_of_a_secret_stays_in_a_text(before: str, password: str, query: str) -> None:
    text = f"{before}[s3://a/b.tar,s3://user:{password}@bucket/c,https://host/d?{query}{SECRET}] end"
    shown = redact_text(text)
    assert SECRET not in shown
    assert "bucket/c" in shown
    assert shown.endswith("end")


@given(text=st.text("ab:/.@?#, ", max_size=30).filter(lambda text: "://" not in text))
def test_a_text_without_urls_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


def test_no_field_of_an_error_shows_credentials_here_or_in_another_process() -> None:
    url = f"[s3://a/b,s3://user:{SECRET}@c/d?sig={SECRET}]"
    error = StillroomError(url, where=url, got=[url], expected={"a": url}, next_step=url)
    for shown in (error, pickle.loads(pickle.dumps(error))):
        assert SECRET not in str(shown)
        assert str(shown).count("s3://c/d") == 5


def test_the_command_that_resumes_shows_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    override = f"data.shards=https://user:{SECRET}@host/a.tar?sig={SECRET}"
    assert run_command(interrupted, resume=f"stillroom train a.yaml {override} train.epochs=3") == 130
    shown = capsys.readouterr().err
    assert SECRET not in shown
    assert "resume with: stillroom train a.yaml data.shards=https://host/a.tar train.epochs=3" in shown
