"""`kvq run` on a fake pipeline: what goes where, in which order, and what is asked of the pipeline."""

import json
import shlex
from pathlib import Path

import pytest

from kvq_core.config import SamplingParams


def test_answer_on_stdout_and_talk_on_stderr(cli, fake) -> None:
    result = cli("run", "tell me more", "--policy", "42")
    assert result.code == 0
    assert result.out == "re:tell me more \n"
    assert "loading demo" in result.err
    assert "3 tokens in" in result.err
    assert "policy turbo" in result.err
    assert fake[0].log[-1] == "closed"


def test_prompt_from_stdin(cli, fake) -> None:
    for args in ((), ("-",)):
        assert cli("run", *args, stdin=b" from a pipe\n").out == "re:from a pipe \n"


def test_argument_does_not_read_stdin(cli, fake) -> None:
    assert cli("run", "argument", stdin=b"stdin").out == "re:argument \n"


def test_several_prompts_are_answered_in_their_order(cli, fake) -> None:
    result = cli("run", "a", "--prompt", "b c d", "--prompt", "e f")
    assert result.out == "re:a \nre:b c d \nre:e f \n"
    assert len(fake) == 1
    assert [line for line in result.err.splitlines() if line.startswith("[")] == [
        "[1/3] a",
        "[2/3] b c d",
        "[3/3] e f",
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "one\n\ntwo  2\n"), ("p.json", '["one", "two  2"]')], ids=["lines", "json"]
)
def test_prompts_from_a_file(name: str, text: str, cli, fake, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert cli("run", "--file", str(tmp_path / name)).out == "re:one \nre:two 2 \n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.txt", "one\u2028two\r\nthree\r\n".encode("utf-8-sig")),
        ("p.json", b'\xef\xbb\xbf["one two", "three"]'),
    ],
)
def test_files_of_other_systems(name: str, data: bytes, cli, fake, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert cli("run", "--file", str(tmp_path / name)).out == "re:one two \nre:three \n"
    assert cli("run", stdin=b"\xef\xbb\xbfone\n").out == "re:one \n"


def test_json_is_one_document(cli, fake) -> None:
    result = cli("run", "--prompt", "a b", "--prompt", "c", "--json", "--policy", "int8:lm4")
    document = json.loads(result.out)
    assert document["complete"] is True
    assert document["model"] == "demo"
    assert document["policy"] == "int8:lm4"
    assert [response["text"] for response in document["responses"]] == ["re:a b ", "re:c "]
    assert document["responses"][0] == {
        "prompt": "a b",
        "text": "re:a b ",
        "finish_reason": "stop",
        "input_tokens": 7,
        "output_tokens": 2,
        "token_ids": [0, 1],
    }


def test_json_keeps_what_there_was_when_the_stream_breaks(cli, fake) -> None:
    result = cli("run", "a b fail", "--json")
    assert result.code == 1
    assert "error: the stream broke" in result.err
    document = json.loads(result.out)
    assert document["complete"] is False
    assert document["responses"][0]["text"] == "re:a b "


def test_sampling_flags(cli, fake) -> None:
    flags = shlex.split("-n 5 -t 0.7 --top-k 3 --top-p 0.9 --stop x --stop y --ignore-eos --seed 11")
    assert cli("run", "a", *flags).code == 0
    assert fake[0].log[0][1] == SamplingParams(
        max_new_tokens=5, temperature=0.7, top_k=3, top_p=0.9, stop=("x", "y"), ignore_eos=True, seed=11
    )


def test_engine_flags(cli, fake) -> None:
    cache = shlex.split("--quant-policy 4 --sink 4 --recent 8 --kv-memory 2GiB --page-size 32")
    other = shlex.split("--dtype fp32 --device cpu --cache-max-entry-count 0.5 --enforce-eager")
    assert cli("run", "a", *cache, *other).code == 0
    config = fake[0].config
    assert config.resolved_policy().label == "int4+s4r8"
    assert (config.kv_memory, config.dtype, config.device, config.page_size) == (
        2 << 30,
        "float32",
        "cpu",
        32,
    )
    assert (config.gpu_memory_utilization, config.enforce_eager) == (0.5, True)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], [[{"role": "user", "content": "hi"}]]),
        (["--raw"], ["hi"]),
        (["--system", "S"], [[{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]]),
        (["--model", "base"], ["hi"]),
    ],
    ids=["template", "raw", "system", "no template"],
)
def test_chat_template(args: list[str], expected: list, cli, fake) -> None:
    assert cli("run", "hi", *args).code == 0
    assert fake[0].log[0][0] == expected


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["hi", "--model", "missing"], 1, "cannot find model"),
        (["hi", "--model", "base", "--chat"], 1, "this model has no chat template"),
        (["hi", "--raw", "--system", "S"], 2, "--system needs a chat template"),
        (["hi fail"], 1, "the stream broke"),
    ],
    ids=["model", "template", "system", "stream"],
)
def test_mistakes(args: list[str], code: int, message: str, cli, fake) -> None:
    result = cli("run", *args)
    assert result.code == code
    assert f"error: {message}" in result.err
    assert "\nhint: " in result.err


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.txt", b"ok\n\xff\xfe", "is not valid UTF-8 (byte 3)"),
        ("p.json", b"", "is not valid JSON"),
        ("p.json", b'["a", "b"', "is not valid JSON"),
        ("p.json", b"[" * 200_000, "is not valid JSON: it is nested too deeply"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.json", b'{"prompt": "a"}', "is no list of prompts"),
        ("p.json", b'["a", 1]', "is no list of prompts"),
        ("p.json", b'["\\ud800"]', "not valid UTF-8"),
    ],
)
def test_bad_files(name: str, data: bytes, message: str, cli, fake, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    result = cli("run", "--file", str(tmp_path / name))
    assert result.code in (1, 2)
    assert message in result.err
    assert "\nhint: " in result.err
    assert not fake


def test_broken_utf8_on_stdin(cli, fake) -> None:
    result = cli("run", stdin=b"abc\xff")
    assert result.code == 1
    assert "the prompt on stdin is not valid UTF-8 (byte 3)" in result.err
