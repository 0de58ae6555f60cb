"""Options of a search."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron_longrope.lengths import parse_length
from megatron_longrope.options import (
    Loading,
    OneModel,
    Options,
    bos_flag,
    flag,
    parse_positive,
    refuse_idle,
)

if TYPE_CHECKING:
    from megatron_longrope.factor_search.cma import CmaParameters
    from megatron_longrope.factor_search.evolution import EvolutionParameters

_HALVED_FROM = 512 * 1024  # tokens; section 4.1 of the paper


@dataclass(frozen=True, kw_only=True)
class _InputsAndOutputs(Options):
    attention: str = flag("auto", choices=("auto", "sdpa", "flash"))
    """kernels: a flash-attention package or torch SDPA (default: auto, flash where one can run,
    else sdpa; `longrope doctor` says which)"""
    data: str = flag(metavar="PREFIX")
    """search documents (longrope data prepare)"""
    bos: int | None = bos_flag()

    target_length: int = flag(type=parse_length, metavar="N")
    """window in tokens"""
    output: str = flag(metavar="F.json")
    """LongRoPE config to write"""
    base_config: str | None = flag(None, metavar="F.json")
    """factors of the fine-tuned model (default: those that the model carries; `none` leaves them
    out; a model that scales RoPE itself keeps that)"""
    original_length: int | None = flag(None, type=parse_length, metavar="N")
    """pre-trained window in tokens (default: the model's)"""
    held_out: str | None = flag(None, metavar="PREFIX")
    """other documents, to compare the winner on at the end"""
    no_figures: bool = flag(False)
    """write no PNG and CSV files"""


@dataclass(frozen=True, kw_only=True)
class _Objective(Options):
    GROUP: ClassVar = "objective"

    objective: str = flag("ppl", choices=("ppl", "needle", "joint"))
    """ppl: perplexity of all tokens. needle: of a hidden number's tokens when it is asked for at
    the end (LongRoPE2). joint: the loss of the document's tokens plus --needle-weight x that of the
    number's, from one pass. The latter two need --tokenizer"""
    needle_weight: float = flag(0.1, type=float, metavar="W")
    """of the number's loss in the joint objective"""
    num_samples: int = flag(5, type=parse_positive, metavar="K")
    """documents per evaluation"""
    windows_per_document: int = flag(1, type=parse_positive, metavar="W")
    """consecutive windows per document; useful for short windows"""
    tokenizer: str | None = flag(None, metavar="T")
    """the data's tokenizer, to hide numbers in it (default, for the closing table only: where the
    data's manifest says)"""
    needle_depths: str | None = flag(None, type=str, metavar="LIST")
    """where needles stand, from 0 (start; all of them in the LongRoPE2 paper) to 1, for example
    0,0.5,1 (default: evenly spread over the documents)"""
    tokens_per_forward: int = flag(8192, type=parse_length, metavar="N")
    """shorter samples share a forward pass up to so many tokens (default: 8k)"""
    retrieval_trials: int = flag(3, type=int, metavar="N")
    """numbers that the winner and the references (PI, NTK, YaRN, ...) are asked for at the end (0:
    none). A winner that finds fewer than the best reference, or as many at a loss more than 0.2
    nats per token higher, is replaced by the best one that does not"""
    accept_worse_retrieval: bool = flag(False)
    """write the winner even if it retrieves worse"""


@dataclass(frozen=True, kw_only=True)
class _Space(Options):
    GROUP: ClassVar = "space"

    space: str = flag("floored", choices=("floored", "full", "critical"))
    """full: every factor in [1, 1.25 s], s = target length / window (LongRoPE). floored: the same,
    but at least s from the critical dimension on, the first that completes no period in the trained
    window; smaller factors hardly change perplexity but break retrieval. critical: factors in
    [s, 2 s] from the critical dimension up, NTK below (LongRoPE2)"""
    critical_dimension: int | None = flag(None, type=int, metavar="I")
    """fix it, as an index of frequencies (default: floored: by the trained window; critical:
    searched)"""
    start_tokens: str | None = flag(None, type=str, metavar="LIST")
    """numbers of start tokens to try, for example 0,1,2,4, or `paper` for its fourteen; export to
    Hugging Face needs 0 (default: the base's, 0 for plain RoPE)"""
    upper: float | None = flag(None, type=float)
    """largest factor (default: 1.25 s, critical: 2 s, recovery: max(3, 1 + s) or the largest
    of the base's sets)"""


@dataclass(frozen=True, kw_only=True)
class _Algorithm(Options):
    GROUP: ClassVar = "algorithm"

    algorithm: str = flag("cma", choices=("cma", "evolution"))
    """cma: CMA-ES with start tokens by successive halving and a coordinate polish. evolution:
    algorithm 1 of the paper with its numbers"""
    max_evaluations: int | None = flag(None, type=int, metavar="K")
    """stop after so many candidates (default: cma 336, evolution 1344; half at 512k and above)"""
    patience: int | None = flag(None, type=int, metavar="K")
    """stop when K evaluations in a row have not lowered the best score by more than 0.1 % (default:
    use the whole budget)"""
    warm_start: str | None = flag(None, metavar="F.json")
    """factors for a near window of the same model, such as another second search's result: one more
    starting point"""
    population_size: int | None = flag(None, type=int, metavar="P")
    """evolution: 64; cma: 10, which is 4 + 3 ln n of the 9 or 10 numbers that it moves"""
    num_mutations: int | None = flag(None, type=int, metavar="N1")
    """evolution: 16"""
    num_crossovers: int | None = flag(None, type=int, metavar="N2")
    """evolution: 16"""
    num_parents: int | None = flag(None, type=int, metavar="K")
    """evolution: top 32 kept"""
    iterations: int | None = flag(None, type=int, metavar="T")
    """evolution: 40"""
    mutation_prob: float | None = flag(None, type=float, metavar="p")
    """evolution: 0.3 per gene"""
    initial_deviation: float | None = flag(None, type=float, metavar="D")
    """cma: of log factors, relative to the largest seed factor's (default: 0.1)"""
    racing: str = flag("exact", choices=("exact", "off"))
    """evolution: when to stop scoring a candidate. exact: when it certainly cannot survive; the
    result stays the same"""
    lookahead: int = flag(0, type=int, metavar="G")
    """generations that may start before an earlier one is complete, so that replicas do not wait
    for the slowest; 0 is the published algorithm"""
    seed: int = flag(0, type=int)


@dataclass(frozen=True, kw_only=True)
class _Estimate(Options):
    GROUP: ClassVar = "estimate"

    dry_run: bool = flag(False)
    """print FLOPs, memory and hours, and stop; loads no weights"""
    gpu: str = flag("h100", metavar="NAME")
    """a100-80, h100, ... or TFLOPS:GIB, for --dry-run"""
    gpus: int | None = flag(None, type=parse_positive, metavar="G")
    """GPUs of the job, for --dry-run (default: TP x CP, one replica)"""
    mfu: float | None = flag(None, type=float, metavar="U")
    """part of the GPU's peak, for --dry-run (default: by GPU, as in `longrope plan`)"""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(
    _Estimate, _Algorithm, _Space, _Objective, _InputsAndOutputs, Loading, OneModel
):
    """What `longrope search` is told."""

    GROUP: ClassVar = None

    attention_factor_policy: str | None = flag(
        None, choices=("su", "yarn", "none"), exclusive="attention factor"
    )
    """su (LongRoPE's formula), yarn or none, with 1 in the original window, which Hugging Face
    cannot hold (default: in a first search su's value of the target for every window; in a second
one the same by the base's policy, or the base's own value where it is not by the policy; in a
recovery the base's)"""
    attention_factor: str | None = flag(None, type=str, metavar="F", exclusive="attention factor")
    """one value for every window; `longest` takes the base config's value at its largest window"""
    resume: bool = flag(False, exclusive="journal")
    """continue from the journal if any"""
    overwrite: bool = flag(False, exclusive="journal")
    """discard an existing journal and factor file"""

    @property
    def journal(self) -> Path:
        """Return where evaluations are recorded."""
        return Path(self.output).with_suffix(".journal.jsonl")

    def parameters(self) -> CmaParameters | EvolutionParameters:
        """Return the algorithm's sizes: the flags given, else the paper's, halved from 512k on.

        Raises:
            LongRopeError: A flag belongs to the other algorithm, or its value breaks a rule.
        """
        from megatron_longrope.factor_search.cma import CmaParameters
        from megatron_longrope.factor_search.evolution import EvolutionParameters

        flags = {item.name for item in fields(_Algorithm)} - {"max_evaluations"}
        renamed = {"max_iterations": "iterations"}  # whose flag has another name, as in journals
        names = {
            kind: {renamed.get(item.name, item.name) for item in fields(sizes)} & flags
            for kind, sizes in (("cma", CmaParameters), ("evolution", EvolutionParameters))
        }
        ours, beside = names[self.algorithm], f"--algorithm {self.algorithm}"
        refuse_idle(*(
            (f"--{name.replace('_', '-')}", beside, getattr(self, name) is not None)
            for name in sorted((names["cma"] | names["evolution"]) - ours)
        ))  # fmt: skip
        given = {name: value for name in ours if (value := getattr(self, name)) is not None}
        halved = self.target_length >= _HALVED_FROM
        if self.algorithm == "cma":
            default = CmaParameters().max_evaluations // (2 if halved else 1)
            samples = self.num_samples * self.windows_per_document
            budget = default if self.max_evaluations is None else self.max_evaluations
            return CmaParameters(max_evaluations=budget, num_samples=max(samples, 1), **given)
        defaults = EvolutionParameters(32, 8, 8) if halved else EvolutionParameters()
        if "population_size" in given and "num_parents" not in given:
            given["num_parents"] = min(defaults.num_parents, given["population_size"])
        if "iterations" in given:
            given["max_iterations"] = given.pop("iterations")
        return replace(defaults, **given)

    def check_meaning(self) -> None:
        """Refuse flags that would change nothing.

        Raises:
            LongRopeError: One was given.
        """
        objective = f"--objective {self.objective}"
        refuse_idle(
            ("--windows-per-document", objective, self.objective != "ppl"
             and self.windows_per_document > 1),
            ("--needle-weight", objective, self.objective != "joint"
             and self.needle_weight != SearchOptions.needle_weight),
            ("--needle-depths", objective, self.objective == "ppl"
             and self.needle_depths is not None),
        )  # fmt: skip
