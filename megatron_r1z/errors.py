"""The exceptions of this package.

R1ZError                 anything we raise on purpose; its text is one sentence that says what to do next
├── UsageError           the user can put it right: exit status 2, raised before any rank starts
│   ├── ConfigError      an unknown key, a value out of range, a combination that cannot work
│   ├── DataError        a question file, a corpus or a model folder that cannot be used
│   └── MissingExtraError  a library of another extra of setup.py is needed
├── EngineError          the rollout engine cannot serve: wrong version of the weights, or it died
├── LaunchError          an executor did not take a job, or the job failed
├── TrainingError        training came to nothing: exit status 3, by which a launcher knows that another start would end alike
├── JudgeError           the language model that reads responses does not answer
├── ExportError          weights could not be written, or do not read back as they were written
└── RefitError           the hand-over of weights to the engine did not end in the right weights
"""

from __future__ import annotations

from typing import ClassVar


class Interrupted(Exception):  # noqa: N818 - not an error: what was begun is dropped because the run was asked to stop
    """A phase was given up on this rank; whoever began it asks the other ranks whether they were asked to stop too."""


class R1ZError(Exception):
    """Anything this package raises on purpose."""

    status: ClassVar[int] = 1
    """Exit status of a command that ends with it."""


class UsageError(R1ZError):
    """A mistake that the user can put right; the command ends with exit status 2."""

    status = 2


class ConfigError(UsageError):
    """The configuration cannot work."""


class DataError(UsageError):
    """A file that the run needs is missing, empty or malformed."""


class MissingExtraError(UsageError):
    """A library is missing or has the wrong version."""

    @classmethod
    def of(cls, module: str) -> MissingExtraError:
        """For a module that cannot be imported, with what to install."""
        if module.split(".")[0] in ("nemo_run", "leptonai"):
            return cls(
                f"{module} is not in this environment, which it cannot share with vLLM; run `make launch-env` and use "
                ".venv-launch/bin/megatron-r1z launch, or: pip install 'megatron-r1z[launch]' in an environment of its own."
            )
        return cls(
            f"{module} is not installed; run `make env`, or install the package with its extra: pip install 'megatron-r1z[cpu]' "
            "on a machine without a GPU, 'megatron-r1z[gpu]' with one."
        )


class EngineError(R1ZError):
    """The rollout engine cannot serve."""


class TrainingError(R1ZError):
    """Too many optimizer steps in a row were skipped, or weights are not finite; the checkpoints are as they were."""

    status = 3


class LaunchError(R1ZError):
    """A job could not be started or did not succeed."""


class JudgeError(R1ZError):
    """The language model that reads responses does not answer; its verdicts so far are kept."""


class ExportError(R1ZError):
    """Weights could not be written; what was there before is still there."""


class RefitError(R1ZError):
    """A refit failed; the engine must not generate."""
