"""No test touches the keys of whoever runs it: the settings folder is a scratch folder, the same for the whole run.

Tests marked `toolchain("NAME")` call a converter in its own environment; where that is not made they are left out, so that the
closing line counts them as deselected and never as passed. `make test-toolchains` makes the environments first. Tests marked
`training` need torch, which only the training environment has; they are left out likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from appliance.compiler import toolchain


@pytest.fixture(scope="session", autouse=True)
def _settings_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ready = {name: toolchain.state(name).ready for name in toolchain.TOOLCHAINS}
    torch = find_spec("torch") is not None
    absent = [
        i
        for i in items
        if not all(ready[name] for mark in i.iter_markers("toolchain") for name in mark.args)
        or (i.get_closest_marker("training") is not None and not torch)
    ]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [i for i in items if i not in absent]
