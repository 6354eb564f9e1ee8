"""Text from checkpoints: what is shown when, where it ends, and the command from end to end."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from lm import generate, train
from lm.data import chat
from lm.data import tokenizer as tokenizers
from lm.decoding.sampling import Sampling
from lm.decoding.stop_strings import TextStream, stream

ROOT = Path(__file__).parent.parent
BYTES = tokenizers.ByteTokenizer()


def shown(text, prompt="p", stop=()):
    """What each byte of a text settles, and the whole."""
    made = TextStream(BYTES, BYTES.prompt(prompt), stop)
    pieces = [made.push(byte) for byte in text.encode()] + [made.close()]
    assert "".join(pieces) == made.text
    return pieces, made


def test_characters_are_shown_whole():
    pieces, made = shown("aé漢😀!", prompt="ü")
    assert (
        pieces == ["a", "", "é", "", "", "漢", "", "", "", "😀", "!", ""] and made.text == "aé漢😀!"
    )
    cut = TextStream(BYTES, BYTES.prompt("p"))
    assert [cut.push(byte) for byte in "é".encode()[:1]] + [cut.close()] == ["", "�"]


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
def test_stop_strings(text, stop, wanted):
    """That span tokens (here bytes): nothing of them is ever shown, and what only began as one is,
    in the end.
    """
    pieces, made = shown(text, stop=stop)
    assert made.text == wanted and made.ended == any(s in text for s in stop)
    assert pieces[-1] == "" or not made.ended


def test_an_empty_stop_string():
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(BYTES, [1], ("",))


class Scripted:
    """A generator that says given texts, byte by byte."""

    def __init__(self, *texts, end=257):
        self.texts, self.steps, self.asked = [list(text.encode()) + [end] for text in texts], 0, []

    def check(self, prompts, max_new_tokens):
        assert max_new_tokens == 50

    def stream(self, prompts, max_new_tokens, seeds):
        self.asked.append((prompts, seeds))
        rows = [self.texts.pop(0) for _ in prompts]
        for step in range(max(map(len, rows))):
            self.steps += 1
            yield np.array([row[step] if step < len(row) else -1 for row in rows])


def test_rows_are_followed_until_the_last_ends():
    scripted = Scripted("one|two", "a longer one| and more", "end")
    new = list(
        stream(scripted, BYTES, [[1], [2], [3]], max_new_tokens=50, seeds=[0] * 3, stop=("|",))
    )
    assert ["".join(row) for row in zip(*new)] == ["one", "a longer one", "end"]
    assert scripted.steps == len("a longer one|")  # not to the end


def test_a_file_of_prompts_goes_in_batches():
    scripted, out = Scripted("1", "22", "333"), io.StringIO()
    generate.run(
        ["a", "b", "c"], scripted, BYTES, 2, dict(max_new_tokens=50, seeds=[5], stop=()), out
    )
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        dict(prompt=p, text=t) for p, t in zip("abc", ("1", "22", "333"))
    ]
    assert [(len(prompts), seeds) for prompts, seeds in scripted.asked] == [(2, [5, 5]), (1, [5])]


def test_reading_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "other": 1}\n{"prompt": ""}\n')
    assert generate.read_prompts(tmp_path / "p.txt") == ["one", "two words"]
    assert generate.read_prompts(tmp_path / "p.jsonl") == ["a\nb", ""]
    for bad, message in (
        ("{", "wanted a JSON object"),
        ('{"text": "a"}', "KeyError: 'prompt'; wanted"),
        ('{"prompt": 1}', "a prompt is not a string"),
    ):
        (tmp_path / "p.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=message):
            generate.read_prompts(tmp_path / "p.jsonl")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}[assistant]{% endif %}"
)


class Chatty(tokenizers.ByteTokenizer):
    files = {
        "tokenizer_config.json": json.dumps(
            dict(chat_template=TEMPLATE, bos_token=dict(content="<s>"))
        ).encode()
    }


def test_conversation():
    """Each turn sees all before it, in the template; without one, the text goes on."""
    scripted, out = Scripted("hello", "bye"), io.StringIO()
    generate.converse(
        scripted, Chatty(), dict(max_new_tokens=50, seeds=[0], stop=()), iter(["hi", "more"]), out
    )
    assert out.getvalue() == "hello\nbye\n"
    assert [bytes(prompts[0]).decode() for prompts, _ in scripted.asked] == [
        "<s>[user]hi[assistant]",
        "<s>[user]hi[assistant]hello[user]more[assistant]",
    ]
    scripted = Scripted("hello", "bye")
    generate.converse(
        scripted,
        BYTES,
        dict(max_new_tokens=50, seeds=[0], stop=()),
        iter(["hi", "more"]),
        io.StringIO(),
    )
    assert [BYTES.decode(prompts[0]) for prompts, _ in scripted.asked] == ["hi", "hihellomore"]


def test_templates():
    assert chat.template(BYTES) is None and chat.template(Chatty()) == TEMPLATE
    named = [dict(name="tools", template="t"), dict(name="default", template="d")]
    several = type(
        "",
        (),
        dict(files={"tokenizer_config.json": json.dumps(dict(chat_template=named)).encode()}),
    )()
    assert chat.template(several) == "d"
    several.files["chat_template.jinja"] = b"j"
    assert chat.template(several) == "j"
    user = [dict(role="user", content="<é>")]
    assert (
        chat.render("{%- if true %}\n{{ messages[0] | tojson }}\n{% endif %}", user, tokens={})
        == '{"role": "user", "content": "<é>"}\n'
    )
    for bad, message in (
        ("{{", "the chat template fails"),
        ("{{ raise_exception('no system') }}", "the chat template fails: no system"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__'"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.render(bad, user, tokens={})


@pytest.fixture
def run(tiny, tmp_path):
    with tiny.unlocked():
        tiny.optimizer.ema_decay = 0.5
        tiny.model.param_dtype = "float32"
    train.train(tiny, epath.Path(tmp_path / "run"), jax.devices()[:1])
    return tmp_path / "run"


def test_the_command(run, tmp_path):
    """Greedy text of a run's average, alone, in a batch, and split over a mesh; and what is wrong
    with a command.
    """
    options = dict(cwd=ROOT, capture_output=True, text=True)
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4")

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "lm.generate", *arguments], env=environment, **options
        )
        return done.stdout, done.stderr

    common = f"--workdir={run}", "--max_new_tokens=12", "--temperature=0"
    alone, errors = command(*common, "--prompt=ab cde")
    assert "step 6 of" in errors
    (tmp_path / "p.txt").write_text("ab cde\nre\n")
    lines = [
        json.loads(line)
        for line in command(*common, f"--prompts={tmp_path}/p.txt", "--mesh=data=2,fsdp=2")[
            0
        ].splitlines()
    ]
    assert [line["prompt"] for line in lines] == ["ab cde", "re"] and lines[0][
        "text"
    ] + "\n" == alone
    for arguments, message in (
        (("--prompt=a",), "wanted --workdir=RUN or --from=DIR, and one of"),
        (common, "and one of --prompt=TEXT"),
        ((*common, "--prompt=a", "--top_p=2"), "top_p = 2.0; wanted above 0, up to 1"),
        ((*common, "--prompt=" + "a" * 30), "prompt 0 has 31 tokens; wanted 1 to 20"),
        ((*common, "--prompt=a", "--mesh=tensor"), "--mesh=tensor; wanted AXIS=SIZE"),
        ((f"--from={run}", "--prompt=a"), "is not the directory of a Hugging Face checkpoint"),
        ((f"--workdir={tmp_path}/none", "--prompt=a"), "has no checkpoint that can be read"),
    ):
        assert message in command(*arguments)[1]


def test_a_run_continues_with_its_average(run):
    generator, tokenizer = generate.load(
        epath.Path(run), jax.devices()[:1], Sampling(temperature=0.0)
    )
    assert tokenizer.fingerprint == BYTES.fingerprint and generator.generate(
        [[256]], 5, [0]
    ) == generator.generate([[256]], 5, [1])
