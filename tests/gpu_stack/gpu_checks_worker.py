"""The device's side of `tests/gpu` under the stand-in of a GPU: what it calls of Transformer Engine is there and takes what it is given.

A program: the calls that have no numbers to compare, and their shapes.
"""

from __future__ import annotations

import json
import sys

from megatron_r1z.rehearse.native import load_libraries

H200, B200 = ("NVIDIA H200", 141 << 30, (9, 0), 1), ("NVIDIA B200", 178 << 30, (10, 0), 1)


def main(device: str) -> None:
    load_libraries()
    from megatron_r1z.rehearse.device import Device, pretend_device
    from megatron_r1z.rehearse.engine_module import import_transformer_engine
    from megatron_r1z.rehearse.world import pretend_groups, start_world

    pretend_device(Device(*(H200 if device == "H200" else B200)))
    pretend_groups()
    import_transformer_engine()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    from megatron_r1z.layout.topology import Topology
    from megatron_r1z.policy import trained
    from megatron_r1z.policy.parallel import start_megatron
    from tests.gpu import checks

    assert checks.layers() == "te"
    setattr(trained, "check_same_number", lambda *_arguments: None)  # noqa: B010  # compares numbers
    found: dict[str, object] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        recipes = ("blockwise", "tensorwise", "delayed") if device == "H200" else ("mxfp8",)
        inputs_TK, weight_NK = (torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda") for rows in (512, 768))
        gradient_TN = torch.zeros(512, 768, dtype=torch.bfloat16, device="cuda")
        for recipe in recipes:
            layer = checks.fp8_layer(recipe, weight_NK)
            found[recipe] = [list(item.shape) for item in checks.products(inputs_TK, gradient_TN, *layer)]
        if device == "H200":
            for is_weight, values in ((True, weight_NK), (False, inputs_TK)):
                data, scales = checks.kernel_bytes(values, is_weight=is_weight)
                found["weight" if is_weight else "rows"] = [list(data.shape), list(scales.shape)]
            found["float32"] = list(checks.te_linear(weight_NK.float())(inputs_TK.float()).shape)
            with unset_fake_temporarily():
                start_world(0, 1)
                start_megatron(Topology(1), seed=1)
            policy = checks.make_policy(checks.SHAPES["llama"], "fp8-delayed")
            samples = checks.draw_samples(311)
            checks.take_steps(policy, samples, 1)
            found["states"] = len(checks.delayed_states(policy.model.chunks))
    print("found: " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
