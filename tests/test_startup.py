"""The start-up that commands share: the compilation cache, and imports that wait until needed."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lm import startup
from tests.helpers import CONFIG_FILE, NO_CURVES, ROOT, assert_same_run

X86 = """processor\t: {number}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
cpu MHz\t\t: {mhz}
flags\t\t: {flags}

"""
ARM = "processor\t: 0\nFeatures\t: fp asimd {flags}\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.fixture
def cache_of(tmp_path, monkeypatch):
    """A function: /proc/cpuinfo -> the compilation cache of a CPU that says so."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))

    def cache(info):
        path = tmp_path / "cpuinfo"
        path.write_text(info)
        monkeypatch.setattr(startup, "CPU_INFO", path)
        return startup.compilation_cache("cpu")

    return cache


def test_each_kind_of_cpu_has_a_compilation_cache_of_its_own(cache_of, tmp_path, monkeypatch):
    one = cache_of(X86.format(number=0, mhz=2000, flags="sse avx512f"))
    assert one.startswith(f"{tmp_path}/cache/cpu-")
    # What changes by itself, and cores that are alike, make no difference.
    two_cores = X86.format(number=0, mhz=2100, flags="avx512f sse") * 2
    assert cache_of(two_cores) == one

    others = [
        X86.format(number=0, mhz=2000, flags="sse"),
        X86.format(number=0, mhz=2000, flags="sse avx512f").replace("85", "86"),
        ARM.format(flags="sve"),
        ARM.format(flags=""),
    ]
    assert len({one, *map(cache_of, others)}) == 5

    # Programs of another XLA are others, and where nothing is known of the CPU none are kept.
    monkeypatch.setattr(startup.importlib.metadata, "version", lambda package: "99")
    assert cache_of(two_cores) != one
    assert cache_of("processor\t: 0\n") is None
    monkeypatch.setattr(startup, "CPU_INFO", tmp_path / "none")
    assert startup.compilation_cache("cpu") is None
    assert startup.compilation_cache("tpu") == f"{tmp_path}/cache"


def test_a_program_of_another_cpu_is_not_read(cache_of):
    events = []

    def compiled(info):
        """What jax says of its cache when it compiles a program on this CPU."""
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", cache_of(info))
        x = jnp.ones(3)
        events.clear()
        jax.jit(lambda x: x * 7)(x)
        return [event.rpartition("/")[2] for event in events if "cache_" in event]

    old_folder = jax.config.jax_compilation_cache_dir
    jax.monitoring.register_event_listener(lambda event, **unused: events.append(event))
    try:
        one = X86.format(number=0, mhz=2000, flags="sse avx512f")
        assert compiled(one) == ["cache_misses"]
        assert compiled(one) == ["cache_hits"]
        assert compiled(one.replace(" avx512f", "")) == ["cache_misses"]
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", old_folder)


@pytest.mark.slow
def test_a_run_is_the_same_with_programs_from_the_cache(small, tmp_path):
    """As everywhere but in tests: optimized, on one device."""
    config_file = tmp_path / "config.py"
    config_file.write_text(NO_CURVES + CONFIG_FILE.format(text=json.dumps(small.to_dict())))
    env = os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name in ("cold", "warm"):
        command = [sys.executable, "-m", "lm.main", f"--config={config_file}"]
        done = subprocess.run(
            [*command, f"--workdir={tmp_path / name}"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        from_cache = done.stderr.split("the compilation cache had ")[1].splitlines()[0]
        assert (int(from_cache) > 3) == (name == "warm")

    # The first one compiled each program itself.
    assert_same_run(tmp_path / "warm", tmp_path / "cold", 6)


def test_help_needs_neither_jax_nor_what_trains():
    """Seconds of imports, before a word is said."""
    program = (
        "import sys; from lm import main\nprint(*{module.split('.')[0] for module in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"jax", "flax", "orbax", "grain", "scipy", "matplotlib", "sentencepiece", "torch"}
    assert not heavy & set(done.stdout.split())
