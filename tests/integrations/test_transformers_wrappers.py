"""Wrappers of torch and accelerate rebuild, cast or copy inputs and outputs; no field may get lost."""

import pytest
import wrapped_model

pytestmark = pytest.mark.usefixtures("cpu")


def test_log_probs_losses_and_gradients_are_those_of_one_process(tmp_path):
    wrapped_model.run(list(wrapped_model.WRAPPERS), tmp_path)


def test_what_goes_through_a_wrapper_in_bfloat16_is_not_rounded(tmp_path):
    wrapped_model.run([name for name in wrapped_model.IN_16_BITS if "accelerate" not in name], tmp_path)


def test_what_goes_through_a_wrapper_of_accelerate_is_not_rounded(tmp_path):
    pytest.importorskip("accelerate")
    wrapped_model.run([name for name in wrapped_model.IN_16_BITS if "accelerate" in name], tmp_path)
