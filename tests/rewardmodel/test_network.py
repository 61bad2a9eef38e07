import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rewardmodel.network import is_reward_model, load_reward_model, scores, token_values
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer, row_scores
from tests.training.tiny import ALL_FAMILIES, llama, texts, user
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, save_model
from training.pack import Row, pad_rows

CPU = torch.device("cpu")


def shaken(model, seed=0):
    """A head that says something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows_of(encoder, count=5):
    lines = texts(2 * count)
    return [Row(encoder.prompt_ids(user(lines[2 * n])), encoder.completion_ids(lines[2 * n + 1])) for n in range(count)]


@pytest.fixture(params=sorted(ALL_FAMILIES.keys() - {"mamba"}))  # transformers has no Mamba with a score head
def family(request, tmp_path):
    folder = ALL_FAMILIES[request.param](tmp_path / "m")
    return folder, Encoder.load(folder)


def test_a_folder_that_is_no_reward_model_cannot_score(tmp_path):
    with pytest.raises(InputError, match=REWARD_FILE):
        Scorer.load(llama(tmp_path / "m"))


def test_a_new_head_holds_all_equal(family):
    folder, encoder = family
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    assert scores(load_reward_model(folder), padded.input_ids, padded.attention_mask).tolist() == [[0.0]] * 5


def test_a_score_is_read_at_the_last_real_token_and_padding_changes_nothing(family):
    folder, encoder = family
    model = shaken(load_reward_model(folder))
    rows = rows_of(encoder)
    alone = torch.cat([scores(model, *(torch.tensor([ids]) for ids in ([*r.prompt_ids, *r.completion_ids], [1] * len(r)))) for r in rows])
    assert alone.dtype == torch.float32
    assert alone.shape == (5, 1)
    assert len(set(alone[:, 0].tolist())) == 5
    for pad_id in (encoder.pad_id, encoder.end_id, 7):
        padded = pad_rows(rows, pad_id)
        torch.testing.assert_close(scores(model, padded.input_ids, padded.attention_mask), alone, atol=1e-5, rtol=1e-5)
        left = [torch.zeros_like(padded.input_ids) for _ in range(2)]
        for place, row in enumerate(rows):
            left[0][place, -len(row) :] = padded.input_ids[place, : len(row)]
            left[1][place, -len(row) :] = 1
        torch.testing.assert_close(scores(model, *left), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_scores(model, rows, encoder.pad_id, device=CPU, budget=30), alone, atol=1e-5, rtol=1e-5)


def test_the_value_of_the_last_token_is_the_score(family):
    folder, encoder = family
    model = shaken(load_reward_model(folder))
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    values = token_values(model, padded.input_ids, padded.attention_mask)
    last = padded.attention_mask.sum(-1) - 1
    assert values.shape == padded.input_ids.shape
    torch.testing.assert_close(values[torch.arange(5), last], scores(model, padded.input_ids, padded.attention_mask)[:, 0])
    assert not values[padded.attention_mask == 0].any()


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0)], ids=["full", "lora"])
def test_a_saved_reward_model_keeps_its_head_here_and_in_plain_transformers(family, tmp_path, lora):
    folder, encoder = family
    model = shaken(load_reward_model(folder, lora=lora, seed=1))
    rows = rows_of(encoder)
    expected = row_scores(model, rows, encoder.pad_id, device=CPU, budget=500).detach()
    assert expected.abs().max() > 1e-3
    notes = RewardNotes(mean=0.5, scale=2.0, encoder_digest=encoder.digest)
    save_model(model, encoder, tmp_path / "saved", notes={REWARD_FILE: notes.as_json()})
    assert is_reward_model(tmp_path / "saved")
    assert not is_reward_model(folder)
    scorer = Scorer.load(tmp_path / "saved")
    torch.testing.assert_close(scorer.raw_scores(rows), expected, atol=1e-5, rtol=1e-5)
    lines = texts(10)
    answers = [(user(lines[2 * n]), lines[2 * n + 1]) for n in range(5)]
    assert scorer.score(answers) == pytest.approx(((expected[:, 0] - 0.5) / 2.0).tolist(), abs=1e-4)
    assert scorer.score([]) == []
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    padded = pad_rows(rows, encoder.pad_id)
    with torch.no_grad():
        theirs = plain(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_where_padding_is_the_end_token_plain_transformers_still_scores_one_text_rightly(tmp_path):
    folder = llama(tmp_path / "m")
    encoder = Encoder.load(folder)
    encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    encoder = Encoder(encoder.tokenizer, template="plain")
    assert encoder.pad_id == encoder.end_id
    model = shaken(load_reward_model(folder))
    row = rows_of(encoder)[0]
    expected = row_scores(model, [row], encoder.pad_id, device=CPU, budget=500).detach()
    save_model(model, encoder, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        theirs = plain(input_ids=torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_with_lora_the_head_trains_and_the_backbone_does_not(tmp_path):
    model = load_reward_model(llama(tmp_path / "m"), lora=Lora(4, 8.0))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)


def test_an_exchanged_encoder_is_refused(tmp_path):
    folder = llama(tmp_path / "m")
    notes = RewardNotes(encoder_digest="0" * 64)
    save_model(load_reward_model(folder), Encoder.load(folder), tmp_path / "r", notes={REWARD_FILE: notes.as_json()})
    with pytest.raises(InputError, match="encoder"):
        Scorer.load(tmp_path / "r")
