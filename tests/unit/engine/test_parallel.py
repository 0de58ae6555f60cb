"""Token losses on several processes equal those of one."""

import dataclasses

import make_megatron_checkpoint as maker
import pytest
import torch
import torch.distributed as dist
from launching import spawn

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion.verify import random_tokens
from megatron_longrope.engine import load_engine, process_groups
from megatron_longrope.engine import mlp as mlp_module

WORLD = 4
LAYOUTS = ((1, 4), (2, 2), (2, 1), (1, 1))  # (tensor parallel, context parallel)
START = 37
RUN = "untied_gqa"


def tokens_of(replica: int) -> torch.Tensor:
    """Every copy of the model scores samples of its own."""
    seeds = (10 * replica, 10 * replica + 1)
    return torch.cat([random_tokens(maker.VOCAB, maker.LONG_TOKENS, seed) for seed in seeds])


def greedy_results(engine, tokens: torch.Tensor) -> dict[str, object]:
    """Greedy choices: of few positions and of most, which context parallelism treats apart."""
    return {
        "score": engine.score(tokens, START),
        "answer": engine.answer(tokens[:1], 5),
        "choices": engine.choices(tokens, torch.tensor([3, 150]), torch.tensor([[1, 249]] * 2)),
    }


def with_odd_vocabulary(path: str) -> MegatronCheckpoint:
    """The checkpoint as a Hugging Face folder would be: 249 tokens and no padding."""
    checkpoint = MegatronCheckpoint.open(path)
    odd = maker.VOCAB - 1
    checkpoint.shape = dataclasses.replace(checkpoint.shape, vocab_size=odd, padded_vocab_size=odd)
    return checkpoint


def odd_results(checkpoint: str, **layout: int) -> dict[str, torch.Tensor]:
    """Losses and greedy choices under a vocabulary that two ranks cannot halve."""
    engine = load_engine(
        with_odd_vocabulary(checkpoint),
        longrope_config=maker.longrope_config(),
        device="cpu",
        **layout,
    )
    tokens = tokens_of(0).clamp(max=maker.VOCAB - 2)
    return {"nll": engine.nll(tokens), "greedy": engine.score(tokens, START)[1]}


def run_rank(rank: int, directory: str, checkpoint: str) -> None:
    """One of four processes: all layouts, one after another."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD
    )
    mlp_module._TOKENS_PER_SLICE = 14  # of two samples seven positions
    results = {}
    for tensor_parallel, context_parallel in LAYOUTS:
        engine = load_engine(
            checkpoint,
            longrope_config=maker.longrope_config(),
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            device="cpu",
            replicas=True,
        )
        tokens = tokens_of(engine.replica[0])
        results[tensor_parallel, context_parallel] = {
            "replica": engine.replica,
            "of replicas": process_groups.gather_from_replicas(engine.replica[0]),
            "nll": engine.nll(tokens),
            "from start": engine.nll(tokens, START),
            **greedy_results(engine, tokens),
        }
        parallel_state.destroy_model_parallel()
    results["odd vocabulary"] = odd_results(checkpoint, tensor_parallel=2, context_parallel=2)
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, megatron_runs):
    """What every rank computed, in rank order."""
    directory = tmp_path_factory.mktemp("gloo")
    spawn(run_rank, (str(directory), str(megatron_runs[RUN].path)), WORLD)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one_process(megatron_runs):
    engine = load_engine(
        megatron_runs[RUN].path, longrope_config=maker.longrope_config(), device="cpu"
    )
    assert engine.replica == (0, 1)
    samples = [tokens_of(replica) for replica in range(WORLD)]
    return [{"nll": engine.nll(tokens), **greedy_results(engine, tokens)} for tokens in samples]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_losses_of_one_process(ranks, one_process, layout):
    for rank, results in enumerate(ranks):
        result = results[layout]
        replica = rank // (layout[0] * layout[1])
        assert result["replica"] == (replica, WORLD // (layout[0] * layout[1]))
        assert result["of replicas"] == list(range(result["replica"][1]))
        theirs = one_process[replica]["nll"]
        torch.testing.assert_close(result["nll"], theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(result["from start"], theirs[:, START:], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_greedy_choices_of_one_process(ranks, one_process, layout):
    for rank, results in enumerate(ranks):
        ours, theirs = results[layout], one_process[rank // (layout[0] * layout[1])]
        torch.testing.assert_close(ours["score"][0], theirs["score"][0], atol=1e-5, rtol=0)
        assert torch.equal(ours["score"][1], theirs["score"][1])
        torch.testing.assert_close(ours["choices"], theirs["choices"], atol=1e-5, rtol=0)
        assert ours["answer"].predicted == theirs["answer"].predicted
        assert ours["answer"].nll == pytest.approx(theirs["answer"].nll, abs=1e-5)


@pytest.mark.slow
def test_a_vocabulary_that_the_ranks_cannot_share_evenly_is_padded(ranks, megatron_runs):
    theirs = odd_results(str(megatron_runs[RUN].path))
    for results in ranks:
        ours = results["odd vocabulary"]
        torch.testing.assert_close(ours["nll"], theirs["nll"], atol=1e-5, rtol=0)
        assert torch.equal(ours["greedy"], theirs["greedy"])


# How many processes fit


@dataclasses.dataclass
class World:
    """A number of processes that nobody has to start."""

    size: int


@pytest.fixture
def world(monkeypatch):
    process_groups.initialize()
    world = World(1)
    monkeypatch.setattr(process_groups.dist, "get_world_size", lambda: world.size)
    return world


@pytest.mark.parametrize(
    ("size", "layout", "replicas", "message"),
    [
        (8, (2, 2), False, "8 processes do not fit .* 2 x .* 2 = 4; .* --nproc-per-node 4"),
        (6, (2, 2), True, "6 processes do not fit copies of .* = 4; .* is a multiple of 4"),
        (2, (1, 2), True, "already runs tensor x context parallel 1 x 1"),
    ],
)
def test_processes_that_do_not_fit_the_layout_are_refused(world, size, layout, replicas, message):
    world.size = size
    with pytest.raises(ValueError, match=message):
        process_groups.initialize(*layout, replicas=replicas)


def test_a_rank_waits_longer_for_the_others_results_than_a_pass_over_millions_of_tokens(
    world, monkeypatch
):
    groups = []

    def exchange(values, *_, group=None, **__):
        groups.append(group._get_backend(torch.device("cpu")))

    process_groups._patient_group.cache_clear()
    process_groups._patient_group(dist.group.WORLD)  # with the one process that there is
    world.size = 2
    monkeypatch.setattr(process_groups, "replica", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_gather_object", exchange)
    monkeypatch.setattr(dist, "broadcast_object_list", exchange)
    process_groups.gather_from_replicas("a loss")
    process_groups.from_first_rank("a decision")
    assert [(group.name(), group.options._timeout.days) for group in groups] == [("gloo", 30)] * 2
