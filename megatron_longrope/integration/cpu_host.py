"""Opt-in host that lets Megatron's training loop run on a machine without CUDA.

For smoke runs, teaching and continuous integration: fp32, gloo, local transformer implementation.
It answers the questions that Megatron asks of `torch.cuda` (devices, streams, events, random state,
memory statistics) with the CPU, for the rest of the process. It is no emulator: code that launches
CUDA kernels still fails, with torch's own error.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.managers import SyncManager

from megatron_longrope.ranks import end_with_parent

# Flags with their values or number of values. Each CPU run needs all of SUPPLIED and none of
# DROPPED.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "--transformer-impl": ("local",),
    "--distributed-backend": ("gloo",),
    "--use-cpu-initialization": (),
    "--no-gradient-accumulation-fusion": (),
    "--no-masked-softmax-fusion": (),
    "--no-rope-fusion": (),
    "--no-bias-swiglu-fusion": (),
    "--no-bias-gelu-fusion": (),
    "--no-bias-dropout-fusion": (),
    "--no-persist-layer-norm": (),
    "--no-create-attention-mask-in-dataloader": (),
    "--num-workers": ("0",),
}
_ANY_NUMBER = -1
DROPPED: dict[str, int] = {
    "--bf16": 0,
    "--fp16": 0,
    "--fp16-lm-cross-entropy": 0,
    "--fp32-residual-connection": 0,
    "--fp8-format": 1,
    "--fp8-recipe": 1,
    "--fp8-amax-history-len": 1,
    "--fp8-amax-compute-algo": 1,
    "--fp8-param-gather": 0,
    "--use-distributed-optimizer": 0,
    "--dist-ckpt-optim-fully-reshardable": 0,
    "--use-precision-aware-optimizer": 0,
    "--optimizer-cpu-offload": 0,  # this and the next four need it
    "--main-grads-dtype": 1,
    "--main-params-dtype": 1,
    "--exp-avg-dtype": 1,
    "--exp-avg-sq-dtype": 1,
    "--overlap-grad-reduce": 0,
    "--overlap-param-gather": 0,
    "--overlap-param-gather-with-optimizer-step": 0,
    "--sequence-parallel": 0,
    "--tp-comm-overlap": 0,
    "--attention-backend": 1,
    "--use-flash-attn": 0,
    "--cp-comm-type": _ANY_NUMBER,
    "--cross-entropy-loss-fusion": 0,
    "--cross-entropy-fusion-impl": 1,
    "--nccl-ub": 0,
    "--enable-cuda-graph": 0,
    "--cuda-graph-impl": 1,
}


@dataclass(frozen=True)
class CpuArguments:
    """A command line made fit for the CPU, and what changed."""

    arguments: list[str]
    """The new command line."""
    supplied: list[str]
    """Flags that were added, with their values."""
    dropped: list[str]
    """Flags that were taken away, with their values."""

    def describe(self) -> str:
        """Lines for the log."""
        lines = [f"> cpu: supplied {' '.join(self.supplied) or 'nothing'}"]
        if self.dropped:
            lines.append(f"> cpu: dropped  {' '.join(self.dropped)}")
        return "\n".join(lines)


def cpu_arguments(arguments: Sequence[str]) -> CpuArguments:
    """Replace the flags that need CUDA, so that a GPU command line runs unchanged.

    Flags may be spelled `--flag value` or `--flag=value`. A supplied flag that is already there
    with the same value stays; one with another value is dropped and supplied anew.
    """
    kept: list[str] = []
    dropped: list[str] = []
    present: set[str] = set()
    items = list(arguments)
    position = 0
    while position < len(items):
        item = items[position]
        flag, has_value, _ = item.partition("=")
        count = DROPPED.get(flag, len(SUPPLIED.get(flag, ())))
        if count == _ANY_NUMBER:
            rest = items[position + 1 :]
            count = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
        span = [item] if has_value else items[position : position + 1 + count]
        position += len(span)
        if flag in SUPPLIED:
            value = tuple(span[1:]) if not has_value else (item.partition("=")[2],)
            if value == SUPPLIED[flag]:
                present.add(flag)
                kept += span
            else:
                dropped += span
        elif flag in DROPPED:
            dropped += span
        else:
            kept += span
    supplied = [
        word for flag, value in SUPPLIED.items() if flag not in present for word in (flag, *value)
    ]
    return CpuArguments(kept + supplied, supplied, dropped)


def prepare_environment() -> None:
    """Set what must be known before torch is imported."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def enable() -> None:
    """Let `torch.cuda` answer for the CPU until the process ends. Idempotent."""
    import torch

    if isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _Stream):
        return
    for name, replacement in _cuda_answers(torch).items():
        setattr(torch.cuda, name, replacement)
    # The random-state tracker reaches for the functions where they are defined.
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    # It also warns when the CPU's state changes under a CUDA state; here the two are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    torch.cuda.nvtx.range_push = lambda *_: 0
    torch.cuda.nvtx.range_pop = lambda *_: 0
    torch.nn.Module.cuda = lambda self, *_, **__: self
    # Optimizers look for CUDA-graph capture when a device reports to be available.
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            setattr(torch.optim.Optimizer, name, lambda self: None)
    _use_gloo(torch.distributed)
    _cuda_to_cpu_mode(torch).__enter__()


def _answer(value: object = None):
    """A new function returning `value`; torch.compile's tables want one for each name."""
    return lambda *_, **__: value


class _Stream(contextlib.nullcontext):
    """A stream on which everything has already happened."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    wait_stream = wait_event = synchronize = _answer()
    query = _answer(True)

    def record_event(self, event: _Event | None = None) -> _Event:
        """An event that is already done."""
        return event or _Event()


class _Event:
    """A point in host time."""

    def __init__(self, *_: object, **__: object) -> None:
        self._time = time.perf_counter()

    def record(self, *_: object) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    wait = synchronize = _answer()
    query = _answer(True)

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds to `end`."""
        return 1e3 * (end._time - self._time)


class _DeviceContext(contextlib.nullcontext):
    """`with torch.cuda.device(...)`: there is only one."""

    def __init__(self, *_: object) -> None:
        super().__init__()


class _Properties:
    name = "cpu"
    major, minor = 9, 0
    multi_processor_count = 1
    total_memory = 64 << 30


def _cuda_answers(torch) -> dict[str, object]:
    answers: dict[str, object] = {
        "Stream": _Stream,
        "Event": _Event,
        "device": _DeviceContext,
        "default_generators": (torch.default_generator,),
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "memory_stats": lambda *_, **__: collections.defaultdict(int),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
    }
    constants = (  # pairs, for True == 1 and False == 0 would share a dictionary key
        (True, ("is_available", "is_initialized")),
        (False, ("is_current_stream_capturing",)),
        (None, ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect")),
        (None, ("set_stream", "reset_peak_memory_stats", "manual_seed_all")),
        (0, ("current_device", "memory_allocated", "max_memory_allocated")),
        (0, ("memory_reserved", "max_memory_reserved")),
        (1, ("device_count",)),
        ((9, 0), ("get_device_capability",)),
        ("cpu", ("get_device_name",)),
        (_Properties(), ("get_device_properties",)),
    )
    for value, names in constants:
        answers.update({name: _answer(value) for name in names})
    return answers


def _use_gloo(distributed) -> None:
    """Every process group becomes a gloo group, whatever backend was asked for."""
    init_process_group, new_group = distributed.init_process_group, distributed.new_group

    def init_gloo(backend=None, *args, **options):
        options.pop("device_id", None)
        options.pop("pg_options", None)
        return init_process_group("gloo", *args, **options)

    def new_gloo_group(*args, **options):
        options.pop("pg_options", None)
        if options.get("backend"):
            options["backend"] = "gloo"
        return new_group(*args, **options)

    distributed.init_process_group = init_gloo
    distributed.new_group = new_gloo_group


def start_results_server() -> None:
    """Start the process that checkpoint writers report to, while this one is small.

    Megatron starts it at the first save and, for the sake of CUDA, by spawning: it imports torch
    and Megatron anew, some eight seconds for a queue. Without CUDA it can be forked; but forked at
    a save it would keep that moment's model, gradients and optimizer to the end of the run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "get_write_results_queue"):
        return  # a release without that server
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(end_with_parent, (signal.SIGKILL,))  # else a killed training leaves it behind
    queue = manager.Queue()
    filesystem_async.get_write_results_queue = lambda *_, **__: queue


def _cuda_to_cpu_mode(torch):
    from torch.overrides import TorchFunctionMode

    tensor_class = torch.Tensor

    def to_cpu(device):
        is_cuda = (
            (isinstance(device, str) and device.startswith("cuda"))
            or (isinstance(device, torch.device) and device.type == "cuda")
            or type(device) is int
        )
        return torch.device("cpu") if is_cuda else device

    class CudaToCpu(TorchFunctionMode):
        """Sends tensors that ask for a CUDA device to the CPU."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func in (tensor_class.cuda, tensor_class.pin_memory):
                return args[0]
            if "device" in kwargs:
                kwargs["device"] = to_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if func is tensor_class.to:
                args = (args[0], *(to_cpu(item) for item in args[1:]))
            if func is tensor_class.type and len(args) == 1 and not kwargs:
                # Optimizers check for 'torch.cuda.FloatTensor' by name.
                return func(*args).replace("torch.", "torch.cuda.")
            return func(*args, **kwargs)

    return CudaToCpu()
