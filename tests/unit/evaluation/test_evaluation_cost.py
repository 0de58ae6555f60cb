"""What an evaluation is said to take, against a machine whose speeds are known."""

import random
from types import SimpleNamespace

import pytest

from megatron_longrope.evaluation.cost import fit_speed, measure_speed, measure_steps
from megatron_longrope.flops import forward_flops

# SmolLM2-135M.
SHAPE = SimpleNamespace(
    num_attention_heads=9, head_dim=64, num_query_groups=3, hidden_size=576, ffn_hidden_size=1536,
    num_layers=30, vocab_size=49152, hybrid_layer_pattern=None, num_experts=None,
)  # fmt: skip
LENGTHS = (4096, 8192, 16384, 32768)


class Machine:
    """Runs both kinds of operations at rates of their own, with some noise and an overhead."""

    def __init__(self, weights, attention, noise=0.0, overhead=0.0):
        self.rates, self.noise, self.overhead = (weights, attention), noise, overhead
        self.rng, self.spent, self.lengths = random.Random(1), 0.0, []

    def exact(self, length):
        parts = zip(forward_flops(SHAPE, length), self.rates, strict=True)
        return self.overhead + sum(flops / rate for flops, rate in parts)

    def __call__(self, length):
        seconds = self.exact(length) * (1 + self.rng.uniform(0, self.noise))
        self.spent += seconds
        self.lengths.append(length)
        return seconds


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention", [2e9, 2e10, 1e11], ids=["slow", "usual", "fast"])
@pytest.mark.parametrize("count", [1, 10, 100])
def test_the_estimate_is_within_a_fifth_of_what_it_takes(length, attention, count):
    machine = Machine(6e10, attention, noise=0.03, overhead=0.02)
    speed = measure_speed(machine, SHAPE, {length: count})
    taken = sum(machine(length) for _ in range(count))
    assert count * speed.forward(SHAPE, length) == pytest.approx(taken, rel=0.2)


def test_trial_passes_cost_little_of_what_is_to_come():
    machine = Machine(6e12, 2e12)
    measure_speed(machine, SHAPE, {32768: 20})
    assert machine.spent < 0.15 * 20 * machine.exact(32768)
    assert machine.lengths == [n for n in (512, 1024, 2048, 4096, 8192, 16384) for _ in range(2)]


def test_a_pass_that_takes_minutes_is_not_tried():
    slow = Machine(6e7, 6e7)  # a 7B model on a CPU: 512 tokens take minutes
    measure_speed(slow, SHAPE, {131072: 1000})
    assert set(slow.lengths) == {512, 1024}


def test_lengths_suit_context_parallelism():
    machine = Machine(6e12, 2e12)
    measure_speed(machine, SHAPE, {4100: 1000}, step=24)
    assert all(length % 24 == 0 for length in machine.lengths) and max(machine.lengths) == 4080


def test_noise_cannot_make_a_speed_negative():
    """The longer pass took less for each token: nothing is known of attention."""
    speed = fit_speed({1024: 2.0, 2048: 1.0}, SHAPE)
    assert speed.weights == speed.attention > 0
    assert speed.forward(SHAPE, 2048) == pytest.approx(1.0)


def test_generated_tokens_are_counted_apart():
    def run(prompt, new):
        return 5.0 + prompt * 1e-3 + new * (0.1 + prompt * 1e-5)

    steps = measure_steps(run, (1000, 4000))
    assert steps.step(32768) == pytest.approx(0.1 + 0.32768)
    assert measure_steps(run, (1000, 1000)).step(9000) == pytest.approx(0.11)
