"""The reference model's weights take the place of the policy's and give it back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_r1z.policy.reference import ReferenceWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_weights_stand_in_for_the_present_ones_and_leave_them_to_the_bit(dtype: torch.dtype) -> None:
    weights = {name: torch.randn(5, 3).to(dtype) for name in ("a", "b")}
    first = {name: tensor.clone() for name, tensor in weights.items()}
    reference = ReferenceWeights(lambda: weights)
    for _ in range(3):
        for tensor in weights.values():
            tensor += 0.5
        present = {name: tensor.clone() for name, tensor in weights.items()}
        with reference.in_place():
            assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())
        assert all(torch.equal(weights[name], tensor) for name, tensor in present.items())


def test_a_pass_that_fails_leaves_the_policy_its_weights() -> None:
    weight = torch.zeros(3)
    reference = ReferenceWeights(lambda: {"a": weight})
    weight += 1
    with pytest.raises(RuntimeError, match="no pass"), reference.in_place():
        raise RuntimeError("no pass")
    assert weight.tolist() == [1.0] * 3


def test_an_optimizer_that_replaces_a_tensor_is_followed() -> None:
    weights = {"a": torch.zeros(3)}
    reference = ReferenceWeights(lambda: weights)
    weights["a"] = torch.ones(3)
    with reference.in_place():
        assert weights["a"].tolist() == [0.0] * 3
    assert weights["a"].tolist() == [1.0] * 3
