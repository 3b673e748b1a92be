"""Accuracy and length of each evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch.distributed as dist

from megatron_r1z import ranks
from megatron_r1z.evaluate import evaluate_sets
from megatron_r1z.prompts import PromptSet
from megatron_r1z.protocols import Sampling
from megatron_r1z.types import FinishReason, GradedGroup, Group, Prompt, Response, Verdict, VerdictKind

SAMPLING = Sampling(2, 8, 0.0, 1.0, -1, (), 0)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Script:
    """Engine and grader in one: answers `place` tokens to the prompt at `place`, for as many rewards as the prompt's answers name."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        assert sampling is SAMPLING
        return [
            Group(place, prompt, tuple(Response("", (1,) * place, (0.0,) * place, FinishReason.STOP, 0) for _ in prompt.answers))
            for place, prompt in enumerate(prompts, start=1)
        ]

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        return [
            GradedGroup(item, tuple(Verdict(VerdictKind.CORRECT, float(answer), None) for answer in item.prompt.answers)) for item in groups
        ]


def make_set(name: str, *rewards: tuple[str, ...]) -> PromptSet:
    return PromptSet(name, [Prompt(f"{name}/{index}", "?", (1,), row, name) for index, row in enumerate(rewards)], 1.0, 0)


def test_each_set_has_the_share_of_full_rewards_and_the_mean_length() -> None:
    sets = [make_set("a", ("1", "0"), ("1", "1")), make_set("b", ("0", "0.5"))]
    script = Script()
    found = evaluate_sets(sets, script, script, SAMPLING)  # type: ignore[arg-type]
    assert found == {
        "evaluation/a_accuracy": 3 / 4,
        "evaluation/a_length_tokens": 1.5,
        "evaluation/b_accuracy": 0.0,
        "evaluation/b_length_tokens": 1.0,
    }


def test_messages_of_one_rank() -> None:
    assert ranks.gather([3, 1, 2]) == [3, 1, 2]
    assert ranks.gather([]) == []
    assert ranks.any_rank(True) is True
    assert ranks.any_rank(False) is False
