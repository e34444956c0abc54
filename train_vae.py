"""Stage 1: trains the VAE, aligned to a frozen GPT.

    python train_vae.py                           # the embedded names, after baselines/gpt.py
    python train_vae.py --data=data/owt2 --preset=small --teacher=gpt2 --out=out/owt2

Watch `accuracy`: it should pass 98% of the validation tokens. `active` counts the channels in use.
`cos` is REPA's cosine with the teacher's features.
"""

import hashlib
from dataclasses import dataclass

import torch

from engine.checkpoint import build, load_teacher_state
from engine.config import VAE_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus, shorten_rows
from engine.evaluation import evaluate_vae
from engine.statistics import feature_statistics
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import GPT, OURS, TextVAE, TransformerConfig, VAEConfig, option, teacher_features


@dataclass
class VAEStage:
    teacher: str = option(
        "", "frozen GPT for REPA: a checkpoint (OUT/gpt.pt), gpt2, a Hugging Face folder, or none"
    )


def weight_of(batch):
    return batch.weight.sum()


def train_vae(description, corpus_type, vae_type, kind):
    """Trains a VAE of a kind on rows of a corpus of that type; variants/cola_dlm.py has others."""
    config, cfg, options = command_line(
        description, VAEConfig, TrainConfig, VAEStage, presets=VAE_PRESETS, recipe=OURS
    )
    corpus = corpus_type(cfg.data, "train", config.block_size)
    val = corpus_type(cfg.data, "val", config.block_size)
    device, autocast = pick_device(cfg.device, corpus.N)
    identity = dict(kind=kind, teacher="none")
    teacher = None
    if options.teacher != "none":
        state = load_teacher_state(options.teacher or f"{cfg.out}/gpt.pt", corpus)
        teacher = build(GPT, TransformerConfig, state).to(device).requires_grad_(False)
        # The teacher reads an end-of-text token before a row, so it needs one position more.
        shorten_rows((corpus, val), teacher.config.block_size - 1, "the teacher")
        weights = teacher.wte.weight.cpu().numpy().tobytes()  # --resume must have the same teacher
        identity["teacher"] = hashlib.sha256(weights).hexdigest()
    config.block_size = corpus.N
    config.vocab_size = corpus.meta["vocab_size"]
    training_sample = corpus.fixed_batches(16, device)
    if teacher is not None:
        with autocast:
            mean, std = feature_statistics(teacher, training_sample)
        config.teacher_embd = len(mean)
    torch.manual_seed(cfg.seed)
    vae = vae_type(config).to(device)
    if teacher is not None:
        vae.teacher_mean, vae.teacher_std = mean, std
    val_batches = val.fixed_batches(4, device)

    def features_of(batch):
        if teacher is None:
            return None
        return teacher_features(teacher, batch.tokens)

    def loss_of(net, batch, generator, step):
        beta = config.beta * min(step / max(config.beta_warmup, 1), 1)
        return net(batch, features_of(batch), beta, generator)

    def evaluate(vae):
        active = vae.standardise(training_sample)  # sets z_mean and z_std, which are kept with it
        return evaluate_vae(vae, val_batches, features_of, active)

    train(Stage("vae", cfg, corpus, vae, identity), loss_of, weight_of, evaluate)


def main():
    train_vae(__doc__, Corpus, TextVAE, "vae")


if __name__ == "__main__":
    run_script(main)
