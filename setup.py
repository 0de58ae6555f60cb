"""Package metadata; tool configuration lives in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "megatron_longrope" / "__init__.py").read_text()
).group(1)
# What runs the recipes of examples/, here and on a cluster.
RECIPES = ["snakemake>=9", "snakemake-executor-plugin-slurm>=2"]

setup(
    name="megatron-longrope",
    version=VERSION,
    description="LongRoPE context extension as a plugin for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_longrope", "megatron_longrope.*"]),
    package_data={"megatron_longrope.published": ["*.json"], "megatron_longrope.report": ["*.j2"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core[training]>=0.17",
        "transformers>=4.57",
        "safetensors",
        "numpy",
        "nltk",
        "sentencepiece>=0.2.3",
        "cma>=4.0",
        "scipy>=1.12",
        "matplotlib",
        "jinja2",
        "tqdm",
        "pyyaml",
        "pybind11",  # a checkout of Megatron-LM compiles its dataset helpers with it
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "flash": ["flash-attn"],
        "eval": ["lm-eval>=0.4.13"],
        "data": ["zstandard", "pyarrow", "datasets"],
        "gguf": ["gguf"],
        "tensorboard": ["tensorboard"],
        "recipes": RECIPES,
        "dev": [
            *RECIPES,
            "tensorboard",
            "lm-eval>=0.4.13",
            "accelerate",
            "einops",
            "filelock",
            "zstandard",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "mpmath",
            "ruff",
        ],
    },
    entry_points={"console_scripts": ["longrope = megatron_longrope.cli:main"]},
)
