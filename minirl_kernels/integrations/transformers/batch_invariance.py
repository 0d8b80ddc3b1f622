"""check_batch_invariant: runs a model on a few tokens in several ways, and compares the bits.

The mode covers operations, not models. The bits of a covered sum depend on the number of summed elements. So a module
that sums over tokens itself gives different bits in a decode and in a prefill, though all its operations are covered.
Examples are a linear attention, and an attention that ignores attn_implementation. There is no list of models: each
model is tested by running it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ...batch_invariant import audit, batch_invariant_mode
from .traces import in_words, over_tokens, running, traced

_LENGTHS = (3, 14, 29, 35)  # tokens of the prompts
_NEW_TOKENS = 4


def check_batch_invariant(model: PreTrainedModel) -> None:
    """Raises ValueError unless `model`, in the mode, gives a few tokens the same bits in all tested layouts.

    model: a causal language model of transformers with its weights, on any device. Set its attention and experts
        implementations to "minirl" first; the mode does not cover torch's own.
    Four short prompts, padded on the left, are decoded. Then the sequences are computed in one batch, and each alone.
    This takes about nine forwards of up to 39 tokens per row, without gradients.

    The error names the first module with one of these problems:
        it cannot compute;
        it runs an operation over tokens that the mode does not cover;
        it sums over tokens itself;
        its output differs, but its input does not.
    A sliding window longer than these sequences is not tested. `attn_implementation="minirl"` refuses it in the first
    forward whose sequences are longer than the window.
    """
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"the weights of {name} are on the meta device: the check must come after loading them")
    with torch.no_grad(), batch_invariant_mode():
        found = _difference(model)
    if found is not None:
        raise ValueError(f"a {name} is not batch-invariant: {found}")


@dataclass
class _Run:
    """The operations of each module in one layout."""

    uncovered: dict[tuple, None] = field(default_factory=dict)
    """(module, operation, shapes of its tensors) of uncovered calls, in order."""
    sums: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """{(module, operation): numbers of summed elements} of covered calls."""


def _difference(model: PreTrainedModel) -> str | None:
    """The first module that is not batch-invariant, with the reason; None if there is none."""
    prompts, mask = _prompts(model)
    runs = [_Run(), _Run()]
    with _watched(model, runs[0]):
        sequences, steps = _decode(model, prompts, mask)
    new = sequences.shape[1] - prompts.shape[1]
    whole_mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    with _watched(model, runs[1]):
        together = _forward(model, sequences, whole_mask)
    found = None
    for row, real in enumerate(whole_mask.bool()):
        ids = sequences[row : row + 1, real]
        alone = partial(_forward, model, ids, torch.ones_like(ids))
        runs.append(_Run())
        with _watched(model, runs[-1]):
            logits = alone()
        if found is not None:
            continue
        if not torch.equal(together[row : row + 1, real], logits):
            found = partial(_forward, model, sequences, whole_mask), "in a padded batch and alone"
        elif not torch.equal(steps[row : row + 1], logits[:, -new - 1 : -1]):
            found = partial(_decode, model, prompts, mask), "in a decode and in a prefill"
        if found is not None:
            found = f"{_first_difference(model, found[0], alone, row, real)} gives different bits {found[1]}"
    return _uncovered(model, runs) or _sum_over_tokens(model, runs[2:], whole_mask.sum(1).tolist()) or found


def _uncovered(model: PreTrainedModel, runs: list[_Run]) -> str | None:
    """The first uncovered operation whose shapes depend on the tokens. Equal shapes in all runs mean equal work."""
    for key in (key for run in runs for key in run.uncovered):
        if any(key not in run.uncovered for run in runs):
            return f"{in_words(model, key[0])} runs {key[1]}, which batch_invariant_mode does not cover"
    return None


def _sum_over_tokens(model: PreTrainedModel, runs: list[_Run], lengths: list[int]) -> str | None:
    for module, operation in runs[0].sums:
        sizes = [run.sums.get((module, operation), set()) for run in runs]
        everywhere = set.intersection(*sizes)
        if all(length in found - everywhere for length, found in zip(lengths, sizes, strict=True)):
            return f"{in_words(model, module)} sums over tokens itself ({operation}); the order depends on their number"
    return None


@contextmanager
def _watched(model: PreTrainedModel, run: _Run) -> Iterator[None]:
    """Fill `run` with the operations inside the block. An exception becomes a ValueError that names the module."""

    def note(func, args, is_covered):
        if not modules:  # outside the model, in generate
            return
        name = func._schema.name
        if is_covered:
            sizes = run.sums.setdefault((modules[-1], name), set())
            sizes.add(_size_of_sum(name.removeprefix("aten::"), args))
        else:
            shapes = tuple(tuple(x.shape) for x in args if isinstance(x, Tensor))
            run.uncovered[modules[-1], name, shapes] = None

    with running(model) as modules, audit(note):
        try:
            yield
        except Exception as error:
            where = in_words(model, modules[-1]) if modules else type(model).__name__
            raise ValueError(f"{where} cannot compute with the model's implementations: {error}") from error


def _size_of_sum(name: str, args: tuple) -> int:
    """Number of elements in a sum of a covered operation; 1 for an elementwise operation."""
    if name in ("mm", "bmm", "mv", "dot", "_grouped_mm"):
        return args[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return args[1].shape[-1]
    x, dim = args[0], args[1] if len(args) > 1 else None
    if name in ("_softmax", "_log_softmax"):
        return x.shape[dim] if x.dim() else 1
    if name in ("sum", "mean"):
        return math.prod(x.shape[d] for d in dim) if dim else x.numel()
    return 1


def _prompts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """(ids [B, L], mask [B, L]), padded on the left."""
    table = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table.num_embeddings, (len(_LENGTHS), max(_LENGTHS)), generator=generator)
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(_LENGTHS)[:, None]
    return (ids * mask).to(table.weight.device), mask.long().to(table.weight.device)


def _decode(model: PreTrainedModel, prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sequences [B, L + N], logits [B, N, V] float32 of the new tokens)."""
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = model.generate(prompts, attention_mask=mask, generation_config=settings)
    return found.sequences, torch.stack(found.logits, 1).float()


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, L, V] float32 of whole sequences, with the position_ids of `generate`."""
    positions = {}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        positions["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    return model(ids, attention_mask=mask, use_cache=False, return_dict=True, **positions).logits.float()


def _first_difference(model: PreTrainedModel, together: Callable, alone: Callable, row: int, real: Tensor) -> str:
    with traced(model) as first:
        together()
    with traced(model) as second:
        alone()
    for name, (inputs, outputs) in second.calls.items():
        others = first.calls.get(name, ([], []))
        if _same_bits(others[0], inputs, row, real) and _same_bits(others[1], outputs, row, real) is False:
            return in_words(model, name)
    return "a part of the model"


def _same_bits(together: list[Tensor], alone: list[Tensor], row: int, real: Tensor) -> bool | None:
    """Whether a row has the same bits alone and in the batch; None if the tensors have no row per token."""
    expected = over_tokens(alone, 1, int(real.sum()))
    for length in (len(real), len(real) - 1):  # a decode does not compute its last token
        found = over_tokens(together, len(_LENGTHS), length)
        if expected is not None and found is not None:
            seen = real[:length]
            return torch.equal(found[row, seen], expected[0, : int(seen.sum())])
    return None
