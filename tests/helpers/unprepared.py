"""Launches that are prepared anew in each call."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from minirl_kernels.common.triton.launch import prepared


@contextmanager
def unprepared() -> Iterator[None]:
    """Each launch inside goes through Triton, as the first launch of a layout does."""
    with mock.patch.object(prepared, "__call__", lambda self, *tensors, **options: self.launch(tensors, options)):
        yield
