"""The people's side of the loop: projects, prompts, completions, leases, rankings and snapshots.

A prompt row is one question to the raters: chat messages, and the completions that are shown together. The same messages
may come back in a later round with new completions, as a new row; they share the `digest`, and so the split.

A lease row is one of a prompt's `overlap` slots. The rows are made when the prompt opens to raters and none is made later, each is
unique by (prompt, slot), and a rater appears once per prompt: the database itself makes more rankings than slots impossible.
"""

import uuid
from typing import Any

from django.contrib.auth.models import AbstractUser
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

MAX_COMPLETIONS = 16


class User(AbstractUser):
    """A person who signs in, or the author of rankings that were loaded or simulated (and never signs in)."""

    class Kind(models.TextChoices):
        HUMAN = "human", "human"
        IMPORTED = "imported", "imported"
        SIMULATED = "simulated", "simulated"

    kind = models.CharField(max_length=12, choices=Kind.choices, default=Kind.HUMAN)


class Project(models.Model):
    slug = models.SlugField(max_length=80, unique=True)
    name = models.CharField(max_length=200)
    guidelines = models.TextField(blank=True, help_text="Markdown. Shown to raters on the ranking page.")
    criteria = models.JSONField(
        default=list, blank=True, help_text='Names ranked besides the overall order, for example ["helpful", "honest"].'
    )
    overlap = models.PositiveSmallIntegerField(
        default=3, validators=[MinValueValidator(1), MaxValueValidator(100)], help_text="Raters for each prompt."
    )
    lease_seconds = models.PositiveIntegerField(default=1800, validators=[MinValueValidator(30), MaxValueValidator(86_400)])
    ties_allowed = models.BooleanField(default=True)
    held_out_percent = models.PositiveSmallIntegerField(
        default=10,
        validators=[MaxValueValidator(90)],
        help_text="Share of prompts kept out of training, chosen by hash of the prompt. Fixed once prompts are in.",
    )
    is_open = models.BooleanField(default=True, help_text="Closed projects hand out no prompts.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(condition=Q(overlap__gte=1), name="project_overlap_at_least_one"),
            models.CheckConstraint(condition=Q(held_out_percent__lte=90), name="project_keeps_training_prompts"),
        ]

    def __str__(self) -> str:
        return self.name


class MembershipQuerySet(models.QuerySet["Membership"]):
    def role_of(self, user: Any, project: Project) -> str | None:
        return self.filter(user=user, project=project).values_list("role", flat=True).first()


class Membership(models.Model):
    class Role(models.TextChoices):
        RATER = "rater", "rater"
        REVIEWER = "reviewer", "reviewer"
        MANAGER = "manager", "manager"

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=12, choices=Role.choices, default=Role.RATER)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = MembershipQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "user"], name="membership_once")]

    def __str__(self) -> str:
        return f"{self.user} is {self.role} of {self.project}"


class Prompt(models.Model):
    class Split(models.TextChoices):
        TRAIN = "train", "train"
        HELD_OUT = "held_out", "held out"

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="prompts")
    key = models.CharField(max_length=200, help_text="Identity inside the project: the file's id, or a digest of the content.")
    messages = models.JSONField(help_text='[{"role": "user", "content": "..."}, ...]')
    digest = models.CharField(max_length=64, db_index=True, help_text="SHA-256 of the messages; decides the split.")
    split = models.CharField(max_length=8, choices=Split.choices)
    round = models.PositiveIntegerField(default=0, help_text="0 for loaded prompts; n for outputs that round n wrote.")
    overlap = models.PositiveSmallIntegerField(help_text="Slots of this prompt; at first the project's overlap.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["id"]
        constraints = [models.UniqueConstraint(fields=["project", "key"], name="prompt_key_once")]
        indexes = [models.Index(fields=["project", "round", "id"], name="prompt_queue")]

    def __str__(self) -> str:
        return f"{self.project_id}/{self.key}"


class Completion(models.Model):
    """One text for a prompt, and where it came from. Where it came from is never sent to a rater."""

    uid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False, help_text="The only name raters' pages see.")
    prompt = models.ForeignKey(Prompt, on_delete=models.CASCADE, related_name="completions")
    text = models.TextField(blank=True, help_text="Blank only in statistics-only data, which is never shown to raters.")
    policy = models.CharField(max_length=200, blank=True, help_text="The policy, system or person that wrote the text.")
    run = models.CharField(max_length=100, blank=True, help_text="The run that generated the text.")
    sampling = models.JSONField(default=dict, blank=True, help_text="Temperature, seed, token counts, ...")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return self.text[:60]


class Lease(models.Model):
    """One slot of a prompt: free, held by one rater until `expires_at`, or done for good with that rater's ranking.

    `token` names one grant of the slot, and changes with every grant: a submit under an old grant cannot land in a new one.
    """

    class State(models.TextChoices):
        FREE = "free", "free"
        HELD = "held", "held"
        DONE = "done", "done"

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="leases")
    prompt = models.ForeignKey(Prompt, on_delete=models.CASCADE, related_name="leases")
    slot = models.PositiveSmallIntegerField()
    state = models.CharField(max_length=4, choices=State.choices, default=State.FREE)
    rater = models.ForeignKey(User, on_delete=models.PROTECT, null=True, blank=True, related_name="leases")
    token = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    displayed = models.JSONField(default=list, blank=True, help_text="Completion uids in the order shown on screen.")
    granted_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["prompt", "slot"], name="lease_one_per_slot"),
            models.UniqueConstraint(fields=["prompt", "rater"], name="lease_one_per_rater"),
            models.CheckConstraint(
                condition=Q(state="free", rater__isnull=True) | Q(state__in=["held", "done"], rater__isnull=False),
                name="lease_rater_matches_state",
            ),
            models.CheckConstraint(condition=~Q(state="held") | Q(expires_at__isnull=False), name="lease_held_has_an_end"),
        ]
        indexes = [
            models.Index(fields=["project", "prompt", "slot"], name="lease_open", condition=~Q(state="done")),
            models.Index(fields=["rater", "state"], name="lease_of_rater"),
        ]

    def __str__(self) -> str:
        return f"prompt {self.prompt_id} slot {self.slot}: {self.state}"


class Skip(models.Model):
    """A rater's decision not to rank a prompt; the slot goes to somebody else, and never back to this rater."""

    class Reason(models.TextChoices):
        UNCLEAR = "unclear", "The prompt is unclear"
        EXPERTISE = "expertise", "I do not know enough about this"
        ALL_BAD = "all_bad", "No completion can be judged"
        DISTURBING = "disturbing", "I do not want to read this"
        OTHER = "other", "Other"

    prompt = models.ForeignKey(Prompt, on_delete=models.CASCADE, related_name="skips")
    rater = models.ForeignKey(User, on_delete=models.CASCADE, related_name="skips")
    reason = models.CharField(max_length=12, choices=Reason.choices)
    comment = models.TextField(blank=True, max_length=4000)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["prompt", "rater"], name="skip_once")]


class RankingQuerySet(models.QuerySet["Ranking"]):
    def current(self) -> "RankingQuerySet":
        return self.filter(is_current=True)


class Ranking(models.Model):
    """What one rater said of one prompt's completions. Never edited: an amendment is a new row with the next revision."""

    uid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False, help_text="Follows the ranking into snapshots.")
    lease = models.ForeignKey(Lease, on_delete=models.PROTECT, related_name="rankings")
    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="rankings")
    prompt = models.ForeignKey(Prompt, on_delete=models.CASCADE, related_name="rankings")
    rater = models.ForeignKey(User, on_delete=models.PROTECT, related_name="rankings")
    client_id = models.UUIDField(help_text="Made by the client; sending the same one again stores nothing new.")
    revision = models.PositiveSmallIntegerField(default=1)
    is_current = models.BooleanField(default=True)
    bands = models.JSONField(help_text="[[uid, ...], ...] from best to worst; completions in one band are tied.")
    displayed = models.JSONField(help_text="Completion uids in the order they had on screen.")
    criteria = models.JSONField(default=dict, blank=True, help_text="{criterion: bands}")
    flags = models.JSONField(default=dict, blank=True, help_text="{completion uid: [flag, ...]}")
    comment = models.TextField(blank=True)
    duration_seconds = models.FloatField(null=True, blank=True, validators=[MinValueValidator(0.0)])
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = RankingQuerySet.as_manager()

    class Meta:
        ordering = ["id"]
        constraints = [
            models.UniqueConstraint(fields=["rater", "client_id"], name="ranking_client_id_once"),
            models.UniqueConstraint(fields=["lease", "revision"], name="ranking_revision_once"),
            models.UniqueConstraint(fields=["lease"], condition=Q(is_current=True), name="ranking_one_current_per_slot"),
        ]
        indexes = [models.Index(fields=["project", "is_current", "id"], name="ranking_stream")]

    def __str__(self) -> str:
        return f"ranking {self.uid} (revision {self.revision})"


class Snapshot(models.Model):
    """An immutable file of rankings. The bytes are under `var/snapshots/<digest>/`; this row says what and why."""

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="snapshots")
    digest = models.CharField(max_length=64, help_text="SHA-256 of rankings.jsonl.")
    filters = models.JSONField(default=dict, blank=True)
    counts = models.JSONField(default=dict)
    created_by = models.ForeignKey(User, on_delete=models.PROTECT, null=True, blank=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["-created_at"]
        constraints = [models.UniqueConstraint(fields=["project", "digest"], name="snapshot_bytes_once")]

    def __str__(self) -> str:
        return f"{self.project_id} {self.digest[:12]}"
