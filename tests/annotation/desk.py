"""A small project with people and prompts, for tests of the rater's side."""

from datetime import timedelta
from typing import Any

from django.utils import timezone

from annotation.models import Completion, Lease, Membership, Project, Prompt, User
from annotation.services.prompts import prompts_add

POLICY = "secret-policy"


def person(name: str, **fields: Any) -> User:
    """Signs in by `force_login`: hashing a password takes a third of a second."""
    return User.objects.create_user(username=name, **fields)


def project(slug: str = "desk", **fields: Any) -> Project:
    return Project.objects.create(slug=slug, name=slug.title(), **{"overlap": 2, **fields})


def member(of: Project, name: str, role: str = "rater") -> User:
    user = User.objects.filter(username=name).first() or person(name)
    Membership.objects.create(project=of, user=user, role=role)
    return user


def prompts(of: Project, number: int = 3, texts: int = 4, **fields: Any) -> list[Prompt]:
    items = [
        {
            "key": f"secret-key-{index}",
            "messages": [{"role": "user", "content": f"Question {index}?"}],
            "completions": [
                {"text": f"Answer {letter} to question {index}.", "policy": f"{POLICY}-{letter}", "run": "secret-run"}
                for letter in "abcdefghijklmnop"[:texts]
            ],
            **fields,
        }
        for index in range(number)
    ]
    prompts_add(project=of, items=items)
    return list(Prompt.objects.filter(project=of))


def run_out(lease: Lease) -> None:
    """Let the lease's time end a minute ago."""
    Lease.objects.filter(pk=lease.pk).update(expires_at=timezone.now() - timedelta(minutes=1))


def in_order(lease: Lease) -> list[list[str]]:
    """Bands that rank the cards as they lie on the screen."""
    return [[uid] for uid in lease.displayed]


def uids(prompt: Prompt) -> set[str]:
    return {str(uid) for uid in Completion.objects.filter(prompt=prompt).values_list("uid", flat=True)}
