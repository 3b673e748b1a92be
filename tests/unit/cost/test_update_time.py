"""Seconds of an optimizer step: what is left when everything else is taken away, and what grows with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1z.cost.assumptions import DEFAULT
from megatron_r1z.cost.compute import sample_flops
from megatron_r1z.cost.formats import policy_format
from megatron_r1z.cost.run_cost import RunCost
from tests.unit.cost.runs import SHAPE, cluster, cost

TP2 = {"tensor_parallel_size": 2}


def pipeline(pp: int, vpp: int = 1, tokens: int = 512) -> RunCost:
    return cost(parallel={"pipeline_parallel_size": pp, "virtual_pipeline_size": vpp, "micro_batch_tokens": tokens})


def test_one_rank_computes_and_does_nothing_else() -> None:
    run = cost(parallel={"num_ranks": 1})
    passes, flops = run.update_time.passes(), sample_flops(SHAPE, run.lengths)
    expected = 64 * (SHAPE.num_layers * 3 * flops.layer.total + 4 * flops.head.total) / (1000e12 * DEFAULT.compute_share)
    assert passes.compute == pytest.approx(expected)
    assert passes.total == passes.compute
    assert run.update_time.gradient_sum() == 0


def test_ranks_share_the_arithmetic() -> None:
    one, two, data = cost(parallel={"num_ranks": 1}), cost(parallel={"num_ranks": 2, **TP2}), cost(parallel={"num_ranks": 2})
    compute = [item.update_time.passes().compute for item in (one, two, data)]
    assert compute[1] == pytest.approx(compute[0] / 2)
    assert compute[2] == pytest.approx(compute[0] / 2)
    assert two.update_time.passes().tensor_parallel > 0 == data.update_time.passes().tensor_parallel


def test_the_bubble_is_that_of_the_schedule() -> None:
    """And the whole of an exchange is a part of it, while the other turns of interleaved stages hide theirs."""
    for pp, vpp in ((2, 1), (4, 1), (4, 2)):
        run = pipeline(pp, vpp)
        passes, count = run.update_time.passes(), run.update_time.micro_batches
        exchange = run.update_time.logprobs().exchange
        assert (exchange == 0) == (vpp > 1)
        if vpp == 1:
            assert passes.bubble / (passes.total - passes.bubble) == pytest.approx((pp - 1) / vpp / count)
        else:
            assert passes.bubble / (passes.total - passes.bubble) > (pp - 1) / vpp / count


def test_interleaved_micro_batches_come_in_groups_of_the_pipeline_s_size() -> None:
    assert pipeline(4, 2).update_time.micro_batches % 4 == 0


def test_sequence_parallelism_gathers_again_what_it_does_not_keep() -> None:
    plain, split = (cost(parallel=TP2 | {"sequence_parallel": on}).update_time.passes().tensor_parallel for on in (False, True))
    assert split == pytest.approx(plain * 10 / 8)


def test_a_full_recomputation_is_one_more_forward_pass() -> None:
    none, full = (cost(parallel=TP2 | {"recompute": recompute}).update_time.passes() for recompute in ("none", "full"))
    logprobs = cost(parallel=TP2).update_time.logprobs()
    assert full.tensor_parallel - none.tensor_parallel == pytest.approx(logprobs.tensor_parallel)
    flops = sample_flops(SHAPE, cost().lengths)
    layers = SHAPE.num_layers * flops.layer.total
    assert (full.compute - none.compute) / logprobs.compute == pytest.approx(layers / (layers + flops.head.total))


def test_the_gradient_sum_crosses_nodes_where_a_node_is_full() -> None:
    inside = cost().update_time.whole_gradient_sum()
    across = cost(parallel={"num_ranks": 16}, on=cluster(nodes=2)).update_time.whole_gradient_sum()
    parameters = cost().policy.parameters[0].total
    assert inside == pytest.approx(parameters * 6 * 7 / 8 / (400e9 * DEFAULT.link_share))
    assert across == pytest.approx(parameters * 6 * 15 / 16 / (400e9 * DEFAULT.link_share))  # eight adapters carry the ring
    slow = cost(parallel={"num_ranks": 16, "tensor_parallel_size": 4}, on=cluster(nodes=2))
    assert slow.update_time.whole_gradient_sum() > 0


def test_an_offloaded_step_takes_the_way_to_the_host_and_its_time_there() -> None:
    inside = cost().update_time.optimizer()
    outside = cost(optimizer={"distributed": True, "offload_to_host": True}).update_time.optimizer()
    stepped = cost().policy.stepped_parameters(0)
    moved = stepped * 6 / (50e9 * DEFAULT.link_share)
    assert outside == pytest.approx(moved + stepped * 8 * DEFAULT.host_optimizer_ns * 1e-9)
    assert outside > 10 * inside


def test_one_step_needs_no_old_logprobs() -> None:
    assert cost(algorithm={"train_batch_size": 256}).time.logprobs is None
    several = cost().time.logprobs
    assert several is not None
    assert several.total > 0


def test_a_kl_term_takes_passes_and_a_copy_of_the_weights_in_the_hosts_memory() -> None:
    plain, one_step = cost(), {"train_batch_size": 256}
    assert plain.time.logprobs is not None
    for switches, passes in (({"kl_coef": 0.1}, 1), ({"kl_coef": 0.1, "kl_in": "reward"}, 2), ({"kl_in": "reward"}, 0)):
        alone, beside = cost(algorithm=switches | one_step), cost(algorithm=switches)
        assert (alone.logprob_passes, beside.logprob_passes) == (passes, passes + 1)
        assert beside.time.logprobs is not None
        assert beside.time.logprobs.total == pytest.approx((passes + 1) * plain.time.logprobs.total)
        assert alone.host_bytes == (8 * plain.policy.weights(0) if passes else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_a_critic_has_the_layers_of_the_policy_and_one_number_in_place_of_the_output_layer(tied: bool, tp: int, pp: int) -> None:
    parallel = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    shape = replace(SHAPE, tied_embeddings=tied)
    run = cost(shape, algorithm={"name": "ppo"}, parallel=parallel)
    assert run.critic is not None
    policy, critic = run.policy.parameters, run.critic.parameters
    assert [stage.matrices for stage in critic] == [stage.matrices for stage in policy]
    assert critic[:-1] == policy[:-1]
    is_shared = tied and pp == 1  # one matrix that the policy reads and multiplies by
    output_layer = 0 if is_shared else run.policy.vocab_columns * shape.hidden_size
    assert critic[-1].others == policy[-1].others - output_layer + shape.hidden_size


def test_a_critic_takes_a_pass_for_values_and_the_same_steps_without_an_output_layer() -> None:
    plain, run = cost(), cost(algorithm={"name": "ppo"})
    assert replace(run.time, critic=0.0) == plain.time
    assert plain.time.logprobs is not None
    assert run.critic is not None
    head = sample_flops(SHAPE, run.lengths).head
    form, gpu = policy_format(run.config.precision), cluster().gpu
    saved = head.times(1 + 4).seconds(form, gpu, run.assumptions.compute_share) * run.config.rollout.samples_per_iteration / 8
    passes = plain.time.logprobs.total + plain.time.passes.total - saved
    smaller = run.critic.parameters[0].total / run.policy.parameters[0].total
    assert run.time.critic == pytest.approx(passes + smaller * (plain.time.gradient_sum + plain.time.optimizer), rel=1e-3)
    assert run.time.total == pytest.approx(plain.time.total + run.time.critic)


def test_a_critic_is_always_in_memory_and_its_passes_are_not_beside_those_of_the_policy() -> None:
    plain, run = cost().fullest, cost(algorithm={"name": "ppo"}).fullest
    names = [item.name for item in run.items if item not in plain.items]
    assert names == ["critic's weights", "critic's gradients", "critic's optimizer"]
    assert [item for item in plain.items if item not in run.items] == []


def test_a_critic_of_an_offloaded_optimizer_has_its_state_in_the_hosts_memory() -> None:
    offloaded = {"optimizer": {"distributed": True, "offload_to_host": True}}
    plain, run = cost(**offloaded), cost(**offloaded, algorithm={"name": "ppo"})
    assert run.critic is not None
    assert run.host_bytes == plain.host_bytes + 8 * run.critic.host_state(0)
