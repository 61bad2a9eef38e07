"""Reads Rankloop's settings from environment variables, and refuses an unsafe production start.

No Django here: `config/settings.py` calls these functions, and tests call them without a Django process.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


class EnvironmentRefused(SystemExit):
    """The environment would start Rankloop in a way that is not safe or not possible; the text says what to set."""


def read_bool(environ: Mapping[str, str], name: str, default: bool) -> bool:
    value = environ.get(name)
    if value is None:
        return default
    if value.strip().lower() in TRUE:
        return True
    if value.strip().lower() in FALSE:
        return False
    raise EnvironmentRefused(f"{name}={value!r} is neither yes nor no: use 1 or 0.")


def read_list(environ: Mapping[str, str], name: str) -> list[str]:
    return [part.strip() for part in environ.get(name, "").split(",") if part.strip()]


def state_folder(environ: Mapping[str, str], project_folder: Path) -> Path:
    """The one folder that holds everything Rankloop writes: `RANKLOOP_VAR`, or `var/` beside manage.py."""
    folder = Path(environ.get("RANKLOOP_VAR") or project_folder / "var").expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentRefused(f"Cannot make the state folder {folder}: {error}. Set RANKLOOP_VAR.") from error
    return folder


def generated_secret(folder: Path) -> str:
    """A secret made once for this machine and kept, readable by its owner alone, in the state folder."""
    path = folder / "secret_key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_urlsafe(50))
    return path.read_text().strip()


def check_production(environ: Mapping[str, str], debug: bool, allowed_hosts: list[str]) -> None:
    """Raise EnvironmentRefused, naming every fault at once, if a production start would be unsafe."""
    faults = []
    secret = environ.get("RANKLOOP_SECRET_KEY", "")
    if debug:
        faults.append("RANKLOOP_DEBUG is on: unset it, or set RANKLOOP_DEBUG=0")
    if len(secret) < 32 or secret.startswith("django-insecure"):
        faults.append("RANKLOOP_SECRET_KEY is missing or weak: set it to 50 random characters and keep it secret")
    if not allowed_hosts or "*" in allowed_hosts:
        faults.append("RANKLOOP_ALLOWED_HOSTS names no host: set it, e.g. RANKLOOP_ALLOWED_HOSTS=rank.example.org")
    if faults:
        raise EnvironmentRefused("Rankloop does not start in production mode:\n- " + "\n- ".join(faults))
