"""However the policy is split, a step is the same step: every layout against the objective written out in float64 by one process.

The reference shares no code with the package: a transformers model, full logits of one sample at a time, torch's AdamW. It and every layout
start from the same weights and take two steps on the same batch. Old log-probs are not the model's own, so that some ratios lie outside
the clip range on both sides in the first step; the second step starts from weights that the first one moved.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_r1z.types import Sample

pytestmark = pytest.mark.slow

VOCAB = 311  # no multiple of anything: the vocabulary is padded under tensor parallelism
TEMPERATURE = 0.7
LENGTH_CONSTANT = 100
LEARNING_RATE = 3e-4
CLIP = 0.2
MAX_NORM = 0.4  # between the first and the second gradient norm: the first is scaled down, the second is not

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},  # bias on q, k and v
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},  # norm of q and k
}

TP2, PP2, SP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel": True}
LAYOUTS = {  # ranks and how they are split
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, PP2 | {"virtual_pipeline_size": 2}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {}),
    "tp2-pp2": (4, TP2 | PP2),
    "tp2-sp-pp2": (4, TP2 | SP | PP2),
    "pp2-dp2": (4, PP2),
}
BATCHES = {
    "packed": {"micro_batch_tokens": 4096},
    "packed-small": {"micro_batch_tokens": 128},
    "padded": {"micro_batch_tokens": 4096, "pad_sequences": True},
    "padded-small": {"micro_batch_tokens": 256, "pad_sequences": True},
}


@dataclass(frozen=True)
class Case:
    """One way to take the two steps; `name` is also the test's."""

    family: str
    layout: str
    batches: str
    algorithm: str = "drgrpo"
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return "/".join((self.family, self.layout, self.batches, self.algorithm, self.precision))

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.layout][0]


CASES = [
    *(Case(family, layout, batches) for family in FAMILIES for layout in LAYOUTS for batches in BATCHES),
    *(Case("qwen2", layout, "packed-small", algorithm) for layout in ("tp2", "pp2-dp2") for algorithm in ("grpo", "token_mean")),
]
BF16 = Case("qwen2", "tp2-pp2", "packed-small", precision="bf16")


@dataclass(frozen=True)
class Reference:
    """What the float64 process found."""

    logprobs: list[Tensor]
    losses: list[float]
    grad_norms: list[float]
    clip_fractions: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------------ the same batch


def make_model(folder: Path, family: str) -> None:
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)


def draw_samples() -> list[Sample]:
    """Short and long responses, one of a single token, some without a gradient; the advantages do not cancel."""
    draw = random.Random(0)
    samples = []
    for index, length in enumerate((1, 3, 3, 7, 7, 20, 20, 40, 40, 60, 90, 90)):
        prompt = draw.randint(1, 20)
        tokens = tuple(draw.randrange(VOCAB) for _ in range(prompt + length))
        advantage = draw.choice((-0.25, 0.75, 0.875))
        samples.append(Sample(f"0/{index}", tokens, prompt, advantage if index != 5 else 0.0, (), 0))
    return samples


def draw_shifts() -> Tensor:
    """Old minus reference log-prob by token: the first ratios are their exponentials, on both sides of the clip range and inside it."""
    draw = random.Random(1)
    return torch.tensor([draw.choice((-0.4, -0.1, 0.05, 0.35)) for _ in range(VOCAB)])


# ------------------------------------------------------------------------------------------------------------------- the reference


def response_logprobs(model: torch.nn.Module, sample: Sample) -> Tensor:
    tokens = torch.tensor([sample.token_ids])
    logprobs = torch.log_softmax(model(tokens).logits[0] / TEMPERATURE, dim=-1)
    return logprobs[:-1].gather(1, tokens[0, 1:, None])[sample.prompt_length - 1 :, 0]


def mean_over_budget(losses: list[Tensor]) -> Tensor:
    return sum(loss.sum() for loss in losses) / (len(losses) * LENGTH_CONSTANT)


def mean_of_means(losses: list[Tensor]) -> Tensor:
    return sum(loss.mean() for loss in losses) / len(losses)


def mean_over_tokens(losses: list[Tensor]) -> Tensor:
    return torch.cat(losses).mean()


AGGREGATIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "drgrpo": mean_over_budget,
    "grpo": mean_of_means,
    "token_mean": mean_over_tokens,
}


def sample_loss(logprobs: Tensor, old: Tensor, advantage: float) -> Tensor:
    ratio = torch.exp(logprobs - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def clip_fraction(terms: list[tuple[Tensor, Tensor, float]]) -> float:
    """Share of the tokens with an advantage that have no gradient."""
    ratios = [(torch.exp(new.detach() - old), advantage) for new, old, advantage in terms if advantage]
    flags = [ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP for ratio, advantage in ratios]
    return torch.cat(flags).double().mean().item()


class KeepFloat64(TorchFunctionMode):
    """transformers computes norms, softmax and rotary angles in float32 whatever the model's type; here they stay float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wider = {torch.float32: torch.float64}
        args = tuple(wider[arg] if arg is torch.float32 else arg for arg in args)
        return func(*args, **{name: wider[arg] if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()})


def take_reference_steps(folder: Path, samples: list[Sample], shift_V: Tensor, algorithm: str) -> Reference:
    with KeepFloat64():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with torch.no_grad(), KeepFloat64():
        logprobs = [response_logprobs(model, sample) for sample in samples]
    targets = [torch.tensor(sample.token_ids[sample.prompt_length :]) for sample in samples]
    # Ranks get the log-probs as float32, so the reference does as well.
    old = [(mine.float() + shift_V[target]).double() for mine, target in zip(logprobs, targets, strict=True)]
    losses, norms, clipped = [], [], []
    for _ in range(2):
        optimizer.zero_grad()
        with KeepFloat64():
            news = [response_logprobs(model, sample) for sample in samples]
        terms = [(new, item, sample.advantage) for new, item, sample in zip(news, old, samples, strict=True)]
        loss = AGGREGATIONS[algorithm]([sample_loss(*term) for term in terms])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        losses.append(loss.item())
        clipped.append(clip_fraction(terms))
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Reference(logprobs, losses, norms, clipped, before, after)


# --------------------------------------------------------------------------------------------------------------------- the layouts


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(folder / family, family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[tuple[str, str], Reference]:
    wanted = {(case.family, case.algorithm) for case in CASES}
    return {
        (family, algorithm): take_reference_steps(models[family], draw_samples(), draw_shifts(), algorithm) for family, algorithm in wanted
    }


@pytest.fixture(scope="session")
def result_of(
    models: dict[str, Path],
    references: dict[tuple[str, str], Reference],
    torchrun: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Case], dict[str, Any]]:
    """The result of a case; the first one of a world size runs all of that size in one group of processes."""
    found: dict[int, dict[str, dict[str, Any]]] = {}

    def task(case: Case) -> dict[str, Any]:
        logprobs = references[case.family, case.algorithm].logprobs
        samples = [
            Sample(item.sample_id, item.token_ids, item.prompt_length, item.advantage, tuple(values.tolist()), 0)
            for item, values in zip(draw_samples(), logprobs, strict=True)
        ]
        return {
            "name": case.name,
            "model": str(models[case.family]),
            "samples": samples,
            "shift_V": draw_shifts(),
            "algorithm": case.algorithm,
            "precision": case.precision,
            "parallel": LAYOUTS[case.layout][1] | BATCHES[case.batches],
            "distributed": case.layout == "dp2-distributed-optimizer",
            "temperature": TEMPERATURE,
            "length_constant": LENGTH_CONSTANT,
            "lr": LEARNING_RATE,
            "max_norm": MAX_NORM,
        }

    def result(case: Case) -> dict[str, Any]:
        if case.num_ranks not in found:
            folder = tmp_path_factory.mktemp(f"world_{case.num_ranks}")
            torch.save([task(item) for item in [*CASES, BF16] if item.num_ranks == case.num_ranks], folder / "tasks.pt")
            torchrun(case.num_ranks, Path(__file__).with_name("layout_worker.py"), folder)
            found[case.num_ranks] = torch.load(folder / "results.pt", weights_only=False)
        return found[case.num_ranks][case.name]

    return result


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def relative_norm(value: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float((value - expected).norm() / scale.norm())


def differences(result: dict[str, Any], reference: Reference) -> dict[str, float]:
    """The largest relative differences over steps and tensors; `weights` by the weight's norm, `updates` by that of its change."""
    tensors = [(result["weights"][name].double(), after, reference.before[name]) for name, after in reference.after.items()]
    steps = result["steps"]
    return {
        "logprobs": result["logprob_error"],
        "loss": max(relative(step["loss"], loss) for step, loss in zip(steps, reference.losses, strict=True)),
        "grad_norm": max(relative(step["grad_norm"], norm) for step, norm in zip(steps, reference.grad_norms, strict=True)),
        "weights": max(relative_norm(mine, after, after) for mine, after, _ in tensors),
        "updates": max(relative_norm(mine, after, after - before) for mine, after, before in tensors),
    }


def test_the_steps_of_the_reference_are_worth_comparing(references: dict[tuple[str, str], Reference]) -> None:
    for (_, algorithm), reference in references.items():
        assert all(0.1 < share < 0.9 for share in reference.clip_fractions)
        assert all(abs(loss) > 0.01 for loss in reference.losses)
        if algorithm == "drgrpo":
            assert reference.grad_norms[0] > MAX_NORM > reference.grad_norms[1]
        changes = [relative_norm(after, reference.before[name], after) for name, after in reference.after.items()]
        assert min(changes) > 1e-4  # and so is every tensor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_takes_the_reference_steps(
    case: Case,
    result_of: Callable[[Case], dict[str, Any]],
    references: dict[tuple[str, str], Reference],
) -> None:
    result, reference = result_of(case), references[case.family, case.algorithm]
    found = differences(result, reference)
    print("differences", case.name, found)
    assert set(result["weights"]) == set(reference.after)
    assert (result["micro_batches"] == 1) == (not case.batches.endswith("small") and "vpp" not in case.layout)
    assert [step["clip_fraction"] for step in result["steps"]] == pytest.approx(reference.clip_fractions, abs=1e-12)
    assert found["logprobs"] < 1e-5  # measured: 4e-6 nats
    assert found["loss"] < 1e-5
    assert found["grad_norm"] < 1e-5
    assert found["weights"] < 1e-5
    # Adam divides each gradient by its own size, so that the float32 noise of an element whose gradient is almost 0 shows in full.
    assert found["updates"] < 2e-3


def test_bfloat16_takes_nearly_the_same_steps(
    result_of: Callable[[Case], dict[str, Any]],
    references: dict[tuple[str, str], Reference],
) -> None:
    found = differences(result_of(BF16), references[BF16.family, BF16.algorithm])
    print("differences", BF16.name, found)
    assert found["logprobs"] < 0.2
    assert found["loss"] < 0.03
    assert found["grad_norm"] < 0.05
    assert found["weights"] < 2**-7  # a bfloat16 has 8 bits; the weights compared are rounded to it
