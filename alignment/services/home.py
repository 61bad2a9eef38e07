"""Brings what the policies of a round wrote home to the raters: mixed, without names, once."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from statistics import fmean, pvariance
from typing import Any

from django.db import transaction
from django.db.models import Max
from django.utils import timezone

from alignment.models import Job, Round
from annotation.models import MAX_COMPLETIONS, Project, Prompt, Snapshot, User
from annotation.services.announcements import progress_announce
from annotation.services.prompts import prompts_add

ROUND_SUFFIX = re.compile(r"~r\d+$")


@transaction.atomic
def round_open(
    *, project: Project, methods: list[str], settings: dict[str, Any], snapshot: Snapshot | None = None, created_by: User | None = None
) -> Round:
    """A round under the project's next free number: above every round and every prompt's round."""
    Project.objects.select_for_update(no_key=True).get(pk=project.pk)
    newest_prompt = Prompt.objects.filter(project=project).aggregate(Max("round"))["round__max"] or 0
    newest_round = Round.objects.filter(project=project).aggregate(Max("number"))["number__max"] or 0
    number = max(newest_prompt, newest_round) + 1
    return Round.objects.create(
        project=project, number=number, methods=methods, settings=settings, snapshot=snapshot, created_by=created_by
    )


def round_bring_home(*, round: Round) -> bool:
    """Queue the round's outputs for the raters, once its last `generate` job has succeeded. Call it as often as you like.

    Each prompt gets `settings["shown"]` completions, taken in turn from the policies (which one begins changes from prompt to prompt, by
    hash), so that every policy is shown equally often. Equal texts are shown once; blank ones never; both are counted. With
    `settings["most_uncertain_prompts"]` only so many prompts come home: those whose completions the reward model's members dispute most.
    """
    jobs = list(round.jobs.filter(method=Job.Method.GENERATE).order_by("id"))
    if round.home_at or not jobs or any(job.state != Job.State.SUCCEEDED for job in jobs):
        return False
    counts: Counter[str] = Counter({"blank": 0, "equal": 0, "unshown": 0, "too_few": 0, "mended": 0})
    items = list(_items(round, jobs, counts))
    added = prompts_add(project=round.project, items=items, round=round.number)
    round.counts = {**round.counts, **counts, **added}
    round.home_at = timezone.now()
    round.save(update_fields=["counts", "home_at"])
    progress_announce(project_id=round.project_id)
    return True


def next_key(key: str, number: int) -> str:
    """`p17` and `p17~r1` both become `p17~r2`: a prompt keeps its name through the rounds. The field holds 200 characters."""
    stem, suffix = ROUND_SUFFIX.sub("", key), f"~r{number}"
    if len(stem) + len(suffix) > 200:
        stem = stem[: 180 - len(suffix)] + "~" + hashlib.sha256(stem.encode()).hexdigest()[:16]
    return stem + suffix


def _items(round: Round, jobs: list[Job], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    shown = min(int(round.settings.get("shown") or MAX_COMPLETIONS), MAX_COMPLETIONS)
    messages: dict[str, list[dict[str, str]]] = {}
    written: dict[str, dict[str, list[dict[str, Any]]]] = {}
    judged: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        for row in _rows(job):
            messages.setdefault(row["key"], row["messages"])
            judged.setdefault(row["key"], {})[row["text"]] = row.get("member_scores") or []
            written.setdefault(row["key"], {}).setdefault(job.name, []).append(_completion(job, row))
    for key in _most_disputed(round, judged, counts) if round.settings.get("most_uncertain_prompts") else sorted(written):
        completions = _mix(written[key], key, shown, counts)
        if len(completions) < 2:
            counts["too_few"] += 1
            continue
        yield {"key": next_key(key, round.number), "messages": messages[key], "completions": completions}


def _most_disputed(round: Round, judged: dict[str, dict[str, list[float]]], counts: Counter[str]) -> list[str]:
    """Keys of the prompts whose completions, of all policies together, the members of the reward model order most differently."""
    disputes = {key: dispute(list(texts.values())) for key, texts in judged.items()}
    order = sorted(disputes, key=lambda key: (-disputes[key], key))
    chosen = order[: round.settings["most_uncertain_prompts"]]
    counts["less_disputed"] = len(order) - len(chosen)
    return sorted(chosen)


def dispute(scores: list[list[float]]) -> float:
    """Mean over pairs of completions of the variance over members of P(one before the other): 0 to 1/4, 0 where there is no pair.

    The same measure as `rewardmodel.ensemble.disagreement`, which this half of the house cannot import.

    Args:    scores: of each completion by each member, in log-odds."""
    variances = []
    for one, other in combinations(scores, 2):
        chances = [0.5 * (1 + math.tanh((a - b) / 2)) for a, b in zip(one, other, strict=True)]
        variances.append(pvariance(chances) if chances else 0.0)
    return fmean(variances) if variances else 0.0


def _rows(job: Job) -> Iterator[dict[str, Any]]:
    with (job.folder / "completions.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _completion(job: Job, row: dict[str, Any]) -> dict[str, Any]:
    source = job.inputs["model"]
    policy = source["name"] if isinstance(source, dict) else str(source)
    sampling = {**row.get("sampling", {}), "sample": row.get("sample"), "logprob_nats": row.get("logprob_nats")}
    if row.get("score"):
        sampling["score"] = row["score"]
    return {"text": row["text"], "policy": policy, "run": job.name, "sampling": sampling}


def _storable(text: str, counts: Counter[str]) -> str:
    """Databases take neither NUL nor half of a surrogate pair; a model may write both."""
    clean = text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    counts["mended"] += clean != text
    return clean


def _mix(by_job: dict[str, list[dict[str, Any]]], key: str, shown: int, counts: Counter[str]) -> list[dict[str, Any]]:
    """Up to `shown` different texts, one from each policy in turn, ordered by text: the order says nothing of who wrote them."""
    begin = int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(by_job)
    names = sorted(by_job)
    queues = [list(by_job[name]) for name in names[begin:] + names[:begin]]
    chosen: dict[str, dict[str, Any]] = {}
    while any(queues):
        for queue in queues:
            if not queue:
                continue
            one = queue.pop(0)
            one["text"] = _storable(one["text"], counts)
            if not one["text"].strip():
                counts["blank"] += 1
            elif one["text"] in chosen:
                counts["equal"] += 1
                also = chosen[one["text"]]["sampling"].setdefault("also_from", [])
                if one["policy"] not in also and one["policy"] != chosen[one["text"]]["policy"]:
                    also.append(one["policy"])
            elif len(chosen) < shown:
                chosen[one["text"]] = one
            else:
                counts["unshown"] += 1
    return [chosen[text] for text in sorted(chosen)]
