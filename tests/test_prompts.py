"""Prompts: where they end, what they hold, and that a text depends on nothing else."""

import json

import pytest
import torch

from engine.corpus import encode
from engine.prompts import make_prompts
from engine.config import UserError
from tests.test_sample import KINDS, models, random_models, sample  # noqa: F401 (fixtures)
from textldm import Sampling, row_seeds
from variants.writers import Writer, load_writer

WORDS = ["greek", " letter", " alpha", " al", "x"]


@pytest.fixture(scope="module")
def encoding(home):
    return load_writer(home / "out/gpt.pt").encoding


def texts_of(prompts, encoding):
    return [(encoding.decode(list(prompt)), prompt.rest.decode()) for prompt in prompts]


def writer_of(options):
    """The Writer that sample.py makes of options."""
    option, path = options
    if option == "--out":
        return load_writer(path / "dit.pt", path / "vae.pt")
    return load_writer(path)


# ---- Where a prompt ends


@pytest.mark.parametrize(
    "text, ids, rest",
    [
        ("greek small letter", "greek small", " letter"),
        ("greek small letter ", "greek small letter", " "),
        ("greek small letter  \n", "greek small letter", "  \n"),
        ("greek", "", "greek"),
        ("", "", ""),
        (" ", "", " "),
        ("don't", "don", "'t"),
        ("one 2", "one", " 2"),
    ],
)
def test_the_last_piece_of_a_prompt_is_to_be_written_again(encoding, text, ids, rest):
    assert texts_of(make_prompts(encoding, [text], 40, True), encoding) == [(ids, rest)]


def test_where_words_cannot_be_completed_white_space_alone_is_taken_off(encoding):
    prompts = make_prompts(encoding, ["greek sm", "greek sm \n"], 40, False)
    assert texts_of(prompts, encoding) == [("greek sm", ""), ("greek sm", " \n")]


def test_the_beginning_of_a_long_prompt_is_cut_off_whatever_is_to_be_written_again(encoding):
    whole = encode(encoding, "one two three four")
    for room in range(1, len(whole)):
        (prompt,) = make_prompts(encoding, ["one two three four"], room, True)
        kept = encoding.decode(list(prompt)).encode() + prompt.rest
        assert kept == encoding.decode_bytes(whole[-room:])


def writer_with(encoding, logits):
    """A Writer that is sure of its first tokens: logits, a function of the ids before. Its texts
    are then two tokens, "!" and an end of text."""
    eot = encoding.n_vocab - 1
    bang = encoding.encode_single_token("!")

    def sample(prompts, length, sampling, callback=None):
        return [[bang, eot] for _ in prompts]

    def first_logits(prompts, sampling):
        return torch.stack([logits(prompt) for prompt in prompts])

    tokenizer = dict(eot=eot, vocab_size=eot + 1)
    writer = Writer("gpt", sample, tokenizer, 40, first_logits)
    writer.encoding = encoding
    return writer


ENDS = ["greek small letter", "greek al", "greek ", "gre", "caf", " ", "☕"]


@pytest.mark.parametrize("text", ENDS)
def test_whatever_a_model_would_rather_write_its_text_goes_on_as_it_was_typed(encoding, text):
    """Here it likes a new token in each place, fitting or not."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)

        def logits(prompt, generator=generator):
            return 5 * torch.randn(encoding.n_vocab, generator=generator)

        writer = writer_with(encoding, logits)
        prompts = writer.encode([text])
        (completion,) = writer.complete(prompts, Sampling(seed=[seed]))
        written = encoding.decode_bytes([*prompts[0], *completion])
        assert written.startswith(text.encode())
        generator.manual_seed(seed)  # it likes the same tokens again
        (ids,) = writer.write(prompts, 0, Sampling(seed=[seed]))
        ending = written[len(text.encode()) :].decode("utf-8", "replace")
        assert writer.decode(ids) == f"{ending}!"


def test_a_completed_word_is_drawn_as_often_as_the_model_says(encoding):
    """Among those tokens that fit, at the temperature of the text."""
    words = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    tokens = [i for i, word in enumerate(words) if word.startswith(b" ")][:2]
    tokens.append(encoding.encode_single_token(b"x"))  # which does not fit
    p = torch.tensor([0.2, 0.1, 0.7])

    def logits(prompt):
        return torch.full((encoding.n_vocab,), -99.0).index_put((torch.tensor(tokens),), p.log())

    for temperature, share in ((1.0, 1 / 3), (0.5, 1 / 5)):
        writer = writer_with(encoding, logits)
        prompts = writer.encode(["greek "] * 600)
        sampling = Sampling(temperature=temperature, seed=writer.seeds(prompts, 0))
        completed = writer.complete(prompts, sampling)
        first = [completion[0] for completion in completed]
        assert set(first) == set(tokens[:2])
        assert first.count(tokens[1]) / 600 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["greek sm", "greek small ", "arab", " "])
@pytest.mark.parametrize("options", [[], ["--keep=1"]])
def test_each_kind_goes_on_as_a_prompt_was_typed(random_models, sample, kind, text, options):
    """Where it has no p(token), white space alone is given back."""
    if options and kind in ("gpt", "cola_dlm"):
        pytest.skip("--keep is for kinds that write all at once")
    out = sample(*random_models[kind], f"--prompt={text}", "--length=6", *options).out
    assert out.startswith(f"{text}|")
    writer = writer_of(random_models[kind])
    (prompt,) = writer.encode([text], 6)
    assert bool(prompt.rest) == (kind != "ldlm" or text.endswith(" "))
    (completion,) = writer.complete([prompt], Sampling(3, 3.0, 0.7, [0]))
    whole = writer.encoding.decode_bytes([*prompt, *completion])
    is_completed = whole.startswith(text.encode())
    assert is_completed == (kind != "ldlm" or not text.endswith(" "))


def test_white_space_is_given_back_where_no_token_can_be_asked_for(encoding):
    writer = writer_with(encoding, None)
    writer.first_logits = None
    prompts = writer.encode(["greek  "])
    for written, given_back in (("  alpha", "alpha"), (" alpha", "alpha"), ("alpha", "alpha")):
        writer.sample = lambda *given, written=written: [encode(encoding, written)]
        assert writer.decode(writer.write(prompts)[0]) == given_back


# ---- What a prompt holds


def test_an_end_of_text_begins_another_document(encoding, capsys):
    mark = "<|endoftext|>"
    prompts = make_prompts(encoding, [mark, f"{mark}greek al", "greek al"], 40, True)
    assert capsys.readouterr().err == ""
    assert texts_of(prompts, encoding) == [("", ""), ("greek", " al"), ("greek", " al")]
    prompts = make_prompts(encoding, ["", f"one{mark}two{mark}greek al"], 40, True)
    assert texts_of(prompts, encoding) == [("", ""), ("greek", " al")]
    assert capsys.readouterr().err.count("warning: prompt 2: what stands before") == 1


def test_what_tiktoken_gives_up_on_is_one_sentence(encoding):
    with pytest.raises(UserError, match="tiktoken cannot cut a text of 1,000,000 characters"):
        make_prompts(encoding, ["greek" + " " * 1_000_000], 40, True)


# ---- What a text depends on


def test_seeds_tell_apart_all_that_a_text_depends_on():
    seeds = row_seeds([[1], [2], [1], [], [1, 2]], 0)
    assert len(set(seeds)) == 5
    assert row_seeds([[2], [1], [1, 2], [1]], 0) == [seeds[1], seeds[0], seeds[4], seeds[2]]
    assert not set(seeds) & set(row_seeds([[1], [2], [1], [], [1, 2]], 1))
    assert not set(seeds) & set(row_seeds([[1], [2], [1], [], [1, 2]], 2**32))
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert row_seeds([[1], [1]], [7, 8]) == [7, 8]


@pytest.mark.parametrize("options", [[], ["--keep=2"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_depends_on_its_prompt_its_number_and_the_seed(
    random_models, tmp_path, sample, monkeypatch, kind, options
):
    """Not on --batch_size, --n or other prompts. The noise of a row is equal to the bit."""
    if options and kind in ("gpt", "cola_dlm"):
        pytest.skip("--keep is for kinds that write all at once")
    real = torch.Generator.manual_seed

    def texts(prompts, *more):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(dict(prompt=prompt)) + "\n" for prompt in prompts))
        files = [f"--prompts={source}", f"--output={target}", "--length=6", "--temperature=1"]
        sample(*random_models[kind], *files, *options, *more)
        lines = target.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    some = ["greek", "latin small", "", "greek", "greek small letter alpha with one"]
    together = texts(some)
    assert len(set(together)) == len(some)
    assert texts(some, "--batch_size=1") == together
    assert texts(some, "--batch_size=2") == together
    assert texts(["greek"]) == together[:1]
    assert texts(["latin small"]) == together[1:2]
    assert texts(["greek"], "--n=2") == [together[0], together[3]]
    assert texts([some[4], some[1], some[0]]) == [together[4], together[1], together[0]]
    assert texts(some, "--seed=1") != together


@pytest.mark.parametrize("kind", ["gpt", "dit", "masked", "cola_dlm"])
@pytest.mark.parametrize("length", [0, 3])
def test_a_completion_of_many_tokens_leaves_room_for_the_text(random_models, kind, length):
    """Here each byte of a long word becomes a token, which is more than was taken off."""
    writer = writer_of(random_models[kind])
    bytes_alone = torch.tensor([len(token) == 1 for token in writer.token_bytes] + [False])

    def only_bytes(prompts, sampling):
        assert all(len(prompt) < writer.block_size for prompt in prompts)
        return torch.zeros(len(prompts), len(bytes_alone)).masked_fill(~bytes_alone, -1e9)

    writer.first_logits = only_bytes
    (prompt,) = writer.encode([" greek small letter" * 9 + " ☕☕☕☕☕☕☕☕☕☕"], length)
    (ids,) = writer.write([prompt], length, Sampling(3, seed=[0]))
    assert 1 <= len(ids) <= max(length, writer.block_size)


def test_tokens_that_fit_a_rest_cover_it_or_are_the_longest_that_it_begins_with():
    writer = Writer("gpt", None, dict(eot=6), 16)
    writer.token_bytes = [b"a", b"al", b"alp", b"alpha", b"alphabet", b"b"]
    assert writer.fitting(b"alph").tolist() == [False, False, True, True, True, False, False]
    assert writer.fitting(b"b").tolist() == [False] * 5 + [True, False]
