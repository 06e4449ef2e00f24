"""`kvq policies`: sizes, capacity, and from which length on a window leaves something to be saved."""

import json

import pytest

from kvq_core.policies import CODEC_NAMES, REGISTRY


def rows(cli, *args: str) -> dict[str, dict]:
    result = cli("policies", *args, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    return {row["policy"]: row for row in json.loads(result.out)["policies"]}


def test_everything_is_listed(cli) -> None:
    result = cli("policies")
    assert result.code == 0
    for name in (*CODEC_NAMES, *(policy.name for policy in REGISTRY)):
        assert name in result.out
    document = json.loads(cli("policies", "--json").out)
    assert [row["policy"] for row in document["policies"]] == [policy.label for policy in REGISTRY]
    assert [row["codec"] for row in document["codecs"]] == list(CODEC_NAMES)


@pytest.mark.parametrize(
    ("policy", "size", "ratio"),
    [("none", 512, 1.0), ("fp8", 260, 1.97), ("int8", 264, 1.94), ("int4", 136, 3.76), ("turbo", 102, 5.02)],
)
def test_bytes_at_head_dim_128(policy: str, size: int, ratio: float, cli) -> None:
    row = rows(cli)[policy]
    assert row["bytes_per_token_and_head"] == size
    assert row["bits_per_element"] == 8 * size / 256
    assert row["ratio"] == pytest.approx(ratio, abs=0.01)


def test_chosen_policies_and_pairs(cli) -> None:
    found = rows(cli, "42", "int8:lm4")
    assert list(found) == ["turbo", "int8:lm4"]
    assert found["int8:lm4"]["bytes_per_token_and_head"] == 132 + 66


def test_head_dim_that_a_codec_cannot_take(cli) -> None:
    found = rows(cli, "0", "8", "42", "--head-dim", "176")
    assert found["int8"]["bytes_per_token_and_head"] == 2 * (176 + 4)
    assert "Hadamard matrix" in found["turbo"]["problem"]
    table = cli("policies", "42", "--head-dim", "176")
    assert table.code == 0
    assert "Hadamard matrix" in table.out


@pytest.mark.parametrize("head_dim", [80, 96])
def test_head_dim_that_is_no_power_of_two(head_dim: int, cli) -> None:
    """2 numbers for the keys, 1 for the values, as at any other head dim."""
    found = rows(cli, "42", "--head-dim", str(head_dim))
    assert found["turbo"]["bytes_per_token_and_head"] == head_dim // 2 + head_dim // 4 + 6


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("policy", ["4", "8", "16", "42", "int8:lm2"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 0), (4, 128), (7, 61)])
def test_a_window_saves_from(policy: str, head_dim: int, sink: int, recent: int, cli) -> None:
    args = (policy, "--head-dim", str(head_dim), "--sink", str(sink), "--recent", str(recent))
    (row,) = rows(cli, *args).values()
    full = 4 * head_dim

    def saved(tokens: int) -> int:
        return tokens * full - (tokens * row["bytes_per_token_and_head"] + (sink + recent) * full)

    assert saved(row["saves_from_tokens"]) > 0 >= saved(row["saves_from_tokens"] - 1)


def test_names_that_others_use_and_a_policy_with_a_window_of_its_own(cli) -> None:
    found = rows(cli, "k8v4", "k4v4", "42-window")
    assert list(found) == ["k8v4", "k4v4", "42-window+s4r128"]
    assert [(row["key"], row["value"]) for row in found.values()][:2] == [("int8", "int4"), ("int4", "int4")]
    kept = found["42-window+s4r128"]
    assert (kept["sink"], kept["recent"], kept["saves_from_tokens"]) == (4, 128, 132 * 512 // 410 + 1)
    assert "saves from" in cli("policies", "42-window").out
    assert list(rows(cli, "42-window", "--recent", "32")) == ["42-window+s4r32"], "the flag decides"


def test_a_label_names_its_policy(cli) -> None:
    (row,) = rows(cli, "42+s3r7").values()
    assert (row["policy"], row["key"], row["sink"], row["recent"]) == ("turbo+s3r7", "turbo", 3, 7)
    (row,) = rows(cli, "42+s3r7", "--sink", "0").values()
    assert (row["sink"], row["recent"]) == (0, 7)
    assert cli("policies", "42+s3").code == 1


def test_a_window_that_does_not_fit_stands_in_nobodys_way(cli) -> None:
    args = ("--model", "llama-2-7b", "--kv-memory", "16GiB")
    found = rows(cli, *args)
    assert "unquantized tokens" in found["42-window+s4r128"]["problem"]
    assert found["turbo"]["capacity_tokens"]
    assert cli("policies", "42-window", *args).code == 1, "asked for, it is an error"


def test_windows_do_not_apply_to_no_quantization(cli) -> None:
    (row,) = rows(cli, "0", "--recent", "128").values()
    assert (row["policy"], row["recent"]) == ("none", 0)
    assert "saves_from_tokens" not in row


@pytest.mark.parametrize(
    ("model", "kv_heads", "layers", "head_dim", "ratios"),
    [
        ("demo", 3, 30, 64, {"int8": 1.85, "int4": 3.5, "turbo": 4.7}),
        ("qwen3-30b-a3b", 4, 48, 128, {"int8": 1.9, "int4": 3.7, "turbo": 4.9}),
        ("llama-2-7b", 32, 32, 128, {"int8": 1.9, "int4": 3.7, "turbo": 4.9}),
    ],
)
def test_capacity_of_a_model(
    model: str, kv_heads: int, layers: int, head_dim: int, ratios: dict[str, float], cli
) -> None:
    memory = 16 << 30
    found = rows(cli, "--model", model, "--kv-memory", "16GiB")
    per_token = 2 * 2 * layers * kv_heads * head_dim
    assert found["none"]["bytes_per_token"] == per_token
    page = 64
    assert found["none"]["capacity_tokens"] == (memory // (page * per_token) - 1) * page
    for policy, ratio in ratios.items():
        assert found[policy]["capacity_tokens"] / found["none"]["capacity_tokens"] >= ratio
        assert found[policy]["capacity_tokens"] * found[policy]["bytes_per_token"] <= memory


def test_windows_cost_capacity(cli) -> None:
    args = ("42", "--model", "llama-2-7b", "--kv-memory", "32GiB")
    (plain,) = rows(cli, *args).values()
    (window,) = rows(cli, *args, "--sink", "4", "--recent", "128").values()
    assert window["window_bytes_per_request"] == 132 * plain["bytes_per_token"] * 512 // 102
    assert 256 * window["window_bytes_per_request"] == pytest.approx(17.7e9, rel=0.01)
    assert window["capacity_tokens"] < plain["capacity_tokens"]
    assert window["effective_bits_per_element"] > plain["effective_bits_per_element"] == 3.1875


def test_pages_that_the_engine_refuses(cli) -> None:
    result = cli("policies", "--model", "llama-2-7b", "--page-size", "17")
    assert result.code == 2 and "--page-size must be a multiple of 16" in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such-folder-or-id"], "no/such-folder-or-id"),
        (["--model", "llama-2-7b", "--kv-memory", "1MiB"], "hold no request"),
    ],
    ids=["model", "memory"],
)
def test_bad_input(args: list[str], message: str, cli) -> None:
    result = cli("policies", *args)
    assert result.code == 1
    assert message in result.err
    assert "\nhint: " in result.err
    assert result.out == ""
