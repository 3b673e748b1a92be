"""However the policy is split, a step is the same step: every layout against the objective written out in float64 by one process.

The reference shares no code with the package: a transformers model, full logits of one sample at a time, torch's AdamW. It and every layout
start from the same weights and take two steps on the same batch. Old log-probs are not the model's own, so that some ratios lie outside
the clip range on both sides in the first step; the second step starts from weights that the first one moved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_r1z.policy import logprob
from megatron_r1z.types import Sample
from tests.loop.float64 import KeepFloat64
from tests.loop.invariance import BOUNDS, render

pytestmark = pytest.mark.slow

VOCAB = 311  # no multiple of anything: the vocabulary is padded under tensor parallelism
TEMPERATURES = (0.8, 1.2, 0.6, 1.0)
LENGTH_CONSTANT = 100
LEARNING_RATE = 3e-4
EPSILON = 1e-6  # well above the noise of a gradient in float32, which Adam otherwise blows up where an element's gradient is almost 0
STEPS = 2
CLIP = 0.2
MAX_NORM = 0.4  # between the first and the second gradient norm: the first is scaled down, the second is not

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},  # bias on q, k and v
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},  # norm of q and k
    "llama-5": {"tie_word_embeddings": False, "num_hidden_layers": 5},  # so that of four chunks one can be larger
}

TP2, PP2, SP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
LAYOUTS = {  # ranks and how they are split
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, PP2 | {"virtual_pipeline_size": 2}),
    "pp2-uneven": (2, PP2 | {"pipeline_layers": (3, 1)}),
    "pp2-vpp2-uneven": (2, PP2 | {"virtual_pipeline_size": 2, "pipeline_layers": (1, 2, 1, 1)}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, {}),
    "tp2-pp2": (4, TP2 | PP2),
    "tp2-sp-pp2": (4, TP2 | SP | PP2),
    "pp2-dp2": (4, PP2),
    "cp2": (2, CP2),
    "cp2-distributed-optimizer": (2, CP2),
    "cp2-dp2": (4, CP2),
    "cp4": (4, {"context_parallel_size": 4}),
    "tp2-cp2": (4, TP2 | CP2),
    "tp2-sp-cp2": (4, TP2 | SP | CP2),
    "pp2-cp2": (4, PP2 | CP2),
    "pp2-vpp2-cp2": (4, PP2 | CP2 | {"virtual_pipeline_size": 2}),
    "tp1-selective": (1, {"recompute": "selective"}),
    "tp1-full": (1, {"recompute": "full"}),
    "tp2-sp-pp2-full": (4, TP2 | SP | PP2 | {"recompute": "full"}),
    "cp2-full": (2, CP2 | {"recompute": "full"}),
}
FIVE_LAYERS = ("pp2-vpp2-uneven",)
RECOMPUTING = {"tp1-selective": "tp1", "tp1-full": "tp1", "tp2-sp-pp2-full": "tp2-sp-pp2", "cp2-full": "cp2"}
"""Layouts that recompute activations, and those that are the same but for that."""
CONTEXT_PARALLEL = {
    "cp2": ("packed", "packed-small", "padded", "padded-small"),
    "cp2-dp2": ("packed-small",),
    "tp2-cp2": ("packed-small",),
    "tp2-sp-cp2": ("packed-small", "padded"),
    "pp2-cp2": ("packed", "packed-small"),
}
"""Layouts with context parallelism that every family has, and their batches."""
CONTEXT_PARALLEL_TOO = ("cp2-distributed-optimizer", "cp4", "pp2-vpp2-cp2")
"""Those that one family has."""
BATCHES = {
    "packed": {"micro_batch_tokens": 4096},
    "packed-small": {"micro_batch_tokens": 128},
    "padded": {"micro_batch_tokens": 4096, "pad_sequences": True},
    "padded-small": {"micro_batch_tokens": 256, "pad_sequences": True},
}
TILES = {f"{batches}-tiles-{nbytes}": (batches, nbytes) for batches in ("packed", "padded") for nbytes in (512, 16384)}
"""Batches whose logits the head computes in tiles of so many bytes; all others fit one tile."""


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

    @property
    def parallel(self) -> dict[str, Any]:
        """What a configuration would say."""
        return LAYOUTS[self.layout][1] | BATCHES[TILES.get(self.batches, (self.batches,))[0]]


CASES = [
    *(
        Case(family, layout, batches)
        for family in ("qwen2", "llama", "qwen3")
        for layout in LAYOUTS
        if layout not in (*FIVE_LAYERS, *RECOMPUTING, *CONTEXT_PARALLEL_TOO)
        for batches in CONTEXT_PARALLEL.get(layout, BATCHES)
    ),
    *(Case("llama-5", layout, batches) for layout in FIVE_LAYERS for batches in BATCHES),
    *(Case("qwen2", layout, "packed-small") for layout in (*CONTEXT_PARALLEL_TOO, *RECOMPUTING)),
    *(Case("qwen2", layout, batches) for layout in ("tp1", "tp2") for batches in TILES),
    *(Case("qwen2", layout, "packed-small", algorithm) for layout in ("tp2", "pp2-dp2", "cp2") for algorithm in ("grpo", "token_mean")),
    *(Case("qwen2", layout, batches, "ppo") for layout in ("tp2", "pp2-dp2", "cp2") for batches in ("packed-small", "padded")),
]
SWITCHES: dict[str, dict[str, Any]] = {
    "reinforce": {"name": "reinforce"},
    "dual_clip": {"dual_clip": 1.3},
    "tis": {"tis_cap": 1.2},
    "reinforce_tis": {"name": "reinforce", "tis_cap": 1.2},
    "kl_k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "kl_k3_entropy": {"kl_coef": 0.3, "entropy_coef": 0.05},
}
"""What `algorithm` of a configuration says, where it is more than the default. The bounds are so low that they act on this batch."""
SWITCHED = [
    *(Case("qwen2", layout, "packed-small", algorithm) for layout in ("tp2", "pp2-dp2", "cp2") for algorithm in SWITCHES),
    *(Case("qwen2", layout, "packed-small", "kl_k3_entropy") for layout in ("tp2-sp", "dp2-distributed-optimizer")),
]
"""Not on the page: they differ from their neighbours by the loss of a token alone."""
BF16 = Case("qwen2", "tp2-pp2", "packed-small", precision="bf16")


@dataclass(frozen=True)
class Reference:
    """What the float64 process found."""

    logprobs: list[Tensor]
    losses: list[float]
    grad_norms: list[float]
    figures: list[dict[str, float]]
    """Of each step, by the names of `UpdateStats`."""
    before: dict[str, Tensor]
    after: dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------------ the same batch


def make_model(folder: Path, family: str) -> None:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
    }
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **sizes | FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)


def draw_samples(algorithm: str) -> list[Sample]:
    """Short and long responses, one of a single token, one without a gradient; the advantages do not cancel, temperatures differ."""
    draw = random.Random(0)
    samples = []
    for index, length in enumerate((1, 3, 3, 7, 7, 20, 20, 40, 40, 60, 90, 90)):
        prompt = draw.randint(1, 20)
        tokens = tuple(draw.randrange(VOCAB) for _ in range(prompt + length))
        advantage = draw.choice((-0.25, 0.75, 0.875))
        samples.append(Sample(f"0/{index}", tokens, prompt, advantage if index != 5 else 0.0, TEMPERATURES[index % 4], (), 0))
    if algorithm == "ppo":
        return [with_own_advantages(sample) for sample in samples]
    return [replace(sample, has_further_terms=algorithm.startswith("kl")) for sample in samples]


def with_own_advantages(sample: Sample) -> Sample:
    """As a critic would give them: one per token, of either sign, 0 for some; and none to a sample that had none."""
    draw = random.Random(sample.sample_id)
    own = tuple(draw.choice((0.0, draw.gauss(0.3, 0.7))) for _ in range(sample.response_length))
    return replace(sample, advantage=own) if sample.advantage else sample


def draw_shifts() -> Tensor:
    """Old minus reference log-prob by token: the first ratios are their exponentials, on both sides of the clip range and inside it."""
    draw = random.Random(1)
    return torch.tensor([draw.choice((-0.4, -0.1, 0.05, 0.35)) for _ in range(VOCAB)])


def draw_engine_shifts() -> Tensor:
    """Engine minus reference log-prob by token; different for each, so that a percentile has something to tell apart."""
    draw = random.Random(2)
    return torch.tensor([draw.uniform(-0.3, 0.3) for _ in range(VOCAB)])


def draw_reference_shifts() -> Tensor:
    """The reference model's log-prob minus that of the initial weights by token."""
    draw = random.Random(3)
    return torch.tensor([draw.uniform(-0.5, 0.5) for _ in range(VOCAB)])


# ------------------------------------------------------------------------------------------------------------------- the reference


def response_logprobs(model: torch.nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens."""
    tokens = torch.tensor([sample.token_ids])
    logprobs = torch.log_softmax(model(tokens).logits[0] / sample.temperature, dim=-1)[sample.prompt_length - 1 : -1]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens[0, sample.prompt_length :, None])[:, 0], entropies


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
    "ppo": mean_of_means,
    **dict.fromkeys(SWITCHES, mean_over_budget),
}


def advantages_of(sample: Sample) -> Tensor:
    """One per response token."""
    return torch.tensor(sample.advantage, dtype=torch.float64).expand(len(sample.token_ids) - sample.prompt_length)


def sample_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, engine: Tensor, algorithm: str) -> Tensor:
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    if algorithm == "dual_clip":
        loss = torch.where(advantage < 0, torch.minimum(loss, -1.3 * advantage), loss)
    if algorithm.startswith("reinforce"):
        loss = -advantage * logprobs
    return loss * torch.exp(old - engine).clamp(max=1.2) if algorithm.endswith("tis") else loss


def kl_estimate(logprobs: Tensor, reference: Tensor, algorithm: str) -> Tensor:
    if algorithm == "kl_k2":
        return (logprobs - reference) ** 2 / 2
    return torch.exp(reference - logprobs) - 1 - (reference - logprobs) if algorithm == "kl_k3_entropy" else torch.zeros_like(logprobs)


def figures(
    terms: list[tuple[Tensor, Tensor, Tensor]], engine: list[Tensor], entropies: list[Tensor], divergences: list[Tensor], algorithm: str
) -> dict[str, float]:
    """Over the tokens of samples with a gradient, as one would write them down."""
    kept = [index for index, (_, _, advantage) in enumerate(terms) if advantage.any() or algorithm.startswith("kl")]
    new = torch.cat([terms[index][0].detach() for index in kept])
    old = torch.cat([terms[index][1] for index in kept])
    advantage = torch.cat([terms[index][2] for index in kept])
    sampled = torch.cat([engine[index] for index in kept])
    ratio, mismatch = torch.exp(new - old), (sampled - old).abs()
    clips = not algorithm.startswith("reinforce")
    high, low = clips & (advantage > 0) & (ratio > 1 + CLIP), clips & (advantage < 0) & (ratio < 1 - CLIP)
    dual = (algorithm == "dual_clip") & (advantage < 0) & (ratio > 1.3)
    importance = torch.exp(old - sampled) if algorithm.endswith("tis") else torch.ones_like(old)
    return {
        "clip_fraction": (high | low | dual).double().mean().item(),
        "clipped_high": high.double().mean().item(),
        "clipped_low": low.double().mean().item(),
        "dual_clipped": dual.double().mean().item(),
        "tis_weight": importance.clamp(max=1.2).mean().item(),
        "tis_truncated": (importance > 1.2).double().mean().item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "entropy": torch.cat([entropies[index] for index in kept]).mean().item(),
        "sampler_kl": (torch.exp(new - sampled) - 1 - (new - sampled)).mean().item(),
        "reference_kl": torch.cat([divergences[index].detach() for index in kept]).mean().item(),
        "mismatch_mean": mismatch.mean().item(),
        "mismatch_p999": mismatch.sort().values[math.ceil(0.999 * mismatch.numel()) - 1].item(),
        "mismatch_max": mismatch.max().item(),
        "num_tokens": ratio.numel(),
    }


def take_reference_steps(
    folder: Path,
    samples: list[Sample],
    shift_V: Tensor,
    algorithm: str,
    *,
    prepare: Callable[[torch.nn.Module], None] = lambda _model: None,
    lr: float = LEARNING_RATE,
    eps: float = EPSILON,
    steps: int = STEPS,
    multiplied_by: float = 1.0,
) -> Reference:
    """`multiplied_by`: the backward pass is that of so many times the loss, its gradient divided afterwards: FP8 rounds in between."""
    with KeepFloat64():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    prepare(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    with torch.no_grad(), KeepFloat64():
        logprobs = [response_logprobs(model, sample)[0] for sample in samples]
    targets = [torch.tensor(sample.token_ids[sample.prompt_length :]) for sample in samples]
    # Ranks get the log-probs as float32, so the reference does as well.
    old = [(mine.float() + shift_V[target]).double() for mine, target in zip(logprobs, targets, strict=True)]
    engine = [(mine.float() + draw_engine_shifts()[target]).double() for mine, target in zip(logprobs, targets, strict=True)]
    reference = [(mine.float() + draw_reference_shifts()[target]).double() for mine, target in zip(logprobs, targets, strict=True)]
    losses, norms, found = [], [], []
    for _ in range(steps):
        optimizer.zero_grad()
        with KeepFloat64():
            news, entropies = zip(*(response_logprobs(model, sample) for sample in samples), strict=True)
        terms = [(new, item, advantages_of(sample)) for new, item, sample in zip(news, old, samples, strict=True)]
        divergences = [kl_estimate(new, item, algorithm) for new, item in zip(news, reference, strict=True)]
        of_tokens = [sample_loss(*term, sampled, algorithm) for term, sampled in zip(terms, engine, strict=True)]
        if algorithm.startswith("kl"):
            bonus = 0.05 if algorithm == "kl_k3_entropy" else 0.0
            further = zip(of_tokens, divergences, entropies, strict=True)
            of_tokens = [item + 0.3 * divergence - bonus * entropy for item, divergence, entropy in further]
        loss = AGGREGATIONS[algorithm](of_tokens)
        (loss * multiplied_by).backward()
        for parameter in model.parameters():
            parameter.grad /= multiplied_by
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        losses.append(loss.item())
        found.append(figures(terms, engine, list(entropies), divergences, algorithm))
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Reference(logprobs, losses, norms, found, before, after)


# --------------------------------------------------------------------------------------------------------------------- the layouts


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(folder / family, family)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[tuple[str, str], Reference]:
    wanted = {(case.family, case.algorithm) for case in [*CASES, *SWITCHED]}
    return {
        (family, algorithm): take_reference_steps(models[family], draw_samples(algorithm), draw_shifts(), algorithm)
        for family, algorithm in wanted
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
            replace(item, engine_logprobs=tuple(values.tolist()))
            for item, values in zip(draw_samples(case.algorithm), logprobs, strict=True)
        ]
        return {
            "name": case.name,
            "model": str(models[case.family]),
            "samples": samples,
            "shift_V": draw_shifts(),
            "engine_shift_V": draw_engine_shifts(),
            "reference_shift_V": draw_reference_shifts(),
            "measures_memory": case.layout in (*RECOMPUTING, *RECOMPUTING.values()) and case.num_ranks == 1,
            "algorithm": SWITCHES.get(case.algorithm, {}).get("name", "drgrpo" if case.algorithm in SWITCHES else case.algorithm),
            "switches": SWITCHES.get(case.algorithm, {}),
            "precision": case.precision,
            "parallel": case.parallel,
            "tile_bytes": TILES[case.batches][1] if case.batches in TILES else logprob.TILE_BYTES["cpu"],
            "distributed": case.layout.endswith("distributed-optimizer"),
            "length_constant": LENGTH_CONSTANT,
            "lr": LEARNING_RATE,
            "eps": EPSILON,
            "steps": STEPS,
            "max_norm": MAX_NORM,
        }

    def result(case: Case) -> dict[str, Any]:
        if case.num_ranks not in found:
            folder = tmp_path_factory.mktemp(f"world_{case.num_ranks}")
            torch.save([task(item) for item in [*CASES, *SWITCHED, BF16] if item.num_ranks == case.num_ranks], folder / "tasks.pt")
            torchrun(case.num_ranks, Path(__file__).with_name("layout_worker.py"), folder)
            found[case.num_ranks] = torch.load(folder / "results.pt", weights_only=False)
        return found[case.num_ranks][case.name]

    return result


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, float]]]:
    """What was measured, by the names of cases; with `--invariance FILE` it becomes the page."""
    rows: dict[str, dict[str, float]] = {}
    yield rows
    target = request.config.getoption("--invariance")
    if target is not None:
        Path(target).write_text(render({case.name: rows[case.name] for case in [*CASES, BF16]}), encoding="utf-8")


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
        for step in reference.figures:
            if not algorithm.startswith("reinforce"):
                assert 0.1 < step["clip_fraction"] < 0.9
                assert step["clipped_high"] > 0.02
                assert step["clipped_low"] > 0.02
            assert step["dual_clipped"] > 0.02 or algorithm != "dual_clip"
            assert 0.1 < step["tis_truncated"] < 0.9 or not algorithm.endswith("tis")
            assert step["sampler_kl"] > 0.005
            assert step["reference_kl"] > 0.02 or not algorithm.startswith("kl")
        assert all(abs(loss) > 0.01 for loss in reference.losses)
        if algorithm == "drgrpo":
            assert reference.grad_norms[0] > MAX_NORM > reference.grad_norms[1]
        changes = [relative_norm(after, reference.before[name], after) for name, after in reference.after.items()]
        assert min(changes) > 1e-4  # and so is every tensor


@pytest.mark.parametrize("case", [*CASES, *SWITCHED], ids=lambda case: case.name)
def test_every_layout_takes_the_reference_steps(
    case: Case,
    result_of: Callable[[Case], dict[str, Any]],
    references: dict[tuple[str, str], Reference],
    table: dict[str, dict[str, float]],
) -> None:
    result, reference = result_of(case), references[case.family, case.algorithm]
    found = table[case.name] = differences(result, reference)
    assert set(result["weights"]) == set(reference.after)
    assert (result["micro_batches"] == 1) == (not case.batches.endswith("small") and "vpp" not in case.layout)
    assert not any(step["skipped"] or step["non_finite"] for step in result["steps"])
    for step, expected in zip(result["steps"], reference.figures, strict=True):
        assert {name: step[name] for name in expected} == pytest.approx(expected, rel=3e-5)
        for name in ("clip_fraction", "clipped_high", "clipped_low", "dual_clipped", "tis_truncated"):
            assert step[name] == pytest.approx(expected[name], abs=1e-12)
    assert all(found[name] < bound for name, bound in BOUNDS.items()), found
    assert found["updates"] < 5e-4


@pytest.mark.parametrize("layout", RECOMPUTING)
def test_recomputed_activations_are_the_same_to_the_bit(layout: str, result_of: Callable[[Case], dict[str, Any]]) -> None:
    found, expected = (result_of(Case("qwen2", name, "packed-small")) for name in (layout, RECOMPUTING[layout]))
    assert found["steps"] == expected["steps"]
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in expected["weights"].items())


def test_recomputed_activations_are_not_kept(result_of: Callable[[Case], dict[str, Any]]) -> None:
    """The most that a step holds at a time for its backward pass, embedding and output layer included."""
    kept = {name: result_of(Case("qwen2", name, "packed-small"))["kept_bytes"] for name in ("tp1", "tp1-selective", "tp1-full")}
    print("kept", kept)
    assert kept["tp1-full"] < 0.5 * kept["tp1"]
    assert kept["tp1-selective"] < 0.8 * kept["tp1"]


def test_bfloat16_takes_nearly_the_same_steps(
    result_of: Callable[[Case], dict[str, Any]],
    references: dict[tuple[str, str], Reference],
    table: dict[str, dict[str, float]],
) -> None:
    found = table[BF16.name] = differences(result_of(BF16), references[BF16.family, BF16.algorithm])
    assert found["logprobs"] < 0.2
    assert found["loss"] < 0.03
    assert found["grad_norm"] < 0.05
    assert found["weights"] < 2**-7  # a bfloat16 has 8 bits; the weights compared are rounded to it
