"""Create projects and say who belongs to them."""

from collections.abc import Sequence
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils.crypto import get_random_string

from annotation.content import ContentRefused, text_checked
from annotation.errors import Refused
from annotation.models import Membership, Project, User

MAX_CRITERIA = 12
MAX_CRITERION_CHARACTERS = 80


def criteria_checked(criteria: Any) -> list[str]:
    """Names of criteria: distinct, short, not blank. Raises: Refused."""
    if not isinstance(criteria, list | tuple) or len(criteria) > MAX_CRITERIA:
        raise Refused("criteria_invalid", f"Criteria must be a list of at most {MAX_CRITERIA} names.")
    try:
        names = [text_checked(name, "a criterion", limit=MAX_CRITERION_CHARACTERS).strip() for name in criteria]
    except ContentRefused as error:
        raise Refused("criteria_invalid", f"Criteria: {error}.") from error
    if not all(names) or len(set(names)) != len(names):
        raise Refused("criteria_invalid", "Criteria must be names that differ from each other and are not blank.")
    return names


def project_create(*, slug: str, name: str = "", criteria: Sequence[str] = (), **fields: Any) -> Project:
    """Create a project. `fields`: guidelines, overlap, lease_seconds, ties_allowed, held_out_percent, is_open.

    Raises: Refused when the slug is taken or a value is not allowed; the message names the field.
    """
    project = Project(slug=slug, name=name or slug, criteria=criteria_checked(list(criteria)), **fields)
    try:
        project.full_clean()
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise Refused("project_invalid", f"Project {slug!r}: {field.strip('_')}: {messages[0]}") from error
    try:
        with transaction.atomic():
            project.save(force_insert=True)
    except IntegrityError as error:
        raise Refused("project_exists", f"There is a project {slug!r} already.", status=409) from error
    return project


def project_open(*, project: Project, is_open: bool) -> None:
    """Open a project to raters, or close it; work that is leased at that moment may still be submitted."""
    project.is_open = is_open
    project.save(update_fields=["is_open"])


def membership_add(*, project: Project, user: User, role: str = Membership.Role.RATER) -> Membership:
    """Make `user` a member in `role`, or change the role of a member."""
    if role not in Membership.Role.values:
        raise Refused("role_unknown", f"There is no role {role!r}: use one of {', '.join(Membership.Role.values)}.")
    return Membership.objects.update_or_create(project=project, user=user, defaults={"role": role})[0]


def membership_remove(*, project: Project, user: User) -> bool:
    """Take `user` out of the project; rankings stay. Returns whether there was a membership."""
    return bool(Membership.objects.filter(project=project, user=user).delete()[0])


def user_create(*, username: str, password: str | None = None, kind: str = User.Kind.HUMAN, **fields: Any) -> tuple[User, str]:
    """Create a user; a human without a given password gets one made up. Returns (user, password, "" where none can be used).

    Raises: Refused when the name is taken or not allowed.
    """
    username = User.normalize_username(username)
    if kind == User.Kind.HUMAN:
        password = password or get_random_string(14)
    user = User(username=username, kind=kind, **fields)
    user.set_password(password)
    try:
        user.full_clean(exclude=["password"])
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise Refused("user_invalid", f"User {username!r}: {field.strip('_')}: {messages[0]}") from error
    user.save(force_insert=True)
    return user, password or ""
