"""Makes a training corpus of raw text: collects, cleans, removes duplicates and what evals ask,
splits, tokenizes, and says what is in it.

    python -m lm.prepare --config=configs/prepare/text.py:FOLDER --out=corpora/mine

docs/corpora.md goes from a folder of files to a trained model.
"""

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from lm import claim, command_line, files
from lm.prepare.pipeline import prepare

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with its path after a colon.", lock_config=True
)
_OUT = flags.DEFINE_string("out", "", "Folder of the set and of the stages' files; gs:// too.")
_BEAM = flags.DEFINE_multi_string(
    "beam", [], "An argument for Apache Beam, such as --beam=--runner=DataflowRunner; repeated."
)


@command_line.command
def main(argv: list[str]) -> int:
    command_line.no_arguments(argv)
    if not _OUT.value:
        raise ValueError("--out is missing: the folder that the corpus goes into")
    out = epath.Path(files.absolute(_OUT.value))
    with claim.Claim(out):
        folder = prepare(_CONFIG.value, out, _BEAM.value)
    card = files.read_json(folder / "card.json")
    for split, about in card["splits"].items():
        tokens_ = f", {about['tokens']:,} tokens" if "tokens" in about else ""
        print(f"{split}: {about['documents']:,} documents, {about['bytes']:,} bytes{tokens_}")

    page = folder / "card.html"
    print(f"{folder}\n{page if page.exists() else folder / 'card.json'}")
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
