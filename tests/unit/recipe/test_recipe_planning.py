import pytest

from megatron_longrope.lengths import parse_length
from megatron_longrope.plan import MODELS, plan_command
from megatron_longrope.plan.hardware import parse_gpu
from megatron_longrope.recipe.planning import Hardware, plan_table
from megatron_longrope.search.cost import estimate

LLAMA = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --swiglu "
    "--untie-embeddings-and-output-weights --vocab-size 32000 --hidden-dropout 0 --bf16"
)
TRAINING = f"{LLAMA} --seq-length 131072 --train-iters 400 --global-batch-size 32"
STAGES = {
    "search": {
        "run": "longrope search",
        "launch": "node",
        "args": ["--load ${output}/base --data x --target-length 128k --output ${output}/f.json",
                 "--max-evaluations 100"],
        "how": ["--dtype bfloat16 --context-parallel-size 2"],
        "writes": ["${output}/f.json"],
    },
    "train": {
        "run": "longrope pretrain script.py",
        "launch": "node",
        "args": [TRAINING],
        "how": ["--context-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
                "--use-distributed-optimizer --recompute-granularity full",
                "--recompute-method uniform --recompute-num-layers 1"],
        "reads": ["${output}/f.json"],
    },
    "convert": {"run": "longrope convert to-hf"},
}  # fmt: skip


def load(workshop, **changes):
    stages = {name: {**stage, **changes.get(name, {})} for name, stage in STAGES.items()}
    return workshop.load(
        stages,
        plan={"gpu": "a100-80", "gpus": "16"},
        launch={"node": "torchrun --nproc-per-node 8 ${module}"},
    )


def table(recipe, gpu=None, gpus=None, memory=None):
    lines = plan_table(recipe, Hardware.from_recipe(recipe, gpu, gpus, memory)).splitlines()
    return lines[0], {line.split()[0]: line for line in lines[2:]}


def test_trainings_and_searches_are_estimated_as_their_own_commands_do(workshop):
    recipe = load(workshop)
    head, rows = table(recipe)
    assert head.startswith("16 x a100-80") and set(rows) == {"stage", "search", "train"}
    training = plan_command(recipe.named("train").commands[0].words, "a100-80", 16)
    for cell in (f"{training.memory.total / 2**30:.1f} GiB", f"{training.flops:.1e}"):
        assert cell in rows["train"]
    model = MODELS["llama2-7b"]
    assert model.rotary_dim == 128

    class Shape:
        def __getattr__(self, name):
            return 32000 if name == "padded_vocab_size" else getattr(model, name)

    search = estimate(
        Shape(), target_length=parse_length("128k"), samples=5, evaluations=100,
        gpu=parse_gpu("a100-80"), context_parallel=2, replicas=8,
    )  # fmt: skip
    assert f"{search.peak_bytes / 2**30:.1f} GiB" in rows["search"]
    assert f"{search.search_flops:.1e}" in rows["search"]
    assert "100 evaluations, replicas: 8; model of train's flags" in rows["search"]


def test_flags_are_put_over_the_hardware_of_the_recipe(workshop):
    recipe = load(workshop)
    head, rows = table(recipe, gpu="h200", gpus=8, memory=10)
    assert head.startswith("8 x h200") and "NO" in rows["train"] and "NO" in rows["search"]


def test_what_cannot_be_estimated_says_why(workshop):
    recipe = load(workshop, train={"args": ["--seq-length 4096"]})
    _, rows = table(recipe)
    assert "not estimated: " in rows["train"] and "--num-layers" in rows["train"]
    assert "not estimated: " in rows["search"]
    recipe = load(workshop, search={"how": ["--context-parallel-size 3"]})
    assert "16 GPUs are no multiple" in table(recipe)[1]["search"]
    recipe = load(workshop, search={"args": ["--no-such-flag"]})
    assert "not estimated: its flags are not those of longrope search" in table(recipe)[1]["search"]


def test_without_a_training_stage_a_search_says_that_the_shape_is_unknown(workshop):
    _, rows = table(workshop.load({"search": {**STAGES["search"], "launch": "process"}}))
    assert "is not there yet, and no stage's flags say the model's shape" in rows["search"]


def test_a_command_that_is_no_torchrun_takes_one_gpu(workshop):
    _, rows = table(load(workshop, search={"launch": "process", "how": []}))
    assert "replicas: 1" in rows["search"]


def test_numbers_of_the_recipes_plan_must_be_numbers(workshop):
    recipe = workshop.load({"a": {"run": "true"}}, plan={"gpus": "many"})
    with pytest.raises(ValueError, match="gpus is a whole number"):
        Hardware.from_recipe(recipe, None, None, None)
    with pytest.raises(ValueError, match="GPU 'abacus' is unknown"):
        plan_table(recipe, Hardware("abacus", 8, None))
