"""The search: what it tries is valid, what it returns is never slower than what it was given, and
what it knows it doesn't compile again.
"""

import math

import pytest

from lm import config as config_lib
from lm.models import presets
from lm.plan import search

CHIPS = 16
LIMIT_GIB = 9.0


@pytest.fixture
def base_config():
    c = config_lib.default()
    c.model.update(presets.get("llama3_1b") | dict(remat="attention", context_length=8192))
    c.data.update(dict(batch_size=64, length=2048))
    c.objective.chunk = 512
    c.train.fsdp = "by_hand"
    c.mesh.update(dict(fsdp=-1))
    return c.lock()


def simulate(config):
    """The report of a machine that likes square meshes, chunks of 1,024, one microbatch, joint
    gathers and many saved results, and has `LIMIT_GIB`.
    """
    settings = search.settings_of(config, CHIPS)
    weight_shards = settings["mesh.fsdp"] * settings["mesh.fsdp2"]
    state_gib = 12 / weight_shards
    memory_gib = state_gib + search.activation_bytes(config, settings, CHIPS).gib + 1
    if memory_gib > LIMIT_GIB:
        raise MemoryError(f"{memory_gib:.1f} GiB")

    ms = (
        500
        + 40 * abs(math.log2(settings["mesh.fsdp"] / settings["mesh.fsdp2"]))
        + 30 * abs(math.log2(settings["objective.chunk"] / 1024))
        + 20 * settings["train.accumulation"]
        + 10 * (settings["train.fsdp_gather"] == "staged")
        - 20 * len(settings["model.remat"].split(","))
        + 300 * (settings["mesh.data"] > 1)
    )
    return {
        "train": {
            "step_ms": {"calibrated": ms},
            "mfu": {"calibrated": 200 / ms},
            "memory_gib": memory_gib,
            "arguments_gib": state_gib,
        }
    }


def test_it_finds_the_best_and_is_never_slower(base_config):
    progress = []
    trials = search.search(
        base_config, CHIPS, LIMIT_GIB, simulate, minutes=1.0, progress=progress.append
    )
    base = search.settings_of(base_config, CHIPS)
    assert base["mesh.fsdp"] == 16
    assert any(trial.settings == base for trial in trials)
    seconds = [trial.seconds for trial in trials]
    assert seconds == sorted(seconds)

    fastest = trials[0]
    assert fastest.settings["mesh.fsdp"] == 4
    assert fastest.settings["mesh.fsdp2"] == 4
    assert fastest.settings["objective.chunk"] == 1024
    assert fastest.settings["train.fsdp_gather"] == "joint"
    assert len(fastest.settings["model.remat"].split(",")) >= 6
    assert fastest.report["train"]["memory_gib"] <= LIMIT_GIB
    base_ms = simulate(base_config)["train"]["step_ms"]["calibrated"]
    assert fastest.seconds < 0.8 * base_ms / 1e3

    assert len(progress) > 5
    assert "as given" in progress[0]


def test_settings_can_be_applied_and_shown(base_config):
    trials = search.search(base_config, CHIPS, LIMIT_GIB, simulate, minutes=1.0)
    fastest = trials[0].settings
    base = search.settings_of(base_config, CHIPS)

    changed = search.apply(base_config, fastest)
    assert search.settings_of(changed, CHIPS) == fastest
    assert changed.is_locked
    assert base_config.mesh.fsdp == -1

    flags = search.overrides(fastest, base)
    assert "--config.mesh.fsdp=4" in flags
    assert all(flag.startswith("--config.") for flag in flags)
    assert search.overrides(base, base) == []

    lines = search.ranking(trials, base).splitlines()
    assert len(lines) == len(trials) + 1
    assert sum("(as given)" in line for line in lines) == 1
    assert "objective.chunk=1024" in lines[1]


def test_where_nothing_is_faster_the_given_one_wins(base_config):
    def evaluate(config):
        report = simulate(config)
        report["train"]["step_ms"]["calibrated"] = 500.0
        return report

    trials = search.search(base_config, CHIPS, LIMIT_GIB, evaluate, minutes=1.0)
    assert trials[0].settings == search.settings_of(base_config, CHIPS)
    assert len(trials) > 5


def test_it_ends_in_time(base_config, monkeypatch):
    now = 0.0
    monkeypatch.setattr(search.time, "monotonic", lambda: now)

    def take_a_minute(config):
        nonlocal now
        now += 60.0
        return simulate(config)

    progress = []
    trials = search.search(
        base_config, CHIPS, LIMIT_GIB, take_a_minute, minutes=5.0, progress=progress.append
    )
    assert now <= 300
    assert sum(trial.report is not None for trial in trials) <= 5
    assert "minutes" in progress[-1]


def search_with_limit(config, limit_gib):
    """Searches with the memory model told of `limit_gib`.

    Returns:
      (how many candidates were compiled and did not fit, the failures of the trials).
    """
    too_big = []

    def evaluate(candidate):
        try:
            return simulate(candidate)
        except MemoryError:
            too_big.append(candidate)
            raise

    trials = search.search(config, CHIPS, limit_gib, evaluate, minutes=1.0)
    return len(too_big), [trial.failure for trial in trials if trial.report is None]


def test_what_cannot_fit_is_not_compiled(base_config):
    """The memory model is exact on this machine: with its limit nothing too big is compiled."""
    num_too_big, failures = search_with_limit(base_config, LIMIT_GIB)
    assert num_too_big == 0
    assert any(failure.startswith("not compiled: about") for failure in failures)

    # With a limit that is far off the compiler has to say so.
    num_too_big, failures = search_with_limit(base_config, 1000.0)
    assert num_too_big > 0
    compiled = [failure for failure in failures if "not compiled" not in failure]
    assert any(failure.endswith("GiB") for failure in compiled)


@pytest.mark.parametrize("remat", search.REMATS)
def test_neighbours_are_valid(base_config, remat):
    settings = search.settings_of(base_config, CHIPS)
    settings |= {"model.remat": remat, "mesh.fsdp": 4, "mesh.fsdp2": 4}
    changes = search.neighbours(base_config, settings, CHIPS)
    neighbours = [settings | change for change in changes]

    assert len(neighbours) > 8
    saved = set()
    for neighbour in neighbours:
        assert neighbour != settings
        mesh_size = neighbour["mesh.data"] * neighbour["mesh.fsdp"] * neighbour["mesh.fsdp2"]
        assert mesh_size == CHIPS
        assert 2048 % neighbour["objective.chunk"] == 0
        assert (64 // CHIPS) % neighbour["train.accumulation"] == 0
        if neighbour["train.accumulation"] == 1:
            saved.add(search.activation_bytes(base_config, neighbour, CHIPS).saved)

    # There are ways to save more and to save less, but at the ends of the list.
    now = search.activation_bytes(base_config, settings, CHIPS).saved
    assert min(saved) <= now <= max(saved)
    assert len(saved) >= 2


def test_results_are_cached_for_the_same_configuration_only(base_config, tmp_path):
    calls = []

    def evaluate(config):
        calls.append(config.to_dict())
        return simulate(config)

    first = search.cached(evaluate, tmp_path, "v5e:4x4", "1")
    again = search.cached(evaluate, tmp_path, "v5e:4x4", "1")
    assert first(base_config) == again(base_config) == simulate(base_config)
    assert len(calls) == 1

    # Another topology, and another configuration, which fails.
    search.cached(evaluate, tmp_path, "v5e:4x8", "1")(base_config)
    replicated = search.apply(base_config, {"mesh.fsdp": 1, "mesh.data": 16})
    for _ in range(2):
        with pytest.raises(MemoryError, match="GiB"):
            first(replicated)
    assert len(calls) == 3


def test_failures_are_cached_too(base_config, tmp_path):
    calls = []

    def fail(config):
        calls.append(config)
        raise ValueError("the compiler fails")

    for _ in range(2):
        with pytest.raises(ValueError, match="the compiler fails"):
            search.cached(fail, tmp_path, "v5e:8x8")(base_config)
    assert len(calls) == 1


@pytest.fixture
def too_big(base_config):
    return search.apply(base_config, {"model.remat": "query,key,value,attention,out,up,gate"})


def test_the_nearest_change_that_fits(too_big):
    with pytest.raises(MemoryError) as error:
        simulate(too_big)
    needed_gib = float(str(error.value).split()[0])

    trial = search.nearest_that_fits(
        too_big, CHIPS, simulate, needed_gib=needed_gib, limit_gib=LIMIT_GIB
    )
    base = search.settings_of(too_big, CHIPS)
    changed = [knob for knob, value in trial.settings.items() if value != base[knob]]
    assert len(changed) == 1
    assert trial.report["train"]["memory_gib"] <= LIMIT_GIB


def test_there_may_be_no_change_that_fits(too_big):
    def never(config):
        raise MemoryError

    trial = search.nearest_that_fits(too_big, CHIPS, never, needed_gib=11.0, limit_gib=LIMIT_GIB)
    assert trial is None
