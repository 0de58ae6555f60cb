"""Extend a small, real Megatron model from 256 to 8192 tokens, end to end, on a laptop.

    make quickstart                      # or: python examples/quickstart/quickstart.py
    python examples/quickstart/quickstart.py --smoke    # the same walk with hardly any work

Every stage is an ordinary `longrope` command, printed before it runs. An interrupted run goes on
where it stopped. Results: results.json, report.html and logs/ in the output directory.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from results import write_results

from megatron_longrope.recipe.stages import Stage, StageError, run_stages

HERE = Path(os.path.relpath(Path(__file__).parent))
ORIGINAL = 256  # tokens; the base model's window
PYTHON = sys.executable
LONGROPE = [PYTHON, "-m", "megatron_longrope"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]

# Megatron prints hundreds of lines; these are the ones to watch. The log has all of them.
TRAINING = r"lm loss|^> (longrope|cpu)|longrope: error|successfully (saved|loaded)|Error"
QUIET = r"^(?!.*([Ww]arning|warnings\.warn|CUDA_HOME|GPTModel IS DEPRECATED|it/s|^\s*$))"

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4
    --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 10000 --hidden-dropout 0 --attention-dropout 0
    --tokenizer-type SentencePieceTokenizer --tokenizer-model {tokenizer}
"""
OPTIMIZER = """
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --split 1000,0,0 --data-cache-path {output}/cache --log-interval 20
    --eval-iters 0 --eval-interval 1000
"""
# On a GPU without Transformer Engine.
LOCAL_GPU = """
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-rope-fusion --no-persist-layer-norm --no-create-attention-mask-in-dataloader
"""


@dataclass(frozen=True)
class Scale:
    """How much work the walk does."""

    train_steps: int
    finetune_steps: int
    lengths: tuple[int, ...]
    documents: int
    samples: int
    population: int
    children: int
    iterations: int
    passkey_trials: int


FULL = Scale(600, 100, (256, 512, 1024, 2048, 4096, 8192), 6, 10, 32, 12, 6, 5)
SMOKE = Scale(20, 4, (256, 1024, 2048, 8192), 2, 2, 6, 2, 1, 1)


class Walk:
    """The stages of the quickstart."""

    def __init__(self, output: Path, scale: Scale, seed: int) -> None:
        self.scale = scale
        self.names = {
            "output": output,
            "here": HERE,
            "text": output / "text",
            "data": output / "data",
            "tokenizer": output / "tokenizer.model",
            "base": output / "checkpoints/base",
            "finetuned": output / "checkpoints/finetuned",
            "search_2x": output / "factors/search_2x.json",
            "search_4x": output / "factors/search_4x.json",
            "search_8x": output / "factors/search_8x.json",
            "second": output / "factors/second.json",
            "final": output / "factors/final.json",
            "hf": output / "hf",
            "seed": seed,
            "longest": max(scale.lengths),
            "lengths": join(scale.lengths),
            "tuned_lengths": join(n for n in scale.lengths if n <= 8 * ORIGINAL),
            "lengths_2x": join(n for n in scale.lengths if n <= 2 * ORIGINAL),
            "lengths_4x": join(n for n in scale.lengths if 2 * ORIGINAL < n <= 4 * ORIGINAL),
            "lengths_8x": join(n for n in scale.lengths if 4 * ORIGINAL < n <= 8 * ORIGINAL),
        }

    def words(self, text: str, **more: object) -> list[str]:
        """Split a command line, then put the names in, so that paths may hold spaces."""
        return [word.format_map({**self.names, **more}) for word in text.split()]

    def longrope(self, text: str, **more: object) -> list[str]:
        """A `longrope` command."""
        return [*LONGROPE, *self.words(text, **more)]

    def path(self, text: str) -> Path:
        """A path with the names put in."""
        return Path(text.format_map(self.names))

    def stage(
        self, name: str, seconds: float, commands: list, reads="", writes="", shown=QUIET
    ) -> Stage:
        """A stage; `reads` and `writes` are paths separated by spaces."""
        return Stage(
            name,
            commands,
            outputs=[self.path(item) for item in writes.split()],
            inputs=[self.path(item) for item in reads.split()],
            shown=shown,
            expected_seconds=seconds,
            environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},  # Megatron asks for it on GPUs
        )

    def stages(self) -> list[Stage]:
        """Everything, in order."""
        return [
            self.text(),
            self.pretrain(),
            self.baselines(),
            self.search(2, 45),
            self.search(4, 85),
            self.search(8, 180),
            self.searched(),
            self.finetune(),
            self.parity(),
            self.second_search(),
            self.recovery(),
            self.evaluation(),
            self.passkey(),
            self.convert(),
            self.huggingface(),
        ]

    def text(self) -> Stage:
        """Text, tokenizer, Megatron data sets."""

        def prepare(part: str, name: str, how: str) -> list[str]:
            source = "--input {text}/{part}.jsonl --tokenizer {tokenizer}"
            target = f"--output {{data}}/{{name}} {how} --overwrite"
            return self.longrope(f"data prepare {source} {target}", part=part, name=name)

        # Each document as long as the longest window: every length then scores the same tokens.
        cut = "--min-length {longest} --max-length {longest}"

        return self.stage(
            "text",
            35,
            [
                [PYTHON, *self.words("{here}/collect_text.py --output {text}")],
                self.longrope(
                    "data tokenizer --input {text}/train.jsonl --vocab-size 2048 "
                    "--output {tokenizer} --overwrite"
                ),
                prepare("train", "train_256", "--segment-length 256 --tail pack"),
                prepare("train", "train_2k", "--segment-length 2k --tail pack"),
                prepare("search", "search", f"--whole-documents {cut}"),
                prepare("heldout", "heldout", f"--whole-documents {cut}"),
            ],
            reads="{here}/collect_text.py",
            writes="{text} {tokenizer} {data}",
            shown=r"characters|^wrote",
        )

    def pretrain(self) -> Stage:
        """A base model with a 256-token window, by Megatron's own training loop."""
        steps = self.scale.train_steps
        return self.stage(
            "pretrain",
            385,
            [
                self.train(
                    f"--data-path {{data}}/train_256 --train-iters {steps} "
                    f"--lr 3e-3 --min-lr 3e-4 --lr-warmup-iters {steps // 20 + 1} "
                    "--micro-batch-size 32 --global-batch-size 32 "
                    "--load {base} --save {base} --save-interval 200",
                    length=ORIGINAL,
                )
            ],
            reads="{data}/train_256.bin {here}/pretrain_gpt.py",
            writes="{base}",
            shown=TRAINING,
        )

    def baselines(self) -> Stage:
        """What PI, NTK and YaRN reach without training."""
        return self.stage(
            "baselines",
            110,
            [
                self.evaluate(
                    "--load {base} --baselines none,pi,ntk,yarn --attention-factor-policy su,none "
                    "--lengths {lengths} --output {output}/baselines"
                )
            ],
            reads="{base} {data}/heldout.bin",
            writes="{output}/baselines",
        )

    def search(self, times: int, seconds: float) -> Stage:
        """First search: factors for a longer window of the base model, without training."""
        name = f"search_{times}x"
        return self.stage(
            name,
            seconds,
            [
                self.evolve(
                    f"--load {{base}} --target-length {times * ORIGINAL} --output {{{name}}}",
                    self.scale.samples,
                    self.scale.iterations,
                )
            ],
            reads="{base} {data}/search.bin",
            # All journals: a search with other settings must not find an old one.
            writes=f"{{{name}}} {{output}}/factors/{name}.journal.jsonl "
            f"{{output}}/factors/{name}.journal.policy-su.jsonl "
            f"{{output}}/factors/{name}.journal.policy-none.jsonl",
        )

    def searched(self) -> Stage:
        """The winners on held-out text, still without training."""
        return self.stage(
            "searched",
            25,
            [
                self.evaluate(
                    f"--load {{base}} --longrope-config longrope_search={{search_{times}x}} "
                    f"--lengths {{lengths_{times}x}} --output {{output}}/searched"
                )
                for times in (2, 4, 8)
            ],
            reads="{base} {search_2x} {search_4x} {search_8x} {data}/heldout.bin",
            writes="{output}/searched",
        )

    def finetune(self) -> Stage:
        """Fine-tune at 2048 tokens with the found factors, context parallel over two processes."""
        return self.stage(
            "finetune",
            140,
            [
                self.train(
                    "--data-path {data}/train_2k --micro-batch-size 4 --global-batch-size 4 "
                    f"--train-iters {self.scale.finetune_steps} --lr 5e-4 --min-lr 5e-5 "
                    "--lr-warmup-iters 2 --longrope-config {search_8x} "
                    "--pretrained-checkpoint {base} --load {finetuned} --save {finetuned} "
                    "--save-interval 100",
                    length=8 * ORIGINAL,
                    cp=2,
                )
            ],
            reads="{base} {data}/train_2k.bin {search_8x}",
            writes="{finetuned}",
            shown=TRAINING,
        )

    def parity(self) -> Stage:
        """Two training steps from the same checkpoint with context parallel 1 and 2."""
        return self.stage(
            "parity",
            45,
            [
                self.train(
                    "--data-path {data}/train_2k --micro-batch-size 4 --global-batch-size 4 "
                    "--train-iters 2 --lr 5e-4 --longrope-config {search_8x} --log-interval 1 "
                    "--pretrained-checkpoint {base} --load {output}/checkpoints/none",
                    length=8 * ORIGINAL,
                    cp=cp,
                )
                for cp in (1, 2)
            ],
            reads="{base} {data}/train_2k.bin {search_8x}",
            shown=r"lm loss|longrope: error|Error",
        )

    def second_search(self) -> Stage:
        """Second search: the fine-tuned model to four times more, without further training.

        It stays under the attention factor that the model was fine-tuned with, from here on for
        every window, as transformers will have it.
        """
        return self.stage(
            "second_search",
            175,
            [
                self.evolve(
                    f"--load {{finetuned}} --base-config {{search_8x}} --attention-factor longest "
                    f"--target-length {32 * ORIGINAL} --output {{second}}",
                    min(4, self.scale.samples),
                    max(self.scale.iterations // 4, 1),
                )
            ],
            reads="{finetuned} {search_8x} {data}/search.bin",
            writes="{second} {output}/factors/second.journal.jsonl",
        )

    def recovery(self) -> Stage:
        """Recovery search: the original window of the fine-tuned model."""
        return self.stage(
            "recovery",
            50,
            [
                self.evolve(
                    f"--load {{finetuned}} --base-config {{second}} --target-length {ORIGINAL} "
                    "--output {final} --windows-per-document 8",
                    self.scale.samples,
                    max(self.scale.iterations // 2, 1),
                )
            ],
            reads="{finetuned} {second} {data}/search.bin",
            writes="{final} {output}/factors/final.journal.jsonl",
        )

    def evaluation(self) -> Stage:
        """The fine-tuned model within its window, and after the second search at every length."""
        return self.stage(
            "evaluation",
            40,
            [
                self.evaluate(
                    "--load {finetuned} --longrope-config longrope_finetuned={search_8x} "
                    "--lengths {tuned_lengths} --output {output}/finetuned"
                ),
                self.evaluate(
                    "--load {finetuned} --longrope-config longrope_second={final} "
                    "--lengths {lengths} --output {output}/finetuned"
                ),
            ],
            reads="{finetuned} {search_8x} {final} {data}/heldout.bin",
            writes="{output}/finetuned",
        )

    def passkey(self) -> Stage:
        """Retrieval at every length; a model of 1.4 million parameters is not expected to."""
        return self.stage(
            "passkey",
            20,
            [
                self.longrope(
                    "eval passkey --load {finetuned} --longrope-config longrope_second={final} "
                    "--tokenizer {tokenizer} --lengths {lengths} --trials {trials} "
                    "--output {output}/passkey",
                    trials=self.scale.passkey_trials,
                )
            ],
            reads="{finetuned} {final}",
            writes="{output}/passkey",
        )

    def convert(self) -> Stage:
        """To Hugging Face format; logits of both windows are compared before it is in place."""
        return self.stage(
            "convert",
            15,
            [
                self.longrope(
                    "convert to-hf --load {finetuned} --longrope-config {final} "
                    "--tokenizer {tokenizer} --output {hf} --overwrite"
                )
            ],
            reads="{finetuned} {final} {tokenizer}",
            writes="{hf}",
        )

    def huggingface(self) -> Stage:
        """Load the result with transformers: perplexity, and text across the window switch."""
        return self.stage(
            "huggingface",
            20,
            [
                [
                    PYTHON,
                    *self.words(
                        "{here}/try_huggingface.py --hf {hf} --load {finetuned} "
                        "--longrope-config {final} --data {data}/heldout "
                        f"--lengths {ORIGINAL},{{longest}} --num-documents 2 "
                        "--output {output}/huggingface.json"
                    ),
                ]
            ],
            reads="{hf} {here}/try_huggingface.py {data}/heldout.bin",
            writes="{output}/huggingface.json",
        )

    def train(self, text: str, *, length: int, cp: int = 1) -> list[str]:
        """A training run of pretrain_gpt.py through the launcher."""
        rendezvous = f"--nproc-per-node {cp} --rdzv-backend c10d --rdzv-endpoint localhost:0"
        parallel = [*TORCHRUN, *rendezvous.split(), "-m", "megatron_longrope"]
        window = f"--seq-length {length} --max-position-embeddings {length}"
        seed = self.names["seed"] + 1  # Megatron refuses 0
        return [
            *(LONGROPE if cp == 1 else parallel),
            *self.words("pretrain {here}/pretrain_gpt.py"),
            # The CPU, unless there is a GPU for every process.
            *(["--cpu"] if torch.cuda.device_count() < cp else LOCAL_GPU.split()),
            *self.words(f"{MODEL} {window} --context-parallel-size {cp} {OPTIMIZER}"),
            *self.words(f"--seed {seed} {text}"),
        ]

    def evaluate(self, text: str) -> list[str]:
        """Perplexity on held-out text."""
        return self.longrope(
            f"eval ppl --data {{data}}/heldout --num-documents {self.scale.documents} "
            f"--stride disjoint {text}"
        )

    def evolve(self, text: str, samples: int, iterations: int) -> list[str]:
        """A search. Start tokens stay off because Hugging Face cannot express them."""
        scale = self.scale
        attention = "" if "--base-config" in text else "--attention-factor-policy auto"
        return self.longrope(
            f"search {text} --data {{data}}/search --held-out {{data}}/heldout "
            f"--algorithm evolution --num-samples {samples} --population-size {scale.population} "
            f"--num-mutations {scale.children} --num-crossovers {scale.children} "
            f"--num-parents {scale.population // 2} --iterations {iterations} "
            f"--start-tokens 0 --seed {{seed}} --resume {attention}"
        )


def join(values) -> str:
    """A list as the command line wants it."""
    return ",".join(map(str, values))


def main() -> int:
    """Run the walk; 0 when everything was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the same walk with hardly any work")
    args = parser.parse_args()
    walk = Walk(args.output, SMOKE if args.smoke else FULL, args.seed)
    try:
        seconds = run_stages(walk.stages(), args.output)
    except StageError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    write_results(args.output, ORIGINAL, args.seed, seconds)
    subprocess.run([*LONGROPE, "report", str(args.output)], check=True)
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes in all; see {args.output}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
