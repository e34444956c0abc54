"""Prompts: where they end, what they hold, and that a text depends on nothing else."""

import pytest
import torch

from engine.config import UserError
from engine.corpus import encode
from engine.prompts import make_prompts, read_lines, room_for_prompts
from tests.test_sample import KINDS, place, sample, written  # noqa: F401 (fixtures)
from textldm import Sampling
from variants.writers import Writer, load_writer

MARK = "<|endoftext|>"
KINDS_IN_PARTS = [(kind, 0) for kind in KINDS] + [("dit", 2), ("masked", 2), ("ldlm", 2)]


@pytest.fixture(scope="module")
def encoding(home):
    return load_writer(home / "out/gpt.pt").encoding


def writer_of(place, kind):
    folder = place / "gpt2_kinds" / kind
    return load_writer(folder / "dit.pt", folder / "vae.pt")


@pytest.mark.parametrize("bad", ["", "{", "3", "[]", '{"b": "x"}', '{"a": 3}', "[" * 99999])
def test_a_line_without_what_is_wanted_is_refused_by_its_number(tmp_path, bad):
    path = tmp_path / "in.jsonl"
    path.write_text('\ufeff{"a": "x"}\n' + bad + '\n{"a": "x"}\n', encoding="utf-8")
    with pytest.raises(UserError, match='line 2: expected {"a": "..."}'):
        read_lines(path, ["a"])


@pytest.mark.parametrize(
    "text, can_complete, ids, rest",
    [
        ("greek small letter", True, "greek small", " letter"),
        ("greek small letter ", True, "greek small letter", " "),
        ("greek small letter  \n", True, "greek small letter", "  \n"),
        ("greek", True, "", "greek"),
        (" ", True, "", " "),
        ("don't", True, "don", "'t"),
        ("greek sm", False, "greek sm", ""),
        ("greek sm \n", False, "greek sm", " \n"),
        (MARK, True, "", ""),
        (f"{MARK}greek al", True, "greek", " al"),
        (f"one{MARK}two{MARK}greek al", True, "greek", " al"),
    ],
)
def test_the_last_piece_is_to_be_written_again(encoding, capsys, text, can_complete, ids, rest):
    _, prompt = make_prompts(encoding, ["", text], 40, can_complete)
    assert (encoding.decode(prompt), prompt.rest.decode()) == (ids, rest)
    warning = "warning: prompt 2: what stands before" if text.startswith("one<") else ""
    assert capsys.readouterr().err[: len(warning) or None] == warning


def test_the_beginning_of_a_long_prompt_is_cut_off_with_a_warning(encoding, capsys):
    whole = encode(encoding, "one two three four")
    n = len(whole)
    for room in range(1, n):
        _, prompt = make_prompts(encoding, ["", "one two three four"], room, True)
        kept = encoding.decode_bytes(prompt) + prompt.rest
        assert kept == encoding.decode_bytes(whole[-room:])
        warning = f"warning: prompt 2: {n} tokens, {n - room} more than fit; its beginning is cut"
        assert capsys.readouterr().err.startswith(warning)


@pytest.mark.parametrize("length, row, room", [(0, 64, 56), (0, 4, 3), (5, 64, 59), (63, 64, 1)])
def test_a_prompt_leaves_room_for_its_text_or_for_an_eighth_of_a_row(length, row, room):
    assert room_for_prompts(length, row) == room


def test_what_tiktoken_gives_up_on_is_one_sentence(encoding):
    with pytest.raises(UserError, match="tiktoken cannot cut a text of 1,000,000 characters"):
        make_prompts(encoding, ["greek" + " " * 1_000_000], 40, True)


def stand_in(encoding, first_logits=None):
    """A Writer that completes by first_logits, and whose texts are "!" and an end of text."""
    bang = encoding.encode_single_token("!")

    def sample(prompts, *options):
        return [[bang, 299] for _ in prompts]

    writer = Writer("gpt", sample, dict(eot=299), 40, first_logits)
    writer.encoding = encoding
    return writer


@pytest.mark.parametrize("text", ["greek small letter", "greek ", "gre", "caf", " ", "☕"])
def test_whatever_a_model_would_rather_write_its_text_goes_on_as_it_was_typed(encoding, text):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        writer = stand_in(encoding, lambda *_: 5 * torch.randn(1, 300, generator=generator))
        prompts = writer.encode([text])
        (completion,) = writer.complete(prompts, Sampling(seed=[seed]))
        written = encoding.decode_bytes([*prompts[0], *completion])
        assert written.startswith(text.encode())
        generator.manual_seed(seed)  # it likes the same tokens again
        (ids,) = writer.write(prompts, 0, Sampling(seed=[seed]))
        ending = written[len(text.encode()) :].decode("utf-8", "replace")
        assert writer.decode(ids) == f"{ending}!"


def test_a_completed_word_is_drawn_as_often_as_the_model_says(encoding):
    spaces = [i for i in range(299) if encoding.decode_single_token_bytes(i).startswith(b" ")]
    tokens = [*spaces[:2], encoding.encode_single_token(b"x")]  # which does not fit
    logits = torch.full((300,), -99.0)
    logits[tokens] = torch.tensor([0.2, 0.1, 0.7]).log()
    writer = stand_in(encoding, lambda prompts, _: logits.expand(len(prompts), -1))
    prompts = writer.encode(["greek "] * 600)
    for temperature, share in ((1.0, 1 / 3), (0.5, 1 / 5)):
        sampling = Sampling(temperature=temperature, seed=writer.seeds(prompts, 0))
        first = [completion[0] for completion in writer.complete(prompts, sampling)]
        assert set(first) == set(tokens[:2])
        assert first.count(tokens[1]) / 600 == pytest.approx(share, abs=0.06)


def test_tokens_that_fit_a_rest_cover_it_or_are_the_longest_that_it_begins_with():
    writer = Writer("gpt", None, dict(eot=6), 16)
    writer.token_bytes = [b"a", b"al", b"alp", b"alpha", b"alphabet", b"b"]
    assert writer.fitting(b"alph").tolist() == [False, False, True, True, True, False, False]
    assert writer.fitting(b"b").tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("written", ["  alpha", " alpha", "alpha"])
def test_white_space_is_given_back_where_no_token_can_be_asked_for(encoding, written):
    writer = stand_in(encoding)
    writer.sample = lambda *given: [encode(encoding, written)]
    assert writer.text("greek  ") == "alpha"


def test_end_of_texts_are_line_ends_within_a_text_and_nothing_at_its_end(encoding):
    a = encoding.encode_single_token("a")
    assert stand_in(encoding).decode([a, 299, a, 299]) == "a\na"


@pytest.mark.parametrize("kind, places", [("dit", [0, 2]), ("cola_dlm", [0, 0])])
def test_p_token_is_asked_for_of_noise_where_a_text_begins(place, monkeypatch, kind, places):
    def positions(net, z, t, guess, segment, sampling):
        assert t == 1 and not guess.any()
        net.dit = lambda z: torch.arange(z.shape[1]).expand(len(z), -1)
        assert net(torch.cat((z, z))).tolist() == [*places, *places]  # guidance has two copies
        return net(z)

    monkeypatch.setattr("variants.writers.guided_estimate", positions)
    first_logits = writer_of(place, kind).first_logits
    assert first_logits([[], [1, 2]], Sampling(seed=[0, 1])).tolist() == places


@pytest.mark.parametrize("kind, keep", KINDS_IN_PARTS)
@pytest.mark.parametrize("text", ["greek sm", "greek small ", "arab", " "])
def test_each_kind_goes_on_as_a_prompt_was_typed(place, kind, keep, text):
    writer = writer_of(place, kind)
    prompts = writer.encode([text], 6)
    sampling = Sampling(3, seed=writer.seeds(prompts, 0))
    (completion,) = writer.complete(prompts, sampling)
    completed = writer.encoding.decode_bytes([*prompts[0], *completion])
    (ids,) = writer.write(prompts, 6, sampling, keep=keep)
    assert (text.encode() + writer.encoding.decode_bytes(ids)).startswith(completed)
    assert completed.startswith(text.rstrip().encode() if kind == "ldlm" else text.encode())
    assert bool(completion) == (kind != "ldlm")


@pytest.mark.parametrize("kind, keep", KINDS_IN_PARTS)
def test_a_text_depends_on_its_prompt_its_number_and_the_seed(written, kind, keep):
    def texts(prompts, *more):
        options = ["--length=6", "--temperature=1", f"--keep={keep}", *more]
        lines = written(kind, [dict(prompt=prompt) for prompt in prompts], *options)
        return [line["text"] for line in lines]

    some = ["greek", "latin small", "", "greek", "greek small letter alpha with one"]
    together = texts(some)
    assert texts(some, "--batch_size=1") == together
    assert texts(some, "--batch_size=2") == together
    assert texts(["greek"], "--n=2") == [together[0], together[3]]
    assert texts([some[4], some[1]]) == [together[4], together[1]]
    assert len({*together, *texts(some, "--seed=1")}) == 10
    if keep:
        assert texts(some, "--keep=6") == texts(some, "--keep=0") != together


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 3])
def test_a_completion_of_single_bytes_leaves_room_for_the_text(place, kind, length):
    writer = writer_of(place, kind)
    tokens = [*writer.token_bytes, None]
    writer.fitting = lambda rest: torch.tensor([token == rest[:1] for token in tokens])
    prompts = writer.encode([" greek small letter" * 9 + " " + "☕" * 10], length)
    (ids,) = writer.write(prompts, length, Sampling(3, seed=[0]))
    assert 1 <= len(ids) <= (length or writer.block_size)
