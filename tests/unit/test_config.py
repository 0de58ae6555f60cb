"""The JSON artifact: what is refused and how, what a round trip keeps, what transformers reads."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.frequencies import inv_freq_fp32

DIM = 8
SHORT = (1.0, 1.0, 1.05, 1.25)
LONG = (1.0, 1.94, 5.18, 32.0)
HUGE = 10**400  # JSON allows it, float() does not


def payload(**changes) -> dict:
    """A valid schema-1 object, with top-level fields replaced."""
    value = {
        "schema": 1,
        "rope_type": "longrope",
        "rotary_base": 10000.0,
        "rotary_dim": DIM,
        "original_max_position_embeddings": 4096,
        "attention_factor": None,
        "attention_factor_policy": "su",
        "factor_sets": [
            {"max_length": 4096, "rescale_factors": list(SHORT), "num_start_tokens": 0},
            {"max_length": 131072, "rescale_factors": list(LONG), "num_start_tokens": 4},
        ],
    }
    return {**value, **changes}


def without(key: str) -> dict:
    return {name: value for name, value in payload().items() if name != key}


def with_set(index: int, **changes) -> dict:
    """A valid object but for the changed fields of one factor set."""
    value = payload()
    value["factor_sets"][index].update(changes)
    return value


def with_factors(*factors) -> dict:
    return with_set(1, rescale_factors=list(factors))


def refusal(value) -> str:
    with pytest.raises(ValueError) as caught:
        LongRopeConfig.from_dict(value)
    return str(caught.value)


def exportable(**changes) -> LongRopeConfig:
    """A configuration that transformers can hold: one attention factor, no start tokens."""
    fields = {
        "rotary_base": 10000.0,
        "rotary_dim": DIM,
        "original_max_position_embeddings": 4096,
        "factor_sets": (FactorSet(4096, SHORT), FactorSet(131072, LONG)),
        "attention_factor": 1.25,
    }
    return LongRopeConfig(**{**fields, **changes})


def test_the_object_that_the_refusals_start_from_is_valid():
    config = LongRopeConfig.from_dict(payload())
    assert config.max_length == 131072
    assert config.factor_sets[1] == FactorSet(131072, LONG, num_start_tokens=4)


# What is refused: a rule, what breaks it for some values, the sentence with the value as {!r}


def unsorted(_) -> dict:
    return payload(factor_sets=payload()["factor_sets"][::-1])


def set_without(key: str) -> dict:
    value = payload()
    del value["factor_sets"][1][key]
    return value


FACTORS, SET = "factor_sets[1].rescale_factors", "factor_sets[0]"
WINDOW, ABOVE_ZERO = "original_max_position_embeddings", "it must be a finite number above 0"
RULES = [
    ("count", lambda v: with_factors(*v), [(1.0, 2.0, 3.0)],
     f"{FACTORS} has 3 values; rotary_dim 8 needs 4"),
    ("NaN", lambda v: with_factors(1.0, v, 3.0, 4.0), [math.nan],
     f"{FACTORS}[1] is NaN; factors must be finite"),
    ("infinity", lambda v: with_factors(1.0, 2.0, 3.0, v), [math.inf, -math.inf],
     f"{FACTORS}[3] is infinite; factors must be finite"),
    ("no finite frequency", lambda v: with_factors(v, 2.0, 3.0, 4.0), [0.0, -0.5, 1e-40],
     f"{FACTORS}[0] is {{!r}}; a factor must be above 0, in float32 too"),
    ("over the cube of the extension", lambda v: with_factors(1.0, 2.0, 3.0, v), [32768.5],
     f"{FACTORS}[3] is {{!r}}, over the bound 32768 = (largest max_length / {WINDOW})^3 (at least "
     "128); check both lengths"),
    ("boolean", lambda v: with_factors(v, 2.0, 3.0, 4.0), [True],
     f"{FACTORS}[0] is {{!r}}; it must be a number"),
    ("no number", lambda v: with_factors(1.0, v, 3.0, 4.0), ["2.0", None, [2.0], {}],
     f"{FACTORS}[1] is {{!r}}; it must be a number"),
    ("no list", lambda v: with_set(0, rescale_factors=v), [None, 2.0, "1.0, 2.0", {"0": 1.0}],
     f"{SET}.rescale_factors must be a list of numbers"),
    ("no set", lambda v: payload(factor_sets=v), [[]],
     "factor_sets is empty; at least one set is needed"),
    ("sets", lambda v: payload(factor_sets=v), [None, {}, "all"],
     "factor_sets must be a list of objects"),
    ("set", lambda v: payload(factor_sets=v), [[[1.0] * 4]],
     f"{SET} must be an object, got list"),
    ("order", unsorted, [None],
     "factor_sets[1].max_length 4096 follows 131072; sets must be sorted"),
    ("duplicate", lambda v: with_set(1, max_length=v, rescale_factors=[1.0] * 4), [4096],
     "factor_sets[1].max_length {!r} is a duplicate; each length may stand once"),
    ("max_length", lambda v: with_set(0, max_length=v), [0, -1, 4096.0, "4096", None, True],
     f"{SET}.max_length is {{!r}}; it must be an integer of at least 1"),
    ("start tokens", lambda v: with_set(1, num_start_tokens=v), [-1, True, False, 1.0, "4", None],
     "factor_sets[1].num_start_tokens is {!r}; it must be an integer of at least 0"),
    ("origin", lambda v: with_set(0, origin=v), [None, [], "search"],
     f"{SET}.origin must be an object"),
    ("key", without, ["rope_type", "rotary_base", "rotary_dim", WINDOW, "factor_sets"],
     "the configuration lacks the key {!r}"),
    ("key of a set", set_without, ["max_length", "rescale_factors"],
     "factor_sets[1] lacks the key {!r}"),
    ("schema", lambda v: payload(schema=v), [0, 3, "1", None, True],
     "schema {!r} is not supported; this release reads schema 1 and 2"),
    ("no schema", without, ["schema"],
     "schema None is not supported; this release reads schema 1 and 2"),
    ("rope_type", lambda v: payload(rope_type=v), ["su", "yarn", None, 1],
     'rope_type {!r} must be "longrope"'),
    ("a list", lambda v: v, [[]], "expected a JSON object, got list"),
    ("null", lambda v: v, [None], "expected a JSON object, got NoneType"),
    ("a text", lambda v: v, ["{}"], "expected a JSON object, got str"),
    ("odd rotary_dim", lambda v: payload(rotary_dim=v), [7],
     "rotary_dim is {!r}, which is odd; dimensions rotate in pairs"),
    ("rotary_dim", lambda v: payload(rotary_dim=v), [0, -8, 8.0, "8", None, True],
     "rotary_dim is {!r}; it must be an integer of at least 2"),
    ("rotary_base", lambda v: payload(rotary_base=v),
     [0, -1.0, math.nan, math.inf, "10000", None, True, HUGE],
     f"rotary_base is {{!r}}; {ABOVE_ZERO}"),
    ("small rotary_base", lambda v: payload(rotary_base=v), [1, 0.5],
     "rotary_base is {!r}; it must be above 1"),
    ("window", lambda v: payload(**{WINDOW: v}), [1, 0, -4096, 4096.0, "4k", None, True],
     f"{WINDOW} is {{!r}}; it must be an integer of at least 2"),
    ("attention factor", lambda v: payload(attention_factor=v),
     [0, 0.0, -1.5, math.nan, math.inf, "su", True, [1.0], HUGE],
     f"attention_factor is {{!r}}; {ABOVE_ZERO}"),
    ("policy", lambda v: payload(attention_factor_policy=v),
     ["longrope", "SU", "", None, 1, ["su"]],
     "attention_factor_policy is {!r}; it must be one of su, yarn, none"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        pytest.param(change(value), sentence.format(value), id=f"{rule}: {str(value)[:20]}")
        for rule, change, values, sentence in RULES
        for value in values
    ],
)
def test_what_breaks_a_rule_is_refused_with_field_value_and_rule(value, sentence):
    assert refusal(value) == sentence


def test_an_integer_too_large_for_a_float_is_refused_as_over_the_bound():
    assert "over the bound 32768" in refusal(with_factors(1.0, 2.0, 3.0, HUGE))


def load_with_warnings(tmp_path, value) -> tuple[LongRopeConfig, list[str]]:
    (tmp_path / "a.json").write_text(json.dumps(value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = LongRopeConfig.load(tmp_path / "a.json")
    return config, [str(item.message).removeprefix(f"{tmp_path / 'a.json'}: ") for item in caught]


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ((0.9978, 2.0, 3.0, 4.0), "[0] is 0.9978, below 1"),
        ((1.0, 3.0, 2.5, 4.0), "[2] is 2.5, below its predecessor 3.0"),
        ((1.0, 2.0, 64.5, 70.0), "[2] is 64.5, over 64 = 2 x the extension ratio"),
    ],
)
def test_factors_that_no_search_proposes_are_loaded_as_they_are_under_one_warning(
    tmp_path, factors, reason
):
    value = with_factors(*factors)
    value["factor_sets"][0]["rescale_factors"] = [1.0, 2.0, 3.0, 33.0]  # within the long window's
    config, messages = load_with_warnings(tmp_path, value)
    assert config.factor_sets[1].rescale_factors == factors
    assert messages == [
        f"factor_sets[1].rescale_factors{reason}, which no search would propose; "
        "the factors are used as they are"
    ]


def test_factors_of_exactly_twice_the_extension_ratio_are_usual(tmp_path):
    assert load_with_warnings(tmp_path, with_factors(1.0, 2.0, 3.0, 64.0))[1] == []


@pytest.mark.parametrize("value", [math.nan, {1, 2}, torch.zeros(1)])
def test_an_origin_that_json_cannot_hold_is_refused(value):
    assert refusal(with_set(0, origin={"seed": value})).startswith(
        "factor_sets[0].origin must be plain JSON: "
    )


def test_an_unknown_key_of_the_configuration_is_refused():
    message = refusal(payload(rotary_bass=1.0))
    assert message.startswith("the configuration has unknown key 'rotary_bass'; known keys: [")
    assert "'rotary_base'" in message


def test_an_unknown_key_of_a_factor_set_is_refused():
    message = refusal(with_set(1, rescale_factor=[1.0]))
    assert message.startswith("factor_sets[1] has unknown key 'rescale_factor'; known keys: [")
    assert "'rescale_factors'" in message


@pytest.mark.parametrize("key", ["attention_factor", "attention_factor_policy"])
def test_the_attention_factor_may_be_left_out_and_follows_the_release(key):
    config = LongRopeConfig.from_dict(without(key))
    assert (config.attention_factor, config.attention_factor_policy) == (None, "su")


def test_another_schema_is_reported_before_its_unknown_keys():
    assert refusal({"schema": 3, "sets": []}).startswith("schema 3 is not supported")


@pytest.mark.parametrize("field", ["original_max_position_embeddings", "max_length"])
def test_a_length_too_large_for_a_float_is_refused(field):
    value = with_set(1, max_length=HUGE) if field == "max_length" else payload(**{field: HUGE})
    assert refusal(value).endswith("it must be at most 2^53")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(HUGE),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON_VALUES, data=st.data())
def test_any_field_may_hold_any_json_value_and_the_answer_is_a_config_or_a_value_error(value, data):
    target = payload()
    if data.draw(st.booleans()):
        target = target["factor_sets"][1]
        whole = payload(factor_sets=[payload()["factor_sets"][0], target])
    else:
        whole = target
    target[data.draw(st.sampled_from(sorted(target)))] = value
    try:
        LongRopeConfig.from_dict(whole)
    except ValueError as error:
        assert str(error)


# Files


def test_an_invalid_field_of_a_file_is_reported_behind_its_path(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(with_factors(1.0, 2.0, math.nan, 3.0)))
    with pytest.raises(ValueError) as caught:
        LongRopeConfig.load(path)
    assert str(caught.value).startswith(f"{path}: factor_sets[1].rescale_factors[2] is NaN")


@st.composite
def configs(draw, start_tokens=True) -> LongRopeConfig:
    dim = 2 * draw(st.integers(1, 8))
    original = draw(st.integers(2, 8192))
    lengths = sorted(draw(st.sets(st.integers(1, 2**21), min_size=1, max_size=4)))
    bound = 2.0 * max(lengths[-1] / original, 1.0)
    factors = st.lists(st.floats(1.0, bound), min_size=dim // 2, max_size=dim // 2)
    origin = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(), max_size=2)
    sets = [
        FactorSet(
            length,
            tuple(sorted(draw(factors))),
            draw(st.integers(0, 256)) if start_tokens else 0,
            draw(origin),
        )
        for length in lengths
    ]
    return LongRopeConfig(
        rotary_base=draw(st.floats(1.5, 1e8)),
        rotary_dim=dim,
        original_max_position_embeddings=original,
        factor_sets=tuple(sets),
        attention_factor=draw(st.none() | st.floats(0.5, 4.0)),
        attention_factor_policy=draw(st.sampled_from(["su", "yarn", "none"])),
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_a_saved_configuration_loads_as_itself(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("round_trip", numbered=True) / "a.json"
    config.save(path)
    assert LongRopeConfig.load(path) == config
    value = config.to_dict()
    assert LongRopeConfig.from_dict(value) == config and value == config.to_dict()


# Windows


@pytest.mark.parametrize(
    ("length", "max_length"),
    [(1, 4096), (4095, 4096), (4096, 4096), (4097, 131072), (131071, 131072), (131072, 131072)],
)
def test_a_sequence_uses_the_smallest_set_that_covers_it(length, max_length):
    assert LongRopeConfig.from_dict(payload()).factor_set_for(length).max_length == max_length


def test_a_sequence_one_token_over_the_largest_set_is_refused():
    with pytest.raises(ValueError) as caught:
        LongRopeConfig.from_dict(payload()).factor_set_for(131073)
    assert str(caught.value) == (
        "sequence length 131073 exceeds 131072, the max_length of the largest factor set; "
        "search factors for the longer window or shorten the sequence"
    )


def test_every_sequence_of_a_window_has_the_attention_factor_of_the_window():
    config = exportable(attention_factor=None)
    assert config.attention_factor_for(1) == config.attention_factor_for(4096) == 1.0
    assert config.attention_factor_for(4097) == config.attention_factor_for(131072) > 1.19


def test_a_given_attention_factor_overrides_the_policy_in_every_window():
    config = exportable(attention_factor=1.125, attention_factor_policy="yarn")
    assert [config.attention_factor_for(length) for length in (1, 4096, 131072)] == [1.125] * 3


def test_a_new_factor_set_is_inserted_in_order():
    config = exportable().with_factor_set(FactorSet(8192, (1.0, 1.0, 1.0, 2.0)))
    assert [item.max_length for item in config.factor_sets] == [4096, 8192, 131072]


def test_a_new_factor_set_replaces_the_one_of_the_same_length():
    old = exportable()
    new = old.with_factor_set(FactorSet(131072, (1.0, 2.0, 3.0, 4.0)))
    assert [item.rescale_factors for item in new.factor_sets] == [SHORT, (1.0, 2.0, 3.0, 4.0)]
    assert old == exportable()


def test_plain_rope_is_one_all_ones_set_of_the_original_window():
    config = identity_config(10000.0, DIM, 4096)
    assert config.factor_sets[0].is_identity
    assert config.max_length == 4096
    assert config.attention_factor_for(4096) == 1.0
    assert not FactorSet(4096, (1.0, 1.0 + 1e-12)).is_identity


def test_lists_given_to_the_constructor_become_tuples():
    config = exportable(factor_sets=[FactorSet(4096, list(SHORT)), FactorSet(131072, list(LONG))])
    assert config == exportable()


# Hugging Face


def test_an_export_holds_both_spellings_with_the_same_values():
    value = exportable().to_hf()
    assert value["max_position_embeddings"] == 131072
    assert value["original_max_position_embeddings"] == 4096
    assert value["rope_theta"] == 10000.0
    assert value["rope_scaling"] == {
        "rope_type": "longrope",
        "factor": 32.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 4096,
        "short_factor": list(SHORT),
        "long_factor": list(LONG),
    }
    assert value["rope_parameters"] == {**value["rope_scaling"], "rope_theta": 10000.0}
    json.dumps(value, allow_nan=False)


@pytest.mark.parametrize("dropped", ["rope_scaling", "rope_parameters", None])
def test_an_export_reads_back_in_either_spelling(dropped):
    value = exportable().to_hf()
    value.pop(dropped, None)
    if dropped == "rope_scaling":
        del value["rope_theta"]  # transformers 5 keeps it within rope_parameters only
    config = LongRopeConfig.from_hf(json.loads(json.dumps(value)))
    origin = {"source": "hf"}
    assert config == exportable(
        factor_sets=(FactorSet(4096, SHORT, 0, origin), FactorSet(131072, LONG, 0, origin))
    )


@settings(max_examples=60, deadline=None)
@given(config=configs(start_tokens=False), spelling=st.sampled_from(["scaling", "parameters"]))
def test_an_export_of_any_configuration_reads_back_with_the_same_rotations(config, spelling):
    original = config.original_max_position_embeddings
    if config.max_length <= original:
        return
    config = replace(config, attention_factor=config.attention_factor_for(config.max_length))
    value = config.to_hf()
    del value["rope_" + ("parameters" if spelling == "scaling" else "scaling")]
    back = LongRopeConfig.from_hf(value)
    assert back.rotary_base == config.rotary_base
    for length in (original, config.max_length):
        ours, theirs = config.factor_set_for(length), back.factor_set_for(length)
        assert ours.rescale_factors == theirs.rescale_factors
        assert config.attention_factor_for(length) == back.attention_factor_for(length)


def test_an_export_can_choose_its_two_windows():
    config = exportable().with_factor_set(FactorSet(16384, (1.0, 1.0, 2.0, 4.0)))
    value = config.to_hf(short_length=4096, long_length=16384)
    assert value["max_position_embeddings"] == 16384
    assert value["rope_scaling"]["factor"] == 4.0
    assert value["rope_scaling"]["long_factor"] == [1.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(("index", "name"), [(0, "short"), (1, "long")])
def test_start_tokens_are_refused_at_export(index, name):
    sets = list(exportable().factor_sets)
    factors = (1.0, 1.5, 2.0, 4.0)
    sets[index] = replace(sets[index], num_start_tokens=4, rescale_factors=factors)
    with pytest.raises(ValueError) as caught:
        exportable(factor_sets=sets).to_hf()
    assert str(caught.value) == (
        f"the {name} factor set (max_length {sets[index].max_length}) has num_start_tokens 4; "
        "transformers' longrope cannot express start tokens, search again with --start-tokens 0, "
        "or export without them (convert to-hf --drop-start-tokens)"
    )


def test_start_tokens_of_a_set_of_ones_do_nothing_and_are_exported():
    long = exportable().factor_sets[1]
    ones, started = (FactorSet(4096, (1.0,) * (DIM // 2), count) for count in (0, 4))
    config = exportable(factor_sets=(started, long))
    assert config.to_hf() == exportable(factor_sets=(ones, long)).to_hf()


def test_differing_attention_factors_are_refused_at_export():
    with pytest.raises(ValueError) as caught:
        exportable(attention_factor=None).to_hf()
    assert str(caught.value).startswith(
        "attention factor 1 at 4096 tokens differs from 1.19024 at 131072; "
        "transformers applies one value to both windows, so give both the factors of 131072 "
        "(convert to-hf --short-length 131072), write attention_factor 1.19023"
    )
    value = exportable(attention_factor=None).attention_factor_for(131072)
    for remedied, short, factors in (
        (exportable(attention_factor=None), 131072, LONG),
        (exportable(attention_factor=value), None, exportable().factor_sets[0].rescale_factors),
    ):
        scaling = remedied.to_hf(short_length=short)["rope_scaling"]
        assert (scaling["short_factor"], scaling["attention_factor"]) == (list(factors), value)


def test_one_set_for_all_windows_has_one_attention_factor_and_is_exported():
    config = exportable(factor_sets=(FactorSet(131072, LONG),), attention_factor=None)
    value = config.to_hf()["rope_scaling"]
    assert value["short_factor"] == value["long_factor"] == list(LONG)
    assert value["attention_factor"] == pytest.approx(1.190238, abs=5e-7)


def test_a_long_window_below_the_original_one_is_refused_at_export():
    with pytest.raises(ValueError, match="long_length 2048 is below the original window 4096"):
        exportable().to_hf(long_length=2048)


def hf_without(key: str) -> dict:
    value = exportable().to_hf()
    for holder in (value, value["rope_scaling"], value["rope_parameters"]):
        holder.pop(key, None)
    return value


@pytest.mark.parametrize(
    "key",
    ["short_factor", "long_factor", "max_position_embeddings", "original_max_position_embeddings"],
)
def test_a_config_json_that_lacks_a_field_is_refused(key):
    with pytest.raises(ValueError, match=rf"config.json .*no {key}"):
        LongRopeConfig.from_hf(hf_without(key))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_a_config_json_of_another_rope_type_is_refused(value):
    with pytest.raises(ValueError, match=r"in config\.json is not longrope"):
        LongRopeConfig.from_hf(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("short_factor", 1.0),
        ("long_factor", None),
        ("long_factor", "abc"),
        ("max_position_embeddings", "131072"),
        ("original_max_position_embeddings", "4096"),
        ("original_max_position_embeddings", 0),
        ("attention_factor", "1.2"),
        ("attention_factor", True),
        ("factor", "32"),
        ("rope_theta", "10000"),
    ],
)
def test_a_config_json_field_of_a_wrong_type_is_refused_by_name(key, value):
    hf = exportable().to_hf()
    for holder in (hf, hf["rope_scaling"], hf["rope_parameters"]):
        if key in holder:
            holder[key] = value
    if key == "factor":
        del hf["rope_scaling"]["attention_factor"], hf["rope_parameters"]["attention_factor"]
    with pytest.raises(ValueError, match=rf"^{key} "):
        LongRopeConfig.from_hf(hf)


@pytest.mark.parametrize(("index", "key"), enumerate(["short_factor", "long_factor"]))
def test_factors_in_a_config_json_are_named_by_their_key(index, key):
    hf, unusual = exportable().to_hf(), (0.9978, 2.0, 1.5, 4.0)
    hf["rope_scaling"][key] = [1.0, 2.0]
    with pytest.raises(ValueError, match=rf"^{key} has 2 values; rotary_dim 8 needs 4$"):
        LongRopeConfig.from_hf(hf)
    hf["rope_scaling"][key] = list(unusual)
    with pytest.warns(UserWarning, match=rf"^config\.json: {key}\[0\] is 0\.9978, below 1, "):
        assert LongRopeConfig.from_hf(hf).factor_sets[index].rescale_factors == unusual


def test_transformers_rotates_as_an_export_says_and_what_it_saves_reads_back(tmp_path):
    """Of whole models: tests/unit/conversion/test_readers.py."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = exportable(rotary_base=500000.0)
    heads = {"hidden_size": 2 * DIM, "num_attention_heads": 2}
    LlamaConfig(**heads, **ours.to_hf()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert LongRopeConfig.from_hf(saved).to_hf() == ours.to_hf()
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    assert theirs.attention_scaling == ours.attention_factor
    for length in (4096, 4097, 4096):  # up to the original window, past it, and back
        theirs(torch.zeros(1), torch.arange(length)[None])
        factors = torch.tensor(ours.factor_set_for(length).rescale_factors, dtype=torch.float64)
        assert torch.equal(theirs.inv_freq, inv_freq_fp32(500000.0, DIM, factors))
