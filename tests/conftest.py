"""What all tests share: tiny models on disk, built once a session, and a home of their own.

Heavy imports stay inside the fixtures: tests of plain numbers and files should start at once.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Read when huggingface_hub is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in Triton's interpreter, on the CPU, unless `-m gpu` asks for the card; no example has a deadline.

    Triton reads the variable when it is first imported (transformers does so), also in the workers of pytest-xdist.
    """
    import hypothesis

    hypothesis.settings.register_profile("bitsmith", deadline=None)  # the first one may compile a loop
    hypothesis.settings.load_profile("bitsmith")
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, or one process would still be at it when the others are done."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's ~/.bitsmith."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITSMITH_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    from tests.models import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A Llama: 2 layers, hidden 64, intermediate 96, tied embeddings, bf16. Shared: never write into it."""
    from tests.models import build_llama, save_model

    return save_model(build_llama(), tmp_path_factory.mktemp("llama"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def odd_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A Llama whose sizes divide by no block size: hidden 60, intermediate 100. Never write into it."""
    from tests.models import build_llama, save_model

    model = build_llama(hidden_size=60, intermediate_size=100)
    return save_model(model, tmp_path_factory.mktemp("odd"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A GPT-2 with `Conv1D` layers, tied embeddings, bfloat16. Never write into it."""
    from tests.models import build_gpt2, save_model

    return save_model(build_gpt2(), tmp_path_factory.mktemp("gpt2"), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """See `be_quick`. The real things are in test_audit.py, test_cli.py and test_report.py."""
    from tests.pipeline.small import be_quick

    with pytest.MonkeyPatch.context() as patch:
        be_quick(patch.setattr)
        yield


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[str]:
    from tests import postgresql

    if postgresql.programs() is None:
        pytest.skip(postgresql.MISSING)
    with postgresql.server() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    """What registry.toml says of it; None is SQLite in the registry's folder."""
    if request.param == "sqlite":
        return None
    from tests import postgresql

    return postgresql.new_database(request.getfixturevalue("postgresql_socket"))
