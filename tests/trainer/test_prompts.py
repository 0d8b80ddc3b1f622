"""Prompts as token ids: tokens that a tokenizer must not add."""

import pytest
from minirl.errors import MiniRLError
from minirl.models import make_model
from minirl.sampling import make_sampler
from minirl.tasks import make_task
from minirl.tokenizer import character_tokenizer, encode_prompt
from tokenizers.processors import TemplateProcessing

QUESTION = [{"role": "user", "content": "ab"}]
TEMPLATE = "{% for message in messages %}Q:{{ message.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture
def tokenizer():
    tokenizer = character_tokenizer("abAQ:")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def adding(tokenizer, single: str):
    """The tokenizer with special tokens around a text."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>", "<pad>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("token", ["<eos>", "<pad>"])
def test_a_tokenizer_that_appends_a_token_to_text_is_refused(tokenizer, token):
    """Such a tokenizer would end every prompt before its response."""
    adding(tokenizer, f"<bos> $A {token}").name_or_path = "models/embedding"
    with pytest.raises(MiniRLError, match=f"the tokenizer models/embedding appends '{token}' to a text, .* post_proc"):
        encode_prompt(tokenizer, "ab")


def test_the_setting_that_appends_the_token_is_named(tokenizer):
    adding(tokenizer, "$A <eos>").add_eos_token = True
    with pytest.raises(MiniRLError, match=r"add_eos_token in its tokenizer_config\.json must be false"):
        encode_prompt(tokenizer, "ab")


def test_a_prompt_that_ends_the_sequence_itself_is_refused(tokenizer):
    with pytest.raises(MiniRLError, match="prompt 'ab<eos>' ends in the end-of-sequence token '<eos>'"):
        encode_prompt(tokenizer, "ab<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    with pytest.raises(MiniRLError, match=r"prompt 'ab' ends in .* the chat template must open a reply at the end"):
        encode_prompt(tokenizer, QUESTION)


def test_a_special_token_of_the_prompts_own_may_open_the_reply(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<assistant>"]})
    ids = encode_prompt(adding(tokenizer, "<bos> $A"), "ab<assistant>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "a", "b", "<assistant>"]


def test_a_beginning_that_is_written_twice_is_refused(tokenizer):
    adding(tokenizer, "<bos> $A")
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "ab")) == ["<bos>", "a", "b"]
    with pytest.raises(MiniRLError, match="prompt '<bos>ab' begins with '<bos>' twice: it must begin without it"):
        encode_prompt(tokenizer, "<bos>ab")


def test_a_chat_template_that_writes_the_beginning_has_it_once(tokenizer):
    adding(tokenizer, "<bos> $A").chat_template = "{{ bos_token }}" + TEMPLATE
    ids = encode_prompt(tokenizer, QUESTION)
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + TEMPLATE
    with pytest.raises(
        MiniRLError, match="begins with '<bos>' twice: the tokenizer's chat template must write it once"
    ):
        encode_prompt(tokenizer, QUESTION)


def test_no_response_is_sampled_after_the_end_of_a_prompt(config):
    model, tokenizer = make_model(config)
    special = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=special)
    task = make_task(config.task)
    sampler = make_sampler(config, model, tokenizer, task)
    with pytest.raises(MiniRLError, match="appends '<eos>' to a text"):
        sampler.sample(task.train[:2], 2, seed=0)
