"""Walk through a recipe with a toy model on a CPU, before GPUs are rented for it.

    python examples/rehearse.py llama2_7b       # or mistral_7b, llama3_8b; minutes
    python examples/rehearse.py llama2_7b --jobs 2

Makes a random model of two layers, a tokenizer, and text from the Python standard library,
build/rehearsal/inputs, and runs the recipe's own stages on them with its profile `rehearsal`. The
numbers mean nothing; that every stage runs, resumes and hands on to the next is what is rehearsed.
Its short benchmarks need lm-evaluation-harness: pip install -e ".[eval]".
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONGROPE = [sys.executable, "-m", "megatron_longrope"]
RECIPES = ("llama2_7b", "mistral_7b", "llama3_8b")
WINDOW = {"llama2_7b": 64, "mistral_7b": 64, "llama3_8b": 128}  # `original` of the profile
VOCABULARY = 512
SHORT = 150  # characters
QUESTION = {
    "task": "rehearsal",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def make_inputs(directory: Path, recipe: str) -> None:
    """A model folder, text, a mix of sources and a task, as the profile expects them."""
    text = directory / "text"
    collect = HERE / "quickstart" / "collect_text.py"
    subprocess.run([sys.executable, str(collect), "--output", str(text)], check=True)
    make_model(directory / "hf", text / "train.jsonl", recipe)
    with (
        (text / "train.jsonl").open(encoding="utf-8") as lines,
        (text / "short.jsonl").open("w", encoding="utf-8") as short,
    ):
        for line in lines:  # beginnings, of some dozen tokens: documents of the original window
            short.write(json.dumps({"text": json.loads(line)["text"][:SHORT]}) + "\n")
    mix = {name: {"paths": [f"text/{name}.jsonl"]} for name in ("train", "short")}
    (directory / "mix.json").write_text(json.dumps(mix))
    tasks = directory / "tasks"
    tasks.mkdir(exist_ok=True)
    questions = [
        {"question": "2 + 2 =", "choices": [" 4", " 5"], "answer": n % 2} for n in range(4)
    ]
    lines = "".join(json.dumps(item) + "\n" for item in questions)
    (tasks / "questions.jsonl").write_text(lines)
    files = {"data_files": {"test": str(tasks / "questions.jsonl")}}
    # JSON is YAML.
    (tasks / "rehearsal.yaml").write_text(json.dumps({**QUESTION, "dataset_kwargs": files}))


def make_model(directory: Path, text: Path, recipe: str) -> None:
    """A random Llama or Mistral with a byte-level tokenizer trained on the text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
    )

    bpe = ByteLevelBPETokenizer()
    with text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False)]
    bpe.train_from_iterator(documents, VOCABULARY, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(directory)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": WINDOW[recipe],
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    if recipe == "mistral_7b":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(directory)


def main() -> int:
    """Make what is missing and run the recipe; further flags go to `longrope recipe run`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--output", type=Path, help="default: build/rehearsal/RECIPE")
    args, further = parser.parse_known_args()
    output = args.output or Path("build/rehearsal") / args.recipe
    inputs = output / "inputs"
    if not (inputs / "tasks" / "rehearsal.yaml").exists():  # written last
        make_inputs(inputs, args.recipe)
    command = ["recipe", "run", str(HERE / args.recipe / "recipe.yaml"), "--profile", "rehearsal"]
    return subprocess.run([*LONGROPE, *command, "--output", str(output), *further]).returncode


if __name__ == "__main__":
    sys.exit(main())
