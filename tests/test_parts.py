"""Writing in parts (variants/parts.py), with a stand-in for a model."""

import pytest

from textldm import Sampling
from variants.parts import write_in_parts
from variants.writers import Writer

EOT = 99


def count_up(prompts, length, sampling):
    """Continues a prompt by its length, counting up, to the end of a row or to 7, which ends a
    text."""
    texts = []
    for prompt in prompts:
        end = len(prompt) + length if length else 12
        text = list(range(len(prompt), end))
        if 7 in text:
            text = text[: text.index(7)] + [EOT]
        texts.append(text)
    return texts


def parts_of(prompts, length, keep, sampling):
    """The texts, and what the model was asked for."""
    asked = []

    def sample(*given):
        asked.append(given)
        return count_up(*given)

    writer = Writer("dit", sample, dict(eot=EOT), 12)
    return write_in_parts(writer, prompts, length, sampling, keep), asked


@pytest.mark.parametrize("keep", [1, 2, 3, 20])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_parts_together_are_what_a_sure_model_writes_at_once(keep, length):
    prompts = [[0], [0, 1, 2], [], list(range(9))]
    texts, _ = parts_of(prompts, length, keep, Sampling())
    assert texts == count_up(prompts, length, None)


def test_each_part_is_written_behind_those_before_it_until_its_row_is_full_or_its_text_ends():
    full = list(range(10))
    _, asked = parts_of([full, [0, 1]], 0, 2, Sampling(steps=3, seed=[1, 2]))
    assert asked == [
        ([full, [0, 1]], 0, Sampling(steps=3, seed=[1, 2])),
        ([[0, 1, 2, 3]], 0, Sampling(steps=3, seed=[2_000_008])),
        ([[0, 1, 2, 3, 4, 5]], 0, Sampling(steps=3, seed=[4_000_014])),
    ]


def test_a_part_has_the_length_that_is_left_and_noise_of_its_own():
    _, asked = parts_of([[8]], 5, 2, Sampling(seed=[2**32 - 1]))
    found = [(length, sampling.seed) for _, length, sampling in asked]
    assert found == [(5, [2**32 - 1]), (3, [2_000_005]), (1, [4_000_011])]
