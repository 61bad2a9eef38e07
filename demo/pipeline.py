"""The demo's round on the facts project: policy from nothing, raters, a round with DPO and PPO, and the report.

Each stage looks first whether its work is there already, so a demo that was killed goes on where it stopped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from django.conf import settings

from alignment.models import Job, Round
from alignment.services.jobs import JobRequest, job_create
from alignment.services.prompt_files import prompts_write
from alignment.services.rounds import RoundRequest, round_create
from annotation.errors import Refused
from annotation.models import Lease, Project
from annotation.services.projects import project_create
from annotation.services.prompts import prompts_add
from demo.conductor import jobs_run
from demo.display import Display
from demo.facts import corpus, prompts
from demo.measure import judge
from demo.raters import rank_open_prompts, raters_make
from demo.report import facts_report
from demo.sizes import DemoSizes
from demo.state import State
from training.rundir import file_digest, write_atomically

STAGES = {
    "prepare": "Project, prompts, corpus",
    "sft": "SFT from scratch",
    "write": "SFT policy writes",
    "rank": "Raters rank",
    "learn": "Round: reward model, DPO, PPO",
    "report": "Measure",
}
METHODS = ("dpo", "ppo")
GUIDELINES = """\
A slip lists three to six facts about a **lost thing**; each output is a notice made from it.

Put first the notice that

1. says **every fact** of the slip, and nothing that is not on it,
2. is one or two plain, correct sentences,
3. wastes no words.

Notices that are equally good belong in one band.

*The rankings of round 1 were made by simulated raters whose taste is known; the notices of round 2 wait for you.*
"""
# torch is loaded by a child alone: this process is the web's half.
MAKE_MODEL = """
import json, sys
from training.scratch import make_model
folder, corpus, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
rows = [json.loads(line) for line in open(corpus, encoding="utf-8")]
make_model(folder, [text for row in rows for text in (row["prompt"], row["completion"])], **sizes)
"""


def run_facts(state: State, sizes: DemoSizes, display: Display) -> dict[str, Any]:
    """Run every stage that is not done yet; returns the report (see `demo.report`). Raises Refused or Interrupted; call again to go on."""
    project = _prepare(state, sizes, display)
    sft = job_stage("sft", state, display, [_sft_job(project, state, sizes)])
    first = job_stage("write", state, display, [_first_writing(project, sft[0], sizes)])
    _rank(project, first[0].round, state, display)
    made = _learning_round(project, sft[0], sizes)
    job_stage("learn", state, display, list(made.jobs.order_by("id")), slots=min(2, cores()))
    display.begin("report")
    report = facts_report(made, seconds=lambda: sum(state.seconds.values()))
    state.spend("report", display.end())
    return report


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(state: State, sizes: DemoSizes, display: Display) -> Project:
    display.begin("prepare", "project and prompts")
    project = Project.objects.filter(slug=state.slug).first() or project_create(
        slug=state.slug,
        name="Lost and found: facts to text",
        guidelines=GUIDELINES,
        overlap=sizes.overlap,
        held_out_percent=sizes.held_out_percent,
    )
    items = [
        {"key": f"slip-{number:04d}", "messages": [{"role": "user", "content": text}]}
        for number, text in enumerate(prompts(sizes.prompts, sizes.seed), start=1)
    ]
    prompts_add(project=project, items=items)
    display.update(0.3, "corpus")
    rows = corpus(sizes.corpus_rows, sizes.seed + 1)
    write_lines(state.folder / "corpus.jsonl", rows)
    display.update(0.5, "tokenizer and untrained model")
    if not (state.folder / "untrained").exists():
        shape = {"vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden_size, "layers": sizes.layers, "heads": sizes.heads}
        run_python(MAKE_MODEL, state.folder / "untrained", state.folder / "corpus.jsonl", json.dumps({**shape, "seed": sizes.seed}))
    state.spend("prepare", display.end(f"{sizes.prompts} prompts, {sizes.corpus_rows:,} corpus rows"))
    return project


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run_python(code: str, *arguments: object) -> None:
    """Run `code` in a Python of its own. Raises Refused with the end of what it wrote."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=settings.BASE_DIR, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused("demo_child_failed", f"A step of the demo failed: {done.stderr.strip()[-1500:]}")


def job_stage(stage: str, state: State, display: Display, jobs: list[Job], *, slots: int = 1, threads: int = 2) -> list[Job]:
    """Run the jobs of one stage, `slots` at a time, at most so many threads each: matrices as small as the demo's gain nothing by more."""
    display.begin(stage)
    before = os.environ.get("OMP_NUM_THREADS")
    if before is None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, min(threads, cores() // slots)))
    try:
        rows = jobs_run(jobs, display, slots=slots, weights=JOB_WEIGHTS)
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        state.spend(stage, display.end())
    return rows


JOB_WEIGHTS = {"sft": 100.0, "reward": 40.0, "dpo": 60.0, "ppo": 120.0, "generate": 12.0, "evaluate": 20.0}


def _sft_job(project: Project, state: State, sizes: DemoSizes) -> Job:
    data = state.folder / "corpus.jsonl"
    return _job(
        f"{state.slug}-sft",
        method="sft",
        project=project,
        inputs={"model": str(state.folder / "untrained"), "data": {"path": str(data), "digest": file_digest(data)}},
        options=dict(sizes.options["sft"]),
        seed=sizes.seed,
    )


def _first_writing(project: Project, sft: Job, sizes: DemoSizes) -> Job:
    """The SFT policy writes for every prompt; the outputs come home to the raters as round 1."""
    return _job(
        f"{project.slug}-sft-writes",
        method="generate",
        project=project,
        shown=sizes.samples,
        inputs={"model": {"name": sft.name}, "data": prompts_write(project=project, split="all")},
        options={**sizes.options["generate"], "samples": sizes.samples},
        seed=sizes.seed,
    )


def _job(name: str, **request: Any) -> Job:
    return Job.objects.filter(name=name).first() or job_create(request=JobRequest(name=name, **request))


def _rank(project: Project, first: Round | None, state: State, display: Display) -> None:
    display.begin("rank", "simulated raters take their leases")
    slots = Lease.objects.filter(project=project, prompt__round=first.number if first else 1)
    total, before = slots.count(), slots.filter(state=Lease.State.DONE).count()
    if not project.rounds.exclude(methods=["generate"]).exists():  # later prompts are for people
        rank_open_prompts(
            project=project,
            raters=raters_make(project=project),
            utility=lambda prompt, text: judge(prompt, text).utility,
            report=lambda made: display.update((before + made) / max(total, 1), f"{before + made} of {total} rankings"),
        )
    state.spend("rank", display.end(f"{total} rankings, by 5 simulated raters of different reliability"))


def _learning_round(project: Project, sft: Job, sizes: DemoSizes) -> Round:
    found = project.rounds.filter(methods=list(METHODS)).first()
    if found is not None:
        return found
    options = {method: dict(sizes.options[method]) for method in ("reward", *METHODS, "generate", "evaluate")}
    options["generate"]["samples"] = sizes.samples
    request = RoundRequest(
        project=project,
        model=sft.name,
        methods=METHODS,
        options=options,
        prompts=0,
        prompt_split="held_out",
        shown=4,
        seed=sizes.seed,
    )
    return round_create(request=request)
