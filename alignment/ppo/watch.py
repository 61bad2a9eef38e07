"""What a PPO run does about its guards' alarms: tells them, and goes on, stops, or takes the policy back to where all was well.

A rollback brings back weights, optimisers, KL coefficient and the guards' memory of the last evaluation without an alarm, and doubles
the KL coefficient. The step counter moves on, so the next prompts and random numbers are new ones: the same again would end the same way.

That state lies in `good/`, apart from the checkpoints, of which only the newest few are kept and which may be younger than the trouble. A
checkpoint says which good state belonged to it, and that one is kept as long as the checkpoint is: a run that was killed and
resumed goes back to the same weights as one that was not.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from alignment.ppo.guards import Alarm, GuardOptions, Guards
from training.checkpoint import State, read_checkpoint, write_checkpoint
from training.errors import TrainingFailed
from training.processes import Processes
from training.rundir import RunDirectory, checkpoint_folders

Action = Literal["warn", "stop", "rollback"]
STOPPED_MODEL = "model.stopped"
FEW_PROMPTS = 16  # of an evaluation: with fewer its means move by chance as far as a guard's limits are


class Watch:
    """The guards of one run, the alarms that wait for an answer, and the last good state. All processes come to the same answer."""

    def __init__(self, run: RunDirectory, options: GuardOptions, processes: Processes) -> None:
        self.run = run
        self.options = options
        self.processes = processes
        self.guards = Guards(options)
        self.waiting: list[Alarm] = []
        self.told: list[Alarm] = []  # by the last answer
        self.stopping = False  # because of them
        self.stopped: list[Alarm] = []  # what an earlier start of this run ended with
        self.alarms = 0
        self.rollbacks = 0
        self.good_step: int | None = None
        self.folder = run.path / "good"

    def values(self) -> dict[str, Any]:
        """For the checkpoint: plain JSON."""
        stopped = [asdict(alarm) for alarm in self.told] if self.stopping else []
        known = {"guards": self.guards.state(), "alarms": self.alarms, "rollbacks": self.rollbacks, "good_step": self.good_step}
        return {**known, "stopped": stopped}

    def load(self, values: Mapping[str, Any] | None) -> None:
        """Args:  values: None of a checkpoint that was written before there were guards; they start at the next evaluation."""
        if values is not None:
            self.guards.load_state(values["guards"])
            self.alarms, self.rollbacks, self.good_step = values["alarms"], values["rollbacks"], values["good_step"]
            self.stopped = [Alarm(**alarm) for alarm in values["stopped"]]

    def stop_again(self) -> None:
        """A run that was stopped at its last step has no further step in which an alarm could show again: it ends as it ended."""
        seen = {alarm.name for alarm in self.waiting}
        self.waiting += [alarm for alarm in self.stopped if alarm.name not in seen]

    def warn_of_few(self, prompts: int) -> None:
        """Say so where the run does what evaluations of a handful of prompts ask for."""
        if self.options.on_alarm != "warn" and prompts < FEW_PROMPTS:
            text = f"on_alarm = {self.options.on_alarm} heeds evaluations of {prompts} prompts: below {FEW_PROMPTS} they tell mostly chance"
            self.run.event("warning", text=f"{text}. Hold more prompts out, or raise evaluation_prompts.")

    def saw_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.waiting += self.guards.check_step(step, metrics)

    def saw_evaluation(self, step: int, metrics: dict[str, float], state: Callable[[], State]) -> None:
        """Args:  state: what a rollback brings back, `kl_coefficient` among its values; asked for only where it is kept."""
        self.waiting += self.guards.check_evaluation(step, metrics)
        if self.options.on_alarm != "rollback" or self.waiting or not self.guards.calm:
            return
        kept = state()  # every process: sharded weights are gathered by all
        if self.processes.is_main:
            kept.values |= {"guards": self.guards.state(), "metrics": metrics}
            write_checkpoint(self.folder, step, kept, keep=1 << 30)
        self.good_step = step
        self.prune()
        self.processes.barrier()

    def answer(self, step: int) -> Action | None:
        """Tell the waiting alarms, each with what follows from it. Returns: what follows; None without an alarm."""
        self.told, self.waiting = self.waiting, []
        if not self.told:
            return None
        action: Action = self.options.on_alarm
        if action == "rollback" and (self.good_step is None or self.rollbacks >= self.options.most_rollbacks):
            action = "stop"
        for alarm in self.told:
            self.run.event("alarm", step=step, name=alarm.name, seen=alarm.seen, remedy=alarm.remedy, action=action)
        self.alarms += len(self.told)
        if action == "stop":
            self.stopping = True
            self.guards.rearm(self.told)
        return action

    def error(self, step: int) -> TrainingFailed:
        """With which a run ends that its last alarms stopped."""
        seen, remedies = _joined(alarm.seen for alarm in self.told), _joined(alarm.remedy for alarm in self.told)
        names = ", ".join(alarm.name.replace("_", " ") for alarm in self.told)
        before = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
        return TrainingFailed(
            f"Stopped by its guards at step {step}{before}: {names}. {seen}",
            remedy=f"{remedies} Start a new run with that, from the same model or from the policy as it was when it was stopped "
            f"(--model {self.run.path / STOPPED_MODEL}). Resumed as it is, this run stops again.",
        )

    def go_back(self, step: int) -> State:
        """The last good state, for the caller to put back; the guards' memory is put back here.

        Raises:  TrainingFailed if its files are gone or damaged."""
        folder = self.folder / f"step-{self.good_step}"
        try:
            _, state = read_checkpoint(folder)
        except ValueError as error:
            remedy = "Resume the run: it goes on from its newest checkpoint. If that ends here again, start a new run."
            raise TrainingFailed(f"Step {step}: an alarm asked for a rollback, but {error}.", remedy=remedy) from error
        self.guards.load_state(state.values["guards"])
        self.rollbacks += 1
        return state

    def went_back(self, step: int, kl_coefficient: float) -> None:
        """Tell it."""
        self.run.event("rollback", step=step, to_step=self.good_step, kl_coefficient=kl_coefficient, rollbacks=self.rollbacks)

    def prune(self) -> None:
        """Remove good states that neither this run nor a checkpoint would go back to."""
        if not self.processes.is_main or not self.folder.exists():
            return
        needed = {self.good_step}
        for checkpoint in checkpoint_folders(self.run.checkpoints):
            try:
                needed.add(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["watch"]["good_step"])
            except (OSError, ValueError, KeyError):
                continue
        for folder in checkpoint_folders(self.folder):
            if int(folder.name[5:]) not in needed:
                shutil.rmtree(folder, ignore_errors=True)


def _joined(texts: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(texts))
