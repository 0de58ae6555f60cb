"""The same fine-tuning in any parallel layout, and how far apart two training curves are.

A model that was pre-trained on the Python standard library is fine-tuned on 8 times its window, by
`longrope pretrain` and Megatron's own loop. Tests and the benchmark of the training curves share
this module.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import launching
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from train_tokenizer import train_sentencepiece

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.methods import yarn_factors

HEAD_DIM = 16
STEPS, SAVED_AT = 50, 25
STAGE_STEPS = 25
"""Steps of each stage of the progressive walk."""

# Few enough segments that the fine-tuning passes them more than once.
_TEXT_FILES, _LARGEST_FILE = 10, 40_000
_MODEL = (
    f"--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads {64 // HEAD_DIM} "
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope "
    "--rotary-base 10000 --hidden-dropout 0 --attention-dropout 0 "
    "--tokenizer-type SentencePieceTokenizer --split 1000,0,0 --eval-iters 0 --eval-interval 1000 "
    "--log-interval 1 --log-params-norm --tensorboard-log-interval 1 --seed 7 "
    "--weight-decay 0.1 --adam-beta2 0.95 --lr-decay-style cosine"
)
_PRETRAINING = (
    "--micro-batch-size 64 --global-batch-size 64 --train-iters 40 --lr 3e-3 --clip-grad 1.0 "
    "--save-interval 40"
)
# The gradient is clipped in most of the steps.
_FINETUNING = (
    "--micro-batch-size 2 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 5 "
    "--clip-grad 0.5"
)


@dataclass(frozen=True)
class Layout:
    """How many processes train, and the flags that say how they share the work."""

    processes: int = 1
    flags: str = ""


ONE = Layout()
LAYOUTS = {
    "CP2": Layout(2, "--context-parallel-size 2"),
    "TP2": Layout(2, "--tensor-model-parallel-size 2"),
    "DP2": Layout(2),
    "CP4": Layout(4, "--context-parallel-size 4"),
    "CP2 x DP2": Layout(4, "--context-parallel-size 2"),
    "CP2 x DP2, loss per token": Layout(4, "--context-parallel-size 2 --calculate-per-token-loss"),
    "CP2 x TP2": Layout(4, "--context-parallel-size 2 --tensor-model-parallel-size 2"),
    "CP2 x PP2": Layout(4, "--context-parallel-size 2 --pipeline-model-parallel-size 2"),
    "DP2 x TP2": Layout(4, "--tensor-model-parallel-size 2"),
    "CP2, chunked loss": Layout(2, "--context-parallel-size 2 --longrope-chunked-loss 300"),
    "CP2, recomputation": Layout(
        2,
        "--context-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
}
"""By name; data-parallel ranks are what is left of the processes."""


TAGS = {"loss": "lm loss", "gradient norm": "grad-norm", "parameter norm": "params-norm"}
"""Quantities of a curve, with Megatron's names: before clipping, and after the step."""


@dataclass(frozen=True)
class Curve:
    """What Megatron logged after each step, in fp32: quantity -> step -> value."""

    values: Mapping[str, Mapping[int, float]]

    @classmethod
    def read(cls, directory: Path) -> Curve:
        """Of a run's TensorBoard files; a step that was run twice has its later value."""
        values: dict[str, dict[int, float]] = {name: {} for name in TAGS}
        for path in sorted(directory.glob("events.*")):
            events = EventAccumulator(str(path), {SCALARS: 0}).Reload()
            for name, tag in TAGS.items():
                if tag in events.Tags()[SCALARS]:  # a killed run may leave an empty file
                    values[name] |= {event.step: event.value for event in events.Scalars(tag)}
        return cls(values)

    @property
    def steps(self) -> list[int]:
        """Steps that were logged, ascending."""
        return sorted(self.values["loss"])

    def differences(self, reference: Curve) -> dict[str, list[float]]:
        """Relative difference from the reference at each of this curve's steps, by quantity."""
        return {
            name: [abs(series[at] / reference.values[name][at] - 1) for at in self.steps]
            for name, series in self.values.items()
        }

    def largest_differences(self, reference: Curve) -> dict[str, float]:
        """The largest of :meth:`differences` over the steps, by quantity."""
        return {name: max(series) for name, series in self.differences(reference).items()}


@dataclass
class Trainer:
    """Text, tokenizer, data, factors and the base checkpoint in one directory, and runs on them."""

    directory: Path
    window: int = 32
    """Tokens that the base model is pre-trained on."""

    steps: int = STEPS
    """Of a whole run."""

    saved_at: int = SAVED_AT
    """Step of a run's first checkpoint."""

    logs: dict[str, str] = field(default_factory=dict)
    """What each run printed, by its name."""

    def prepare(self) -> None:
        """Everything that runs start from."""
        here = self.directory
        text = here / "text"
        text.mkdir(parents=True)
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        chosen = [path for path in library if 2_000 < path.stat().st_size < _LARGEST_FILE]
        for path in chosen[:_TEXT_FILES]:
            (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
        texts = [path.read_text(encoding="utf-8") for path in sorted(text.iterdir())]
        train_sentencepiece(texts, self.tokenizer, 512)
        for times in (1, 4, 8):
            length = times * self.window
            command = ["--input", str(text), "--tokenizer", str(self.tokenizer), "--tail", "pack"]
            command += ["--segment-length", str(length), "--output", str(here / f"data_{length}")]
            assert main(["data", "prepare", *command]) == 0
            if times > 1:
                factors_for(self.window, times).save(here / f"factors_{times}x.json")
        command = self._flags("base", 1, ONE, _PRETRAINING, "--save", str(self.base))
        launching.train([command], here / "base-log")

    @property
    def tokenizer(self) -> Path:
        """The sentencepiece model."""
        return self.directory / "tokenizer.model"

    @property
    def base(self) -> Path:
        """Checkpoint of the pre-trained model, written by one process."""
        return self.directory / "base"

    def checkpoint(self, name: str) -> Path:
        """Of a run."""
        return self.directory / "checkpoints" / name

    def command(
        self,
        name: str,
        layout: Layout = ONE,
        *flags: str,
        times: int = 8,
        steps: int | None = None,
        start: Path | None = None,
    ) -> launching.Command:
        """The command of a run, which goes on from its own checkpoint where there is one.

        Args:
            name (str): Of the run: of its checkpoint, its log and its curve.
            layout (Layout): How processes share the work. Defaults to one process.
            flags (str): More of Megatron's and the plugin's flags.
            times (int): Length and factors, in windows of the base model: 4 or 8.
            steps (int, optional): Of the whole run. Defaults to those of the trainer.
            start (Path, optional): Weights to begin with. Defaults to the base checkpoint.
        """
        save, start = str(self.checkpoint(name)), str(start or self.base)
        options = f"{_FINETUNING} --train-iters {steps or self.steps}"
        options += f" --save-interval {self.saved_at}"
        files = ["--pretrained-checkpoint", start, "--load", save, "--save", save]
        factors = ["--longrope-config", str(self.directory / f"factors_{times}x.json")]
        return self._flags(name, times, layout, options, *files, *factors, *flags)

    def is_done(self, name: str, steps: int | None = None) -> bool:
        """Whether the run has logged its last step."""
        return self.curve(name).steps[-1:] == [steps or self.steps]

    def forget(self, name: str) -> None:
        """Remove what the run left behind."""
        for part in ("checkpoints", "curves", "logs"):
            shutil.rmtree(self.directory / part / name, ignore_errors=True)

    def run(self, name: str, layout: Layout = ONE, *flags: str, **options) -> Curve:
        """Run to the end; see :meth:`command`."""
        command = self.command(name, layout, *flags, **options)
        self.logs[name] = launching.train([command], self.directory / "logs" / name).log
        return self.curve(name)

    def go_on(self, name: str, layout: Layout, begun: str) -> Curve:
        """Steps after `saved_at` of the run `begun` in another layout, from its checkpoint."""
        # The last of two equal flags counts.
        flags = ("--load", str(self.checkpoint(begun)), "--ckpt-step", str(self.saved_at))
        return self.run(name, layout, *flags)

    def first_stage(self, name: str, layout: Layout = ONE) -> Curve:
        """The progressive walk up to 4 windows."""
        return self.run(name, layout, times=4, steps=STAGE_STEPS)

    def second_stage(self, name: str, layout: Layout, first: str) -> Curve:
        """On to 8 windows with other factors, from the weights of the run `first`."""
        flags, start = ("--longrope-replace-factors",), self.checkpoint(first)
        return self.run(name, layout, *flags, steps=STAGE_STEPS, start=start)

    def kill_after_save(self, name: str, layout: Layout = ONE) -> None:
        """Start a run and kill -9 all its processes two steps after its first save."""
        directory = self.directory / "logs" / f"{name}-killed"
        directory.mkdir(parents=True, exist_ok=True)
        path, reached = directory / "log.txt", f" iteration {self.saved_at + 2:8d}/"
        with path.open("w") as log:
            ranks = launching.Ranks(self.command(name, layout), directory, log, log)
            while reached not in path.read_text():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks.wait(0.02)
                    break
            ranks.kill()
            status = ranks.wait(launching.TIMEOUT_S)
        assert status == (1 if layout.processes > 1 else -signal.SIGKILL)
        assert not self.is_done(name), path.read_text()[-3000:]

    def curve(self, name: str) -> Curve:
        """What the runs of that name logged."""
        return Curve.read(self.directory / "curves" / name)

    def _flags(
        self, name: str, times: int, layout: Layout, options: str, *flags: str
    ) -> launching.Command:
        length = str(times * self.window)
        arguments = [
            *shlex.split(f"{_MODEL} {options} {layout.flags}"),
            *("--seq-length", length, "--max-position-embeddings", length),
            *("--tokenizer-model", str(self.tokenizer)),
            *("--data-path", str(self.directory / f"data_{length}")),
            *("--data-cache-path", str(self.directory / "cache")),
            *("--tensorboard-dir", str(self.directory / "curves" / name)),
            *flags,
        ]
        return launching.pretrain_command(arguments, processes=layout.processes)


def factors_for(window: int, times: int) -> LongRopeConfig:
    """The original window, and YaRN's factors for a longer one with four start tokens."""
    stretched = tuple(yarn_factors(HEAD_DIM, float(times), 10000.0, window))
    sets = (
        FactorSet(window, (1.0,) * (HEAD_DIM // 2)),
        FactorSet(times * window, stretched, num_start_tokens=4),
    )
    return LongRopeConfig(10000.0, HEAD_DIM, window, sets)
