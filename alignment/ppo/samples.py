"""`samples.jsonl` of a PPO run: what the policy wrote at each evaluation, with score and KL."""

import json
from collections.abc import Sequence
from typing import Any

from alignment.answers import whole_lines
from alignment.ppo.experience import Experience
from alignment.ppo.losses import kl_k1, kl_k3
from alignment.prompts import EncodedPrompt
from training.encode import Encoder
from training.rundir import RunDirectory, finite, write_atomically


class SampleFile:
    """One JSON object a line: `step, key, messages, text, score, kl_k1_nats, kl_k3_nats, tokens, finished`."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self.path = run_directory.path / "samples.jsonl"

    def append(self, step: int, prompts: Sequence[EncodedPrompt], experience: Experience, encoder: Encoder) -> None:
        mask = experience.mask
        k1 = kl_k1(experience.logps, experience.reference_logps).masked_fill(~mask, 0).sum(1).tolist()
        k3 = kl_k3(experience.logps, experience.reference_logps).masked_fill(~mask, 0).sum(1).tolist()
        lines = []
        for place, prompt in enumerate(prompts):
            ids = experience.rows[place].completion_ids
            row: dict[str, Any] = {
                "step": step,
                "key": prompt.key,
                "messages": prompt.messages,
                "text": encoder.decode(ids),
                "score": float(experience.scores[place]),
                "kl_k1_nats": k1[place],
                "kl_k3_nats": k3[place],
                "tokens": len(ids),
                "finished": bool(experience.finished[place]),
            }
            lines.append(json.dumps(finite(row), ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def cut(self, step: int) -> None:
        """Drop what a killed run wrote after `step`, and a line cut short: those evaluations come again."""
        if not self.path.exists():
            return
        kept = []
        for line in whole_lines(self.path):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line)
        write_atomically(self.path, "".join(kept))
