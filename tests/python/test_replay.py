"""gptq.quantize computes each part of a block once, with the same result as if it began again for every layer."""

import gptq
import pytest
import torch
from small_models import MODELS, QUIET, codes_of, random, seeded
from torch import nn
from torch.nn import functional

WIDTH = 24
CALLS = [random(2, 9, WIDTH, seed=seed) for seed in range(3)]


class Counted(nn.Module):
    """GELU that counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.computed = 0

    def forward(self, x):
        self.computed += 1
        return functional.gelu(x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.act = Counted()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.third(torch.tanh(self.second(self.act(self.first(x)))))


class OutputIgnored(Plain):
    """A module that is called for what it does to its argument."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.first(x)
        self.act(h)
        return x + self.third(torch.tanh(self.second(h)))


class ChangedLater(Plain):
    """Outputs that are changed in place behind a later layer, one of them through an alias."""

    def __init__(self):
        super().__init__()
        self.alias = nn.Identity()

    def forward(self, x):
        h = self.first(x)
        alias = self.alias(h)
        y = self.second(self.act(h))
        alias += y
        h *= 0.5
        return x + self.third(h)


class CalledTwice(Plain):
    """A layer that is called before and behind another, which is quantized first."""

    def forward(self, x):
        h = self.first(torch.tanh(self.second(self.first(x))))
        return x + self.third(self.act(self.act(h)))


class Attention(Plain):
    def forward(self, x):
        q, k, v = self.first(x), self.second(x), self.third(x)
        return x + self.second(functional.scaled_dot_product_attention(q, k, v))


class Nested(nn.Module):
    """A block inside a module that is called twice, with lists and dicts between modules."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = Plain()

        def forward(self, items, *, names):
            return {"out": [self.plain(items[0]) * names["scale"]]}

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.inner([x], names={"scale": 0.5})["out"][0]
        return self.last(self.inner([h], names={"scale": 0.25})["out"][0])


BLOCKS = [Plain, OutputIgnored, ChangedLater, CalledTwice, Attention, Nested]


def chain(block, length=3):
    return seeded(lambda: nn.Sequential(*(block() for _ in range(length))))


@torch.jit.script
def scripted(x):
    return 2 * x


class Stacks(nn.Module):
    """Two chains of blocks, a layer between them and one behind; reads says what of the first chain is read later."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads
        self.first = nn.ModuleList(Plain() for _ in range(3))
        self.between = nn.Linear(WIDTH, WIDTH)
        self.second = nn.ModuleList(Plain() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        given = []
        for block in self.first:
            x = block(x)
            given.append(x)
        x = self.between(given[0] if self.reads == "input of a layer" else x)
        if self.reads == "sum":
            x = x + given[1]
        if self.reads == "script":
            x = x + scripted(given[1])
        for block in self.second:
            x = block(x)
        if self.reads == "in place":
            x += 1
        return self.head(x + given[2] if self.reads == "last" else x)


def stacks(reads):
    return seeded(lambda: Stacks(reads))


def quantized(model, calls, **options):
    gptq.quantize(model, calls, **QUIET, **options)
    return model


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert len(codes_of(model)) > 0
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", MODELS)
def test_models_come_out_as_if_nothing_was_kept(kind):
    make, calls = MODELS[kind]
    assert_same(quantized(make(), calls), quantized(make(), calls, activation_memory=0))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_come_out_as_if_nothing_was_kept(block):
    assert_same(quantized(chain(block), CALLS), quantized(chain(block), CALLS, activation_memory=0))


@pytest.mark.parametrize("memory", [1, 2 * 9 * WIDTH * 4, 5 * 2 * 9 * WIDTH * 4])
def test_little_memory_changes_nothing(memory):
    assert_same(quantized(chain(Plain), CALLS, activation_memory=memory), quantized(chain(Plain), CALLS))


def test_each_part_of_a_block_is_computed_once():
    model = chain(Plain)
    quantized(model, CALLS)
    # To see what runs when, and then of the float and of the quantized model.
    assert [block.act.computed for block in model] == [3 * len(CALLS)] * 3


def test_without_memory_parts_are_computed_for_each_layer_behind_them():
    model = chain(Plain)
    quantized(model, CALLS, activation_memory=0)
    # The same, but for the second layer, the third, and the next block, which the last one has not.
    assert [block.act.computed for block in model] == [7 * len(CALLS)] * 2 + [5 * len(CALLS)]


@pytest.mark.parametrize("reads", ["nothing", "last", "sum", "script", "input of a layer", "in place"])
def test_finished_chains_come_out_as_if_run_again(reads):
    assert_same(quantized(stacks(reads), CALLS), quantized(stacks(reads), CALLS, blockwise=False))


@pytest.mark.parametrize("reads, again", [("nothing", 0), ("last", 0), ("sum", 3)])
def test_finished_chains_are_run_again_only_where_their_blocks_are_read(reads, again):
    model = stacks(reads)
    quantized(model, CALLS)
    # Again: for what the second chain is called with in the quantized model, and for the head in both.
    assert [block.act.computed for block in model.first] == [(3 + again) * len(CALLS)] * 3


def test_modules_are_left_as_they_were():
    model = chain(Plain)
    quantized(model, CALLS)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forward_of_its_own_stays():
    model = chain(Plain)
    act = model[1].act
    act.forward = lambda x: functional.gelu(x) + 1
    own = act.forward
    expected = chain(Plain)
    expected[1].act.forward = own
    assert_same(quantized(model, CALLS), quantized(expected, CALLS, activation_memory=0))
    assert act.forward is own


def test_modules_are_left_as_they_were_by_an_error():
    model = chain(Plain)
    with torch.no_grad():
        model[2].first.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"2\.first"):
        quantized(model, CALLS)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("memory", [-1, 1.5, "1 GB", True])
def test_memory_must_be_a_number_of_bytes(memory):
    with pytest.raises(ValueError, match="activation_memory must be a whole number of bytes"):
        quantized(chain(Plain), CALLS, activation_memory=memory)
