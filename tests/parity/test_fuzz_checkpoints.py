"""A few of the cases of tests/parity/fuzz_checkpoints.py, the same ones each time."""

import pytest

from lm.hf import families
from tests.parity import fuzz_checkpoints

FAST = [(family, 2) for family in ("gpt2", "gpt_neox", "llama", "qwen2", "phi3")]
SLOW = [pytest.param(family, 30, marks=pytest.mark.slow) for family in families.FAMILIES]


@pytest.mark.parametrize("family, num_cases", FAST + SLOW)
def test_no_configuration_is_read_otherwise_than_transformers_does(family, num_cases):
    cases = list(fuzz_checkpoints.fuzz(family, num_cases, seed=1))

    assert len(cases) == num_cases
    assert not [case for case in cases if case.ending == "wrong"]
