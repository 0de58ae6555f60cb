"""The command line of a GPU run, made fit for the CPU."""

import multiprocessing
import time

import pytest

from megatron_longrope.integration.cpu_host import (
    DROPPED,
    SUPPLIED,
    cpu_arguments,
    start_results_server,
)

ALL_SUPPLIED = [word for flag, value in SUPPLIED.items() for word in (flag, *value)]


def test_an_empty_command_line_is_supplied_with_everything():
    result = cpu_arguments([])
    assert result.arguments == result.supplied == ALL_SUPPLIED
    assert result.dropped == []


def test_the_model_and_training_flags_stay_in_their_order():
    model = ["--num-layers", "2", "--swiglu", "--seq-length=128", "--load", "a=b"]
    assert cpu_arguments(model).arguments == model + ALL_SUPPLIED


@pytest.mark.parametrize("flag", DROPPED)
def test_each_flag_that_needs_cuda_is_dropped_with_its_values(flag):
    values = ["value"] * abs(DROPPED[flag])
    result = cpu_arguments(["--num-layers", "2", flag, *values, "--swiglu"])
    assert result.arguments == ["--num-layers", "2", "--swiglu", *ALL_SUPPLIED]
    assert result.dropped == [flag, *values]


def test_flags_spelled_with_an_equals_sign_are_dropped_whole():
    result = cpu_arguments(["--attention-backend=flash", "--swiglu", "--cp-comm-type=a2a"])
    assert result.arguments == ["--swiglu", *ALL_SUPPLIED]
    assert result.dropped == ["--attention-backend=flash", "--cp-comm-type=a2a"]


def test_a_flag_with_several_values_is_dropped_with_all_of_them():
    result = cpu_arguments(["--cp-comm-type", "p2p", "a2a", "--swiglu"])
    assert result.arguments == ["--swiglu", *ALL_SUPPLIED]
    assert result.dropped == ["--cp-comm-type", "p2p", "a2a"]
    assert cpu_arguments(["--cp-comm-type", "p2p", "a2a"]).arguments == ALL_SUPPLIED


@pytest.mark.parametrize("flag", SUPPLIED)
def test_a_supplied_flag_that_is_already_there_is_not_repeated(flag):
    given = [flag, *SUPPLIED[flag]]
    result = cpu_arguments(given)
    assert result.arguments[: len(given)] == given
    assert sorted(result.arguments) == sorted(ALL_SUPPLIED)
    assert flag not in result.supplied
    assert result.dropped == []


def test_a_supplied_flag_with_another_value_is_replaced():
    gpu = ["--transformer-impl", "transformer_engine", "--distributed-backend=nccl"]
    result = cpu_arguments([*gpu, "--num-workers", "8"])
    assert result.arguments == ALL_SUPPLIED
    assert result.dropped == [*gpu, "--num-workers", "8"]


def test_a_supplied_value_spelled_with_an_equals_sign_stays():
    result = cpu_arguments(["--transformer-impl=local", "--num-workers=0"])
    assert result.dropped == []
    assert result.arguments[:2] == ["--transformer-impl=local", "--num-workers=0"]
    assert "--transformer-impl" not in result.supplied


def test_the_last_of_two_values_cannot_win_over_the_supplied_one():
    result = cpu_arguments(["--num-workers", "0", "--num-workers", "8"])
    assert result.arguments.count("--num-workers") == 1
    assert result.dropped == ["--num-workers", "8"]


def test_doing_it_twice_changes_nothing():
    once = cpu_arguments(["--bf16", "--num-workers", "4", "--swiglu"])
    twice = cpu_arguments(once.arguments)
    assert twice.arguments == once.arguments
    assert twice.supplied == twice.dropped == []


def test_a_command_line_that_ends_in_a_flag_without_its_value_is_kept_for_megatron_to_refuse():
    assert "--num-layers" in cpu_arguments(["--num-layers"]).arguments
    assert cpu_arguments(["--attention-backend"]).dropped == ["--attention-backend"]


def test_the_log_says_what_changed():
    result = cpu_arguments(["--bf16", "--attention-backend", "flash"])
    assert result.describe().splitlines() == [
        f"> cpu: supplied {' '.join(ALL_SUPPLIED)}",
        "> cpu: dropped  --bf16 --attention-backend flash",
    ]
    assert cpu_arguments(ALL_SUPPLIED).describe() == "> cpu: supplied nothing"


def test_the_server_of_checkpoint_writers_is_there_before_a_save_and_ends_with_a_killed_training():
    # A process: it is killed, and what it has forked must end, too.
    context = multiprocessing.get_context("fork")
    said, says = context.Pipe(duplex=False)

    def train():
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        start_results_server()
        queue = filesystem_async.get_write_results_queue("spawn")
        queue.put("written")
        says.send((queue.get(), [child.pid for child in multiprocessing.active_children()]))
        time.sleep(600)

    training = context.Process(target=train)
    training.start()
    says.close()
    try:
        assert said.poll(300)
        written, (server,) = said.recv()
        assert written == "written" and server != training.pid
    finally:
        training.kill()
        training.join()
    # The server has the pipe's other end, too, which closes with the last process that holds it.
    with pytest.raises(EOFError):
        said.poll(60) and said.recv()
