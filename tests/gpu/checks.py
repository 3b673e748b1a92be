"""The checks of docs/gpu.md that need one GPU and no vLLM: `python -m tests.gpu.checks NAME [ARGUMENT ...]`, one in a process.

`tools/gpu_check.py` starts them. Where there is no GPU they take the CPU, with the layers that stand in for Transformer Engine's there: so
they are tried (`tests/loop/test_gpu_checks.py`), and so the reference is made, on the same machine. It is this package's own policy in
float64, which `tests/loop/test_layouts.py` and `test_fp8.py` hold against one that shares no code with it.

Figures go to the file that R1Z_FIGURES names, a line each time, so that they outlive what comes after them.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1z import doctor
from megatron_r1z.config import AlgorithmConfig, Fp8Config, OptimizerConfig, ParallelConfig, PrecisionConfig, TrainConfig, load_config
from megatron_r1z.fp8.blocks import quantise_rows, quantise_weight
from megatron_r1z.fp8.machine import read_facts, transformer_engine_version
from megatron_r1z.fp8.recipes import machine_refusal
from megatron_r1z.host.float32 import keep_float32
from megatron_r1z.host.rank import die_with_parent
from megatron_r1z.layout.families import ModelShape, hf_tensors
from megatron_r1z.policy.fp8_state import delayed_states
from megatron_r1z.types import Sample

SKIPPED = 77
"""Status of a process that skipped its check; its last line says why."""
SHAPES = {
    "llama": ModelShape("llama", 4, 256, 2, 1, 128, 512, 311, False, False, False, 1e4, None, 1e-6, 512),
    "qwen2": ModelShape("qwen2", 4, 256, 2, 1, 128, 512, 311, True, True, False, 1e4, None, 1e-6, 512),
    "qwen3": ModelShape("qwen3", 4, 256, 2, 1, 128, 512, 311, False, False, True, 1e4, None, 1e-6, 512),
}
"""Heads of 128, blocks of 128 in every matrix, and a vocabulary that is no multiple of anything."""
BATCHES = {"packed": (4096, False), "small": (256, False), "padded": (512, True)}
"""Tokens of a micro-batch, and whether sequences are padded instead of packed."""
STEP = OptimizerConfig(lr=3.0, eps=1.0, weight_decay=0.0, clip_grad=1.0)
"""An epsilon so large that weights move along the gradient, and a mistake shows in its size."""
GIB = 1 << 30


class Skip(Exception):  # noqa: N818  # no error
    """This machine cannot be asked; why."""


class Failed(Exception):  # noqa: N818  # it is what the check says
    """A figure is beyond its limit."""


def record(**figures: Any) -> None:
    """Write figures down, and say them."""
    print(json.dumps(figures), flush=True)
    if "R1Z_FIGURES" in os.environ:
        with Path(os.environ["R1Z_FIGURES"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": os.environ["R1Z_CHECK"], "figures": figures}) + "\n")


def expect(figures: Mapping[str, float], **limits: float) -> None:
    """Record, then refuse what is not below its limit."""
    record(**figures)
    beyond = [f"{name} {figures[name]:.3g} (limit {limit:g})" for name, limit in limits.items() if not figures[name] < limit]
    if beyond:
        raise Failed("; ".join(beyond))


def place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layers() -> str:
    return "te" if torch.cuda.is_available() and transformer_engine_version() is not None else "local"


def relative(found: Tensor, wanted: Tensor) -> float:
    """Of the norm."""
    return float((found.double().cpu() - wanted.double().cpu()).norm() / wanted.double().cpu().norm())


# ------------------------------------------------------------------------------------------------------------- the machine, its products


def machine() -> None:
    """Versions, card, driver; which recipes of FP8 there are."""
    found = doctor.probe()
    print(doctor.render(doctor.diagnose(found)))
    record(**{name: value for name, value in dataclasses.asdict(found).items() if value is not None})
    record(cpus=os.cpu_count(), cudnn=torch.backends.cudnn.version(), layers=layers())
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,ecc.mode.current", "--format=csv,noheader"]
        record(nvidia_smi=subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
        record(memory_gib=round(torch.cuda.get_device_properties(0).total_memory / GIB, 1))


def float32(kind: str = "kept") -> None:
    """Products of float32 matrices beside float64: torch's and Transformer Engine's. `tf32`: without what `float32.py` sets."""
    if kind == "kept":
        keep_float32("fp32", "fp32")
    generator = torch.Generator().manual_seed(0)
    inputs_TK, weight_NK = (torch.randn(rows, 1024, generator=generator).to(place()) for rows in (512, 768))
    wanted = inputs_TK.double() @ weight_NK.double().t()
    figures = {
        "precision": "fp32" if kind == "kept" else "fp32, as libraries like it",
        "torch": relative(inputs_TK @ weight_NK.t(), wanted),
    }
    if layers() == "te":
        figures["transformer_engine"] = relative(te_linear(weight_NK)(inputs_TK), wanted)
    limits = {name: 1e-5 for name in figures if name != "precision"}
    expect(figures, **limits if kind == "kept" else {"torch": 1e-5})


def te_linear(weight_NK: Tensor) -> Any:
    import transformer_engine.pytorch as te

    rows, columns = weight_NK.shape
    layer = te.Linear(columns, rows, bias=False, params_dtype=weight_NK.dtype, device=weight_NK.device)
    with torch.no_grad():
        layer.weight.copy_(weight_NK)
    return layer


def fp8(recipe: str) -> None:
    """One layer's products under a recipe beside float64; of `blockwise` beside the emulation too, and the kernels' bytes beside ours."""
    refuse_recipe(recipe)
    inputs_TK, weight_NK, gradient_TN = operands()
    figures: dict[str, Any] = {"precision": f"fp8 {recipe}"}
    limits = dict.fromkeys((f"{name}_to_float64" for name in PRODUCTS), 0.1)
    if recipe == "blockwise" and layers() == "te":
        for name, values in (
            ("weight", weight_NK),
            ("rows", inputs_TK),
            ("float32_weight", weight_NK.float()),
            ("float32_rows", inputs_TK.float()),
        ):
            figures[f"{name}_other_bytes"], figures[f"{name}_other_scales"] = other_bytes(values, is_weight="weight" in name)
            limits |= {f"{name}_other_bytes": 0.5, f"{name}_other_scales": 0.5}
    found = products(inputs_TK, gradient_TN, *fp8_layer(recipe, weight_NK))
    exact = products(inputs_TK.double(), gradient_TN.double(), *plain_layer(weight_NK.double(), lambda inputs, weight: inputs @ weight.t()))
    figures |= {f"{name}_to_float64": relative(*pair) for name, *pair in zip(PRODUCTS, found, exact, strict=True)}
    if recipe == "blockwise":
        emulated = products(inputs_TK, gradient_TN, *plain_layer(weight_NK, emulated_product))
        figures |= {f"{name}_to_emulation": relative(*pair) for name, *pair in zip(PRODUCTS, found, emulated, strict=True)}
        limits |= dict.fromkeys((f"{name}_to_emulation" for name in PRODUCTS), 5e-3)  # results are rounded to bf16, by 2e-3
    expect(figures, **limits)


PRODUCTS = ("output", "grad_input", "grad_weight")
Layer = tuple[Callable[[Tensor], Tensor], Tensor]
"""And the weight that has the gradient."""


def refuse_recipe(recipe: str) -> None:
    facts = read_facts()
    refusal = machine_refusal(recipe, facts)  # type: ignore[arg-type]
    if refusal is not None:
        raise Skip(refusal)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and gradient in bf16; rows and columns are of different sizes, so that no block has the scale of another."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        sizes = torch.randn(shape[0], 1, generator=generator) + torch.randn(1, shape[1], generator=generator)
        return (torch.randn(shape, generator=generator) * (sizes / 2).exp()).bfloat16().to(place())

    return draw(512, 1024), draw(768, 1024), draw(512, 768)


def other_bytes(values: Tensor, *, is_weight: bool) -> tuple[int, int]:
    """How many bytes and scales of Transformer Engine's quantiser are not ours; its scales are padded, and of rows the other way round."""
    ours = (quantise_weight if is_weight else quantise_rows)(values)
    data, scales = kernel_bytes(values, is_weight=is_weight)
    rows, columns = ours.scale_inv.shape
    scales = scales[:, :columns] if is_weight else scales[:, :rows].t()
    return int((data != ours.data.view(torch.uint8)).sum()), int((scales != ours.scale_inv).sum())


def kernel_bytes(values: Tensor, *, is_weight: bool) -> tuple[Tensor, Tensor]:
    import transformer_engine_torch as bindings
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    dimensions = 2 if is_weight else 1
    found = Float8BlockQuantizer(bindings.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=dimensions)(values)
    return found._rowwise_data, found._rowwise_scale_inv


def products(inputs_TK: Tensor, gradient_TN: Tensor, layer: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both gradients, at the third time: recipe `delayed` has its scales from the passes before."""
    for _ in range(3):
        inputs, weight.grad = inputs_TK.detach().clone().requires_grad_(), None
        output = layer(inputs)
        output.backward(gradient_TN)
    assert inputs.grad is not None
    assert weight.grad is not None
    return output.detach(), inputs.grad, weight.grad


def plain_layer(weight_NK: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Layer:
    weight = weight_NK.detach().clone().requires_grad_()
    return lambda inputs: product(inputs, weight), weight


def emulated_product(inputs: Tensor, weight: Tensor) -> Tensor:
    from megatron_r1z.policy.fp8_linear import fp8_linear

    return fp8_linear(inputs, weight, None)


def fp8_layer(recipe: str, weight_NK: Tensor) -> Layer:
    """Of Transformer Engine, with what megatron-core makes of our recipe; emulated without it."""
    if layers() != "te":
        return plain_layer(weight_NK, emulated_product)
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_r1z.policy.model import transformer_config

    config = transformer_config(SHAPES["llama"], ParallelConfig(num_ranks=1), precision_of(f"fp8-{recipe}"))
    layer, chosen = te_linear(weight_NK), get_fp8_recipe(config)

    def call(inputs: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=chosen):
            return layer(inputs)

    return call, layer.weight


# ------------------------------------------------------------------------------------------------------------------- steps of the policy


def precision_of(name: str) -> Any:
    """`fp32`, `bf16`, `fp8-RECIPE`; `fp64` and `fp8-fp64` are those of references, which no configuration offers."""
    if name.endswith("fp64"):
        return SimpleNamespace(policy=name.partition("-")[0], policy_format="fp64", fp8=Fp8Config())
    return PrecisionConfig(policy=name.partition("-")[0], fp8=Fp8Config(recipe=name.partition("-")[2] or "blockwise"))  # type: ignore[arg-type]


@contextmanager
def one_rank(precision: str) -> Iterator[None]:
    """The process group of this process alone, and Megatron's."""
    from megatron_r1z.layout.topology import Topology
    from megatron_r1z.policy.parallel import start_megatron, start_process_group

    if precision.startswith("fp8") and not precision.endswith("fp64"):
        refuse_recipe(precision.partition("-")[2])
    keep_float32(precision, precision)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in here.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    start_process_group(120)
    start_megatron(Topology(1), seed=1)
    yield
    dist.destroy_process_group()


def make_policy(shape: ModelShape, precision: str, tokens: int = 4096, *, is_padded: bool = False) -> Any:
    """With the same weights whatever the layers and the format are."""
    from megatron_r1z.layout.blocks import megatron_layout
    from megatron_r1z.layout.topology import Topology
    from megatron_r1z.objective import make_loss
    from megatron_r1z.policy.policy import MegatronPolicy
    from tests.loop.layout_worker import copy_in

    parallel = ParallelConfig(num_ranks=1, micro_batch_tokens=tokens, pad_sequences=is_padded)
    settings: Any = SimpleNamespace(model=None, parallel=parallel, precision=precision_of(precision))
    policy = MegatronPolicy(settings, shape, Topology(1), padded_vocab_size=shape.vocab_size)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for spec in hf_tensors(shape):
        is_norm = "norm" in spec.name
        size = 0.1 if is_norm or "embed" in spec.name or len(spec.shape) == 1 else 0.06
        weights[spec.name] = torch.randn(spec.shape, generator=generator) * size + float(is_norm)
    copy_in(megatron_layout(shape, Topology(1), 1, layers()), policy.parameters(), weights)
    policy.start_training(make_loss(AlgorithmConfig(iterations=1)), STEP)
    return policy


def draw_samples(vocab_size: int) -> list[Sample]:
    """Twelve, short and long, with advantages that do not cancel; their engine log-probs are still to come."""
    draw = random.Random(0)
    samples = []
    for number, length in enumerate((1, 3, 3, 7, 7, 20, 20, 40, 40, 60, 90, 90)):
        prompt = draw.randint(1, 20)
        tokens = tuple(draw.randrange(vocab_size) for _ in range(prompt + length))
        samples.append(Sample(f"0/{number}", tokens, prompt, draw.choice((-0.25, 0.75, 0.875)), 1.0, (0.0,) * length, 0))
    return samples


def batch_of(policy: Any, samples: Sequence[Sample]) -> Any:
    from megatron_r1z.packing import pack

    return pack(samples, policy.packing_rules(), 0, 0, token_weight=lambda _length: 1.0, denominator=len(samples) * 100)


def logprobs_of(policy: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Of the response tokens, by sample, however they are packed."""
    batches = batch_of(policy, samples).micro_batches
    pairs = zip(batches, policy.response_logprobs(batches), strict=True)
    return {name: found[batch.sequences_R == number] for batch, found in pairs for number, name in enumerate(batch.sample_ids)}


def take_steps(policy: Any, samples: Sequence[Sample], count: int = 2) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; old log-probs are the samples', so far off the policy's that ratios are clipped on either side."""
    from megatron_r1z.policy.policy import TrainBatch

    batch = batch_of(policy, samples)
    old = tuple(item.engine_logprobs_R for item in batch.micro_batches)
    stats = [policy.update(TrainBatch(batch, old)) for _ in range(count)]
    return [item.loss for item in stats], [item.grad_norm for item in stats]


def with_old_logprobs(samples: Sequence[Sample], logprobs: Mapping[str, Tensor]) -> list[Sample]:
    draw = random.Random(1)
    shifts = [[draw.choice((-0.4, -0.1, 0.05, 0.35)) for _ in range(item.response_length)] for item in samples]
    old = [(logprobs[item.sample_id].double() + torch.tensor(shift)).tolist() for item, shift in zip(samples, shifts, strict=True)]
    return [dataclasses.replace(item, engine_logprobs=tuple(values)) for item, values in zip(samples, old, strict=True)]


def checkpoint_weights(policy: Any, shape: ModelShape) -> dict[str, Tensor]:
    from megatron_r1z.layout.blocks import megatron_layout
    from megatron_r1z.layout.topology import Topology
    from tests.loop.layout_worker import gather

    return gather(megatron_layout(shape, Topology(1), 1, layers()), policy.parameters(), shape)


def steps_of(family: str, precision: str, samples: Sequence[Sample] | None = None, batches: str = "packed") -> dict[str, Any]:
    """Log-probs, then two steps from there."""
    shape, (tokens, is_padded) = SHAPES[family], BATCHES[batches]
    policy, drawn = make_policy(shape, precision, tokens, is_padded=is_padded), samples or draw_samples(shape.vocab_size)
    logprobs, before = logprobs_of(policy, drawn), checkpoint_weights(policy, shape)
    taken = samples or with_old_logprobs(drawn, logprobs)
    losses, norms = take_steps(policy, taken)
    after = checkpoint_weights(policy, shape)
    return {"samples": taken, "logprobs": joined(logprobs), "losses": losses, "norms": norms, "before": before, "after": after}


def reference(path: str) -> None:
    """What `steps` compares with: the same steps in float64, on the CPU; with FP8 operands too."""
    from tests.loop.layout_worker import float64_everywhere

    found = {}
    with one_rank("fp64"), float64_everywhere():
        for family, precision in (*((family, "fp64") for family in SHAPES), ("llama", "fp8-fp64")):
            found[family, precision] = steps_of(family, precision)
    torch.save(found, path)
    record(logprobs=sum(item.response_length for item in found["llama", "fp64"]["samples"]), clip="both sides")


def steps(precision: str, path: str) -> None:
    """Log-probs and two optimizer steps beside the reference; other micro-batches; the same again."""
    wanted = torch.load(path, weights_only=False)
    fp8_too = precision.startswith("fp8")
    with one_rank(precision):
        record(precision=precision.replace("-", " "), layers=layers())
        for family in ("llama",) if fp8_too else SHAPES:
            compare_steps(family, precision, wanted[family, "fp64"], wanted["llama", "fp8-fp64"] if fp8_too else None)


LIMITS = {
    "fp32": {"logprobs_max": 1e-4, "loss": 1e-4, "grad_norm": 1e-4, "updates": 1e-3, "packing_logprobs": 1e-4},
    "bf16": {"logprobs_mean": 0.05, "loss": 0.1, "grad_norm": 0.1},
    "fp8": {"logprobs_mean": 0.3, "loss": 0.5, "grad_norm": 0.5},
}
"""Nats for log-probs, relative for the rest; CONTRIBUTING.md says why the coarse formats have no closer ones."""


def compare_steps(family: str, precision: str, wanted: dict[str, Any], wanted_fp8: dict[str, Any] | None) -> None:
    take = partial(steps_of, family, precision, wanted["samples"])
    found = take()
    start = time.perf_counter()
    again = take()
    seconds = time.perf_counter() - start
    others = [take(batches) for batches in BATCHES if batches != "packed"]
    error = found["logprobs"] - wanted["logprobs"]
    figures = {
        "logprobs_max": float(error.abs().max()),
        "logprobs_mean": float(error.abs().mean()),
        "loss": max(abs(mine / other - 1) for mine, other in zip(found["losses"], wanted["losses"], strict=True)),
        "grad_norm": max(abs(mine / other - 1) for mine, other in zip(found["norms"], wanted["norms"], strict=True)),
        "updates": updates_apart(found, wanted),
        "packing_logprobs": max(float((one["logprobs"] - found["logprobs"]).abs().max()) for one in others),
        "packing_updates": max(updates_apart(one, found) for one in others),
        "again_logprobs": float((again["logprobs"] - found["logprobs"]).abs().max()),
        "again_updates": updates_apart(again, found),
        "seconds": seconds,
    }
    if wanted_fp8 is not None:
        figures["shared_with_fp8"] = shared(found["logprobs"], wanted["logprobs"], wanted_fp8["logprobs"])
    limits = LIMITS[precision.partition("-")[0]]
    expect({f"{family} {name}": value for name, value in figures.items()}, **{f"{family} {name}": limit for name, limit in limits.items()})


def joined(logprobs: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([logprobs[name].double() for name in sorted(logprobs)])


def updates_apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Of all weights together, over how far they moved."""
    apart = sum(float((found["after"][name] - after).square().sum()) for name, after in wanted["after"].items())
    moved = sum(float((wanted["before"][name] - after).square().sum()) for name, after in wanted["after"].items())
    return (apart / moved) ** 0.5


def shared(found: Tensor, plain: Tensor, rounded: Tensor) -> float:
    """Of the error of log-probs in FP8 what is that of the reference in FP8: 1 if all is, 0 if nothing."""
    return float((found - plain) @ (rounded - plain) / (rounded - plain).square().sum())


# ---------------------------------------------------------------------------------------------------- optimizer, checkpoint, scales, refit


def checkpoint() -> None:
    """Either optimizer: save, load into a new policy, go on; equal to the bit. Also with another learning rate, and more padding."""
    from tests.unit.policy import distributed_ranks, fused_adam

    with one_rank("bf16"), tempfile.TemporaryDirectory() as folder:
        found = {"whole": distributed_ranks.results_of(Path(folder, "whole"), distributed=False)}
        if layers() != "te":
            fused_adam.take_the_place_of_transformer_engines()
        found["distributed"] = distributed_ranks.results_of(Path(folder, "distributed"), distributed=True)
    figures = {"precision": "bf16", "optimizers_apart": weights_apart(found["whole"]["saved"], found["distributed"]["saved"])}
    for name, weights in found.items():
        figures[f"{name}_loaded"] = weights_apart(weights["loaded"], weights["saved"])
        figures[f"{name}_gone_on"] = weights_apart(weights["gone on"], weights["never stopped"])
        figures[f"{name}_moved"] = weights_apart(weights["gone on"], weights["saved"])
    expect(figures, **{f"{name}_{what}": 1e-30 for name in found for what in ("loaded", "gone_on")}, optimizers_apart=1e-2)


def weights_apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    return max(relative(found[name], wanted[name]) for name in wanted)


def scales() -> None:
    """Log-prob passes leave scales and histories of recipe `delayed` as they were, and so the steps that follow them."""
    if layers() != "te":
        raise Skip("recipe delayed keeps its scales in Transformer Engine, and there is none on a GPU here")
    shape, weights = SHAPES["llama"], []
    with one_rank("fp8-delayed"):
        record(precision="fp8 delayed")
        for has_passes in (False, True):
            policy, samples = make_policy(shape, "fp8-delayed"), draw_samples(shape.vocab_size)
            take_steps(policy, samples)
            states = delayed_states(policy.model.chunks)
            before = [(state.scale.clone(), state.amax_history.clone()) for state in states]
            if has_passes:
                logprobs_of(policy, samples)
            kept = [
                torch.equal(scale, state.scale) and torch.equal(amax, state.amax_history)
                for state, (scale, amax) in zip(states, before, strict=True)
            ]
            used = sum(bool(state.amax_history.any()) for state in states)
            expect(
                {"unused": len(states) - used, "changed": kept.count(False), "states_missing": float(not states)},
                changed=0.5,
                states_missing=0.5,
            )
            take_steps(policy, samples)
            weights.append(checkpoint_weights(policy, shape))
    expect({"weights_apart": weights_apart(*weights)}, weights_apart=1e-2)


@dataclasses.dataclass
class BareEngine:
    """Parameters in vLLM's layout, and nothing that samples."""

    live: dict[str, Tensor]

    def parameters(self) -> dict[str, Tensor]:
        return self.live

    def receive(self, write: Callable[[Mapping[str, Tensor]], Any]) -> Any:
        return write(self.live)

    def accept(self, policy_version: int) -> None:
        assert policy_version >= 0


def refit() -> None:
    """The policy's weights into an engine's layout on the same device, digests compared: bytes per second, memory above the weights."""
    from megatron_r1z.layout.blocks import engine_layout, megatron_layout
    from megatron_r1z.layout.plan import make_plan
    from megatron_r1z.layout.topology import Topology
    from megatron_r1z.reshard.refit import ROUND_BYTES, Refit

    if place().type == "cpu" and importlib.util.find_spec("numba") is None:
        raise Skip("a refit on a CPU needs numba")
    name, shape = large_shape()
    with one_rank("bf16"):
        source, destination = megatron_layout(shape, Topology(1), 1, layers()), engine_layout(shape, 1, 1)
        draw = torch.Generator(place()).manual_seed(0)
        weights = {
            key: torch.randn(size, generator=draw, device=place(), dtype=torch.bfloat16) for key, size in source.parameters[0].items()
        }
        engine = BareEngine(
            {key: torch.zeros(size, device=place(), dtype=torch.bfloat16) for key, size in destination.parameters[0].items()}
        )
        plan = make_plan(source, destination, 2, ROUND_BYTES[place().type])
        hand_over = Refit([(torch.bfloat16, plan)], 0, lambda: weights, engine)  # type: ignore[arg-type]
        hand_over(0)
        before = allocated(most=False)
        receipt = hand_over(1)
        record(
            model=name,
            precision="bf16",
            gbytes=receipt.nbytes / 1e9,
            seconds=receipt.seconds,
            gbytes_per_second=receipt.nbytes / 1e9 / receipt.seconds,
        )
        record(rounds=len(receipt.round_seconds), above_weights_gib=(allocated(most=True) - before) / GIB)


def large_shape() -> tuple[str, ModelShape]:
    """What a GPU has something to do with; without one a small model."""
    from megatron_r1z.layout.known import find_shape

    return ("Qwen2.5-1.5B", find_shape("models/Qwen2.5-1.5B").shape) if torch.cuda.is_available() else ("llama", SHAPES["llama"])


def allocated(*, most: bool) -> int:
    """Bytes of tensors on the GPU: now, which begins a new maximum, or at most since."""
    if not torch.cuda.is_available():
        return 0
    if most:
        return torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory(precision: str, *overrides: str) -> None:
    """Full micro-batches of a whole model: memory beside `plan`, tokens per second, which attention. As a rehearsal, on a device."""
    from megatron_r1z.cost.activations import BatchSize
    from megatron_r1z.layout.topology import Topology
    from megatron_r1z.objective import make_loss
    from megatron_r1z.policy.policy import MegatronPolicy, TrainBatch
    from megatron_r1z.rehearse.policy_role import attention_taken, full_batch, planned_bytes
    from megatron_r1z.rehearse.roles import make_task

    path, (name, shape) = "configs/oat-zero-1.5b.yaml", large_shape()
    kind, _, recipe = precision.partition("-")
    small = (
        ()
        if torch.cuda.is_available()
        else ("data.max_prompt_tokens=8", "rollout.max_response_tokens=56", "parallel.micro_batch_tokens=256")
    )
    given = ("parallel.num_ranks=1", f"precision.policy={kind}", f"precision.fp8.recipe={recipe or 'blockwise'}", *small, *overrides)
    config = load_config(TrainConfig, path, given)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, distributed=layers() == "te"))
    with one_rank(precision):
        record(model=name, precision=precision.replace("-", " "), layout=f"recompute {config.parallel.recompute}", layers=layers())
        base = allocated(most=False)
        policy = MegatronPolicy(config, shape, Topology(1), padded_vocab_size=-(-shape.vocab_size // 128) * 128)
        for tensor in policy.parameters().values():
            tensor.normal_(0.0, 0.02)
        policy.start_training(make_loss(config.algorithm), config.optimizer)
        task = make_task(config, path, given, 0, gpu="", memory_bytes=0, capability=(0, 0), gpus_per_node=1)
        batch = full_batch(config, policy, task)
        logprob_seconds = seconds_of(lambda: policy.response_logprobs(batch.micro_batches))
        policy.update(TrainBatch(batch))
        first = batch.micro_batches[0]
        planned = planned_bytes(config, shape, 0, BatchSize(first.num_tokens, first.targets_R.numel(), len(batch.micro_batches)))
        statics = allocated(most=False) - base
        seconds = seconds_of(lambda: policy.update(TrainBatch(batch)))
        peak = allocated(most=True) - base
        tokens = sum(item.num_tokens for item in batch.micro_batches)
        record(
            tokens=tokens,
            micro_batches=len(batch.micro_batches),
            statics_gib=statics / GIB,
            peak_gib=peak / GIB,
            planned_peak_gib=planned["update 2"] / GIB,
        )
        record(update_seconds=seconds, tokens_per_second=tokens / seconds, logprob_tokens_per_second=tokens / logprob_seconds)
        if layers() == "te":
            record(attention=" ".join(attention_taken()))


def seconds_of(call: Callable[[], Any]) -> float:
    """Of a second call, as the first one builds kernels."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start


CHECKS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (machine, float32, fp8, reference, steps, checkpoint, scales, refit, memory)
}


def main(checks: Mapping[str, Callable[..., None]], name: str, *arguments: str) -> int:
    """Status 0, 1, or `SKIPPED`; what Python was doing is shown shortly before the time is up."""
    if "R1Z_LIMIT_S" in os.environ:
        die_with_parent(os.getppid())
        faulthandler.dump_traceback_later(max(1.0, float(os.environ["R1Z_LIMIT_S"]) - 2))
    try:
        checks[name](*arguments)
    except Skip as reason:
        print(reason)
        return SKIPPED
    except Failed as reason:
        print(reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(CHECKS, *sys.argv[1:]))
