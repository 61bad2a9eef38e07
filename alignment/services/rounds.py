"""One call makes a whole round: snapshot, reward model, policies, new completions, evaluation, and the way home to the raters."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from alignment.methods import options_check
from alignment.models import Round, TrainedModel
from alignment.options import GenerateOptions
from alignment.selectors import model_reference
from alignment.services.home import round_open
from alignment.services.jobs import JobRequest, job_create
from alignment.services.prompt_files import SPLITS, prompts_write
from annotation.errors import Refused
from annotation.models import MAX_COMPLETIONS, Project, Prompt, Snapshot, User
from annotation.services.snapshots import snapshot_create
from training.errors import InputError
from training.options import parse_options

POLICY_METHODS = ("dpo", "ppo")
STEPS = ("reward", *POLICY_METHODS, "generate", "evaluate")
REWARD_FILE = "rankloop_reward.json"  # its `mean` is one number, or one for each member


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRequest:
    """A round to run. `options` has one table per step: {"reward": {"epochs": 2}, "dpo": {"beta": 0.2}, ...}."""

    project: Project
    model: str  # the policy to start from: a model's name, a folder or a hub id
    methods: tuple[str, ...] = ("dpo",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    snapshot: Snapshot | None = None  # None: of the rankings as they are now
    reward_model: str = ""  # "": learn one from the snapshot
    prompts: int = 100  # to write new completions for; 0: all
    prompt_split: str = "all"
    shown: int = 4  # completions per prompt that raters get to see, of all policies together
    seed: int = 0
    processes: int = 1
    created_by: User | None = None

    @property
    def samples(self) -> int:
        """Completions of a prompt that each policy is asked for: `shown` of all policies (the starting one among them) together."""
        return max(1, math.ceil(self.shown / (len(self.methods) + 1)))

    @property
    def generating(self) -> dict[str, Any]:
        return {"samples": self.samples, **self.options.get("generate", {})}


def round_check(*, request: RoundRequest) -> None:
    """Raises Refused for what can be seen to be wrong before anything is written."""
    unknown = [name for name in request.methods if name not in POLICY_METHODS]
    if unknown or not request.methods or len(set(request.methods)) != len(request.methods):
        raise Refused("methods_invalid", f"methods must be one or both of {', '.join(POLICY_METHODS)}, each once; got {request.methods!r}.")
    strange = [name for name in request.options if name not in STEPS]
    if strange:
        raise Refused(
            "step_unknown", f"A round has no step {strange[0]!r}: its options are tables of {', '.join(STEPS)}, as in dpo.beta=0.2."
        )
    try:
        for step, options in {**request.options, "generate": request.generating}.items():
            options_check(step, options)
    except InputError as error:
        raise Refused("option_invalid", f"{error} {error.remedy}".strip()) from error
    if (reason := _needs_members(request)) and _members(request) == 1:
        raise Refused("no_ensemble", f"{reason} needs a reward model of several members: set reward.ensemble_size = 4 or more.")
    model_reference(text=request.model)
    if request.reward_model:
        model_reference(text=request.reward_model)
    if not 2 <= request.shown <= MAX_COMPLETIONS:
        raise Refused("shown_invalid", f"Raters are shown 2 to {MAX_COMPLETIONS} completions of a prompt; got {request.shown}.")
    if request.prompts < 0 or request.prompt_split not in SPLITS:
        raise Refused("prompts_invalid", f"prompts must be 0 or more, and their split one of {', '.join(SPLITS)}.")


def _needs_members(request: RoundRequest) -> str:
    """What of the round asks where the members of a reward model differ; "" if nothing does."""
    generating, ppo = request.generating, request.options.get("ppo", {})
    if generating.get("keep") == "uncertain" or generating.get("most_uncertain_prompts"):
        return "What members of a reward model dispute"
    if generating.get("keep") == "best" and generating.get("reward_view", "mean") != "mean":
        return f"generate.reward_view = {generating['reward_view']}"
    if "ppo" in request.methods and ppo.get("reward_view", "mean") != "mean":
        return f"ppo.reward_view = {ppo['reward_view']}"
    return ""


def _members(request: RoundRequest) -> int | None:
    """Of the reward model that the round learns, or of the one it was given; None where that is not known here."""
    if not request.reward_model:
        return int(request.options.get("reward", {}).get("ensemble_size", 1))
    found = model_reference(text=request.reward_model)
    made = TrainedModel.objects.filter(name=found["name"]).first() if isinstance(found, dict) else None
    folder = made.folder if made else Path(found) if isinstance(found, str) else None
    try:
        mean = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))["mean"] if folder else None
    except (OSError, ValueError, KeyError):
        return None
    return len(mean) if isinstance(mean, list) else 1 if mean is not None else None


def round_create(*, request: RoundRequest) -> Round:
    """Queue all jobs of a new round; workers do the rest, and the last `generate` brings its completions home.

    Raises Refused for bad options, an unknown model, a project without rankings, ...; then nothing is queued.
    """
    round_check(request=request)
    start = model_reference(text=request.model)
    snapshot = request.snapshot or snapshot_create(project=request.project, created_by=request.created_by)
    if not snapshot.counts.get("rankings", 0):
        raise Refused("no_rankings", f"Project {request.project.slug} has no rankings to learn from: let raters rank, or load some.")
    with transaction.atomic():
        made = round_open(
            project=request.project,
            methods=list(request.methods),
            settings={
                "shown": request.shown,
                "start": request.model,
                "most_uncertain_prompts": request.generating.get("most_uncertain_prompts", 0),
            },
            snapshot=snapshot,
            created_by=request.created_by,
        )
        _Chain(request, made, start).queue()
    return made


class _Chain:
    """Queues the jobs of one round in the order in which they need each other."""

    def __init__(self, request: RoundRequest, made: Round, start: str | dict[str, str]) -> None:
        self.request, self.made, self.start = request, made, start
        self.rankings = snapshot_input(made.snapshot) if made.snapshot else {}

    def queue(self) -> None:
        request = self.request
        reward = model_reference(text=request.reward_model) if request.reward_model else self._reward()
        policies: dict[str, Any] = {method: self._policy(method, reward) for method in request.methods}
        policies["start"] = self.start
        self._generate(policies, reward)
        self._evaluate(policies, reward)

    def _job(self, step: str, suffix: str, inputs: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, str]:
        request = self.request
        job = job_create(
            request=JobRequest(
                method=step,
                name=f"{request.project.slug}-r{self.made.number}-{suffix}",
                project=request.project,
                round=self.made,
                snapshot=self.made.snapshot if step in ("reward", "dpo", "ppo") else None,
                inputs=inputs,
                options=dict(request.options.get(step, {}) if options is None else options),
                seed=request.seed,
                processes=request.processes,
                created_by=request.created_by,
            )
        )
        return {"name": job.name}

    def _reward(self) -> dict[str, str]:
        return self._job("reward", "reward", {"model": self.start, "data": self.rankings})

    def _policy(self, method: str, reward: Any) -> dict[str, str]:
        if method == "dpo":
            return self._job("dpo", "dpo", {"model": self.start, "data": self.rankings})
        prompts = prompts_write(
            project=self.request.project, seed=self.request.seed
        )  # it learns from `train` and watches itself on `held_out`
        return self._job("ppo", "ppo", {"model": self.start, "reward_model": reward, "data": prompts})

    def _generate(self, policies: dict[str, Any], reward: Any) -> None:
        request = self.request
        prompts = prompts_write(project=request.project, split=request.prompt_split, limit=request.prompts, seed=request.seed)
        options = request.generating
        judge = {"reward_model": reward} if parse_options(GenerateOptions, options).needs_reward_model else {}
        if options.get("most_uncertain_prompts"):
            # All policies answer all prompts, and the round chooses once it knows what is disputed in their answers together.
            options["most_uncertain_prompts"] = len(Path(prompts["path"]).read_text(encoding="utf-8").splitlines())
        for name, policy in policies.items():
            self._job("generate", f"generate-{name}", {"model": policy, "data": prompts, **judge}, options)

    def _evaluate(self, policies: dict[str, Any], reward: Any) -> None:
        if not Prompt.objects.filter(project=self.request.project, split=Prompt.Split.HELD_OUT).exists():
            self.made.counts = {**self.made.counts, "no_held_out_prompts": 1}
            self.made.save(update_fields=["counts"])
        prompts = prompts_write(project=self.request.project, seed=self.request.seed)
        for name in self.request.methods:
            inputs = {"model": policies[name], "baseline": self.start, "reward_model": reward, "data": prompts}
            self._job("evaluate", f"evaluate-{name}", inputs)


def snapshot_input(snapshot: Snapshot) -> dict[str, str]:
    path = Path(settings.SNAPSHOTS_DIR) / snapshot.digest / "rankings.jsonl"
    return {"path": str(path), "digest": snapshot.digest}
