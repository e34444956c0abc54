"""Stage 1: trains the VAE, aligned to a frozen GPT.

    python train_vae.py                           # the embedded names, after baselines/gpt.py
    python train_vae.py --data=data/owt2 --preset=small --teacher=gpt2 --out=out/owt2

Watch `accuracy`: it should pass 98% of the validation tokens. `active` counts the channels in use.
`cos` is REPA's cosine between latents and the teacher's features.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn

from engine.checkpoint import build, load_teacher_state
from engine.config import VAE_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus, shorten_rows
from engine.evaluation import evaluate_vae
from engine.loop import Run, pick_device, pick_dtype, recompute_blocks, set_learning_rate
from engine.muon import make_optimizers
from engine.script import run_script
from engine.statistics import feature_statistics
from textldm import (
    GPT,
    OURS,
    Block,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    option,
    teacher_features,
)


@dataclass
class VAEStage:
    teacher: str = option(
        "", "frozen GPT for REPA: a checkpoint (OUT/gpt.pt), gpt2, a Hugging Face folder, or none"
    )


def weight_of(batch):
    return batch.weight.sum()


def main():
    config, cfg, stage = command_line(
        __doc__, VAEConfig, TrainConfig, VAEStage, presets=VAE_PRESETS, recipe=OURS
    )
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    device, autocast = pick_device(cfg.device, corpus.N)
    identity = dict(corpus.identity, kind="vae", teacher="none")
    teacher = None
    if stage.teacher != "none":
        state = load_teacher_state(stage.teacher or f"{cfg.out}/gpt.pt", corpus)
        teacher = build(GPT, TransformerConfig, state).to(device).requires_grad_(False)
        # The teacher has a position for each token of a row and for its end-of-text token.
        shorten_rows((corpus, val), teacher.config.block_size - 1, "the teacher")
        weights = teacher.wte.weight.cpu().numpy().tobytes()
        identity["teacher"] = hashlib.sha256(weights).hexdigest()
    config.block_size = corpus.N
    config.vocab_size = corpus.meta["vocab_size"]
    training_sample = corpus.fixed_batches(16, device)
    if teacher is not None:
        with autocast:
            mean, std = feature_statistics(teacher, training_sample)
        config.teacher_embd = len(mean)
    torch.manual_seed(cfg.seed)
    vae = TextVAE(config).to(device)
    if teacher is not None:
        vae.teacher_mean, vae.teacher_std = mean, std
    if cfg.recompute:
        recompute_blocks(vae, Block)
    val_batches = val.fixed_batches(4, device)

    def features_of(batch):
        if teacher is None:
            return None
        return teacher_features(teacher, batch.tokens)

    def evaluate():
        active = vae.standardise(training_sample)  # of the weights as they are now
        return evaluate_vae(vae, val_batches, features_of, active)

    optimizers = make_optimizers(vae, Block, cfg, pick_dtype(device))
    run = Run("vae", cfg, vae, vae, optimizers, identity)
    for step in run.steps(evaluate):
        learning_rate = run.learning_rate(step)
        beta = config.beta * min(step / max(config.beta_warmup, 1), 1)
        for batch, share, generator in run.micro_batches(corpus, weight_of):
            with run.autocast:
                losses = run.net(batch, features_of(batch), beta, generator)
            (losses["loss"] * share).backward()
            run.add(losses, share)
        run.sum_gradients()  # of all processes
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        run.require_finite(norm)
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        run.end_step(norm, learning_rate)


if __name__ == "__main__":
    run_script(main)
