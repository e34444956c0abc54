"""Writing in parts (variants/parts.py), with a stand-in for a model."""

from textldm import Sampling
from variants.parts import write_in_parts
from variants.writers import Writer


def parts_of(prompts, length, keep, sampling):
    """The texts, and what the model was asked for. It counts up from the length of a prompt, to
    the end of a row or to 7, which ends a text."""
    asked = []

    def sample(prompts, length, sampling):
        asked.append((prompts, length, sampling))
        texts = []
        for prompt in prompts:
            text = list(range(len(prompt), len(prompt) + length if length else 12))
            texts.append(text[: text.index(7)] + [99] if 7 in text else text)
        return texts

    writer = Writer("dit", sample, dict(eot=99), 12)
    return write_in_parts(writer, prompts, length, sampling, keep), asked


def test_each_part_is_written_behind_those_before_it_until_its_row_is_full_or_its_text_ends():
    full = list(range(10))
    texts, asked = parts_of([full, [0, 1]], 0, 2, Sampling(steps=3, seed=[1, 2]))
    assert texts == [[10, 11], [2, 3, 4, 5, 6, 99]]
    assert asked == [
        ([full, [0, 1]], 0, Sampling(steps=3, seed=[1, 2])),
        ([[0, 1, 2, 3]], 0, Sampling(steps=3, seed=[2_000_008])),
        ([[0, 1, 2, 3, 4, 5]], 0, Sampling(steps=3, seed=[4_000_014])),
    ]


def test_a_part_has_the_length_that_is_left_and_noise_of_its_own():
    texts, asked = parts_of([[], [0] * 9], 5, 2, Sampling(seed=[0, 2**32 - 1]))
    assert texts == [[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]]
    found = [(length, sampling.seed[1]) for _, length, sampling in asked]
    assert found == [(5, 2**32 - 1), (3, 2_000_005), (1, 4_000_011)]
