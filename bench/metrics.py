"""What bench/evaluate.py measures: numbers of texts, their intervals, curves of such numbers."""

import math
import os
import unicodedata
from importlib.util import find_spec

import numpy as np
import regex  # tiktoken depends on it too
import torch

from bench.ngram import WORD
from engine.corpus import Corpus, encode, load_encoding
from textldm import cross_entropy

os.environ["HF_HUB_OFFLINE"] = "1"  # BERTScore never fetches weights
PIECE = 2**24  # tokens of the training text that are compared at once, for the memory


@torch.no_grad()
def score(gpt, tokenizer, prompts, texts, autocast):
    """How probable each (text, ended) is after its prompt, by a GPT.

    Returns a dict. nll (n,): in nats. tokens: n arrays, without the end-of-text. count (n,): of
    tokens, with it. features (n, E): the final hidden state at the last token. MAUVE compares
    these; its authors take those of gpt2-large."""
    eot, encoding = tokenizer["eot"], load_encoding(tokenizer)
    new = []  # tokens, of each text
    rows = []  # an end-of-text, the prompt and these tokens
    for prompt, (text, ended) in zip(prompts, texts):
        ids = encode(encoding, text)  # apart from the prompt
        ids = [*ids, eot][: len(ids) + ended][: gpt.config.block_size - 1]
        before = [eot, *encode(encoding, prompt)]
        new.append(ids)
        rows.append(before[len(ids) - gpt.config.block_size :] + ids)
    longest = max(len(row) for row in rows)
    B = max(1, 2**26 // (gpt.config.vocab_size * longest))  # so that the logits fit in memory
    nll = []
    features = []
    for start in range(0, len(rows), B):
        some = rows[start : start + B]
        x = torch.tensor([row + [eot] * (longest - len(row)) for row in some])  # (B, N)
        x = x.to(gpt.wte.weight.device)
        with autocast:
            h = gpt.ln_f(gpt.hidden_states(x, gpt.config.n_layer))  # (B, N, E)
            following = x[:, 1:]  # (B, N - 1)
            _, loss = cross_entropy(h[:, :-1], gpt.wte, following, torch.ones_like(following))
        loss = loss.cpu()
        for k, (row, ids) in enumerate(zip(some, new[start:])):
            end = len(row) - 1
            nll.append(loss[k, end - len(ids) : end].double().sum().item())
            has_end_of_text = ids[-1:] == [eot]
            features.append(h[k, end - has_end_of_text].float().cpu())
    return dict(
        nll=np.array(nll),
        tokens=[np.array([i for i in ids if i != eot], dtype=np.int64) for ids in new],
        count=np.array([len(ids) for ids in new]),
        features=torch.stack(features).numpy(),
    )


def words_of(text):
    """The words of a text. In scripts without spaces each character is one."""
    return regex.findall(WORD, text)


class Words:
    """ROUGE's words, in every script. Its package's own are runs of a-z and 0-9."""

    def tokenize(self, text):
        return words_of(unicodedata.normalize("NFC", text.lower()).replace("_", " "))


def rouge(texts, references):
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (n,), times 100, without stemming: three arrays, or three
    times a str that says why there is none."""
    if not any(map(words_of, references)):
        return 3 * ["no reference has a word"]
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    scores = [scorer.score(*pair).values() for pair in zip(references, texts)]
    return np.array([[100 * score.fmeasure for score in row] for row in scores]).T


def bert_score(texts, references):
    """F1 of BERTScore (n,), times 100, by roberta-large. An empty text has 0. Or a str that says
    why there is none."""
    letters = regex.findall(r"\p{L}", "".join(references))
    if sum(map(str.isascii, letters)) <= len(letters) / 2:
        return "its model reads English"
    rows = [i for i, pair in enumerate(zip(texts, references)) if all(map(str.strip, pair))]
    if not rows:
        return "all texts are empty"
    import bert_score as package

    some = [texts[i] for i in rows], [references[i] for i in rows]
    scores = np.zeros(len(texts))
    try:
        _, _, f1 = package.score(*some, lang="en")
    except OSError:  # transformers finds no file
        return "roberta-large is not on this machine"
    scores[rows] = 100 * f1.numpy()
    return scores


def mauve(real, features, clusters, rng):
    """MAUVE [Pillutla et al. 2021, arXiv 2102.01454], times 100, of features (n, E) against real
    ones, and half of a 95% interval.

    The interval is the spread over halves of both. Halves are drawn without replacement, because
    repeated texts would look nearer to each other than they are."""
    if clusters < 2:  # of any two sets it would say the same
        return "too few prompts; --n=16 or more"
    if not find_spec("mauve"):
        return "pip install mauve-text"
    import mauve as package

    halves = []
    for _ in range(8):
        half = [x[rng.permutation(len(x))[: len(x) // 2]] for x in (real, features)]
        halves.append(quiet_mauve(package, *half, clusters))
    whole = quiet_mauve(package, real, features, clusters)
    return whole, 1.96 * float(np.std(halves, ddof=1))


def quiet_mauve(package, p, q, clusters):
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)  # faiss, which is in C, warns of fewer than 39 points per cluster
    try:
        result = package.compute_mauve(
            p_features=p, q_features=q, num_buckets=clusters, seed=1, verbose=False
        )
        # mauve-text says 75 or 100 of equal histograms, by the sort of the CPU
        # (findings/mauve_of_equal_histograms.sh).
        is_equal = np.array_equal(result.p_hist, result.q_hist)
        return 100.0 if is_equal else 100 * result.mauve
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def entropy(rows, count, rng, repeats=20):
    """Entropy, in nats, of the frequencies of `count` tokens of the rows (arrays): the mean over
    draws, and half of a 95% interval. NaN where the rows have hardly more tokens than that. It is
    low where a system repeats itself.

    Entropy grows with the count, so all systems have the same count. Tokens come from texts in
    random orders, because resampling with replacement would lower the entropy. Such draws overlap:
    their spread is corrected for the share of all tokens that they take."""
    share = count / max(sum(len(row) for row in rows), 1)
    if share > 0.9:
        return math.nan, math.nan
    values = []
    for _ in range(repeats):
        tokens = np.concatenate([rows[i] for i in rng.permutation(len(rows))])[:count]
        _, counts = np.unique(tokens, return_counts=True)
        p = counts / len(tokens)
        values.append(float(-(p * np.log(p)).sum()))
    half = 1.96 * float(np.std(values, ddof=1))
    return float(np.mean(values)), half * (share / (1 - share)) ** 0.5


class TrainingText:
    """What a system may have copied. tokens: all of it. Of its first 16 million tokens: texts, the
    list of documents in their order, and words and documents, two sets of strings."""

    def __init__(self, corpus):
        self.encoding = corpus.encoding
        self.tokens = Corpus(corpus.path.parent, "train", 2).tokens
        text = self.encoding.decode(self.tokens[: 2**24].tolist())
        self.texts = text.split("<|endoftext|>")
        self.words = set(words_of(" ".join(self.texts)))
        self.documents = set(self.texts) - {""}  # a text that says nothing is no copy


def copied(texts, prompts, training):
    """How many of the texts' 4-grams of tokens are in their own prompt, and in the training text,
    in percent."""
    grams = []
    in_prompt = []
    for prompt, text in zip(prompts, texts):
        grams.append(hash_4(encode(training.encoding, text)))
        grams_of_prompt = hash_4(encode(training.encoding, prompt))
        in_prompt.append(np.isin(grams[-1], grams_of_prompt))
    grams = np.concatenate(grams)
    if not len(grams):
        return math.nan, math.nan
    in_training = np.zeros(len(grams), bool)
    for start in range(0, len(training.tokens), PIECE):
        piece = training.tokens[start : start + PIECE + 3]
        in_training |= np.isin(grams, hash_4(piece))
    return 100 * np.concatenate(in_prompt).mean(), 100 * in_training.mean()


def hash_4(ids):
    """Hashes of all 4-grams of ids. They are of 61 bits or more, so collisions do not count."""
    ids = np.asarray(ids, dtype=np.uint64)
    h = np.zeros(max(len(ids) - 3, 0), np.uint64)
    for k in range(4):
        h = (h ^ ids[k : k + len(h)]) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return h


def known(texts, prompts, training):
    """How many words of the texts are words of the training text, and how many texts are, with
    their prompts, documents of it, in percent. A word that begins in the prompt counts."""
    is_known = []
    is_copy = []
    for prompt, text in zip(prompts, texts):
        whole = prompt + text
        for match in regex.finditer(WORD, whole):
            if match.end() > len(prompt):
                is_known.append(match[0] in training.words)
        is_copy.append(whole in training.documents)
    return percent(is_known), percent(is_copy)


def repeated(texts, prompts):
    """How many words of the texts repeat the word before them, in percent. A sampler that has
    collapsed shows here, and a sentence that says "that that" or "ha ha" hardly does."""
    is_repeated = []
    for prompt, text in zip(prompts, texts):
        words = words_of(text.lower())
        before = [None, *words_of(prompt.lower())][-1]
        is_repeated += [a == b for a, b in zip([before, *words], words)]
    return percent(is_repeated)


def percent(answers):
    """Of a list of bools, NaN of none."""
    return 100 * float(np.mean(answers)) if answers else math.nan


def per_token(nll, count, rng, repeats=1000):
    """NLL per token (1 + repeats,) of n texts, then of as many drawn with replacement, again and
    again. nll (n,): in nats. Equal generators draw equal texts, so differences are paired."""
    n = len(nll)
    draw = np.concatenate((np.arange(n)[None], rng.integers(n, size=(repeats, n))))
    return np.array(nll)[draw].sum(1) / np.maximum(np.array(count)[draw].sum(1), 1)


def interval(values):
    """The value of all texts, the first, and half the width of the 95% interval of the others."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(high - low) / 2


# ---- Curves of NLL against entropy ---------------------------------------------------------------
# A point is a dict of nll (per token), entropy and, in a sweep, knob: the dict of its settings.


def choose(points, real):
    """The index of the point that is nearest to the point of real text, in NLL and entropy
    together."""

    away = []
    for point in points:
        away.append(abs(point["nll"] - real["nll"]) + abs(point["entropy"] - real["entropy"]))
    return int(np.argmin(np.nan_to_num(away, nan=math.inf)))


def running(knob):
    """The name of the setting along which a curve runs."""
    return "temperature" if "temperature" in knob else "cfg"


def curves_of(points):
    """The curves of a sweep, each a list in order of entropy. Points of one curve differ in one
    setting."""
    curves = {}
    for point in points:
        fixed = {k: v for k, v in point["knob"].items() if k != running(point["knob"])}
        if math.isfinite(point["entropy"]):
            curves.setdefault(str(fixed), []).append(point)
    return [sorted(curve, key=lambda point: point["entropy"]) for curve in curves.values()]


def at_entropy(points, wanted, key):
    """The NLL of this key where the best curve has the wanted entropy, or a str if none has it."""
    values = []
    for curve in curves_of(points):
        entropies = [point["entropy"] for point in curve]
        if entropies[0] <= wanted <= entropies[-1]:
            values.append(np.interp(wanted, entropies, [point[key] for point in curve]))
    return float(min(values)) if values else "no curve has it"
