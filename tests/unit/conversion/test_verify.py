import json
from dataclasses import replace

import make_megatron_checkpoint as maker
import pytest
import torch

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.staging import NotVerified
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import (
    compare,
    exported_config,
    fp32_engine,
    verify,
    windows_to_compare,
)

ENGINE = "megatron_longrope.conversion.verify.fp32_engine"


class RecordedEngine:
    """Answers with megatron-core's recorded logits; remembers how it was made."""

    model = torch.nn.Identity()

    def __init__(self, logits, error=0.0):
        self.recorded, self.error = logits, error

    def __call__(self, checkpoint, config):
        self.directory, self.config = checkpoint.directory, config
        return self

    def logits(self, tokens, count):
        length = tokens.shape[1]
        name = "short" if length <= maker.ORIGINAL else "long"
        return self.recorded[name][:, length - count : length] + self.error


@pytest.fixture
def lengths(monkeypatch):
    """The lengths that logits were recorded for."""
    monkeypatch.setattr("megatron_longrope.conversion.verify._SHORT_TOKENS", maker.SHORT_TOKENS)
    past = maker.LONG_TOKENS - maker.ORIGINAL
    monkeypatch.setattr("megatron_longrope.conversion.verify._TOKENS_PAST_LIMIT", past)


@pytest.fixture
def folder(untied_gqa, config, tmp_path):
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config)
    return tmp_path / "hf"


def test_a_good_folder_passes_on_both_windows(untied_gqa, config, folder, lengths, monkeypatch):
    engine = RecordedEngine(untied_gqa.logits)
    monkeypatch.setattr(ENGINE, engine)
    report = verify(untied_gqa.path, folder, longrope_config=config)
    assert [item.window for item in report.windows] == ["short", "long"]
    assert [item.num_tokens for item in report.windows] == [48, 160]
    for item in report.windows:
        assert item.max_abs_diff < 1e-5
        assert abs(item.mean_kl) < 1e-9
        assert item.top1_agreement == 1.0
    assert engine.directory.name == "iter_0000003"
    assert engine.config == exported_config(config)


def test_both_models_are_on_the_cpu_where_there_is_a_gpu(untied_gqa, config, monkeypatch):
    monkeypatch.setattr(
        "megatron_longrope.engine.loading.default_device", lambda: torch.device("meta")
    )
    engine = fp32_engine(MegatronCheckpoint.open(untied_gqa.path), config)
    assert {value.device.type for value in engine.model.parameters()} == {"cpu"}


def test_a_verification_waits_for_no_other_process_where_the_environment_names_ranks(
    untied_gqa, config, monkeypatch
):
    class Joined(Exception):
        """Ends the verification where it would join others."""

    def join(backend, store=None, **how):
        raise Joined(type(store), how)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    with pytest.raises(Joined) as caught:
        fp32_engine(MegatronCheckpoint.open(untied_gqa.path), config)
    assert caught.value.args == (torch.distributed.HashStore, {"rank": 0, "world_size": 1})


def test_one_changed_weight_is_found(untied_gqa, config, folder, lengths, monkeypatch):
    path = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.1.self_attn.k_proj.weight"][0] += 0.05
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits))
    with pytest.raises(ValueError, match=r"verification failed on 48 tokens \(short factors\)"):
        verify(untied_gqa.path, folder, longrope_config=config)


def test_wrong_long_factors_are_found_on_the_long_input(
    untied_gqa, config, folder, lengths, monkeypatch
):
    path = folder / "config.json"
    value = json.loads(path.read_text())
    for spelling in ("rope_scaling", "rope_parameters"):
        value[spelling]["long_factor"] = value[spelling]["short_factor"]
    path.write_text(json.dumps(value))
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits))
    with pytest.raises(ValueError, match=r"failed on 160 tokens \(long factors\)"):
        verify(untied_gqa.path, folder, longrope_config=config)


def test_logits_that_are_not_finite_never_pass(untied_gqa, config, folder, lengths, monkeypatch):
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits, error=float("nan")))
    with pytest.raises(
        ValueError, match="the logits of Megatron are not finite from position 0 on"
    ):
        verify(untied_gqa.path, folder, longrope_config=config)


def test_of_a_long_input_the_last_tokens_are_compared(
    untied_gqa, config, folder, lengths, monkeypatch
):
    monkeypatch.setattr("megatron_longrope.conversion.verify._COMPARED_TOKENS", 32)
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits))
    report = verify(untied_gqa.path, folder, longrope_config=config)
    assert [item.num_tokens for item in report.windows] == [48, 160]
    assert all(item.max_abs_diff < 1e-5 for item in report.windows)
    error = torch.linspace(1.0, 2.0, maker.PADDED)
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits, error))
    with pytest.raises(ValueError, match=r"from position 16 on .*; do not use this folder"):
        verify(untied_gqa.path, folder, longrope_config=config)


def test_a_difference_that_may_be_rounding_names_the_tolerance_and_keeps_the_files(
    untied_gqa, config, folder, lengths, monkeypatch
):
    monkeypatch.setattr(ENGINE, RecordedEngine(untied_gqa.logits, error=1e-3))
    with pytest.raises(NotVerified, match=r"may be rounding, which --tolerance 1.1e-03 allows"):
        verify(untied_gqa.path, folder, longrope_config=config)


def test_the_exported_configuration_is_what_transformers_can_hold(config):
    middle = FactorSet(128, config.factor_sets[0].rescale_factors)
    three = config.with_factor_set(middle)
    exported = exported_config(three)
    assert [item.max_length for item in exported.factor_sets] == [64, 256]
    by_middle = exported_config(replace(three, attention_factor=None), short_length=128)
    assert by_middle.factor_sets[0].rescale_factors == middle.rescale_factors
    assert by_middle.attention_factor == three.__class__.attention_factor_for(
        replace(three, attention_factor=None), 256
    )


def test_verification_looks_past_every_limit_that_config_json_declares(config):
    plain = {"max_position_embeddings": 8192}
    assert windows_to_compare(None, plain) == [("short", 512)]
    assert windows_to_compare(None, {**plain, "sliding_window": 4096, "hidden_size": 600}) == [
        ("short", 512),
        ("sliding_window", 4160),
    ]
    assert windows_to_compare(None, {**plain, "attention_chunk_size": 8190})[1] == (
        "attention_chunk_size",
        8192,
    )
    both = {"max_position_embeddings": 256, "sliding_window": 100}
    assert windows_to_compare(config, both) == [("short", 64), ("long", 128)]
    assert windows_to_compare(config, {**both, "sliding_window": 200}) == [
        ("short", 64),
        ("long", 128),
        ("sliding_window", 256),
    ]


def test_differences_are_measured_over_every_block():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(1, 600, 7, generator=generator)
    theirs = ours.clone()
    theirs[0, 599, 3] += 10.0
    result = compare("long", ours, theirs)
    assert result.max_abs_diff == pytest.approx(10.0, abs=1e-5)
    expected = (ours[0].log_softmax(-1) - theirs[0].log_softmax(-1)) * ours[0].softmax(-1)
    assert result.mean_kl == pytest.approx(expected.sum().item() / 600, rel=1e-4)
    assert result.top1_agreement == pytest.approx(599 / 600)
