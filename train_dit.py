"""Stage 2: trains the DiT on the latents of a frozen VAE.

    python train_dit.py                                  # the embedded names, after train_vae.py
    python train_dit.py --data=data/owt2 --preset=small --out=out/owt2

Watch the table by t, over validation rows (t = 1 is noise):
    loss       nats per token, or the squared error of the velocity. It is what training minimises,
               but each row is told its estimate of a first pass (in training half are), and tails
               do not count. Its mean over the nine t chooses the best checkpoint
    shuffled   the same, with contexts of other rows. It equals `loss` if the DiT ignores its
               context
    noisy      share of tokens that decode right from the noisy latents, z_t / (1 - t)
    predicted  share of tokens that decode right from the DiT's estimate of the clean latents
"""

from dataclasses import dataclass

import torch

from engine.checkpoint import build, copy_blocks, load_checkpoint
from engine.config import DIT_PRESETS, TrainConfig, command_line
from engine.corpus import Corpus, shorten_rows
from engine.evaluation import Evaluation
from engine.statistics import mean_latents
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import OURS, TARGET, DiTConfig, TextDiT, TextVAE, VAEConfig, flow_loss, option


@dataclass
class DiTStage:
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")
    from_decoder: bool = option(False, "blocks start as the VAE decoder's, if of their width")


def fit(config, vae, corpora):
    """Gives the config of a DiT the sizes of its VAE, and rows that this VAE can read."""
    shorten_rows(corpora, vae.config.block_size, "the VAE")
    config.block_size = corpora[0].N
    config.vocab_size = vae.config.vocab_size
    config.channels = vae.config.channels


def make_dit(dit_type, config, vae, corpus, options):
    """A DiT before its first step. options: a DiTStage."""
    device = vae.z_mean.device
    dit = dit_type(config).to(device)
    if config.predict_tokens:
        dit.latent_of, unexplained = mean_latents(vae, corpus.fixed_batches(64, device))
        print(f"a token fixes its latent but for {unexplained:.1%} of its variance")
    is_same_width = (config.n_embd, config.n_head) == (vae.config.n_embd, vae.config.n_head)
    if options.from_decoder and is_same_width:
        copy_blocks(vae.decoder.h, dit.transformer.h)
    return dit


def weight_of(batch):
    return (batch.weight * (batch.segment == TARGET)).sum()


def main():
    config, cfg, options = command_line(
        __doc__, DiTConfig, TrainConfig, DiTStage, presets=DIT_PRESETS, recipe=OURS
    )
    corpus = Corpus(cfg.data, "train", config.block_size)
    val = Corpus(cfg.data, "val", config.block_size)
    device, _ = pick_device(cfg.device, corpus.N)
    path = options.vae or f"{cfg.out}/vae.pt"
    state = load_checkpoint(path, "vae", "python train_vae.py makes one", corpus.tokenizer)
    vae = build(TextVAE, VAEConfig, state).to(device).requires_grad_(False)
    fit(config, vae, (corpus, val))
    torch.manual_seed(cfg.seed)
    dit = make_dit(TextDiT, config, vae, corpus, options)
    table = Evaluation(val.fixed_batches(1, device)[0], config.channels, corpus)

    def loss_of(net, batch, generator, step):
        z_0 = vae.latents(batch.tokens, batch.segment)
        return dict(loss=flow_loss(net, batch, z_0, generator))

    # z_mean tells this VAE from others: sample.py checks that it has the same.
    identity = dict(kind="dit", vae=vae.z_mean.tolist())
    stage = Stage("dit", cfg, corpus, dit, identity, has_average=True)
    train(stage, loss_of, weight_of, lambda average: table(vae, average))


if __name__ == "__main__":
    run_script(main)
