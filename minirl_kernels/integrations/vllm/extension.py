"""What a trainer asks of vLLM's workers beyond what they offer: `worker_extension_cls` of the engine."""

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
    """Methods for `LLM.collective_rpc`; names and arguments need no unsafe serialization."""

    def mend_seeds(self) -> None:
        """Once, on a CPU, before any seeded request."""
        runner, sample_tokens = self.model_runner, self.model_runner.sample_tokens

        def sampled(*args, **kwargs):
            with unread_prompts_draw_nothing(runner):
                return sample_tokens(*args, **kwargs)

        runner.sample_tokens = sampled

    def watch_weights(self) -> None:
        """Note a digest of each tensor that the model is given to load from now on, whichever way it comes."""
        model = self.model_runner.get_model()
        load_weights = model.load_weights
        self._received: dict[str, str] = {}

        def watched(weights: Iterable[tuple[str, Tensor]]):
            return load_weights(noting(weights, self._received))

        model.load_weights = watched

    def received_weights(self) -> dict[str, str]:
        """The digests of all weights received since the last call, by their names in a checkpoint."""
        received, self._received = self._received, {}
        return received

    def capture_routing(self) -> None:
        """Note the experts of all requests from now on."""
        self._routing = RoutingCapture(self.model_runner)

    def forget_routing(self) -> None:
        """Drop what was noted with earlier weights."""
        self._routing.forget()

    def take_routing(self) -> dict[str, tuple[list[int], bytes]]:
        """(shape, bytes of int16) of each request that ended, as RoutingCapture.take has them."""
        return {request: (list(ids.shape), ids.tobytes()) for request, ids in self._routing.take().items()}

    def note_logits(self) -> None:
        """Of the sampled tokens, from now on."""
        self._logits = LogitsRecord(self.model_runner)

    def save_logits(self, path: str) -> None:
        """Write what LogitsRecord.take has to a file, and note no more."""
        self._save(self._logits.take(), path)

    def trace_modules(self, rows: int) -> None:
        """Note what the modules make of the first `rows` requests from now on."""
        self._modules = ModuleRecord(self.model_runner, rows)

    def save_modules(self, path: str) -> None:
        """Write keys, values and numbers of each place to a file, and note no more."""
        places = self._modules.take()
        self._save({name: (place.keys, place.values, place.numbers) for name, place in places.items()}, path)

    def _save(self, record: object, path: str) -> None:
        if self.rank == 0:  # the others have parts of the same
            torch.save(record, path)
