# Prints how long each rule took and about how long the rest will take, from the rules' own
# `resources: seconds` (measured on two idle cores) and the pace so far.
import logging
import time

from snakemake_interface_logger_plugins.common import LogEvent

from megatron_longrope.progress import format_duration


class TimeLeft(logging.Handler):
    """Listens to Snakemake's log."""

    def __init__(self):
        super().__init__()
        self.began, self.jobs = {}, {}
        self.spent = self.expected = 0.0

    def emit(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.JOB_INFO:
            seconds = dict(record.resources.items()).get("seconds", 0)
            self.jobs[record.jobid] = (record.rule_name, seconds)
            self.began[record.jobid] = time.monotonic()
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.began:
            name, seconds = self.jobs[record.job_id]
            took = time.monotonic() - self.began.pop(record.job_id)
            self.spent, self.expected = self.spent + took, self.expected + seconds
            print(f"{name} took {format_duration(took)}; {self.left(record.job_id)}", flush=True)

    def left(self, ended):
        """Say what waits besides the job that has just ended."""
        dag = workflow.dag
        waiting = [job for job in dag.needrun_jobs() if not dag.finished(job)]
        waiting = [job for job in waiting if job.output and dag.jobid(job) != ended]
        seconds = sum(dict(job.resources.items()).get("seconds", 0) for job in waiting)
        pace = (self.spent + 60) / (self.expected + 60)  # short rules say little about the machine
        return f"{len(waiting)} rules and about {format_duration(seconds * pace)} left"


if not any(type(handler).__name__ == "TimeLeft" for handler in logger.handlers):
    logger.addHandler(TimeLeft())
