"""Learns a byte-level BPE: the most frequent pair of adjacent tokens becomes one token, repeatedly.

The first tokens are the 256 bytes. Words are those of GPT2_SPLIT, and pairs lie inside words.

Two merges never give the same bytes. Take a piece of a word that is one token in the end. No merge
crosses its borders, so each merge does the same in it as in any other such piece of the same bytes.
These pieces thus all become one token in the same merge.
"""

import base64
import collections
import heapq

import numpy as np
import regex  # tiktoken depends on it too
from tqdm import tqdm

from engine.corpus import GPT2_SPLIT

BPE_SAMPLE = 32 << 20  # characters from which a BPE is learned
# Bytes of all different words. Books need less than 1 MB of it. In a language without spaces each
# sentence is another word, and without this limit time and memory would grow with the whole sample.
# At the limit a BPE of 4,096 tokens takes half a minute and about 450 MB of memory.
WORD_SAMPLE = 8 << 20
CHUNK = 1 << 18  # places whose pairs are counted at a time
NO_TOKEN = -1
FIRST = 2**32  # a pair of token ids is one integer: FIRST * first + second


def train_bpe(texts, vocab_size):
    """Learns a BPE from the beginning of the texts: see BPE_SAMPLE and WORD_SAMPLE.

    texts: an iterable of strings.

    Returns ranks and size. ranks holds the tokens in the file format of tiktoken: one line per
    token, with the token in base64 and its rank. End-of-text is not in it. size is the number of
    tokens including end-of-text: vocab_size, or less if no other pair occurs twice.
    """
    words = Words(count_words(texts))
    for _ in tqdm(range(vocab_size - 257), desc="bpe", mininterval=1):
        pair = words.most_frequent_pair()
        if pair is None:
            break
        words.merge(*pair)
    lines = []
    for rank, token in enumerate(words.tokens):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    return "".join(lines), len(words.tokens) + 1


def count_words(texts):
    """Returns a Counter of the words, as bytes, up to the first text that reaches a limit."""
    counts = collections.Counter()
    characters = 0
    word_bytes = 0
    for text in texts:
        for word, count in collections.Counter(regex.findall(GPT2_SPLIT, text)).items():
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

    All words lie in one array of places. There is a place without a token on each side of a word.
    A merge puts its token at the place of its first part, and takes the place of its second part
    out of the chain. So a merge only touches places of its own tokens.

    token, weight, before, after: (places,) the token id or NO_TOKEN at each place, how often its
        word occurs in the text, and the neighbours of the place in the chain.
    tokens: the bytes of each token id. order: see add_token.
    places: for each token id an array of all places that hold it, and some that held it once.
    counts: how often each pair occurs in the text, for pairs that do.
    heap: entries (-count, order of first, order of second, pair). Each pair that occurs twice has
        an entry with its count, or with a higher count that it had once.
    """

    def __init__(self, word_counts):
        text = b"".join([b" " + word for word in word_counts]) + b" "
        lengths = np.array([len(word) + 1 for word in word_counts], int)
        weights = np.array(list(word_counts.values()), np.int32)
        self.weight = np.append(np.repeat(weights, lengths), np.int32(0))
        self.token = np.frombuffer(text, np.uint8).astype(np.int32)
        self.token[np.append(0, np.cumsum(lengths))] = NO_TOKEN
        places = np.arange(len(text), dtype=np.int32)
        self.before = np.maximum(places - 1, 0)
        self.after = np.minimum(places + 1, len(text) - 1)

        self.tokens = []
        self.order = []
        self.places = []
        for byte in range(256):
            self.add_token(bytes([byte]), places[self.token == byte])
        self.counts = {}
        self.heap = []
        for start in range(0, len(places), CHUNK):  # all at once would need much memory
            self.count_pairs(places[start : start + CHUNK], 1)

    def add_token(self, token, places):
        """Gives a token the next id. token: its bytes. places: where it is, from left to right."""
        self.tokens.append(token)
        self.places.append(places)
        # The heap returns the smallest entry, and of equal counts it must be the pair that is last
        # in byte order. So order reverses the bytes. Its end sorts a token after its extensions.
        self.order.append("".join([chr(255 - byte) for byte in token]) + chr(256))

    def count_pairs(self, places, sign):
        """Adds pairs to the counts if sign is 1, and subtracts them if it is -1.

        places: (n,) the places of the first tokens of the pairs. Other places count nothing.
        """
        is_pair = (self.token[places] >= 0) & (self.token[self.after[places]] >= 0)
        places = places[is_pair]
        pairs = self.token[places] * np.int64(FIRST) + self.token[self.after[places]]
        pairs, index = np.unique(pairs, return_inverse=True)
        changes = np.bincount(index, self.weight[places]).astype(int)
        for pair, change in zip(pairs.tolist(), changes.tolist()):
            count = self.counts.pop(pair, 0) + sign * change
            if count:
                self.counts[pair] = count
            if sign == 1:
                self.push(pair)

    def push(self, pair):
        """Puts an entry of a pair on the heap if the pair occurs at least twice."""
        count = self.counts.get(pair, 0)
        if count >= 2:
            first, second = divmod(pair, FIRST)
            heapq.heappush(self.heap, (-count, self.order[first], self.order[second], pair))

    def most_frequent_pair(self):
        """Returns the token ids of the most frequent pair, or None if no pair occurs twice.

        If several pairs have the highest frequency, returns the one that is last in byte order.
        The result does not depend on the order of the words.
        """
        while self.heap:
            negative_count, _, _, pair = heapq.heappop(self.heap)
            if self.counts.get(pair) == -negative_count:
                return divmod(pair, FIRST)
            self.push(pair)  # its count has fallen since
        return None

    def merge(self, first, second):
        """Replaces the pair of token ids by one token in all words."""
        left = self.find(first, second)
        right = self.after[left]
        changed = np.concatenate([self.before[left], left, right])
        self.count_pairs(np.unique(changed), -1)
        self.token[left] = len(self.tokens)
        self.token[right] = NO_TOKEN
        self.after[left] = self.after[right]
        self.before[self.after[left]] = left
        self.add_token(self.tokens[first] + self.tokens[second], left)
        self.count_pairs(np.unique(np.append(self.before[left], left)), 1)

    def find(self, first, second):
        """Returns (n,) the places of the first tokens of a pair, from left to right.

        Pairs that overlap with one on their left are left out: "aaa" has one pair (a, a) to merge.
        """
        places = self.places[first]
        places = places[self.token[places] == first]
        self.places[first] = places  # those that no longer hold it are not looked at again
        left = places[self.token[self.after[places]] == second]
        if first != second:
            return left
        # Of a run of pairs that overlap, every second one remains.
        index = np.arange(len(left))
        begins_run = np.append(True, self.after[left[:-1]] != left[1:])
        begin = np.maximum.accumulate(np.where(begins_run, index, 0))
        return left[(index - begin) % 2 == 0]
