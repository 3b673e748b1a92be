"""Checks that wait for a GPU (tests/gpu): what they ask of Transformer Engine is there in the release that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PRODUCTS = [[512, 768], [512, 1024], [768, 1024]]


def asked(device: str) -> dict[str, object]:
    worker = Path(__file__).with_name("gpu_checks_worker.py")
    root = worker.parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-W", "ignore", worker, device]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    assert lines, done.stderr[-3000:]
    found: dict[str, object] = json.loads(lines[-1].removeprefix("found: "))
    return found


def test_products_of_hoppers_recipes_kernel_bytes_and_scales_of_delayed() -> None:
    found = asked("H200")
    assert all(found[recipe] == PRODUCTS for recipe in ("blockwise", "tensorwise", "delayed"))
    assert found["float32"] == PRODUCTS[0]
    assert found["weight"] == [[768, 1024], [6, 8]]
    assert found["rows"] == [[512, 1024], [8, 512]]
    assert isinstance(found["states"], int)
    assert found["states"] > 0


def test_products_of_blackwells_recipe() -> None:
    assert asked("B200")["mxfp8"] == PRODUCTS
