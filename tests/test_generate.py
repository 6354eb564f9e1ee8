"""Text from checkpoints: what is shown when, where it ends, and the command from end to end."""

import io
import json

import jax
import numpy as np
import pytest
from etils import epath

from lm import checkpoint, generate
from lm.data import chat
from lm.data import tokenizer as tokenizers
from lm.decoding.sampling import Sampling, row_keys
from lm.decoding.stop_strings import TextStream, stream_texts
from lm.generate import GenerationOptions
from tests.helpers import run_commands, run_training

BYTES = tokenizers.ByteTokenizer()


# --- text as its tokens come ---


def push_text(text, prompt="p", stop=()):
    """(what each byte of a text settles and then its end, the stream)."""
    text_stream = TextStream(BYTES, BYTES.prompt(prompt), stop)
    pieces = [text_stream.push(byte) for byte in text.encode()]
    pieces.append(text_stream.close())
    assert "".join(pieces) == text_stream.text
    return pieces, text_stream


def test_characters_are_shown_whole():
    pieces, text_stream = push_text("aé漢😀!", prompt="ü")

    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "😀", "!", ""]
    assert text_stream.text == "aé漢😀!"


def test_an_unfinished_character_is_shown_in_the_end():
    text_stream = TextStream(BYTES, BYTES.prompt("p"))

    assert text_stream.push("é".encode()[0]) == ""
    assert text_stream.close() == "�"


@pytest.mark.parametrize(
    "text, stop, wanted",
    [
        ("one. two", (".",), "one"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("a\nb\n\nc", ("\n\n", "b"), "a\n"),
        ("aab", ("ab",), "a"),
        ("ababc", ("abc",), "ab"),
        ("never", ("x", "err"), "never"),
        ("STO", ("STOP",), "STO"),
        ("STOP", ("STOP",), ""),
        ("é.é", ("é.",), ""),
        ("xyz", ("yz", "xyz"), ""),
    ],
)
def test_stop_strings_that_span_tokens(text, stop, wanted):
    """Tokens are bytes here. Nothing of a stop string is ever shown; what only began as one is, in
    the end.
    """
    pieces, text_stream = push_text(text, stop=stop)

    assert text_stream.text == wanted
    assert text_stream.ended == any(s in text for s in stop)
    # Nothing is left to show after a stop string.
    assert pieces[-1] == "" or not text_stream.ended


def test_an_empty_stop_string():
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(BYTES, [1], ("",))


# --- a generator that is told what to say ---


class ScriptedGenerator:
    """A generator that gives the prompts these texts, byte by byte.

    Attributes:
      num_steps: tokens asked for so far.
      calls: (prompts, keys) of each call.
    """

    def __init__(self, *texts, end=257):
        self.texts = [[*text.encode(), end] for text in texts]
        self.num_steps = 0
        self.calls = []
        self.longest = 1000

    def longest_prompt(self, max_new_tokens):
        return self.longest

    def before_text(self, prompt):
        return prompt

    def check(self, prompts, max_new_tokens):
        assert max_new_tokens == 50

    def stream(self, prompts, max_new_tokens, keys_B):
        self.calls.append((prompts, keys_B))
        # As a Generator: -1 for rows that have ended, until the last one ends.
        rows = [self.texts.pop(0) for _ in prompts]
        for step in range(max(map(len, rows))):
            self.num_steps += 1
            yield np.array([row[step] if step < len(row) else -1 for row in rows])


OPTIONS = GenerationOptions(max_new_tokens=50, seed=5)


def assert_same_keys(actual, expected):
    np.testing.assert_array_equal(jax.random.key_data(actual), jax.random.key_data(expected))


def test_rows_are_followed_until_the_last_ends():
    generator = ScriptedGenerator("one|two", "a longer one| and more", "end")

    steps = list(
        stream_texts(
            generator, BYTES, [[1], [2], [3]], max_new_tokens=50, seeds=[4, 5, 6], stop=("|",)
        )
    )

    texts = ["".join(pieces) for pieces in zip(*steps)]
    assert texts == ["one", "a longer one", "end"]
    assert generator.num_steps == len("a longer one|")  # not to the end
    assert_same_keys(generator.calls[0][1], row_keys([4, 5, 6]))


def test_a_file_of_prompts_goes_in_batches():
    generator = ScriptedGenerator("1", "22", "333")
    out = io.StringIO()

    generate.continue_prompts(["a", "b", "c"], generator, BYTES, 2, OPTIONS, out)

    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert records == [
        dict(prompt="a", text="1"),
        dict(prompt="b", text="22"),
        dict(prompt="c", text="333"),
    ]
    (first_prompts, first_keys), (second_prompts, second_keys) = generator.calls
    assert len(first_prompts) == 2
    assert len(second_prompts) == 1
    # Every row has the same seed.
    assert_same_keys(first_keys, row_keys([5, 5]))
    assert_same_keys(second_keys, row_keys([5]))


def test_a_single_prompt_is_continued_as_plain_text():
    generator = ScriptedGenerator("one|two")
    out = io.StringIO()
    options = GenerationOptions(max_new_tokens=50, seed=5, stop=("|",))

    generate.continue_prompts(["a"], generator, BYTES, 2, options, out)

    assert out.getvalue() == "one\n"


def test_reading_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo words\r\na\u2028b\x0cc\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "other": 1}\n{"prompt": ""}\n')

    assert generate.read_prompts(tmp_path / "p.txt") == ["one", "two words", "a\u2028b\x0cc"]
    assert generate.read_prompts(tmp_path / "p.jsonl") == ["a\nb", ""]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", r"p\.jsonl:1"),
        (b'{"text": "a"}', r'p\.jsonl:1: wanted a JSON object with "prompt".* None'),
        (b'{"prompt": 1}', r'p\.jsonl:1: wanted a JSON object with "prompt".* 1'),
        (b'{"prompt": "\xe9"}', r"p\.jsonl is not UTF-8"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(line)

    with pytest.raises(ValueError, match=message):
        generate.read_prompts(tmp_path / "p.jsonl")


# --- conversations ---


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class ChatTokenizer(tokenizers.ByteTokenizer):
    """Bytes, with files of its own."""

    def __init__(self, **tokenizer_config):
        super().__init__()
        self.files = {"tokenizer_config.json": json.dumps(tokenizer_config).encode()}


def chat_tokenizer():
    return ChatTokenizer(chat_template=TEMPLATE, bos_token=dict(content="<s>"))


def test_each_turn_of_a_conversation_sees_all_before_it():
    generator = ScriptedGenerator("hello", "bye")
    out = io.StringIO()

    generate.converse(generator, chat_tokenizer(), OPTIONS, ["hi", "more"], out)

    assert out.getvalue() == "hello\nbye\n"
    prompts = [chat_tokenizer().spell(ids) for (ids,), _ in generator.calls]
    assert prompts == [
        "<s>[user]hi[assistant]",
        "<s>[user]hi[assistant]hello[user]more[assistant]",
    ]


def test_a_conversation_without_a_template_goes_on_as_one_text():
    generator = ScriptedGenerator("hello", "bye")

    generate.converse(generator, BYTES, OPTIONS, ["hi", "more"], io.StringIO())

    prompts = [BYTES.decode(ids) for (ids,), _ in generator.calls]
    assert prompts == ["hi", "hihellomore"]


def test_a_long_conversation_forgets_its_oldest_turns(caplog):
    generator = ScriptedGenerator("hello", "bye", "yes")
    generator.longest = 50
    lines = ["hi", "more" * 5, "x" * 60, "so?"]
    generate.converse(generator, chat_tokenizer(), OPTIONS, lines, io.StringIO(), system="S")

    prompts = [chat_tokenizer().spell(ids) for (ids,), _ in generator.calls]
    assert prompts == [
        "<s>[system]S[user]hi[assistant]",
        f"<s>[system]S[user]{'more' * 5}[assistant]",
        "<s>[system]S[user]so?[assistant]",
    ]
    assert "oldest turn is forgotten" in caplog.text
    assert "at most 50 fit" in caplog.text

    # One turn at a time: the next one is still there. None for a message that doesn't fit anyway.
    generator = ScriptedGenerator("1", "2", "3")
    generator.longest = 50
    lines = ["a", "b", "x" * 60, "c"]
    generate.converse(generator, chat_tokenizer(), OPTIONS, lines, io.StringIO(), system="S")
    last = chat_tokenizer().spell(generator.calls[-1][0][0])
    assert last == "<s>[system]S[user]b[assistant]2[user]c[assistant]"

    # Without a template: the end of the text, after BOS.
    generator = ScriptedGenerator("hello", "bye")
    generator.longest = 4
    generate.converse(generator, BYTES, OPTIONS, ["hi", "more"], io.StringIO())
    assert [ids for (ids,), _ in generator.calls] == [[256, *b"hi"], [256, *b"ore"]]
    with pytest.raises(ValueError, match="--system needs a chat template"):
        generate.converse(generator, BYTES, OPTIONS, [], io.StringIO(), system="S")


def test_several_samples_of_a_prompt():
    generator = ScriptedGenerator("1", "22", "333", "4")
    out = io.StringIO()
    options = GenerationOptions(max_new_tokens=50, seed=5, num_samples=2)
    generate.continue_prompts(["a", "b"], generator, BYTES, 3, options, out)

    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert records == [
        dict(prompt="a", sample=0, text="1"),
        dict(prompt="a", sample=1, text="22"),
        dict(prompt="b", sample=0, text="333"),
        dict(prompt="b", sample=1, text="4"),
    ]
    assert_same_keys(generator.calls[0][1], row_keys([5, 6, 5]))
    assert_same_keys(generator.calls[1][1], row_keys([6]))


def test_sampling_is_the_checkpoints_where_flags_say_nothing(tmp_path, caplog):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    nothing = dict.fromkeys(generate.DEFAULT_SAMPLING)

    def choose(given=nothing, **config):
        (folder / "generation_config.json").write_text(json.dumps(config))
        return generate.choose_sampling(epath.Path(tmp_path), given)

    assert choose() == Sampling(**generate.DEFAULT_SAMPLING)
    assert choose(temperature=0.6) == Sampling(temperature=0.8)  # not to be drawn with
    suggested = dict(do_sample=True, temperature=0.6, top_p=0.9, top_k=None)
    caplog.set_level("INFO")
    assert choose(**suggested) == Sampling(temperature=0.6, top_p=0.9)
    assert "from generation_config.json: {'temperature': 0.6, 'top_p': 0.9}" in caplog.text
    assert choose(nothing | dict(top_p=0.5), **suggested) == Sampling(temperature=0.6, top_p=0.5)
    choose(num_beams=4)
    assert "generation_config.json asks for --num_beams=4" in caplog.text
    for value in ("hot", True, -1):
        with pytest.raises(ValueError, match="temperature"):
            choose(do_sample=True, temperature=value)


def test_weights_that_are_no_numbers(run, tmp_path, monkeypatch):
    restore = checkpoint.SavedCheckpoint.restore_params

    def restore_broken(self, *args, **kwargs):
        params = restore(self, *args, **kwargs)
        params["norm"]["scale"] = params["norm"]["scale"].at[3].set(np.nan)
        return params

    monkeypatch.setattr(checkpoint.SavedCheckpoint, "restore_params", restore_broken)
    with pytest.raises(ValueError, match=r"not finite numbers, in \['norm/scale'\]"):
        generate.load(epath.Path(run), jax.devices()[:1], Sampling(temperature=0.0))


def test_where_templates_are_found():
    assert chat.template(BYTES) is None
    assert chat.template(chat_tokenizer()) == TEMPLATE

    named = [dict(name="tools", template="t"), dict(name="default", template="d")]
    tokenizer = ChatTokenizer(chat_template=named)
    assert chat.template(tokenizer) == "d"

    # A file of its own comes first.
    tokenizer.files["chat_template.jinja"] = b"j"
    assert chat.template(tokenizer) == "j"


USER = [dict(role="user", content="<é>")]


def test_templates_do_not_escape_characters():
    source = "{%- if true %}\n{{ messages[0] | tojson }}\n{% endif %}"

    rendered = chat.render(source, USER, tokens={})

    assert rendered == '{"role": "user", "content": "<é>"}\n'


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{", "the chat template fails"),
        ("{{ raise_exception('no system') }}", "the chat template fails: no system"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__'"),
    ],
)
def test_templates_that_fail(source, message):
    with pytest.raises(ValueError, match=message):
        chat.render(source, USER, tokens={})


# --- the command ---


_RUN = []


@pytest.fixture
def run(tiny, fast_runs, tmp_path_factory):
    """A run that these tests only read."""
    if not _RUN:
        with tiny.unlocked():
            tiny.optimizer.ema_decay = 0.5
            tiny.model.param_dtype = "float32"
        run = tmp_path_factory.mktemp("generate") / "run"
        run_training(tiny, run)
        _RUN.append(run)
    return _RUN[0]


@pytest.mark.slow
def test_the_command(run, tmp_path):
    """Greedy text of a run's average, alone and in a batch that is split over a mesh; and what is
    wrong with a command.
    """
    common = [f"--workdir={run}", "--max_new_tokens=12", "--temperature=0"]
    (tmp_path / "p.txt").write_text("ab cde\nre\n")
    wrong = [
        (["--prompt=a"], "wanted --workdir=RUN or --from=DIR, and one of"),
        (common, "and one of --prompt=TEXT"),
        ([*common, "--prompt=a", "--top_p=2"], "top_p = 2.0; wanted above 0, up to 1"),
        ([*common, "--prompt=a", "--seed=-1"], "error: --seed=-1; wanted 0 or above"),
        ([*common, "--prompt=" + "a" * 30], "prompt 0 has 31 tokens; wanted 1 to 20"),
        ([*common, "--prompt=a", "--mesh=tensor"], "--mesh=tensor; wanted AXIS=SIZE"),
        ([f"--from={run}", "--prompt=a"], "is not the directory of a Hugging Face checkpoint"),
        ([f"--workdir={tmp_path}/none", "--prompt=a"], "has no checkpoint that can be read"),
    ]
    commands = [
        [*common, "--prompt=ab cde"],
        [*common, f"--prompts={tmp_path}/p.txt", "--mesh=data=2,fsdp=2"],
        *(arguments for arguments, _ in wrong),
    ]
    alone, batch, *failed = run_commands("lm.generate", commands, tmp_path / "commands", devices=4)

    assert (alone[0], batch[0]) == (0, 0), (alone, batch)
    assert "step 6 of" in alone[2]
    # One JSON object a prompt, in order; a single prompt's text is as it is.
    first, second = [json.loads(line) for line in batch[1].splitlines()]
    assert first["prompt"] == "ab cde"
    assert second["prompt"] == "re"
    assert first["text"] + "\n" == alone[1]

    for (_, message), (status, _, log) in zip(wrong, failed, strict=True):
        assert status == 1
        assert message in log


def test_a_run_continues_with_its_average(run):
    generator, tokenizer = generate.load(
        epath.Path(run), jax.devices()[:1], Sampling(temperature=0.0)
    )

    assert tokenizer.fingerprint == BYTES.fingerprint
    # Greedy: the key doesn't matter.
    continuation = generator.generate([[256]], 5, row_keys([0]))
    assert continuation == generator.generate([[256]], 5, row_keys([1]))
