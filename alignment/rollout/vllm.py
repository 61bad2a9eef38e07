"""vLLM as an engine, in this process or as a server: prompts go in as token ids, token ids and log-probabilities come out.

New weights reach both the same way: the policy is saved as a model folder, and vLLM's workers load it (`reload_weights`); the cache of
prompts that the old weights read is thrown away. A server offers that only in its development mode:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

It must then be reachable by nobody else: whoever can reach it can have it load any folder.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from alignment.rollout.interface import Place, checked_sample, stream_seed
from alignment.rollout.names import KEY, checked_url
from alignment.rollout.sampling import Sample, Sampling
from training.errors import InputError, TrainingFailed
from training.language_model import save_model

REQUESTS_AT_ONCE = 64
ANSWER_SECONDS = 900.0  # for one prompt's completions, or for loading weights
ATTEMPTS = 4  # of a request that found no server, or a server in trouble
PAUSE_SECONDS = 1.0  # before the second one; then twice as long each time
# Share of the accelerator's memory that vLLM takes in this process: the models that are trained need the rest.
MEMORY_SHARE = 0.3
SAID_CHARACTERS = 200  # of an answer that was a refusal, in an error

DISTRIBUTION = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # what ends a completion are `stop_token_ids`, and not what the model's own files say
    "min_tokens": 0,
}


class Refused(InputError):
    """The server understood a request and would not do it."""


def asked(sampling: Sampling, stop_ids: Sequence[int], *, samples: int, seed: int) -> dict[str, Any]:
    """The words that vLLM's `SamplingParams` and its server have in common: everything is said, nothing left to a default."""
    return {
        "n": samples,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sorted(stop_ids),
        "logprobs": 0,  # of the sampled token alone
        "seed": seed,
        **DISTRIBUTION,
    }


def hand_over(place: Place, model: Any) -> str:
    """The policy's weights as a folder; every process comes here, the first one writes.   Returns: its path."""
    folder = place.scratch / "engine_weights"
    error = ""
    if place.processes.is_main:
        try:
            save_model(model, place.encoder, folder)
        except OSError as problem:
            error = str(problem)
    if told := place.processes.gather(error)[0]:
        raise TrainingFailed(f"The policy cannot be written for the engine: {told}", remedy=f"Make room at {place.scratch}.")
    return str(folder.resolve())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that was named answers itself; its key goes nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _shown(text: str) -> str:
    """A server's own words, for an error: short, and with codes for what could command a terminal."""
    short = " ".join(text.split())[:SAID_CHARACTERS]
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in short)


class Server:
    """A vLLM server at `engine_url`, spoken to as its documentation has it: `/v1/completions`, `/collective_rpc`, `/reset_prefix_cache`.

    One request for each prompt, with a seed of its own: in one request of several prompts all of them would have the same luck."""

    exact = False

    def __init__(self, place: Place, *, answer_seconds: float = ANSWER_SECONDS, pause_seconds: float = PAUSE_SECONDS) -> None:
        self.place = place
        self.url = checked_url(place.url)
        self.answer_seconds = answer_seconds
        self.pause_seconds = pause_seconds
        self.stop_ids = place.encoder.stop_ids
        # No proxy: prompts and weights' paths stay between the two machines that were named.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self.name = self._served()
        self.checked_temperatures: set[float] = set()

    def _served(self) -> str:
        """The name of the model that it serves."""
        answer = self._ask("/v1/models", method="GET")
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError):
            raise InputError(
                f"The server at {self.url} is not a vLLM server, or serves no model: /v1/models names none.",
                remedy="See that engine_url is the address at which `vllm serve MODEL` listens.",
            ) from None

    def refresh(self, model: Any) -> None:
        folder = hand_over(self.place, model)
        refused = lost = ""
        if self.place.processes.is_main:
            try:
                self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
                self._ask("/reset_prefix_cache")
            except InputError as problem:
                refused = str(problem)
            except TrainingFailed as problem:
                lost = str(problem)
        refused, lost = self.place.processes.gather((refused, lost))[0]
        if refused or lost:
            # A server that cannot read the folder answers with a status of its own trouble, as one that is only starting does.
            remedy = (
                "Start it with VLLM_SERVER_DEV_MODE=1 where it sees that folder, with a vLLM whose workers reload weights; then resume."
            )
            told = f"The server did not take the new weights from {folder}: {refused or lost}"
            raise InputError(told, remedy=remedy) if refused else TrainingFailed(told, remedy=remedy)

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, streams: Sequence[int] | None = None
    ) -> list[Sample]:
        """Raises:  InputError where the server refuses or means other numbers;  TrainingFailed where it cannot be reached any more."""
        sampling.require_exact()
        if not prompts:
            return []
        self._check_temperature(prompts[0], sampling.temperature)
        streams = range(len(prompts)) if streams is None else streams
        with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, len(prompts))) as pool:
            waiting = [pool.submit(self._one, prompt, sampling, samples, stream) for prompt, stream in zip(prompts, streams, strict=True)]
            try:
                return [sample for answer in waiting for sample in answer.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, prompt: Sequence[int], sampling: Sampling, samples: int, stream: int) -> list[Sample]:
        wanted = asked(sampling, list(self.stop_ids), samples=samples, seed=stream_seed(sampling, stream))
        answer = self._ask("/v1/completions", {"model": self.name, "prompt": list(prompt), "return_token_ids": True, **wanted})
        choices = sorted(answer.get("choices", []), key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(samples)):
            raise TrainingFailed(f"The server answered {len(choices)} completions instead of {samples}.", remedy="Look at its log.")
        return [self._read(prompt, sampling, choice) for choice in choices]

    def _read(self, prompt: Sequence[int], sampling: Sampling, choice: dict[str, Any]) -> Sample:
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if ids is None or logprobs is None:
            raise InputError("The server does not tell token ids and log-probabilities.", remedy="Use vLLM 0.10.2 or newer.")
        sample = checked_sample(choice["index"], prompt, list(ids), logprobs["token_logprobs"], self.stop_ids)
        if not sample.finished and len(sample.completion_ids) < sampling.max_new_tokens:
            why = _shown(str(choice.get("finish_reason")))
            raise InputError(
                f"The server cut a completion at {len(ids)} of {sampling.max_new_tokens} tokens ({why}).",
                remedy="Start it with a larger --max-model-len.",
            )
        return sample

    def _check_temperature(self, prompt: Sequence[int], temperature: float) -> None:
        """Whether log-probabilities are those after division by the temperature: by default vLLM's are those before it.

        The two likeliest first tokens differ by d at temperature 1, and must by d / temperature here."""
        if temperature == 1 or temperature in self.checked_temperatures:
            return
        plain, warm = (self._two_likeliest(prompt, value) for value in (1.0, temperature))
        found, other = warm[0] - warm[1], plain[0] - plain[1]
        wanted = other / temperature
        if abs(wanted - other) < 0.01:
            return  # nothing to tell them apart by; another prompt will
        if abs(found - other) < abs(found - wanted):
            raise InputError(
                f"The server's log-probabilities are those of temperature 1, not of {temperature}.",
                remedy="Start it with --logprobs-mode processed_logprobs.",
            )
        self.checked_temperatures.add(temperature)

    def _two_likeliest(self, prompt: Sequence[int], temperature: float) -> list[float]:
        wanted = asked(Sampling(1, temperature=temperature), list(self.stop_ids), samples=1, seed=0) | {"logprobs": 2}
        answer = self._ask("/v1/completions", {"model": self.name, "prompt": list(prompt), **wanted})
        return sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]

    def _ask(self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> Any:
        """One request, again where the connection or the server fails: an answer that was lost is asked for anew, with the same seed."""
        pause = self.pause_seconds
        for attempt in range(ATTEMPTS):
            try:
                return self._once(path, body, method)
            except Refused:
                raise
            except (OSError, HTTPException, ValueError) as problem:
                if attempt == ATTEMPTS - 1:
                    raise TrainingFailed(
                        f"The server at {self.url} does not answer {path}: {_shown(str(problem))}",
                        remedy="Start it, see that engine_url is right, and resume this run.",
                    ) from problem
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _once(self, path: str, body: dict[str, Any] | None, method: str) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body or {}).encode() if method == "POST" else None
        # The scheme was checked: it is http or https.
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)  # noqa: S310
        try:
            with self.opener.open(request, timeout=self.answer_seconds) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = _shown(error.read(2000).decode(errors="replace"))
            if error.code >= 500 or error.code == 429:
                raise OSError(f"status {error.code}: {said}") from error
            raise Refused(
                f"The server at {self.url} refused {path} with status {error.code}: {said}",
                remedy=f"See that engine_url is a vLLM server, that it serves this model, and that {KEY} has its key.",
            ) from error
        return json.loads(text) if text.strip() else {}

    def close(self) -> None:
        self.opener.close()


class InProcess:
    """vLLM beside the models that are trained, on the same accelerator. Each process of a run has its own."""

    exact = False

    def __init__(self, place: Place) -> None:
        from vllm import LLM  # here, because it is not among the requirements

        self.place = place
        self.stop_ids = place.encoder.stop_ids
        self.llm: Any = LLM(
            model=place.model,
            dtype="bfloat16" if place.processes.dtype == "bfloat16" else "float32",
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            gpu_memory_utilization=MEMORY_SHARE,
        )

    def refresh(self, model: Any) -> None:
        folder = hand_over(self.place, model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_prefix_cache()

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, streams: Sequence[int] | None = None
    ) -> list[Sample]:
        from vllm import SamplingParams

        sampling.require_exact()
        streams = range(len(prompts)) if streams is None else streams
        wanted = [
            SamplingParams(**asked(sampling, list(self.stop_ids), samples=samples, seed=stream_seed(sampling, stream)), detokenize=False)
            for stream in streams
        ]
        answers = self.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], wanted, use_tqdm=False)
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            for number, output in enumerate(sorted(answer.outputs, key=lambda output: output.index)):
                ids = list(output.token_ids)
                logps = [likely[token].logprob for likely, token in zip(output.logprobs, ids, strict=True)]
                found.append(checked_sample(number, prompt, ids, logps, self.stop_ids))
        return found

    def close(self) -> None:
        self.llm = None
