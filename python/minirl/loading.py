"""Loads a model and its tokenizer from a folder or the hub, and refuses damaged or incomplete ones."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import MiniRLError
from .paths import home

_MASK = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$")  # saved by older releases of transformers
_UNFIT = "| CONVERSION"  # marks a weight (of experts, for example) that could not be joined from several tensors
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_model(path: str, experts_implementation: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, float32, with its tokenizer, from a folder or the hub.

    Raises MiniRLError, also for weights that are missing, unexpected, of another shape, or not finite.
    """
    path = find_model(path)
    is_folder = Path(path).is_dir()
    if not is_folder:  # the hub may take minutes to fail without a network
        print(f"minirl: {path} is not the folder of a model or a run: looking for it on the hub", file=sys.stderr)
    with one_message(
        f"cannot load a model from {path}" + ("" if is_folder else ": there is no such folder here, and the hub fails")
    ):
        AutoConfig.from_pretrained(path)
        if (Path(path) / "generation_config.json").exists():  # the model would ignore a damaged file
            GenerationConfig.from_pretrained(path)
    tokenizer = _load_tokenizer(path)
    with one_message(f"cannot load a model from {path}"), _without_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            experts_implementation=experts_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that `found` lists all mismatches
        )
    found["unexpected_keys"] = {key for key in found["unexpected_keys"] if not _MASK.search(key)}
    _check_complete(path, found)
    model.eval()  # no dropout, also in training, since the sampling policy has none
    check_finite(model, path)
    if tokenizer.eos_token_id is None:
        raise MiniRLError(f"the tokenizer of {path} has no eos_token: it must have one, to end responses")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise MiniRLError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens and its model {vocabulary}: the model must have at "
            "least as many"
        )
    return model, tokenizer


def find_model(name: str) -> str:
    """`name` as an existing folder, or as a name on the hub (org/name). Raises MiniRLError; uses no network.

    A name means a folder if the folder exists, if it looks like a path, or if its first part is an existing folder.
    """
    path = Path(home(name, "the model's folder"))
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise MiniRLError(
                f"{name} holds a LoRA adapter (adapter_config.json): it must be a whole model, with the adapter merged "
                "into it (peft's merge_and_unload)"
            )
        if not (path / "config.json").is_file():
            guess = f"did you mean {path / 'model'}? " if (path / "model" / "config.json").is_file() else ""
            raise MiniRLError(f"cannot load a model from {name}: {guess}it must hold config.json")
        return str(path)
    if path.is_file():
        raise MiniRLError(f"{name} is a file: a model must be the folder that holds config.json")
    written_as_path = name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1
    near = _near(path)
    if written_as_path or near or ("/" in name and Path(path.parts[0]).is_dir()):
        guess = f"did you mean {near}? " if near else ""
        raise MiniRLError(
            f"cannot load a model from {name}: there is no such folder, {guess}it must be a model's folder or a name "
            "of the hub"
        )
    return name


def _near(path: Path) -> str | None:
    """A folder beside `path` with a similar name."""
    if not path.parent.is_dir():
        return None
    names = [found.name for found in path.parent.iterdir() if found.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return str(path.with_name(close[0])) if close else None


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    is_without = Path(path).is_dir() and not any(any(Path(path).glob(name)) for name in _VOCABULARIES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        if is_without:
            raise _no_tokenizer(path) from error
        with one_message(f"cannot load a tokenizer from {path}"):
            raise
    if is_without and tokenizer.vocab_files_names:  # transformers makes an empty tokenizer without files
        raise _no_tokenizer(path)
    return tokenizer


def _no_tokenizer(path: str) -> MiniRLError:
    return MiniRLError(f"{path} has no tokenizer: it must hold tokenizer.json, or a vocabulary of another format")


@contextmanager
def one_message(beginning: str) -> Iterator[None]:
    """Turns any exception inside the block into a MiniRLError, since damaged files raise exceptions of every kind."""
    try:
        yield
    except MiniRLError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        needs_class = isinstance(error, (LookupError, ArithmeticError, AssertionError)) or not text
        kind = f"{type(error).__name__}: " if needs_class else ""
        raise MiniRLError(f"{beginning}: {kind}{text}") from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Hides transformers' table of wrong weights; an error that refers to the table lists its weights instead."""
    reports = []

    def is_other(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            reports.append(record.getMessage())
        return not is_report

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    except RuntimeError as error:
        unfit = {line.split("|")[0].strip() for report in reports for line in report.splitlines() if _UNFIT in line}
        if unfit:
            raise ValueError(f"{_listed(unfit)} cannot be made from the weights in the file") from error
        raise
    finally:
        logger.removeFilter(is_other)


def _check_complete(path: str, found: dict) -> None:
    """Raises MiniRLError for missing weights, unexpected weights, and weights of another shape."""
    for key, beginning in (("missing_keys", "lacks"), ("unexpected_keys", "has, and its model has not,")):
        if found[key]:
            raise MiniRLError(
                f"{path} {beginning} {_listed(found[key])}: it must have the model's weights, and no others"
            )
    if found["mismatched_keys"]:
        shapes = [f"{name} {list(has)} instead of {list(wanted)}" for name, has, wanted in found["mismatched_keys"]]
        raise MiniRLError(f"{path} has {_listed(shapes)}: its weights must have the shapes that its config.json says")


def _listed(names: list[str] | set[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Raises MiniRLError if a weight is NaN or infinite. name: the model's name for the message."""
    for key, weight in model.state_dict().items():  # with buffers, such as a router's correction bias
        if weight.is_floating_point() and not weight.isfinite().all():
            raise MiniRLError(f"{key} of {name} is not finite: weights must be numbers")


def does_compute(name: str, model: PreTrainedModel) -> AbstractContextManager[None]:
    """Turns any exception inside the block, where the model computes, into a MiniRLError."""
    return one_message(f"{name} makes no {type(model).__name__} that computes")


def check_computes(model: PreTrainedModel, name: str) -> None:
    """Raises MiniRLError unless the model decodes two tokens without NaN. name: the model's name for the message."""
    # Two tokens, since wrong sizes may fail in the first forward or in the first forward that reads a cache.
    probe = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with does_compute(name, model):
        logits = model.generate(ids, generation_config=probe).logits
    if any(one.isnan().any() for one in logits):
        raise MiniRLError(f"{name} makes a {type(model).__name__} whose logits are NaN: they must be numbers")
