"""What the quickstart's training scripts would ignore, they refuse."""

import importlib
from argparse import Namespace

import pytest
from launching import SCRIPT

pytest.importorskip("megatron.training")


def test_flags_that_the_scripts_would_ignore_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script, older = (importlib.import_module(name) for name in ("pretrain_gpt", "older_megatron"))
    monkeypatch.setattr(script, "get_args", lambda: Namespace(sft=True))
    with pytest.raises(SystemExit, match=r"^--sft is not for this script"):
        script.datasets_provider((1, 0, 0))
    monkeypatch.setattr(older, "get_args", lambda: Namespace(num_experts=8))
    with pytest.raises(SystemExit, match=r"^--num-experts needs megatron-core 0\.19"):
        older.model_provider()
