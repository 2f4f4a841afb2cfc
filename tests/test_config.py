"""Settings: where they come from, which wins, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import SettingsError
from schemas.settings import Settings
from tokentape.config import example, load


def test_the_example_file_is_in_step_and_holds_the_defaults(tmp_path: Path) -> None:
    """The committed example is what the models say, and loading it changes nothing."""
    committed = Path("tokentape.example.toml")

    assert example() == committed.read_text(encoding="utf-8")
    assert Settings() == load(file=committed, environ={})


def test_flags_beat_variables_beat_the_file(tmp_path: Path) -> None:
    """Each later source wins over the one before."""
    file = tmp_path / "t.toml"
    file.write_text("tenant = 'file'\n[gateway]\nport = 1\nhost = 'file'\n")

    settings = load(file=file, environ={"TOKENTAPE_GATEWAY__PORT": "2", "TOKENTAPE_TENANT": "variable"}, overrides=["gateway.port=3"])

    assert ("variable", "file", 3) == (settings.tenant, settings.gateway.host, settings.gateway.port)


@pytest.mark.parametrize(
    ("override", "fault", "hint"),
    [
        ("log.knd=kafka", "unknown setting 'knd'", "did you mean 'kind'?"),
        ("lgo.kind=kafka", "unknown setting 'lgo'", "did you mean 'log'?"),
        ("gateway.port=99999", "less than or equal to 65535", "tokentape.example.toml"),
        ("log.kind=redis", "'embedded', 'kafka' or 'confluent'", "tokentape.example.toml"),
        ("data.x=1", "'data' is no section", "valid sections: log"),
        ("nonsense", "--set takes key=value", "--set log.kind=kafka"),
    ],
)
def test_a_wrong_flag_is_told_what_is_valid(override: str, fault: str, hint: str) -> None:
    """The message names the fault and the hint names the cure."""
    with pytest.raises(SettingsError) as caught:
        load(overrides=[override], environ={})

    assert fault in str(caught.value)
    assert hint in caught.value.hint


def test_a_wrong_variable_is_named() -> None:
    """A misspelt variable is an error, not a setting that silently does nothing."""
    with pytest.raises(SettingsError, match=r"unknown setting 'prot' \(TOKENTAPE_GATEWAY__PROT\)"):
        load(environ={"TOKENTAPE_GATEWAY__PROT": "1"})


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    """The same for the file."""
    file = tmp_path / "t.toml"
    file.write_text("[gateway]\nprot = 1\n")

    with pytest.raises(SettingsError, match=r"unknown setting 'prot' \(gateway.prot\)"):
        load(file=file, environ={})


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    """A syntax error says where."""
    file = tmp_path / "t.toml"
    file.write_text("[gateway\n")

    with pytest.raises(SettingsError, match=r"read settings: not TOML: .*line 1.*t\.toml"):
        load(file=file, environ={})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a directory are one clear line."""
    with pytest.raises(SettingsError, match="No such file"):
        load(file=tmp_path / "none.toml", environ={})
    with pytest.raises(SettingsError, match="Is a directory"):
        load(file=tmp_path, environ={})


def test_a_wrong_secret_is_not_printed(tmp_path: Path) -> None:
    """The value of a key never stands in a message."""
    file = tmp_path / "t.toml"
    file.write_text("[cold]\nsecret_key = ['hunter2']\n")

    with pytest.raises(SettingsError) as caught:
        load(file=file, environ={})

    assert "hunter2" not in str(caught.value)
