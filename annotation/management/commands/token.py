"""`manage.py token USER`: print a user's API token."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError
from rest_framework.authtoken.models import Token

from annotation.errors import Refused
from annotation.models import Project, User
from annotation.services.projects import membership_add, user_create


class Command(BaseCommand):
    help = "Print the API token of a user; made on the first call, the same afterwards."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("user", help="user name")
        parser.add_argument("--create-rater", metavar="PROJECT", help="make the user if need be, and a rater of this project")
        parser.add_argument("--renew", action="store_true", help="make the old token worthless and print a new one")

    def handle(self, *args: Any, user: str, create_rater: str | None, renew: bool, **options: Any) -> None:
        try:
            found = _user(user, create_rater)
        except Refused as error:
            raise CommandError(error.message) from error
        if not found.is_active:
            raise CommandError(f"{found.username} cannot sign in, so a token would be of no use ({found.kind}, inactive).")
        if renew:
            Token.objects.filter(user=found).delete()
        token, _ = Token.objects.get_or_create(user=found)
        self.stdout.write(token.key)


def _user(name: str, slug: str | None) -> User:
    found = User.objects.filter(username=name).first()
    if slug is None:
        if found is None:
            raise Refused("user_unknown", f"There is no user {name!r}. Add --create-rater PROJECT to make one.", 404)
        return found
    project = Project.objects.filter(slug=slug).first()
    if project is None:
        raise Refused("project_unknown", f"There is no project {slug!r}: see `manage.py project list`.", 404)
    user = found or user_create(username=name)[0]
    if not project.memberships.filter(user=user).exists():
        membership_add(project=project, user=user)
    return user
