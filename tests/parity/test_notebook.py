"""experiments/checkpoints.ipynb where transformers is installed: it loads what lm wrote."""

from tests import notebooks


def test_transformers_continues_a_text_as_lm_does(tmp_path):
    notebook = notebooks.execute("checkpoints.ipynb", tmp_path)
    notebooks.check_checkpoints(notebook)
    printed = notebooks.printed(notebook, "transformers")
    by_lm, by_transformers = printed.split("transformers:\n")
    continuation = by_transformers.removeprefix("Return the ")
    assert by_transformers != continuation and len(continuation) >= 32
    assert by_lm.endswith(continuation)
