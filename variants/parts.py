"""Writing in parts: keep the first tokens of what is written, and write the rest again.

    python sample.py --keep=2 --prompt="greek small letter"

A model that writes all tokens at once must guess how they will agree. Here only the first `keep` of
them are taken. They join the prompt, and the rest is written anew. So fewer tokens are decided at
once, and those after them are drafts. It takes no training: rows of training are cut in context and
target anywhere, so the model knows such prompts. It takes more evaluations: a text of L tokens is
written L / keep times, rounded up.

This is ours; none of the papers has it.
"""

from dataclasses import replace

from textldm import row_seeds


def write_in_parts(writer, prompts, length, sampling, keep):
    """Calls writer.sample again and again, and keeps the first `keep` new tokens each time.

    writer: a Writer of a kind that writes all tokens at once. A text ends with `length` tokens (0:
    at the end of a row) or an end-of-text token. Returns lists of ids."""
    end_of_text = writer.tokenizer["eot"]
    texts = [[] for _ in prompts]
    seeds = row_seeds(prompts, sampling.seed)
    kept = 0  # tokens of each unfinished text

    def is_open(i):
        room = length or writer.block_size - len(prompts[i])
        return len(texts[i]) < room and end_of_text not in texts[i]

    rows = list(range(len(prompts)))
    while rows:
        some = [prompts[i] + texts[i] for i in rows]
        left = length - kept if length else 0
        of_part = [(seeds[i] + 1_000_003 * kept) % 2**32 for i in rows]
        anew = replace(sampling, seed=of_part)  # with noise of its own
        for i, draft in zip(rows, writer.sample(some, left, anew)):
            texts[i] += draft[:keep]
        kept += keep
        rows = [i for i in rows if is_open(i)]
    return texts
