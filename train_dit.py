"""Stage 2: trains the DiT on the latents of a frozen VAE.

    python train_dit.py                                         # the embedded names, after train_vae.py
    python train_dit.py --data=data/owt2 --preset=small --out=out/owt2

Watch the table by t. `predicted` is the share of tokens that decode right from the DiT's estimate of the
clean latents, `noisy` from the rescaled noisy ones, z_t / (1 - t), and `shuffled` is its loss when the contexts
are another row's. A DiT that makes nothing of its context has shuffled = loss; knowing the tokens' latents alone
lifts predicted somewhat above noisy.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from textldm import (CONTEXT, DIT_PRESETS, TARGET, Corpus, DiTConfig, TextDiT, TextVAE, TrainConfig, UserError, VAEConfig,
                     command_line, continue_texts, flow_loss, load_checkpoint, model_from, option, pick_device, run,
                     train, velocity_loss, weighted_mean)


@dataclass
class Stage2:
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")


def main():
    config, cfg, stage = command_line(__doc__, DiTConfig, TrainConfig, Stage2, presets=DIT_PRESETS)
    corpus, val = (Corpus(cfg.data, split, config.block_size) for split in ("train", "val"))
    device, _ = pick_device(cfg.device)
    state = load_checkpoint(stage.vae or f"{cfg.out}/vae.pt", "vae", "python train_vae.py makes one", corpus.tokenizer)
    vae = model_from(TextVAE, VAEConfig, state).to(device).requires_grad_(False)
    config.vocab_size = corpus.meta["vocab_size"]
    config.block_size = corpus.N = val.N = min(corpus.N, vae.config.block_size)
    if config.channels not in (0, vae.config.channels):
        raise UserError(f"--channels={config.channels}, but the VAE's latents have {vae.config.channels}; leave it out")
    config.channels = vae.config.channels
    torch.manual_seed(cfg.seed)
    rows, = val.fixed_batches(1, device)
    eps = torch.randn(*rows.tokens.shape, config.channels, generator=torch.Generator().manual_seed(0)).to(device)

    # whose text takes the place of a row's context in `shuffled`: the next row's that is long enough
    cuts, lengths, B = (rows.segment == CONTEXT).sum(1).tolist(), (rows.weight == 1).sum(1).tolist(), len(eps)
    donor = [next((j % B for j in range(i + 1, i + B) if lengths[j % B] > cuts[i]), i) for i in range(B)]

    @torch.no_grad()
    def evaluate(dit):
        tokens, segment, weight = rows
        is_target, counted = (segment == TARGET)[..., None], (weight == 1) & (segment == TARGET)
        z_0 = vae.latents(tokens, segment)                                      # (B, N, C)
        strange = vae.latents(torch.where(segment == CONTEXT, tokens[donor], tokens), segment)
        mean = lambda x: weighted_mean(x.float(), counted).item()
        lines, table = [f"{'t':>5}{'loss':>9}{'shuffled':>10}{'noisy':>8}{'predicted':>11}"], []
        for t in torch.arange(1, 10, device=device) / 10:
            error, guess, _ = velocity_loss(dit, z_0, segment, t.expand(len(z_0)), eps)
            shuffled, *_ = velocity_loss(dit, strange, segment, t.expand(len(z_0)), eps)
            noisy = torch.where(is_target, z_0 + t / (1 - t) * eps, z_0)        # z_t / (1 - t)
            table.append(dict(t=round(t.item(), 1), loss=mean(error), shuffled=mean(shuffled),
                              noisy=mean(vae.read(noisy, segment) == tokens), predicted=mean(vae.read(guess, segment) == tokens)))
            lines.append("{t:5.1f}{loss:9.4f}{shuffled:10.4f}{noisy:8.3f}{predicted:11.3f}".format(**table[-1]))
        prompts = [row[s == CONTEXT].tolist()[: config.block_size // 2] for row, s in zip(tokens[:4], segment)]
        for prompt, text in zip(prompts, continue_texts(vae, dit, prompts, config.block_size // 2, corpus.eot)):
            text = [i for i in text if i != corpus.eot]
            lines.append(f"  {corpus.encoding.decode(prompt)!r} -> {corpus.encoding.decode(text)!r}")
        tqdm.write("\n".join(lines))
        return dict(loss=sum(r["loss"] for r in table) / len(table), table=table)

    train("dit", cfg, TextDiT(config), corpus, lambda net, batch, generator, step: flow_loss(net, vae, batch, config, generator),
          evaluate, ema=True, vae=vae.z_mean.tolist())


if __name__ == "__main__":
    run(main)
