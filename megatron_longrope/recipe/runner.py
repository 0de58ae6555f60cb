"""Run a recipe: what is not done yet, in order, several stages at once where they are independent.

State is written before and after every step, so that a run that is killed at any point is continued
by the same command: finished stages are skipped, interrupted ones go on (their commands resume),
jobs that were submitted are waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from megatron_longrope.progress import format_duration
from megatron_longrope.recipe import graph, launch
from megatron_longrope.recipe.commands import Command, display
from megatron_longrope.recipe.document import Recipe, Stage
from megatron_longrope.recipe.fingerprint import Contents, Parts
from megatron_longrope.recipe.lock import held
from megatron_longrope.recipe.state import ASKED_FOR, Job, Records, StageState, decide
from megatron_longrope.recipe.survey import survey, time_left

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 12


class StageError(RuntimeError):
    """A stage failed."""


class Stopped(Exception):
    """The run is to end before the stage."""


def run_recipe(
    recipe: Recipe, *, until: str | None = None, again: str | None = None, jobs: int = 1
) -> int:
    """Run what is not done.

    Args:
        until (str, optional): Only this stage and what it needs.
        again (str, optional): Run this stage and what reads it even if nothing changed.
        jobs (int): Stages that may run at once. Defaults to 1.

    Returns:
        int: 0 done, 1 a stage failed, 128 + N stopped by signal N.

    Raises:
        ValueError: An input is missing, another run works there, or a name is unknown.
    """
    stages, repeated = _selection(recipe, until, again)
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: give 1 or more")
    if missing := graph.missing_inputs(stages, recipe.stages):
        listed = "; ".join(f"{name} needs {', '.join(paths)}" for name, paths in missing.items())
        raise ValueError(
            f"{recipe.path}: inputs are missing that no stage writes: {listed}; provide them"
        )
    with held(Records(recipe.output).lock, recipe.output) as lock:
        run = Run(recipe, stages, repeated, jobs, lock)
        with run.listening():
            return run.all()


def show_commands(recipe: Recipe, *, until: str | None = None, again: str | None = None) -> None:
    """Print every command, and what a run would do with each stage and why; starts nothing."""
    stages, repeated = _selection(recipe, until, again)
    missing = graph.missing_inputs(stages, recipe.stages)
    contents = Contents(Records(recipe.output).hashes, keep=False)
    for number, standing in enumerate(survey(recipe, stages, contents, repeated), 1):
        stage, decision = standing.stage, standing.decision
        if decision.action == "done":
            said = "done"
        elif decision.action == "wait" and standing.state and standing.state.finished:
            said = f"to do, if what it reads changes, {decision.reason}"
        else:
            said = f"to do, {decision.reason}" if decision.reason else "to do"
        print(f"[{number}/{len(stages)}] {stage.name}: {said}")
        for path in missing.get(stage.name, ()):
            print(f"  missing: {path}")
        for command in stage.commands:
            print(f"  $ {display(command.argv)}")


def _selection(
    recipe: Recipe, until: str | None, again: str | None
) -> tuple[tuple[Stage, ...], set[str]]:
    """The stages that are asked for, and the names of those to run in any case."""
    stages = recipe.until(until)
    if again is None:
        return stages, set()
    names = {stage.name for stage in stages}
    if recipe.named(again).name not in names:
        raise ValueError(f"--again {again} is not needed --until {until}; leave one of them out")
    return stages, graph.downstream([again], recipe.needs) & names


class Run:
    """One run under way.

    Args:
        recipe (Recipe): What runs.
        stages (Sequence[Stage]): The stages that are asked for, in order.
        repeated (set[str]): Names of those that run in any case.
        jobs (int): Stages at once.
        lock (int, optional): File descriptor that processes inherit.
    """

    def __init__(
        self,
        recipe: Recipe,
        stages: Sequence[Stage],
        repeated: set[str],
        jobs: int,
        lock: int | None,
    ) -> None:
        self._recipe, self._stages, self._repeated = recipe, stages, repeated
        self._jobs, self._lock = jobs, lock
        self._records = Records(recipe.output)
        self._contents = Contents(self._records.hashes, self._print)
        self._stop, self._signal = threading.Event(), 0
        self._printing = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let signals end the run in order."""

        def stop(number: int, _frame: object) -> None:
            self._signal = number
            self._stop.set()

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        before = {
            number: signal.signal(number, stop)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # nohup, for example
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def all(self) -> int:
        """Run the stages; the exit code."""
        if self._recipe.about:
            self._print(self._recipe.about)
        left = list(self._stages)
        running: dict[Future[float], Stage] = {}
        errors: list[BaseException] = []
        with ThreadPoolExecutor(self._jobs) as pool:
            while left or running:
                unfinished = {stage.name for stage in (*left, *running.values())}
                ready = [s for s in left if not self._recipe.needs[s.name] & unfinished]
                if not errors and not self._stop.is_set():
                    for stage in ready[: self._jobs - len(running)]:
                        left.remove(stage)
                        running[pool.submit(self._stage, stage)] = stage
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    try:
                        self._seconds[stage.name] = future.result()
                    except Stopped:
                        pass
                    except (StageError, ValueError, OSError) as error:
                        errors.append(error)
                        if running:
                            self._print(f"stage {stage.name} failed; what runs goes on to its end")
        for error in errors:
            print(f"longrope recipe: error: {error}", file=sys.stderr)
        if self._stop.is_set():
            name = signal.Signals(self._signal).name
            print(f"stopped by {name}; the same command goes on from here", file=sys.stderr)
            return 128 + self._signal
        if errors:
            return 1
        spent = format_duration(sum(self._seconds.values()))
        self._print(f"\nall stages are done; they took {spent}")
        return 0

    def _stage(self, stage: Stage) -> float:
        """Bring one stage to its end; the seconds that it took."""
        number = self._stages.index(stage) + 1
        title = f"[{number}/{len(self._stages)}] {stage.name}"
        parts = self._contents.parts(stage)
        absent = [name for name in stage.reads if parts.reads[stage.reads[name]] == "absent"]
        if absent:
            raise StageError(
                f"stage {stage.name} reads {absent[0]}, which is not there although the stages "
                "before it are done; correct its path, or the outputs of the stage that writes it"
            )
        state = self._records.read(stage.name)
        repeated = stage.name in self._repeated
        decision = ASKED_FOR if repeated else decide(stage, state, parts)
        if decision.action == "done":
            self._print(f"{title}: done before ({format_duration(state.seconds)})")
            return state.seconds
        done = set(self._seconds)
        left = max(1, round(time_left(self._stages, self._seconds, done) / 60))
        self._print(f"\n{title}  (about {left} min left)")
        if decision.reason:
            verb = "goes on" if decision.action == "resume" else "starts clean"
            self._print(f"{stage.name} {verb}: {decision.reason}")
        if decision.action == "clean":
            state = self._start_clean(stage, state, parts)
        for index in range(state.commands_done, len(stage.commands)):
            state = self._command(stage, index, state)
        if missing := [path for path in stage.writes if not os.path.exists(path)]:
            raise StageError(
                f"stage {stage.name} ended without its output {missing[0]}; correct its writes or "
                f"its commands (log: {self._records.log(stage.name)})"
            )
        self._records.write(stage.name, replace(state, finished=True))
        return state.seconds

    def _start_clean(self, stage: Stage, state: StageState | None, parts: Parts) -> StageState:
        job = _job_of_before(state)
        if job is not None and launch.is_alive(job):
            raise StageError(
                f"stage {stage.name} is to start clean, but its job {job.number} from before still "
                "waits or runs; cancel it, or let it end, and run again"
            )
        if folder := self._records.move_away(stage):
            self._print(f"what {stage.name} wrote before is in {folder}")
        for path in stage.writes:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        clean = state.clean(parts) if state else StageState(parts)
        self._records.write(stage.name, clean)
        return clean

    def _command(self, stage: Stage, index: int, state: StageState) -> StageState:
        """Run one command until it ends well, or has failed once more than it may."""
        command = stage.commands[index]
        around = launch.Surroundings(
            output=self._recipe.output,
            log=self._records.log(stage.name),
            show=stage.show,
            environment=stage.environment,
            lock=self._lock,
            stop=self._stop,
            patience=stage.patience,
            say=lambda line: self._print(line, stage),
        )
        failures = 0
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                state, code = self._attempt(stage, index, command, state, around)
                problem = f"failed with exit code {code}"
            except (launch.JobVanished, RuntimeError) as error:
                # What is in the file is the job; what is in memory may be older.
                state = self._records.read(stage.name).stopped(1)
                self._records.write(stage.name, state)
                code, problem = None, f"failed: {error}"
            if code == 0:
                return state
            failures += 1
            if failures > stage.retries:
                raise StageError(
                    f"stage {stage.name} {problem}; its log is {around.log}, ending in\n"
                    + _tail(around)
                )
            self._print(f"{stage.name} {problem}; again ({failures} of {stage.retries})")

    def _attempt(
        self,
        stage: Stage,
        index: int,
        command: Command,
        state: StageState,
        around: launch.Surroundings,
    ) -> tuple[StageState, int]:
        """Start a command, or go on waiting for its job; the new state and the exit code."""
        job = _job_of_before(state)
        if job is None:
            if command.alive is not None:
                job = Job(
                    command.alive,
                    str(self._records.status_file(stage.name, index, state.attempts + 1)),
                    command.grace,
                )
            state = state.running(job)
            self._records.write(stage.name, state)
            self._print(f"$ {display(command.argv)}", stage)
            around.note(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] $ {display(command.argv)}")
        if job is None:
            code = launch.run_process(command.argv, around)
        else:
            number = job.number or launch.submit(command.argv, job, around)
            job = replace(job, number=number)
            state = replace(state, job=job)
            self._records.write(stage.name, state)
            self._print(f"  waiting for job {number}", stage)
            code = launch.wait_for_job(job, around)
            if code is None:
                self._print(f"  job {number} goes on by itself", stage)
                raise Stopped
        state = state.stopped(code)
        self._records.write(stage.name, state)
        if code is None:
            raise Stopped
        return state, code

    def _print(self, line: str, stage: Stage | None = None) -> None:
        if stage is not None and self._jobs > 1:
            line = f"{stage.name}: {line.strip()}"
        with self._printing:
            print(line, flush=True)


def _tail(around: launch.Surroundings) -> str:
    text = around.log.read_text(encoding="utf-8", errors="replace") if around.log.exists() else ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-_TAIL_LINES:])


def _job_of_before(state: StageState | None) -> Job | None:
    """The job that an earlier run submitted and did not see the end of."""
    if state is None or state.job is None:
        return None
    try:
        number = launch.submitted(state.job)
    except RuntimeError:  # the batch system refused; the log says why
        return None
    return None if number is None else replace(state.job, number=number)
