"""The stages of the main job on human rankings: which run directories there are, what each is made of, and how they are run.

A stage is an ordinary run directory, started as `python -m alignment RUN_DIRECTORY`. One whose `result.json` is there is not done again,
and one that was killed resumes from its checkpoint.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.slots import with_placeholders
from training.rundir import RunDirectory, file_digest
from training.scratch import make_model

HOUSE = Path(__file__).resolve().parent.parent
HELD_OUT_PERCENT = 20
SAMPLES, BEST_OF = 4, 16
SIZE = {"vocab_size": 1024, "hidden_size": 192, "layers": 4, "heads": 6}
LEARNING: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 500, "batch_rows": 32, "learning_rate": 1e-3},
    "reward": {"epochs": 3, "batch_rankings": 32, "learning_rate": 1e-4, "learning_curve": []},
    "dpo": {"epochs": 1, "batch_rankings": 16, "learning_rate": 1e-4},
    "ppo": {
        "max_steps": 10,
        "prompts_per_step": 32,
        "samples_per_prompt": 4,
        "minibatches": 4,
        "learning_rate": 2e-4,
        "max_completion_tokens": 100,
    },
}
# Long enough to go past what the reward model knows: no KL penalty holds it, and its learning rate does not fall.
LONG = LEARNING["ppo"] | {"max_steps": 24, "kl_coefficient": 0.0, "schedule": "constant", "evaluate_steps": 3, "evaluation_prompts": 260}
LONG_VIEWS = {"single": ("reward", {}), "pessimistic": ("ensemble", {"reward_view": "mean_minus_spread"})}
# The points of the frontier: beta of the two DPOs, KL coefficient of PPO and RLOO. After the first part they are held more firmly.
POINTS: dict[str, dict[str, float]] = {
    "first": {"dpo": 0.1, "listwise": 0.1, "ppo": 0.05, "rloo": 0.05},
    "online": {"ppo": 0.2, "rloo": 0.2},
    "direct": {"dpo": 0.3, "listwise": 0.3},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "listwise": {"loss": "plackett_luce"},
    "ppo": {},
    "rloo": {"advantage_estimator": "rloo"},
}
PARTS = (*POINTS, "long")


@dataclass(frozen=True, slots=True)
class Variant:
    """One policy: a family (a line in the figure), its setting (a point of the line), and how it is trained from the SFT model."""

    family: str
    setting: float
    method: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.family}-{self.setting:g}"


def variants(part: str) -> list[Variant]:
    found = []
    for family, setting in POINTS.get(part, {}).items():
        method, option = ("dpo", "beta") if family in ("dpo", "listwise") else ("ppo", "kl_coefficient")
        found.append(Variant(family, setting, method, LEARNING[method] | {option: setting} | FAMILIES[family]))
    return found


@dataclass(frozen=True, slots=True)
class Stage:
    """One run directory of one seed; `needs` are names of stages of the same seed."""

    seed: int
    name: str
    method: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Where the data is and where runs go."""

    folder: Path
    sft_file: Path
    snapshot: Path

    def home(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def model(self, seed: int, name: str) -> str:
        return str(self.home(seed) / name / "model")

    def stages(self, parts: Sequence[str], seeds: Sequence[int], long_seeds: Sequence[int]) -> list[Stage]:
        """One kind of stage after another, over all seeds: what is there after any while is there for each seed."""
        rounds: list[list[Stage]] = []
        for seed in seeds:
            stages = [self._first(seed), self._learned(seed, "reward"), self._sampled(seed)]
            for part in parts:
                trained = variants(part)
                stages += [self._policy(seed, variant) for variant in trained]
                if trained:
                    stages.append(self._evaluated(seed, part, [variant.name for variant in trained]))
                elif part == "long" and seed in long_seeds:
                    stages += [self._learned(seed, "ensemble"), *(self._long(seed, view) for view in LONG_VIEWS)]
            rounds.append(stages)
        names = list(dict.fromkeys(stage.name for stages in rounds for stage in stages))
        return [stage for name in names for stages in rounds for stage in stages if stage.name == name]

    def _first(self, seed: int) -> Stage:
        start = self.home(seed) / "start"
        if not (start / "config.json").exists():
            texts = [text for row in json_lines(self.sft_file) for text in (row["prompt"], row["completion"])]
            make_model(start, texts, seed=seed, **SIZE)
        return Stage(seed, "sft", "sft", {"model": str(start), "data": _digested(self.sft_file)}, LEARNING["sft"], ())

    def _learned(self, seed: int, name: str) -> Stage:
        options = LEARNING["reward"] | ({"ensemble_size": 4} if name == "ensemble" else {})
        return Stage(seed, name, "reward", self._inputs(seed), options, ("sft",))

    def _sampled(self, seed: int) -> Stage:
        inputs = self._inputs(seed) | {"reward_model": self.model(seed, "reward")}
        options = {"samples": BEST_OF, "split": "held_out", "max_completion_tokens": 100}
        return Stage(seed, "generate-sft", "generate", inputs, options, ("sft", "reward"))

    def _policy(self, seed: int, variant: Variant) -> Stage:
        if variant.method == "dpo":
            return Stage(seed, variant.name, "dpo", self._inputs(seed), variant.options, ("sft",))
        inputs = self._inputs(seed) | {"reward_model": self.model(seed, "reward")}
        return Stage(seed, variant.name, "ppo", inputs, variant.options, ("sft", "reward"))

    def _long(self, seed: int, view: str) -> Stage:
        judge, options = LONG_VIEWS[view]
        inputs = self._inputs(seed) | {"reward_model": self.model(seed, judge)}
        return Stage(seed, f"long-{view}", "ppo", inputs, LONG | options, ("sft", judge))

    def _evaluated(self, seed: int, part: str, names: Sequence[str]) -> Stage:
        models = {name: self.model(seed, name) for name in names}
        inputs = {"models": models, "baseline": self.model(seed, "sft"), "data": _digested(self.snapshot)}
        options = {"samples": SAMPLES, "split": "held_out", "max_completion_tokens": 100, "table_samples": 1_000_000, "table_whole": True}
        inputs["reward_model"] = self.model(seed, "reward")
        return Stage(seed, f"evaluate-{part}", "evaluate", inputs, options, ("sft", "reward", *names))

    def _inputs(self, seed: int) -> dict[str, Any]:
        return {"model": self.model(seed, "sft"), "data": _digested(self.snapshot)}


def perform(task: Task, stages: Sequence[Stage], workers: int) -> dict[tuple[int, str], dict[str, Any]]:
    """The results of all stages, by seed and name. They are run in their order, `workers` at once, each after what it needs.

    Raises:  SystemExit when one ended badly, after those that were running."""
    waiting, results = list(stages), {}
    running: dict[Future[dict[str, Any]], Stage] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for stage in [one for one in waiting if all((one.seed, need) in results for need in one.needs)]:
                if len(running) < workers:
                    running[pool.submit(run, task.home(stage.seed) / stage.name, stage)] = stage
                    waiting.remove(stage)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                results[stage.seed, stage.name] = future.result()
    return results


def run(path: Path, stage: Stage) -> dict[str, Any]:
    """The result of one run directory, started or resumed if it is not there yet."""
    directory = RunDirectory.open(path) if (path / "config.json").exists() else None
    if directory is None:
        directory = RunDirectory.create(path, method=stage.method, seed=stage.seed, inputs=stage.inputs, options=stage.options)
    if directory.result() is None:
        say(f"{path.parent.name}/{path.name} ...")
        with (path / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, "-m", "alignment", str(path)], cwd=HOUSE, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise SystemExit(f"{path} ended with status {done.returncode}: see {path / 'log.txt'} and error.json there.")
        say(f"{path.parent.name}/{path.name}: {(directory.result() or {}).get('seconds', 0):.0f} s")
    result = directory.result()
    assert result is not None
    return result


def prepare(data: Path, folder: Path) -> Task:
    """Names become placeholders; the rankings pass through the ordinary `load` and `snapshot`."""
    sft, rankings = folder / "sft.jsonl", folder / "rankings.jsonl"
    snapshots = folder / "state" / "snapshots"
    found = sorted(snapshots.glob("*/rankings.jsonl"))
    if sft.exists() and found:
        return Task(folder, sft, found[0])
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations = []
    for row in json_lines(data / "sft" / "e2e_dev.jsonl"):
        meaning, text = with_placeholders(row["prompt"], row["completion"])
        demonstrations.append({"prompt": meaning, "completion": text})
    judged = []
    for row in json_lines(data / "rankings" / "e2e_quality_k5.jsonl"):
        responses = [{**response, "text": with_placeholders(row["prompt"], response["text"])[1]} for response in row["responses"]]
        judged.append({**row, "prompt": with_placeholders(row["prompt"])[0], "responses": responses})
    write_lines(rankings, judged)
    manage("migrate", "--verbosity", "0", state=folder / "state")
    manage("project", "create", "e2e", "--name", "E2E quality", "--held-out-percent", str(HELD_OUT_PERCENT), state=folder / "state")
    manage("load", "e2e", str(rankings), state=folder / "state")
    manage("snapshot", "create", "e2e", state=folder / "state")
    write_lines(sft, demonstrations)
    return Task(folder, sft, next(iter(snapshots.glob("*/rankings.jsonl"))))


def manage(*words: str, state: Path) -> None:
    environ = {**os.environ, "RANKLOOP_VAR": str(state)}
    environ.pop("DATABASE_URL", None)
    subprocess.run([sys.executable, "manage.py", *words], cwd=HOUSE, env=environ, check=True)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as stream:
        yield from (json.loads(line) for line in stream)


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _digested(path: Path) -> dict[str, str]:
    return {"path": str(path), "digest": file_digest(path)}


def settings() -> dict[str, Any]:
    """Every option of every kind of stage, for the report."""
    policies = {variant.name: variant.options for part in PARTS for variant in variants(part)}
    return {"size": SIZE, "samples": SAMPLES, "best_of": BEST_OF, **LEARNING, "long": LONG, "long_views": LONG_VIEWS, "policies": policies}
