"""A small crawl with planted problems, prepared: what was planted is found, and nothing else."""

import json

import pytest
from etils import epath

from experiments.corpora import crawl
from lm.prepare import pipeline

SMALL = dict(mb=2, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A crawl."""
    folder = tmp_path_factory.mktemp("planted") / "crawl"
    crawl.make(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def ledger(folder):
    return json.loads((folder / "ledger.json").read_text())


def prepare(config, out):
    """Prepares it in this process, in several shards."""
    config.workers = 1
    config.shard_mb = 1
    return pipeline.prepare(config, epath.Path(out))


@pytest.fixture(scope="module")
def corpus(folder):
    made = prepare(crawl.get_config(str(folder)), folder.parent / "out")
    return crawl.Corpus(made, folder)


def wrong(rows, but=()):
    """The rows in which something is not right."""
    return [row for row in rows if row.right != row.planted and not row.kind.startswith(but)]


def row_of(rows, kind):
    [row] = [row for row in rows if row.kind == kind]
    return row


def test_a_seed_decides_the_crawl(folder, tmp_path):
    crawl.make(tmp_path / "again", **SMALL)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) > 30
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_the_planted_similarities_are_what_they_should_be(ledger):
    for entry in ledger["near"]:
        if entry["kind"].startswith("pairs at"):
            assert entry["jaccard"] == pytest.approx(float(entry["kind"].split()[-1]), abs=0.03)
        else:
            assert entry["jaccard"] == 1


def test_copies_go_and_the_first_one_stays(corpus, ledger):
    rows = crawl.check_exact(corpus, ledger)
    assert not wrong(rows)
    copies = sum(row.planted for row in rows if row.kind.startswith("copies go"))
    assert corpus.count("dropped.exact_duplicate") == copies >= 15


def test_near_duplicates_go_and_what_is_less_similar_stays(corpus, ledger):
    rows = crawl.check_near(corpus, ledger)
    # Bands overlook 1% of pairs at 0.85, and more of those at the threshold.
    assert not wrong(rows, but=("pairs at 0.85", "groups of 26 at 0.81"))
    assert row_of(rows, "pairs at 0.9: the second one goes").planted >= 30
    assert row_of(rows, "pairs at 0.5: the second one stays").planted >= 30
    assert row_of(rows, "unrelated texts stay").planted >= 100


def test_documents_with_items_of_evals_go_and_the_card_has_them(corpus, ledger):
    rows = crawl.check_evals(corpus, ledger)
    assert not wrong(rows)
    tasks = {row.kind.partition(":")[0] for row in rows}
    assert tasks >= {"films", "plans", "reading", "quotes"}
    assert corpus.count("dropped.contaminated") == len(ledger["evals"])


def test_what_is_listed_of_an_item_shows_it(corpus, ledger):
    whys = [entry["why"] for entry in corpus.card["listed"] if entry["kind"] == "contaminated"]
    planted = [entry for entry in ledger["evals"] if entry["form"] == "13 words"]
    assert len(planted) > 5
    for entry in planted:
        assert any(entry["shown"].rstrip(".,?") in why for why in whys)


def test_personal_data_is_masked_and_what_looks_like_it_stays(corpus, ledger):
    rows = crawl.check_pii(corpus, ledger)
    assert not wrong(rows)
    assert len(rows) > 70
    assert all(corpus.count(f"pii.{kind}") > 20 for kind in ("email", "ip", "phone"))


def test_texts_in_all_encodings_are_right_and_counted(corpus, ledger):
    rows = crawl.check_encodings(corpus, ledger)
    assert not wrong(rows)
    assert {f"files in {encoding}" for encoding in crawl.ENCODINGS} <= {row.kind for row in rows}
    # Accents that are spoilt by planting copies are mended too.
    assert corpus.count("repaired.mojibake") >= len(ledger["mojibake"])


def test_pages_are_whole_and_the_lines_that_they_share_are_there_once(corpus, ledger):
    assert not wrong(crawl.check_pages(corpus, ledger))


def test_the_rules_of_c4_take_notices_from_all_pages(folder, ledger):
    config = crawl.get_config(str(folder))
    config.sources = {"pages": config.sources.pages}
    config.stages = ("collect", "clean", "write")
    config.c4.on = True
    corpus = crawl.Corpus(prepare(config, folder.parent / "c4"), folder)
    pages = len(ledger["pages"])

    assert len(corpus.texts) == pages
    assert not [text for text in corpus.texts.values() if "cookies" in text or "Copyright" in text]
    assert corpus.count("lines.c4.policy") == pages
    # Headings have none either.
    assert corpus.count("lines.c4.no_end_mark") >= 2 * pages
