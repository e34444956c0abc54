"""Measures time and memory of training, of sampling and of preparing data, and how time grows.

    python bench/speed.py                       # preset tiny, on data/docs
    python bench/speed.py --batches=1           # the same, in about ten minutes on two cores
    python bench/speed.py --nanogpt=FOLDER      # beside nanoGPT; FOLDER has its model.py
    python bench/speed.py --parts=train,sample --preset=small --compile --data=data/owt2
    python bench/speed.py --parts=train --stages="gpt,gpt compiled"     # what --compile saves
    python bench/speed.py --parts=presets --data=data/owt2      # what each preset needs

Prints a table for each part, and writes all tables to one JSON file. The speed of a machine drifts.
So systems take turns, a few steps each, and the tables have medians over the rounds.

Columns of training:
    step ms             milliseconds of a step
    tokens per second   tokens of rows, of which `text` is the share that is not padding
    of peak             FLOPs of forward and backward, as torch counts them, over the best rate of a
                        few large matrix products
    waiting             share of time in Corpus.batch. On a GPU this is no loss, because the next
                        batches are drawn while the GPU works
    seconds over first  seconds of a step, over those of the first row
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from baselines.gpt import PRESETS as GPT_PRESETS
from bench.report import commit
from data.embedded import docs
from data.reading import Reader
from engine.checkpoint import write_whole
from engine.config import DIT_PRESETS, VAE_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus, encode, load_encoding, to_device
from engine.loop import Run, pick_device
from engine.config import UserError
from engine.terminal import run_script
from textldm import (
    GPT,
    OURS,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    continue_texts,
    cross_entropy,
    flow_loss,
    make_batch,
    option,
    teacher_features,
)
from variants.cola_dlm import CausalVAE, ColaConfig, ColaDiT, continue_in_blocks

SCRIPTS = dict(gpt="baselines/gpt.py", vae="train_vae.py", dit="train_dit.py")
PRESETS = dict(gpt=GPT_PRESETS, vae=VAE_PRESETS, dit=DIT_PRESETS)
PARTS = ("train", "sample", "prepare", "growth", "presets")
# What may follow the name of a stage in --stages, and the option that it stands for.
KINDS = {"": [], "with AdamW": ["--no-muon"], "compiled": ["--compile"]}
# Options that training scripts get as they are. 0 leaves the preset's.
SIZES = ("batch_size", "accumulate", "block_size", "n_layer", "n_head", "n_embd")
ENDLESS = 10**6  # steps
PROMPT = 256  # tokens of a prompt, and the window of blocks


@dataclass
class SpeedConfig:
    parts: str = option(
        "train,sample,prepare,growth",
        "which, with commas (and presets: FLOPs and memory, counted, not timed)",
    )
    preset: str = option("tiny", "of the three training scripts")
    data: str = option("data/docs", "a prepared corpus")
    nanogpt: str = option("", "folder with nanoGPT's model.py, to be measured beside ours")
    stages: str = option(
        "gpt,vae,dit,gpt with AdamW",
        'what to train, with commas; "gpt compiled" is the GPT with --compile',
    )
    turns: bool = option(True, "stages take turns; without, one is in memory at a time")
    batch_size: int = option(0, "in training, rows in a micro-batch (0: the preset's)", 0)
    accumulate: int = option(0, "in training, micro-batches in a step (0: the preset's)", 0)
    block_size: int = option(0, "in training, tokens in a row (0: the preset's)", 0)
    n_layer: int = option(0, "in training, blocks (0: the preset's)", 0)
    n_head: int = option(0, "in training, heads (0: the preset's)", 0)
    n_embd: int = option(0, "in training, width (0: the preset's)", 0)
    rounds: int = option(5, "rounds, of which the table has the median", 1)
    steps: int = option(10, "training steps in a round", 1)
    text: str = option(
        "", "text to prepare, a path as data/prepare.py takes it (the embedded docs, four times)"
    )
    lengths: str = option("128,512,1024", "new tokens to sample after a prompt of 256")
    batches: str = option("1,32", "prompts at once")
    device: str = option("auto", "cpu, cuda, mps, or auto")
    compile: bool = option(False, "torch.compile")
    out: str = option("out/speed.json", "file to write")


# ---- Clocks and memory ---------------------------------------------------------------------------


def resident(what):
    """Bytes of this process: VmRSS, what it holds now, or VmHWM, the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {what}")


def peak_memory(device):
    """Bytes of the GPU, or of this process. (getrusage would begin with the peak of the parent.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def memory_of(device, work):
    """Bytes that work takes at most, beyond what is in use before it. NaN if neither a GPU nor
    Linux measures it."""
    before = math.nan
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, and does not count
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
    work()
    if math.isnan(before):
        return math.nan
    return peak_memory(device) - before


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
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return torch.float32


def matmul_peak(device, autocast):
    """FLOP/s of the best of a few large square products, in the precision of training."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = dtype_within(autocast, device)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        best = min(best, seconds_of(device, lambda: a @ b))
    return 2 * n**3 / best


def median(values):
    return float(np.median(values))


def load_module(path):
    if not path.is_file():
        raise UserError(
            f"{path} is missing (--nanogpt needs a folder with model.py of "
            "github.com/karpathy/nanoGPT)"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Training steps ------------------------------------------------------------------------------
# Each contender is a process of its own, which takes steps when it is given the turn.


class Turn:
    """Makes a worker wait for its turn. Each line of stdin is a number of steps to take. After them
    a line of JSON tells how long they took."""

    def __init__(self, device, answers):
        self.device = device
        self.answers = answers  # a file
        self.left = 0  # steps
        self.start = None
        self.waited = 0.0  # seconds
        self.facts = {}  # what does not change from step to step

    def describe(self, cfg, N, text, flops):
        """Takes the facts. N: the length of a row. text: the share of it that is not padding.
        flops: of a micro-batch."""
        tokens = cfg.batch_size * N * cfg.accumulate
        self.facts = dict(row=N, text=text, tokens=tokens, flops=flops * cfg.accumulate)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def before_step(self):
        if self.left == 0:
            wait_for(self.device)
            if self.start is not None:
                self.answer()
            order = sys.stdin.readline()
            if not order.strip():
                raise SystemExit
            self.left = int(order)
            self.waited = 0.0
            self.start = time.perf_counter()
        self.left -= 1

    def answer(self):
        measured = dict(
            seconds=time.perf_counter() - self.start,
            waited=self.waited,
            memory=peak_memory(self.device),
        )
        print(json.dumps(self.facts | measured), file=self.answers, flush=True)

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time within as time of waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start


class TimedCorpus(Corpus):
    """A Corpus whose rows have full length, as nanoGPT's have."""

    turn = None  # the worker's Turn

    def batch(self, rng, B, N):
        with self.turn.waiting():
            return super().batch(rng, B, self.N)


class TimedRun(Run):
    """A Run that waits for its turn before each step. Before the first step it counts FLOPs. It
    writes no checkpoints: those of large presets are of many GB."""

    turn = None  # the worker's Turn

    def steps(self, *evaluation, **options):
        for step in super().steps(*evaluation, **options):
            self.turn.before_step()
            yield step

    def save(self):
        pass

    def micro_batches(self, corpus, weight_of):
        if not self.turn.facts:
            yield from self.counted(corpus)
        yield from super().micro_batches(corpus, weight_of)

    def counted(self, corpus):
        """Yields one more micro-batch, and counts what the script does with it. Its gradients are
        dropped."""
        batch = corpus.batch(np.random.default_rng(0), self.cfg.batch_size, corpus.N)
        text = batch.counted.float().mean().item()
        generator = torch.Generator(self.device).manual_seed(0)
        net = self.net
        self.net = self.model  # FLOPs are counted of the network that is not compiled
        with FlopCounterMode(display=False) as counter:
            yield to_device(batch, self.device), 1.0, generator
        self.net = net
        self.model.zero_grad()
        self.turn.describe(self.cfg, corpus.N, text, counter.get_total_flops())


def work(name, options):
    """The program of a worker: one of our scripts, or nanoGPT's model in a loop like its own."""
    device, autocast = pick_device(options.device)
    turn = Turn(device, sys.stdout)
    sys.stdout = sys.stderr
    if name == "nanogpt":
        train_nanogpt(turn, autocast, options)
        return
    TimedCorpus.turn = turn
    TimedRun.turn = turn
    stage = name.split()[0]
    module = load_module(ROOT / SCRIPTS[stage])
    module.Corpus = TimedCorpus
    module.Run = TimedRun
    module.main()


def train_nanogpt(turn, autocast, options):
    nano = load_module(Path(options.nanogpt) / "model.py")
    config, cfg = command_line("", TransformerConfig, TrainConfig, presets=GPT_PRESETS, recipe=OURS)
    corpus = Corpus(cfg.data, "train", config.block_size)
    device = turn.device
    torch.backends.cuda.enable_flash_sdp(True)  # torch's default; ours chooses by length on a CPU
    N = corpus.N + 1  # as baselines/gpt.py
    torch.manual_seed(1)
    model = nano.GPT(nanogpt_config(nano, config, N, corpus.meta["vocab_size"])).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    net = torch.compile(model) if cfg.compile else model

    def next_batch():
        return nanogpt_batch(corpus.tokens, cfg.batch_size, N, device)

    with FlopCounterMode(display=False) as counter, autocast:
        _, loss = model(*next_batch())
        loss.backward()
    model.zero_grad()
    turn.describe(cfg, N, 1.0, counter.get_total_flops())
    while True:
        turn.before_step()
        for _ in range(cfg.accumulate):
            with turn.waiting():
                x, y = next_batch()
            with autocast:
                _, loss = net(x, y)
            (loss / cfg.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def nanogpt_config(nano, config, N, vocab_size):
    """nanoGPT's config of a model with the size of ours."""
    return nano.GPTConfig(
        block_size=N,
        vocab_size=vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=0.0,
        bias=True,
    )


def nanogpt_batch(tokens, B, N, device):
    """B windows of N tokens, and the tokens that follow each of theirs, as nanoGPT draws them."""
    starts = np.random.randint(0, len(tokens) - N, B)
    batch = []
    for shift in (0, 1):
        rows = np.stack([tokens[i + shift : i + shift + N] for i in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        if device.type == "cuda":
            rows = rows.pin_memory()
        batch.append(rows.to(device, non_blocking=True))
    return batch


def training(options, folder, peak):
    """A row for each contender: tokens a second, utilisation, memory, and the share of waiting."""
    common = [f"--data={options.data}", f"--device={options.device}", f"--preset={options.preset}"]
    for key in SIZES:
        if getattr(options, key):
            common.append(f"--{key}={getattr(options, key)}")
    names = names_of_stages(options)
    needed = {name.split()[0] for name in names}
    if "vae" in needed:
        train_one_step("gpt", [*common, f"--out={folder}"])  # the teacher
    if "dit" in needed:
        train_one_step("vae", [*common, f"--out={folder}", "--teacher=none"])
    if options.nanogpt:
        names.append("nanogpt")
    groups = [names] if options.turns else [[name] for name in names]
    answers = {}
    for group in groups:
        workers = {name: start_worker(name, options, folder, common) for name in group}
        answers |= take_turns(workers, options, folder)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    first_seconds = np.array([a["seconds"] for a in answers[names[0]]])
    rows = []
    for name in names:
        row = training_row(answers[name], options.steps, peak, first_seconds)
        rows.append(dict(stage=name) | row)
    return rows


def names_of_stages(options):
    """The list of --stages. Raises UserError."""
    names = [name.strip() for name in options.stages.split(",")]
    for name in names:
        stage, _, kind = name.partition(" ")
        if stage not in SCRIPTS or kind not in KINDS or names.count(name) > 1:
            raise UserError(
                f"--stages={options.stages}: expected gpt, vae and dit, each once, or once more "
                f"with one of {', '.join(filter(None, KINDS))}"
            )
    return names


def train_one_step(stage, options):
    """Makes a checkpoint that another stage needs."""
    command = [sys.executable, ROOT / SCRIPTS[stage], *options, "--max_steps=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def start_worker(name, options, folder, common):
    """A process that runs `work`, with the command line of a training script."""
    command = [sys.executable, __file__, *common, f"--out={folder / name}"]
    for key in ("max_steps", "log_interval", "eval_interval"):
        command.append(f"--{key}={ENDLESS}")
    stage, _, kind = name.partition(" ")
    command += KINDS[kind]
    if stage == "vae":
        command.append(f"--teacher={folder / 'gpt.pt'}")
    if stage == "dit":
        command.append(f"--vae={folder / 'vae.pt'}")
    if options.compile:
        command.append("--compile")
    environment = dict(os.environ, TEXTLDM_WORKER=name)
    environment["TEXTLDM_SPEED"] = json.dumps(asdict(options))
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )


def take_turns(workers, options, folder):
    """For each worker a list of its answers (dicts, as Turn makes them), one for each round."""
    answers = {name: [] for name in workers}
    for i in range(options.rounds + 1):
        steps = options.steps if i else 3  # the first round warms up, and does not count
        for name, worker in workers.items():
            with contextlib.suppress(BrokenPipeError):
                print(steps, file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            if not line:
                said = (folder / f"{name}.log").read_text().strip().splitlines()[-1:]
                raise UserError(f"{name} did not get through its steps: {said}")
            if i:
                answers[name].append(json.loads(line))
    return answers


def training_row(answers, steps, peak, first_seconds):
    """answers: of a worker. first_seconds: what the first worker took in the same rounds."""
    seconds = np.array([a["seconds"] for a in answers])
    waited = np.array([a["waited"] for a in answers])
    last = answers[-1]
    return dict(
        row=last["row"],
        text=last["text"],
        step_ms=median(1000 * seconds / steps),
        tokens_per_second=median(last["tokens"] * steps / seconds),
        of_peak=median(last["flops"] * steps / seconds) / peak,
        gflop_per_step=last["flops"] / 1e9,
        waiting=median(waited / seconds),
        memory_mb=last["memory"] / 2**20,
        seconds_over_first=median(seconds / first_seconds),
    )


# ---- Sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def cached_gpt(gpt, prompts, length, dtype, compile=False):
    """Continues prompts (B, P) greedily by (B, length), with a static cache of keys and values."""
    B, P = prompts.shape
    E, H = gpt.config.n_embd, gpt.config.n_head
    shape = (gpt.config.n_layer, 2, B, H, P + length, E // H)
    cache = torch.zeros(shape, device=prompts.device, dtype=dtype)
    at = torch.arange(P + length, device=prompts.device)

    def step(tokens, where):
        """tokens (B, n) at positions where (n,) -> the likeliest next token (B, 1)"""
        n = len(where)
        x = gpt.wte(tokens) + gpt.wpe(where)  # (B, n, E)
        mask = at <= where[:, None]  # (n, P + length)
        for block, (keys, values) in zip(gpt.h, cache):
            qkv = block.attn.c_attn(block.ln_1(x)).view(B, n, 3, H, E // H)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).to(dtype)  # (B, H, n, D) each
            keys.index_copy_(2, where, k)
            values.index_copy_(2, where, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, n, E))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(gpt.ln_f(x[:, -1:]), gpt.wte.weight).argmax(-1)

    token = step(prompts, at[:P])
    new = [token]
    if compile:
        step = torch.compile(step)
    for i in range(P, P + length - 1):
        token = step(token.clone(), at[i : i + 1])
        new.append(token)
    return torch.cat(new, 1)


def config_of(config_type, preset, **size):
    """A config with our departures from the paper, of a preset (a dict), but for size."""
    values = OURS | preset | size
    names = {f.name for f in fields(config_type)}
    return config_type(**{k: v for k, v in values.items() if k in names})


def network(stage, preset, device, **size):
    """The network of a stage, of a preset but for size. It is untrained, and no slower for that."""
    types = dict(gpt=(GPT, TransformerConfig), vae=(TextVAE, VAEConfig), dit=(TextDiT, DiTConfig))
    model_type, config_type = types[stage]
    config = config_of(config_type, PRESETS[stage][preset], **size)
    return model_type(config).to(device).eval()


def with_weights_of(model, model_type, config):
    """A model of another type, which shares the weights of a model."""
    with torch.device("meta"):
        other = model_type(config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def hugging_face(gpt, device):
    """A function like cached_gpt, of the package transformers: GPT-2 of the same size. None without
    the package."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = GPT2Config(
        n_layer=gpt.config.n_layer,
        n_head=gpt.config.n_head,
        n_embd=gpt.config.n_embd,
        n_positions=gpt.config.block_size,
        vocab_size=gpt.config.vocab_size,
    )
    model = GPT2LMHeadModel(config).to(device).eval()

    def write(prompts, length):
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )

    return write


class Samplers:
    """All systems that write, of the sizes of a preset."""

    def __init__(self, options, V, longest):
        self.device, self.autocast = pick_device(options.device, PROMPT + longest)
        self.dtype = dtype_within(self.autocast, self.device)
        self.compile = options.compile
        size = dict(block_size=PROMPT + longest, vocab_size=V)
        torch.manual_seed(0)
        self.gpt = network("gpt", options.preset, self.device, **size)
        self.vae = network("vae", options.preset, self.device, **size)
        size["channels"] = self.vae.config.channels
        self.dit = network("dit", options.preset, self.device, **size)
        # Cola DLM has the same weights, in a window of the prompt's length.
        self.causal_vae = with_weights_of(self.vae, CausalVAE, self.vae.config)
        self.block_dits = {}
        for b in (4, 8, 16, 32):
            values = asdict(self.dit.config) | dict(latent_block=b, block_size=PROMPT)
            self.block_dits[b] = with_weights_of(self.dit, ColaDiT, ColaConfig(**values))
        if options.compile:
            self.dit.forward = torch.compile(self.dit.forward)
        self.transformers = hugging_face(self.gpt, self.device)

    def systems(self, prompts, length):
        """A dict: name -> (a function that writes, the number of its evaluations of a network)."""
        lists = prompts.tolist()

        def textldm(steps):
            continue_texts(self.vae, self.dit, lists, length, Sampling(steps))

        def blocks(b):
            dit = self.block_dits[b]
            continue_in_blocks(self.causal_vae, dit, lists, length, Sampling(20))

        def gpt():
            cached_gpt(self.gpt, prompts, length, self.dtype, self.compile)

        systems = {}
        for steps in (50, 20):
            systems[f"textldm, {steps} steps"] = (partial(textldm, steps), steps)
        for b in self.block_dits:
            evaluations = 20 * math.ceil(length / b)
            systems[f"blocks of {b}, 20 steps"] = (partial(blocks, b), evaluations)
        systems["gpt, static cache"] = (gpt, length)
        if self.transformers is not None:
            transformers = partial(self.transformers, prompts, length)
            systems["gpt of transformers"] = (transformers, length)
        return systems


def sampling(options, V):
    """A row for each system, number of prompts and length."""
    lengths, batches = numbers(options.lengths), numbers(options.batches)
    if not lengths or not batches:
        raise UserError(
            f"--lengths={options.lengths} and --batches={options.batches} must be numbers with "
            "commas between"
        )
    samplers = Samplers(options, V, max(lengths))
    rounds = options.rounds
    if samplers.device.type != "cuda":
        rounds = min(rounds, 2)
    rows = []
    for B in batches:
        prompts = torch.randint(0, V - 1, (B, PROMPT), device=samplers.device)
        for length in lengths:
            systems = samplers.systems(prompts, length)
            seconds, memory = measure_systems(systems, samplers, rounds)
            gpt_seconds = np.array(seconds["gpt, static cache"])
            for name, (_, evaluations) in systems.items():
                row = dict(system=name, prompts=B, new_tokens=length)
                row["seconds"] = median(seconds[name])
                row["tokens_per_second"] = B * length / row["seconds"]
                row["evaluations"] = evaluations
                row["memory_mb"] = memory[name] / 2**20
                row["speed_over_gpt"] = median(gpt_seconds / np.array(seconds[name]))
                rows.append(row)
    return rows


def measure_systems(systems, samplers, rounds):
    """Two dicts, by system: a list of seconds, one a round, and the bytes of the last round."""
    device, autocast = samplers.device, samplers.autocast
    seconds = {name: [] for name in systems}
    memory = {}
    for i in range(rounds):
        for name, (system, _) in systems.items():
            if i == 0 and device.type == "cuda":
                seconds_of(device, system, autocast)  # some systems compile

            def timed():
                seconds[name].append(seconds_of(device, system, autocast))

            memory[name] = memory_of(device, timed)
    return seconds, memory


def numbers(text):
    """The numbers of a text with commas between. Empty where they are none."""
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        return []


# ---- Preparing data ------------------------------------------------------------------------------

# Runs data/prepare.py as if the machine had so many cores, and prints its peak memory in KB.
# (ru_maxrss would be that of this process, which a child begins with.)
CHILD = """
import os, runpy, sys
os.cpu_count = lambda: {cores}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def preparing(options, folder):
    """A row each for one core, for all cores, and for all cores with three times the text.
    data/prepare.py takes turns with bare tiktoken on the same text."""
    meta = json.loads((Path(options.data) / "meta.json").read_text())
    if options.text:
        documents = list(Reader([options.text]))
    else:
        documents = list(docs()) * 4
    cores = sorted(os.sched_getaffinity(0))
    rows = []
    for times, used in ((1, cores[:1]), (1, cores), (3, cores)):
        file = folder / f"{times}.jsonl"
        if not file.exists():
            lines = [json.dumps(dict(text=text)) + "\n" for text in documents * times]
            file.write_text("".join(lines))
        os.sched_setaffinity(0, used)
        row = dict(cores=len(used), text_mb=file.stat().st_size / 1e6)
        row |= time_prepare(file, documents * times, meta, len(used), options.rounds)
        os.sched_setaffinity(0, cores)
        rows.append(row)
    return rows


def time_prepare(file, texts, meta, cores, rounds):
    """A part of a row. file: has the texts. meta: of the corpus whose vocabulary is taken."""
    encoding = load_encoding(meta)
    ours, bare = [], []
    for _ in range(min(rounds, 3)):
        bare.append(seconds_of_tiktoken(encoding, texts, cores))
        seconds, memory = run_prepare(file, meta, cores)
        ours.append(seconds)
    return dict(
        mb_per_second=file.stat().st_size / 1e6 / median(ours),
        over_tiktoken=median(np.array(bare) / np.array(ours)),
        memory_mb=memory,
    )


def seconds_of_tiktoken(encoding, texts, cores):
    """Of tiktoken's method for many texts, or on one core of a plain loop, if that is faster."""
    device = torch.device("cpu")
    options = dict(num_threads=cores, disallowed_special=())
    seconds = seconds_of(device, lambda: encoding.encode_batch(texts, **options))
    if cores > 1:
        return seconds
    plain = seconds_of(device, lambda: [encode(encoding, text) for text in texts])
    return min(seconds, plain)


def run_prepare(file, meta, cores):
    """The seconds that data/prepare.py says it took, and the MB of its peak memory."""
    command = [sys.executable, "-c", CHILD.format(cores=cores)]
    command += [ROOT / "data/prepare.py", file, f"--out={file.parent / 'prepared'}"]
    if meta["encoding"] == "bpe":
        command += ["--encoding=bpe", f"--vocab_size={meta['vocab_size']}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = result.stdout.strip().splitlines()
    for line in lines:
        if "million a second" in line:
            seconds = float(line.split(" tokens in ")[1].split()[0])
    return seconds, int(lines[-1]) / 1024


# ---- Growth --------------------------------------------------------------------------------------


def growth(options, V):
    """The seconds of a training step of the DiT and of sampling, for one row. The exponents are of
    seconds ~ length^a at a fixed width, and of seconds ~ parameters^b at a fixed length."""
    sizes = [(length, 192) for length in (256, 512, 1024, 2048, 4096)]
    measured = [seconds_at(options, V, *size) for size in sizes]
    rows = rows_of_growth("length", [length for length, _ in sizes], measured)
    measured = [seconds_at(options, V, 256, width) for width in (96, 192, 384, 768)]
    return rows + rows_of_growth("parameters", [m["parameters"] for m in measured], measured)


def seconds_at(options, V, length, width):
    """A dict: seconds of a training step and of sampling, of one row, and the DiT's parameters."""
    device, autocast = pick_device(options.device, length)
    torch.manual_seed(0)
    size = dict(n_layer=4, n_head=max(width // 48, 1), n_embd=width)
    size.update(block_size=length, vocab_size=V)
    vae = network("vae", "tiny", device, **size).requires_grad_(False)
    dit = network("dit", "tiny", device, **size, channels=vae.config.channels).train()
    batch = to_device(blank_batch(1, length, length // 4), device)

    def step():
        generator = torch.Generator(device).manual_seed(0)
        z_0 = vae.latents(batch.tokens, batch.segment)
        flow_loss(dit, batch, z_0, generator).backward()

    def sample():
        continue_texts(vae, dit, [[1] * (length // 4)], 0, Sampling(steps=8))

    measured = dict(parameters=sum(p.numel() for p in dit.parameters()))
    for name, function in (("training step", step), ("sampling, 8 steps", sample)):
        measured[name] = min(seconds_of(device, function, autocast) for _ in range(3))
    return measured


def blank_batch(B, N, n_context):
    """A Batch of B rows of N tokens with a context of n_context tokens. All tokens are 0."""
    is_target = torch.arange(N) >= n_context
    segment = is_target.long().repeat(B, 1)
    return make_batch(torch.zeros(B, N, dtype=torch.long), segment, torch.ones(B, N))


def rows_of_growth(against, x, measured):
    """x: what grows, a list of numbers. measured: dicts of seconds at each of them."""
    rows = []
    for name in ("training step", "sampling, 8 steps"):
        y = [m[name] for m in measured]
        row = dict(of=name, against=against)
        for value, seconds in zip(x, y):
            row[f"{value:,}"] = seconds
        row["exponent"] = float(np.polyfit(np.log(x), np.log(y), 1)[0])
        row["exponent_of_last_two"] = float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))
        rows.append(row)
    return rows


# ---- What the presets need -----------------------------------------------------------------------


def presets(V):
    """A row for each stage and preset, on rows of 1,024 tokens. One step on the CPU is counted.

    parameters; FLOPs of forward and backward for each token of a row; GB of weights, gradients,
    AdamW's moments and (of the DiT) the average; GB kept for the backward pass, for each row."""
    device, autocast = pick_device("cpu", 1024)
    generator = torch.Generator()
    # As a teacher the GPT reads an end-of-text token before a row.
    gpt = network("gpt", "small", device, block_size=1025, vocab_size=V)
    size = dict(block_size=1024, vocab_size=V)

    def gpt_loss(batch):
        return cross_entropy(gpt(batch.tokens), batch.tokens).mean()

    rows = [dict(stage="gpt", preset="small") | needs_of(gpt, gpt_loss, autocast, 16)]
    gpt.requires_grad_(False)
    vae = network("vae", "small", device, **size, teacher_embd=gpt.config.n_embd)

    def vae_loss(batch):
        features = teacher_features(gpt, batch.tokens)
        return vae(batch, features, generator=generator)["loss"]

    rows.append(dict(stage="vae", preset="all") | needs_of(vae, vae_loss, autocast, 16))
    vae.requires_grad_(False)
    size["channels"] = vae.config.channels
    for preset in ("small", "medium", "large"):
        dit = network("dit", preset, device, **size)

        def dit_loss(batch):
            z_0 = vae.latents(batch.tokens, batch.segment)
            return flow_loss(dit, batch, z_0, generator)

        rows.append(dict(stage="dit", preset=preset) | needs_of(dit, dit_loss, autocast, 20))
    return rows


def needs_of(net, loss_of, autocast, bytes_per_parameter):
    """What a network needs in training. loss_of(batch) is its loss, a scalar."""
    held_1, _ = bytes_and_flops(net, loss_of, autocast, 1)
    held_2, _ = bytes_and_flops(net, loss_of, autocast, 2)
    torch.backends.cuda.enable_flash_sdp(False)  # of the CPU's the counter counts nothing
    _, flops = bytes_and_flops(net, loss_of, autocast, 1)
    torch.backends.cuda.enable_flash_sdp(True)
    parameters = sum(p.numel() for p in net.parameters())
    return dict(
        parameters=f"{parameters / 1e6:.0f}M",
        gflop_per_token=flops / 1024 / 1e9,
        state_gb=parameters * bytes_per_parameter / 1e9,
        row_gb=(held_2 - held_1) / 1e9,
    )


def bytes_and_flops(net, loss_of, autocast, B):
    """Of a step on B rows: the bytes kept for the backward pass, and the FLOPs."""
    batch = blank_batch(B, 1024, 256)
    kept = {}  # storage: bytes

    def keep(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with FlopCounterMode(display=False) as counter, autocast, hooks:
        loss = loss_of(batch)
        held = sum(kept.values())
        loss.backward()
    net.zero_grad()
    return held, counter.get_total_flops()


# ---- The report ----------------------------------------------------------------------------------


def table(rows):
    """Markdown. A row with other columns than the one above it begins another table."""
    lines = []
    heads = None
    for row in rows:
        if list(row) != heads:
            heads = list(row)
            titles = [head.replace("_", " ") for head in heads]
            lines += ["", f"| {' | '.join(titles)} |", "|" + "---|" * len(heads)]
        lines.append(f"| {' | '.join(cell(value) for value in row.values())} |")
    return "\n".join(lines)


def cell(value):
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 100:
        return f"{value:,.3g}"
    return f"{value:,.0f}"


def describe_machine(options, device, peak):
    """What the report says of the machine and the code. peak: FLOP/s of matrix products."""
    machine = f"{len(os.sched_getaffinity(0))} CPU cores"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return dict(
        commit=commit(),
        machine=machine,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        matmul_tflops=peak / 1e12,
        options=asdict(options),
    )


def measure(part, options, V, folder, peak):
    """The rows of the table of a part."""
    if part == "train":
        return training(options, folder, peak)
    if part == "sample":
        return sampling(options, V)
    if part == "prepare":
        return preparing(options, folder)
    if part == "growth":
        return growth(options, V)
    return presets(V)


def main():
    if "TEXTLDM_WORKER" in os.environ:  # the command line is that of a training script
        options = SpeedConfig(**json.loads(os.environ["TEXTLDM_SPEED"]))
        work(os.environ["TEXTLDM_WORKER"], options)
        return
    (options,) = command_line(__doc__, SpeedConfig)
    device, autocast = pick_device(options.device)
    V = Corpus(options.data, "train", 64).meta["vocab_size"]
    wanted = options.parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise UserError(
            f"--parts={options.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}"
        )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    peak = matmul_peak(device, autocast)
    report = describe_machine(options, device, peak)
    print(
        f"commit {report['commit']}, {report['machine']}, torch {report['torch']}, "
        f"{report['threads']} threads, matmul peak {report['matmul_tflops']:.2f} TFLOP/s"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in wanted:
            report[part] = measure(part, options, V, folder, peak)
            print(f"\n{part}\n{table(report[part])}", flush=True)
            write_whole(options.out, json.dumps(report, indent=1))


if __name__ == "__main__":
    run_script(main)
