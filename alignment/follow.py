"""Turns the events of a run into the progress of its job row. Pure, apart from reading the run directory."""

from collections.abc import Iterable, Sequence
from typing import Any

# Warnings are counted in the row and kept in full in events.jsonl.
COUNTED_AS_WARNING = ("warning", "alarm")


def progress_of(events: Iterable[dict[str, Any]], *, warnings: int = 0) -> dict[str, Any]:
    """Fields of the job row that the events change; the newest step wins, also when a resumed run goes back to its checkpoint."""
    changes: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for event in events:
        kind = event.get("kind")
        if kind in COUNTED_AS_WARNING:
            warnings += 1
            changes["warnings"] = warnings
        elif kind == "start":
            changes["steps"] = int(event.get("steps") or 0)
            if "first_step" in event:  # a learning curve's parts may have counted before
                changes["step"] = int(event["first_step"])
        elif kind == "resume":
            changes["step"] = int(event.get("step") or 0)
        elif kind == "part":
            changes |= _step({**event, "metrics": {"tokens_per_second": event.get("tokens_per_second")}})
        elif kind in ("step", "evaluation"):
            metrics |= metrics_of(event)
            if kind == "step":
                changes |= _step(event)
    if metrics:
        changes["metrics"] = metrics
    return changes


def alarms_of(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Alarms of PPO's guards (`step`, `name`, `seen`, `remedy`, `action`), the newest first. A resumed run takes up at its checkpoint and
    says again what it said of later steps: until then those do not count."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.get("kind") == "resume":
            found = [alarm for alarm in found if alarm["step"] <= int(event.get("step") or 0)]
        elif event.get("kind") == "alarm":
            found.append({**event, "step": int(event.get("step") or 0), "name": str(event.get("name", "alarm")).replace("_", " ")})
    return found[::-1]


def noted(events: Sequence[dict[str, Any]]) -> str:
    """`2 alarms, 1 warning`; "" of neither."""
    counts = {"alarm": len(alarms_of(events)), "warning": sum(event.get("kind") == "warning" for event in events)}
    return ", ".join(f"{count:,} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count)


def rollbacks_of(events: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """(step, to_step) of each rollback, the oldest first: what was evaluated after `to_step` and up to `step` is of a policy that was given
    up. A resumed run says again what it said of later steps, as with alarms."""
    found: list[tuple[int, int]] = []
    for event in events:
        if event.get("kind") == "resume":
            found = [back for back in found if back[0] <= int(event.get("step") or 0)]
        elif event.get("kind") == "rollback":
            found.append((int(event.get("step") or 0), int(event.get("to_step") or 0)))
    return found


def _step(event: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {"step": int(event.get("step") or 0)}
    if event.get("steps"):
        changes["steps"] = int(event["steps"])
    if "eta_seconds" in event:
        changes["eta_seconds"] = event["eta_seconds"]
    speed = numbers(event.get("metrics")).get("tokens_per_second")
    if speed is not None:
        changes["tokens_per_second"] = speed
    return changes


def metrics_of(event: dict[str, Any]) -> dict[str, float]:
    """The event's metrics; those of an evaluation are called `held_out_...`, so that they do not pass for those of training."""
    found = numbers(event.get("metrics"))
    if event.get("kind") == "step":
        return found
    return {name if name.startswith("held_out_") else f"held_out_{name}": value for name, value in found.items()}


def numbers(metrics: Any) -> dict[str, float]:
    """The plain numbers among the metrics; what is not a finite number was written as null and is left out."""
    if not isinstance(metrics, dict):
        return {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)}
