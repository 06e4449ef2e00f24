"""Flags: their parsers, and the `EngineConfig` that they make."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_cli.options import (
    ENGINE_FLAGS,
    engine_options,
    format_size,
    name_the_flag,
    parse_size,
    sampling_params,
)
from kvq_core.config import SERVING, EngineConfig
from kvq_core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("8G", 8 << 30),
        (" 8 GiB ", 8 << 30),
        ("512MiB", 512 << 20),
        ("16GB", 16 * 10**9),
        ("1.5KiB", 1536),
        (".5k", 512),
        ("1TiB", 1 << 40),
        ("123", 123),
        ("123B", 123),
        (456, 456),
    ],
)
def test_size_is_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "8XB", "8 G i B", "-8GiB", "1e9", "8,5GiB", "nan", "inf", "0", "0GiB", "0.1B", "8GiBs"],
)
def test_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    assert repr(text)[1:-1] in error.value.message
    assert "MiB" in error.value.hint


@given(st.integers(1, 10**15))
def test_size_in_bytes_is_exact(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}B") == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1 << 30, "1.00 GiB"), (3 << 39, "1.50 TiB")]
)
def test_size_is_shown(size: int, text: str) -> None:
    assert format_size(size) == text


def test_every_engine_flag_is_a_field_with_the_fields_default() -> None:
    @engine_options()
    def command(name: str, *, config: EngineConfig) -> None: ...

    defaults = EngineConfig()
    parameters = inspect.signature(command).parameters
    assert "config" not in parameters
    for flag in ENGINE_FLAGS:
        expected = getattr(defaults, flag)
        assert parameters[flag].default == (str(expected) if flag == "policy" else expected)


def test_a_command_may_have_defaults_of_its_own() -> None:
    seen = []

    @engine_options(defaults=SERVING)
    def command(*, config: EngineConfig) -> None:
        seen.append(config)

    parameters = inspect.signature(command).parameters
    command(**{name: parameter.default for name, parameter in parameters.items()})
    assert seen == [EngineConfig(policy="0", prefix_caching=True)]


def test_engine_options_make_one_config() -> None:
    seen = []

    @engine_options(without=("policy",))
    def command(name: str, *, config: EngineConfig) -> None:
        seen.append((name, config))

    assert "policy" not in inspect.signature(command).parameters
    flags = {name: getattr(EngineConfig(), name) for name in ENGINE_FLAGS if name != "policy"}
    command(name="x", **flags | {"sink": 4, "page_size": 32})
    assert seen == [("x", EngineConfig(sink=4, page_size=32))]


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            UsageError("page_size must be even"),
            "--page-size must be even",
            "`kvq run --help` shows every option",
        ),
        (UsageError("top_p must lie", "so"), "--top-p must lie", "so"),
        (UsageError("the prompt is empty", "so"), "the prompt is empty", "so"),
        (UsageError("max_num_batched_tokens 3", "so"), "max_num_batched_tokens 3", "so"),
    ],
)
def test_complaints_name_the_flag(error: UsageError, message: str, hint: str) -> None:
    named = name_the_flag(error, "kvq run")
    assert (named.message, named.hint) == (message, hint)


def test_stop_texts_become_a_tuple() -> None:
    assert sampling_params(stop=None).stop == ()
    assert sampling_params(stop=["a", "b"], top_k=3).stop == ("a", "b")
