"""Package metadata; tool configuration lives in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "megatron_longrope" / "__init__.py").read_text()
).group(1)
# What runs the recipes of examples/, here and on a cluster. Snakemake 9.10 to 9.18 start more jobs
# than cores and `resources` allow, once a rule has run by itself.
RECIPES = ["snakemake>=9.19", "snakemake-executor-plugin-slurm>=2"]
# What Megatron's own training loop imports on demand. A checkout of Megatron-LM brings it, in the
# versions that it wants: megatron-core 0.17's extra takes no transformers above 5.3, and as a
# requirement of ours would replace a newer one.
TRAINING = ["megatron-core[training]>=0.17"]

setup(
    name="megatron-longrope",
    version=VERSION,
    description="LongRoPE context extension as a plugin for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",  # that of megatron-core from 0.17 on
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["megatron_longrope", "megatron_longrope.*"]),
    package_data={
        "megatron_longrope": ["py.typed"],
        "megatron_longrope.published": ["*.json"],
        "megatron_longrope.report": ["*.j2"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.17",
        "transformers>=4.57",
        "safetensors",
        "numpy",
        "filelock>=3.21",  # since then a lock may be removed with its folder
        "nltk",
        "sentencepiece>=0.2.3",
        "cma>=4.0",
        "scipy>=1.12",
        "matplotlib",
        "jinja2",
        "tqdm",
        "pyyaml",
        "shtab",  # longrope --print-completion
        "pybind11",  # a checkout of Megatron-LM compiles its dataset helpers with it
    ],
    # docs/install.md says what each unlocks.
    extras_require={
        "training": TRAINING,
        "te": ["transformer-engine[pytorch]"],
        "flash": ["flash-attn"],
        "eval": ["lm-eval>=0.4.13", "wonderwords>=3"],
        "data": ["zstandard", "pyarrow", "datasets"],
        "gguf": ["gguf"],
        "docs": ["mkdocs-material"],
        "recipes": RECIPES,
        "dev": [
            *RECIPES,
            *TRAINING,
            "tensorboard",
            "lm-eval>=0.4.13",
            "wonderwords>=3",
            "accelerate",
            "einops",
            "zstandard",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "mpmath",
            "mypy",
            "ruff",
        ],
    },
    entry_points={"console_scripts": ["longrope = megatron_longrope.cli:main"]},
)
