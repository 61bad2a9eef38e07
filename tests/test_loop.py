"""The full circle on a tiny model: people's rankings -> snapshot -> reward model -> policy -> new completions -> people's desks again."""

import json
from pathlib import Path

import pytest

from tests.alignment.stand import Stand, stand, write_tiny_model

__all__ = ["stand"]
pytestmark = pytest.mark.training

RATE = """
import json, uuid
from annotation.models import *
from annotation.selectors import task_of
from annotation.services.leases import lease_next
from annotation.services.projects import membership_add
from annotation.services.rankings import ranking_submit
project = Project.objects.get(slug="say")
rater, made = User.objects.get_or_create(username="anna")
if made:
    membership_add(project=project, user=rater)
done, policies = 0, set()
while (lease := lease_next(project=project, rater=rater)) is not None:
    task = task_of(lease)
    shown = sorted(task["completions"], key=lambda one: len(one["text"]))
    ranking_submit(rater=rater, token=lease.token, client_id=uuid.uuid4(), bands=[[one["id"]] for one in shown])
    policies |= set(Completion.objects.filter(prompt=lease.prompt).values_list("policy", flat=True))
    done += 1
print(json.dumps({"done": done, "policies": sorted(policies)}))
"""
SMALL = [
    f"--set={step}.{option}"
    for step, options in {
        "reward": ["epochs=1", "batch_rankings=8", "bootstrap_samples=100"],
        "dpo": ["epochs=1", "batch_rankings=8"],
        "generate": ["max_completion_tokens=12"],
        "evaluate": ["max_completion_tokens=12", "samples=1", "max_prompts=4"],
    }.items()
    for option in options
]


def write_prompts(path: Path) -> None:
    words = ["red", "green", "blue", "fish", "bird", "cat", "dog", "tea"]
    rows = [
        {"prompt": f"Say {first} {second}.", "completions": [f"The {first} {second} sleeps.", f"The {first} {second} eats the quick cup."]}
        for first in words[:4]
        for second in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rankings_become_a_policy_whose_completions_are_ranked(stand: Stand):
    start = write_tiny_model(stand.var / "start")
    write_prompts(stand.var / "prompts.jsonl")
    loaded = stand.run("load", "say", "--create", str(stand.var / "prompts.jsonl"))
    assert loaded.returncode == 0, loaded.stderr + loaded.stdout
    assert json.loads(stand.python(RATE))["done"] >= 32

    words = ("align", "round", "say", "--model", str(start), "--methods", "dpo", "--prompts", "6", "--samples", "4")
    answer = stand.answer(*words, *SMALL, "--wait", "--json", timeout=500)

    assert answer["state"] == "succeeded"
    assert {job["method"] for job in answer["jobs"]} == {"reward", "dpo", "generate", "evaluate"}
    figures = answer["policies"]["dpo"]
    assert figures["model"] == "say-r1-dpo"
    assert 0 <= figures["evaluation"]["win_rate"] <= 1
    assert "accuracy" in answer["reward_model"]
    assert answer["counts"]["prompts"] == 6

    again = json.loads(stand.python(RATE))
    assert again["done"] == 6, "the outputs are on the raters' desks"
    assert again["policies"] == sorted([str(start), "say-r1-dpo"])

    snapshot = stand.python(
        "from annotation.models import *\nfrom annotation.services.snapshots import snapshot_create\n"
        "print(snapshot_create(project=Project.objects.get(slug='say')).digest)"
    )
    rows = [json.loads(line) for line in (stand.var / "snapshots" / snapshot / "rankings.jsonl").read_text().splitlines()]
    policies = {one["policy"] for row in rows if row["round"] == 1 for one in row["completions"]}
    assert "say-r1-dpo" in policies, "the trail leads from the new ranking back to the run that wrote the text"
