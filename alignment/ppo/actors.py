"""Who takes part in PPO: the models, in the form that was asked for, and what they make of prompts: episodes."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from alignment.ppo.experience import Experience, join, padded_samples
from alignment.ppo.options import PPOOptions
from alignment.ppo.shared import Shared, load_slots, why_not_shared
from alignment.ppo.voices import Judged, Manner, Separate, Voices
from alignment.rollout.built_in import batches
from alignment.rollout.engines import Engine, Place, engine_of
from alignment.rollout.sampling import Sample, Sampling
from rewardmodel.ensemble import views
from rewardmodel.network import load_value_model
from rewardmodel.score import RewardNotes, Scorer, read_notes, require_members
from training.encode import Encoder
from training.errors import InputError
from training.gradients import free_memory, ran_out_of_memory
from training.language_model import Lora, frozen_copy, load_policy
from training.pack import Row
from training.processes import Processes
from training.rundir import RunDirectory, checkpoint_folders
from training.sharding import gathered

Drawn = dict[int, list[Sample]]  # place of a prompt -> its samples


@dataclass(frozen=True, slots=True)
class Rollout:
    """What came of drawing and judging: the episodes, or, where someone paused, what this process has drawn. Seconds are its own."""

    drawn: Drawn
    experience: Experience | None
    seconds_generate: float
    seconds_score: float


@dataclass(slots=True)
class Actors:
    """The models of a run, who writes with the policy, and how they are used. `kind` says which form was chosen, and why, where nobody
    chose."""

    voices: Voices
    encoder: Encoder
    options: PPOOptions
    processes: Processes
    engine: Engine
    kind: str = ""
    budget: int = field(init=False)  # tokens of one pass when episodes are scored

    def __post_init__(self) -> None:
        self.budget = self.options.tokens_per_micro_batch

    @property
    def policy(self) -> Any:
        return self.voices.policy

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        *,
        seed: int,
        step: int,
        drawn: Drawn | None = None,
        pause: Callable[[], bool] = lambda: False,
    ) -> Drawn:
        """Completions of this process's share of the prompts, a batch at a time.

        Args:    drawn: what was drawn before an interruption, on any process: it is not drawn again;  pause: asked after each batch.
        Returns: by place in `prompts`; not all of the share if `pause` said so."""
        sampling = Sampling(
            self.options.max_completion_tokens,
            temperature=self.options.temperature,
            seed=seed,
            step=step,
            cache_tokens=self.options.cache_tokens,
        )
        sampling.require_exact()
        self.engine.refresh(self.policy)
        share = self.share(prompts)
        found: Drawn = {place: (drawn or {})[place] for place in share if place in (drawn or {})}
        for batch in batches([len(prompts[place]) for place in share], sampling, samples):
            places = [share[number] for number in batch]
            if all(place in found for place in places):
                continue
            answers = self.engine.sample([prompts[place] for place in places], sampling, samples=samples, streams=places)
            found |= {place: answers[number * samples : (number + 1) * samples] for number, place in enumerate(places)}
            if pause():
                break
        return found

    def share(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Places of the prompts that this process answers."""
        return self.processes.share(range(len(prompts)), [float(len(prompt)) for prompt in prompts])

    def judge(self, drawn: Drawn, samples: int, *, with_values: bool = True) -> Experience:
        """Scores, KL and values of all that was drawn; every process gets all episodes, in the order of the prompts."""
        places = sorted(drawn)
        mine = self._judged([sample for place in places for sample in drawn[place]], with_values)
        shares = self.processes.gather((places, mine))
        source = [place * samples + sample for part, _ in shares for place in part for sample in range(samples)]
        order = sorted(range(len(source)), key=source.__getitem__)
        return join([part for _, part in shares], order)

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        *,
        seed: int,
        step: int,
        with_values: bool = True,
        drawn: Drawn | None = None,
        pause: Callable[[], bool] = lambda: False,
    ) -> Rollout:
        """Draw, and judge once every process has all of its share; weights that are sharded are gathered once for both."""
        started = time.monotonic()
        with gathered(self.policy):
            found = self.draw(prompts, samples, seed=seed, step=step, drawn=drawn, pause=pause)
            (missing,) = self.processes.any(len(found) < len(self.share(prompts)))
            sampled = time.monotonic()
            if missing:
                return Rollout(found, None, sampled - started, 0.0)
            experience = self.judge(found, samples, with_values=with_values)
        return Rollout({}, experience, sampled - started, time.monotonic() - sampled)

    def experience(self, prompts: Sequence[Sequence[int]], samples: int, *, seed: int, step: int, with_values: bool = True) -> Experience:
        """Draw and judge in one go."""
        found = self.rollout(prompts, samples, seed=seed, step=step, with_values=with_values).experience
        assert found is not None  # nobody pauses
        return found

    def _judged(self, drawn: Sequence[Sample], with_values: bool) -> Experience:
        rows = [sample.row for sample in drawn]
        mask, logps, entropies = padded_samples(drawn, self.options.max_completion_tokens)
        # Another engine, or a bfloat16 forward pass of another shape, differs by more than PPO may mistake for a change of the policy.
        again = not self.engine.exact
        judged = self._read(rows, [self._as_judged(sample) for sample in drawn], values=with_values, logps=again)
        seen = views(self.voices.notes.normalise(judged.raw_scores))
        return Experience(
            rows=rows,
            mask=mask,
            logps=judged.logps if again else logps,
            engine_logps=logps,
            entropies=entropies,
            reference_logps=judged.reference_logps,
            values=judged.values,
            base_values=judged.base_values,
            scores=seen.of(self.options.reward_view, self.options.spread_weight),
            means=seen.mean,
            spreads=seen.spread,
            finished=torch.tensor([sample.finished for sample in drawn], dtype=torch.bool),
        )

    def _read(self, rows: Sequence[Row], read: Sequence[Row], *, values: bool, logps: bool) -> Judged:
        """What the models say of rows; where memory runs out, in smaller passes from then on. (No process waits for another in here.)"""
        while True:
            try:
                return self.voices.judged(rows, read, budget=self.budget, values=values, logps=logps)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error) or self.processes.sharding != "none" or self.budget == 1:
                    raise
            free_memory()
            self.budget = self.budget // 2

    def _as_judged(self, sample: Sample) -> Row:
        """The reward model learnt from completions that end in one token; a policy with several stop tokens is scored on that one."""
        if sample.finished:
            return Row(sample.prompt_ids, [*sample.completion_ids[:-1], self.encoder.end_id])
        return sample.row


def load_actors(run_directory: RunDirectory, encoder: Encoder, options: PPOOptions, processes: Processes) -> Actors:
    """All models of a run, on its device, in the form of `options.backbone`.

    Raises:  InputError if the reward model reads other tokens than the policy writes, the reference has another vocabulary, or the
             backbone cannot be shared and was asked to be.
    """
    inputs = run_directory.inputs
    notes = read_notes(inputs["reward_model"])
    if Encoder.load(inputs["reward_model"]).digest != encoder.digest:
        raise InputError(
            f"The reward model {inputs['reward_model']} reads other tokens or another template than the policy {inputs['model']} writes.",
            remedy="Train the reward model from the same starting model (or one with the same tokenizer and template).",
        )
    if options.reward_view != "mean":
        require_members(notes, f"reward_view = {options.reward_view} looks at several")
    # Before any model is loaded: an engine that is missing, or a server that does not answer, is known at once.
    place = Place(str(inputs["model"]), encoder, processes, run_directory.path / "scratch", options.engine_url)
    engine = engine_of(options.engine, place)
    manner = Manner(encoder.pad_id, options.max_completion_tokens, options.temperature, processes)
    why_not = why_not_shared(inputs["model"], inputs["reward_model"], inputs.get("reference"), options.lora_rank)
    begun_as = form_of_checkpoint(run_directory)
    if not why_not and begun_as == "separate" and options.backbone == "auto":
        why_not = "the run began with them"
    if not why_not and processes.sharding != "none":
        why_not = "the weights of separate models are spread over the processes"
        if begun_as == "shared":
            raise InputError(
                "The run began with one backbone, which is not spread over processes.",
                remedy="Resume it in one process or with alignment/launch/ddp.yaml, or start a new run.",
            )
    if options.backbone == "shared" and why_not:
        raise InputError(f"backbone = shared cannot be: {why_not}.", remedy="Mend that, or set backbone = 'separate' (or 'auto').")
    if options.backbone != "separate" and not why_not:
        try:
            return Actors(_shared(run_directory, options, notes, manner), encoder, options, processes, engine, "one backbone")
        except InputError as error:
            if options.backbone == "shared":
                raise
            why_not = str(error)
    voices = _separate(run_directory, encoder, options, manner)
    return Actors(voices, encoder, options, processes, engine, f"separate models: {why_not}" if options.lora_rank else "separate models")


def form_of_checkpoint(run_directory: RunDirectory) -> str:
    """The form of the models that the newest checkpoint belongs to: shared or separate; empty without a checkpoint."""
    folders = checkpoint_folders(run_directory.checkpoints)
    if not folders:
        return ""
    try:
        return json.loads((folders[-1] / "state.json").read_text(encoding="utf-8")).get("form", "separate")
    except (OSError, ValueError):
        return ""  # a damaged checkpoint is passed over later, with a warning


def _given(run_directory: RunDirectory, options: PPOOptions, manner: Manner) -> dict[str, Any]:
    return {"device": manner.device, "gradient_checkpointing": options.gradient_checkpointing, "seed": run_directory.seed}


def _shared(run_directory: RunDirectory, options: PPOOptions, notes: RewardNotes, manner: Manner) -> Voices:
    inputs, lora = run_directory.inputs, Lora.of(options)
    assert lora is not None
    slots, reward = load_slots(inputs["model"], inputs["reward_model"], notes, lora=lora, **_given(run_directory, options, manner))
    return Shared(slots, reward, manner, options.shared_value if options.has_value_model else None)


def _separate(run_directory: RunDirectory, encoder: Encoder, options: PPOOptions, manner: Manner) -> Voices:
    inputs, device, lora = run_directory.inputs, manner.device, Lora.of(options)
    given = _given(run_directory, options, manner)
    scorer = Scorer.load(inputs["reward_model"], device=device, tokens_per_batch=2 * options.tokens_per_micro_batch)
    policy = load_policy(inputs["model"], lora=lora, **given)
    frozen = None
    if inputs.get("reference"):
        if Encoder.load(inputs["reference"], template=options.template).digest != encoder.digest:
            raise InputError(f"The reference {inputs['reference']} has other tokens.", remedy="Give the model PPO starts from.")
        frozen = load_policy(inputs["reference"], device=device).eval().requires_grad_(False)
    elif not options.lora_rank:
        frozen = frozen_copy(policy)
    if not options.has_value_model:
        return Separate(policy, frozen, None, scorer, manner)
    value, mean, scale = load_value_model(inputs["reward_model"], (scorer.notes.means, scorer.notes.scales), lora=lora, **given)
    return Separate(policy, frozen, (value, replace(scorer.notes, mean=mean, scale=scale)), scorer, manner)
