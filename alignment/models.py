"""The learning side of the loop as rows: jobs, the models that they made, and rounds.

A job row is the truth about one run; the files under `run_directory` are its work. Workers never hold a lock while a job runs: they own it
until `lease_expires_at`, and every write of theirs is conditional on `fence`, which grows by one with each claim. A worker that was
asleep, cut off or replaced can therefore not write over the one that took its place.
"""

from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from annotation.models import Project, Snapshot, User

# As the database's constraints spell them; the classes below carry the labels.
STATES = ("waiting", "queued", "running", "cancelling", "cancelled", "stopped", "failed", "succeeded")
METHODS = ("sft", "reward", "dpo", "ppo", "generate", "evaluate")


class Round(models.Model):
    """One turn of the loop: a snapshot, the jobs that learn from it, and the new prompts for the raters under the same number."""

    class State(models.TextChoices):
        RUNNING = "running", "running"
        SUCCEEDED = "succeeded", "succeeded"
        FAILED = "failed", "failed"
        CANCELLED = "cancelled", "cancelled"

    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="rounds")
    number = models.PositiveIntegerField(validators=[MinValueValidator(1)], help_text="Its outputs are prompts of this round; 0 is loaded.")
    methods = models.JSONField(default=list, help_text='For example ["dpo", "ppo"].')
    settings = models.JSONField(default=dict, blank=True, help_text="How its outputs are mixed for the raters.")
    state = models.CharField(max_length=10, choices=State.choices, default=State.RUNNING)
    snapshot = models.ForeignKey(Snapshot, on_delete=models.PROTECT, null=True, blank=True, related_name="rounds")
    counts = models.JSONField(default=dict, blank=True, help_text="What came home: prompts, completions, duplicates left out, ...")
    created_by = models.ForeignKey(User, on_delete=models.PROTECT, null=True, blank=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    home_at = models.DateTimeField(null=True, blank=True, help_text="When its outputs were queued for the raters.")
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["project", "number"], name="round_number_once"),
            models.CheckConstraint(condition=Q(number__gte=1), name="round_number_from_one"),
        ]

    def __str__(self) -> str:
        return f"round {self.number} of {self.project}"


def visible(rows: Any, user: Any) -> Any:
    """Staff see every job and model; a project's managers see the project's; nobody else sees any."""
    if not user.is_authenticated:
        return rows.none()
    if user.is_staff:
        return rows
    return rows.filter(project__memberships__user=user, project__memberships__role="manager")


class JobQuerySet(models.QuerySet["Job"]):
    def active(self) -> "JobQuerySet":
        return self.filter(state__in=Job.ACTIVE)

    def claimable(self, now: Any) -> "JobQuerySet":
        """Jobs that a worker may take: queued, or left behind by a worker that no longer renews its lease."""
        return self.filter(Q(state=Job.State.QUEUED) | Q(state__in=Job.HELD, lease_expires_at__lt=now))

    def visible_to(self, user: Any) -> "JobQuerySet":
        return visible(self, user)


class Job(models.Model):
    class Method(models.TextChoices):
        SFT = "sft", "SFT"
        REWARD = "reward", "reward model"
        DPO = "dpo", "DPO"
        PPO = "ppo", "PPO"
        GENERATE = "generate", "generate"
        EVALUATE = "evaluate", "evaluate"

    class State(models.TextChoices):
        WAITING = "waiting", "waiting"  # for other jobs
        QUEUED = "queued", "queued"
        RUNNING = "running", "running"
        CANCELLING = "cancelling", "cancelling"
        CANCELLED = "cancelled", "cancelled"  # nothing kept that could be resumed
        STOPPED = "stopped", "stopped"  # at a checkpoint; can be resumed
        FAILED = "failed", "failed"
        SUCCEEDED = "succeeded", "succeeded"

    HELD = (State.RUNNING, State.CANCELLING)
    ACTIVE = (State.WAITING, State.QUEUED, State.RUNNING, State.CANCELLING)
    ENDED = (State.CANCELLED, State.STOPPED, State.FAILED, State.SUCCEEDED)

    name = models.SlugField(max_length=100, unique=True, help_text="Also the name of its folder and of the model that it makes.")
    method = models.CharField(max_length=10, choices=Method.choices)
    state = models.CharField(max_length=10, choices=State.choices, default=State.QUEUED)
    project = models.ForeignKey(Project, on_delete=models.PROTECT, null=True, blank=True, related_name="jobs")
    round = models.ForeignKey(Round, on_delete=models.PROTECT, null=True, blank=True, related_name="jobs")
    snapshot = models.ForeignKey(Snapshot, on_delete=models.PROTECT, null=True, blank=True, related_name="jobs")
    needs = models.ManyToManyField("self", symmetrical=False, blank=True, related_name="dependents", help_text="Jobs whose models it uses.")
    inputs = models.JSONField(default=dict, help_text='{"model": {"name": "sft"} or path or hub id, "data": {"path", "digest"}, ...}')
    options = models.JSONField(default=dict, blank=True, help_text="The method's options; all others have their defaults.")
    seed = models.PositiveIntegerField(default=0)
    processes = models.PositiveSmallIntegerField(default=1, validators=[MinValueValidator(1), MaxValueValidator(64)])
    gpu_slots = models.PositiveSmallIntegerField(default=1, help_text="Places that it takes on a worker.")
    run_directory = models.CharField(max_length=500, blank=True, help_text="Below the runs folder, so that the state folder can move.")

    attempt = models.PositiveSmallIntegerField(default=0, help_text="How often a worker has taken it up.")
    max_attempts = models.PositiveSmallIntegerField(default=3)
    fence = models.PositiveBigIntegerField(default=0, help_text="Grows with each claim; an owner with an older number cannot write.")
    worker = models.CharField(max_length=120, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    heartbeat_at = models.DateTimeField(null=True, blank=True)
    process_group = models.PositiveIntegerField(null=True, blank=True)

    step = models.PositiveIntegerField(default=0)
    steps = models.PositiveIntegerField(default=0)
    metrics = models.JSONField(default=dict, blank=True)
    eta_seconds = models.FloatField(null=True, blank=True)
    tokens_per_second = models.FloatField(null=True, blank=True)
    warnings = models.PositiveIntegerField(default=0)
    event_offset = models.PositiveBigIntegerField(default=0, help_text="Bytes of events.jsonl already read into this row.")

    exit_code = models.IntegerField(null=True, blank=True)
    error = models.TextField(blank=True)
    remedy = models.TextField(blank=True)
    blocked_by = models.ForeignKey("self", on_delete=models.PROTECT, null=True, blank=True, related_name="blocked")
    created_by = models.ForeignKey(User, on_delete=models.PROTECT, null=True, blank=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = JobQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.CheckConstraint(
                condition=~Q(state__in=["running", "cancelling"]) | (Q(lease_expires_at__isnull=False) & ~Q(worker="")),
                name="job_held_has_owner",
            ),
            models.CheckConstraint(
                condition=~Q(state__in=["cancelled", "stopped", "failed", "succeeded"]) | Q(finished_at__isnull=False),
                name="job_ended_has_end",
            ),
            models.CheckConstraint(condition=Q(state__in=STATES), name="job_state_known"),
            models.CheckConstraint(condition=Q(method__in=METHODS), name="job_method_known"),
            models.CheckConstraint(condition=Q(attempt__lte=F("max_attempts")), name="job_attempts_bounded"),
            models.CheckConstraint(condition=Q(processes__gte=1, gpu_slots__gte=1), name="job_takes_a_place"),
            models.CheckConstraint(condition=Q(round__isnull=True) | Q(project__isnull=False), name="job_of_round_has_project"),
        ]
        indexes = [
            models.Index(fields=["id"], name="job_queue", condition=Q(state__in=["queued", "running", "cancelling"])),
            models.Index(fields=["project", "-created_at"], name="job_of_project"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return Path(settings.RUNS_DIR) / self.run_directory

    @property
    def is_active(self) -> bool:
        return self.state in self.ACTIVE

    @property
    def share_done(self) -> float:
        """From 0 to 1. A job that has not said how many steps it has is at 0."""
        if self.state == self.State.SUCCEEDED:
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def loss(self) -> float | None:
        """The one figure shown in lists: the newest loss, whatever the method calls it."""
        for name in ("loss", "policy_loss", "train_loss"):
            if isinstance(self.metrics.get(name), int | float):
                return float(self.metrics[name])
        return None


class TrainedModelQuerySet(models.QuerySet["TrainedModel"]):
    def visible_to(self, user: Any) -> "TrainedModelQuerySet":
        return visible(self, user)


class TrainedModel(models.Model):
    """A model that a job made: where it lies, what it is, what it came from (`parents`) and what came of it (`children`)."""

    class Kind(models.TextChoices):
        POLICY = "policy", "policy"
        REWARD = "reward", "reward model"

    name = models.SlugField(max_length=100, unique=True)
    kind = models.CharField(max_length=6, choices=Kind.choices)
    path = models.CharField(max_length=500, help_text="Folder in Hugging Face format, below the runs folder or absolute.")
    digest = models.CharField(max_length=64, help_text="SHA-256 over the names and contents of its files.")
    job = models.OneToOneField(Job, on_delete=models.PROTECT, null=True, blank=True, related_name="model")
    project = models.ForeignKey(Project, on_delete=models.PROTECT, null=True, blank=True, related_name="models")
    snapshot = models.ForeignKey(Snapshot, on_delete=models.PROTECT, null=True, blank=True, related_name="models")
    parents = models.ManyToManyField("self", symmetrical=False, through="ModelParent", related_name="children")
    metrics = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = TrainedModelQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [models.CheckConstraint(condition=Q(kind__in=["policy", "reward"]), name="model_kind_known")]

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return Path(settings.RUNS_DIR) / self.path


class ModelParent(models.Model):
    """One thread of lineage: `child` used `parent` as its start, its reference or its reward."""

    class Role(models.TextChoices):
        START = "model", "started from"
        REWARD = "reward_model", "learnt against"
        REFERENCE = "reference", "kept near"

    child = models.ForeignKey(TrainedModel, on_delete=models.CASCADE, related_name="parent_links")
    parent = models.ForeignKey(TrainedModel, on_delete=models.PROTECT, related_name="child_links")
    role = models.CharField(max_length=12, choices=Role.choices)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["child", "parent", "role"], name="model_parent_once"),
            models.CheckConstraint(condition=~Q(child=F("parent")), name="model_not_its_own_parent"),
        ]

    def __str__(self) -> str:
        return f"{self.child_id} {self.get_role_display()} {self.parent_id}"
