"""What every training program has: devices, several processes, resume, signals, metrics,
checkpoints.

The training step itself is in each script. It asks a Run for its micro-batches and tells it what
came out.
"""

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine.checkpoint import load_checkpoint, write_whole
from engine.corpus import BROKEN, to_device
from engine.script import UserError, lock


def pick_device(name, longest_row=64):
    """A torch.device for --device=name, and the autocast to compute in. Raises UserError."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process one GPU
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        reason = repr(str(e)[:80])
        raise UserError(f"--device={name} is not available here ({reason})") from None
    if device.type == "cpu":
        # The switch is of CPUs too. Theirs takes twice as long as plain attention on short rows,
        # and a third as long on long ones.
        torch.backends.cuda.enable_flash_sdp(longest_row > 128)
    is_bf16 = pick_dtype(device) == torch.bfloat16
    return device, torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


def pick_dtype(device):
    """What networks and optimisers multiply in: bf16 where the hardware has it, else fp32. Emulated
    bf16 is slower than fp32 by far."""
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # ATEN_CPU_CAPABILITY=avx2 keeps torch from AVX-512, to measure what other CPUs do.
        uses_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        has_bf16 = uses_avx512 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def update_average(average, model, step):
    """Moves the average of a model's weights (and buffers) towards the model, after step (from 0).

    unspecified: the decay grows to 0.999. With 0.999 from the start the average of a short run
    would be half initialisation."""
    decay = min(0.999, (2 + step) / (11 + step))
    for a, p in zip(average.state_dict().values(), model.state_dict().values()):
        a.lerp_(p, 1 - decay)


def recompute_blocks(model, block_type):
    """Saves memory: keeps the input of each block of this type, and computes the rest of it again
    in the backward pass."""
    for block in model.modules():
        if isinstance(block, block_type):
            forward = block.forward

            def again(*inputs, forward=forward, **options):
                return checkpoint(forward, *inputs, use_reentrant=False, **options)

            block.forward = again


class Stopped(BaseException):
    """A signal came during an evaluation. As KeyboardInterrupt it is no error."""


def minutes(seconds):
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class Run:
    """A training run of one stage.

    All randomness comes from (seed, step, micro-batch), so there is no state of it to save. Under
    torchrun K processes of A micro-batches each compute what one process with K A micro-batches
    computes.

    Writes OUT/NAME.pt (the model to use), OUT/NAME_last.pt (to resume) and OUT/NAME.jsonl
    (metrics). Does not replace those of another run without --overwrite.

    net         the model, compiled if cfg.compile
    average     the model that is evaluated and kept: an average of the weights, or the model itself
    autocast    the context to compute in
    step        the number of steps that are done
    """

    def __init__(self, name, cfg, model, average, optimizers, identity):
        """identity: a dict of what a checkpoint says of itself and a resumed run must share, with
        `kind` and `tokenizer`."""
        self.name, self.cfg = name, cfg
        self.model, self.average = model, average
        self.device = next(model.parameters()).device
        _, self.autocast = pick_device(cfg.device, model.config.block_size)
        self.net = torch.compile(model) if cfg.compile else model
        self.rank = int(os.environ.get("RANK", 0))  # torchrun sets these
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.start_processes()
        self.out = Path(cfg.out)
        self.last = self.out / f"{name}_last.pt"
        self.metrics = self.out / f"{name}.jsonl"
        self.identity = dict(identity, config=asdict(model.config))
        self.identity["accumulate"] = cfg.accumulate * self.world
        for key in ("seed", "batch_size", "warmup", "weight_decay", "muon"):
            self.identity[key] = getattr(cfg, key)
        self.parts = dict(model=model, average=average)
        for optimizer in optimizers:
            self.parts[type(optimizer).__name__] = optimizer
        self.step = 0
        self.best = math.inf
        self.kept_step = 0  # of NAME.pt
        self.lines = 0  # of metrics
        self.horizon = cfg.max_steps  # where the learning rate ends
        self.whole_over_this = 0  # the time of a longer program over this run's; 0 is unknown
        self.signals = []
        self.is_due = False  # whether an evaluation of this step has still to come
        self.is_evaluating = False
        self.ahead = None
        self.report = {}
        self.out.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            lock(self.out)
        if cfg.resume and cfg.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if cfg.resume:
            self.resume()
        elif not cfg.overwrite:
            self.spare_older_run()
        self.sum_of_all(torch.zeros(1))  # no process writes before each has looked
        self.introduce()

    # ---- several processes

    def start_processes(self):
        if self.world > 1 and not dist.is_initialized():
            is_gpu = self.device.type == "cuda"
            device = self.device if is_gpu else None
            dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device)

    def sum_of_all(self, x):
        """The sum of a tensor over all processes."""
        if self.world == 1:
            return x
        x = x.to(self.device)
        dist.all_reduce(x)
        return x.cpu()

    def sum_gradients(self):
        """Gives each process the gradients of all, and the buffers of the first."""
        if self.world == 1:
            return
        for p in self.model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    # ---- the steps

    def steps(self, evaluate, keep_latest=False):
        """Yields the number of each step, from the one to resume from, until cfg.max_steps or a
        signal. Evaluates after every cfg.eval_interval steps, and after the last.

        evaluate() returns a dict of numbers of validation data, with `loss`, and a text to show.
        NAME.pt is the best model by this loss, or the latest.

        SIGTERM, SIGHUP and Ctrl-C let a step finish, and the run is saved. They end an evaluation
        at once: it comes again after --resume."""
        self.catch_signals()
        if not self.cfg.resume:
            self.save()  # from here on there is this run to resume, and no older one
        bar = tqdm(
            total=self.cfg.max_steps,
            initial=self.step,
            desc=self.name,
            mininterval=1,
            disable=self.rank > 0,
        )
        path = self.metrics if self.rank == 0 else os.devnull
        self.first = self.step
        self.has_work = self.is_due or self.step < self.cfg.max_steps
        with open(path, "a" if self.cfg.resume else "w") as self.log, bar as self.bar:
            self.evaluate_if_due(evaluate, keep_latest)
            while self.step < self.cfg.max_steps:
                # A signal to any process stops all of them after the same step.
                if self.sum_of_all(torch.tensor(len(self.signals))):
                    if not self.is_due:  # else it was saved before the evaluation
                        self.save()
                    break
                yield self.step  # until end_step has counted it
                is_last = self.step == self.cfg.max_steps
                is_time = is_last or self.step % self.cfg.eval_interval == 0
                self.is_due = is_time and self.rank == 0
                self.evaluate_if_due(evaluate, keep_latest)
        self.say_how_it_ended()

    def catch_signals(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup ignores SIGHUP, and so does its program.
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C stops at once
        if self.is_evaluating:
            self.is_evaluating = False  # only one signal raises
            raise Stopped

    def say_how_it_ended(self):
        if self.step < self.cfg.max_steps or self.is_due:
            sys.exit(
                f"{self.name}: stopped after step {self.step}; "
                "the same command with --resume goes on from there"
            )
        if self.rank:
            return
        if not self.has_work:
            print(f"{self.name}: all {self.step} steps are done; a larger --max_steps goes on")
            return
        text = f"{self.name}: wrote {self.last} (to --resume)"
        if self.kept_step:
            text += f"; {self.out / self.name}.pt is of step {self.kept_step}"
        print(text)

    def learning_rate(self, step):
        """Linear warm-up, then a cosine down to a tenth of the peak."""
        cfg = self.cfg
        peak = cfg.learning_rate
        if not peak:
            peak = 4e-3 if cfg.muon else 1e-3
        done = max(step - cfg.warmup, 0) / max(self.horizon - cfg.warmup, 1)
        cosine = math.cos(math.pi * min(done, 1))
        warmup = min((step + 1) / max(cfg.warmup, 1), 1)
        return peak * warmup * (0.55 + 0.45 * cosine)

    def micro_batches(self, corpus, weight_of):
        """Yields (batch, share, generator) for each micro-batch of this step: the batch on the
        device, its share of the weight of all micro-batches, and a torch.Generator for what the
        loss draws.

        weight_of(batch) is the sum of the weights of the mean that is the loss."""
        batches = self.ahead or self.draw(corpus, self.step)
        weights = [weight_of(batch) for batch, _ in batches]
        total = self.sum_of_all(sum(weights))
        self.report = {}
        for (batch, generator), weight in zip(batches, weights):
            yield to_device(batch, self.device), weight / total, generator
        self.ahead = self.draw(corpus, self.step + 1)  # while a GPU still works on this step

    def draw(self, corpus, step):
        """The micro-batches of a step that are this process's."""
        batches = []
        first = self.rank * self.cfg.accumulate
        for micro in range(first, first + self.cfg.accumulate):
            rng = np.random.default_rng((self.cfg.seed, step, micro))
            generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
            # deviation: the paper truncates rows at random. Here the rows of a micro-batch share
            # one random length.
            N = max(corpus.N * int(rng.integers(4, 9)) // 8, 2)
            batches.append((corpus.batch(rng, self.cfg.batch_size, N), generator))
        return batches

    def add(self, losses, share):
        """Adds the terms of a micro-batch to the report of the step."""
        for name, value in losses.items():
            self.report[name] = self.report.get(name, 0) + value.detach() * share

    def end_step(self, norm, learning_rate):
        """Counts a step, and shows and logs it. norm: of the gradient."""
        self.step += 1
        self.bar.update()
        self.estimate_time()
        if self.step % self.cfg.log_interval == 0:
            values = self.sum_of_all(torch.stack(list(self.report.values()))).tolist()
            report = dict(zip(self.report, values))
            self.write(step=self.step, **report, norm=norm.item(), lr=learning_rate)
            shown = {name: f"{value:.3g}" for name, value in report.items()}
            self.bar.set_postfix(shown, refresh=False)

    def require_finite(self, norm):
        """Raises UserError before a step that would spoil the weights. A GPU is waited for here,
        and at no other place of a step."""
        if math.isfinite(norm):
            return
        terms = [name for name, value in self.report.items() if not value.isfinite()]
        what = ", ".join(terms or ["the gradient"])
        raise UserError(
            f"step {self.step}: {what} is not finite; --resume at a lower --learning_rate goes on "
            "from the last evaluation"
        )

    def write(self, **line):
        try:
            print(json.dumps(line), file=self.log, flush=True)
        except OSError as e:
            raise UserError(
                f"cannot write {self.metrics} ({e}); --resume goes on from the last checkpoint"
            ) from None
        self.lines += 1

    def estimate_time(self):
        if self.step == self.first + 5:  # the first steps are slow
            self.began = time.perf_counter()
        if self.step != self.first + 25 or self.rank:
            return
        per_step = (time.perf_counter() - self.began) / 20
        seconds = per_step * (self.cfg.max_steps - self.first)
        text = f"{self.name}: about {minutes(seconds)} on this machine"
        if self.whole_over_this:
            whole = minutes(self.whole_over_this * seconds)
            text += f"; all three stages of README's first command about {whole}"
        self.bar.write(text)

    # ---- evaluations and checkpoints

    def evaluate_if_due(self, evaluate, keep_latest):
        """Saves the run, so that an evaluation that does not end loses nothing, and evaluates."""
        if not self.is_due:
            return
        self.save()
        try:
            self.is_evaluating = True
            if self.signals:
                raise Stopped
            with self.autocast:
                numbers, text = evaluate()
        except Stopped:
            return
        finally:
            self.is_evaluating = False
        tqdm.write(text)
        self.keep(numbers, keep_latest or numbers["loss"] < self.best)

    def keep(self, val, is_kept):
        """Logs a dict of numbers of validation data, writes NAME.pt if this model is kept, and
        saves."""
        self.write(step=self.step, val=val)
        if not math.isfinite(val["loss"]):
            tqdm.write(f"warning: the validation loss is {val['loss']}; this model is not kept")
        elif is_kept:
            self.best = val["loss"]
            self.kept_step = self.step
            state = dict(model=self.average.state_dict(), step=self.step, **self.identity)
            write_whole(self.out / f"{self.name}.pt", state)
        self.is_due = False
        self.save()

    def save(self):
        if self.rank:
            return
        state = dict(step=self.step, best=self.best, horizon=self.horizon)
        state |= dict(kept_step=self.kept_step, is_due=self.is_due, lines=self.lines)
        for name, part in self.parts.items():
            state[name] = part.state_dict()
        write_whole(self.last, state | self.identity)

    def spare_older_run(self):
        for path in (self.out / f"{self.name}.pt", self.last):
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
        """Takes all parts from NAME_last.pt, and drops the metrics of later steps, which come
        again."""
        kind, tokenizer = self.identity["kind"], self.identity["tokenizer"]
        remedy = "without --resume, and with an --out of its own, a new run starts"
        state = load_checkpoint(self.last, kind, remedy, tokenizer)
        try:
            self.check_identity(state)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
            self.best = float(state["best"])
            self.horizon = int(state["horizon"])
            self.kept_step = int(state.get("kept_step", 0))
            self.lines = int(state.get("lines", 0))
            self.is_due = bool(state.get("is_due", False)) and self.rank == 0
        except torch.OutOfMemoryError:
            raise
        except BROKEN as e:
            raise UserError(
                f"{self.last} does not fit this code ({type(e).__name__}); {remedy}"
            ) from None
        if self.rank == 0:
            self.shorten_metrics()

    def shorten_metrics(self):
        """Drops what NAME.jsonl holds of later steps, and of an evaluation that comes again."""
        lines = []
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(True)
        kept = []
        for line in lines:
            try:
                content = json.loads(line)
                comes_again = self.is_due and content["step"] == self.step and "val" in content
                if content["step"] <= self.step and not comes_again:
                    kept.append(line.rstrip("\n") + "\n")
            except BROKEN:
                pass  # cut off, say
        if len(kept) < self.lines:
            tqdm.write(f"warning: {self.metrics} has lost metrics; the run goes on without them")
        write_whole(self.metrics, "".join(kept))

    def check_identity(self, state):
        now = self.identity | self.identity["config"]
        before = state | state["config"]
        different = []
        for key in now:
            if key != "config" and before.get(key) != now[key]:
                different.append(key)
        if different:
            raise UserError(
                f"{self.last} was started with another {', '.join(different)}; "
                "resume with the same"
            )

    def introduce(self):
        if self.rank:
            return
        parameters = sum(p.numel() for p in self.model.parameters())
        precision = "fp32, because its bf16 is emulated or untried"
        if pick_dtype(self.device) == torch.bfloat16:
            precision = "bf16"
        rows = self.model.config.block_size
        print(
            f"{self.name}: {parameters / 1e6:.1f}M parameters on {self.device}, "
            f"which multiplies in {precision}; rows of {rows} tokens",
            flush=True,
        )
