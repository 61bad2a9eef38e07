"""Policies against a baseline on held-out prompts: who would win by the reward model, how far they went, and what they write.

Metrics of `result.json` (with inputs `models`, each name is put before its metrics, as in `dpo.win_rate`):

| name | meaning |
|---|---|
| `win_rate`, `win_rate_low`, `win_rate_high` | share of (policy sample, baseline sample) of one prompt where the reward model scores the policy's higher, equal scores half; 95 % interval that resamples prompts |
| `tie_share` | share of those pairs with equal scores |
| `reward_policy`, `reward_baseline` | mean normalised score |
| `kl_k1_nats`, `kl_k3_nats` | KL(policy to reference) of whole completions, estimated from the policy's samples; `kl_k1_standard_error_nats` by prompt |
| `length_tokens_policy`, `length_tokens_baseline` | mean tokens of a completion, the stop token among them |
| `length_words_policy`, `length_words_baseline` | mean words of a text |
| `entropy_nats`, `entropy_nats_baseline` | mean entropy of the distribution of a token |
| `distinct_1`, `distinct_2` (`..._baseline`) | different words and pairs of words, among all |
| `unfinished_share`, `empty_share` (`..._baseline`) | cut at max_completion_tokens; without any text |
| `prompts`, `samples` | how many prompts, and samples of each |

The reference is inputs `reference`, or else the baseline. Without a reward model there is no win rate and no reward; with other tokens than
the policy's, the reference gives no KL, and a warning says so.
"""  # noqa: E501

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignment.answers import Policy, answers_in_blocks, distinct_share, stream_of, weights_digests
from alignment.options import EvaluateOptions
from alignment.ppo.losses import kl_k1, kl_k3
from alignment.prompts import check_room, choose_split, encode_prompts, prompt_rows
from alignment.rollout.sampling import Sample, Sampling
from rewardmodel.accuracy import clustered_interval
from rewardmodel.score import Scorer
from training.encode import Encoder
from training.errors import InputError
from training.language_model import completion_logps, load_policy
from training.options import parse_options
from training.pack import length_groups, pad_rows
from training.processes import Processes
from training.progress import Progress
from training.rankings import PromptRow
from training.rundir import RunDirectory, finite, write_atomically

# In units of normalised reward: the same text scored in another batch differs by less.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion as it is measured. Units: nats; `score` in normalised reward. None where there is no reward model or no KL."""

    text: str
    tokens: int
    finished: bool
    entropy: float
    score: float | None = None
    k1: float | None = None
    k3: float | None = None


Answers = list[list[Answer]]  # by prompt, by sample


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model` (or `models`: {name: folder}), `baseline`, `data`, and, if wanted, `reward_model` and `reference`."""
    options = parse_options(EvaluateOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    rows, split = choose_split(prompt_rows(run_directory.data_file()), options.split)
    evaluation = Evaluation(run_directory, options, processes, rows[: options.max_prompts or None])
    run_directory.event("counts", prompts=evaluation.counts, split=split)
    evaluation.run_all(split)


class Evaluation:
    """The prompts that every policy can read, and one policy after another on them."""

    def __init__(self, run: RunDirectory, options: EvaluateOptions, processes: Processes, rows: Sequence[PromptRow]) -> None:
        self.run = run
        self.options = options
        self.processes = processes
        self.names = _policy_names(run.inputs)
        self.baseline = str(run.inputs["baseline"])
        self.reference = str(run.inputs.get("reference") or self.baseline)
        folders = {*self.names.values(), self.baseline}
        self.encoders = {folder: self._encoder(folder) for folder in sorted(folders | {self.reference})}
        self.rows, self.counts = list(rows), {}
        for folder in sorted(folders):
            prompts, counts = encode_prompts(self.rows, self.encoders[folder], max_dropped_share=options.max_dropped_share)
            readable = {prompt.key for prompt in prompts}
            self.rows = [row for row in self.rows if row.key in readable]
            self.counts[folder] = counts
        self.progress = Progress(run, processes, steps=len(self.rows) * (len(self.names) + 1))
        reward_model = run.inputs.get("reward_model")
        self.scorer = Scorer.load(reward_model, device=processes.device) if reward_model else None

    def _encoder(self, folder: str) -> Encoder:
        return Encoder.load(folder, template=self.options.template, max_prompt_tokens=self.options.max_prompt_tokens)

    def run_all(self, split: str) -> None:
        run, processes = self.run, self.processes
        run.event(
            "start", steps=self.progress.steps, processes=processes.world, device=str(processes.device), dtype=processes.dtype, first_step=0
        )
        started = time.monotonic()
        self.progress.mark(0)
        baseline = self.answers(self.baseline, done=0, with_kl=False)
        metrics: dict[str, float] = {}
        table: list[dict[str, Any]] = []
        for number, (name, folder) in enumerate(self.names.items(), start=1):
            answers = self.answers(folder, done=number * len(self.rows), with_kl=True)
            prefix = f"{name}." if name else ""
            found = comparison(answers, baseline, seed=run.seed)
            metrics.update({prefix + key: value for key, value in found.items()})
            table += self._table(name or folder, answers, baseline)
        if processes.is_main:
            write_atomically(run.path / "samples.jsonl", "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in table))
            policies = {name or "model": {"model": folder, "weights": weights_digests(folder)} for name, folder in self.names.items()}
            baseline_lineage = {"model": self.baseline, "weights": weights_digests(self.baseline)}
            artefacts = {"samples": str(run.path / "samples.jsonl"), "policies": policies, "baseline": baseline_lineage}
            counts = {"prompts": self.counts, "split": split}
            run.write_result(metrics=metrics, artefacts=artefacts, seconds=time.monotonic() - started, counts=counts)
        run.event("evaluation", step=self.progress.steps, metrics=metrics)
        run.event("end", status="done", step=self.progress.steps)
        processes.barrier()

    def answers(self, folder: str, *, done: int, with_kl: bool) -> Answers:
        """What one policy writes, measured; the same on every process. Its model is gone afterwards."""
        encoder = self.encoders[folder]
        prompts, _ = encode_prompts(self.rows, encoder, max_dropped_share=1.0)
        model = load_policy(folder, device=self.processes.device).requires_grad_(False)
        check_room(model, prompts, self.options.max_completion_tokens)
        policy = Policy(folder, model, encoder, prompts)
        # The baseline has luck of its own: under one stream a policy's sample and the baseline's would not be independent.
        step = stream_of(folder, "" if with_kl else "baseline")
        sampling = Sampling(
            self.options.max_completion_tokens,
            temperature=self.options.temperature,
            seed=self.run.seed,
            step=step,
            cache_tokens=self.options.cache_tokens,
        )
        reference = self._reference(policy) if with_kl else None
        found: Answers = []
        for block in answers_in_blocks(policy, sampling, self.processes, samples=self.options.samples):
            found += self._measured(policy, block, reference)
            tokens = sum(answer.tokens for answers in found[-len(block) :] for answer in answers)
            self.progress.report(done + len(found), {}, tokens=tokens / self.processes.world)
        return found

    def _reference(self, policy: Policy) -> Any | None:
        if self.encoders[self.reference].digest != policy.encoder.digest:
            self.run.event("warning", text=f"no KL: {self.reference} reads other tokens or another template than {policy.name}")
            return None
        if self.reference == policy.name:
            return policy.model
        return load_policy(self.reference, device=self.processes.device).requires_grad_(False)

    def _measured(self, policy: Policy, block: Sequence[tuple[int, list[Sample]]], reference: Any | None) -> Answers:
        """Scores and KL of a block, the work shared among processes."""
        flat = [(place, sample) for place, samples in block for sample in samples]
        mine = range(self.processes.rank, len(flat), self.processes.world)
        part = [flat[index] for index in mine]
        texts = [policy.encoder.decode(sample.completion_ids) for _, sample in part]
        scores = self._scores([policy.prompts[place].messages for place, _ in part], texts)
        kls = self._kl(policy, [sample for _, sample in part], reference)
        measured = [
            Answer(text, len(sample.completion_ids), sample.finished, float(sample.entropies.double().mean()), score, k1, k3)
            for (_, sample), text, score, (k1, k3) in zip(part, texts, scores, kls, strict=True)
        ]
        whole: list[Any] = [None] * len(flat)
        for rank, answers in enumerate(self.processes.gather(measured)):
            whole[rank :: self.processes.world] = answers
        size = self.options.samples
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    def _scores(self, messages: Sequence[Any], texts: Sequence[str]) -> Sequence[float | None]:
        """Scores of the texts as a person would read them: also a text that was cut is scored as if it ended there."""
        if self.scorer is None:
            return [None] * len(texts)
        with self.processes.autocast():
            return self.scorer.score(list(zip(messages, texts, strict=True)))

    @torch.no_grad()
    def _kl(self, policy: Policy, samples: Sequence[Sample], reference: Any | None) -> list[tuple[float | None, float | None]]:
        if reference is None:
            return [(None, None)] * len(samples)
        found: list[tuple[float | None, float | None]] = [(None, None)] * len(samples)
        rows = [sample.row for sample in samples]
        for group in length_groups([len(row) for row in rows], budget=self.options.tokens_per_micro_batch):
            padded = pad_rows([rows[index] for index in group], policy.encoder.pad_id).to(self.processes.device)
            given = (padded.input_ids, padded.attention_mask, padded.completion_mask, self.options.temperature)
            with self.processes.autocast():
                # Both by the same kind of forward pass, so that equal models have a KL of exactly 0 in any dtype.
                ours, theirs = (completion_logps(model, *given) for model in (policy.model, reference))
            k1, k3 = (kl(ours, theirs).double().sum(1).tolist() for kl in (kl_k1, kl_k3))
            for place, index in enumerate(group):
                found[index] = (k1[place], k3[place])
        return found

    def _table(self, name: str, answers: Answers, baseline: Answers) -> list[dict[str, Any]]:
        """The first prompts: their first sample, or each, beside the baseline's of the same number."""
        shown = self.options.samples if self.options.table_whole else 1
        return [
            {
                "policy": name,
                "key": row.key,
                "messages": row.messages,
                "text": one.text,
                "score": one.score,
                "kl_k1_nats": one.k1,
                "tokens": one.tokens,
                "finished": one.finished,
                "baseline_text": beside.text,
                "baseline_score": beside.score,
            }
            for row, own, other in list(zip(self.rows, answers, baseline, strict=True))[: self.options.table_samples]
            for one, beside in zip(own[:shown], other[:shown], strict=True)
        ]


def win_shares(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(wins with ties as half, ties) among all pairs of one prompt's samples, as shares. Scores within ROUNDING of each other are equal."""
    differences = np.subtract.outer(np.asarray(own), np.asarray(other))
    ties = float((np.abs(differences) <= ROUNDING).mean())
    return float((differences > ROUNDING).mean()) + ties / 2, ties


def comparison(answers: Answers, baseline: Answers, *, seed: int) -> dict[str, float]:
    """The metrics of the module's table for one policy. Prompts are the unit: each weighs the same, and intervals resample them."""
    metrics = {"prompts": float(len(answers)), "samples": float(len(answers[0]))}
    if answers[0][0].score is not None:
        pairs = [win_shares(_scores_of(own), _scores_of(other)) for own, other in zip(answers, baseline, strict=True)]
        wins = np.array([win for win, _ in pairs])
        low, high = clustered_interval(wins, np.ones_like(wins), samples=2000, seed=seed)
        metrics |= {"win_rate": float(wins.mean()), "win_rate_low": low, "win_rate_high": high}
        metrics["tie_share"] = float(np.mean([tie for _, tie in pairs]))
        metrics["reward_policy"] = float(np.mean([_scores_of(own) for own in answers]))
        metrics["reward_baseline"] = float(np.mean([_scores_of(other) for other in baseline]))
    if answers[0][0].k1 is not None:
        k1 = np.array([[answer.k1 for answer in own] for own in answers], dtype=float)
        metrics["kl_k1_nats"] = float(k1.mean())
        metrics["kl_k1_standard_error_nats"] = float(k1.mean(1).std(ddof=1) / len(k1) ** 0.5) if len(k1) > 1 else 0.0
        metrics["kl_k3_nats"] = float(np.mean([[answer.k3 for answer in own] for own in answers]))
    for side, found, suffix in (("policy", answers, ""), ("baseline", baseline, "_baseline")):
        flat = [answer for own in found for answer in own]
        metrics[f"length_tokens_{side}"] = float(np.mean([answer.tokens for answer in flat]))
        metrics[f"length_words_{side}"] = float(np.mean([len(answer.text.split()) for answer in flat]))
        # Weighted by tokens: the entropy of a token, not of a token in an average completion.
        metrics["entropy_nats" + suffix] = float(np.average([a.entropy for a in flat], weights=[a.tokens for a in flat]))
        metrics["distinct_1" + suffix] = distinct_share([answer.text for answer in flat], 1)
        metrics["distinct_2" + suffix] = distinct_share([answer.text for answer in flat], 2)
        metrics["unfinished_share" + suffix] = float(np.mean([not answer.finished for answer in flat]))
        metrics["empty_share" + suffix] = float(np.mean([not answer.text.strip() for answer in flat]))
    return metrics


def _scores_of(answers: Sequence[Answer]) -> list[float]:
    return [float(answer.score) for answer in answers if answer.score is not None]


def _policy_names(inputs: dict[str, Any]) -> dict[str, str]:
    """{name: folder}; the one policy of `model` has the name ""."""
    if inputs.get("models"):
        return {str(name): str(folder) for name, folder in inputs["models"].items()}
    if not inputs.get("model"):
        raise InputError("inputs.model is missing.", remedy="Name the policy (model), or several (models: {name: folder}).")
    return {"": str(inputs["model"])}
