"""API keys: what is one, where they are read from, and what opens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.keys import KEYS_VARIABLE, Keys, Unauthenticated
from experts.errors import ConfigError

KEY, OTHER = "k" * 20, "another-key-of-ours"


def test_every_key_opens_and_nothing_else_does() -> None:
    keys = Keys([KEY, OTHER])
    for opens in (f"Bearer {KEY}", f"bearer {OTHER}", f"BEARER  {KEY} "):
        keys.check(opens)
    for refused in (None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
        with pytest.raises(Unauthenticated):
            keys.check(refused)


@given(st.text(max_size=64))
def test_no_text_but_a_key_opens(text: str) -> None:
    with pytest.raises(Unauthenticated):
        Keys([KEY]).check(f"Bearer {text}")


def test_without_keys_everything_is_open() -> None:
    Keys(()).check(None)
    assert not Keys(()).are_wanted


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEY}\n")
    file.chmod(0o600)
    keys = Keys.read(str(file), {KEYS_VARIABLE: f" {OTHER} ,"})
    keys.check(f"Bearer {KEY}")
    keys.check(f"Bearer {OTHER}")


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.read(str(file), {})


@pytest.mark.parametrize("environment", [{}, {KEYS_VARIABLE: " , "}])
def test_keys_that_are_wanted_and_not_there_are_said(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=KEYS_VARIABLE):
        Keys.read(None, environment)


@pytest.mark.parametrize(
    "key", ["short", "x" * 513, "with a blank in it", "größer-als-ascii-ist", "line\nbreak-in-the-key"]
)
def test_what_is_no_secret_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Keys([key])
    assert key not in str(caught.value)
