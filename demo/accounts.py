"""The sign-ins that the demo makes for whoever sits in front of it: one rater, one manager."""

import json
import os
from collections.abc import Sequence

from django.utils.crypto import get_random_string

from annotation.models import Membership, Project, User
from annotation.services.projects import membership_add, user_create
from demo.state import demo_folder

ROLES = {"demo-rater": Membership.Role.RATER, "demo-manager": Membership.Role.MANAGER}
FILE = "sign-ins.json"


def sign_ins(projects: Sequence[Project]) -> dict[str, str]:
    """{user name: password} of a rater and a manager of these projects, the same at each call.

    Passwords are random and kept in `var/demo/sign-ins.json`, readable by its owner alone. One that was changed on the site is left
    as it is and told as "".
    """
    known = _read()
    for name, role in ROLES.items():
        user = User.objects.filter(username=name).first()
        if user is None:
            user, known[name] = user_create(username=name, password=known.get(name) or get_random_string(14))
            if role == Membership.Role.MANAGER:  # of this machine's demo, with the admin console
                user.is_staff = user.is_superuser = True
                user.save(update_fields=["is_staff", "is_superuser"])
        for project in projects:
            membership_add(project=project, user=user, role=role)
        if not user.check_password(known.get(name, "")):
            known[name] = ""
    _write(known)
    return {name: known[name] for name in ROLES}


def _read() -> dict[str, str]:
    try:
        return json.loads((demo_folder() / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _write(known: dict[str, str]) -> None:
    path = demo_folder() / FILE
    path.unlink(missing_ok=True)  # its mode is only set when it is made
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        json.dump(known, stream, indent=2)
