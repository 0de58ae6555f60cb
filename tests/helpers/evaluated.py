"""Records as `longrope eval` writes them, made up for tests of the report."""

import hashlib
import json
import math

LENGTHS = (4096, 8192, 16384, 32768, 65536)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def whose(model="base", label="checkpoint", policy=None, iteration=1000, config=None):
    """The fields that all kinds share."""
    return {
        "model": model, "checkpoint": f"ckpt/{model}", "checkpoint_sha256": f"content of {model}",
        "iteration": iteration, "label": label, "policy": policy, "config": config,
        "config_sha256": hashlib.sha256(str(config or label).encode()).hexdigest(),
        "original_length": 4096,
    }  # fmt: skip


def ppl(length, value, protocol="truncated", stride=None, tokens="t", **fields):
    parts = 8
    return whose() | {
        "length": length, "protocol": protocol, "requested_stride": stride,
        "stride": stride or length, "sources": "proof.jsonl:10", "documents_sha256": "d0",
        "num_windows": 10,
        "num_tokens": 10 * (length - 1), "ppl_window_mean": value,
        "ppl_token_weighted": value * 1.01, "nll_per_document": [math.log(value)] * 10,
        "nll_by_position": [
            {"from": i * (length - 1) // parts, "nll": math.log(value) + 0.4 / (i + 1),
             "tokens": length // parts} for i in range(parts)
        ],
        "sha256": f"{tokens}{length}", "seconds": 1.5,
    } | fields  # fmt: skip


def passkey(length, correct, trial=0, requested=None, **fields):
    depth = 0.3 if requested is None else requested
    return whose() | {
        "length": length, "depth": depth, "requested_depth": requested, "seed": 42, "trial": trial,
        "scoring": "teacher-forced", "correct": correct, "nll": 0.1 if correct else 2.0,
        "tokenizer_sha256": "t0", "key": 12345, "num_tokens": length, "num_answer_tokens": 5,
        "seconds": 0.1,
    } | fields  # fmt: skip


def needle(length, recall, trial=0, depth=0.5, task="single", **fields):
    return whose() | {
        "task": task, "length": length, "requested_depth": depth, "depth": depth, "seed": 42,
        "trial": trial, "documents_sha256": "d0", "tokenizer_sha256": "t0",
        "recall": recall, "nll": 1.0 - recall, "num_needles": 1, "num_queries": 1,
        "num_tokens": length, "seconds": 0.1,
    } | fields  # fmt: skip


def ruler(task, length, value, sample=0, **fields):
    return whose() | {
        "task": task, "length": length, "sample": sample, "seed": 42, "score": value,
        "text": "7", "answers": ["7"], "data_sha256": f"d {task}",
        "tokenizer_sha256": "t0", "num_tokens": length - 130, "seconds": 0.1,
    } | fields  # fmt: skip


def short(task, value, stderr=0.01, **fields):
    return whose() | {
        "task": task, "num_fewshot": 10, "metric": "acc_norm", "value": value, "stderr": stderr,
        "metrics": {"acc": value}, "samples": 100, "limit": None, "max_length": 4096,
        "seed": 1234, "tokenizer_sha256": "t0",
        "lm_eval_version": "0.4.13", "seconds": 9.0,
    } | fields  # fmt: skip


def save(directory, kind, rows, tail=""):
    """Write `<kind>.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def everything(directory, models=("base",), lengths=LENGTHS, depths=DEPTHS, trials=3):
    """All kinds of records for several models, the later the better."""
    for index, model in enumerate(models):
        mine = whose(model)
        strength = (index + 1) / len(models)

        def hit(length, depth, trial, strength=strength):
            hard = math.log2(length / lengths[0] + 1) / math.log2(lengths[-1] / lengths[0] + 2)
            return (hard * (1.2 - abs(depth - 0.5)) + 0.11 * trial) < 0.35 + strength * 0.9

        values = {n: 3.0 + (1.2 - strength) * (n / lengths[0]) ** 0.9 for n in lengths}
        save(directory / model, "ppl", [
            ppl(n, value, protocol, stride) | mine
            for n, value in values.items()
            for protocol, stride in (("truncated", None), ("sliding", 256))
        ])  # fmt: skip
        grid = [(n, d, t) for n in lengths for d in depths for t in range(trials)]
        save(directory / model, "passkey",
             [passkey(n, hit(n, d, t), t, d) | mine for n, d, t in grid])  # fmt: skip
        save(directory / model, "needle", [
            needle(n, float(hit(n, d, t)) if task == "single" else (hit(n, d, t) + hit(n, d, t + 2))
                   / 2, t, d, task) | mine
            for task in ("single", "multi_query") for n, d, t in grid
        ])  # fmt: skip
        save(directory / model, "short", [
            short("arc_challenge", 0.4 + 0.1 * strength) | mine,
            short("mmlu", 0.5 - 0.1 * strength, num_fewshot=5, metric="acc") | mine,
        ])  # fmt: skip
    return directory
