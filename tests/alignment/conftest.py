"""What tests of sampling and PPO share."""

from pathlib import Path

import pytest

from tests.alignment.letters import write_models, write_prompts


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Policy, reward model and prompts of the language of six letters; made anew for each file of tests."""
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_prompts(folder / "prompts.jsonl")
    return folder
