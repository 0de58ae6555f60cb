import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.recipe.values import Names, Text


def text(content, line=1):
    return Text(content, f"r.yaml:{line}: key")


def block(*lines):
    return tuple(text(line, number) for number, line in enumerate(lines, 10))


def names(**values):
    as_values = {
        name: text(value) if isinstance(value, str) else block(*value)
        for name, value in values.items()
    }
    return Names(as_values, {"output": "runs/x"})


def words(items, **values):
    return list(names(**values).words(block(*items)))


def test_items_are_split_before_names_are_put_in_so_that_values_may_hold_spaces():
    assert words(["--load ${base} --name 'a b'"], base="my disk/base") == [
        "--load", "my disk/base", "--name", "a b",
    ]  # fmt: skip


def test_a_block_is_spliced_in_where_an_item_is_exactly_its_name():
    model = ["--num-layers 32", "${width}"]
    found = words(["${model}", "--lr 1e-5"], model=model, width=["--hidden-size ${h}"], h="64")
    assert found == ["--num-layers", "32", "--hidden-size", "64", "--lr", "1e-5"]


def test_an_empty_block_leaves_nothing():
    assert words(["${extra}", "--x"], extra=[]) == ["--x"]


def test_a_word_that_is_an_empty_value_is_dropped_and_an_empty_quotation_is_kept():
    assert words(["${cpu} --name '' --x=${cpu}"], cpu="") == ["--name", "", "--x="]


def test_values_may_use_other_values_and_the_built_in_names():
    assert names(data="${root}/data", root="${output}/all").text(text("${data}.bin")) == (
        "runs/x/all/data.bin"
    )


def test_two_dollars_are_one():
    assert names().text(text("$${output} costs 5$$")) == "${output} costs 5$"


def test_texts_are_whole_lines_without_the_empty_ones():
    found = names(maybe="", more=["c d", "e"]).texts(block("a b", "${maybe}", "${more}"))
    assert found == ("a b", "c d", "e")


@pytest.mark.parametrize(
    ("items", "values", "message"),
    [
        (["${bse}"], {"base": "x"}, r"r.yaml:10: key: \$\{bse\} is not known; .*base, output"),
        (["--a ${b}"], {"b": ["x"]}, r"\$\{b\} is a list, which cannot stand in a text"),
        (["${a}"], {"a": "${b}", "b": "${a}"}, r"the value a uses itself \(a -> b -> a\)"),
        (["${a}"], {"a": ["${b}"], "b": ["${a}"]}, r"the value a uses itself \(a -> b -> a\)"),
        (["it's"], {}, 'a quotation in "it\'s" is not closed'),
        (["$HOME/x"], {}, r"a \$ in '\$HOME/x' begins no name"),
        (["${a b}"], {}, r"begins no name"),
    ],
)
def test_what_cannot_be_put_in_is_refused_with_its_place(items, values, message):
    with pytest.raises(ValueError, match=message):
        words(items, **values)


def test_an_error_inside_a_value_names_the_line_of_the_value():
    with pytest.raises(ValueError, match=r"^r.yaml:11: key: \$\{nowhere\}"):
        words(["${model}"], model=["--fine", "--x ${nowhere}"])


def test_values_are_checked_whether_they_are_used_or_not():
    with pytest.raises(ValueError, match="uses itself"):
        names(a="${b}", b="${a}").check()
    names(note="it's fine as a text").check()


@given(st.text(), st.text())
def test_a_value_is_one_word_whatever_is_in_it(first, second):
    values = {"a": text(first.replace("$", "$$")), "b": text(second.replace("$", "$$"))}
    found = Names(values, {}).words(block("--a=${a} ${b} end"))
    assert list(found) == [f"--a={first}", *([second] if second else []), "end"]
