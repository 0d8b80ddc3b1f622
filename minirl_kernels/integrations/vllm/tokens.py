"""Assigns each row of vLLM's forwards to a token of a request."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...discrepancy.forwards import STRIDE


class Tokens:
    """Follows a model runner's forwards, from the next one on. Requests are numbered in the order of arrival.

    keys: [tokens] int64, for the running forward: number of the request * STRIDE + place of the token in it.
    last: [requests], the row of the last token of each request. forward: number of the forward.
    """

    def __init__(self, runner):
        self._runner = runner
        self._numbers: dict[str, int] = {}
        self.keys, self.last, self.forward = torch.empty(0), torch.empty(0), -1
        self._handle = runner.get_model().register_forward_pre_hook(self._begin, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()

    def _begin(self, model, args: tuple, kwargs: dict[str, Tensor]) -> None:
        batch = self._runner.input_batch
        # numbered in the order of arrival, which the batch does not keep
        for request in self._runner.requests:
            self._numbers.setdefault(request, len(self._numbers))
        starts = self._runner.query_start_loc.np[: batch.num_reqs + 1]
        numbers = np.repeat([self._numbers[request] for request in batch.req_ids], np.diff(starts))
        self.keys = torch.from_numpy(numbers) * STRIDE + kwargs["positions"][: starts[-1]].cpu()
        self.last = torch.from_numpy(starts[1:] - 1).long()
        self.forward += 1
