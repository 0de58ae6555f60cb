"""The chunked loss equals an fp64 formula and Megatron's own loss, and never holds all logits."""

import json
from pathlib import Path

import launching
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_longrope import training_loss
from megatron_longrope.training_loss import chunked_linear_cross_entropy

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def inputs(tokens, batch, hidden, vocab, *, seed=0, dtype=torch.float32):
    """Hidden states [s, b, h], weights [V, h], labels [s, b] and the gradient of every loss."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, batch, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(dtype)
    labels = torch.randint(0, vocab, (tokens, batch), generator=generator)
    grad = torch.rand(tokens, batch, generator=generator) / (tokens * batch)
    return states.requires_grad_(), weight.requires_grad_(), labels, grad


def fp64_formula(states, weight, labels, grad):
    """Losses and both gradients by plain PyTorch in fp64."""
    states, weight = (x.detach().double().requires_grad_() for x in (states, weight))
    losses = F.cross_entropy((states @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(labels.shape)
    return losses, *torch.autograd.grad(losses, (states, weight), grad.double())


def chunked(states, weight, labels, grad, **options):
    losses = chunked_linear_cross_entropy(states, weight, labels, **options)
    return losses, *torch.autograd.grad(losses, (states, weight), grad.to(losses.dtype))


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


# Against the formula


@pytest.mark.one_release
@given(
    tokens=st.integers(1, 24),
    batch=st.integers(1, 3),
    hidden=st.integers(1, 12),
    vocab=st.integers(1, 40),
    chunk=st.integers(1, 80),
    seed=st.integers(0, 2**16),
)
def test_losses_and_gradients_equal_the_formula_whatever_the_shapes(
    tokens, batch, hidden, vocab, chunk, seed
):
    given_ = inputs(tokens, batch, hidden, vocab, seed=seed)
    for ours, exact in zip(
        chunked(*given_, chunk_tokens=chunk), fp64_formula(*given_), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.one_release
def test_the_gradient_is_that_of_the_function():
    states, weight, labels, _ = inputs(5, 2, 3, 7, dtype=torch.float64)

    def losses(states, weight):
        return chunked_linear_cross_entropy(states, weight, labels, chunk_tokens=3)

    assert torch.autograd.gradcheck(losses, (states, weight))


@pytest.mark.one_release
def test_logits_far_from_zero_neither_overflow_nor_vanish():
    states, weight, labels, grad = inputs(6, 1, 4, 9)
    given_ = ((states * 500).detach().requires_grad_(), weight, labels, grad)
    for ours, exact in zip(chunked(*given_, chunk_tokens=4), fp64_formula(*given_), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.one_release
def test_only_the_gradients_that_are_asked_for_are_computed():
    states, weight, labels, grad = inputs(6, 2, 4, 9)
    both = chunked(states, weight, labels, grad, chunk_tokens=5)
    frozen = chunked_linear_cross_entropy(states, weight.detach(), labels, chunk_tokens=5)
    (alone,) = torch.autograd.grad(frozen, states, grad)
    torch.testing.assert_close(alone, both[1], rtol=0, atol=0)
    probe = chunked_linear_cross_entropy(states.detach(), weight, labels, chunk_tokens=5)
    (alone,) = torch.autograd.grad(probe, weight, grad)
    torch.testing.assert_close(alone, both[2], rtol=0, atol=0)


@pytest.mark.one_release
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens 0 is below 1"),
        ({"labels": torch.zeros(5, 1, dtype=torch.long)}, r"labels \(5, 1\) and weight \(9, 4\)"),
        ({"weight": torch.zeros(9, 5)}, r"do not fit hidden states \(6, 1, 4\) on each of 1 rank"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    states, weight, labels, _ = inputs(6, 1, 4, 9)
    values = {"hidden": states, "weight": weight, "labels": labels, **change}
    with pytest.raises(ValueError, match=sentence):
        chunked_linear_cross_entropy(**values)


# Against Megatron's output layer and loss


@pytest.fixture
def megatron():
    """Process groups of one rank."""
    pytest.importorskip("megatron.training")
    from megatron_longrope.engine import process_groups

    process_groups.initialize()


def stock(states, weight, labels, grad):
    """Megatron's column-parallel product and vocabulary-parallel loss."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, vocab_parallel_cross_entropy

    logits = layers.linear_with_grad_accumulation_and_async_allreduce(
        states,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    losses = vocab_parallel_cross_entropy(logits, labels)
    return losses, *torch.autograd.grad(losses, (states, weight), grad)


@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_fp32_losses_and_gradients_equal_megatrons(megatron, chunk):
    given_ = inputs(24, 2, 16, 96)
    for ours, theirs in zip(chunked(*given_, chunk_tokens=chunk), stock(*given_), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_formula_as_megatron(megatron, dtype):
    given_ = inputs(48, 2, 16, 96, dtype=dtype)
    results = (chunked(*given_, chunk_tokens=10), stock(*given_), fp64_formula(*given_))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
        assert error <= 1.5 * allowed
    losses, theirs = results[0][0], results[1][0]
    torch.testing.assert_close(losses, theirs, **EXACT)


def test_a_label_outside_the_vocabulary_has_megatrons_loss_and_gradient(megatron):
    states, weight, labels, grad = inputs(6, 1, 4, 9)
    labels[2], labels[4] = -100, 9
    given_ = (states, weight, labels, grad)
    for ours, theirs in zip(chunked(*given_, chunk_tokens=4), stock(*given_), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


# Gradient accumulation fusion


@pytest.mark.one_release
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_main_gradient_grows_by_what_would_be_returned(monkeypatch, dtype):
    monkeypatch.setattr(training_loss, "_PARTIAL_ELEMENTS", 50)  # three rows of 16 at a time
    states, weight, labels, grad = inputs(24, 1, 16, 40, dtype=dtype)
    expected = fp64_formula(states, weight, labels, grad)[2]
    main_grad = torch.full((40, 16), 0.5)
    losses = chunked_linear_cross_entropy(
        states, weight, labels, chunk_tokens=5, main_grad=main_grad
    )
    weight.grad_added_to_main_grad = False
    losses.backward(grad)
    assert weight.grad_added_to_main_grad
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2 * expected.abs().max().item()
    torch.testing.assert_close(main_grad.double() - 0.5, expected, rtol=0, atol=tolerance)


@pytest.mark.one_release
@pytest.mark.parametrize("chunks", [1, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_main_gradient_in_half_precision_is_rounded_once_for_a_micro_batch(dtype, chunks):
    states, weight, labels, grad = inputs(128, 1, 16, 40, dtype=dtype)
    before = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    total, main_grad = torch.zeros(40, 16), before.clone()
    for place in (total, main_grad):
        chunked_linear_cross_entropy(
            states, weight, labels, chunk_tokens=128 // chunks, main_grad=place
        ).backward(grad * 128)
    assert torch.equal(main_grad, (before.float() + total).to(dtype))


@pytest.mark.one_release
def test_a_tied_weights_dummy_gradient_is_zero_and_without_hooks_there_is_none():
    states, weight, labels, grad = inputs(4, 1, 3, 5)
    main_grad = torch.zeros(5, 3)
    chunked_linear_cross_entropy(states, weight, labels, main_grad=main_grad).backward(grad)
    assert weight.grad is None
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    chunked_linear_cross_entropy(states, weight, labels, main_grad=main_grad).backward(grad)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


# Memory


def test_no_tensor_is_larger_than_a_chunks_logits(megatron):
    tokens, hidden, vocab, chunk = 256, 8, 512, 16
    given_ = inputs(tokens, 1, hidden, vocab)
    with LargestTensor() as ours:
        chunked(*given_, chunk_tokens=chunk)
    with LargestTensor() as theirs:
        stock(*given_)
    assert theirs.elements == tokens * vocab
    assert ours.elements == chunk * vocab


@pytest.mark.one_release
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_does_not_depend_on_the_vocabulary(dtype):
    kept: list[torch.Tensor] = []
    states, weight, labels, _ = inputs(64, 2, 8, 512, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chunked_linear_cross_entropy(states, weight, labels, chunk_tokens=16)
    own = [x for x in kept if x.data_ptr() not in (states.data_ptr(), weight.data_ptr())]
    assert sum(x.numel() for x in own) == 2 * 128  # labels and the softmax's denominators


# The benchmark


@pytest.mark.slow
@pytest.mark.release  # it starts a process for every peak of memory
def test_the_benchmark_ends_with_its_result():
    pytest.importorskip("megatron.training")
    script = Path(__file__).parents[2] / "benchmarks" / "training_loss.py"
    sizes = ("--tokens", "256", "--chunk", "16", "--vocabularies", "8000", "--repeats", "1")
    done = launching.python(script, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "training_loss"
    assert result["time_ratio"] > 0
    # Memory is no matter of speed: (16 + 256) / (256 + 256) by the formula.
    assert result["ratio"] < 0.8
