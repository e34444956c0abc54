"""Stage 2: trains the DiT on the latents of a frozen VAE.

    python train_dit.py                                         # the embedded names, after train_vae.py
    python train_dit.py --data=data/owt2 --preset=small --out=out/owt2
    python train_dit.py --joint --out=out/ldlm --teacher=out/gpt.pt # LDLM: the latents too, in one stage, after bench/train_gpt.py

Watch the table by t. `loss` is what training minimises (nats a token, or the velocity's squared error), here over counted
tokens, with no context dropped and every row told a first estimate; its mean over the nine t chooses the best checkpoint (with --joint it is
the squared error of latents that move, which says nothing: the latest is kept). `shuffled` is the same when the contexts
are the beginnings of other rows: equal to loss as long as the DiT makes nothing of its context. `predicted` is the share of
tokens that decode right from the DiT's estimate of the clean latents, `noisy` from the rescaled noisy ones, z_t / alpha.
"""

import json
import sys
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from textldm import (CONTEXT, LDLM, TARGET, Config, Corpus, DiTConfig, JointConfig, TextDiT, TextVAE, TrainConfig, UserError, VAEConfig,
                     at_scale, command_line, continue_texts, denoising_loss, flow_loss, interpolant, joint_loss,
                     load_checkpoint, model_from, option, pick_device, run, train, weighted_mean)
from train_vae import load_teacher, statistics_of

# unspecified: depth and width, chosen to match the paper's 114M, 328M and 768M parameters
PRESETS = dict(tiny=dict(max_steps=2880, eval_interval=960)) | {k: at_scale(*size, max_steps=1_000_000) for k, size in dict(
    small=(16, 12, 768), medium=(26, 16, 1024), large=(27, 24, 1536)).items()}


@dataclass
class Stage2(Config):
    vae: str = option("", "checkpoint of stage 1 (OUT/vae.pt)")
    from_decoder: bool = option(True, "deviation: blocks begin as those of the VAE's decoder, if of their width")
    joint: bool = option(False, "LDLM: no VAE, latents are learned with the DiT, from a teacher (more options: --joint --help; --recipe=paper is TextLDM's all the same)")
    teacher: str = option("", "frozen GPT, with --joint (OUT/gpt.pt)")


@torch.no_grad()
def latents_of_tokens(vae, batches):
    """The mean latent (V, C) of each token, over its places in the batches and one alone, so that rare tokens have one."""
    alone = torch.arange(vae.config.vocab_size, device=vae.z_mean.device)[:, None]
    table = vae.latents(alone, torch.full_like(alone, TARGET))[:, 0]            # (V, C)
    z = torch.cat([vae.latents(b.tokens, b.segment)[b.counted] for b in batches])
    tokens = torch.cat([b.tokens[b.counted] for b in batches])
    table = table.index_add(0, tokens, z) / (1 + tokens.bincount(minlength=len(table)))[:, None]
    print(f"a token fixes its latent but for {(z - table[tokens]).square().mean():.1%} of its variance")
    return table


def begin_as_decoder(dit, vae):
    """Copies the blocks of the VAE's decoder to the DiT's, two to four as 1, 1, 2, 2, where both have the same width and heads (not in
    the presets medium and large): who reads clean latents learns sooner to read noisy ones. Input and output layers are fresh, and
    adaLN, which the decoder has not, stays zero."""
    theirs, ours = vae.decoder.h, dit.trunk.h
    if (vae.config.n_embd, vae.config.n_head) == (dit.config.n_embd, dit.config.n_head):
        for i, layer in enumerate(ours):
            layer.load_state_dict(theirs[i * len(theirs) // len(ours)].state_dict(), strict=False)


@torch.no_grad()
def look_at_latents(ldlm, rows, corpus):
    """One line in which a collapse shows while it happens. The other numbers do not show it."""
    z = ldlm.latents(rows.tokens, rows.segment)                                 # (B, N, C)
    clean, z = ldlm.to_tokens(z, rows.segment) == rows.tokens, z[rows.counted].cpu()  # (B, N), (tokens, C)
    std, spread = z.std(0), torch.linalg.eigvalsh(z.T.cov().double())           # (C,) each
    texts = continue_texts(ldlm, ldlm.dit, [[]] * 64, 0, corpus.eot, cfg_scale=1.0)
    tokens, of_rows = (torch.tensor(x).bincount().float() for x in (sum(texts, []), rows.tokens[:64][rows.counted[:64]].tolist()))
    entropy, real = (-(p / p.sum()).xlogy(p / p.sum()).sum() for p in (tokens, of_rows))
    return (f"latents: {std.square().mean():.2f} of their variance is between tokens, in {spread.sum() ** 2 / spread.square().sum():.0f} directions; std per channel "
            f"{std.min():.2f} to {std.max():.2f}, {(std > 0.1).sum()} of {len(std)} active; {clean[rows.counted].float().mean():.2%} of val tokens reconstructed; "
            f"64 samples from nothing: entropy {entropy:.2f} nats (of val rows {real:.2f})")


def main():
    joint = "--joint" in sys.argv  # before all options are read, as it has its own
    config, cfg, stage = command_line(__doc__, JointConfig if joint else DiTConfig, TrainConfig, Stage2, presets=PRESETS)
    corpus, val = (Corpus(cfg.data, split, config.block_size, whole=config.latent_block > 0) for split in ("train", "val"))
    device, autocast = pick_device(cfg.device)
    config.vocab_size = corpus.meta["vocab_size"]
    if stage.teacher and not joint:
        raise UserError("--teacher is read with --joint; in two stages it is train_vae.py's")
    if joint != stage.joint or joint and (cfg.compile or stage.vae):
        raise UserError("--joint goes with none of --no-joint, --compile and --vae")
    if joint:
        teacher = load_teacher(stage.teacher or f"{cfg.out}/gpt.pt", corpus, device)
        longest, is_causal = teacher.config.block_size - 1, False
        config.teacher_config = json.dumps(asdict(teacher.config))
        loss_of = joint_loss
    else:
        state = load_checkpoint(stage.vae or f"{cfg.out}/vae.pt", "vae", "python train_vae.py makes one", corpus.tokenizer)
        vae = model_from(TextVAE, VAEConfig, state).to(device).requires_grad_(False)
        longest, is_causal, config.channels = vae.config.block_size, vae.config.causal, vae.config.channels
        loss_of = lambda net, batch, generator, step: dict(loss=flow_loss(net, vae.latents(batch.tokens, batch.segment), batch, generator)[0])
    config.block_size = corpus.N = val.N = min(corpus.N, longest)
    if is_causal != (config.latent_block > 0):
        raise UserError(f"this VAE is {'' if is_causal else 'not '}causal: " + ("give a --latent_block" if is_causal else
                        f"--latent_block={config.latent_block} needs one of train_vae.py --causal, and no --joint"))
    if 2 * config.latent_block > config.block_size:
        raise UserError(f"--latent_block={config.latent_block} is more than half of a row of {config.block_size} tokens; lower it")
    torch.manual_seed(cfg.seed)
    rows, = val.fixed_batches(1, device)
    eps = torch.randn(*rows.tokens.shape, config.channels, generator=torch.Generator().manual_seed(0)).to(device)

    N, b = rows.tokens.shape[1], config.latent_block
    block, n_blocks = torch.arange(N, device=device) // (b or N), (N - 1) // (b or N) + 1  # (N,)
    # for the column `shuffled`, whose text takes the place of a row's context: the next row's that is long enough
    cuts, lengths, B = (rows.segment == CONTEXT).sum(1).tolist(), rows.counted.sum(1).tolist(), len(eps)
    needs = [n - 1 if b else cut for cut, n in zip(cuts, lengths)]              # blocks: all of a row is context of something
    donor = [next((j % B for j in range(i + 1, i + B) if lengths[j % B] > needs[i]), i) for i in range(B)]

    @torch.no_grad()
    def evaluate(net):
        space, dit = (net, net.dit) if joint else (vae, net)
        tokens, segment, _ = rows
        of_targets = lambda x: x.flatten(0, 1)[rows.targets]                    # (B, N, ...) -> (T, ...)
        counted = of_targets(rows.counted & ((block > 0) | rows.counted[:, :1]))  # (T,), as in flow_loss
        z_0 = space.latents(tokens, segment)                                    # (B, N, C)
        strange = space.latents(tokens[donor] if b else torch.where(segment == CONTEXT, tokens[donor], tokens), segment)
        mean = lambda x: weighted_mean(x.float(), counted).item()

        def accuracy(z):  # of targets' estimated latents z (T, C)
            whole = z_0.flatten(0, 1).index_copy(0, rows.targets, z).view_as(z_0)  # (B, N, C)
            return mean(of_targets(space.to_tokens(whole, segment) == tokens))
        table = []
        for t in torch.arange(1, 10, device=device) / 10:
            times = t.expand(len(z_0), n_blocks)                                # (B, M)
            loss, output, z_t, at = denoising_loss(dit, z_0, z_0, rows, times, eps, block, n_guess=len(z_0))
            shuffled, *_ = denoising_loss(dit, z_0, strange, rows, times, eps, block, n_guess=len(z_0))
            predicted = accuracy(dit.estimate(output, z_t, at))
            noisy = accuracy(z_t / interpolant(t)[0])                           # z_t / alpha: z_0, and noise
            table.append(dict(t=round(t.item(), 1), loss=mean(loss), shuffled=mean(shuffled), noisy=noisy, predicted=predicted))
        lines = ["".join(f"{k:>11}" for k in table[0])] + ["".join(f"{x:11.4f}" for x in row.values()) for row in table]
        prompts = [row[: n // 2 if b else cut].tolist()[: N // 2] for row, cut, n in zip(tokens[:4], cuts, lengths)]
        scale = 3.0 if config.context_drop else 1.0
        for prompt, text in zip(prompts, continue_texts(space, dit, prompts, 0 if b else N // 2, corpus.eot, cfg_scale=scale)):
            text = [i for i in text if i != corpus.eot]
            lines.append(f"  {corpus.encoding.decode(prompt)!r} -> {corpus.encoding.decode(text)!r}")
        if joint:
            lines.append(look_at_latents(net, rows, corpus))
        tqdm.write("\n".join(lines))
        return dict(loss=sum(r["loss"] for r in table) / len(table), table=table)

    weight_of = lambda batch: (batch.weight * (batch.segment == TARGET)).sum()
    if joint:
        ldlm = LDLM(config).to(device)
        ldlm.teacher.load_state_dict(teacher.state_dict())
        ldlm.hidden_mean, ldlm.hidden_std = statistics_of(teacher, corpus.fixed_batches(16, device), corpus.eot, autocast)
        return train("dit", cfg, ldlm, corpus, loss_of, evaluate, weight_of, ema=True, keep_last=True, joint=True)
    dit = TextDiT(config)
    if config.predict_tokens:
        dit.latent_of.copy_(latents_of_tokens(vae, corpus.fixed_batches(64, device)))
    if stage.from_decoder:
        begin_as_decoder(dit, vae)
    train("dit", cfg, dit, corpus, loss_of, evaluate, weight_of, ema=True, vae=vae.z_mean.tolist())  # by which sample.py knows its VAE


if __name__ == "__main__":
    run(main)
