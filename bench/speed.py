"""Measures training steps of each stage, and sampling by TextLDM and by a GPT with a cache.

    python bench/speed.py --data=data/names --out=out         # of the models in out/

Trained for one step only (--max_steps=1) they are no slower. A training step has one micro-batch.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines.gpt import gpt_loss
from bench.evaluate import commit, machine
from engine.checkpoint import build, load_checkpoint
from engine.config import TrainConfig, command_line
from engine.corpus import Corpus, to_device
from engine.terminal import pick_device, pick_dtype, run_script
from engine.muon import make_optimizers
from textldm import GPT, Block, DiTConfig, Sampling, TextDiT, TextVAE, TransformerConfig
from textldm import VAEConfig, continue_texts, flow_loss, option, teacher_features

PROMPTS = (16, 256)  # tokens
SAMPLING = Sampling(steps=20, cfg_scale=3.0, temperature=0.7)  # as sample.py


@dataclass
class SpeedConfig:
    data: str = option("data/names", "folder of a prepared corpus")
    out: str = option("out", "folder of gpt.pt, vae.pt and dit.pt")
    new: int = option(256, "tokens to sample after a prompt", 1)
    device: str = option("auto", "cpu, cuda, or auto")


def median_of(work, seconds=5.0):
    """The median seconds of a function, called again and again for so many seconds."""
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def train(loss_of, batch, optimizers):
    loss_of(batch).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def cached_gpt(gpt, prompt, length, dtype):
    """Continues a prompt (1, P) greedily by (1, length), with a cache of keys and values."""
    P, H = prompt.shape[1], gpt.config.n_head
    shape = (gpt.config.n_layer, 2, 1, H, P + length, gpt.config.n_embd // H)
    cache = torch.zeros(shape, device=prompt.device, dtype=dtype)

    def step(tokens, start):
        """Tokens (1, n), of which the first has place `start` -> the likeliest next one (1, 1)."""
        end = start + tokens.shape[1]
        x = gpt.wte(tokens) + gpt.wpe.weight[start:end]  # (1, n, E)
        for block, past in zip(gpt.h, cache):
            q, *new = block.attn.heads(block.ln_1(x))  # (1, H, n, D) each
            past[..., start:end, :] = torch.stack(new)
            x = x + block.attn.attend(q, *past[..., :end, :], causal=start == 0)
            x = x + block.mlp(block.ln_2(x))
        return F.linear(gpt.ln_f(x[:, -1:]), gpt.wte.weight).argmax(-1)

    new = [step(prompt, 0)]
    while len(new) < length:
        new.append(step(new[-1], P + len(new) - 1))
    return torch.cat(new, 1)


def main():
    (options,) = command_line(__doc__, SpeedConfig)
    corpus = Corpus(options.data, "train", 2**16)
    device, _ = pick_device(options.device)
    states, nets = [], []
    kinds = dict(gpt=(GPT, TransformerConfig), vae=(TextVAE, VAEConfig), dit=(TextDiT, DiTConfig))
    for kind, types in kinds.items():
        path = f"{options.out}/{kind}.pt"
        states.append(load_checkpoint(path, kind, "train it", corpus.tokenizer))
        nets.append(build(*types, states[-1]).to(device))
    gpt, vae, dit = nets
    corpus.N = min(corpus.N, dit.config.block_size)
    _, autocast = pick_device(options.device, corpus.N)  # the kind of attention depends on it
    print(f"commit {commit()}, {machine(device)}, torch {torch.__version__}, {pick_dtype(device)}")

    def vae_loss(batch):
        return vae(batch, teacher_features(gpt, batch.tokens))["loss"]

    def dit_loss(batch):
        with torch.no_grad():
            z_0 = vae.latents(batch.tokens, batch.segment)
        return flow_loss(dit, batch, z_0, torch.Generator(device))

    losses = (partial(gpt_loss, gpt), vae_loss, dit_loss)
    print(f"\n| rows of {corpus.N} tokens | ms a step |\n|---|---|")
    for net, state, loss_of in zip(nets, states, losses):
        cfg = TrainConfig(batch_size=state["batch_size"], muon=state["muon"])
        batch = corpus.batch(np.random.default_rng(0), cfg.batch_size, corpus.N)
        optimizers = make_optimizers(net, Block, cfg, pick_dtype(device))
        step = partial(train, loss_of, to_device(batch, device), optimizers)
        with autocast:
            print(f"| {state['kind']} | {1000 * median_of(step):.0f} |")

    longest = max(PROMPTS) + options.new
    _, autocast = pick_device(options.device, longest)
    gpt.wpe = torch.nn.Embedding(longest, gpt.config.n_embd, device=device)
    print("\n| prompt | system | tokens a second |\n|---|---|---|")
    for P in PROMPTS:
        prompt = torch.randint(corpus.eot, (1, P), device=device)
        writers = {
            "TextLDM": partial(continue_texts, vae, dit, prompt.tolist(), options.new, SAMPLING),
            "GPT": partial(cached_gpt, gpt, prompt, options.new, pick_dtype(device)),
        }
        with autocast:
            for name, write in writers.items():
                print(f"| {P} tokens | {name} | {options.new / median_of(write):.1f} |")


if __name__ == "__main__":
    run_script(main)
