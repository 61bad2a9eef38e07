"""Who writes completions: one small interface, the built-in sampler, transformers' continuous batching, and vLLM.

Whoever writes draws from the whole distribution at one temperature, softmax(logits / temperature), and says the log-probability of each
token under it: top-k, top-p, penalties and the model's own `generation_config` are switched off by name. Where an engine's numbers are
not the trainer's own, it says so (`exact`), and the trainer corrects for it (`alignment.ppo.importance`).
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from alignment.rollout.built_in import batches, sample_completions
from alignment.rollout.interface import Engine, Place, checked_sample, stream_seed
from alignment.rollout.sampling import Sample, Sampling
from training.encode import Encoder
from training.errors import InputError, TrainingFailed
from training.language_model import unwrap
from training.packed_model import own_attention
from training.processes import Processes

# Tokens in a page of the continuous cache: small, because completions here are short.
PAGE_TOKENS = 32


def engine_of(name: str, place: Place) -> Engine:
    """The engine of that name: built_in, continuous, vllm or vllm_server.

    Raises:  InputError if it cannot run here.
    """
    if name == "built_in":
        return BuiltIn(place.encoder, place.processes)
    if name == "continuous":
        return Continuous(place.encoder)
    from alignment.rollout.vllm import InProcess, Server  # here, so that what nobody asked for is not loaded

    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                "engine = vllm runs vLLM in this process, and vllm is not installed.",
                remedy="pip install vllm (it needs an accelerator), start one elsewhere and set engine = 'vllm_server', or use 'built_in'.",
            )
        return InProcess(place)
    if name == "vllm_server":
        return Server(place)
    raise InputError(f"There is no engine {name}.", remedy="Use built_in, continuous, vllm or vllm_server.")


class BuiltIn:
    """Our own sampler: each sequence has random numbers of its own, whatever stands beside it."""

    def __init__(self, encoder: Encoder, processes: Processes) -> None:
        self.encoder = encoder
        self.processes = processes
        self.exact = processes.dtype == "float32"
        self.model: Any = None

    def refresh(self, model: Any) -> None:
        self.model = model

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, streams: Sequence[int] | None = None
    ) -> list[Sample]:
        return sample_completions(
            self.model,
            prompts,
            sampling,
            stop_ids=self.encoder.stop_ids,
            pad_id=self.encoder.pad_id,
            samples=samples,
            streams=streams,
            processes=self.processes,
        )

    def close(self) -> None:
        self.model = None


class Continuous:
    """transformers' continuous batching, over a paged cache: a finished row's place goes to the next prompt at once.

    It runs wherever scaled-dot-product attention does, a CPU included, in the weights' own float32 (its thread knows nothing of autocast).
    Its draws come from one generator for the batch: another batch writes other texts."""

    exact = False

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.model: Any = None

    def refresh(self, model: Any) -> None:
        plain = unwrap(model)
        if not hasattr(plain, "generate_batch"):
            raise InputError(f"{type(plain).__name__} has no continuous batching.", remedy="Set engine = 'built_in'.")
        self.model = model

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, streams: Sequence[int] | None = None
    ) -> list[Sample]:
        sampling.require_exact()
        streams = range(len(prompts)) if streams is None else streams
        found: list[list[Sample]] = [[] for _ in prompts]
        was_training = self.model.training
        self.model.eval()
        try:
            for group in batches([len(prompt) for prompt in prompts], sampling, samples):
                asked = [(place, sample) for place in group for sample in range(samples)]
                seed = stream_seed(sampling, streams[group[0]])
                for (place, sample), answer in zip(asked, self._answers(prompts, asked, sampling, seed), strict=True):
                    found[place].append(self._sample(sample, prompts[place], answer))
        finally:
            self.model.train(was_training)
        return [sample for rows in found for sample in rows]

    def _answers(self, prompts: Sequence[Sequence[int]], asked: Sequence[tuple[int, int]], sampling: Sampling, seed: int) -> list[Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig  # here: it loads all of generation

        plain: Any = unwrap(self.model)
        wanted = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.encoder.stop_ids),
            pad_token_id=self.encoder.pad_id,
        )
        longest = max(len(prompts[place]) for place, _ in asked) + sampling.max_new_tokens
        cache = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=seed,
            page_size=PAGE_TOKENS,
            num_blocks=(len(asked) + 1) * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(512, len(asked)),
            auto_switch_to_flash=False,  # flash attention takes half precision only, and these weights are float32
        )
        devices = [plain.device] if plain.device.type == "cuda" else []
        with own_attention(plain), torch.random.fork_rng(devices):  # it seeds torch's own generator
            answers = plain.generate_batch(
                [list(prompts[place]) for place, _ in asked], generation_config=wanted, continuous_batching_config=cache
            )
        wrong = next((answer.error for answer in answers.values() if answer.error), "")
        if wrong or len(answers) != len(asked):
            raise TrainingFailed(
                f"Continuous batching answered {len(answers)} of {len(asked)} prompts. {wrong}".rstrip(), remedy="Set engine = 'built_in'."
            )
        return list(answers.values())

    def _sample(self, number: int, prompt: Sequence[int], answer: Any) -> Sample:
        ids = list(answer.generated_tokens)
        return checked_sample(number, prompt, ids, answer.logprobs, self.encoder.stop_ids)

    def close(self) -> None:
        self.model = None
