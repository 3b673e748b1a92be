"""Rules for what Transformer Engine keeps between passes, on a model of it (`te_model.py`) that is held against its source."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_r1z.policy.fp8_state import scales_kept
from tests.unit.policy.te_model import CHECKPOINT_QUOTE, KERNEL_QUOTE, QUOTES, Engine, Policy


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10.0 * torch.rand(8, generator=generator)


def trained(*, logprobs: str = "none", steps: int = 6) -> tuple[list[list[float]], Policy]:
    """Outputs of training passes, before each of which log-probs of other tokens are taken: never, unguarded or guarded."""
    policy = Policy(Engine())
    outputs = []
    for step in range(steps):
        if logprobs != "none":
            take_logprobs(policy, 7 * draw(100 + step), guarded=logprobs == "guarded")
        outputs.append(policy.train_step(draw(step)).tolist())
    return outputs, policy


def take_logprobs(policy: Policy, inputs: Tensor, *, guarded: bool = True, recompute: bool = False) -> Tensor:
    with torch.no_grad():
        if not guarded:
            return policy.run(inputs, recompute=recompute)
        with scales_kept([policy]):
            return policy.run(inputs, recompute=recompute)


def test_without_the_guard_log_prob_passes_change_what_is_trained() -> None:
    """Even without gradient: they raise the newest entry of the history, and the next training pass makes scales from it."""
    assert trained(logprobs="unguarded")[0] != trained()[0]


def test_log_prob_passes_never_move_scales_or_histories() -> None:
    """From the very first pass on, which makes the states."""
    plain, guarded = trained(), trained(logprobs="guarded")
    assert guarded[0] == plain[0]
    assert guarded[1].states() == plain[1].states()


def test_the_guard_writes_in_place() -> None:
    """The global buffers hold the tensors themselves."""
    policy = Policy(Engine())
    policy.train_step(draw(0))
    states = [layer.state for layer in policy.layers]
    tensors = [(state.scale, state.amax_history) for state in states]
    take_logprobs(policy, draw(1))
    assert [layer.state for layer in policy.layers] == states
    for state, (scale, history) in zip(states, tensors, strict=True):
        assert state.scale is scale
        assert state.amax_history is history


def test_a_log_prob_pass_that_fails_leaves_the_states_as_they_were() -> None:
    policy = Policy(Engine())
    policy.train_step(draw(0))
    before = policy.states()
    with pytest.raises(AttributeError), torch.no_grad(), scales_kept([policy]):
        policy.run([policy.run(draw(1))])  # type: ignore[arg-type]
    assert policy.states() == before


def test_only_passes_with_gradient_are_reduced_over_ranks() -> None:
    """So ranks have to agree on the number of training passes; `check_same_number` does before each of both kinds."""
    _, policy = trained(logprobs="guarded", steps=5)
    assert policy.engine.reductions == 5


def test_a_recomputed_pass_takes_the_scales_of_the_first_one() -> None:
    policy = Policy(Engine())
    for step in range(4):
        take_logprobs(policy, 7 * draw(100 + step), recompute=True)
        policy.train_step(draw(step), recompute=True)
    assert all(not layer.kept for layer in policy.layers)


def test_checkpoints_that_keep_scales_of_log_prob_passes_are_why_old_versions_are_refused() -> None:
    """`check_policy` refuses `delayed` with recomputation there: the next backward pass would take scales of a log-prob pass."""
    policy = Policy(Engine(gradient_free_checkpoints=False))
    policy.train_step(draw(0), recompute=True)
    take_logprobs(policy, draw(1), recompute=True)
    policy.train_step(2 * draw(2), recompute=True)  # takes what the log-prob pass left: by chance the same scales, as they were kept
    with pytest.raises(AssertionError, match="not the first one"):
        policy.train_step(4 * draw(3), recompute=True)


def test_recipes_without_state_are_left_alone() -> None:
    """Their states have neither scale nor history; layers of the local spec have no metadata at all."""
    policy = Policy(Engine())
    policy.layers[0].fp8_meta["scaling_fwd"] = object()
    policy.layers[1].fp8_meta = None
    with scales_kept([policy, torch.nn.Linear(2, 2)]):
        pass


# --- The model against the source. -------------------------------------------------------------------------------------------------------


def source_folder() -> Path | None:
    """`transformer_engine/` of the installed package, or of a checkout that the environment names."""
    named = os.environ.get("R1Z_TRANSFORMER_ENGINE_SOURCE")
    if named is not None:
        return Path(named)
    folders = (Path(place) / "transformer_engine" for place in sys.path)
    return next((folder for folder in folders if (folder / "pytorch").is_dir()), None)  # its import needs a device's libraries


SOURCE = source_folder()
needs_source = pytest.mark.skipif(
    SOURCE is None,
    reason="Transformer Engine is not installed, and R1Z_TRANSFORMER_ENGINE_SOURCE names no checkout's folder transformer_engine",
)


def read_source(*names: str) -> str:
    assert SOURCE is not None
    return "\n".join((SOURCE / name).read_text(encoding="utf-8") for name in names if (SOURCE / name).exists())


@needs_source
@pytest.mark.parametrize("name", QUOTES)
def test_transformer_engine_says_what_the_model_does(name: str) -> None:
    text = read_source(name)
    assert [quote for quote in QUOTES[name] if quote not in text] == []


@needs_source
def test_from_which_version_on_checkpoints_keep_nothing_without_gradient() -> None:
    """The version in `recipes.GRADIENT_FREE_CHECKPOINTS`."""
    from megatron_r1z.fp8.machine import parse_version
    from megatron_r1z.fp8.recipes import GRADIENT_FREE_CHECKPOINTS

    name, quote = CHECKPOINT_QUOTE
    version = parse_version(read_version())
    if version is None:
        pytest.skip("this source does not say its version")
    assert (quote in read_source(name)) == (version >= GRADIENT_FREE_CHECKPOINTS)


def read_version() -> str:
    assert SOURCE is not None
    found = [
        path for pattern in ("transformer_engine-*.dist-info/METADATA", "build_tools/VERSION.txt") for path in SOURCE.parent.glob(pattern)
    ]
    lines: Any = [line for path in found for line in path.read_text(encoding="utf-8").splitlines()]
    return next((line.removeprefix("Version: ") for line in lines if line.startswith("Version: ") or line[:1].isdigit()), "")


@needs_source
def test_kernels_raise_the_amax() -> None:
    """Only a checkout has the kernels' source."""
    assert SOURCE is not None
    kernels = [path for path in SOURCE.glob("common/**/*.cuh") if "cast" in path.name or "quantize_fp8" in path.name]
    if not kernels:
        pytest.skip("the installed package has no kernels in source")
    assert any(KERNEL_QUOTE in path.read_text(encoding="utf-8") for path in kernels)
