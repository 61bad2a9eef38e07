"""Weights spread over two processes: the numbers of one process, checkpoints that either reads, and one gather to a rollout."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

import rewardmodel.train
from alignment.ppo import train as ppo
from tests.alignment.letters import ppo_run, write_models, write_prompts
from tests.training.tiny import REPOSITORY, events, llama, make_run, snapshot, start
from training.errors import InputError
from training.launched import of_config_file, sharding_asked, take_sharding
from training.rundir import RunDirectory, file_digest

LAUNCH = REPOSITORY / "alignment" / "launch"
POLICY, VALUE = "model/model.safetensors", "value_model/model.safetensors"
# 21 episodes in micro-batches of about 60 tokens: the processes have different numbers of them.
PPO: dict[str, Any] = {"max_steps": 3, "prompts_per_step": 7, "samples_per_prompt": 1, "checkpoint_steps": 2, "evaluate_steps": 0}
PPO |= {"tokens_per_micro_batch": 60, "kl_target_nats": 1.0}
REWARD = {
    "max_steps": 4,
    "batch_rankings": 7,
    "learning_rate": 1e-3,
    "tokens_per_micro_batch": 60,
    "learning_curve": [],
}
REWARD |= {"checkpoint_steps": 3, "evaluate_steps": 2}


def test_without_a_launcher_nothing_is_shared():
    assert sharding_asked({}) == "none"
    assert sharding_asked({"ACCELERATE_USE_FSDP": "false"}) == "none"


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1"),
    ],
)
def test_what_rankloop_does_not_do_is_refused(asked, error):
    with pytest.raises(InputError, match=error) as raised:
        sharding_asked(asked)
    assert raised.value.remedy


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_launch_files_as_they_are_meant(kind):
    file = LAUNCH / f"{kind}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "4", "-m", "alignment", "RUN"])
    args, _, _ = _validate_launch_command(args)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (kind == "ddp", kind == "fsdp2", kind.startswith("zero"))
    assert args.num_processes == 4
    if kind.startswith("zero"):
        assert args.zero_stage == int(kind[-1])
    else:
        asked = {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(("ACCELERATE_USE", "FSDP"))}
        assert take_sharding(asked) == ("none" if kind == "ddp" else kind)
        assert "ACCELERATE_USE_FSDP" not in asked, "accelerate and transformers would shard too"
    assert of_config_file(file)[0] == 2
    assert sharding_asked(of_config_file(file)[1]) == ("none" if kind == "ddp" else kind)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_prompts(folder / "prompts.jsonl")
    llama(folder / "words")
    snapshot(folder / "rankings.jsonl")
    return folder


def new_run(home: Path, name: str) -> RunDirectory:
    if name.endswith(("reward", "halves")):
        ties = "half" if name.endswith("halves") else "davidson"
        return make_run(home / name, "reward", model=home / "words", data=home / "rankings.jsonl", ties=ties, **REWARD)
    return ppo_run(home / name, home, **PPO, lora_rank=4 if name.endswith("lora") else 0)


def in_two_processes(plan: list[dict[str, str]], folder: Path, *, python: str = sys.executable) -> None:
    (folder / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "tests.training.together", str(folder / "plan.json")]
    children = []
    for rank in ("0", "1"):
        with (folder / f"log-{rank}.txt").open("w") as log:
            environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "HF_HUB_DISABLE_TELEMETRY": "1"}
            children.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
    try:
        for child, rank in zip(children, ("0", "1"), strict=True):
            assert child.wait(240) == 0, (folder / f"log-{rank}.txt").read_text()[-6000:]
    finally:
        for child in children:
            child.kill()


@pytest.fixture(scope="module")
def together(home: Path) -> Path:
    """Every run of two processes that the tests below look at."""
    plan = []
    for kind, names in (("fsdp2", ("ppo", "lora", "reward")), ("none", ("lora",))):
        plan += [{"kind": kind, "run": str(new_run(home, f"{kind}-{name}").path)} for name in names]
    again = new_run(home, "fsdp2-again-lora")
    plan.append({"kind": "fsdp2", "run": str(again.path), "resume_from": str(home / "fsdp2-lora" / "checkpoints" / "step-2")})
    plan.append({"kind": "count-fsdp2", "run": str(new_run(home, "counted").path)})
    in_two_processes(plan, home)
    return home


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    torch.set_num_threads(1)
    for name in ("ppo", "lora"):
        ppo.run(new_run(home, f"alone-{name}"))
    rewardmodel.train.run(new_run(home, "alone-reward"))
    return home


def furthest(one: Path, other: Path) -> float:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.training
@pytest.mark.parametrize("name", ["fsdp2-ppo", "fsdp2-lora", "none-lora"])
def test_two_processes_give_the_policy_and_the_values_of_one(together, alone, name):
    one, two = (RunDirectory.open(together / run) for run in (f"alone-{name.split('-')[1]}", name))
    for file in (POLICY, VALUE):
        assert furthest(one.path / file, two.path / file) < 1e-4
    assert furthest(together / "policy" / "model.safetensors", two.path / POLICY) > 1e-3, "nothing was learnt"
    for mine, theirs in zip(events(one, "step"), events(two, "step"), strict=True):
        for metric in ("reward", "kl_k1_nats", "policy_loss", "value_loss", "gradient_norm", "value_gradient_norm", "ratio"):
            assert mine["metrics"][metric] == pytest.approx(theirs["metrics"][metric], rel=1e-3, abs=1e-4), metric


@pytest.mark.training
def test_two_processes_give_the_reward_model_of_one(together, alone):
    """Its tie parameter is not part of the model, and is not sharded: norm, clipping and sum go over both kinds."""
    one, two = (RunDirectory.open(together / f"{name}-reward") for name in ("alone", "fsdp2"))
    assert furthest(one.path / POLICY, two.path / POLICY) < 1e-5
    assert load_file(two.path / POLICY)["score.weight"].abs().max() > 1e-4
    for metric, value in one.result()["metrics"].items():
        assert two.result()["metrics"][metric] == (value if value is None else pytest.approx(value, abs=1e-4)), metric
    for mine, theirs in zip(events(one, "step"), events(two, "step"), strict=True):
        for metric in ("loss", "gradient_norm", "tie_nu"):
            assert mine["metrics"][metric] == pytest.approx(theirs["metrics"][metric], abs=1e-4), metric
        assert mine["tokens"] == theirs["tokens"]


@pytest.mark.training
def test_a_sharded_run_resumes_to_the_same_bits(together):
    for file in (POLICY, VALUE):
        assert file_digest(together / "fsdp2-lora" / file) == file_digest(together / "fsdp2-again-lora" / file)
    assert len(events(RunDirectory.open(together / "fsdp2-again-lora"), "resume")) == 1


@pytest.mark.training
@pytest.mark.parametrize(("name", "step", "allowed"), [("ppo", 2, 1e-4), ("reward", 3, 1e-5)])
def test_one_process_goes_on_from_the_checkpoint_of_two(together, alone, name, step, allowed):
    run = new_run(together, f"on-{name}")
    shutil.copytree(together / f"fsdp2-{name}" / "checkpoints" / f"step-{step}", run.checkpoints / f"step-{step}")
    (rewardmodel.train if name == "reward" else ppo).run(run)
    assert len(events(run, "resume")) == 1
    assert furthest(together / f"alone-{name}" / POLICY, run.path / POLICY) < allowed


@pytest.mark.training
def test_a_rollout_gathers_each_part_of_each_model_once(together):
    told = json.loads((together / "counted" / "gathers.json").read_text())
    gathers = told.pop("gathers")
    assert told == {"policy": 3, "reference": 3, "value": 2, "reward": 2}, "blocks, and what is left, of two layers and of one"
    assert gathers == sum(told.values())


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def by_deepspeed(request, home: Path) -> tuple[str, Path]:
    """The same by DeepSpeed, where it is installed (the first time, it compiles for a minute)."""
    pytest.importorskip("deepspeed")
    kind = request.param
    plan = [{"kind": kind, "run": str(new_run(home, f"{kind}-{name}").path)} for name in ("ppo", "lora", "halves")]
    source = str(home / f"{kind}-ppo" / "checkpoints" / "step-2")
    plan.append({"kind": kind, "run": str(new_run(home, f"{kind}-again-ppo").path), "resume_from": source})
    plan.append({"kind": f"count-{kind}", "run": str(new_run(home, f"counted-{kind}").path)})
    in_two_processes(plan, home)
    return kind, home


@pytest.mark.training
def test_deepspeed_gives_the_weights_of_one_process(by_deepspeed, alone):
    kind, home = by_deepspeed
    rewardmodel.train.run(new_run(home, f"alone-{kind}-halves"))
    for name in ("ppo", "lora"):
        for file in (POLICY, VALUE):
            assert furthest(home / f"alone-{name}" / file, home / f"{kind}-{name}" / file) < 1e-4
        assert furthest(home / "policy" / "model.safetensors", home / f"{kind}-{name}" / POLICY) > 1e-3, "nothing was learnt"
    assert furthest(home / f"alone-{kind}-halves" / POLICY, home / f"{kind}-halves" / POLICY) < 1e-5


@pytest.mark.training
def test_a_run_by_deepspeed_resumes_in_two_processes_and_in_one(by_deepspeed, alone):
    kind, home = by_deepspeed
    for file in (POLICY, VALUE):
        assert file_digest(home / f"{kind}-ppo" / file) == file_digest(home / f"{kind}-again-ppo" / file)
    run = new_run(home, f"on-{kind}-ppo")
    shutil.copytree(home / f"{kind}-ppo" / "checkpoints" / "step-2", run.checkpoints / "step-2")
    ppo.run(run)
    assert furthest(home / "alone-ppo" / POLICY, run.path / POLICY) < 1e-4


@pytest.mark.training
def test_a_rollout_by_deepspeed_gathers_each_weight_once(by_deepspeed):
    kind, home = by_deepspeed
    told = json.loads((home / f"counted-{kind}" / "gathers.json").read_text())
    assert told["gathers"] == (told["policy"] + told["value"] if kind == "zero3" else 0)


@pytest.mark.training
@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_error_says_what_to_install_or_launch_instead(home):
    run = new_run(home, "no-deepspeed")
    child = start(run, "--config_file", str(LAUNCH / "zero3.yaml"))
    assert child.wait(120) == 2, child.communicate()[0]
    assert "DeepSpeed is not installed" in run.error()["error"]
    assert "fsdp2.yaml" in run.error()["remedy"]
