"""The kernel that scales a gradient in place, in Triton's interpreter: a fixed number of programs share all tiles."""

import pytest
import torch
import triton_cases
from triton_cases import random_logits

pytest.importorskip("triton", reason="triton is not installed")

from verify.launches import captured

from minirl_kernels.common.triton import scale

pytestmark = triton_cases.interpreter_only()


@pytest.mark.parametrize("shape", [(151_936, 64), (3, 10**7), (5, 7, 100)], ids=str)
def test_no_more_programs_than_a_gpu_has_use_for(shape):
    """The factor is nearly always 1, and then each program does nothing but read it."""
    with captured() as launches:
        scale.scale_in_place(torch.zeros(1).expand(shape), torch.tensor(1.0))
    ((programs,),) = (launch.grid for launch in launches)
    assert programs == min(1024, torch.Size(shape[:-1]).numel() * -(-shape[-1] // 4096))


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_every_tile_is_scaled_once(programs, monkeypatch):
    monkeypatch.setattr(scale, "PROGRAMS", programs)
    buffer = random_logits(2, 5, 9010)
    expected = buffer.clone()
    expected[:, :4, :9001] *= -0.37
    scale.scale_in_place(buffer[:, :4, :9001], torch.tensor(-0.37))
    assert torch.equal(buffer, expected)
