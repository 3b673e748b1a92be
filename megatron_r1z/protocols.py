"""The doors between the loop and its parts: small, so that a fake stands beside each real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_r1z.types import GradedGroup, Group, Prompt, VerdictKind

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
Stop = str | int
"""What ends a response: a string in its text, or the id of a token that the text leaves out."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one call of the engine samples; `seed` and the prompt decide the tokens, not the rank or the order of calls."""

    num_samples: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[Stop, ...]
    seed: int


class Sampler(Protocol):
    """Generates responses."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int) -> list[Group]:
        """Sample for this engine's share of `prompts`; return the groups for which this rank answers.

        Over all ranks every prompt is answered for once; `group_id` is the index into `prompts`.

        Raises:
            Interrupted: this rank, or one that its engine spans, was asked to stop; nothing of the call is left in the engine.
            EngineError: the engine does not hold weights that were accepted as `policy_version`.
        """
        ...


class Engine(Sampler, Protocol):
    """A sampler whose weights can be written; one engine spans `tensor_parallel_size` consecutive ranks."""

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters of this rank's shard that a refit writes, by the names of the engine's layout."""
        ...

    def receive(self, write: Callable[[Mapping[str, Tensor]], Result]) -> Result:
        """Let `write` fill the parameters; from here on the engine refuses to generate until the weights are accepted."""
        ...

    def receive_whole(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """As `receive`, for whole tensors by checkpoint name, which the engine cuts itself."""
        ...

    def accept(self, policy_version: int) -> None:
        """Take the weights just received as those of `policy_version`, and forget what was computed from older ones (the prefix cache)."""
        ...

    def close(self) -> None:
        """End the engine; all ranks call this once, at the end of a run that did not fail."""
        ...


class Grader(Protocol):
    """Turns groups into graded groups, keeping their order."""

    @property
    def finds_answers(self) -> bool:
        """Whether verdicts come with the answer that was found in the response."""
        ...

    def grade(self, groups: Sequence[Group]) -> list[GradedGroup]:
        """One verdict per response; never hangs, never raises for what a response contains.

        Raises:
            Interrupted: this rank was asked to stop.
        """
        ...

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], VerdictKind]:
        """The verdict on each pair of an answer and another; never hangs, never raises for what they contain.

        Raises:
            Interrupted: this rank was asked to stop.
        """
        ...

    def close(self) -> None:
        """End the worker processes."""
        ...
