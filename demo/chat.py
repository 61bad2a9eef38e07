"""The chat project: real prompts, and four outputs each that SmolLM2-135M-Instruct wrote beforehand (`demo/chat.jsonl`)."""

import json
import re
from pathlib import Path
from typing import Any

from annotation.models import Project
from annotation.services.projects import project_create
from annotation.services.prompts import prompts_add

FILE = Path(__file__).parent / "chat.jsonl"
SLUG, NAME = "chat", "Chat: everyday questions"
HELD_OUT_PERCENT = 25
GUIDELINES = """\
The outputs were written by a small language model, so none of them is perfect. **Put first what you would rather have received.**

- Does it answer *this* prompt, and is what it says true?
- Does it keep to what was asked: the length, the form, the number of items?
- Is it finished, and free of repetition?

An output that is wrong stands below one that is short. If you cannot say which of two is better, put them into one band.
"""


def chat_items() -> list[dict[str, Any]]:
    """The prompts with their completions, as `manage.py load chat demo/chat.jsonl` reads them."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def chat_project() -> Project:
    """The project with its prompts, made once. Somebody's own project `chat` is left alone: then ours is `chat-2`."""
    project = Project.objects.filter(name=NAME, slug__startswith=SLUG).order_by("id").first()
    if project is None:
        number = 1
        while Project.objects.filter(slug=(slug := SLUG if number == 1 else f"{SLUG}-{number}")).exists():
            number += 1
        project = project_create(slug=slug, name=NAME, guidelines=GUIDELINES, overlap=3, held_out_percent=HELD_OUT_PERCENT)
    prompts_add(project=project, items=chat_items())
    return project


def chat_utility(prompt: str, text: str) -> float:
    """What the simulated raters of the chat project like: finished, on length, on the subject, without repetition. About 0 to 5.

    A simple and honest taste, not a judgement of truth: such raters show that the loop turns on a real model, and no more.
    """
    words = re.findall(r"[\w']+", text.lower())
    if not words:
        return 0.0
    finished = 1.5 if re.search(r"[.!?][\"')*_\s]*$", text) else 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(trigrams)) / len(trigrams) if trigrams else 1.0
    length = 1.0 if 20 <= len(words) <= 90 else 0.4
    asked = set(re.findall(r"[a-z]{4,}", prompt.lower()))
    on_subject = len(asked & set(words)) / len(asked) if asked else 0.0
    placeholders = len(re.findall(r"\[[^\]]{2,40}\]", text))
    return finished + 1.5 * distinct**2 + length + on_subject - 0.3 * min(placeholders, 3)
