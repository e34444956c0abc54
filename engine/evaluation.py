"""What training scripts compute and print of validation rows."""

import torch
from tqdm import tqdm

from textldm import (
    CONTEXT,
    Sampling,
    continue_texts,
    denoising_loss,
    weighted_mean,
)


@torch.no_grad()
def evaluate_vae(vae, batches, features_of, active):
    """Returns a dict of means over validation batches, and a line of text. features_of(batch): the
    teacher's features, or None. active: the number of active channels."""
    mean = {}
    for batch in tqdm(batches, desc="evaluate", delay=2, leave=False):
        report = vae(batch, features_of(batch), vae.config.beta)
        z = vae.latents(batch.tokens, batch.segment)
        is_right = vae.to_tokens(z, batch.segment) == batch.tokens  # (B, N)
        report["accuracy"] = weighted_mean(is_right, batch.counted)
        for name, value in report.items():
            mean[name] = mean.get(name, 0) + value.item() / len(batches)
    text = (
        f"val: accuracy {mean['accuracy']:.4f}, KL {mean['kl']:.1f} nats per token, "
        f"{active} of {vae.config.channels} channels active, REPA cosine {mean['cos']:.3f}, "
        f"loss {mean['loss']:.4f}"
    )
    return dict(mean, active=active), text


class Evaluation:
    """Judges a DiT on fixed validation rows with fixed noise: a table by time, and four samples."""

    def __init__(self, batch, channels, corpus):
        self.batch, self.corpus = batch, corpus
        generator = torch.Generator().manual_seed(0)
        shape = (*batch.tokens.shape, channels)  # (B, N, C)
        self.eps = torch.randn(shape, generator=generator).to(batch.tokens.device)
        self.cuts = (batch.segment == CONTEXT).sum(1).tolist()  # where the contexts of rows end
        lengths = batch.counted.sum(1).tolist()
        self.others = rows_with_other_contexts(self.cuts, lengths)

    @torch.no_grad()
    def __call__(self, vae, dit):
        """A dict of the table and of its mean loss, and a text of the table and four samples.

        vae: what has `latents` and `to_tokens`."""
        table = table_by_time(vae, dit, self.batch, self.denoiser(vae, dit))
        longest = self.corpus.N // 2
        prompts = []
        for row, cut in zip(self.batch.tokens[:4], self.cuts):
            prompts.append(row[: min(cut, longest)].tolist())
        scale = 3.0 if dit.config.context_drop else 1.0
        sampling = Sampling(steps=20, cfg_scale=scale, temperature=0.7)
        lines = ["".join(f"{name:>11}" for name in table[0])]
        for row in table:
            lines.append("".join(f"{value:11.4f}" for value in row.values()))
        texts = self.write(vae, dit, prompts, sampling)
        lines += lines_of_samples(self.corpus.encoding, self.corpus.eot, prompts, texts)
        loss = sum(row["loss"] for row in table) / len(table)
        return dict(loss=loss, table=table), "\n".join(lines)

    def denoiser(self, vae, dit):
        """`denoise` for table_by_time."""
        batch = self.batch
        is_context = batch.segment == CONTEXT  # (B, N)
        z_0 = vae.latents(batch.tokens, batch.segment)  # (B, N, C)
        # The context of another row is encoded in the place of the row's own.
        shuffled = torch.where(is_context, batch.tokens[self.others], batch.tokens)  # (B, N)
        z_shuffled = vae.latents(shuffled, batch.segment)
        z_shuffled = torch.where(is_context[..., None], z_shuffled, z_0)  # (B, N, C)

        def denoise(t, is_shuffled):
            z = z_shuffled if is_shuffled else z_0
            return denoising_loss(dit, batch, z, t.expand(len(z)), self.eps, n_guess=len(z))

        return denoise

    def write(self, vae, dit, prompts, sampling):
        return continue_texts(vae, dit, prompts, self.corpus.N // 2, sampling)


def rows_with_other_contexts(needed, lengths):
    """For each row the index of the next row whose text has more tokens than this row needs, or its
    own where there is none.

    needed, lengths: lists of numbers of tokens, one per row."""
    B = len(needed)
    others = []
    for i in range(B):
        other = i
        for j in range(i + 1, i + B):
            if lengths[j % B] > needed[i]:
                other = j % B
                break
        others.append(other)
    return others


@torch.no_grad()
def table_by_time(space, dit, batch, denoise):
    """A list of rows, one for each t of 0.1 to 0.9. Each is a dict of means over counted targets.

    space has `latents` and `to_tokens`; dit has `estimate`. denoise(t, is_shuffled) returns
    what textldm.denoising_loss does, with the right contexts or with those of other rows."""
    z_0 = space.latents(batch.tokens, batch.segment)  # (B, N, C)
    weight = batch.at_targets(batch.counted)  # (T,)

    def mean(x):
        return weighted_mean(x.float(), weight).item()

    def accuracy(z):
        """Of tokens decoded from latents z (T, C) of the targets."""
        rows = z_0.flatten(0, 1).index_copy(0, batch.targets, z).view_as(z_0)  # (B, N, C)
        is_right = space.to_tokens(rows, batch.segment) == batch.tokens  # (B, N)
        return mean(batch.at_targets(is_right))

    table = []
    times = torch.arange(1, 10, device=z_0.device) / 10
    for t in tqdm(times, desc="evaluate", delay=2, leave=False):
        _, loss, h, z_t, t_of = denoise(t, is_shuffled=False)
        _, shuffled, _, _, _ = denoise(t, is_shuffled=True)
        row = dict(t=round(t.item(), 1), loss=mean(loss), shuffled=mean(shuffled))
        row["noisy"] = accuracy(z_t / (1 - t))
        row["predicted"] = accuracy(dit.estimate(h, z_t, t_of))
        table.append(row)
    return table


def lines_of_samples(encoding, eot, prompts, texts):
    """One line per prompt, with its continuation; both are lists of ids."""
    lines = []
    for prompt, text in zip(prompts, texts):
        before = encoding.decode([i for i in prompt if i != eot])
        after = encoding.decode([i for i in text if i != eot])
        lines.append(f"  {before!r} -> {after!r}")
    return lines
