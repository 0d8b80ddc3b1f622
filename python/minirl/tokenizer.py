"""The character tokenizer of new models, and the encoding of prompts as token ids."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import MiniRLError
from .tasks import Prompt, prompt_label


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with <pad>, <eos> and <unk>, and one token per character. AutoTokenizer can load it from a folder."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a text, or of chat messages by the tokenizer's chat template.

    Raises MiniRLError for
        messages without a chat template, and a prompt without tokens;
        a prompt that ends in the end-of-sequence token, or in a token that the tokenizer appends;
        a prompt that begins with the beginning-of-sequence token twice.
    Such tokens are not removed here, since the saved tokenizer would still add them when the model is used.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise MiniRLError("a prompt is a list of messages: model.path must have a tokenizer with a chat template")
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise MiniRLError(f"prompt {prompt!r} has no tokens: it must have at least one")
    if ids[-1] in tokenizer.all_special_ids:
        _check_end(tokenizer, prompt, ids)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise MiniRLError(
            f"prompt {prompt_label(prompt)} begins with {tokenizer.bos_token!r} twice: "
            + (
                "it must begin without it, since the tokenizer adds it"
                if isinstance(prompt, str)
                else "the tokenizer's chat template must write it once"
            )
        )
    return ids


def _check_end(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int]) -> None:
    """Raises MiniRLError if a response would begin after an end-of-sequence token."""
    token = tokenizer.convert_ids_to_tokens(ids[-1])
    if isinstance(prompt, str):
        bare = tokenizer(prompt, add_special_tokens=False).input_ids
        if ids[len(ids) - len(bare) :] != bare:
            setting = (
                "add_eos_token in its tokenizer_config.json must be false"
                if getattr(tokenizer, "add_eos_token", False)
                else "the post_processor in its tokenizer.json must not append it"
            )
            raise MiniRLError(
                f"the tokenizer {tokenizer.name_or_path} appends {token!r} to a text, so that prompts end in it and "
                f"a response would begin after it: {setting}"
            )
    if ids[-1] == tokenizer.eos_token_id:
        raise MiniRLError(
            f"prompt {prompt_label(prompt)} ends in the end-of-sequence token {token!r}, so that a response would "
            "begin after it: "
            + ("it must end before it" if isinstance(prompt, str) else "the chat template must open a reply at the end")
        )
