"""Learns a byte-level BPE: the most frequent pair of adjacent tokens becomes one token, repeatedly.

The first tokens are the 256 bytes. Words are those of GPT2_SPLIT, and pairs lie inside words.
"""

import base64
import heapq
from array import array
from collections import Counter, defaultdict

import regex  # tiktoken depends on it too
from tqdm import tqdm

from engine.corpus import GPT2_SPLIT

BPE_SAMPLE = 32 << 20  # characters from which a BPE is learned
# Bytes of all different words. Books need less than 1 MB of it. In a language without spaces each
# sentence is another word: there a BPE of 4,096 tokens takes two minutes and 800 MB of memory.
WORD_SAMPLE = 8 << 20
NO_TOKEN = -1


def train_bpe(texts, vocab_size):
    """Learns a BPE from the first texts of an iterable: see BPE_SAMPLE and WORD_SAMPLE.

    Returns ranks and size. ranks holds the tokens in the file format of tiktoken: base64 and rank.
    size counts end-of-text too: it is vocab_size, or less if no other pair occurs twice.
    """
    words = Words(count_words(texts))
    for _ in tqdm(range(vocab_size - 257), desc="bpe", mininterval=1):
        if not (pair := words.most_frequent_pair()):
            break
        words.merge(pair)
    tokens = enumerate(words.tokens)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in tokens]
    return "".join(lines), len(words.tokens) + 1


def count_words(texts):
    """Returns a Counter of the words, as bytes, up to the first text that reaches a limit."""
    counts = Counter()
    characters = 0
    word_bytes = 0
    for text in texts:
        for word, count in Counter(regex.findall(GPT2_SPLIT, text)).items():
            word = word.encode("utf-8", "replace")  # UTF-8 cannot hold half of a surrogate pair
            if word not in counts:
                word_bytes += len(word)
            counts[word] += count
        characters += len(text)
        if characters > BPE_SAMPLE or word_bytes > WORD_SAMPLE:
            break
    return counts


class Words:
    """The different words of a text as tokens, and the frequencies of adjacent tokens.

    token, weight, before, after: each place has a token (NO_TOKEN between words), the frequency of
        its word, and two neighbours. A merge takes the place of its second token out of the chain.
    tokens: the bytes of each token. counts: how often each pair of tokens occurs in the text.
    places: where each pair occurs or once occurred, from left to right.
    heap: has an entry of each pair that occurs twice, with its count or a higher one.
    """

    def __init__(self, word_counts):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.token = array("i", [NO_TOKEN])
        self.weight = array("i", [0])
        for word, count in word_counts.items():
            self.token.extend([*word, NO_TOKEN])
            self.weight.extend([count] * (len(word) + 1))
        size = len(self.token)
        self.before = array("i", range(-1, size - 1))
        self.after = array("i", range(1, size + 1))
        self.counts = Counter()
        self.places = defaultdict(lambda: array("i"))
        self.heap = []
        for place in range(size - 1):
            self.count(place, 1)
        for pair in self.counts:
            self.push(pair)

    def count(self, place, sign):
        """Counts the pair at a place, or takes it back if sign is -1. Returns the pair."""
        pair = self.token[place], self.token[self.after[place]]
        if NO_TOKEN not in pair:
            self.counts[pair] += sign * self.weight[place]
            if sign > 0:
                self.places[pair].append(place)
        return pair

    def push(self, pair):
        """Puts a pair on the heap if it occurs twice. The heap returns its smallest entry."""
        if self.counts[pair] > 1:
            # Of equal counts the pair that is last in byte order is first.
            order = [[-byte for byte in self.tokens[token]] + [1] for token in pair]
            heapq.heappush(self.heap, (-self.counts[pair], order, pair))

    def most_frequent_pair(self):
        """Returns the most frequent pair, or None if no pair occurs twice."""
        while self.heap:
            negative_count, _, pair = heapq.heappop(self.heap)
            if self.counts[pair] == -negative_count:
                return pair
            self.push(pair)  # its count has fallen since
        return None

    def merge(self, pair):
        """Replaces a pair by one token in all words, from left to right."""
        new_pairs = set()
        for place in self.places.pop(pair):
            right = self.after[place]
            if (self.token[place], self.token[right]) != pair:
                continue  # a merge took one of them
            before = self.before[place]
            for changed in (before, place, right):
                self.count(changed, -1)
            self.token[place] = len(self.tokens)
            self.token[right] = NO_TOKEN
            self.after[place] = self.after[right]
            self.before[self.after[place]] = place
            new_pairs |= {self.count(before, 1), self.count(place, 1)}
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])
        for new_pair in new_pairs:
            self.push(new_pair)
