"""A step that has begun, and its rollout buffer as tensors: what a checkpoint in the middle of a step holds. Prompts are not in it: the
step knows them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from alignment.ppo.actors import Drawn
from alignment.ppo.experience import Experience
from alignment.ppo.update import Tally
from alignment.rollout.sampling import Sample
from training.checkpoint import State
from training.pack import Row
from training.processes import Processes, Sums, add_sums


@dataclass(slots=True)
class Work:
    """A step that has begun: what an interruption must not lose. `drawn` is this process's share until `experience` has it all."""

    drawn: Drawn = field(default_factory=dict)
    experience: Experience | None = None
    tally: Tally = field(default_factory=Tally)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("generate", "score", "update"), 0.0))

    def timed(self, part: str, since: float) -> float:
        """Add the time since then to a part; returns the time now."""
        now = time.monotonic()
        self.seconds[part] += now - since
        return now


def whole_work(work: Work, processes: Processes) -> State:
    """What all processes have of a step that has begun, on every process: tensors `experience` or `drawn`, and `tally`."""
    tally = work.tally
    gathered = processes.gather((work.drawn, {name: [float(top), float(bottom)] for name, (top, bottom) in tally.sums.items()}))
    sums: Sums = {}
    drawn: Drawn = {}
    for part, own in gathered:
        drawn |= part
        add_sums(sums, {name: (top, bottom) for name, (top, bottom) in own.items()})
    values = {"done": tally.done, "sums": sums, "deviation": tally.deviation, "skipped": tally.skipped, "numbers": tally.numbers}
    kept = {"drawn": drawn_tensors(drawn)} if work.experience is None else {"experience": experience_tensors(work.experience)}
    return State(kept, {"tally": values, "seconds_by_part": work.seconds})


def work_from(state: State, prompts: Sequence[Sequence[int]], samples: int, processes: Processes) -> Work:
    """The inverse, on one process of perhaps another number of them; `prompts` are those of the step."""
    values = state.values["tally"]
    # Sums of all processes are counted once.
    sums = {name: (top, bottom) for name, (top, bottom) in values["sums"].items()} if processes.is_main else {}
    tally = Tally(values["done"], sums, values["deviation"], values["skipped"], values["numbers"])
    work = Work(tally=tally, seconds=state.values["seconds_by_part"])
    if "experience" in state.tensors:
        work.experience = experience_from(state.tensors["experience"], [prompt for prompt in prompts for _ in range(samples)])
    else:
        work.drawn = drawn_from(state.tensors["drawn"], prompts)
    return work


def drawn_tensors(drawn: Drawn) -> dict[str, Tensor]:
    """Completions that were drawn before an interruption, with what sampling knew of them."""
    samples = [(place, sample) for place, found in sorted(drawn.items()) for sample in found]
    return {
        "places": torch.tensor([place for place, _ in samples], dtype=torch.long),
        "samples": torch.tensor([sample.sample for _, sample in samples], dtype=torch.long),
        "finished": torch.tensor([sample.finished for _, sample in samples], dtype=torch.bool),
        "logps": _joined([sample.logps for _, sample in samples]),
        "entropies": _joined([sample.entropies for _, sample in samples]),
        **_ids([sample.completion_ids for _, sample in samples]),
    }


def drawn_from(tensors: dict[str, Tensor], prompts: Sequence[Sequence[int]]) -> Drawn:
    """The inverse; `prompts` are those of the step."""
    lengths = tensors["lengths"].tolist()
    logps, entropies = (tensors[name].split(lengths) for name in ("logps", "entropies"))
    drawn: Drawn = {}
    for number, ids in enumerate(_lists(tensors)):
        place = int(tensors["places"][number])
        drawn.setdefault(place, []).append(
            Sample(
                sample=int(tensors["samples"][number]),
                prompt_ids=prompts[place],
                completion_ids=ids,
                logps=logps[number].clone(),
                entropies=entropies[number].clone(),
                finished=bool(tensors["finished"][number]),
            )
        )
    return drawn


def experience_tensors(experience: Experience) -> dict[str, Tensor]:
    kept = {field.name: getattr(experience, field.name) for field in fields(Experience) if field.name != "rows"}
    return {**kept, **_ids([row.completion_ids for row in experience.rows])}


def experience_from(tensors: dict[str, Tensor], prompts: Sequence[Sequence[int]]) -> Experience:
    """The inverse; `prompts` has one for each episode."""
    rows = [Row(prompt, ids) for prompt, ids in zip(prompts, _lists(tensors), strict=True)]
    return Experience(rows=rows, **{field.name: tensors[field.name] for field in fields(Experience) if field.name != "rows"})


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)


def _ids(completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {
        "ids": torch.tensor([token for ids in completions for token in ids], dtype=torch.long),
        "lengths": torch.tensor([len(ids) for ids in completions], dtype=torch.long),
    }


def _lists(tensors: dict[str, Tensor]) -> list[list[int]]:
    return [part.tolist() for part in tensors["ids"].split(tensors["lengths"].tolist())]
