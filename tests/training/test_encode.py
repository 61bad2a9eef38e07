import json

import pytest

from tests.training.tiny import STORIES, llama, texts, user
from training.encode import Encoder, TooLong
from training.errors import InputError
from training.scratch import make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def plain(tmp_path):
    return Encoder.load(llama(tmp_path / "model"))


@pytest.fixture
def chat():
    tokenizer = make_tokenizer(texts(), vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return Encoder(tokenizer, template="chat")


def test_a_chat_template_that_is_not_there_is_refused(plain):
    with pytest.raises(InputError, match="no chat template"):
        Encoder(plain.tokenizer, template="chat")


def test_texts_over_the_limit_are_refused_not_cut(tmp_path):
    encoder = Encoder.load(llama(tmp_path / "model"), max_prompt_tokens=4, max_completion_tokens=4)
    with pytest.raises(TooLong, match="prompt of more than 4 tokens"):
        encoder.prompt_ids(user("the cat sat on a red mat and ate some fish"))
    with pytest.raises(TooLong, match="completion of more than 4 tokens"):
        encoder.completion_ids("the cat sat on a red mat and ate some fish")


def test_a_completion_that_holds_an_end_token_is_refused(plain):
    with pytest.raises(ValueError, match="end-of-turn"):
        plain.completion_ids("the cat<|end|> sat")


def test_a_completion_ends_in_the_end_token_and_reads_back(plain):
    for text in ["the cat sat.", "", "Grüße, 世界! 🙂", "  two\n\nlines "]:
        ids = plain.completion_ids(text)
        assert ids[-1] == plain.end_id
        assert plain.end_id in plain.stop_ids
        assert plain.decode(ids) == text
        assert plain.decode([*ids, 5, 6]) == text


def test_a_plain_prompt_is_its_contents_and_a_separator(plain):
    ids = plain.prompt_ids([{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}])
    assert plain.tokenizer.decode(ids) == "the cat\nsat\n"


def test_a_chat_turn_ends_with_the_templates_token_not_the_tokenizers(chat):
    assert chat.end_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == {chat.end_id, chat.tokenizer.eos_token_id}
    text = chat.tokenizer.decode(chat.prompt_ids(user("the cat")), skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\n")


def test_prompt_and_completion_are_what_the_template_renders(chat):
    assert chat.check_boundary(user("the cat"), "sat on a mat.")
    assert chat.boundary_moves == 0


def test_a_template_that_changes_the_completion_is_counted(chat):
    chat.tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    assert not chat.check_boundary(user("the cat"), " sat on a mat.")
    assert chat.boundary_moves == 1


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")
def test_a_tokenizer_with_bos_writes_it_once():
    encoder = Encoder.load(STORIES)
    ids = encoder.prompt_ids(user("Once upon a time"))
    assert ids.count(encoder.tokenizer.bos_token_id) == 1
    assert ids[0] == encoder.tokenizer.bos_token_id
    assert encoder.tokenizer.bos_token_id not in encoder.completion_ids("there was a cat.")
    assert encoder.decode(encoder.completion_ids("there was a cat.")) == "there was a cat."


def test_an_encoder_is_remembered_and_a_changed_tokenizer_is_refused(tmp_path, plain):
    folder = tmp_path / "model"
    assert Encoder.load(folder).digest == plain.digest
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not the one that"):
        Encoder.load(folder)


def test_the_digest_tells_templates_apart_and_forgets_padding_settings(plain):
    twin = Encoder(plain.tokenizer, template="plain", separator=" => ")
    assert twin.digest != plain.digest
    plain.tokenizer(["a", "the cat sat"], padding=True, truncation=True, max_length=3)
    assert Encoder(plain.tokenizer, template="plain").digest == plain.digest
