"""transformers never runs code that came with a folder, never downloads, and never asks."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
import transformers

from megatron_longrope.local_folder import LOCAL_ONLY

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for folder in ("megatron_longrope", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def is_local(call: ast.Call) -> bool:
    names = {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords}
    return "LOCAL_ONLY" in names or names >= LOCAL_ONLY.keys()


def test_every_from_pretrained_stays_local():
    calls = [
        (path, node)
        for path in SCRIPTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]
    assert calls
    loose = [
        f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in calls if not is_local(call)
    ]
    assert loose == []


def test_a_folder_whose_code_lies_in_a_hub_repository_is_refused_without_a_question(
    tmp_path, monkeypatch
):
    config = {
        "tokenizer_class": "CustomTokenizer",
        "auto_map": {"AutoTokenizer": ["someone/repo--tokenization.CustomTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoTokenizer.from_pretrained(str(tmp_path), **LOCAL_ONLY)
    assert sys.stdin.read() == "y\n"  # nobody asked
