from collections.abc import Iterator

import pytest


@pytest.fixture
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers on the CPU take the kernels, in the interpreter; they may fail where a test has planned it."""
    from quantizers.kernels.switch import KERNELS  # after tests/conftest.py has said how Triton is to be imported

    monkeypatch.setattr(KERNELS, "device_types", ("cpu",))
    monkeypatch.setattr(KERNELS, "failure", None)
    yield
    assert KERNELS.failure is None or "planned" in KERNELS.failure
