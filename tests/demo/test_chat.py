"""The chat project: its file is in the product's own shape, and comes in as rater's work."""

import json

import pytest

from annotation.models import Completion, Lease, Prompt
from annotation.services.projects import project_create
from demo.chat import FILE, chat_items, chat_project, chat_utility


def test_each_prompt_has_four_different_outputs_with_policy_and_sampling() -> None:
    items = chat_items()
    assert len(items) >= 30
    assert len({item["key"] for item in items}) == len({item["messages"][-1]["content"] for item in items}) == len(items)
    for item in items:
        texts = [one["text"] for one in item["completions"]]
        assert len(texts) == len(set(texts)) == 4
        assert all(text.strip() for text in texts), item["key"]
        for one in item["completions"]:
            assert one["policy"] == "SmolLM2-135M-Instruct"
            assert one["sampling"]["temperature"] == 0.8
            assert 0 < one["sampling"]["tokens"] <= 160
            assert {"seed", "sample", "finished"} <= set(one["sampling"])


def test_the_file_is_json_lines_without_anything_hostile() -> None:
    for line in FILE.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)
        assert "\x00" not in line
        assert "<script" not in line


@pytest.mark.django_db
def test_the_project_opens_every_prompt_to_raters_and_a_second_call_adds_nothing() -> None:
    project = chat_project()
    counts = (Prompt.objects.count(), Completion.objects.count(), Lease.objects.filter(state="free").count())
    assert counts == (len(chat_items()), 4 * len(chat_items()), 3 * len(chat_items()))
    assert project.prompts.filter(split="held_out").count() >= 5
    chat_project()
    assert counts == (Prompt.objects.count(), Completion.objects.count(), Lease.objects.filter(state="free").count())


@pytest.mark.django_db
def test_a_project_of_the_same_name_that_is_somebody_s_own_is_left_alone() -> None:
    own = project_create(slug="chat", name="Our own chats")
    assert chat_project().slug == chat_project().slug == "chat-2"
    assert not own.prompts.exists()


def test_simulated_taste_prefers_finished_on_length_and_unrepetitive_text() -> None:
    prompt = "What is the difference between green tea and black tea?"
    good = (
        "Green tea and black tea come from the same plant. The difference is that leaves for black tea are left to oxidise, "
        "which makes them dark and strong."
    )
    assert chat_utility(prompt, good) > chat_utility(prompt, good[:-20])
    assert chat_utility(prompt, good) > chat_utility(prompt, "Tea.")
    assert chat_utility(prompt, good) > chat_utility(prompt, "Black tea is tea. " * 12)
    assert chat_utility(prompt, good) > chat_utility(prompt, "[Name], " + good + " [Your Name] [Company]")
    assert chat_utility(prompt, "") == 0.0
