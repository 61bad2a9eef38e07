"""A small Llama from nothing: a byte-level BPE tokenizer trained on given texts, and random weights, as a standard model directory."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.encode import Encoder
from training.language_model import save_model

END = "<|end|>"
PAD = "<|pad|>"


def make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written; two special tokens, end and padding; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=1 << 20)


def make_model(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    hidden_size: int = 192,
    layers: int = 4,
    heads: int = 6,
    seed: int = 0,
    max_positions: int = 1024,
    template: str = "plain",
) -> int:
    """Write a randomly initialised Llama to `folder` and return its number of parameters (about 2 million by default).

    Args:    texts: what the tokenizer learns its tokens from;  heads: must divide hidden_size;  template: for the encoder.
    """
    tokenizer = make_tokenizer(texts, vocab_size=vocab_size)
    encoder = Encoder(tokenizer, template=template)  # type: ignore[arg-type]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=(hidden_size * 8 // 3 + 31) // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    save_model(model, encoder, folder)
    return sum(parameter.numel() for parameter in model.parameters())
