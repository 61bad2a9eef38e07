"""The rows of the comparison with TRL, and the files of one row: a snapshot of rankings and a model of random weights.

    python -m benchmarks.rank_data FOLDER

writes `model/`, `rankings.jsonl` and `facts.json` beside the `row.json` that is in FOLDER already. Made rankings are words of one token
each, so that prompts and completions have exactly the lengths that the row names; human rankings go through a tokenizer trained on them.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

HOUSE = Path(__file__).resolve().parent.parent
DATA = HOUSE.parent / "shared" / "data"
END, PAD = 0, 1  # token ids, as training.scratch gives them
HH_LONGEST_CHARACTERS = 1500  # of a prompt, and of a completion: about 350 tokens, far below both sides' limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model: Qwen2 of random weights."""

    layers: int = 6
    width: int = 256
    inner: int = 704
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 8192

    @property
    def words(self) -> int:
        """Tokens that texts are made of: a large vocabulary costs what it costs, whichever of its tokens stand in the texts."""
        return min(self.vocabulary, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Lengths in tokens; a completion's last token is the end of text."""

    name: str
    method: str  # reward or dpo
    rankings: int  # in each step
    completions: int = 2
    prompt_tokens: int = 0
    completion_tokens: int = 0
    source: str = ""  # "": made rankings; e2e or hh: human ones
    target: float = 0.0  # what the ratio should reach
    steps: int = 4
    warmup_steps: int = 1  # not timed
    learning_rate: float = 1e-4
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch_tokens: int = 4096  # Rankloop's default
    size: Size = Size()

    @classmethod
    def read(cls, folder: Path) -> "Row":
        values = json.loads((folder / "row.json").read_text(encoding="utf-8"))
        return cls(**{**values, "size": Size(**values["size"])})

    def step_seconds(self, results: list[dict[str, Any]]) -> float:
        """Median over repeats of a side of the median step, the first ones left out."""
        return median(median(result["seconds"][self.warmup_steps :]) for result in results)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "row.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @property
    def same_pairs(self) -> bool:
        """Whether each ranking has as many pairs as any other, so that TRL's mean over pairs is Rankloop's mean over rankings."""
        return self.source != "e2e"


MADE = (
    Row(name="reward-k4", method="reward", rankings=8, completions=4, prompt_tokens=96, completion_tokens=64, target=5.0),
    Row(name="reward-k9", method="reward", rankings=4, completions=9, prompt_tokens=96, completion_tokens=64, target=12.0, steps=3),
    Row(name="dpo-k4", method="dpo", rankings=8, completions=4, prompt_tokens=96, completion_tokens=64, target=4.5),
    Row(name="dpo-pairs-p1", method="dpo", rankings=16, prompt_tokens=64, completion_tokens=64, target=1.25),
    Row(name="dpo-pairs-p8", method="dpo", rankings=8, prompt_tokens=512, completion_tokens=64, target=1.6),
    Row(name="dpo-pairs-p1over8", method="dpo", rankings=16, prompt_tokens=8, completion_tokens=64, target=1.0),
)
HUMAN = (
    Row(name="e2e-quality-k5", method="reward", rankings=24, completions=5, source="e2e", steps=5),
    Row(name="hh-pairs", method="dpo", rankings=12, source="hh", steps=5),
)


def tiny(row: Row) -> Row:
    """The same row in miniature: a test's size."""
    size = Size(layers=2, width=32, inner=48, heads=2, key_value_heads=1, vocabulary=300)
    return replace(
        row,
        rankings=2,
        prompt_tokens=max(4, row.prompt_tokens // 8),
        completion_tokens=max(3, row.completion_tokens // 8),
        steps=3,
        size=size,
    )


def word(token: int) -> str:
    return f"<{token}>"


def named_tokenizer(vocabulary: int) -> Any:
    """Text `<5> <17>` is tokens 5 and 17: any trainer that reads text can be given exactly these tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(vocabulary)}, unk_token=word(PAD)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(END), pad_token=word(PAD), model_max_length=1 << 20)


def made_texts(size: Size) -> list[str]:
    """Words of random syllables, for the tokenizer to learn."""
    generator = random.Random(5)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = [" " + "".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(size.words)]
    return ["".join(generator.choices(words, k=20)) for _ in range(size.words // 2)]


def one_token_words(encoder: Any, size: Size) -> list[str]:
    """Words, each with the space before it, that the tokenizer writes as one token, so that lengths come out as asked for."""
    words = [encoder.tokenizer.decode([token]) for token in range(2, size.words)]
    kept = [word for word in words if word[:1] == " " and word[1:].isalpha() and len(encoder.completion_ids(word)) == 2]
    if len(kept) < 8:
        raise SystemExit(f"The tokenizer has only {len(kept)} words of one token.")
    return kept


def made_rankings(row: Row, encoder: Any) -> Iterator[dict[str, Any]]:
    """Random words; one rater, no ties."""
    generator = random.Random(7)
    words = one_token_words(encoder, row.size)
    ending = len(encoder.prompt_ids(user(words[0]))) - 1  # tokens of what parts a prompt from its completion
    for _ in range(row.rankings * row.steps):
        order = generator.sample(range(row.completions), row.completions)
        texts = ["".join(generator.choices(words, k=row.completion_tokens - 1)) for _ in order]
        prompt = "".join(generator.choices(words, k=row.prompt_tokens - ending))
        yield {"messages": user(prompt), "texts": texts, "rankings": [[[place] for place in order]]}


def e2e_rankings(row: Row, data: Path) -> Iterator[dict[str, Any]]:
    """Several raters rank the same five texts; a rater who tied all of them teaches nothing and is left out."""
    left = row.rankings * row.steps
    for line in json_lines(data / "rankings" / "e2e_quality_k5.jsonl"):
        all_ranks = [rating["ranks"] for rating in line["ratings"]]
        bands = [[[i for i, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))] for ranks in all_ranks]
        said = [one for one in bands if len(one) > 1][:left]
        left -= len(said)
        if said:
            yield {"messages": user(line["prompt"]), "texts": [response["text"] for response in line["responses"]], "rankings": said}
        if not left:
            return


def hh_rankings(row: Row, data: Path) -> Iterator[dict[str, Any]]:
    """Plain pairs: rankings of two."""

    def fitting() -> Iterator[dict[str, Any]]:
        for line in json_lines(data / "pairs" / "hh_helpful_train.jsonl"):
            messages, texts = line["prompt"], [line["chosen"], line["rejected"]]
            longest = max(sum(len(message["content"]) for message in messages), *(len(text) for text in texts))
            if longest <= HH_LONGEST_CHARACTERS and texts[0] != texts[1]:
                yield {"messages": messages, "texts": texts, "rankings": [[[0], [1]]]}

    return islice(fitting(), row.rankings * row.steps)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from (json.loads(line) for line in stream)


def snapshot_lines(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rankings as a snapshot writes them, all in the training split."""
    for number, item in enumerate(items):
        digest = hashlib.sha256(f"{number} {item['messages']}".encode()).hexdigest()
        for rater, bands in enumerate(item["rankings"]):
            yield {
                "ranking": f"ranking-{number}-{rater}",
                "revision": 1,
                "key": f"prompt-{number}",
                "prompt": digest,
                "split": "train",
                "round": 0,
                "messages": item["messages"],
                "completions": [{"text": text, "policy": "given"} for text in item["texts"]],
                "bands": bands,
                "displayed": list(range(len(item["texts"]))),
                "criteria": {},
                "flags": {},
                "rater": f"rater-{rater}",
                "rater_kind": "simulated",
                "duration_seconds": None,
            }


def make_model(row: Row, texts: list[str], folder: Path) -> Any:
    """A standard model directory; returns its encoder as transformers loads it (it gives each family its own tokenizer class)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    from training.encode import ENCODER_FILE, Encoder
    from training.language_model import save_model
    from training.scratch import make_tokenizer

    size = row.size
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        num_labels=1,
    )
    torch.manual_seed(0)
    kind = Qwen2ForSequenceClassification if row.method == "reward" else Qwen2ForCausalLM
    save_model(kind(config), Encoder(make_tokenizer(texts, vocab_size=size.words), template="plain"), folder)
    (folder / ENCODER_FILE).unlink()
    encoder = Encoder.load(folder, template="plain", max_prompt_tokens=4096, max_completion_tokens=4096)
    encoder.save(folder)
    return encoder


def prepare(folder: Path, data: Path = DATA) -> None:
    row = Row.read(folder)
    items: list[dict[str, Any]] = []
    if row.source:
        items = list((e2e_rankings if row.source == "e2e" else hh_rankings)(row, data))
    texts = [text for item in items for text in (*item["texts"], *(message["content"] for message in item["messages"]))]
    encoder = make_model(row, texts or made_texts(row.size), folder / "model")
    items = items or list(made_rankings(row, encoder))
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in snapshot_lines(items))
    (folder / "rankings.jsonl").write_text(lines, encoding="utf-8")
    distinct = 0
    for item in items:
        rows = {tuple(encoder.completion_ids(text)) for text in item["texts"]}
        distinct += len(encoder.prompt_ids(item["messages"])) + sum(map(len, rows))
    facts = {"prompts": len(items), "rankings": sum(len(item["rankings"]) for item in items), "distinct_tokens": distinct}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *(Path(path) for path in sys.argv[2:]))
