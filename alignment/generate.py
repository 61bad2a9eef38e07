"""New completions from a policy, for people to rank: several a prompt, with their lineage."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from alignment.answers import Policy, answers_in_blocks, distinct_share, stream_of, weights_digests, whole_lines
from alignment.candidates import Judge, Kept
from alignment.options import GenerateOptions
from alignment.prompts import check_room, choose_split, encode_prompts, prompt_rows
from alignment.rollout.engines import engine_of
from alignment.rollout.interface import Place
from alignment.rollout.sampling import Sampling
from alignment.selection import best_of_n_kl_bound, rejection_kl_bound
from training.encode import Encoder
from training.errors import InputError
from training.language_model import load_policy
from training.options import parse_options
from training.processes import Processes
from training.progress import Progress
from training.rundir import RunDirectory, file_digest, write_atomically

PARTIAL = ".completions.partial.jsonl"


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model`, `data` (a prompts file or a snapshot), and, if wanted, `reward_model`, which scores what is written and chooses
    what is kept. Makes `completions.jsonl` and, with an ensemble, `prompts_by_disagreement.jsonl` (docs/data-flow.md, section 3).

    Metrics: `completions`, `prompts`, `length_tokens`, `unfinished_share` (cut at max_completion_tokens), `empty_share`, `duplicate_share`
    (same text as an earlier sample of its prompt), `distinct_1`, `distinct_2`, `logprob_nats` (mean of whole completions); with a reward
    model `score`, `score_spread`, `score_worst` and `disagreement`, means over what is kept; with keep = best or rejection
    `kl_bound_nats`, how far what is kept can be from the policy as it was sampled, and with rejection `acceptance_rate`,
    `not_accepted_share` (of what is kept), `above_highest_share` (of the candidates) and `kl_estimate_nats` (`alignment.selection`).
    A run that was stopped or killed goes on after the last prompt whose samples are all written; its texts are the same.
    """
    options = parse_options(GenerateOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    name = str(run_directory.inputs["model"])
    encoder = Encoder.load(name, template=options.template, max_prompt_tokens=options.max_prompt_tokens)
    rows, split = choose_split(prompt_rows(run_directory.data_file()), options.split)
    prompts, counts = encode_prompts(rows[: options.max_prompts or None], encoder, max_dropped_share=options.max_dropped_share)
    run_directory.event("counts", prompts=counts, split=split)
    engine = engine_of(options.engine, Place(name, encoder, processes, run_directory.path / "scratch", options.engine_url))
    model = load_policy(name, device=processes.device).requires_grad_(False)
    check_room(model, prompts, options.max_completion_tokens)
    judge = _judge(run_directory, options, processes)
    with closing(engine):
        _write(run_directory, options, Policy(name, model, encoder, prompts, engine), judge, processes=processes, counts=counts)


def _judge(run: RunDirectory, options: GenerateOptions, processes: Processes) -> Judge | None:
    reward_model = run.inputs.get("reward_model")
    if reward_model:
        return Judge.load(reward_model, options, processes)
    if options.needs_reward_model:
        raise InputError(
            "keep and most_uncertain_prompts choose by a reward model, and none is given.", remedy="Give --reward-model, or keep = 'first'."
        )
    return None


def _write(
    run: RunDirectory,
    options: GenerateOptions,
    policy: Policy,
    judge: Judge | None,
    *,
    processes: Processes,
    counts: dict[str, Any],
) -> None:
    partial = run.path / PARTIAL
    first = resume_at(partial, [prompt.key for prompt in policy.prompts], options.samples) if processes.is_main else 0
    first = processes.gather(first)[0]
    progress = Progress(run, processes, steps=len(policy.prompts))
    run.event(
        "start", steps=progress.steps, processes=processes.world, device=str(processes.device), dtype=processes.dtype, first_step=first
    )
    if first:
        run.event("resume", step=first)
    progress.mark(first)
    started = time.monotonic()
    sampling = _sampling(options, run.seed, policy)
    for block in answers_in_blocks(policy, sampling, processes, samples=options.drawn, first=first):
        kept = (
            judge.choose(policy, sampling, block) if judge else [(place, [Kept(sample) for sample in samples]) for place, samples in block]
        )
        if processes.is_main:
            lines = [_line(policy, sampling, place, one) for place, chosen in kept for one in chosen]
            with partial.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        tokens = sum(len(sample.completion_ids) for _, samples in block for sample in samples)
        progress.report(block[-1][0] + 1, {}, tokens=tokens / processes.world)
    if processes.is_main:
        _finish(run, options, policy, seconds=time.monotonic() - started, counts=counts)
    run.event("end", status="done", step=progress.steps)
    processes.barrier()


def _sampling(options: GenerateOptions, seed: int, policy: Policy) -> Sampling:
    return Sampling(
        options.max_completion_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed,
        step=stream_of(policy.name),
        cache_tokens=options.cache_tokens,
    )


def _finish(run: RunDirectory, options: GenerateOptions, policy: Policy, *, seconds: float, counts: dict[str, Any]) -> None:
    partial, final = run.path / PARTIAL, run.path / "completions.jsonl"
    disputes = prompts_by_disagreement(partial)
    if options.most_uncertain_prompts:
        chosen = {prompt["key"] for prompt in disputes[: options.most_uncertain_prompts]}
        disputes = [{**prompt, "kept": prompt["key"] in chosen} for prompt in disputes]
        write_atomically(final, "".join(line for line in whole_lines(partial) if json.loads(line)["key"] in chosen))
        partial.unlink()
    else:
        partial.replace(final)
    metrics, found = summary(final)
    if not options.most_uncertain_prompts:  # which chooses among prompts by their candidates: that is another distribution again
        metrics |= kl_bound(final, options)
    if disputes:
        table = run.path / "prompts_by_disagreement.jsonl"
        write_atomically(table, "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in disputes))
    artefacts = {
        **({"prompts_by_disagreement": str(table)} if disputes else {}),
        "completions": str(final),
        "completions_digest": file_digest(final),
        "policy": {"model": policy.name, "weights": weights_digests(policy.name), "encoder_digest": policy.encoder.digest},
    }
    run.write_result(metrics=metrics, artefacts=artefacts, seconds=seconds, counts={"prompts": counts, "completions": found})


def resume_at(partial: Path, keys: list[str], samples: int) -> int:
    """How many prompts are wholly written, `samples` lines each. What follows them, such as a line cut short, is removed from the file."""
    if not partial.exists():
        return 0
    kept: list[str] = []
    for line in whole_lines(partial):
        place = len(kept) // samples
        try:
            row = json.loads(line)
        except ValueError:
            break
        if place >= len(keys) or row["key"] != keys[place]:
            break
        kept.append(line)
    whole = len(kept) // samples
    partial.write_text("".join(kept[: whole * samples]), encoding="utf-8")
    return whole


def prompts_by_disagreement(file: Path) -> list[dict[str, Any]]:
    """The prompts of a completions file, the most disputed first: what to label next. Empty where no ensemble has judged.

    `disagreement`: mean over the pairs of its completions of the variance over members of P(one before the other); `spread`: mean
    spread of their scores."""
    found: dict[str, dict[str, Any]] = {}
    for line in whole_lines(file):
        row = json.loads(line)
        if row.get("disagreement") is None:
            continue
        prompt = found.setdefault(
            row["key"], {"key": row["key"], "messages": row["messages"], "disagreement": row["disagreement"], "spread": 0.0, "kept": True}
        )
        prompt.setdefault("spreads", []).append(row["score"]["spread"])
    for prompt in found.values():
        spreads = prompt.pop("spreads")
        prompt["spread"] = sum(spreads) / len(spreads)
    return sorted(found.values(), key=lambda prompt: -prompt["disagreement"])


def summary(file: Path) -> tuple[dict[str, float], dict[str, int]]:
    """(metrics, counts) of a completions file."""
    texts: list[str] = []
    seen: set[tuple[str, str]] = set()
    prompts: set[str] = set()
    found: Counter[str] = Counter({"completions": 0, "unfinished": 0, "empty": 0, "duplicates": 0})
    tokens = logprob = 0.0
    judged: dict[str, float] = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            identity = (row["key"], row["text"])
            found.update(
                completions=1,
                unfinished=not row["sampling"]["finished"],
                empty=not row["text"].strip(),
                duplicates=identity in seen,
            )
            seen.add(identity)
            prompts.add(row["key"])
            texts.append(row["text"])
            tokens += row["sampling"]["tokens"]
            logprob += row["logprob_nats"]
            for name, number in _judged_numbers(row).items():
                judged[name] = judged.get(name, 0.0) + number
    count = max(1, found["completions"])
    return {
        "completions": float(found["completions"]),
        "prompts": float(len(prompts)),
        "length_tokens": tokens / count,
        "logprob_nats": logprob / count,
        "unfinished_share": found["unfinished"] / count,
        "empty_share": found["empty"] / count,
        "duplicate_share": found["duplicates"] / count,
        "distinct_1": distinct_share(texts, 1),
        "distinct_2": distinct_share(texts, 2),
        **{name: total / count for name, total in judged.items()},
    }, dict(found)


def kl_bound(file: Path, options: GenerateOptions) -> dict[str, float]:
    """`kl_bound_nats` of a completions file, the mean over its prompts; empty where nothing was chosen by score.

    Of rejection sampling it is the tight one only under `highest_score`: where the candidates' own highest stands for it, they are not
    accepted independently, and log(candidates / samples) is what is known."""
    if options.keep == "best":
        return {"kl_bound_nats": best_of_n_kl_bound(options.drawn, options.samples)}
    if options.keep != "rejection":
        return {}
    acceptance = [json.loads(line)["rejection"]["acceptance"] for line in whole_lines(file)]
    known = [0.0] * len(acceptance) if options.highest_score is None else acceptance
    bounds = [rejection_kl_bound(one, options.drawn, options.samples) for one in known]
    return {"kl_bound_nats": sum(bounds) / max(1, len(bounds))}


def _judged_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    score = row.get("score")
    if not score:
        return {}
    numbers = {"score": score["mean"], "score_spread": score["spread"], "score_worst": score["worst"]}
    if notes := row.get("rejection"):
        numbers |= {"acceptance_rate": notes["acceptance"], "not_accepted_share": float(not notes["accepted"])}
        numbers |= {name: notes[name] for name in ("above_highest_share", "kl_estimate_nats")}
    return numbers if row["disagreement"] is None else {**numbers, "disagreement": row["disagreement"]}


def _line(policy: Policy, sampling: Sampling, place: int, kept: Kept) -> str:
    sample = kept.sample
    drawn: dict[str, Any] = {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "tokens": len(sample.completion_ids),
        "finished": sample.finished,
    }
    if sampling.greedy:
        drawn["greedy"] = True
    if sampling.top_k:
        drawn["top_k"] = sampling.top_k
    if sampling.top_p < 1:
        drawn["top_p"] = sampling.top_p
    prompt = policy.prompts[place]
    row = {
        "key": prompt.key,
        "messages": prompt.messages,
        "text": policy.encoder.decode(sample.completion_ids),
        "policy": policy.name,
        "sample": sample.sample,
        "sampling": drawn,
        "logprob_nats": float(sample.logps.double().sum()),
    }
    if kept.score is not None:
        row |= {"score": kept.score, "disagreement": kept.disagreement}
        if kept.member_scores is not None:
            row["member_scores"] = kept.member_scores
    if kept.rejection is not None:
        row["rejection"] = kept.rejection
    return json.dumps(row, ensure_ascii=False) + "\n"
