"""Stage 1: trains the VAE, aligned to a frozen GPT.

    python train_vae.py                                        # the embedded names, after bench/train_gpt.py
    python train_vae.py --data=data/owt2 --preset=small --teacher=gpt2 --out=out/owt2

Watch `accuracy`: it should pass 99% of val tokens. `active` counts the channels in use, `cosine` (cos in vae.jsonl) is REPA's.
"""

import hashlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from textldm import (GPT, Config, Corpus, TextVAE, TrainConfig, UserError, VAEConfig, at_scale, command_line, option, pick_device, run,
                     teacher_features, train)

# The paper has one VAE for all sizes of DiT. `tiny` has AdamW on purpose: a VAE that was trained with Muon reconstructed and
# aligned no worse, and the DiT made worse text of its latents (bench/EXPERIMENTS.md).
PRESETS = dict.fromkeys(("small", "medium", "large"), at_scale(9, 12, 768, channels=64, beta_warmup=10_000)) | dict(
    tiny=dict(muon=False, max_steps=500, learning_rate=3e-3))


@dataclass
class Stage1(Config):
    teacher: str = option("", "frozen GPT for REPA: a checkpoint (OUT/gpt.pt), gpt2, gpt2-medium ..., a Hugging Face folder, or none")


def load_teacher(source, corpus, device):
    teacher, tokenizer = GPT.from_pretrained(source)
    if tokenizer != corpus.tokenizer:
        raise UserError(f"the teacher {source} and {corpus.path.parent} have different tokenizers; "
                        "train one on this data with bench/train_gpt.py (train_vae.py takes --teacher=none, too)")
    return teacher.to(device).requires_grad_(False)


@torch.no_grad()
def statistics_of(teacher, batches, eot, autocast):
    """Mean and std (E_teacher,) of the teacher's features in batches."""
    with autocast:
        f = torch.cat([teacher_features(teacher, b.tokens, eot)[b.counted] for b in batches]).float()  # (tokens, E_teacher)
    return f.mean(0), f.std(0).clamp(min=1e-6)


def main():
    config, cfg, stage = command_line(__doc__, VAEConfig, TrainConfig, Stage1, presets=PRESETS)
    corpus, val = (Corpus(cfg.data, split, config.block_size, whole=config.causal) for split in ("train", "val"))
    device, autocast = pick_device(cfg.device)
    config.vocab_size = corpus.meta["vocab_size"]
    teacher, source = None, stage.teacher or f"{cfg.out}/gpt.pt"
    if source != "none":
        teacher = load_teacher(source, corpus, device)
        corpus.N = val.N = min(corpus.N, teacher.config.block_size - 1)  # room for its end-of-text token
    config.block_size = corpus.N
    sample = corpus.fixed_batches(16, device)  # of training data, for statistics
    mean, std = statistics_of(teacher, sample, corpus.eot, autocast) if teacher else (torch.zeros(0), torch.ones(0))  # (E_teacher,) each
    config.teacher_embd = len(mean)
    torch.manual_seed(cfg.seed)
    vae = TextVAE(config).to(device)
    vae.teacher_mean, vae.teacher_std = mean, std
    features = lambda batch: None if teacher is None else teacher_features(teacher, batch.tokens, corpus.eot)
    rows = val.fixed_batches(4, device)

    def loss_of(net, batch, generator, step):
        beta = config.beta * min(step / max(config.beta_warmup, 1), 1)
        return net(batch, features(batch), beta, generator)

    @torch.no_grad()
    def evaluate(vae):
        active = vae.standardise(sample)
        reports = [vae(b, features(b)) for b in rows]
        mean = {k: sum(r[k].item() for r in reports) / len(reports) for k in reports[0]}
        tqdm.write(f"val: accuracy {mean['accuracy']:.4f}, KL {mean['kl']:.1f} nats a token, {active} of {config.channels} "
                   f"channels active, REPA cosine {mean['cos']:.3f}, loss {mean['loss']:.4f}")
        return dict(mean, active=active)

    identity = hashlib.sha256(teacher.wte.weight.cpu().numpy().tobytes()).hexdigest() if teacher else "none"
    train("vae", cfg, vae, corpus, loss_of, evaluate, weight_of=lambda b: b.weight.sum(), teacher=identity)


if __name__ == "__main__":
    run(main)
