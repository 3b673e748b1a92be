"""FP8 and context parallelism: what changes in bytes and seconds, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.checks import check_shape
from megatron_r1z.cost.cluster import Cluster
from megatron_r1z.cost.formats import fp8_share
from megatron_r1z.cost.run_cost import RunCost
from megatron_r1z.errors import ConfigError
from megatron_r1z.layout.families import layer_tensors
from megatron_r1z.layout.known import find_shape
from megatron_r1z.layout.plan import Edge
from tests.unit.cost.runs import SHAPE, cluster, config, cost

LLAMA = find_shape("Llama-3.1-8B").shape
FP8 = {"policy": "fp8", "engine": "fp8"}


def hopper(capability: tuple[int, int] = (9, 0)) -> Cluster:
    base = cluster(nodes=2)
    return dataclasses.replace(base, gpu=dataclasses.replace(base.gpu, compute_capability=capability))


def llama(**precision: object) -> RunCost:
    parallel = {"num_ranks": 16, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    return cost(LLAMA, on=hopper(), parallel=parallel, rollout={"tensor_parallel_size": 2, "kv_cache_bytes": 1 << 33}, precision=precision)


def test_an_fp8_engine_has_one_byte_for_each_weight_of_a_matrix() -> None:
    plain, fp8 = llama(), llama(engine="fp8")
    matrices, others = plain.engine.parameters
    assert plain.engine.weights == 2 * (matrices + others)
    assert fp8.engine.weights == pytest.approx(matrices * (1 + 4 / 128**2) + 2 * others, abs=1)
    assert fp8.engine.staging == fp8.engine.weights  # vLLM's kernels have a layout of their own
    assert fp8.engine.cache_bytes_per_token == plain.engine.cache_bytes_per_token


def test_an_fp8_refit_moves_half_the_bytes_by_three_plans() -> None:
    plain, fp8 = llama(), llama(engine="fp8")
    moved = [sum(run.refit.nbytes(edge) for edge in Edge) for run in (plain, fp8)]
    embeddings = 2 * 2 * LLAMA.vocab_size * LLAMA.hidden_size * 8  # of each engine, in bf16 either way
    assert (moved[1] - embeddings) / (moved[0] - embeddings) == pytest.approx(0.5, abs=0.001)
    assert len(fp8.refit.parts) == 3
    assert fp8.refit.buffer_bytes == sum(part.buffer_bytes for part in fp8.refit.parts)
    assert fp8.time.refit < plain.time.refit


def test_matrices_that_blocks_do_not_fit_stay_in_bf16() -> None:
    shape = find_shape("Qwen2.5-72B").shape
    assert fp8_share(shape, 1, 1) == 1.0
    attention = fp8_share(shape, 8, 8)  # 29568 / 8 feed-forward columns are no multiple of 128
    matrices = [spec for spec in layer_tensors(shape) if len(spec.shape) == 2]
    expected = sum(spec.numel for spec in matrices if "self_attn" in spec.name) / sum(spec.numel for spec in matrices)
    assert attention == pytest.approx(expected)
    assert fp8_share(shape, 8, 8, bf16_layers=range(40)) == pytest.approx(expected / 2)


def test_an_engine_without_a_matrix_in_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no matrix can be cut into blocks of 128 x 128; set precision\.engine=bf16"):
        check_shape(config(precision={"engine": "fp8"}), dataclasses.replace(SHAPE, hidden_size=192))


def test_layers_that_the_policy_keeps_in_bf16_go_over_in_bf16() -> None:
    whole, most = llama(**FP8), llama(**FP8, fp8={"last_layers_bf16": 16})
    moved = [sum(run.refit.nbytes(edge) for edge in Edge) for run in (whole, most)]
    assert moved[1] > 1.2 * moved[0]


def test_the_policy_s_quantised_copies() -> None:
    plain, fp8 = llama(), llama(**FP8)
    matrices = plain.policy.parameters[0].matrices
    scaled = matrices * (1 + 4 / 128**2)
    assert fp8.policy.weights(0) - plain.policy.weights(0) == pytest.approx(2 * scaled, abs=1)
    assert fp8.policy.optimizer_state(0) == plain.policy.optimizer_state(0)
    quantised = [item.nbytes for item in fp8.ranks[0].items if item.name == "quantised for engines"]
    assert quantised == [pytest.approx(scaled, abs=1)]
    assert fp8.policy.token.whole < plain.policy.token.whole  # inputs are kept in FP8


def test_fp8_doubles_the_matrix_products_and_nothing_else() -> None:
    plain, fp8 = (run.update_time.passes() for run in (llama(), llama(**FP8)))
    assert 0.5 < fp8.compute / plain.compute < 0.7
    assert fp8.tensor_parallel == plain.tensor_parallel
    assert llama(**FP8).time.rollout.total < llama().time.rollout.total


@pytest.mark.parametrize(
    ("capability", "tflops", "precision", "sentence"),
    [
        ((8, 0), 0.0, FP8, "a test has no FP8; set precision.policy=bf16 and precision.engine=bf16."),
        ((8, 0), 0.0, {"engine": "fp8"}, "a test has no FP8"),
        ((9, 0), 2000.0, FP8 | {"fp8": {"recipe": "mxfp8"}}, "mxfp8 cannot run here: it needs compute capability 10.0 or higher"),
    ],
)
def test_a_gpu_that_cannot(capability: tuple[int, int], tflops: float, precision: dict[str, object], sentence: str) -> None:
    machine = hopper(capability)
    machine = dataclasses.replace(machine, gpu=dataclasses.replace(machine.gpu, fp8_tflops=tflops))
    with pytest.raises(ConfigError) as caught:
        check_shape(config(precision=precision), LLAMA, machine)
    assert sentence in str(caught.value)


def test_a_matrix_that_cannot() -> None:
    run = config(precision=FP8, parallel={"num_ranks": 8, "tensor_parallel_size": 8}, rollout={"kv_cache_bytes": 1 << 34})
    with pytest.raises(ConfigError, match=r"needs multiples of 128 in every matrix of a rank: linear_fc1 has 3696 rows in either half"):
        check_shape(run, find_shape("Qwen2.5-72B").shape, hopper())
    check_shape(run, find_shape("Llama-3.1-70B").shape, hopper())


# ----------------------------------------------------------------------------------------------------------------- context parallelism


def context(size: int) -> RunCost:
    return cost(parallel={"context_parallel_size": size, "micro_batch_tokens": 4096})


def test_context_parallel_ranks_share_the_tokens_of_a_micro_batch() -> None:
    assert context(4).policy.batch.tokens * 4 == context(1).policy.batch.tokens
    assert context(4).policy.kept(0) * 4 == pytest.approx(context(1).policy.kept(0), rel=1e-3)


def test_they_hold_the_same_weights_and_share_the_optimizer() -> None:
    one, four = context(1).policy, context(4).policy
    assert four.topology.dp == 2
    assert (four.weights(0), four.gradients(0), four.optimizer_state(0)) == (one.weights(0), one.gradients(0), one.optimizer_state(0))
    assert context(4).update_time.whole_gradient_sum() == context(1).update_time.whole_gradient_sum()


def test_they_share_the_arithmetic_and_pass_keys_and_values_round() -> None:
    one, four = context(1).update_time.passes(), context(4).update_time.passes()
    assert four.compute == pytest.approx(one.compute)  # a quarter of the data-parallel ranks, each four times as fast
    assert one.context_parallel == 0
    run = context(4)
    samples = run.config.algorithm.train_batch_size / 2
    keys = 2 * samples * run.lengths.total / 4 * SHAPE.num_kv_heads * SHAPE.head_dim * 2
    assert four.context_parallel == pytest.approx(SHAPE.num_layers * 3 * 3 * keys / (400e9 * DEFAULT.link_share))
