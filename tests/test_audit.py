"""--mode=audit: what is shown of the rows that a run would train on."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from lm import audit
from tests.helpers import with_conversations

RECORDS = [
    {"prompt": "Hi", "completion": "<b>Hello</b>\n"},
    {"prompt": "What is <|im_end|>?", "completion": "a token"},
] * 8


def run_audit(config, folder, num_rows=1):
    text = audit.audit(config.lock(), epath.Path(folder / "run"), jax.devices()[:1], num_rows)
    return text.split("\n")


def test_rows_are_shown_as_they_are_learnt(tiny, tmp_path):
    lines = run_audit(with_conversations(tiny, tmp_path, RECORDS[:1] * 8), tmp_path, num_rows=8)
    assert (tmp_path / "run" / "audit.txt").read_text() == "\n".join(lines)
    assert "segments that begin with BOS twice: 0" in lines
    # Each row has one conversation; what has weight is the answer and what ends the turn.
    titles = [line for line in lines if line.startswith("row ")]
    assert titles == [f"row {i}, segment 1: 36 tokens, 14 learnt targets" for i in range(8)]
    learnt = [line.split()[3] for line in lines if line.endswith("  1")][:14]
    assert "".join(eval(token) for token in learnt) == "<b>Hello</b>\n<|im_end|>"

    # A page says the same; the answer's markup is text in it.
    html = (tmp_path / "run" / "audit.html").read_text()
    assert "&lt;b&gt;Hello&lt;/b&gt;" in html and "<b>Hello" not in html
    assert titles[7] in html


def test_special_tokens_in_messages_are_text(tiny, tmp_path):
    lines = run_audit(with_conversations(tiny, tmp_path, RECORDS), tmp_path, num_rows=2)
    ends = [line for line in lines if line.split()[1:2] == ["'<|im_end|>'"]]
    starts = [line for line in lines if line.split()[1:2] == ["'<|im_start|>'"]]
    segments = [line for line in lines if line.startswith("row ")]
    assert len(ends) == len(starts) == 2 * len(segments)


def test_masked_tokens_are_shown_at_their_places(tiny, tmp_path):
    tiny.unlock()
    tiny.model.visible = "full"
    tiny.tokenizer.reserve = "mask"
    tiny.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.3))
    lines = run_audit(tiny, tmp_path, num_rows=8)
    learnt = [line.split("->") for line in lines if line.endswith("  1")]
    masked = [target for read, target in learnt if "'<mask>'" in read]
    assert 0.6 < len(masked) / len(learnt) < 0.95
    # Some stay as they are: each at its own place.
    assert any(read.split()[1] == target.split()[0] for read, target in learnt)


def test_texts_are_shown_too(tiny, tmp_path):
    lines = run_audit(tiny, tmp_path)
    assert any(line.startswith("learnt: ") and line.endswith("(100.0%)") for line in lines)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "writes no prompt"),
        ("{% generation %}{% endgeneration %}a{{ messages[0].content }}", "no example is left"),
    ],
)
def test_what_teaches_nothing_is_refused(tiny, tmp_path, template, message):
    config = with_conversations(tiny, tmp_path)
    (tmp_path / "template.jinja").write_text(template)
    config.chat.template = str(tmp_path / "template.jinja")
    with pytest.raises(ValueError, match=message):
        run_audit(config, tmp_path)


def test_a_batch_without_weight_is_refused(tiny, tmp_path, monkeypatch):
    batch = {name: np.zeros((2, 4), int) for name in ("tokens", "targets", "weights", "segments")}
    monkeypatch.setattr(audit, "_first_batch", lambda experiment: batch)
    with pytest.raises(ValueError, match="no target of the first batch has weight"):
        run_audit(tiny, tmp_path)
