"""Production refuses an unsafe start and says what to set; state goes where RANKLOOP_VAR says."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from config.environment import EnvironmentRefused, check_production, generated_secret, read_bool, state_folder

HOUSE = Path(__file__).resolve().parent.parent.parent
SAFE = {"RANKLOOP_SECRET_KEY": "k" * 40 + "0123456789"}


def start(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RANKLOOP_") and name != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=HOUSE,
        env={**kept, "RANKLOOP_VAR": str(tmp_path / "state"), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_fault_of_a_production_start_is_named_at_once() -> None:
    with pytest.raises(EnvironmentRefused) as refusal:
        check_production({}, debug=True, allowed_hosts=[])
    text = str(refusal.value)
    assert "RANKLOOP_DEBUG=0" in text and "RANKLOOP_SECRET_KEY" in text and "RANKLOOP_ALLOWED_HOSTS" in text


@pytest.mark.parametrize("hosts", [[], ["*"]])
def test_production_needs_named_hosts(hosts: list[str]) -> None:
    with pytest.raises(EnvironmentRefused, match="ALLOWED_HOSTS"):
        check_production(SAFE, debug=False, allowed_hosts=hosts)


def test_production_refuses_a_default_secret() -> None:
    with pytest.raises(EnvironmentRefused, match="SECRET_KEY"):
        check_production({"RANKLOOP_SECRET_KEY": "django-insecure-" + "x" * 50}, debug=False, allowed_hosts=["a.example"])


def test_a_safe_production_environment_passes() -> None:
    check_production(SAFE, debug=False, allowed_hosts=["a.example"])


def test_a_word_that_is_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(EnvironmentRefused, match="neither yes nor no"):
        read_bool({"RANKLOOP_DEBUG": "perhaps"}, "RANKLOOP_DEBUG", False)


def test_the_generated_secret_is_kept_and_private(tmp_path: Path) -> None:
    first = generated_secret(tmp_path)
    assert first == generated_secret(tmp_path) and len(first) > 40
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600


def test_state_moves_by_one_variable(tmp_path: Path) -> None:
    assert state_folder({"RANKLOOP_VAR": str(tmp_path / "elsewhere")}, HOUSE) == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()


def test_a_state_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentRefused, match="RANKLOOP_VAR"):
        state_folder({"RANKLOOP_VAR": str(tmp_path / "file" / "under")}, HOUSE)


def test_the_process_really_refuses_and_really_starts(tmp_path: Path) -> None:
    refused = start(tmp_path, RANKLOOP_ENV="production", RANKLOOP_DEBUG="1")
    assert refused.returncode != 0 and "RANKLOOP_SECRET_KEY" in refused.stderr
    started = start(tmp_path, RANKLOOP_ENV="production", RANKLOOP_ALLOWED_HOSTS="rank.example.org", **SAFE)
    assert started.returncode == 0, started.stderr
    assert start(tmp_path, RANKLOOP_ENV="staging").returncode != 0
