"""Every loss that TRL has, against TRL itself: its trainers compute loss and gradients on the same tokens with the same weights."""

import os
from types import SimpleNamespace

import pytest
import torch

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from alignment.losses import Compared, preference_losses
from alignment.options import DPOOptions
from tests.training.tiny import llama, user
from training.encode import Encoder
from training.language_model import load_policy
from training.pack import Row
from training.row_logps import row_logps

pytestmark = pytest.mark.training
CPU = torch.device("cpu")
TEXTS = [
    ("the cat", "sat on a mat.", "ate two dogs and some fish."),
    ("a red mat", "ran home in rain while two dogs ate.", "sat."),
    ("two dogs and the fish", "the cat ate.", "a mat and a mat and a mat."),
    ("rain", "on the red mat some fish sat.", "home home."),
]


class Parts:
    """A policy, a reference that differs from it, and four pairs of tokens."""

    def __init__(self, folder):
        llama(folder)
        self.folder, self.encoder = folder, Encoder.load(folder)
        self.policy, self.reference = load_policy(folder), load_policy(folder).requires_grad_(False)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in self.reference.parameters():
                parameter.add_(0.08 * torch.randn_like(parameter))
        self.examples = [
            {
                "prompt_ids": self.encoder.prompt_ids(user(prompt)),
                "chosen_ids": self.encoder.completion_ids(chosen),
                "rejected_ids": self.encoder.completion_ids(rejected),
            }
            for prompt, chosen, rejected in TEXTS
        ]
        self.rows = [Row(one["prompt_ids"], one[side]) for one in self.examples for side in ("chosen_ids", "rejected_ids")]

    def logps(self, model, rows=None):
        return row_logps(model, rows or self.rows, self.encoder.pad_id, device=CPU, budget=1000)

    def compared(self, shift=0.0):
        wins = torch.zeros(4, 2, 2)
        wins[:, 0, 1] = 1.0
        best = torch.tensor([[1.0, 0.0]]).expand(4, 2)
        tokens = torch.tensor([float(len(row.completion_ids)) for row in self.rows]).view(4, 2)
        return Compared(self.logps(self.policy).view(4, 2), self.logps(self.reference).view(4, 2), tokens, wins, best=best, shift=shift)

    def gradients(self, loss):
        self.policy.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in self.policy.parameters()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts") / "model")


def arguments(config, folder, **more):
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **more,
    )


@pytest.fixture(scope="module")
def trainer(parts, tmp_path_factory):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in TEXTS]
    return DPOTrainer(
        model=parts.policy,
        ref_model=parts.reference,
        args=arguments(DPOConfig, tmp_path_factory.mktemp("trl"), max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=parts.encoder.tokenizer,
    )


def theirs(trainer, parts, losses, **settings):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer.loss_types, trainer.loss_weights = list(losses), list(losses.values())
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    for name, value in {**defaults, **settings}.items():
        setattr(trainer, name, value)
    batch = DataCollatorForPreference(pad_token_id=parts.encoder.pad_id)(parts.examples)
    loss = trainer.compute_loss(parts.policy, batch)
    return float(loss.detach()), parts.gradients(loss)


def assert_same(ours, gradients, expected):
    loss, their_gradients = expected
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    for one, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4)


CASES = [
    *({"loss": name} for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    *({"loss": name} for name in ("discopop", "aot", "aot_unpaired", "robust")),
    *({"loss": name, "label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    {"loss": "exo_pair", "label_smoothing": 0.001},
    *({"loss": "sigmoid", "beta": beta} for beta in (0.01, 2.0)),
    *(
        {"loss": loss, "f_divergence": divergence}
        for loss in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    {"loss": "sigmoid", "f_divergence": "alpha_divergence", "alpha_divergence_coefficient": 1.0},
    {"loss": "sigmoid", "f_divergence": "alpha_divergence", "alpha_divergence_coefficient": 1.7},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_two_completions_equal_trls_dpo_trainer(parts, trainer, case):
    names = {"f_divergence": "f_divergence_type", "alpha_divergence_coefficient": "f_alpha_divergence_coef"}
    settings = {names.get(name, name): value for name, value in case.items() if name != "loss"}
    expected = theirs(trainer, parts, {case["loss"]: 1.0}, **settings)
    ours = preference_losses(parts.compared(), DPOOptions(**case)).mean()
    assert_same(ours, parts.gradients(ours), expected)


def test_the_nll_of_one_ranking_equals_trls_sft_term(parts, trainer):
    """TRL averages over the tokens of its batch; the NLL here is the mean over each completion's tokens (RPO), so one pair at a time."""
    everything = parts.examples, parts.rows
    for place in range(4):
        batch = parts.compared()
        one = Compared(
            *(tensor[place : place + 1] for tensor in (batch.logps, batch.reference, batch.tokens, batch.wins)), best=batch.best[:1]
        )
        parts.examples = everything[0][place : place + 1]
        try:
            for options, losses in (({"loss": "sft"}, {"sft": 1.0}), ({"sft_weight": 0.3}, {"sigmoid": 1.0, "sft": 0.3})):
                ours = preference_losses(one, DPOOptions(**options)).mean()
                assert float(ours.detach()) == pytest.approx(theirs(trainer, parts, losses)[0], rel=1e-5)
        finally:
            parts.examples = everything[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.7)])
def test_desirable_and_undesirable_equal_trls_kto_trainer(parts, weights, tmp_path):
    """Four pairs are eight examples; the reference point comes from TRL's own mismatched rows."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    flat = [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, chosen, rejected in TEXTS
        for text, label in ((chosen, True), (rejected, False))
    ]
    trainer = KTOTrainer(
        model=parts.policy,
        ref_model=parts.reference,
        args=arguments(KTOConfig, tmp_path, max_length=None, desirable_weight=weights[0], undesirable_weight=weights[1]),
        train_dataset=Dataset.from_list(flat),
        processing_class=parts.encoder.tokenizer,
    )
    mismatched = [Row(row.prompt_ids, parts.rows[place - 1].completion_ids) for place, row in enumerate(parts.rows)]
    examples = [
        {
            "prompt_ids": list(row.prompt_ids),
            "completion_ids": list(row.completion_ids),
            "KL_completion_ids": list(other.completion_ids),
            "label": place % 2 == 0,
        }
        for place, (row, other) in enumerate(zip(parts.rows, mismatched, strict=True))
    ]
    loss = trainer.compute_loss(parts.policy, trainer.data_collator(examples))
    expected = float(loss.detach()), parts.gradients(loss)
    with torch.no_grad():
        shift = (parts.logps(parts.policy, mismatched) - parts.logps(parts.reference, mismatched)).mean().clamp(min=0)
    assert float(shift) > 0.01, "else the reference point would not be tested"
    options = DPOOptions(loss="kto", desirable_weight=weights[0], undesirable_weight=weights[1])
    ours = preference_losses(parts.compared(shift), options).mean()
    assert_same(ours, parts.gradients(ours), expected)


def preference_part(parts, **options):
    """Without the NLL term, as TRL's functions for these losses are."""
    ours = preference_losses(parts.compared(), DPOOptions(sft_weight=0.0, **options))
    return ours, parts.gradients(ours.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_losses_without_a_reference_equal_trls_cpo_trainer(parts, name, smoothing):
    from trl.experimental.cpo import CPOTrainer

    stub = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device=CPU),
    )
    batch = parts.compared()
    logps = batch.logps / batch.tokens if name == "simpo" else batch.logps
    losses = CPOTrainer.cpo_loss(stub, logps[:, 0], logps[:, 1])[0]
    expected = float(losses.detach().mean()), parts.gradients(losses.mean())
    ours, gradients = preference_part(
        parts, loss=name, beta=2.0, label_smoothing=smoothing, **({"simpo_gamma": 0.7} if name == "simpo" else {})
    )
    assert_same(ours.mean(), gradients, expected)


def test_the_odds_ratio_equals_trls_orpo_trainer(parts):
    """Only this part: TRL's NLL term goes over prompt and completion, the paper's (and ours) over the completion."""
    from trl.experimental.orpo import ORPOTrainer

    stub = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device=CPU))
    batch = parts.compared()
    logps = batch.logps / batch.tokens
    losses = -ORPOTrainer.odds_ratio_loss(stub, logps[:, 0], logps[:, 1])[0]
    expected = float(losses.detach().mean()), parts.gradients(losses.mean())
    ours, gradients = preference_part(parts, loss="orpo", beta=0.4)
    assert_same(ours.mean(), gradients, expected)
