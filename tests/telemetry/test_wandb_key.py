"""Whether a run is online: wandb's own way to find a key, in a home made for the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.errors import ConfigError
from rlhf_dist.telemetry.wandb_key import has_wandb_key, wandb_mode, why_offline

KEY = "0123456789" * 4
OWN = "local-" + KEY
VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE", "NETRC")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(home: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)


@pytest.mark.parametrize(
    ("variables", "files", "found"),
    [
        ({}, {}, False),
        ({"WANDB_API_KEY": KEY}, {}, True),
        ({}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}, True),
        ({}, {"_netrc": f"machine api.wandb.ai login user password {KEY}"}, True),
        ({"NETRC": "elsewhere"}, {"elsewhere": f"machine api.wandb.ai login user password {KEY}"}, True),
        ({"NETRC": "elsewhere"}, {".netrc": f"machine api.wandb.ai login user password {KEY}"}, False),
        ({}, {".netrc": f"machine example.org login user password {KEY}"}, False),
        # A server of one's own, named by a variable or a settings file; its port is part of its name.
        ({"WANDB_BASE_URL": "http://localhost:80"}, {".netrc": f"machine localhost:80 login u password {OWN}"}, True),
        ({"WANDB_BASE_URL": "http://localhost:80"}, {".netrc": f"machine api.wandb.ai login u password {KEY}"}, False),
        (
            {},
            {
                ".config/wandb/settings": "[default]\nbase_url = https://wandb.example.org\n",
                ".netrc": f"machine wandb.example.org login user password {OWN}",
            },
            True,
        ),
        (
            {},
            {
                "wandb/settings": "[default]\nbase_url = https://wandb.example.org\n",
                ".netrc": f"machine api.wandb.ai login user password {KEY}",
            },
            False,
        ),
    ],
)
def test_a_key_is_found_where_wandb_looks(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], files: dict[str, str], found: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write(home, files)
    assert has_wandb_key() == found


def test_a_key_for_the_default_server_that_this_wandb_has_counts(home: Path) -> None:
    from wandb.sdk.lib.urls import DEFAULT_BASE_URL

    write(home, {".netrc": f"machine {DEFAULT_BASE_URL.removeprefix('https://')} login user password {KEY}"})
    assert wandb_mode(TelemetryConfig()) == "online"


@pytest.mark.parametrize(
    ("variables", "files", "told"),
    [
        ({}, {".netrc": "machine api.wandb.ai\n  lagin not-a-key\n"}, r"\.netrc:2: not a valid netrc line"),
        ({}, {".netrc/file": ""}, ""),
        ({"NETRC": "~nobody-of-this-name/x"}, {}, ""),
        ({"WANDB_API_KEY": "not-a-key"}, {}, r"WANDB_API_KEY invalid: .* 40\+ characters, has 5.*wandb=offline"),
        ({"WANDB_BASE_URL": "not-a-key"}, {}, r"WANDB_BASE_URL, .*: Input should be a valid URL"),
        ({"WANDB_BASE_URL": "http://u:not-a-key@wandb.ai"}, {}, r"WANDB_BASE_URL, .*: not the address of a server"),
    ],
)
def test_what_is_malformed_is_named_and_not_quoted(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], files: dict[str, str], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write(home, files)
    if not told:
        assert not has_wandb_key(), "there is no netrc file"
        return
    with pytest.raises(ConfigError, match=told) as raised:
        has_wandb_key()
    assert "not-a-key" not in str(raised.value) and "lagin" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "variables", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ("off", {"WANDB_API_KEY": KEY}, "off"),
        ("online", {"WANDB_API_KEY": KEY}, "online"),
    ],
)
def test_the_mode(monkeypatch: pytest.MonkeyPatch, given: str, variables: dict[str, str], mode: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(TelemetryConfig(wandb=given)) == mode  # pyright: ignore[reportArgumentType]


def test_online_without_a_key_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.wandb is online, but there is no wandb key"):
        wandb_mode(TelemetryConfig(wandb="online"))


def test_why_a_run_is_offline_is_said_where_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_offline(TelemetryConfig(), "offline") == "there is no wandb key"
    assert why_offline(TelemetryConfig(wandb="offline"), "offline") == why_offline(TelemetryConfig(), "off") == ""
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert why_offline(TelemetryConfig(), "offline") == ""
    monkeypatch.setenv("WANDB_MODE", "online")
    assert why_offline(TelemetryConfig(), wandb_mode(TelemetryConfig())) == "there is no wandb key"


def test_an_empty_mode_is_none_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    assert wandb_mode(TelemetryConfig()) == "offline" and "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError, match=r"^WANDB_MODE is 'of'; it must be online, offline, .* or not set$"):
        wandb_mode(TelemetryConfig())
