"""One rank of `test_refit.py`: refits into a live engine, or an engine that vLLM itself has filled from a folder.

Run by torchrun with a command and a folder; `settings.json` in the folder says what to build. Responses of each rank go to
`responses_NAME_RANK.json`.

`refit`: the policy's weights, changed and handed over twice; the second ones are exported. Then hand-overs that must not be accepted.
`gathered`: the same two hand-overs the other way, whole tensors through vLLM's own loader.
`packed`: a hand-over into an engine whose kernels keep weights in a layout of their own; then a stop at a special token.
`fresh`: the exported folder, loaded by vLLM.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z.config import ModelConfig, ParallelConfig, PrecisionConfig, RolloutConfig
from megatron_r1z.data.templates import make_stops
from megatron_r1z.data.tokenizer import load_tokenizer
from megatron_r1z.errors import EngineError, RefitError
from megatron_r1z.layout.blocks import engine_layout, megatron_layout, padded_vocab_size
from megatron_r1z.layout.families import load_shape
from megatron_r1z.layout.plan import make_plan
from megatron_r1z.layout.topology import Topology
from megatron_r1z.protocols import Sampling
from megatron_r1z.reshard.gather import GatheredRefit, WholeTensors
from megatron_r1z.reshard.links import Links, Seen
from megatron_r1z.reshard.refit import Refit
from megatron_r1z.rollout import vllm_engine
from megatron_r1z.rollout.vllm_engine import EngineSettings, VllmEngine
from megatron_r1z.speed import Machine, engine_speed
from megatron_r1z.types import FinishReason, Prompt
from megatron_r1z.weights.export import save_hf
from megatron_r1z.weights.initialise import random_weights

PROMPTS = [Prompt(f"test/{length}", "", tuple(3 + index * 5 % 17 for index in range(length)), ("",), "test") for length in (3, 150, 9, 30)]
SAMPLING = Sampling(num_samples=3, max_tokens=24, temperature=1.0, top_p=1.0, top_k=-1, stop=(), seed=11)
ROUND_BYTES = 20_000


def main(command: str, folder: Path) -> None:
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text())
    dist.init_process_group("gloo")
    COMMANDS[command](settings, folder)
    dist.barrier()


def refit(settings: Mapping[str, Any], folder: Path) -> None:
    policy, plan = make_policy(settings)
    engine = make_engine(settings["model"], settings)
    with pytest.raises(EngineError, match="holds no accepted weights"):
        engine.generate(PROMPTS, SAMPLING, 0)
    hand_over = Refit([(torch.float32, plan)], dist.get_rank(), policy.parameters, engine)
    hand_over(0)
    save(engine, 0, folder, "before")
    change(policy.parameters())
    receipt = hand_over(1)
    save(engine, 1, folder, "after")
    assert receipt.nbytes == plan.nbytes
    export(policy, plan, settings, folder)
    refuse(hand_over, policy, engine, plan)


def gathered(settings: Mapping[str, Any], folder: Path) -> None:
    policy, plan = make_policy(settings)
    engine = make_engine(settings["model"], settings)
    tensors = WholeTensors(load_shape(settings["model"]), plan.source, dist.get_rank(), policy.parameters, torch.float32)
    hand_over = GatheredRefit(tensors, engine)
    hand_over(0)
    change(policy.parameters())
    receipt = hand_over(1)
    save(engine, 1, folder, "gathered")
    assert receipt.nbytes == 4 * dist.get_world_size() * sum(spec.numel for spec in tensors.specs)
    check_source(tensors, load_shape(settings["model"]).num_layers)


def check_source(tensors: WholeTensors, num_layers: int) -> None:
    """What vLLM's own trainer-side backends would be fed with: what is announced is what comes, layer by layer, in one order."""
    from megatron_r1z.rollout.weights import CheckpointSource

    source = CheckpointSource(tensors.specs, tensors.dtype, tensors)
    announced = [(item.name, item.dtype, item.shape) for item in source.metadata()]
    for _ in range(2):
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source] == announced
    assert [name for names, _ in source.iter_groups() for name in names] == [name for group in source.groups() for name in group]
    assert len(source.groups()) == num_layers + 2  # embedding, layers, the rest


def refuse(hand_over: Refit, policy: Any, engine: VllmEngine, plan: Any) -> None:
    """Weights of another version, then a flipped bit on the way: nothing is sampled, until a refit that went right."""
    with pytest.raises(EngineError, match="holds version 1 of the weights; version 2 was asked for"):
        engine.generate(PROMPTS, SAMPLING, 2)
    faulty = Refit([(torch.float32, plan)], dist.get_rank(), policy.parameters, engine, links=flipping)
    with pytest.raises(RefitError, match=r"refit 2: .* tensors differ from the source's. Restart from the last checkpoint"):
        faulty(2)
    for version in (1, 2):
        with pytest.raises(EngineError, match=f"holds no accepted weights, so it cannot sample as version {version}"):
            engine.generate(PROMPTS, SAMPLING, version)


def flipping(links: Links) -> Links:
    """Rank 0 sees one parameter of every other rank as it is not."""
    return links._replace(seen={peer: Flipping(seen) for peer, seen in links.seen.items()}) if dist.get_rank() == 0 else links  # type: ignore[misc]


class Flipping:
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def parameters(self, timeout_s: float) -> Mapping[str, Tensor]:
        found = dict(self._seen.parameters(timeout_s))
        name = next(name for name in found if name.endswith("mlp.linear_fc2.weight"))
        found[name] = found[name].clone()
        found[name].view(torch.uint8).bitwise_xor_(1)
        return found


def packed(settings: Mapping[str, Any], folder: Path) -> None:
    """As vLLM is installed: its CPU linear layers pack their weights when they are loaded, and empty the parameter."""
    vllm_engine.prepare_engine = without(vllm_engine.prepare_engine, "vllm._custom_ops", "_supports_onednn")
    policy, plan = make_policy(settings)
    engine = make_engine(settings["model"], settings)
    live: dict[str, Tensor] = engine._llm.apply_model(lambda model: dict(model.named_parameters()))[0]
    assert live["model.layers.0.mlp.down_proj.weight"].numel() == 0
    hand_over = Refit([(torch.float32, plan)], dist.get_rank(), policy.parameters, engine)
    hand_over(0)
    save(engine, 0, folder, "before")
    change(policy.parameters())
    hand_over(1)
    save(engine, 1, folder, "after")
    export(policy, plan, settings, folder)
    stop_at_a_special_token(engine, settings["model"])


def stop_at_a_special_token(engine: VllmEngine, model: str) -> None:
    """`<pad>` is never in the text, and ends a response all the same, as its last token; up to there nothing changes."""
    stop = make_stops(("<pad>",), load_tokenizer(model))
    whole, stopped = (engine.generate(PROMPTS, replace(SAMPLING, stop=which), 1) for which in ((), stop))
    pairs = [pair for one, other in zip(whole, stopped, strict=True) for pair in zip(one.responses, other.responses, strict=True)]
    pad = stop[-1]
    assert any(pad in before.token_ids for before, _ in pairs)
    for before, after in pairs:
        length = before.token_ids.index(pad) + 1 if pad in before.token_ids else before.length
        assert after.token_ids == before.token_ids[:length]
        assert after.logprobs == pytest.approx(before.logprobs[:length], abs=1e-5)
        assert (after.finish_reason is FinishReason.STOP) == (pad in after.token_ids or before.finish_reason is FinishReason.STOP)
        assert "<pad>" not in after.text


def without(prepare: Any, module: str, switch: str) -> Any:
    """`prepare`, after which a switch that it has turned off is on again."""

    def prepare_and_restore(max_model_tokens: int) -> dict[str, Any]:
        import importlib

        owner = importlib.import_module(module)
        before = getattr(owner, switch)
        options: dict[str, Any] = prepare(max_model_tokens)
        setattr(owner, switch, before)
        return options

    return prepare_and_restore


def fresh(settings: Mapping[str, Any], folder: Path) -> None:
    vllm_engine.prepare_import()
    import vllm

    vllm.LLM = functools.partial(loading, vllm.LLM)
    engine = make_engine(str(folder / "exported"), settings)
    engine._llm.update_weight_version("1")
    engine._version = 1
    save(engine, 1, folder, "fresh")


def loading(real: Any, **options: Any) -> Any:
    """vLLM with the weights of its folder."""
    return real(**options | {"load_format": "auto"})


def make_policy(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The policy with random weights, and the plan to the engines."""
    from megatron_r1z.policy.parallel import start_megatron
    from megatron_r1z.policy.policy import MegatronPolicy

    shape = load_shape(settings["model"])
    topology = Topology(dist.get_world_size(), settings["tp"], settings["pp"])
    start_megatron(topology, seed=1)

    class Sections:
        model = ModelConfig(path=settings["model"])
        parallel = ParallelConfig(num_ranks=topology.num_ranks, tensor_parallel_size=topology.tp, pipeline_parallel_size=topology.pp)
        precision = PrecisionConfig(policy="fp32", engine="fp32")

    padded = padded_vocab_size(shape.vocab_size, topology.tp)
    policy = MegatronPolicy(Sections, shape, topology, padded_vocab_size=padded)  # type: ignore[arg-type]
    source = megatron_layout(shape, topology, 1)
    random_weights(shape, source, dist.get_rank(), policy.parameters(), seed=3)
    destination = engine_layout(shape, dist.get_world_size(), settings["engine_tp"])
    return policy, make_plan(source, destination, 4, ROUND_BYTES)


def change(parameters: Mapping[str, Tensor]) -> None:
    for tensor in parameters.values():
        tensor.mul_(1.25)


def export(policy: Any, plan: Any, settings: Mapping[str, Any], folder: Path) -> None:
    ranks = dist.get_rank(), dist.get_world_size()
    save_hf(folder / "exported", settings["model"], load_shape(settings["model"]), plan.source, policy.parameters(), *ranks, torch.float32)


def make_engine(model: str, settings: Mapping[str, Any]) -> VllmEngine:
    return VllmEngine(
        EngineSettings(
            model_folder=model,
            dtype="fp32",
            rank=dist.get_rank(),
            num_ranks=dist.get_world_size(),
            tensor_parallel_size=settings["engine_tp"],
            max_model_tokens=256,
            max_concurrent_sequences=16,
            kv_cache_bytes=64 << 20,
            seed=5,
            speed=engine_speed(RolloutConfig(), 256, Machine(False, False)),
        )
    )


def save(engine: VllmEngine, version: int, folder: Path, name: str) -> None:
    groups = engine.generate(PROMPTS, SAMPLING, version)
    rows = [
        [group.group_id, index, list(item.token_ids), list(item.logprobs)] for group in groups for index, item in enumerate(group.responses)
    ]
    (folder / f"responses_{name}_{dist.get_rank()}.json").write_text(json.dumps(rows))


COMMANDS = {"refit": refit, "gathered": gathered, "packed": packed, "fresh": fresh}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
