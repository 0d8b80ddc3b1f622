"""WorkerExtension: methods that a trainer calls in vLLM's workers (the engine's `worker_extension_cls`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .logits import LogitsRecord
from .modules import ModuleRecord
from .routing import RoutingCapture
from .seeds import unread_prompts_draw_nothing
from .weights import noting


class WorkerExtension:
    """Methods for `LLM.collective_rpc`. Their arguments are plain values, so no unsafe serialization is needed."""

    def mend_seeds(self) -> None:
        """Install the fix of seeds.py. Call it once, on a CPU, before the first seeded request."""
        runner, sample_tokens = self.model_runner, self.model_runner.sample_tokens

        def sampled(*args, **kwargs):
            with unread_prompts_draw_nothing(runner):
                return sample_tokens(*args, **kwargs)

        runner.sample_tokens = sampled

    def watch_weights(self) -> None:
        """From now on, record a digest of each tensor that is passed to the model's load_weights."""
        model = self.model_runner.get_model()
        load_weights = model.load_weights
        self._received: dict[str, str] = {}

        def watched(weights: Iterable[tuple[str, Tensor]]):
            return load_weights(noting(weights, self._received))

        model.load_weights = watched

    def received_weights(self) -> dict[str, str]:
        """{name in the checkpoint: digest} of all weights received since the last call."""
        received, self._received = self._received, {}
        return received

    def capture_routing(self) -> None:
        """From now on, record the experts of all requests."""
        self._routing = RoutingCapture(self.model_runner)

    def forget_routing(self) -> None:
        """Delete experts that were recorded with earlier weights."""
        self._routing.forget()

    def take_routing(self) -> dict[str, tuple[list[int], bytes]]:
        """{request: (shape, bytes of int16)} of all ended requests; see RoutingCapture.take."""
        return {request: (list(ids.shape), ids.tobytes()) for request, ids in self._routing.take().items()}

    def note_logits(self) -> None:
        """From now on, record the logits of the sampled tokens."""
        self._logits = LogitsRecord(self.model_runner)

    def save_logits(self, path: str) -> None:
        """Write the result of LogitsRecord.take to a file, and end the recording."""
        self._save(self._logits.take(), path)

    def trace_modules(self, rows: int) -> None:
        """From now on, record inputs and outputs of modules for the first `rows` requests."""
        self._modules = ModuleRecord(self.model_runner, rows)

    def save_modules(self, path: str) -> None:
        """Write keys, values and numbers of each place to a file, and end the recording."""
        places = self._modules.take()
        self._save({name: (place.keys, place.values, place.numbers) for name, place in places.items()}, path)

    def _save(self, record: object, path: str) -> None:
        if self.rank == 0:  # other ranks hold parts of the same record
            torch.save(record, path)
