"""Make what the rehearsal of a recipe needs: a random model, a tokenizer, text, a mix and a task.

    python examples/rehearse.py llama2_7b build/rehearsal/llama2_7b/inputs

`make rehearse RECIPE=llama2_7b` then runs the recipe's own rules on them, on a CPU, before GPUs are
rented for it. The numbers mean nothing; that every rule runs, resumes and hands on to the next is
what is rehearsed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WINDOW = {"llama2_7b": 64, "mistral_7b": 64, "llama3_8b": 128}  # `original` of rehearsal.yaml
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
    """Write a model folder, text, a mix of sources and a task, as rehearsal.yaml names them."""
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
    make_task(directory / "tasks")


def make_task(tasks: Path) -> None:
    """Write a task of lm-evaluation-harness with four questions."""
    tasks.mkdir(exist_ok=True)
    questions = [
        {"question": "2 + 2 =", "choices": [" 4", " 5"], "answer": n % 2} for n in range(4)
    ]
    lines = "".join(json.dumps(item) + "\n" for item in questions)
    (tasks / "questions.jsonl").write_text(lines)
    # `datasets` looks for a relative path from where the rule runs, not from where this does.
    files = {"data_files": {"test": str(tasks.absolute() / "questions.jsonl")}}
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


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=WINDOW)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    if not (args.directory / "tasks" / "rehearsal.yaml").exists():  # written last
        make_inputs(args.directory, args.recipe)


if __name__ == "__main__":
    main()
