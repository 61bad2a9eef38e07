"""PPO over one backbone: the same numbers as with separate models, one set of weights, one pass."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.ppo import train as ppo
from rewardmodel.network import Ensemble, load_reward_model
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer
from tests.alignment.letters import make_encoder, make_policy, ppo_run, write_prompts
from tests.alignment.test_ppo import Setting, events
from training.errors import InputError
from training.language_model import Lora, load_policy, save_model
from training.pack import Row
from training.slots import MERGED_ROWS, SlotLora, Switch

pytestmark = pytest.mark.training
KINDS = {"one": Ensemble(), "heads": Ensemble(3, "heads"), "adapters": Ensemble(3, "adapters")}


def write_home(folder: Path, ensemble: Ensemble) -> Path:
    """`policy`, and `reward`: LoRA over it, as if trained: no adapter is zero."""
    encoder = make_encoder()
    save_model(make_policy(0, spread=0.2), encoder, folder / "policy")
    model = load_reward_model(folder / "policy", lora=Lora(4, 8.0, keep=("score",)), ensemble=ensemble)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora" in name or "score" in name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    means = tuple(0.1 * number for number in range(ensemble.size))
    notes = RewardNotes(mean=means, scale=(0.5, 1.0, 2.0)[: ensemble.size], encoder_digest=encoder.digest)
    if ensemble.size == 1:
        notes = replace(notes, mean=0.3, scale=0.5)
    save_model(model, encoder, folder / "reward", notes={REWARD_FILE: notes.as_json()})
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    return {kind: write_home(tmp_path_factory.mktemp(kind), ensemble) for kind, ensemble in KINDS.items()}


def setting(home: Path, folder: Path, backbone: str, **options) -> Setting:
    return Setting(home, folder, backbone=backbone, lora_rank=4, minibatches=1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_see_the_same_episodes(homes: dict[str, Path], tmp_path: Path, kind: str):
    shared = setting(homes[kind], tmp_path / "shared", "shared", shared_value="adapter")
    separate = setting(homes[kind], tmp_path / "separate", "separate")
    assert shared.actors.kind == "one backbone"
    assert [row.completion_ids for row in shared.experience.rows] == [row.completion_ids for row in separate.experience.rows]
    for name in ("logps", "reference_logps", "values", "scores", "spreads"):
        one, other = (getattr(found.experience, name) for found in (shared, separate))
        assert other.abs().max() > 0.01 or (name == "spreads" and kind == "one")
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", ["head", "adapter"])
def test_both_forms_make_the_same_first_step(homes: dict[str, Path], tmp_path: Path, value: str):
    """From equal adapters the policy's gradient is equal, and so is the value loss: each value model starts as the reward model, whatever
    it is made of. A head leaves the policy's gradient alone."""
    shared = setting(homes["one"], tmp_path / "shared", "shared", shared_value=value)
    separate = setting(homes["one"], tmp_path / "separate", "separate")
    peft = {name: parameter for name, parameter in separate.actors.policy.named_parameters() if "lora_" in name}
    layers = {name: layer for name, layer in shared.actors.policy.model.named_modules() if isinstance(layer, SlotLora)}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_a["policy"].copy_(peft[f"base_model.model.{name}.lora_A.default.weight"])
    sums = [{}, {}]
    for found, own in zip((shared, separate), sums, strict=True):
        assert found.minibatch(own) < 1e-5
    for name in ("policy_loss", "value_loss", "ratio"):
        assert sums[0][name][0] == pytest.approx(sums[1][name][0], rel=1e-4, abs=1e-5)
    assert shared.actors.voices.value_head.weight.grad.abs().max() > 0
    for name, layer in layers.items():
        expected = peft[f"base_model.model.{name}.lora_B.default.weight"].grad
        torch.testing.assert_close(layer.lora_b["policy"].grad, expected, atol=1e-6, rtol=1e-3)
        if value == "adapter":
            assert layer.lora_b["value"].grad.abs().max() > 0
        assert layer.lora_b["reward-0"].grad is None


@pytest.mark.parametrize(("value", "copies"), [("head", 1), ("adapter", 2)])
def test_one_pass_says_what_policy_and_value_say(homes: dict[str, Path], tmp_path: Path, value: str, copies: int):
    """A step is one forward pass with gradients for both, and one without for reference, reward model, values and policy."""
    found = setting(homes["adapters"], tmp_path / "run", "shared", shared_value=value, tokens_per_micro_batch=100_000)
    passes = []
    found.actors.policy.model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: passes.append((len(given["input_ids"]), torch.is_grad_enabled())), with_kwargs=True
    )
    found.minibatch({})
    assert passes == [(copies, True)]
    passes.clear()
    rows = found.experience.rows
    found.actors.voices.judged(rows, rows, budget=100_000, values=True, logps=False)
    assert passes == [(5, False)], "reference, three members, and the policy for the head, or the value model"


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_head_starts_at_the_members_mean_and_learns_beside_it(homes: dict[str, Path], tmp_path: Path, kind: str):
    """Before token t: the mean of the members' normalised scores of prompt + t tokens. After some updates it explains more than that."""
    found = setting(homes[kind], tmp_path / "run", "shared", learning_rate=1e-9, value_learning_rate=3e-2, warmup_share=0.0)
    for place in (0, 5):
        row = found.experience.rows[place]
        prefixes = [Row(row.prompt_ids, row.completion_ids[:t]) for t in range(len(row.completion_ids))]
        torch.testing.assert_close(found.experience.values[place, : len(prefixes)], found.judge(prefixes), atol=1e-5, rtol=1e-4)
    losses = []
    for _ in range(8):
        sums: dict = {}
        found.minibatch(sums)
        found.updates.optimisers["value"].step(0, found.actors.processes)
        found.updates.optimisers["policy"].clear()
        losses.append(sums["value_loss"][0])
    assert losses[-1] < 0.95 * losses[0]


def test_micro_batches_change_no_gradient(homes: dict[str, Path], tmp_path: Path):
    whole = setting(homes["one"], tmp_path / "whole", "shared", tokens_per_micro_batch=100_000).gradients()
    parts = setting(homes["one"], tmp_path / "parts", "shared", tokens_per_micro_batch=32, gradient_checkpointing=True).gradients()
    assert len(whole) == len(parts) > 20
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", ["head", "adapter"])
def test_there_is_one_set_of_weights_and_training_leaves_it_alone(homes: dict[str, Path], tmp_path: Path, value: str):
    run = ppo_run(tmp_path / "run", homes["one"], lora_rank=4, learning_rate=1e-2, max_steps=3, backbone="shared", shared_value=value)
    ppo.run(run)
    assert events(run, "start")[0]["models"] == "one backbone"
    assert events(run, "step")[2]["metrics"]["kl_k3_nats"] > 1e-4
    base, trained = load_policy(homes["one"] / "policy"), load_policy(run.path / "model")
    moved = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)
    answer = [([{"role": "user", "content": "ab"}], "a")]
    if value == "adapter":
        assert Scorer.load(run.path / "value_model").score(answer) != Scorer.load(homes["one"] / "reward").score(answer)
    else:
        head = load_file(run.path / "value_model" / "head.safetensors")
        assert head["weight"].abs().max() > 0
        assert json.loads((run.path / "value_model" / "rankloop_value.json").read_text())["reward_model"] == str(homes["one"] / "reward")
    from peft import PeftModel

    again = PeftModel.from_pretrained(base, run.path / "model" / "adapter").merge_and_unload()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_a_reward_model_over_another_backbone_is_refused_and_auto_says_why_it_takes_separate_models(homes: dict[str, Path], tmp_path: Path):
    other = tmp_path / "home"
    write_home(other, Ensemble())
    save_model(make_policy(5, spread=0.2), make_encoder(), other / "policy")
    with pytest.raises(InputError, match=r"stands on another backbone than .*policy: model\..* differs"):
        setting(other, tmp_path / "shared", "shared")
    assert "another backbone" in setting(other, tmp_path / "auto", "auto").actors.kind


def test_full_weights_cannot_share(homes: dict[str, Path], tmp_path: Path):
    with pytest.raises(InputError, match="lora_rank = 0 trains all weights"):
        Setting(homes["one"], tmp_path / "run", backbone="shared")
    assert Setting(homes["one"], tmp_path / "auto").actors.kind == "separate models"


def test_an_adapter_added_to_its_weight_says_and_learns_the_same():
    """Many rows take one product with the sum of weights, few take the adapter's own way."""
    torch.manual_seed(0)
    switch = Switch(("policy",))
    layer = SlotLora(torch.nn.Linear(24, 40).requires_grad_(False), switch)
    layer.put("policy", torch.randn(4, 24), torch.randn(40, 4), 0.5, trained=True)
    many = torch.randn(2, MERGED_ROWS, 24, requires_grad=True)
    merged = layer(many)
    merged.square().sum().backward()
    found = [tensor.grad.clone() for tensor in (many, layer.lora_a["policy"], layer.lora_b["policy"])]
    expected = many.detach() @ (layer.layer.weight + 0.5 * layer.lora_b["policy"] @ layer.lora_a["policy"]).T + layer.layer.bias
    torch.testing.assert_close(merged, expected)
    for tensor in (many, layer.lora_a["policy"], layer.lora_b["policy"]):
        tensor.grad = None
    few = torch.cat([layer(part) for part in many.flatten(0, 1).split(16)])
    torch.testing.assert_close(few, merged.flatten(0, 1))
    few.square().sum().backward()
    for tensor, gradient in zip((many, layer.lora_a["policy"], layer.lora_b["policy"]), found, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-4, atol=1e-3)
