"""Lengths as people write them: `4096` and `4k` are the same number of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.lengths import format_length, parse_length, parse_lengths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4k", 4096),
        ("4K", 4096),
        (" 256k ", 262144),
        ("2048k", 2097152),
        ("2m", 2097152),
        ("2M", 2097152),
    ],
)
def test_a_length_is_read_with_1k_as_1024_tokens(text, tokens):
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "text", ["", " ", "k", "0", "0k", "-4k", "+4", "4.5k", "4 k", "4kk", "4g", "1e3", "4_096", "٤"]
)
def test_a_text_that_is_no_positive_integer_is_refused_with_the_remedy(text):
    with pytest.raises(ValueError) as caught:
        parse_length(text)
    assert str(caught.value) == (
        f"length {text!r} is not a positive integer; write 4096 or 4k (1k = 1024)"
    )


def test_a_list_of_lengths_keeps_its_order():
    assert parse_lengths("8k,4096, 1m") == [8192, 4096, 1048576]


def test_a_trailing_comma_in_a_list_of_lengths_is_ignored():
    assert parse_lengths("4k,8k,") == [4096, 8192]


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_list_without_any_length_is_refused(text):
    with pytest.raises(ValueError, match="holds no length; write for example 4k,8k,16k"):
        parse_lengths(text)


def test_one_length_in_two_spellings_is_refused_as_a_duplicate():
    with pytest.raises(ValueError, match="holds one length twice"):
        parse_lengths("4k,8k,4096")


def test_a_bad_entry_in_a_list_is_named():
    with pytest.raises(ValueError, match="length '8x' is not a positive integer"):
        parse_lengths("4k,8x")


@pytest.mark.parametrize(
    ("tokens", "text"), [(262144, "256k"), (2097152, "2048k"), (1024, "1k"), (1000, "1000")]
)
def test_a_length_is_printed_in_k_only_when_it_is_a_multiple_of_1024(tokens, text):
    assert format_length(tokens) == text


@given(st.integers(min_value=1, max_value=2**40))
def test_a_printed_length_reads_back_as_itself(tokens):
    assert parse_length(format_length(tokens)) == tokens
