"""Every run of configs/ as a recipe of nemo-run, with its command line.

    .venv-launch/bin/python examples/recipes.py --factory quickstart config.optimizer.lr=1e-4 --yes
    .venv-launch/bin/python examples/recipes.py --help

The names are those of the files, with underscores: qwen2_5_7b_h100, llama3_1_70b_h100_fp8.
"""

from __future__ import annotations

import re
from pathlib import Path

import nemo_run as run

from megatron_r1z.config.yaml_tree import read_tree
from megatron_r1z.launch.recipes import recipe, start

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {re.sub(r"\W", "_", path.stem): path for path in sorted(CONFIGS.glob("*.yaml")) if "algorithm" in read_tree(path).values}
"""Name of the recipe to file of the training run."""


def register(name: str, path: Path) -> None:
    """Give nemo-run a recipe function for a run's file."""

    @run.cli.factory(target=start, name=name)
    def make() -> run.Partial:
        return recipe(path)


for name, path in FILES.items():
    register(name, path)

if __name__ == "__main__":
    run.cli.main(start)
