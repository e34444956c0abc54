"""How fast: training steps, sampling, preparing data, and how time grows. One run, one table, one JSON file.

    python bench/speed.py                                             # tiny, on the embedded docs; with --batches=1 about ten minutes on two cores
    python bench/speed.py --nanogpt=FOLDER                            # beside nanoGPT: a folder with its model.py, which we do not copy
    python bench/speed.py --parts=train,sample --preset=small --compile --data=data/owt2 --nanogpt=FOLDER            # on a GPU
    python bench/speed.py --parts=presets --data=data/owt2                                                           # what each preset wants

Machines drift, so what is compared runs in turns, a few steps each, and the tables have medians of the rounds. Tokens are those of rows, of which
`text` is the share that is not padding. `of peak` is the FLOPs of forward and backward, as torch counts them, over the best of a few large
matrix products. On a CPU all time in Corpus.batch is `waiting`; on a GPU it is not, as the next batches are drawn while the GPU is at work.
"""

import contextlib
import copy
import ctypes
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import textldm
from textldm import (GPT, Config, Corpus, DiTConfig, TextDiT, TextVAE, TrunkConfig, UserError, VAEConfig, command_line, continue_texts,
                     load_encoding, option, pick_device, run, write_whole)

SCRIPTS = dict(gpt="bench/train_gpt.py", vae="train_vae.py", dit="train_dit.py")


@dataclass
class SpeedConfig(Config):
    parts: str = option("train,sample,prepare,growth", "which, with commas (and presets: FLOPs and memory, counted, not timed)")
    preset: str = option("tiny", "of the three training scripts")
    data: str = option("data/docs", "a prepared corpus")
    nanogpt: str = option("", "folder with nanoGPT's model.py, to be measured beside ours")
    batch_size: int = option(0, "rows in a micro-batch (0: the preset's)", 0)
    block_size: int = option(0, "tokens in a row (0: the preset's)", 0)
    rounds: int = option(5, "rounds, of which the table has the median", 1)
    steps: int = option(10, "training steps in a round", 1)
    text: str = option("", "text to prepare, a path as data/prepare.py takes it (the embedded docs, four times over)")
    lengths: str = option("128,512,1024", "new tokens to sample after a prompt of 256")
    batches: str = option("1,32", "prompts at once")
    device: str = option("auto", "cpu, cuda, mps, or auto")
    compile: bool = option(False, "torch.compile")
    out: str = option("out/speed.json", "file to write")


def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))


def peak_memory(device):
    """Bytes: of the GPU's, or of this process (getrusage would begin with what its parent had)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def memory_of(device, work):
    """Bytes that work takes at most beyond what is in use before it (Linux with glibc, or a GPU)."""
    before = math.nan
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, and is not mistaken for memory in use
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
    work()
    return math.nan if math.isnan(before) else peak_memory(device) - before


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device, work, autocast=contextlib.nullcontext()):
    wait_for(device)
    start = time.perf_counter()
    with autocast:
        work()
    wait_for(device)
    return time.perf_counter() - start


def dtype_within(autocast, device):
    with autocast:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def matmul_peak(device, autocast):
    """FLOP/s of the best of a few large square products, in the precision that training computes in."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype_within(autocast, device)) for _ in range(2))
    return 2 * n**3 / min(seconds_of(device, lambda: a @ b) for _ in range(8))


# ---------------------------------------------------------------------------------------------------------
# Training steps. Every contender is a process of its own, that takes steps when it is given the turn.


class Turn:
    """In a worker: lets `steps` steps pass at each line of stdin, and answers how long they took."""

    def __init__(self, device):
        self.device, self.left, self.waited, self.start = device, 0, 0.0, None

    def measured(self, counter, cfg, N, text):
        self.told = dict(row=N, text=text, tokens=cfg.batch_size * N * cfg.accumulate, flops=counter.get_total_flops() * cfg.accumulate)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def before_step(self):
        if not self.left:
            wait_for(self.device)
            if self.start:
                print(json.dumps(dict(self.told, seconds=time.perf_counter() - self.start, waited=self.waited, memory=peak_memory(self.device))),
                      file=self.answers, flush=True)
            order = sys.stdin.readline()
            if not order.strip():
                raise SystemExit
            self.left, self.waited, self.start = int(order), 0.0, time.perf_counter()
        self.left -= 1


def work(name, options):
    """A worker: one script of ours, with its own loop, or nanoGPT's model in a loop like its own."""
    device, autocast = pick_device(options.device)
    turn = Turn(device)
    turn.answers, sys.stdout = sys.stdout, sys.stderr

    def timed(batch, *args, **more):
        start = time.perf_counter()
        result = batch(*args, **more)
        turn.waited += time.perf_counter() - start
        return result

    def train(stage, cfg, model, corpus, loss_of, evaluate, weight_of, **more):
        batch, micro = corpus.batch, 0
        with FlopCounterMode(display=False) as counter, autocast:  # of one step's forward and backward
            row = batch(np.random.default_rng(0), cfg.batch_size, corpus.N)
            row = type(row)(*(x.to(device) for x in row))
            loss_of(model.to(device), row, torch.Generator(device).manual_seed(0), 0)["loss"].backward()
        model.zero_grad()
        turn.measured(counter, cfg, corpus.N, row.counted.float().mean().item())

        def next_batch(rng, B, N, *rest, **rules):  # rows as long as they may be, as nanoGPT's are
            nonlocal micro
            if micro % cfg.accumulate == 0:
                turn.before_step()
            micro += 1
            return timed(batch, rng, B, corpus.N, *rest, **rules)

        corpus.fixed_batches = lambda *_, **__: None
        corpus.batch = next_batch
        textldm.train(stage, replace(cfg, max_steps=10**6, log_interval=10**6, eval_interval=10**6), model, corpus, loss_of,
                      lambda model: dict(loss=0.0), weight_of, **more)

    if name != "nanogpt":
        module = load_module(ROOT / SCRIPTS[name.split()[0]])
        module.train = train
        return module.main()

    nano, module = load_module(Path(options.nanogpt) / "model.py"), load_module(ROOT / SCRIPTS["gpt"])
    trunk, cfg = command_line("", TrunkConfig, textldm.TrainConfig, presets=module.PRESETS)
    corpus = Corpus(cfg.data, "train", trunk.block_size)
    torch.backends.cuda.enable_flash_sdp(True)  # as it comes; ours chooses by length on a CPU
    N, B, tokens = corpus.N + 1, cfg.batch_size, corpus.tokens  # the rows of train_gpt.py
    torch.manual_seed(1)
    model = nano.GPT(nano.GPTConfig(block_size=N, vocab_size=corpus.meta["vocab_size"], n_layer=trunk.n_layer, n_head=trunk.n_head,
                                    n_embd=trunk.n_embd, dropout=0.0, bias=True)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    compiled = torch.compile(model) if cfg.compile else model

    def batch():
        starts = np.random.randint(0, len(tokens) - N, B)
        x_y = [torch.from_numpy(np.stack([tokens[i + k : i + k + N] for i in starts]).astype(np.int64)) for k in (0, 1)]
        return [(rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True) for rows in x_y]

    with FlopCounterMode(display=False) as counter, autocast:
        model(*batch())[1].backward()
    model.zero_grad()
    turn.measured(counter, cfg, N, 1.0)
    while True:
        turn.before_step()
        for _ in range(cfg.accumulate):
            x, y = timed(batch)
            with autocast:
                loss = compiled(x, y)[1] / cfg.accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def load_module(path):
    if not path.is_file():
        raise UserError(f"{path} is missing (--nanogpt wants a folder with model.py of github.com/karpathy/nanoGPT)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(options, folder, peak):
    """A row a contender: tokens/s, utilisation, memory, and the share of time spent waiting for data."""
    sizes = [f"--{k}={getattr(options, k)}" for k in ("batch_size", "block_size") if getattr(options, k)]
    common = [f"--data={options.data}", f"--out={folder}", f"--device={options.device}", f"--preset={options.preset}", *sizes]
    for script in ("gpt", "vae"):  # the next stage wants a checkpoint of this one, of these sizes
        subprocess.run([sys.executable, ROOT / SCRIPTS[script], *common, "--max_steps=1"], check=True, stdout=subprocess.DEVNULL)
    names = [*SCRIPTS, *["gpt with AdamW"], *["nanogpt"] * bool(options.nanogpt)]
    environment = {**os.environ, "TEXTLDM_SPEED": json.dumps(asdict(options))}
    workers = {n: subprocess.Popen([sys.executable, __file__, *common, *["--compile"] * options.compile, *["--no-muon"] * ("AdamW" in n)], text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=open(folder / f"{n}.log", "w"), env={**environment, "TEXTLDM_WORKER": n}) for n in names}
    rounds = {n: [] for n in names}
    for i in range(options.rounds + 1):
        for name, worker in workers.items():
            try:
                print(f"{options.steps if i else 3}", file=worker.stdin, flush=True)
            except BrokenPipeError:
                pass
            answer = worker.stdout.readline()
            if not answer:
                raise UserError(f"{name} did not get through its steps: {(folder / f'{name}.log').read_text().strip().splitlines()[-1:]}")
            if i:  # the first few warm up
                rounds[name].append(json.loads(answer))
    rows = []
    for name, worker in workers.items():
        worker.stdin.close()
        worker.wait()
        median = lambda of: float(np.median([of(r) for r in rounds[name]]))
        r, ours = rounds[name][-1], np.array([r["seconds"] for r in rounds["gpt"]])
        rows.append(dict(stage=name, row=r["row"], text=r["text"], tokens_per_second=median(lambda r: r["tokens"] * options.steps / r["seconds"]),
                         of_peak=median(lambda r: r["flops"] * options.steps / r["seconds"]) / peak,
                         gflop_per_step=r["flops"] / 1e9, waiting=median(lambda r: r["waited"] / r["seconds"]), memory_mb=r["memory"] / 2**20,
                         seconds_over_gpt=float(np.median(np.array([r["seconds"] for r in rounds[name]]) / ours))))
    return rows


# ---------------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def cached_gpt(gpt, prompts, length, dtype, compile=False):
    """Greedy continuation (B, length) of prompts (B, P) by the baseline with a static cache of keys and values."""
    (B, P), E, H = prompts.shape, gpt.config.n_embd, gpt.config.n_head
    cache = torch.zeros(gpt.config.n_layer, 2, B, H, P + length, E // H, device=prompts.device, dtype=dtype)
    at = torch.arange(P + length, device=prompts.device)

    def step(tokens, where):  # tokens (B, n) at positions where (n,)
        x = gpt.wte(tokens) + gpt.wpe(where)                                    # (B, n, E)
        mask = at <= where[:, None]                                             # (n, P + length)
        for block, (keys, values) in zip(gpt.h, cache):
            qkv = block.attn.c_attn(block.ln_1(x)).view(B, len(where), 3, H, E // H).permute(2, 0, 3, 1, 4)
            keys.index_copy_(2, where, qkv[1].to(keys.dtype))
            values.index_copy_(2, where, qkv[2].to(keys.dtype))
            y = F.scaled_dot_product_attention(qkv[0].to(keys.dtype), keys, values, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, len(where), E))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(gpt.ln_f(x[:, -1:]), gpt.wte.weight).argmax(-1)         # (B, 1)

    token, new = step(prompts, at[:P]), []
    step = torch.compile(step) if compile else step
    for i in range(length - 1):
        new.append(token)
        token = step(token.clone(), at[P + i : P + i + 1])
    return torch.cat((*new, token), 1)


def network(stage, preset, device, **size):
    """The network of a stage, of a preset's size but for `size`, untrained: speed does not ask what it knows."""
    cls, config = dict(gpt=(GPT, TrunkConfig), vae=(TextVAE, VAEConfig), dit=(TextDiT, DiTConfig))[stage]
    preset_of = load_module(ROOT / SCRIPTS[stage]).PRESETS[preset]
    keep = {k: v for k, v in preset_of.items() if k in config.__dataclass_fields__}
    return cls(config(**keep | size)).to(device).eval()


def hugging_face(gpt, device):
    """A function like cached_gpt: transformers' GPT-2 of the same size and its `generate`; None without the package."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = gpt.config
    model = GPT2LMHeadModel(GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size, vocab_size=c.vocab_size)).to(device).eval()
    return lambda prompts, length: model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, min_new_tokens=length,
                                                  do_sample=False, pad_token_id=0)


def sampling(options, V):
    device, autocast = pick_device(options.device)
    dtype = dtype_within(autocast, device)
    try:
        lengths, batches = ([int(x) for x in text.split(",")] for text in (options.lengths, options.batches))
    except ValueError:
        raise UserError(f"--lengths={options.lengths} and --batches={options.batches} must be numbers with commas between") from None
    size = dict(block_size=256 + max(lengths), vocab_size=V)
    torch.manual_seed(0)
    gpt, vae = (network(stage, options.preset, device, **size) for stage in ("gpt", "vae"))
    dit = network("dit", options.preset, device, **size, channels=vae.config.channels)
    causal, blocks = copy.copy(vae), {b: copy.copy(dit) for b in (4, 8, 16, 32)}  # Cola DLM on the same weights, in a window of 256
    causal.config = replace(vae.config, causal=True)
    for b in blocks:
        blocks[b].config = replace(dit.config, latent_block=b, block_size=256)
    if options.compile:
        dit.forward = torch.compile(dit.forward)
    theirs = hugging_face(gpt, device)
    rows = []
    for B in batches:
        prompts = torch.randint(0, V - 1, (B, 256), device=device)
        for length in lengths:
            ours = lambda vae, dit, steps: lambda: continue_texts(vae, dit, prompts.tolist(), length, V - 1, steps=steps)
            systems = {"textldm, 50 steps": (ours(vae, dit, 50), 50), "textldm, 20 steps": (ours(vae, dit, 20), 20),  # and evaluations
                       **{f"blocks of {b}, 20 steps": (ours(causal, blocks[b], 20), 20 * math.ceil(length / b)) for b in blocks},
                       "gpt, static cache": (lambda: cached_gpt(gpt, prompts, length, dtype, options.compile), length)}
            if theirs:
                systems["gpt of transformers"] = lambda: theirs(prompts, length), length
            seconds, memory = {name: [] for name in systems}, {}
            for i in range(options.rounds if device.type == "cuda" else min(options.rounds, 2)):
                for name, (system, _) in systems.items():
                    if i == 0 and device.type == "cuda":  # where something compiles
                        seconds_of(device, system, autocast)
                    torch.backends.cuda.enable_flash_sdp(True)  # as it comes; ours chooses by length on a CPU
                    memory[name] = memory_of(device, lambda: seconds[name].append(seconds_of(device, system, autocast)))
            base = np.array(seconds["gpt, static cache"])
            for name, s in seconds.items():
                rows.append(dict(system=name, prompts=B, new_tokens=length, seconds=float(np.median(s)), tokens_per_second=B * length / float(np.median(s)),
                                 evaluations=systems[name][1], memory_mb=memory[name] / 2**20, speed_over_gpt=float(np.median(base / np.array(s)))))
    return rows


# ---------------------------------------------------------------------------------------------------------
# Preparing data


def preparing(options, folder):
    """data/prepare.py beside bare tiktoken on the same text, in turns; on one core and on all; memory against size."""
    meta = json.loads((Path(options.data) / "meta.json").read_text())
    encoding, cores = load_encoding(meta), sorted(os.sched_getaffinity(0))
    prepare = load_module(ROOT / "data/prepare.py")
    documents = list(prepare.Files([options.text])() if options.text else prepare.docs()) * (1 if options.text else 4)
    rows = []
    for share, used in ((1, cores[:1]), (1, cores), (3, cores)):
        file = folder / f"{share}.jsonl"
        if not file.exists():
            file.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in documents * share))
        size, ours, bare = file.stat().st_size, [], []
        for _ in range(min(options.rounds, 3)):
            os.sched_setaffinity(0, used)
            took = []
            for way in (lambda: encoding.encode_ordinary_batch(documents * share, num_threads=len(used)),
                        lambda: [encoding.encode_ordinary(text) for text in documents * share])[: 1 + (len(used) == 1)]:
                start = time.perf_counter()
                way()
                took.append(time.perf_counter() - start)
            bare.append(min(took))
            # ru_maxrss would be that of this process, which a child begins with
            code = f"import os, runpy, sys; os.cpu_count = lambda: {len(used)}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); " \
                   "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
            kind = ["--encoding=bpe", f"--vocab_size={meta['vocab_size']}"] if meta["encoding"] == "bpe" else []
            out = subprocess.run([sys.executable, "-c", code, ROOT / "data/prepare.py", file, f"--out={folder / 'prepared'}", *kind],
                                 capture_output=True, text=True, check=True).stdout.split("\n")
            ours.append(float(next(line for line in out if "million a second" in line).split(" tokens in ")[1].split()[0]))
            memory = int(out[-2]) / 1024
        os.sched_setaffinity(0, cores)
        rows.append(dict(cores=len(used), text_mb=size / 1e6, mb_per_second=size / 1e6 / float(np.median(ours)), over_tiktoken=float(np.median(np.array(bare) / ours)),
                         memory_mb=memory))
    return rows


# ---------------------------------------------------------------------------------------------------------
# Growth


def growth(options, V):
    """Exponents: seconds ~ length^a at fixed width, and ~ parameters^b at fixed length, of a training step and of sampling with the DiT."""
    device, autocast = pick_device(options.device)

    def seconds(length, width, layers):
        torch.manual_seed(0)
        size = dict(n_layer=layers, n_head=max(width // 48, 1), n_embd=width, block_size=length, vocab_size=V)
        vae = TextVAE(VAEConfig(**size)).to(device).eval().requires_grad_(False)
        dit = TextDiT(DiTConfig(**size, channels=vae.config.channels)).to(device)
        row = textldm.Batch(torch.zeros(1, length, dtype=torch.long), (torch.arange(length) >= length // 4).long()[None], torch.ones(1, length))
        row, result = row.to(device), []
        for what in (lambda: textldm.flow_loss(dit, vae.latents(row.tokens, row.segment), row, torch.Generator(device).manual_seed(0))[0].backward(),
                     lambda: continue_texts(vae, dit, [[1] * (length // 4)], 0, V - 1, steps=8)):
            result.append(min(seconds_of(device, what, autocast) for _ in range(3)))
        return result, sum(p.numel() for p in dit.parameters())

    rows = []
    for what, sizes in (("length", [(n, 192, 4) for n in (256, 512, 1024, 2048, 4096)]), ("parameters", [(256, w, 4) for w in (96, 192, 384, 768)])):
        measured = [seconds(*s) for s in sizes]
        x = [s[0] if what == "length" else n for s, (_, n) in zip(sizes, measured)]
        for k, name in enumerate(("training step", "sampling, 8 steps")):
            y = [t[k] for t, _ in measured]
            rows.append(dict(of=name, against=what, **{f"{v:,}": s for v, s in zip(x, y)}, exponent=float(np.polyfit(np.log(x), np.log(y), 1)[0]),
                             exponent_of_last_two=float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))))
    return rows


# ---------------------------------------------------------------------------------------------------------
# What the presets want


def presets(V):
    """For each stage and preset of rows of 1,024 tokens, by doing a step on one row and on two, on the CPU: parameters, FLOPs of forward and backward a token of its rows, GB of
    weights, gradients, AdamW's moments and (of the DiT) the average, and GB of activations a row, those that are kept for the backward pass."""
    device, autocast = pick_device("cpu")
    gpt = network("gpt", "small", device, block_size=1025, vocab_size=V)  # a teacher reads an end-of-text before a row
    vae = network("vae", "small", device, block_size=1024, vocab_size=V, teacher_embd=gpt.config.n_embd)
    generator, rows = torch.Generator(), []
    row_of = lambda n: textldm.Batch(torch.zeros(n, 1024, dtype=torch.long), (torch.arange(1024) >= 256).long().repeat(n, 1), torch.ones(n, 1024))

    def count(stage, preset, net, loss_of):
        def step(n):
            kept = {}

            def keep(x):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x
            with FlopCounterMode(display=False) as counter, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = loss_of(row_of(n))
                held = sum(kept.values())
                loss.backward()
            net.zero_grad()
            return held, counter.get_total_flops()
        (one, flops), (two, _), n = step(1), step(2), sum(p.numel() for p in net.parameters())
        rows.append(dict(stage=stage, preset=preset, parameters=f"{n / 1e6:.0f}M", gflop_per_token=flops / 1024 / 1e9,
                         state_gb=n * (20 if stage == "dit" else 16) / 1e9, row_gb=(two - one) / 1e9))

    teacher = copy.deepcopy(gpt).requires_grad_(False)
    count("gpt", "small", gpt, lambda row: textldm.cross_entropy(gpt(row.tokens), row.tokens).mean())
    del gpt
    count("vae", "all", vae, lambda row: vae(row, textldm.teacher_features(teacher, row.tokens, 0), generator=generator)["loss"])
    vae.requires_grad_(False)
    for preset in ("small", "medium", "large"):
        dit = network("dit", preset, device, block_size=1024, vocab_size=V, channels=vae.config.channels)
        count("dit", preset, dit, lambda row: textldm.flow_loss(dit, vae.latents(row.tokens, row.segment), row, generator)[0])
    return rows


def table(rows):
    lines = []
    for row in rows:
        if not lines or [*row] != heads:
            heads = [*row]
            lines += ["", "| " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|" + "---|" * len(heads)]
        lines.append("| " + " | ".join(f"{v:,.3g}" if isinstance(v, float) and abs(v) < 100 else f"{v:,.0f}" if isinstance(v, float) else str(v)
                                       for v in row.values()) + " |")
    return "\n".join(lines)


def main():
    if "TEXTLDM_WORKER" in os.environ:  # a worker: the command line is the training script's
        return work(os.environ["TEXTLDM_WORKER"], SpeedConfig(**json.loads(os.environ["TEXTLDM_SPEED"])))
    options, = command_line(__doc__, SpeedConfig)
    device, autocast = pick_device(options.device)
    V = Corpus(options.data, "train", 64).meta["vocab_size"]
    parts = dict(train=lambda: training(options, folder, peak), sample=lambda: sampling(options, V), prepare=lambda: preparing(options, folder),
                 growth=lambda: growth(options, V), presets=lambda: presets(V))
    if unknown := set(options.parts.split(",")) - {*parts}:
        raise UserError(f"--parts={options.parts}: {', '.join(sorted(unknown))} is none of {', '.join(parts)}")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    peak = matmul_peak(device, autocast)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    report = dict(commit=commit, machine=machine, torch=torch.__version__, threads=torch.get_num_threads(), matmul_tflops=peak / 1e12, options=asdict(options))
    print(f"commit {commit}, {machine}, torch {torch.__version__}, {report['threads']} threads, matmul peak {peak / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in options.parts.split(","):
            report[part] = parts[part]()
            print(f"\n{part}\n{table(report[part])}", flush=True)
            write_whole(options.out, json.dumps(report, indent=1))


if __name__ == "__main__":
    run(main)
