from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from megatron_longrope.recipe import graph


def stage(name, reads=(), writes=()):
    return SimpleNamespace(name=name, reads=list(reads), requires=(), writes=list(writes))


@st.composite
def stages(draw):
    """Stages that read from others of a hidden order, in a random one."""
    count = draw(st.integers(1, 7))
    made = [
        stage(
            f"s{n}",
            [f"out/{m}/file" for m in range(n) if draw(st.booleans())],
            [f"out/{n}"],
        )
        for n in range(count)
    ]
    return draw(st.permutations(made))


@given(stages())
def test_every_stage_comes_after_those_it_reads_from(written):
    ordered, needs = graph.order(written)
    assert sorted(item.name for item in ordered) == sorted(item.name for item in written)
    for number, item in enumerate(ordered):
        assert needs[item.name] == {f"s{path.split('/')[1]}" for path in item.reads}
        assert needs[item.name] <= {before.name for before in ordered[:number]}


@given(stages())
def test_upstream_and_downstream_are_each_others_inverse(written):
    _, needs = graph.order(written)
    for one in needs:
        assert one in graph.upstream([one], needs)
        assert {name for name in needs if one in graph.upstream([name], needs)} == (
            graph.downstream([one], needs)
        )


def test_names_that_begin_alike_do_not_overlap():
    assert graph.overlap("out/a", "out/a/b") and graph.overlap("out/../x", "x")
    assert not graph.overlap("out/a", "out/ab") and not graph.overlap("out/a.json", "out/a")


def test_inputs_inside_what_a_stage_writes_need_not_be_there(tmp_path):
    (tmp_path / "there").touch()
    reader = stage("r", [f"{tmp_path}/there", f"{tmp_path}/made/x", f"{tmp_path}/absent"])
    writer = stage("w", writes=[f"{tmp_path}/made"])
    assert graph.missing_inputs([reader, writer], [reader, writer]) == {"r": [f"{tmp_path}/absent"]}
