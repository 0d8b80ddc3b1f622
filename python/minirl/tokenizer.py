"""A character tokenizer, built with `tokenizers`; its folder loads with AutoTokenizer. Prompts become ids here."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import MiniRLError
from .tasks import Prompt


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character, after <pad>, <eos> and <unk>."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a text as it stands, or of chat messages by the tokenizer's chat template."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise MiniRLError("a prompt is a list of messages: model.path must have a tokenizer with a chat template")
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise MiniRLError(f"prompt {prompt!r} has no tokens: it must have at least one")
    return ids
