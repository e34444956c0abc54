"""The training loop of all stages, and after it what it is made of.

A script builds a Stage and states its loss. All randomness of a step comes from (seed, step,
micro-batch), so there is no state of it to save. Under torchrun K processes of A micro-batches each
compute what one process with K A micro-batches computes.
"""

import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine.checkpoint import load_checkpoint, write_whole
from engine.config import TrainConfig, UserError
from engine.corpus import BROKEN, Corpus, to_device
from engine.muon import make_optimizers
from engine.terminal import lock, pick_device, pick_dtype
from textldm import Block


def train(stage, loss_of, weight_of, evaluate):
    """Trains stage.model until cfg.max_steps, or until a signal: SIGTERM, SIGHUP and Ctrl-C let the
    step and its evaluation finish, and the run is saved.

    loss_of(net, batch, generator, step) returns a dict of scalars. "loss", which is minimised, is a
    mean over tokens by their weights. weight_of(batch) is the sum of these weights. Micro-batches
    count by their shares of that sum, so a step's loss is the mean over all of its tokens. (Other
    scalars are joined alike, though the VAE's terms are means over counted tokens.)
    evaluate(average) returns a dict of numbers of validation data, with "loss", and a text to show.
    average: the average of the model's weights, or the model itself where a stage has none.

    Writes OUT/NAME.pt (the model to use, the best by validation loss), OUT/NAME_last.pt (to resume)
    and OUT/NAME.jsonl (metrics). Raises UserError."""
    cfg, model, average = stage.cfg, stage.model, stage.average
    net = torch.compile(model) if cfg.compile else model
    run = Run(stage)
    while run.step < cfg.max_steps and not run.is_stopped():
        rate = learning_rate(cfg, run.step, run.horizon)
        report = {}
        for batch, share, generator in run.micro_batches(weight_of):
            with run.autocast:
                losses = loss_of(net, batch, generator, run.step)
            (losses["loss"] * share).backward()
            for name, value in losses.items():
                report[name] = report.get(name, 0) + value.detach() * share
        sum_gradients(model)  # of all processes
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        require_finite(norm, report, run.step)
        for optimizer in stage.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        if average is not model:
            update_average(average, model, run.step)
        run.end_step(report, norm, rate)
        is_last = run.step == cfg.max_steps
        # Other processes wait for this one in their next is_stopped().
        if run.rank == 0 and (is_last or run.step % cfg.eval_interval == 0):
            with run.autocast:
                numbers, text = evaluate(average)
            tqdm.write(text)
            run.keep(numbers)
    run.end()


@dataclass
class Stage:
    """What a script builds before it trains. identity is what a checkpoint says of itself and a
    resumed run must share; it has `kind`."""

    name: str  # of its files
    cfg: TrainConfig
    corpus: Corpus
    model: nn.Module
    identity: dict
    has_average: bool = False  # an average of the weights is evaluated and kept
    keeps_latest: bool = False  # not the best by validation loss
    whole: float = 0.0  # README's first command takes so many times as long (shown); 0: unknown

    def __post_init__(self):
        self.average = self.model
        if self.has_average:
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        if self.cfg.recompute:
            recompute_blocks(self.model)
        dtype = pick_dtype(next(self.model.parameters()).device)
        self.optimizers = make_optimizers(self.model, Block, self.cfg, dtype)


def learning_rate(cfg, step, horizon):
    """Linear warm-up, then a cosine down to a tenth of the peak at the step `horizon`."""
    peak = cfg.learning_rate
    if not peak:
        peak = 4e-3 if cfg.muon else 1e-3
    done = max(step - cfg.warmup, 0) / max(horizon - cfg.warmup, 1)
    cosine = math.cos(math.pi * min(done, 1))
    warmup = min((step + 1) / max(cfg.warmup, 1), 1)
    return peak * warmup * (0.55 + 0.45 * cosine)


@torch.no_grad()
def update_average(average, model, step):
    """Moves the average of a model's weights (and buffers) towards the model, after step (from 0).

    unspecified: the decay grows to 0.999. With 0.999 from the start the average of a short run
    would be half initialisation."""
    decay = min(0.999, (2 + step) / (11 + step))
    for a, p in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(p, 1 - decay)


def recompute_blocks(model):
    """Saves memory: keeps the input of each block, and computes the rest of it again in the
    backward pass."""
    for block in model.modules():
        if isinstance(block, Block):
            forward = block.forward

            def again(*inputs, forward=forward, **options):
                return checkpoint(forward, *inputs, use_reentrant=False, **options)

            block.forward = again


def require_finite(norm, report, step):
    """Raises UserError before a step that would spoil the weights. norm: of the gradient. The CPU
    waits for a GPU here; elsewhere only torchrun's sums, lines of metrics and evaluations do so."""
    if math.isfinite(norm):
        return
    terms = [name for name, value in report.items() if not value.isfinite()]
    what = ", ".join(terms or ["the gradient"])
    raise UserError(
        f"step {step}: {what} is not finite; --resume at a lower --learning_rate goes on from the "
        "last evaluation"
    )


# ---- Several processes ---------------------------------------------------------------------------


def sum_of_all(x, device):
    """The sum of a tensor over all processes, on the CPU."""
    if not dist.is_initialized():
        return x
    x = x.to(device)
    dist.all_reduce(x)
    return x.cpu()


def sum_gradients(model):
    """Gives each process the gradients of all, and the buffers of the first."""
    if not dist.is_initialized():
        return
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


# ---- The state of a run --------------------------------------------------------------------------


def minutes(seconds):
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class Run:
    """The steps that are done, their files and messages, and the data of the next.

    step        the number of steps that are done
    horizon     max_steps of the first run; more steps with --resume keep its last rate
    best        the lowest validation loss
    kept_step   the step of NAME.pt
    """

    def __init__(self, stage):
        self.stage, self.cfg = stage, stage.cfg
        self.name, self.corpus = stage.name, stage.corpus
        self.device = next(stage.model.parameters()).device
        pick_device(self.cfg.device, stage.model.config.block_size)
        is_bf16 = pick_dtype(self.device) == torch.bfloat16
        # Before torch 2.10 a cache would keep weights that were cast without a gradient.
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False
        )
        self.rank = int(os.environ.get("RANK", 0))  # torchrun sets these
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            is_gpu = self.device.type == "cuda"
            device = self.device if is_gpu else None
            if is_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if is_gpu else "gloo",
                device_id=device,
                timeout=timedelta(hours=2),  # the first process evaluates and saves
            )
        self.step = self.kept_step = 0
        self.best = math.inf
        self.horizon = self.cfg.max_steps
        self.ahead = None
        self.signals = []
        self.identity = dict(stage.corpus.identity, **stage.identity)
        self.identity["config"] = asdict(stage.model.config)
        self.identity["accumulate"] = self.cfg.accumulate * self.world
        for key in ("seed", "batch_size", "warmup", "weight_decay", "muon"):
            self.identity[key] = getattr(self.cfg, key)
        self.parts = dict(model=stage.model, average=stage.average)
        for optimizer in stage.optimizers:
            self.parts[type(optimizer).__name__] = optimizer
        self.open_files()
        self.catch_signals()
        self.first = self.step
        bar = dict(total=self.cfg.max_steps, initial=self.step, mininterval=1)
        self.bar = tqdm(desc=self.name, disable=self.rank > 0, **bar)

    def open_files(self):
        """Locks the folder, and takes up an earlier run or refuses to replace it."""
        folder = Path(self.cfg.out)
        folder.mkdir(parents=True, exist_ok=True)
        self.kept = folder / f"{self.name}.pt"
        self.last = folder / f"{self.name}_last.pt"
        self.metrics = folder / f"{self.name}.jsonl"
        if self.rank == 0:
            lock(folder)
        if self.cfg.resume and self.cfg.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if self.cfg.resume:
            self.resume()
        elif not self.cfg.overwrite:
            self.spare_older_run()
        self.sum(torch.zeros(1))  # no process writes before each has looked
        self.introduce()
        path = self.metrics if self.rank == 0 else os.devnull
        self.log = open(path, "a" if self.cfg.resume else "w")
        if not self.cfg.resume:
            self.save()  # from here on there is this run to resume, and no older one

    def sum(self, x):
        return sum_of_all(x, self.device)

    def introduce(self):
        if self.rank:
            return
        parameters = sum(p.numel() for p in self.stage.model.parameters())
        precision = "fp32, because its bf16 is emulated or untried"
        if pick_dtype(self.device) == torch.bfloat16:
            precision = "bf16"
        rows = self.stage.model.config.block_size
        print(
            f"{self.name}: {parameters / 1e6:.1f}M parameters on {self.device}, "
            f"which multiplies in {precision}; rows of {rows} tokens",
            flush=True,
        )

    def catch_signals(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup ignores SIGHUP, and so does its program.
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C stops at once

    def is_stopped(self):
        """Whether a signal came. One to any process stops all of them after the same step."""
        return bool(self.sum(torch.tensor(len(self.signals))))

    # ---- a step

    def micro_batches(self, weight_of):
        """Yields (batch, share, generator) for each micro-batch of this step: the batch on the
        device, its share of the weight of all micro-batches, and a torch.Generator for what the
        loss draws."""
        batches = self.ahead or self.draw(self.step)
        weights = [weight_of(batch) for batch, _ in batches]
        total = self.sum(sum(weights))
        for (batch, generator), weight in zip(batches, weights):
            yield to_device(batch, self.device), weight / total, generator
        # Runs when the loop asks for one more, while a GPU still works on the last one.
        self.ahead = self.draw(self.step + 1)

    def draw(self, step):
        """The micro-batches of a step that are this process's."""
        batches = []
        first = self.rank * self.cfg.accumulate
        for micro in range(first, first + self.cfg.accumulate):
            rng = np.random.default_rng((self.cfg.seed, step, micro))
            generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
            # deviation: the paper truncates rows at random. Here the rows of a micro-batch share
            # one random length, of 4/8 to 8/8 of N.
            N = max(self.corpus.N * int(rng.integers(4, 9)) // 8, 2)
            batches.append((self.corpus.batch(rng, self.cfg.batch_size, N), generator))
        return batches

    def end_step(self, report, norm, rate):
        """Counts a step, and shows and logs it."""
        self.step += 1
        self.bar.update()
        self.estimate_time()
        if self.step % self.cfg.log_interval == 0:
            values = self.sum(torch.stack(list(report.values()))).tolist()
            report = dict(zip(report, values))
            self.write(step=self.step, **report, norm=norm.item(), lr=rate)
            shown = {name: f"{value:.3g}" for name, value in report.items()}
            self.bar.set_postfix(shown, refresh=False)

    def estimate_time(self):
        if self.step == self.first + 5:  # the first steps are slow
            self.began = time.perf_counter()
        if self.step != self.first + 25 or self.rank:
            return
        per_step = (time.perf_counter() - self.began) / 20
        seconds = per_step * (self.cfg.max_steps - self.first)
        text = f"{self.name}: about {minutes(seconds)} on this machine"
        if self.stage.whole:
            whole = minutes(self.stage.whole * seconds)
            text += f"; all three stages of README's first command about {whole}"
        self.bar.write(text)

    def write(self, **line):
        """Writes a line of metrics."""
        try:
            print(json.dumps(line), file=self.log, flush=True)
        except OSError as e:
            raise UserError(
                f"cannot write {self.metrics} ({e}); --resume goes on from the last checkpoint"
            ) from None

    # ---- checkpoints

    def keep(self, val):
        """Logs a dict of numbers of validation data, writes NAME.pt if this model is kept, and
        saves."""
        self.write(step=self.step, val=val)
        if not math.isfinite(val["loss"]):
            tqdm.write(f"warning: the validation loss is {val['loss']}; this model is not kept")
        elif self.stage.keeps_latest or val["loss"] < self.best:
            self.best = val["loss"]
            self.kept_step = self.step
            state = dict(model=self.stage.average.state_dict(), step=self.step, **self.identity)
            write_whole(self.kept, state)
        self.save()

    def save(self):
        if self.rank:
            return
        state = dict(step=self.step, best=self.best, horizon=self.horizon)
        state["kept_step"] = self.kept_step
        for name, part in self.parts.items():
            state[name] = part.state_dict()
        write_whole(self.last, state | self.identity)

    def spare_older_run(self):
        for path in (self.kept, self.last):
            if path.exists() and not (path == self.last and self.has_only_begun()):
                raise UserError(
                    f"{path} holds an earlier run; --resume goes on with it, another --out keeps "
                    "it, --overwrite replaces it"
                )

    def has_only_begun(self):
        """Whether the older run did nothing: its batches were too large, say."""
        try:
            state = load_checkpoint(self.last, self.identity["kind"], "")
            return state["step"] == 0 and self.metrics.stat().st_size == 0
        except (UserError, OSError, KeyError):
            return False

    def resume(self):
        """Takes all parts from NAME_last.pt. Metrics of later steps are dropped; they come
        again."""
        remedy = "without --resume, and with an --out of its own, a new run starts"
        kind, tokenizer = self.identity["kind"], self.identity["tokenizer"]
        state = load_checkpoint(self.last, kind, remedy, tokenizer)
        try:
            self.check_identity(state)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
            self.best = float(state["best"])
            self.horizon = int(state["horizon"])
            self.kept_step = int(state["kept_step"])
        except torch.OutOfMemoryError:
            raise
        except BROKEN as e:
            raise UserError(
                f"{self.last} does not fit this code ({type(e).__name__}); {remedy}"
            ) from None
        if self.rank == 0:
            write_whole(self.metrics, lines_until(self.metrics, self.step))

    def check_identity(self, state):
        now = self.identity | self.identity["config"]
        before = state | state["config"]
        different = [key for key in now if key != "config" and before.get(key) != now[key]]
        if different:
            raise UserError(
                f"{self.last} was started with another {', '.join(different)}; "
                "resume with the same"
            )

    def end(self):
        """Closes the files, and says how the run ended."""
        is_stopped = self.step < self.cfg.max_steps
        if is_stopped:
            self.save()
        self.bar.close()
        self.log.close()
        if is_stopped:
            sys.exit(
                f"{self.name}: stopped after step {self.step}; "
                "the same command with --resume goes on from there"
            )
        if self.rank:
            return
        if self.step == self.first:
            print(f"{self.name}: all {self.step} steps are done; a larger --max_steps goes on")
            return
        text = f"{self.name}: wrote {self.last} (to --resume)"
        if self.kept_step:
            text += f"; {self.kept} is of step {self.kept_step}"
        print(text)


def lines_until(path, step):
    """The lines of a file of metrics, as a text, without those of later steps and of a line that
    was cut off."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except BROKEN:
                pass
    return "".join(kept)
