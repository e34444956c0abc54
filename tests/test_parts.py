"""Writing in parts (variants/parts.py), with a stand-in for a model."""

import pytest

from textldm import Sampling
from variants.parts import write_in_parts
from variants.writers import Writer

EOT = 99


class Counting:
    """Continues a prompt by its length, counting up, to the end of a row or to 7, which ends a
    text. It notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, length, sampling, callback=None):
        self.asked.append((prompts, length, sampling))
        texts = []
        for prompt in prompts:
            room = length or 12 - len(prompt)
            text = list(range(len(prompt), len(prompt) + room))
            if 7 in text:
                text = text[: text.index(7)] + [EOT]
            texts.append(text)
        return texts


@pytest.fixture
def model():
    return Counting()


def parts_of(model, prompts, length, keep):
    writer = Writer("dit", model, dict(eot=EOT), 12)
    return write_in_parts(writer, prompts, length, Sampling(steps=3, seed=5), keep)


@pytest.mark.parametrize("keep", [1, 2, 3, 20])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_parts_together_are_what_a_sure_model_writes_at_once(model, keep, length):
    prompts = [[0], [0, 1, 2], [], list(range(9))]
    whole = model(prompts, length, None)
    assert parts_of(model, prompts, length, keep) == whole


def test_each_part_is_written_behind_those_before_it(model):
    parts_of(model, [[0, 1], list(range(10))], 0, 2)
    asked = [prompts for prompts, _, _ in model.asked]
    assert asked[0] == [[0, 1], list(range(10))]
    assert asked[1] == [[0, 1, 2, 3]], "the other row is full"
    assert asked[2] == [[0, 1, 2, 3, 4, 5]], "it ends there"
    assert len(asked) == 3


def test_the_length_is_what_is_left(model):
    parts_of(model, [[8]], 5, 2)
    assert [length for _, length, _ in model.asked] == [5, 3, 1]


def test_no_two_parts_share_noise(model):
    parts_of(model, [[8]], 5, 1)
    seeds = [sampling.seed for _, _, sampling in model.asked]
    assert len({seed for (seed,) in seeds}) == 5
    assert {sampling.steps for _, _, sampling in model.asked} == {3}
