# Prints how long each rule took and about how long the rest will take, from the rules' own
# `resources: seconds` (measured on two idle cores), their threads and the pace so far.
import logging
import time

from snakemake_interface_logger_plugins.common import LogEvent

from megatron_longrope.progress import format_duration


class TimeLeft(logging.Handler):
    """Listens to Snakemake's log."""

    def __init__(self):
        super().__init__()
        self.began, self.jobs = {}, {}
        self.start = time.monotonic()

    def emit(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.JOB_INFO:
            self.jobs[record.jobid] = record.rule_name
            self.began[record.jobid] = time.monotonic()
        elif event == LogEvent.JOB_FINISHED and record.job_id in self.began:
            name = self.jobs[record.job_id]
            took = time.monotonic() - self.began.pop(record.job_id)
            print(f"{name} took {format_duration(took)}; {self.left(record.job_id)}", flush=True)

    def left(self, ended):
        """Say what waits besides the job that has just ended."""
        dag, cores = workflow.dag, workflow.cores or 1
        jobs = [job for job in dag.needrun_jobs(exclude_finished=False) if job.output]
        waiting = [job for job in jobs if not dag.finished(job) and dag.jobid(job) != ended]

        def expected(some):
            return sum(dict(job.resources.items()).get("seconds", 0) * job.threads for job in some) / cores

        done = expected(jobs) - expected(waiting)
        pace = (time.monotonic() - self.start + 60) / (done + 60)  # short rules say little about the machine
        return f"{len(waiting)} rules and about {format_duration(expected(waiting) * pace)} left"


if not any(type(handler).__name__ == "TimeLeft" for handler in logger.handlers):
    logger.addHandler(TimeLeft())
