"""Human rankings made ready for `human_quality`: snapshots, the same rankings as shuffled pairs, demonstrations, and what is held out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.e2e_stages import json_lines, manage, write_lines
from benchmarks.slots import with_placeholders
from training.encode import Encoder
from training.ledger import Ledger
from training.rankings import RankedPrompt, encode_rankings, read_rankings

MAX_PROMPT_CHARACTERS = 700
MAX_PROMPT_TOKENS = 320


@dataclass(frozen=True, slots=True)
class DataSet:
    """`family`: which SFT model its reward models start from."""

    name: str
    title: str
    file: str
    family: str
    variants: tuple[str, ...]
    held_out_percent: int = 20
    max_completion_tokens: int = 256
    epochs: int = 3


E2E = ("k-wise", "shuffled", "plackett-luce", "drop", "heads", "raters")
HH = ("k-wise", "smoothed", "heads")
DATA_SETS = (
    DataSet("e2e-quality", "E2E quality", "rankings/e2e_quality_k5.jsonl", "e2e", (*E2E, "rao-kupper", "half")),
    DataSet("e2e-naturalness", "E2E naturalness", "rankings/e2e_naturalness_k5.jsonl", "e2e", E2E),
    DataSet("oasst", "OASST", "rankings/oasst_en100.jsonl", "chat", ("k-wise", "shuffled", "plackett-luce", "heads"), 30, 700),
    DataSet("hh-helpful", "HH helpful", "pairs/hh_helpful_train.jsonl", "chat", HH, epochs=1),
    DataSet("hh-harmless", "HH harmless", "pairs/hh_harmless_train.jsonl", "chat", HH, epochs=1),
)
E2E_TEXTS = "sft/e2e_dev.jsonl"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A data set's files: `snapshot`, and `pairs`, the same with every training pair an item of its own; `counts` of the preparation."""

    data_set: DataSet
    snapshot: Path
    pairs: Path
    counts: dict[str, Any]


def prepare(data_set: DataSet, data: Path, folder: Path) -> Prepared:
    """The ordinary `load` and `snapshot` of the rows, restaurant names as placeholders, old turns of long chats cut away."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, counts = folder / "pairs.jsonl", folder / "counts.json"
    found = sorted((folder / "state" / "snapshots").glob("*/rankings.jsonl"))
    if not counts.exists() or not found:
        read = [with_names_hidden(row) if data_set.family == "e2e" else row for row in json_lines(data / data_set.file)]
        rows = [shortened(row) for row in read]
        write_lines(folder / "rows.jsonl", rows)
        state = folder / "state"
        manage("migrate", "--verbosity", "0", state=state)
        manage("project", "create", data_set.name, "--held-out-percent", str(data_set.held_out_percent), state=state)
        manage("load", data_set.name, str(folder / "rows.jsonl"), "--verbosity", "0", state=state)
        manage("snapshot", "create", data_set.name, state=state)
        found = sorted((state / "snapshots").glob("*/rankings.jsonl"))
        write_lines(pairs, list(as_pairs(found[0])))
        cut = sum(row["prompt"] != before["prompt"] for row, before in zip(rows, read, strict=True))
        counts.write_text(json.dumps({"rows": len(rows), "prompts_cut": cut}))
    return Prepared(data_set, found[0], pairs, json.loads(counts.read_text()))


def with_names_hidden(row: dict[str, Any]) -> dict[str, Any]:
    meaning = row["prompt"]
    responses = [{**response, "text": with_placeholders(meaning, response["text"])[1]} for response in row["responses"]]
    return {**row, "prompt": with_placeholders(meaning)[0], "responses": responses}


def shortened(row: dict[str, Any], most: int = MAX_PROMPT_CHARACTERS) -> dict[str, Any]:
    """Without the oldest turns where a conversation is longer than `most` characters; its last turn stays."""
    turns = row["prompt"]
    while isinstance(turns, list) and len(turns) > 1 and sum(len(turn["content"]) for turn in turns) > most:
        turns = turns[1:]
    return {**row, "prompt": turns}


def as_pairs(snapshot: Path) -> Iterator[dict[str, Any]]:
    """Lines of the snapshot in which each pair of a training ranking is a ranking of two, apart from the others; held-out lines stay.

    A ranking's pairs weigh as much together as the ranking did, so a step holds as many pairs as it does with whole rankings, and the
    objective is the same: only what meets in one step differs.
    """
    for line in json_lines(snapshot):
        if line["split"] != "train":
            yield line
            continue
        place = {index: number for number, band in enumerate(line["bands"]) for index in band}
        ranked = sorted(place)
        pairs = [(one, other) for at, one in enumerate(ranked) for other in ranked[at + 1 :]]
        for one, other in pairs:
            better = [[0, 1]] if place[one] == place[other] else [[0], [1]] if place[one] < place[other] else [[1], [0]]
            yield {
                **line,
                "key": f"{line['key']}/{one}-{other}",
                "ranking": f"{line['ranking']}/{one}-{other}",
                "completions": [line["completions"][one], line["completions"][other]],
                "bands": better,
                "displayed": [],
                "weight": line.get("weight", 1.0) / len(pairs),
            }


def demonstrations(family: str, data: Path, prepared: Sequence[Prepared], file: Path) -> Path:
    """What the family's SFT model learns: people's own restaurant texts, or the best reply to each training prompt of the chats.

    Held-out prompts are left out.
    """
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    prompts = [item for one in prepared for item in read_rankings(one.snapshot)]
    held_out = {json.dumps(item.messages) for item in prompts if item.split == "held_out"}
    if family == "e2e":
        texts = (with_placeholders(row["prompt"], row["completion"]) for row in json_lines(data / E2E_TEXTS))
        rows = [([{"role": "user", "content": meaning}], text) for meaning, text in texts]
    else:
        rows = [(item.messages, item.completions[item.rankings[0].bands[0][0]]) for item in prompts]
    write_lines(file, [{"prompt": messages, "completion": text} for messages, text in rows if json.dumps(messages) not in held_out])
    return file


def kept(prompts: Sequence[RankedPrompt], encoder: Encoder) -> tuple[list[RankedPrompt], Ledger]:
    """The prompts, completions and rankings that fit the encoder's limits: what training reads and held-out figures are about."""
    ledger = Ledger("completions")
    items = []
    for prompt in prompts:
        for item in encode_rankings([prompt], encoder, ledger):
            items.append(replace(prompt, completions=item.texts, rankings=item.rankings))
    return items, ledger
