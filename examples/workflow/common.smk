# What the Snakefiles share: paths, and the shell of their rules.
import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from megatron_longrope.conversion.companions import GENERATION_CONFIG, TOKENIZER_FILES
from megatron_longrope.lengths import parse_length

EXAMPLES = Path(workflow.current_basedir).parent
# Jobs read this file again, from the working directory: they have the first one's word.
STARTED_IN = Path(os.environ.setdefault("LONGROPE_STARTED_IN", os.getcwd()))
# Results of rules are checked by Snakemake; that their processes end with it is up to this shell.
shell.executable(str(EXAMPLES / "workflow/shell"))
# Where they find `longrope`, `python` and `torchrun`: beside this Python, unless told otherwise.
os.environ.setdefault("LONGROPE_BIN", str(Path(sys.executable).parent))


def given(path):
    """A path of the configuration, which counts from where Snakemake was started."""
    planning = config.get("planning", {})  # of plan.py
    found = STARTED_IN / Path(str(path).format(output=planning.get("output", config["output"]))).expanduser()
    if planning and not found.exists():
        # An empty folder stands in for what is not there yet.
        found = Path(f"{planning['missing']}{found}")
        found.mkdir(parents=True, exist_ok=True)
    return str(found)


# Inputs are files of a model's folder: its own time changes with a README, and not when a file is overwritten.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (*TOKENIZER_FILES, "spiece.model", GENERATION_CONFIG)  # the last has ids that end a text


def model_files(folder, patterns):
    """config.json and those of the named files that a model's folder has; the folder without any."""
    if "planning" in config:
        return [folder]  # it may be a stand-in
    found = (path for pattern in ("config.json", *patterns) for path in Path(folder).glob(pattern))
    return sorted(str(path) for path in found if path.is_file()) or [folder]


def words(*blocks):
    """Flags as one text: a block is a text, or a list with a comment at each line."""
    return " ".join(" ".join([block] if isinstance(block, str) else block) for block in blocks)


def factor_files(names):
    """Factor files by their names."""
    return [f"factors/{name}.json" for name in names]


def given_factors(names):
    """`--longrope-config` for each; the name is the label of the records."""
    return " ".join(f"--longrope-config {name}=factors/{name}.json" for name in names)


# Of every rule that takes all GPUs. Not the resource `gpu` of the Slurm executor: it would ask for the GPUs of
# all nodes in a step on the first one.
GPUS = {
    "machine": 1,
    "nodes": config.get("nodes", 1),
    "tasks": config.get("nodes", 1),
    "gpus_per_node": config.get("gpus", 0),
}
if GPUS["gpus_per_node"]:
    GPUS["slurm_extra"] = f"--gpus-per-node={GPUS['gpus_per_node']}"
# What on_gpus of functions.sh is told: how many nodes it must find, and how long before a time limit it stops.
os.environ["LONGROPE_NODES"] = str(GPUS["nodes"])
os.environ["STOP_SECONDS"] = str(config.get("stop_seconds", 1800))


# What training computes again in its backward pass instead of keeping it.
RECOMPUTE = {
    "none": "",
    # MLPs: the most memory for the fewest FLOPs.
    "mlp": "--recompute-granularity selective --recompute-modules mlp",
    # Whole layers, of which only the inputs are kept: a third more FLOPs.
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


def recompute(choice):
    """Flags of a choice in the settings."""
    if choice not in RECOMPUTE:
        raise WorkflowError(f"recompute is {choice!r}; choose among {', '.join(RECOMPUTE)}")
    return RECOMPUTE[choice]


wildcard_constraints:
    window=r"\d+[kKmM]?",


# All that is written lies in this folder, Snakemake's own state included.
workdir: STARTED_IN / config["output"]


# `snakemake plan`: what the trainings and searches would take.
rule plan:
    localrule: True
    params:
        snakefile=workflow.main_snakefile,
        config=lambda wildcards: json.dumps(config),  # a setting may hold {output}
    shell:
        "cd {STARTED_IN:q} && python {EXAMPLES:q}/workflow/plan.py {params.snakefile:q} {params.config:q}"


# `snakemake preflight`: what would stop the recipe late.
rule preflight:
    localrule: True
    params:
        snakefile=workflow.main_snakefile,
        config=lambda wildcards: json.dumps(config),  # a setting may hold {output}
    shell:
        "cd {STARTED_IN:q} && python {EXAMPLES:q}/workflow/preflight.py {params.snakefile:q} {params.config:q}"
