"""The table of preference losses: what each one is, where it comes from and what it can be combined with. No torch here.

The functions themselves are in `losses`, `pair_losses` and `transport`; `options` checks a run's choices against this table.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossKind:
    """One preference loss. Every one of them takes rankings of K completions with all their pairs; two completions are the special case."""

    name: str
    source: str
    takes: str = "pairs"  # "pairs": one term for each pair; "ranking": the ranking as a whole; "step": all rankings of a step at once
    reference: bool = True  # whether the loss uses log-probabilities under the reference
    per_token: bool = False  # whether log-probabilities are divided by the number of completion tokens, as its paper has it
    divergence: bool = False  # whether an f-divergence other than reverse KL has a meaning
    smoothing: bool = False  # whether `label_smoothing` has a meaning
    margin: bool = False  # whether a stated strength can be taken off inside the loss
    sft_weight: float = 0.0  # weight of the NLL of the best band where the paper's loss has it


_ALL = (
    LossKind(
        "sigmoid",
        "Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023 (cDPO)",
        divergence=True,
        smoothing=True,
        margin=True,
    ),
    LossKind(
        "sigmoid_norm",
        "Lambert et al. 2024, arXiv:2411.15124",
        per_token=True,
        divergence=True,
        smoothing=True,
        margin=True,
    ),
    LossKind("hinge", "Zhao et al. 2023 (SLiC), arXiv:2305.10425; Liu et al. 2023 (RSO), arXiv:2309.06657", divergence=True, margin=True),
    LossKind("ipo", "Azar et al. 2023, arXiv:2310.12036, eq. 17", per_token=True, divergence=True),
    LossKind("robust", "Chowdhury et al. 2024, arXiv:2403.00409", divergence=True, smoothing=True, margin=True),
    LossKind("exo_pair", "Ji et al. 2024, arXiv:2402.00856, eq. 16", divergence=True, smoothing=True),
    LossKind("discopop", "Lu et al. 2024, arXiv:2406.08414, eq. 5", divergence=True),
    LossKind("nca_pair", "Chen et al. 2024, arXiv:2402.05369"),
    LossKind("bco_pair", "Jung et al. 2024, arXiv:2404.04656, without the reward shift"),
    LossKind("sppo_hard", "Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with certain preferences"),
    LossKind("apo_zero", "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7"),
    LossKind("apo_down", "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8"),
    LossKind("kto", "Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7", takes="step"),
    LossKind("aot", "Melnyk et al. 2024, arXiv:2406.05882, paired", takes="step", smoothing=True),
    LossKind("aot_unpaired", "Melnyk et al. 2024, arXiv:2406.05882, unpaired", takes="step", smoothing=True),
    LossKind("plackett_luce", "Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 18 to 20", takes="ranking", margin=True),
    LossKind("sft", "the mean negative log-likelihood of a token of the best band, and nothing else", takes="ranking", reference=False),
    LossKind("simpo", "Meng et al. 2024, arXiv:2405.14734, eq. 6", reference=False, per_token=True, smoothing=True, margin=True),
    LossKind("orpo", "Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7", reference=False, per_token=True, sft_weight=1.0),
    LossKind("cpo", "Xu et al. 2024, arXiv:2401.08417, eq. 3", reference=False, smoothing=True, margin=True, sft_weight=1.0),
)
LOSS_KINDS: dict[str, LossKind] = {kind.name: kind for kind in _ALL}
