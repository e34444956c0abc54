"""Judges continuations: TextLDM beside the autoregressive GPT, between real text and floors.

    python bench/train_gpt.py --seed=1234 --n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000 --out=out/evaluator   # once
    python bench/evaluate.py                                        # names, with the models in out/
    python bench/evaluate.py --systems="real,gpt,with=textldm:out,without=textldm:out/norepa"
    python bench/evaluate.py --evaluator=gpt2-large --benchmark=stories.jsonl --texts=theirs.jsonl

Val documents are cut in prompt and reference; every system continues the same prompts, within the same length,
to the end of text. No one number tells: NLL and entropy must both be those of real text (low NLL at low entropy
is collapse), NLL says fluent and not relevant, and ROUGE rewards frequent words. So the table holds
    real      the references             MAUVE is between disjoint halves, so it is the ceiling
    other     references of other prompts: fluent, unrelated
    unigram   words of the training text, drawn independently: no order; `tokens`: the same of its tokens
    prompt    the prompt once more
    gpt       the autoregressive baseline            masked    masked diffusion, on the same blocks
    textldm   ours
KIND:PATH names another checkpoint (of textldm: folder), and LABEL=KIND:PATH gives a row a name. Knobs (guidance, steps, temperature, nucleus) are chosen on one half of the prompts, to be
nearest to real text in NLL and entropy, and reported on the other; the sweep, on that other half, is the frontier.
Writes OUT/eval.json (everything) and OUT/eval.md (the tables); bench/plots.py draws the frontier.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"  # BERTScore is computed where its weights are, and never fetches them
sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1)]
from sample import SampleConfig, fit, generate, load_models, read_lines
from textldm import (GPT, Config, Corpus, TrunkConfig, UserError, command_line, continue_texts, cross_entropy, load_checkpoint,
                     load_encoding, model_from, option, pick_device, run, write_whole)
from train_masked import MaskedLM, unmask


@dataclass
class EvalConfig(Config):
    data: str = option("data/names", "folder of the prepared corpus that the models were trained on")
    out: str = option("out", "folder of the models; the reports go there too")
    benchmark: str = option("", 'file of JSON lines {"prompt", "reference"}; default: made once from val, in --data')
    n: int = option(1000, "prompts", 8)
    unprompted: bool = option(False, "empty prompts: whole documents are generated, and compared with whole ones")
    seed: int = option(1, "of the benchmark, of the texts and of the intervals", 0, 2**31)
    systems: str = option("real,other,unigram,prompt,gpt,textldm", "rows of the table: [LABEL=]KIND[:PATH], ...")
    texts: str = option("", 'what another system wrote: JSON lines {"prompt", "text"}, matched by prompt')
    evaluator: str = option("", "GPT that scores: a checkpoint (OUT/evaluator/gpt.pt), gpt2-large, or a Hugging Face folder")
    cfg: str = option("1,1.5,2,3,5", "guidance scales to choose from")
    steps: str = option("10,20", "Euler steps to choose from")
    temperature: str = option("0.7,0.85,1", "temperatures to choose from")
    top_p: str = option("0.9,1", "nuclei of the GPT to choose from")
    clusters: int = option(50, "of MAUVE; only equal ones compare", 2)
    batch_size: int = option(250, "prompts at once", 1)
    device: str = option("auto", "cpu, cuda, mps, or auto")


# ---- The benchmark

def make_benchmark(corpus, path, n, seed, unprompted):
    """Cuts n val documents of at most a row in prompt and reference, at the word that begins nearest to a place
    drawn in 40-60% of the characters (or at their start). Streams have no short documents: theirs are cut off after a row."""
    rng, lines = np.random.default_rng(seed), []
    ends = np.flatnonzero(corpus.tokens == corpus.eot) + 1
    for d in rng.permutation(len(ends)):
        ids = corpus.tokens[ends[d - 1] if d else 0 : ends[d] - 1].tolist()
        if len(ids) >= corpus.N and not corpus.is_stream:
            continue
        text = corpus.encoding.decode(ids[: corpus.N]).rstrip("\ufffd")
        place = rng.uniform(0.4, 0.6) * len(text)
        cuts = [0] if unprompted else [i for i in range(1, len(text) - 1) if text[i].isspace() and text[:i].strip() and text[i:].strip()]
        if cuts:
            cut = min(cuts, key=lambda i: abs(i - place))
            lines.append(dict(prompt=text[:cut], reference=text[cut:], ended=len(ids) < corpus.N))
        if len(lines) == n:
            break
    else:
        raise UserError(f"--n={n}, but {corpus.path} has only {len(lines)} documents that can be cut; lower --n")
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def load_benchmark(options, corpus):
    if options.benchmark and options.unprompted:
        raise UserError(f"--unprompted cuts val documents, and --benchmark={options.benchmark} is cut already; leave one of them out")
    path = Path(options.benchmark or f"{options.data}/benchmark_{options.n}_{options.seed}_{corpus.N}{'_unprompted' * options.unprompted}.jsonl")
    if not options.benchmark and not path.exists():
        make_benchmark(corpus, path, options.n, options.seed, options.unprompted)
    lines = read_lines(path, ("prompt", "reference"))
    for i, line in enumerate(lines):
        if not line["reference"].strip():
            raise UserError(f"{path}, line {i + 1}: the reference is empty; leave the line out")
    if len(lines) < options.n:
        raise UserError(f"--n={options.n}, but {path} has {len(lines)} lines; lower --n")
    lines = [lines[i] for i in np.random.default_rng(options.seed).permutation(len(lines))[: options.n]]  # alike halves
    for i, ids in enumerate(fit([corpus.encoding.encode_ordinary(line["prompt"]) for line in lines], 0, corpus.N)):
        lines[i].update(ids=ids, ended=bool(lines[i].get("ended", True)), next=lines[i - 1]["reference"])  # `next`: of another
    return path, lines


# ---- The systems: a grid of knobs, and write(lines, knob, seed) -> [(text, whether it ended)], evaluations of a network

def make_system(kind, path, options, corpus, device):
    """One system, from its kind and path. A model lowers corpus.N to the longest row that it can write."""
    eot, encoding = corpus.eot, corpus.encoding
    numbers = lambda name: parse(getattr(options, name), name)
    decode = lambda rows: [(encoding.decode([i for i in row if i != eot]), eot in row) for row in rows]

    if kind == "real":
        return [{}], lambda lines, knob, seed: ([(b["reference"], b["ended"]) for b in lines], 0)
    if kind == "other":
        return [{}], lambda lines, knob, seed: ([(b["next"], True) for b in lines], 0)
    if kind == "prompt":
        return [{}], lambda lines, knob, seed: ([(" " + b["prompt"], True) for b in lines], 0)
    if kind == "tokens":
        p = np.bincount(Corpus(options.data, "train", 2).tokens, minlength=corpus.meta["vocab_size"]).astype(float)
        p[eot] = 0

        def write(lines, knob, seed):  # as many tokens as another prompt's reference has
            rng = np.random.default_rng(seed)
            sizes = [len(encoding.encode_ordinary(b["next"])) for b in lines]
            return decode([rng.choice(len(p), n, p=p / p.sum()).tolist() + [eot] for n in sizes]), 0
        return [{}], write
    if kind == "unigram":
        train = Corpus(options.data, "train", corpus.N)
        rows = train.batch(np.random.default_rng(0), 500 if train.is_stream else 20_000, train.N, cut_words=False).tokens
        words = np.array([w for text, _ in decode(rows.tolist()) for w in text.split()])

        def write(lines, knob, seed):  # as many words as another prompt's reference has
            rng = np.random.default_rng(seed)
            return [("".join(" " + w for w in rng.choice(words, len(b["next"].split()))), True) for b in lines], 0
        return [{}], write
    if kind == "texts":
        texts = {}
        for b in read_lines(path, ("prompt", "text")):
            texts.setdefault(b["prompt"], []).append((b["text"], bool(b.get("ended", True))))

        def write(lines, knob, seed):  # prompts may repeat: each takes the next of its texts
            left, found = {k: list(v) for k, v in texts.items()}, []
            for b in lines:
                if not left.get(b["prompt"]):
                    raise UserError(f"{path} does not match the benchmark: no text for the prompt {b['prompt']!r}")
                found.append(left[b["prompt"]].pop(0))
            return found, 0
        return [{}], write
    if kind == "gpt":
        path = path or f"{options.out}/gpt.pt"
        gpt, tokenizer = GPT.from_pretrained(path)
        check_tokenizer(path, tokenizer, corpus)
        if Path(path).resolve() == Path(options.evaluator).resolve():
            raise UserError(f"{path} cannot be judged by itself; train another --evaluator, with another --seed")
        gpt, corpus.N = gpt.to(device), min(corpus.N, gpt.config.block_size - 1)

        def write(lines, knob, seed):
            rows = generate(gpt, [b["ids"] for b in lines], 0, eot, seed=seed, **knob)
            return decode(rows), sum(map(len, rows)) / len(rows)
        return [dict(temperature=t, top_p=p) for p in numbers("top_p") for t in numbers("temperature")], write
    if kind == "textldm":
        vae, dit, tokenizer = load_models(SampleConfig(out=path or options.out), device)
        check_tokenizer(path or options.out, tokenizer, corpus)
        corpus.N = min(corpus.N, dit.config.block_size)

        def write(lines, knob, seed):
            steps, scale = int(knob["steps"]), knob["cfg"]
            rows = continue_texts(vae, dit, [b["ids"] for b in lines], 0, eot, seed, steps=steps, cfg_scale=scale, temperature=knob.get("temperature", 1.0))
            b = dit.config.latent_block
            blocks = sum(math.ceil(len(row) / b) for row in rows) / len(rows) if b else 1
            return decode(rows), steps * (1 if scale == 1 else 2) * blocks
        knobs = [dict(steps=s, cfg=w) for s in numbers("steps") for w in numbers("cfg")]
        return [dict(k, temperature=t) for k in knobs for t in numbers("temperature")] if dit.config.predict_tokens else knobs, write
    if kind == "masked":
        path = path or f"{options.out}/masked.pt"
        state = load_checkpoint(path, "masked", "python bench/train_masked.py makes one", corpus.tokenizer)
        model = model_from(MaskedLM, TrunkConfig, state).to(device)
        corpus.N = min(corpus.N, model.config.block_size)

        def write(lines, knob, seed):
            rows = unmask(model, [b["ids"] for b in lines], 0, eot, int(knob["steps"]), knob["temperature"], seed)
            return decode(rows), int(knob["steps"])
        return [dict(steps=s, temperature=t) for s in numbers("steps") for t in numbers("temperature")], write
    raise UserError(f"--systems: there is no kind {kind!r}; real, other, unigram, tokens, prompt, gpt, masked, textldm or texts")


def check_tokenizer(path, tokenizer, corpus):
    if tokenizer != corpus.tokenizer:
        raise UserError(f"{path} was trained with another vocabulary than {corpus.path.parent}; name the right --data")


def parse(text, name):
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text}: expected numbers with commas between") from None
    if not all((1 if name == "steps" else 0) <= x < 1e6 for x in numbers):
        raise UserError(f"--{name}={text}: out of range")
    return numbers


def write_all(write, lines, knob, options, corpus, autocast):
    """Texts of all lines, cut to what a row leaves after its prompt; evaluations of the network; seconds of the writing alone."""
    texts, nfe, began = [], 0, time.time()
    size = options.batch_size if knob else len(lines)
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        with autocast, torch.no_grad():
            new, n = write(some, knob, options.seed * 1_000_003 + start)
        texts, nfe = texts + new, nfe + n * len(some) / len(lines)
    seconds = time.time() - began
    for i, (text, ended) in enumerate(texts):
        ids, room = corpus.encoding.encode_ordinary(text), corpus.N - len(lines[i]["ids"])
        if len(ids) + ended > room:
            texts[i] = corpus.encoding.decode(ids[:room]).rstrip("\ufffd"), False
    return texts, nfe, seconds


# ---- The metrics

@torch.no_grad()
def score(gpt, tokenizer, prompts, texts, autocast):
    """What the evaluator thinks of each (text, ended) after its prompt. Both are tokenised by its own tokenizer, apart,
    and the end-of-text counts as a token where the text ended. Returns NLL in nats (n,), the tokens' ids (n lists) and
    features (n, E), the final hidden state at the last token of the text, which MAUVE compares (its authors': of gpt2-large)."""
    encoding, eot, device = load_encoding(tokenizer), tokenizer["eot"], gpt.wte.weight.device
    block, (V, E) = gpt.config.block_size, gpt.wte.weight.shape
    new = [encoding.encode_ordinary(text) for text, _ in texts]
    new = [ids + [eot] if ended and len(ids) < block - 1 else ids[: block - 1] for ids, (_, ended) in zip(new, texts)]
    rows = [([eot] + encoding.encode_ordinary(p))[-(block - len(ids)):] + ids for p, ids in zip(prompts, new)]
    nll, features = np.zeros(len(rows)), torch.zeros(len(rows), E)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        B = max(1, 2**26 // (V * len(rows[order[-1]])))                         # so that logits fit in memory
        some, order = order[-B:], order[:-B]
        N = max(len(rows[i]) for i in some)
        x = torch.tensor([rows[i] + [eot] * (N - len(rows[i])) for i in some], device=device)  # (B, N)
        with autocast:
            h = gpt.ln_f(gpt.hidden_states(x, gpt.config.n_layer))              # (B, N, E)
            logits = F.linear(h, gpt.wte.weight).float()                        # (B, N, V)
        ce = cross_entropy(logits[:, :-1], x[:, 1:]).cpu()                      # (B, N - 1)
        for k, i in enumerate(some):
            nll[i] = ce[k, len(rows[i]) - len(new[i]) - 1 : len(rows[i]) - 1].double().sum()
            features[i] = h[k, len(rows[i]) - 1 - (new[i][-1:] == [eot])].float().cpu()
    return nll, new, features.numpy()


def rouge(texts, references):
    """F1 of ROUGE-1, 2 and L, (n, 3), times 100; no stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return "pip install rouge-score"
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    return 100 * np.array([[s.fmeasure for s in scorer.score(r, t).values()] for r, t in zip(references, texts)])


def mauve(real, features, clusters, rng):
    """MAUVE [Pillutla et al. 2021] times 100, of features (n, E) against those of other prompts' references, and its spread
    over halves of both, taken without replacement (as far from each other as whole samples would be)."""
    try:
        import mauve as package
    except ImportError:
        return "pip install mauve-text"

    def one(p, q):
        stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # faiss warns, in C, of fewer than 39 points a cluster
        try:
            return 100 * package.compute_mauve(p_features=p, q_features=q, num_buckets=clusters, seed=1, verbose=False).mauve
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(null)
    some = lambda x: x[rng.permutation(len(x))[: len(x) // 2]]
    return one(real, features), 1.96 * float(np.std([one(some(real), some(features)) for _ in range(8)], ddof=1))


def bert_score(texts, references):
    """BERTScore F1 (n,) times 100, where its weights are already on this machine."""
    try:
        import bert_score as package
        return 100 * package.score(texts, references, lang="en")[2].numpy()
    except ImportError:
        return "pip install bert-score"
    except Exception:  # what transformers raises for missing files has no common class
        return "roberta-large is not on this machine"


def entropy(tokens):
    """Entropy in nats of the frequencies of tokens (an array): low where a system repeats itself."""
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(p * np.log(p)).sum())


def different(items):
    """Different items (an array), in percent of all."""
    return 100 * len(np.unique(items)) / len(items)


def at_equal_count(statistic, rows, count, rng, repeats=20):
    """A statistic of `count` items, taken from texts in random orders, without replacement (entropy and distinct-2 grow with
    the count, and resampling with replacement would lower them), and half of a 95% interval: the spread of the draws, corrected
    for the share of all items that they take."""
    share = count / max(sum(map(len, rows)), 1)
    if share > 0.9:
        return float("nan"), float("nan")  # a system that writes about half of what real text has, or less
    values = [statistic(np.concatenate([rows[i] for i in rng.permutation(len(rows))])[:count]) for _ in range(repeats)]
    return float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) * (share / (1 - share)) ** 0.5


def words_and_pairs(rows, eot):
    """Per text, its ids without the end-of-text, and its pairs of neighbours, each pair one number."""
    words = [np.array([i for i in row if i != eot], dtype=np.int64) for row in rows]
    return words, [w[:-1] * 2**32 + w[1:] for w in words]


def four_grams(rows):
    """Hashes (M,) of the 4-grams in lists of ids, and the index (M,) of their list."""
    pairs = [(hash_4(np.array(row, dtype=np.uint64)), np.full(len(row) - 3, i)) for i, row in enumerate(rows) if len(row) > 3]
    return tuple(np.concatenate(x) for x in zip(*pairs)) if pairs else (np.zeros(0, np.uint64), np.zeros(0, int))


def hash_4(ids):  # 61 bits or more of mixing, so that collisions among any corpus's 4-grams do not count
    h = np.zeros(len(ids) - 3, np.uint64)
    for k in range(4):
        h = (h ^ ids[k : len(ids) - 3 + k]) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return h


def copied(texts, prompts, corpus):
    """Percent of the texts' 4-grams of tokens that are in their own prompt, and in the training tokens, which are read in pieces."""
    ids = [corpus.encoding.encode_ordinary(t) for t in texts]
    grams, owner = four_grams(ids)
    if not len(grams):
        return float("nan"), float("nan")
    own = np.concatenate([np.isin(g, four_grams([p])[0]) for g, p in
                          ((grams[owner == i], corpus.encoding.encode_ordinary(p)) for i, p in enumerate(prompts))])
    train, seen = Corpus(corpus.path.parent, "train", corpus.N).tokens, np.zeros(len(grams), bool)
    for start in range(0, len(train) - 3, 2**24):
        seen |= np.isin(grams, hash_4(train[start : start + 2**24 + 3].astype(np.uint64)))
    return 100 * own.mean(), 100 * seen.mean()


def training_text(corpus):
    """The words and the documents of the training text (of its first 16 million tokens), two sets."""
    documents = corpus.encoding.decode(Corpus(corpus.path.parent, "train", 2).tokens[: 2**24].tolist()).split("<|endoftext|>")
    return set(re.findall(r"\w+", " ".join(documents))), set(documents)


def known(texts, prompts, vocabulary, documents):
    """Percent of the words of the texts (also those that begin in the prompt) that are words of the training text, and of the
    texts which with their prompts are training documents."""
    words = [m[0] for p, t in zip(prompts, texts) for m in re.finditer(r"\w+", p + t) if m.end() > len(p)]
    return (100 * float(np.mean([w in vocabulary for w in words])) if words else float("nan"),
            100 * float(np.mean([p + t in documents for p, t in zip(prompts, texts)])))


def interval(values, rng, weights=None, repeats=1000):
    """Mean of values (n,), or their sum over that of weights, and half the width of its bootstrap 95% interval."""
    weights = np.ones(len(values)) if weights is None else weights
    draw = rng.integers(len(values), size=(repeats, len(values)))
    low, high = np.percentile(values[draw].sum(1) / np.maximum(weights[draw].sum(1), 1), (2.5, 97.5))
    return float(values.sum() / max(weights.sum(), 1)), float(high - low) / 2


# ---- The run

def choose(points, real):
    """The knob whose NLL a token and entropy are together nearest to real text's."""
    away = lambda p: abs(p["nll"] - real["nll"]) + abs(p["entropy"] - real["entropy"])
    return min(points, key=lambda p: away(p) if math.isfinite(away(p)) else 1e9)


def running(knob):
    return "temperature" if "temperature" in knob else "cfg"


def curves_of(points):
    """The curves of a sweep: of points that differ in temperature alone (or guidance, where there is none), in order of entropy."""
    curves = {}
    for p in points:
        if math.isfinite(p["entropy"]):
            curves.setdefault(tuple(f"{k} {v:g}" for k, v in p["knob"].items() if k != running(p["knob"])), []).append(p)
    return {" ".join(name): sorted(c, key=lambda p: p["entropy"]) for name, c in curves.items()}


def at_entropy(points, entropy):
    """NLL a token of the best curve through points at real text's entropy, None where none reaches it."""
    values = [np.interp(entropy, [p["entropy"] for p in c], [p["nll"] for p in c]) for c in curves_of(points).values()
              if c[0]["entropy"] <= entropy <= c[-1]["entropy"]]
    return float(min(values)) if values else None


def difference(a, b, rng, repeats=1000):
    """How much more NLL a token and ROUGE-1 texts a have than b on the same prompts: mean and half the width of the
    paired bootstrap's 95% interval of each."""
    draw = rng.integers(len(a["nll"]), size=(repeats, len(a["nll"])))
    nll = lambda x, i: np.array(x["nll"])[i].sum(-1) / np.array(x["tokens"])[i].sum(-1).clip(min=1)
    rouge_1 = lambda x, i: np.array(x["rouge_1"])[i].mean(-1)
    every, found = np.arange(len(a["nll"])), {}
    for name, f in dict(nll=nll, **({} if isinstance(a["rouge_1"], str) else dict(rouge_1=rouge_1))).items():
        low, high = np.percentile(f(a, draw) - f(b, draw), (2.5, 97.5))
        found[name] = float(f(a, every) - f(b, every)), float(high - low) / 2
    return found


def tables(result, ours):
    """The report in Markdown."""
    def cell(x, digits=1):
        return x if isinstance(x, str) else f"{x[0]:.{digits}f} ± {x[1]:.{digits}f}" if isinstance(x, (list, tuple)) else f"{x:.{digits}f}"

    setting, out = result["setting"], []
    out.append(f"`{setting['command']}`, commit {setting['commit']}, {setting['machine']}.\n\n{len(next(iter(result['texts'].values()))['nll'])} prompts "
               f"of {setting['benchmark']} (knobs chosen on the other half), rows of at most {setting['row']} tokens; NLL and MAUVE's features: "
               f"{setting['evaluator']}, {setting['clusters']} clusters; entropy of {setting['count']} tokens. ± is half of a 95% interval. "
               f"Seconds are for {setting['n']} prompts.\n")
    head = ["", "knobs", "NLL/token", "NLL/byte", "entropy", "distinct-2", "MAUVE", "R-1", "R-2", "R-L", "BERTScore", "4-grams of prompt",
            "of training", "words known", "copies", "tokens", "ended", "NFE", "seconds"]
    out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, r in result["systems"].items():
        rouges = [r["rouge"]] * 3 if isinstance(r["rouge"], str) else [cell(x) for x in r["rouge"]]
        row = [name, " ".join(f"{k} {v:g}" for k, v in r["knob"].items()), cell(r["nll"], 2), cell(r["nll_byte"], 2), cell(r["entropy"], 2),
               cell(r["distinct_2"]), cell(r["mauve"]), *rouges, cell(r["bertscore"]), f"{r['copied_prompt']:.1f}%", f"{r['copied_train']:.1f}%",
               f"{r['words_known']:.1f}%", f"{r['copies']:.1f}%", cell(r["tokens"]), f"{100 * r['ended']:.0f}%", f"{r['evaluations']:.0f}", cell(r["seconds"])]
        out.append("| " + " | ".join(row) + " |")
    if result["frontier"]:
        real = result["real"]
        out += ["", f"Frontier: NLL a token at the entropy of real text (which has {real['nll']:.2f} at {real['entropy']:.2f}), and its perplexity as a multiple of the "
                "first GPT's. Then how much more NLL a token, and (ROUGE-1), a row has than a column, at the chosen knobs, paired by prompt:", "",
                "| | NLL there | perplexity | " + " | ".join(f"than {b}" for b in ours) + " |", "|---|---|---|" + "---|" * len(ours)]
        base = next((there for a, there in result["nll_at_real_entropy"].items() if "top_p" in result["systems"][a]["knob"]), None)
        for a, there in result["nll_at_real_entropy"].items():
            pairs = [result["differences"][a].get(b, {}) for b in ours]
            cells = [cell(d["nll"], 2) + f" ({cell(d['rouge_1'])})" * ("rouge_1" in d) if d else "" for d in pairs]
            times = "" if None in (there, base) else f"{math.exp(there - base):.2f} x"
            out.append(f"| {a} | {'not reached' if there is None else f'{there:.2f}'} | {times} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def machine(device):
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    return f"{os.cpu_count()} x {cpu}" + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else "")


def commit():
    git = lambda *a: subprocess.run(("git", *a), capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except OSError:
        return "unknown"


def main():
    options, = command_line(__doc__, EvalConfig)
    sys.stdout.reconfigure(errors="replace")
    device, autocast = pick_device(options.device)
    if not options.evaluator:
        options.evaluator = f"{options.out}/evaluator/gpt.pt"
        if not Path(options.evaluator).is_file():
            raise UserError(f"{options.evaluator} is missing; make it with bench/train_gpt.py --data={options.data} --seed=1234 --n_layer=6 "
                            f"--n_head=4 --n_embd=256 --max_steps=1000 --out={options.out}/evaluator, or name another --evaluator")
    corpus, systems, ours = Corpus(options.data, "val", 1024), {}, []
    for spec in [s.strip() for s in options.systems.split(",")] + [f"texts:{options.texts}"] * bool(options.texts):
        label, _, rest = spec.rpartition("=")
        kind, _, where = rest.partition(":")
        label = label or (Path(where).name if kind == "texts" else rest)
        if label in systems:
            raise UserError(f"--systems: two rows are called {label!r}; name them apart, LABEL=KIND:PATH")
        systems[label] = make_system(kind, where, options, corpus, device)
        ours += [label] * (kind == "textldm")
    path, lines = load_benchmark(options, corpus)
    evaluator, tokenizer = GPT.from_pretrained(options.evaluator)
    evaluator = evaluator.to(device)

    rng, half = np.random.default_rng(options.seed), len(lines) // 2
    choosing, reporting = slice(0, half), slice(half, None)
    clusters = min(options.clusters, half // 4)  # the same for halves as for wholes

    def measure(write, knob):
        """What a system writes with a knob to all prompts, and what the evaluator makes of it."""
        texts, nfe, seconds = write_all(write, lines, knob, options, corpus, autocast)
        nll, rows, features = score(evaluator, tokenizer, [b["prompt"] for b in lines], texts, autocast)
        words, pairs = words_and_pairs(rows, tokenizer["eot"])
        return dict(texts=[t for t, _ in texts], ended=[e for _, e in texts], nfe=nfe, seconds=seconds, nll=nll, features=features,
                    tokens=np.array([len(r) for r in rows]), words=words, pairs=pairs)

    truth = measure(make_system("real", "", options, corpus, device)[1], {})
    count = {key: sum(map(len, truth[key][choosing])) // 2 for key in ("words", "pairs")}  # half: all of it would not be a draw

    def point(m, part):
        return dict(nll=float(m["nll"][part].sum() / max(m["tokens"][part].sum(), 1)),
                    entropy=at_equal_count(entropy, m["words"][part], count["words"], rng)[0])

    report, frontier, per_text, training = {}, {}, {}, training_text(corpus)
    bar = tqdm(total=sum(len(knobs) for knobs, _ in systems.values()), desc="evaluate")
    for name, (knobs, write) in systems.items():
        tried = []
        for knob in knobs:
            tried.append(measure(write, knob))
            bar.update()
        if knobs[0]:
            frontier[name] = [dict(point(m, reporting), knob=knob) for knob, m in zip(knobs, tried)]
        best = choose([dict(point(m, choosing), i=i) for i, m in enumerate(tried)], point(truth, choosing))["i"]
        m, texts = tried[best], tried[best]["texts"][reporting]
        nll, tokens = m["nll"][reporting], m["tokens"][reporting]
        size = np.array([len(t.encode("utf-8", "replace")) for t in texts])
        scores, bert = rouge(texts, truth["texts"][reporting]), bert_score(texts, truth["texts"][reporting])
        prompts = [b["prompt"] for b in lines[reporting]]
        (own, train), (words_known, copies) = copied(texts, prompts, corpus), known(texts, prompts, *training)
        report[name] = dict(
            knob=knobs[best], nll=interval(nll, rng, tokens), nll_byte=interval(nll, rng, size),
            entropy=at_equal_count(entropy, m["words"][reporting], count["words"], rng),
            distinct_2=at_equal_count(different, m["pairs"][reporting], count["pairs"], rng),
            mauve=mauve(truth["features"][choosing], m["features"][reporting], clusters, rng),
            rouge=scores if isinstance(scores, str) else [interval(scores[:, k], rng) for k in range(3)],
            bertscore=bert if isinstance(bert, str) else interval(bert, rng), copied_prompt=own, copied_train=train,
            words_known=words_known, copies=copies,
            tokens=float(tokens.mean()), ended=float(np.mean(m["ended"][reporting])), evaluations=float(m["nfe"]), seconds=m["seconds"])
        per_text[name] = dict(texts=texts, nll=nll.tolist(), tokens=tokens.tolist(),
                              rouge_1=scores if isinstance(scores, str) else scores[:, 0].tolist())
    bar.close()

    real = point(truth, reporting)
    result = dict(
        setting=dict(asdict(options), command=" ".join(sys.argv), commit=commit(), machine=machine(device), benchmark=str(path),
                     row=corpus.N, clusters=clusters, count=count["words"]),
        systems=report, frontier=frontier, real=real,
        nll_at_real_entropy={name: at_entropy(points, real["entropy"]) for name, points in frontier.items()},
        differences={a: {b: difference(per_text[a], per_text[b], rng) for b in ours if a != b} for a in frontier},
        texts=per_text)
    text, out = tables(result, ours), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "eval.json", json.dumps(result, default=float))
    write_whole(out / "eval.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
