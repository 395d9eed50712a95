"""Tests marked `toolchain("NAME")` call a converter in its own environment; where that is not made they are left out by name,
so that the closing line counts them as deselected and never as passed. `make test-toolchains` makes the environments first."""

from __future__ import annotations

import pytest

from appliance.compiler import toolchain


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ready = {name: toolchain.state(name).ready for name in toolchain.TOOLCHAINS}
    absent = [i for i in items for mark in i.iter_markers("toolchain") if not all(ready[name] for name in mark.args)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [i for i in items if i not in absent]
