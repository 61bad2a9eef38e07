"""Engines: whoever writes, the log-probabilities are those of the policy's whole distribution, and what cannot be had says why.

vLLM itself is not run here: its server's documented JSON is, with real completions behind it (`tests.alignment.vllm_stand`)."""

import json
import math
import socket
from pathlib import Path

import pytest
import torch

from alignment import generate
from alignment.options import GenerateOptions
from alignment.ppo import train as ppo
from alignment.rollout.engines import BuiltIn, Continuous, Engine, Place, engine_of
from alignment.rollout.names import checked_url
from alignment.rollout.sampling import Sample, Sampling
from alignment.rollout.vllm import Server
from tests.alignment.letters import make_encoder, make_policy, ppo_run, write_models, write_prompts
from tests.alignment.test_ppo import Setting
from tests.alignment.vllm_stand import VllmStand
from training.errors import InputError, TrainingFailed
from training.language_model import completion_logps, save_model
from training.options import OptionError, parse_options
from training.pack import pad_rows
from training.processes import Processes
from training.rundir import RunDirectory

PROMPTS = [[3, 4, 5, 2], [6, 2], [8, 7, 6, 5, 4, 3, 2], [4, 2], [5, 2]]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    save_model(make_policy(5), make_encoder(), folder / "sharp")
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture
def stand(home: Path):
    with VllmStand(home / "policy") as running:
        yield running


def place(home: Path, tmp_path: Path, url: str = "") -> Place:
    return Place(str(home / "policy"), make_encoder(), Processes("float32"), tmp_path / "scratch", url)


def server(home: Path, tmp_path: Path, url: str, **given: float) -> Server:
    return Server(place(home, tmp_path, url), **{"pause_seconds": 0.01, "answer_seconds": 10.0, **given})


def assert_whole_distribution(model, found: list[Sample], temperature: float) -> None:
    """Each log-probability is that of a fresh forward pass, and completions end where a stop token or the limit says."""
    padded = pad_rows([sample.row for sample in found], 1)
    with torch.no_grad():
        logps = completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask, temperature)
    for row, sample in enumerate(found):
        assert torch.allclose(sample.logps, logps[row, len(sample.prompt_ids) : len(sample.row)], atol=1e-5)
        assert 0 not in sample.completion_ids[:-1]
        assert sample.finished == (sample.completion_ids[-1] == 0)
        assert sample.finished or len(sample.completion_ids) == 12


def test_engines_that_cannot_run_here_say_what_to_do(home: Path, tmp_path: Path):
    with pytest.raises(InputError, match="not installed") as missing:
        engine_of("vllm", place(home, tmp_path))
    assert "pip install vllm" in missing.value.remedy
    with pytest.raises(InputError, match="no engine"):
        engine_of("magic", place(home, tmp_path))


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "file:///etc/passwd", "http://", "http://u:key@host", "http://host/?a=b", "ftp://host", "http://[", "http://h:x"],
)
def test_what_is_no_address_of_a_server_is_refused(url: str):
    with pytest.raises(InputError, match="address of a server"):
        checked_url(url)
    with pytest.raises(OptionError) as refused:  # already where options are checked, and without the key
        parse_options(GenerateOptions, {"engine": "vllm_server", "engine_url": url})
    assert "u:key" not in f"{refused.value} {refused.value.remedy}"
    assert checked_url("https://host:1/under/v1/") == "https://host:1/under"


def test_other_engines_refuse_rules_that_change_the_distribution(home: Path, tmp_path: Path, stand: VllmStand):
    with pytest.raises(OptionError, match="whole distribution"):
        parse_options(GenerateOptions, {"engine": "continuous", "top_p": 0.9})
    for engine in (Continuous(make_encoder()), server(home, tmp_path, stand.url)):
        with pytest.raises(ValueError, match="ratio"):
            engine.sample(PROMPTS, Sampling(12, top_k=3))


@pytest.mark.parametrize("name", ["built_in", "continuous", "vllm_server"])
def test_every_engine_writes_in_order_with_the_policys_own_log_probabilities(name: str, home: Path, tmp_path: Path, stand: VllmStand):
    model, where = make_policy(5), place(home, tmp_path, stand.url)
    engine: Engine = BuiltIn(where.encoder, where.processes) if name == "built_in" else engine_of(name, where)
    engine.refresh(model)  # the server began with other weights
    before = torch.get_rng_state()
    found = engine.sample(PROMPTS, Sampling(12, temperature=0.7, seed=3), samples=3)
    assert torch.equal(before, torch.get_rng_state())
    assert [(list(sample.prompt_ids), sample.sample) for sample in found] == [(prompt, n) for prompt in PROMPTS for n in range(3)]
    assert_whole_distribution(model, found, 0.7)
    again = engine.sample(PROMPTS, Sampling(12, temperature=0.7, seed=3), samples=3)
    assert [sample.completion_ids for sample in again] == [sample.completion_ids for sample in found]
    other = engine.sample(PROMPTS, Sampling(12, temperature=0.7, seed=4), samples=3)
    assert [sample.completion_ids for sample in other] != [sample.completion_ids for sample in found]
    assert len({tuple(sample.completion_ids) for sample in found}) > 5
    engine.close()


def test_the_server_is_told_everything_that_could_change_the_distribution(home: Path, tmp_path: Path, stand: VllmStand, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server(home, tmp_path, stand.url).sample(PROMPTS, Sampling(12, temperature=1.0), samples=2)
    bodies = stand.of("/v1/completions")
    expected = {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "temperature": 1.0, "max_tokens": 12, "n": 2, "stop_token_ids": [0], "ignore_eos": True, "logprobs": 0, "model": "the-policy",
    }  # fmt: skip
    assert len(bodies) == len(PROMPTS)
    assert all(body.items() >= expected.items() for body in bodies)
    assert len({body["seed"] for body in bodies}) == len(PROMPTS)
    assert set(stand.keys) == {"Bearer secret"}


def test_new_weights_reach_the_server_and_what_the_old_ones_read_is_thrown_away(home: Path, tmp_path: Path, stand: VllmStand):
    engine = server(home, tmp_path, stand.url)
    engine.refresh(make_policy(7))
    assert torch.equal(stand.model.lm_head.weight, make_policy(7).lm_head.weight)
    assert [path for path, _ in stand.requests] == ["/collective_rpc", "/reset_prefix_cache"]


def test_log_probabilities_of_another_temperature_are_refused(home: Path, tmp_path: Path):
    with VllmStand(home / "sharp", raw=True) as stand, pytest.raises(InputError, match="not of 0") as refused:
        server(home, tmp_path, stand.url).sample(PROMPTS, Sampling(12, temperature=0.5))
    assert "processed_logprobs" in refused.value.remedy


def test_a_server_in_trouble_is_asked_again_and_no_completion_is_lost(home: Path, tmp_path: Path, stand: VllmStand):
    engine = server(home, tmp_path, stand.url)
    calm = engine.sample(PROMPTS, Sampling(12))
    stand.troubles = [503, 500, 429]
    assert [sample.completion_ids for sample in engine.sample(PROMPTS, Sampling(12))] == [sample.completion_ids for sample in calm]


def test_a_refusal_is_told_at_once_with_the_servers_own_words(home: Path, tmp_path: Path, stand: VllmStand):
    with pytest.raises(InputError, match="longer than the model"):
        server(home, tmp_path, stand.url).sample([[3] * 200], Sampling(12))
    assert len(stand.requests) == 1


def test_a_server_cannot_command_a_terminal_with_what_it_says(home: Path, tmp_path: Path, stand: VllmStand):
    engine = server(home, tmp_path, stand.url)
    stand.troubles, stand.words = [400], b"no\x1b[2J\xe2\x80\xaeluck\x9b" * 90
    with pytest.raises(InputError, match=r"no\\x1b\[2J\\u202eluck") as refused:
        engine.sample(PROMPTS[:1], Sampling(12))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 800


@pytest.mark.parametrize("models", [[], {}, {"data": []}, {"data": [{"name": "x"}]}, "ok", None])
def test_a_server_that_is_no_vllm_is_refused(models, home: Path, tmp_path: Path, stand: VllmStand):
    stand.models = models
    with pytest.raises(InputError, match="not a vLLM server") as refused:
        server(home, tmp_path, stand.url)
    assert "engine_url" in refused.value.remedy


def test_a_completion_that_the_server_cut_short_is_not_taken_for_a_whole_one(home: Path, tmp_path: Path):
    with VllmStand(home / "policy", longest=6) as stand, pytest.raises(InputError, match="cut a completion"):
        server(home, tmp_path, stand.url).sample([[3, 4, 5, 2]] * 8, Sampling(12))


def test_no_server_and_a_silent_one_end_with_the_address(home: Path, tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrainingFailed, match=address):
            server(home, tmp_path, address)  # nobody listens
        silent.listen()
        with pytest.raises(TrainingFailed, match=address):
            server(home, tmp_path, address, answer_seconds=0.05)  # somebody listens, and says nothing


def test_generate_writes_with_the_engine_that_was_asked_for(home: Path, tmp_path: Path, stand: VllmStand):
    inputs = {"model": str(home / "policy"), "data": str(home / "prompts.jsonl")}
    options = {"samples": 2, "max_completion_tokens": 8, "engine": "vllm_server", "engine_url": stand.url, "max_prompts": 5}
    run = RunDirectory.create(tmp_path / "run", method="generate", seed=0, inputs=inputs, options=options)
    generate.run(run)
    assert len((run.path / "completions.jsonl").read_text().splitlines()) == 10
    assert len(stand.of("/v1/completions")) == 5


@pytest.mark.training
def test_a_token_that_the_engine_writes_too_seldom_counts_for_more_up_to_the_cap(home: Path, tmp_path: Path):
    """Log-probabilities ln 1.2 below the trainer's make each token, and so the policy's gradient, count 1.2 times; ln 2 is cut at 1.5."""
    setting = Setting(home, tmp_path / "run", importance_cap=1.5)
    experience, policy = setting.experience, setting.actors.policy
    found = {}
    for factor in (1.0, 1.2, 2.0):
        experience.engine_logps = experience.logps - math.log(factor)
        setting.updates._accumulate(experience, setting.aims, 0.05, list(range(len(experience.rows))), {})
        found[factor] = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
        policy.zero_grad(set_to_none=True)
    assert found[1.0].abs().max() > 1e-4
    assert torch.allclose(found[1.2], 1.2 * found[1.0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(found[2.0], 1.5 * found[1.0], rtol=1e-4, atol=1e-7)


@pytest.mark.training
@pytest.mark.parametrize("name", ["continuous", "vllm_server"])
def test_ppo_learns_what_another_engine_wrote_and_tells_the_mismatch(name: str, home: Path, tmp_path: Path, stand: VllmStand):
    """The engine has the step's own weights each time, so that the mismatch is rounding; ratios begin at 1."""
    url = stand.url if name == "vllm_server" else ""
    run = ppo_run(tmp_path / "run", home, engine=name, engine_url=url, max_steps=2, evaluate_steps=0, temperature=0.8)
    ppo.run(run)
    steps = [event["metrics"] for event in run.read_events()[0] if event["kind"] == "step"]
    assert len(steps) == 2
    for step in steps:
        assert step["mismatch_nats"] < 1e-4
        assert step["importance_sample_share"] == pytest.approx(1, abs=1e-4)
        assert step["importance_capped_share"] == 0
        assert step["first_ratio_deviation"] < 1e-3
        assert "entropy_nats" not in step
    assert json.loads((run.path / "result.json").read_text())["metrics"]["steps"] == 2
    # An evaluation at the start, two steps, one at the end: each with the weights of its moment.
    assert name == "continuous" or len(stand.of("/collective_rpc")) >= 4
