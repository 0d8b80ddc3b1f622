"""Wrappers of torch and accelerate rebuild, cast or copy inputs and outputs; no field may get lost."""

import pytest
import wrapped_model

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.mark.parametrize("kind", ["DDP", "FSDP1", "FSDP2"])
def test_log_probs_losses_and_gradients_are_those_of_one_process(kind, tmp_path):
    wrapped_model.run([name for name in wrapped_model.WRAPPERS if name.startswith(kind)], tmp_path)


@pytest.mark.parametrize("name", wrapped_model.IN_16_BITS)
def test_what_goes_through_a_wrapper_in_bfloat16_is_not_rounded(name, tmp_path):
    if "accelerate" in name:
        pytest.importorskip("accelerate")
    wrapped_model.run([name], tmp_path)
