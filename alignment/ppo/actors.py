"""The models of PPO, and what they say about episodes: policy, reference, reward model, and the value model that starts as the latter."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignment.ppo.experience import Experience, by_token, join, pack_left, padded_samples
from alignment.ppo.options import PPOOptions
from alignment.rollout.built_in import sample_completions
from alignment.rollout.sampling import Sample, Sampling
from rewardmodel.network import load_value_model, token_values
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, completion_logps, frozen_copy, load_policy, reference
from training.pack import Padded, Row
from training.processes import Processes
from training.rundir import RunDirectory
from training.sharding import gathered, shard


@dataclass(slots=True)
class Actors:
    """`reference` is None where the policy's own adapter can be switched off. `value_notes` put values into the units of scores."""

    policy: Any
    reference: Any | None
    value: Any
    value_notes: RewardNotes
    scorer: Scorer
    encoder: Encoder
    options: PPOOptions
    processes: Processes

    def experience(
        self, prompts: Sequence[Sequence[int]], samples: int, *, seed: int, step: int, with_values: bool = True
    ) -> tuple[Experience, dict[str, float]]:
        """Sample and score. Each process takes its share of the prompts; all of them get all episodes, in the order of `prompts`.

        Returns: the episodes, and seconds by part (`seconds_generate`, `seconds_score`) on this process.
        """
        started = time.monotonic()
        places = self.processes.share(range(len(prompts)), [float(len(prompt)) for prompt in prompts])
        sampling = Sampling(self.options.max_completion_tokens, temperature=self.options.temperature, seed=seed, step=step)
        sampling.require_exact()
        with gathered(self.policy):  # once for all tokens, and for the passes over what was written
            drawn = sample_completions(
                self.policy,
                [prompts[place] for place in places],
                sampling,
                stop_ids=self.encoder.stop_ids,
                pad_id=self.encoder.pad_id,
                samples=samples,
                streams=places,
                processes=self.processes,
            )
            sampled = time.monotonic()
            mine = self._scored(drawn, with_values)
        shares = self.processes.gather((places, mine))
        source = [place * samples + sample for part, _ in shares for place in part for sample in range(samples)]
        order = sorted(range(len(source)), key=source.__getitem__)
        experience = join([part for _, part in shares], order)
        return experience, {"seconds_generate": sampled - started, "seconds_score": time.monotonic() - sampled}

    @torch.no_grad()
    def _scored(self, drawn: Sequence[Sample], with_values: bool) -> Experience:
        rows = [sample.row for sample in drawn]
        width = self.options.max_completion_tokens
        mask, logps, entropies = padded_samples(drawn, width)
        with self.processes.autocast():
            if self.processes.dtype != "float32":
                # A bfloat16 forward pass of another shape differs by more than PPO may mistake for a change of the policy.
                logps = self._by_token(rows, lambda padded: self.logps(self.policy, padded))
            with reference(self.policy, self.reference) as frozen, gathered(self.reference):
                reference_logps = self._by_token(rows, lambda padded: self.logps(frozen, padded))
            with gathered(self.value if with_values else None):
                values = self._by_token(rows, self.values) if with_values else torch.zeros_like(logps)
            with gathered(self.scorer.model):
                judged = self.scorer.views(self.scorer.raw_scores([self._as_judged(sample) for sample in drawn]))
        return Experience(
            rows=rows,
            mask=mask,
            logps=logps,
            entropies=entropies,
            reference_logps=reference_logps,
            values=values,
            scores=judged.of(self.options.reward_view, self.options.spread_weight),
            spreads=judged.spread,
            finished=torch.tensor([sample.finished for sample in drawn], dtype=torch.bool),
        )

    def _by_token(self, rows: Sequence[Row], compute: Any) -> Tensor:
        return by_token(
            rows,
            self.encoder.pad_id,
            self.options.max_completion_tokens,
            device=self.processes.device,
            budget=self.options.tokens_per_micro_batch,
            compute=compute,
        )

    def logps(self, model: Any, padded: Padded) -> Tensor:
        """(B, T): log-probability of each completion token at the sampling temperature, packed to the left."""
        found = completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask, self.options.temperature)
        return pack_left(found, padded, self.options.max_completion_tokens)

    def values(self, padded: Padded) -> Tensor:
        """(B, T): expected score before each completion token, read at the token before it, in normalised reward."""
        raw = token_values(self.value, padded.input_ids, padded.attention_mask)
        normalised = (raw - self.value_notes.means[0]) / self.value_notes.scales[0]
        return pack_left(normalised, padded, self.options.max_completion_tokens, before=1)

    def _as_judged(self, sample: Sample) -> Row:
        """The reward model learnt from completions that end in one token; a policy with several stop tokens is scored on that one."""
        if sample.finished:
            return Row(sample.prompt_ids, [*sample.completion_ids[:-1], self.encoder.end_id])
        return sample.row

    def value_files(self) -> dict[str, Any]:
        """What belongs beside the saved value model."""
        return {REWARD_FILE: self.value_notes.as_json()}


def load_actors(run_directory: RunDirectory, encoder: Encoder, options: PPOOptions, processes: Processes) -> Actors:
    """All models of a run, on its device.

    Raises:  InputError if the reward model reads other tokens than the policy writes, or the reference has another vocabulary.
    """
    inputs, device = run_directory.inputs, processes.device
    scorer = Scorer.load(inputs["reward_model"], device=device, tokens_per_batch=2 * options.tokens_per_micro_batch)
    if scorer.encoder.digest != encoder.digest:
        raise InputError(
            f"The reward model {inputs['reward_model']} reads other tokens or another template than the policy {inputs['model']} writes.",
            remedy="Train the reward model from the same starting model (or one with the same tokenizer and template).",
        )
    if options.reward_view != "mean":
        scorer.require_members(f"reward_view = {options.reward_view} looks at several")
    shared: dict[str, Any] = {"device": device, "gradient_checkpointing": options.gradient_checkpointing, "seed": run_directory.seed}
    policy = load_policy(inputs["model"], lora=Lora.of(options), **shared)
    value, mean, scale = load_value_model(
        inputs["reward_model"], (scorer.notes.means, scorer.notes.scales), lora=Lora.of(options), **shared
    )
    frozen = None
    if inputs.get("reference"):
        if Encoder.load(inputs["reference"], template=options.template).digest != encoder.digest:
            raise InputError(f"The reference {inputs['reference']} has other tokens.", remedy="Give the model PPO starts from.")
        frozen = load_policy(inputs["reference"], device=device).eval().requires_grad_(False)
    elif not options.lora_rank:
        frozen = frozen_copy(policy)
    for model in (policy, value, scorer.model, frozen):
        if model is not None:
            shard(model, processes)
    value_notes = replace(scorer.notes, mean=mean, scale=scale)
    return Actors(policy, frozen, value, value_notes, scorer, encoder, options, processes)
