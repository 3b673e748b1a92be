"""The page docs/invariance.md, written by `make invariance` from what `test_layouts.py` measures."""

from __future__ import annotations

from collections.abc import Mapping

Differences = Mapping[str, float]

BOUNDS = {"logprobs": 1e-5, "loss": 1e-5, "grad_norm": 1e-5, "weights": 1e-5}
"""Of every float32 row."""
HEAD = ("model", "split", "batches", "objective", "format", "log-probs, nats", "loss", "gradient norm", "weights")
INTRODUCTION = """\
# One step, whatever the layout

<!-- Written by `make invariance` from tests/loop/test_layouts.py; do not edit. -->

Every row takes the same two optimizer steps: one fixed batch of twelve samples with responses of 1 to 90 tokens, each at a temperature of
its own between 0.6 and 1.2, ratios clipped on either side, a gradient that is clipped in the first step and not in the second. The
reference is a transformers model in float64 in one process, full logits of one sample at a time, torch's AdamW; it shares no code with the
package. Adam's epsilon is 1e-6 on both sides: at 1e-8 an element whose gradient is almost 0 moves by what rounding made of it. Figures
are the largest differences over steps and tensors: absolute for the log-probs of response tokens, relative for loss, gradient norm
(before clipping) and updated weights (by the norm of the weight). Every float32 row must be within {bound:g}; a bfloat16 has 8 bits, so its
weights are rounded by up to 2**-8 = 0.004.

*Split*: tp tensor, pp pipeline, vpp virtual pipeline, cp context, dp data parallel, sp sequence parallel; selective and full recompute
activations.
*Batches*: packed into as few micro-batches as fit, or padded to the longest; small ones make several micro-batches. The head computes
all logits of a micro-batch in one tile here, except where *tiles* are so many bytes. *Objective*: the advantage is one per sample, under
ppo one per token. The rows of a model and an objective differ by the order in which float32 numbers are added, and by nothing else: there
is one denominator, known before the first forward pass ([algorithms.md](algorithms.md)).
"""


def render(rows: Mapping[str, Differences]) -> str:
    """The page; rows by the names of their cases, `model/split/batches/objective/format`."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for name, found in rows.items():
        figures = [f"{found[key]:.1e}" for key in BOUNDS]
        lines.append(f"| {' | '.join([*name.split('/'), *figures])} |")
    worst = {key: max(found[key] for name, found in rows.items() if name.endswith("fp32")) for key in BOUNDS}
    last = ", ".join(f"{title} {worst[key]:.1e}" for key, title in zip(BOUNDS, HEAD[5:], strict=True))
    return "\n".join([INTRODUCTION.format(bound=max(BOUNDS.values())), *lines, "", f"Largest of the float32 rows: {last}.", ""])
