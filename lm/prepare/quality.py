"""Stage quality."""

from ml_collections import ConfigDict

from lm.prepare.engine import Stage


def stages(config: ConfigDict) -> list[Stage]:
    raise NotImplementedError
