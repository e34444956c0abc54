"""A judge of another kind than the models: it counts words.

A sibling of the models may flatter its siblings. This judge is an interpolated n-gram model of the
training text, which knows the two words before and nothing else.
"""

import math
from collections import Counter

import numpy as np
import regex  # tiktoken depends on it too

# Scripts without spaces between words: there each character is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = rf"(?V1)[[{UNSPACED}]--\p{{M}}]\p{{M}}*|[[\w\p{{M}}]--[{UNSPACED}]]+"
WORDS = 2_000_000  # of the training text, at most
WORD_ORDER = 3
CHARACTER_ORDER = 5
END = None  # the end of a text or a word


class Counts:
    """p(symbol | the symbols before it), interpolated over the lengths of what is before, as Witten
    and Bell (1991) do: a context that many different symbols have followed tells less.

    base(symbol) is the probability without any count."""

    def __init__(self, sequences, order, base):
        self.order = order
        self.base = base
        self.of_pair = Counter()  # (context, symbol): occurrences
        for sequence in sequences:
            for i, symbol in enumerate(sequence):
                for n in range(min(i, order - 1) + 1):
                    self.of_pair[sequence[i - n : i], symbol] += 1
        self.of_context = Counter()
        self.different = Counter()  # symbols that have followed a context
        for (context, _), count in self.of_pair.items():
            self.of_context[context] += count
            self.different[context] += 1

    def probability(self, sequence, i):
        """Of the symbol at place i of a tuple."""
        p = self.base(sequence[i])
        for n in range(min(i, self.order - 1) + 1):
            context = sequence[i - n : i]
            count, different = self.of_context[context], self.different[context]
            if not count:
                break
            p = (self.of_pair[context, sequence[i]] + different * p) / (count + different)
        return p


class WordModel:
    """An n-gram model of words. A word that the training text does not have is spelled by an n-gram
    model of characters, so every text has a probability."""

    def __init__(self, documents):
        """documents: an iterable of texts."""
        sequences = []
        size = 0
        for text in documents:
            sequences.append((*words_and_signs(text), END))
            size += len(sequences[-1])
            if size > WORDS:
                break
        known = {word for sequence in sequences for word in sequence if word is not END}
        spelled = [(*word, END) for word in known]
        self.letters = Counts(spelled, CHARACTER_ORDER, lambda character: 1 / 2**16)
        self.words = Counts(sequences, WORD_ORDER, self.spelling)

    def spelling(self, word):
        """The probability of a word without the words before it."""
        if word is END:
            return 1e-3
        spelled = (*word, END)
        p = math.prod(self.letters.probability(spelled, i) for i in range(len(spelled)))
        return max(p, 1e-300)

    def score(self, prompts, texts):
        """The negative log-likelihood of each (text, ended) after its prompt, in nats, and its
        number of words: two arrays (n,). A word that begins in the prompt counts, and so does the
        end of a text that ended."""
        nats = np.zeros(len(texts))
        count = np.zeros(len(texts), int)
        for k, (prompt, (text, ended)) in enumerate(zip(prompts, texts)):
            apart = len(words_and_signs(prompt)), len(words_and_signs(text))
            sequence = words_and_signs(prompt + text)
            # Only the last word of the prompt can go on in the text.
            first = apart[0] - (len(sequence) < sum(apart))
            sequence += (END,) * ended
            for i in range(first, len(sequence)):
                nats[k] -= math.log(self.words.probability(sequence, i))
            count[k] = len(sequence) - first
        return nats, count


def words_and_signs(text):
    """A tuple of the words and the other signs of a text."""
    return tuple(regex.findall(rf"{WORD}|[^\w\s]", text))
