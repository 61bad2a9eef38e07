"""The learning curve: the same training on shares of the prompts first, each in a run directory of its own inside the run's.

A part is a run like any other (`curve/0.25/config.json` can be repeated by hand), so it stops, is killed and resumes like any other; one
that has its result is passed over. Its weights are not kept: only what it measured.
"""

import gc
import math
import shutil
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

from rewardmodel.options import RewardOptions
from training.artefact import refused_folder
from training.errors import InputError, Stopped, TrainingFailed
from training.processes import Processes
from training.rankings import RankedPrompt
from training.rundir import RunDirectory

FOLDER = "curve"
FIGURES = ("accuracy", "accuracy_low", "accuracy_high", "log_loss")


class Part(RunDirectory):
    """A part's own directory, which also tells the whole run how it goes, so that whoever watches that one sees it move."""

    whole: RunDirectory
    share: float
    later: float  # shares that are still to come after this one, the full run's 1 among them

    def event(self, kind: str, **fields: Any) -> None:
        super().event(kind, **fields)
        if kind == "warning":
            self.whole.event("warning", text=f"learning curve at {self.share:g} of the prompts: {fields['text']}")
        elif kind == "step":
            seconds_a_share = fields["seconds"] / fields["step"] * fields["steps"] / self.share
            told = {name: fields[name] for name in ("step", "steps")}
            speed = fields["metrics"].get("tokens_per_second")
            left = round(fields["eta_seconds"] + self.later * seconds_a_share, 1)
            self.whole.event("part", share=self.share, **told, tokens_per_second=speed, eta_seconds=left)


def learn_shares(run: RunDirectory, processes: Processes, options: RewardOptions, train: Callable[[Part], None]) -> list[dict[str, Any]]:
    """Train each share that has no result yet, smallest first. Every process comes here. Returns: the curve's rows so far."""
    shares = sorted(options.learning_curve)
    rows = []
    for place, share in enumerate(shares):
        part = _open(run, processes, options, share)
        part.later = sum(shares[place + 1 :]) + 1.0
        if part.result() is None:
            try:
                train(part)
            except Stopped:
                run.event("end", status="stopped", step=0)
                raise
            except (InputError, TrainingFailed) as error:
                # Too few prompts, or unlucky ones: the full run has something to learn from all the same.
                run.event("warning", text=f"the learning curve has no point at {share:g} of the prompts: {error}")
                _forget_weights(part, processes)
                continue
            _forget_weights(part, processes)
        row = curve_row(share, part.result() or {})
        run.event("learning_curve", **row)
        rows.append(row)
    return rows


def curve_row(share: float, result: dict[str, Any]) -> dict[str, Any]:
    """share, rankings (trained on), and the held-out figures; None where a figure is not known."""
    metrics, counts = result.get("metrics", {}), result.get("counts", {})
    return {"share": share, "rankings": counts.get("train", {}).get("rankings"), **{name: metrics.get(name) for name in FIGURES}}


def prompts_of_share(prompts: list[RankedPrompt], share: float, seed: int) -> list[RankedPrompt]:
    """The rankings of this share of the prompts (rounded up), by a hash of seed and prompt: a smaller share lies within a larger one."""
    order = sorted({prompt.digest for prompt in prompts}, key=lambda digest: sha256(f"{seed} {digest}".encode()).digest())
    kept = set(order[: math.ceil(share * len(order) - 1e-9)])
    return [prompt for prompt in prompts if prompt.digest in kept]


def _open(run: RunDirectory, processes: Processes, options: RewardOptions, share: float) -> Part:
    folder = run.path / FOLDER / f"{share:g}"
    if processes.is_main and not (folder / "config.json").exists():
        smaller = {"learning_curve": [], "train_share": share}
        if options.max_steps:
            smaller["max_steps"] = math.ceil(share * options.max_steps)
        config = {"method": run.method, "seed": run.seed, "inputs": run.inputs, "code": run.config["code"]}
        Part.create(folder, **config, options={**run.options, **smaller})
    processes.barrier()
    part = Part.open(folder)
    part.whole, part.share, part.is_writer = run, share, processes.is_main
    return part


def _forget_weights(part: Part, processes: Processes) -> None:
    if processes.is_main:
        for folder in (part.model_folder, refused_folder(part.model_folder), part.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    processes.barrier()
