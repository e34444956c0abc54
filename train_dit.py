"""Stage 2: trains the DiT on the latents of a frozen VAE.

    python train_dit.py                                  # the embedded names, after train_vae.py
    python train_dit.py --data=data/owt2 --preset=small --out=out/owt2

Watch the table by t, over validation rows:
    loss       nats per token, or the squared error of the velocity. As in training, but here all
               rows get a guess and tails do not count. The mean over the nine t, which are even,
               chooses the best checkpoint
    shuffled   the same, with contexts of other rows. It equals `loss` if the DiT ignores its
               context
    noisy      share of tokens that decode right from the noisy latents, z_t / (1 - t)
    predicted  share of tokens that decode right from the DiT's estimate of the clean latents
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn

from engine.checkpoint import build, copy_blocks, load_checkpoint
from engine.config import DIT_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus, shorten_rows
from engine.evaluation import Evaluation
from engine.loop import (
    Run,
    pick_device,
    pick_dtype,
    recompute_blocks,
    set_learning_rate,
    update_average,
)
from engine.muon import make_optimizers
from engine.script import run_script
from engine.statistics import mean_latents
from textldm import (
    OURS,
    TARGET,
    Block,
    DiTConfig,
    TextDiT,
    TextVAE,
    VAEConfig,
    flow_loss,
    option,
)


@dataclass
class DiTStage:
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")
    from_decoder: bool = option(False, "blocks start as the VAE decoder's, if of their width")


def weight_of(batch):
    return (batch.weight * (batch.segment == TARGET)).sum()


def main():
    config, cfg, stage = command_line(
        __doc__, DiTConfig, TrainConfig, DiTStage, presets=DIT_PRESETS, recipe=OURS
    )
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    device, autocast = pick_device(cfg.device, corpus.N)
    path = stage.vae or f"{cfg.out}/vae.pt"
    state = load_checkpoint(path, "vae", "python train_vae.py makes one", corpus.tokenizer)
    vae = build(TextVAE, VAEConfig, state).to(device).requires_grad_(False)
    shorten_rows((corpus, val), vae.config.block_size, "the VAE")
    config.block_size = corpus.N
    config.vocab_size = corpus.meta["vocab_size"]
    config.channels = vae.config.channels
    torch.manual_seed(cfg.seed)
    dit = TextDiT(config).to(device)
    if config.predict_tokens:
        dit.latent_of, unexplained = mean_latents(vae, corpus.fixed_batches(64, device))
        print(f"a token fixes its latent but for {unexplained:.1%} of its variance")
    is_same_width = (config.n_embd, config.n_head) == (vae.config.n_embd, vae.config.n_head)
    if stage.from_decoder and is_same_width:
        copy_blocks(vae.decoder.h, dit.transformer.h)
    average = copy.deepcopy(dit).requires_grad_(False)
    if cfg.recompute:
        recompute_blocks(dit, Block)
    evaluate = Evaluation(val.fixed_batches(1, device)[0], config.channels, corpus)

    optimizers = make_optimizers(dit, Block, cfg, pick_dtype(device))
    # z_mean tells this VAE from others: sample.py checks that it has the same.
    identity = dict(corpus.identity, kind="dit", vae=vae.z_mean.tolist())
    run = Run("dit", cfg, dit, average, optimizers, identity)
    for step in run.steps(lambda: evaluate(vae, average)):
        learning_rate = run.learning_rate(step)
        for batch, share, generator in run.micro_batches(corpus, weight_of):
            with run.autocast:
                z_0 = vae.latents(batch.tokens, batch.segment)
                loss = flow_loss(run.net, batch, z_0, generator)
            (loss * share).backward()
            run.add(dict(loss=loss), share)
        run.sum_gradients()  # of all processes
        norm = nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        run.require_finite(norm)
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, dit, step)
        run.end_step(norm, learning_rate)


if __name__ == "__main__":
    run_script(main)
