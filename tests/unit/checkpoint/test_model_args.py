import argparse
import json
import math
from types import SimpleNamespace

import pytest

from megatron_longrope.checkpoint.hf.families import select_family
from megatron_longrope.checkpoint.model_args import ModelShape, custom_softmax_scale
from megatron_longrope.conversion.to_hf import true_vocabulary
from megatron_longrope.conversion.tokenizer import TokenizerInfo
from megatron_longrope.errors import LongRopeError

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}


def scale_of(**values):
    return custom_softmax_scale(argparse.Namespace(**SHAPE, **values))


def test_a_run_without_a_softmax_scale_has_none():
    assert scale_of() is None and scale_of(softmax_scale=None) is None


def test_longropes_own_carrier_is_no_custom_scale():
    factor = 1.1726039
    scale = factor**2 / math.sqrt(16)
    assert scale_of(softmax_scale=scale, longrope_attention_factor=factor) is None


@pytest.mark.parametrize("factor", [None, 1.0, 1.2])
def test_any_other_scale_is_custom(factor):
    assert scale_of(softmax_scale=0.5, longrope_attention_factor=factor) == 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window_size": (8, 0), "window_attn_skip_freq": 2}, r"\(8, 0\) and .*skip_freq = 2 \("),
        ({"window_size": (8, 4)}, r"\(8, 4\) and .*skip_freq = None \("),
    ],
)
def test_other_windows_than_a_causal_one_in_every_layer_are_described_and_refused(
    arguments, changes, told
):
    shape = ModelShape.from_args(arguments(**changes))
    with pytest.raises(ValueError, match=rf"the model has window_size = {told}other than"):
        select_family(shape)
    assert ModelShape.from_args(arguments(window_size=(8, 0))).other_architecture is None
    full = ModelShape.from_args(arguments(window_size=(-1, 0), window_attn_skip_freq=2))
    assert (full.other_architecture, full.sliding_window) == (None, None)


def test_the_end_of_a_document_of_null_tokenizer_is_a_token(arguments):
    """It is the id after those of --vocab-size; megatron-core 0.18 takes the last of them."""
    args = arguments(tokenizer_type="NullTokenizer", vocab_size=50, padded_vocab_size=64)
    assert ModelShape.from_args(args).vocab_size == 51
    args.null_tokenizer_eod_id = None
    assert ModelShape.from_args(args).vocab_size == 50
    args = arguments(tokenizer_type="NullTokenizer", vocab_size=64, padded_vocab_size=64)
    assert ModelShape.from_args(args).vocab_size == 64


def test_an_export_with_a_tokenizer_keeps_that_token(arguments):
    args = arguments(tokenizer_type="NullTokenizer", vocab_size=50, padded_vocab_size=64)
    checkpoint = SimpleNamespace(args=args, shape=ModelShape.from_args(args))
    assert true_vocabulary(checkpoint, TokenizerInfo(51)) == 51
    with pytest.raises(LongRopeError, match="52 tokens, the model's vocabulary 51"):
        true_vocabulary(checkpoint, TokenizerInfo(52))


@pytest.mark.parametrize(("stated", "kept"), [(60, 60), (64, 64), (49, 50), (65, 50), (None, 50)])
def test_an_export_has_the_rows_that_the_config_beside_its_tokenizer_states(
    arguments, tmp_path, stated, kept
):
    """As Qwen's models, which have more rows than their tokenizers have tokens."""
    args = arguments(vocab_size=None, padded_vocab_size=64)
    checkpoint = SimpleNamespace(args=args, shape=ModelShape.from_args(args))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": stated}))
    assert true_vocabulary(checkpoint, TokenizerInfo(50), tmp_path) == kept
