"""Records the logits of vLLM's sampled tokens over the whole vocabulary, as tensors instead of vLLM's objects."""

from __future__ import annotations

import torch
from torch import Tensor

from .tokens import Tokens


class LogitsRecord:
    """Records the logits of the last token of each request, from the next forward of a model runner on."""

    def __init__(self, runner):
        self._model = runner.get_model()
        self._tokens = Tokens(runner)
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._compute = self._model.compute_logits
        self._model.compute_logits = self._noting

    def take(self) -> tuple[Tensor, Tensor]:
        """(keys [n] of the tokens before the sampled ones, see Tokens; logits [n, V] float32). Ends the recording."""
        self._model.compute_logits = self._compute
        self._tokens.close()
        keys, logits = zip(*self._noted, strict=True)
        return torch.cat(keys), torch.cat(logits)

    def _noting(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        logits = self._compute(hidden_states, *args, **kwargs)
        # a copy, since the sampler changes the logits in place
        self._noted.append((self._tokens.keys[self._tokens.last], logits.detach().to("cpu", torch.float32, copy=True)))
        return logits
