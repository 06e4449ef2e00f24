"""`kvq chat` through a pipe, on a fake pipeline: history, commands, and a context that fills up."""

import json
from pathlib import Path


def messages(fake) -> list[list[dict[str, str]]]:
    """The prompts that reached the pipeline."""
    return [entry[0] for entry in fake[0].log if isinstance(entry, tuple) and entry[0] != "policy"]


def contents(prompt: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in prompt]


def test_answers_on_stdout_and_nothing_else(cli, fake) -> None:
    result = cli("chat", stdin=b"hello there\n\nand again\n")
    assert result.code == 0
    assert result.out == "re:hello there \nre:and again \n"
    assert "policy none" in result.err
    assert "> " not in result.out + result.err


def test_last_line_without_newline(cli, fake) -> None:
    assert cli("chat", stdin=b"hello").out == "re:hello \n"


def test_history_is_kept(cli, fake) -> None:
    cli("chat", "--system", "S", stdin=b"one\ntwo\n")
    assert messages(fake)[1] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "re:one "},
        {"role": "user", "content": "two"},
    ]


def test_reset_forgets(cli, fake) -> None:
    result = cli("chat", stdin=b"one\n/reset\ntwo\n")
    assert contents(messages(fake)[1]) == ["two"]
    assert "new conversation" in result.err


def test_system_message(cli, fake) -> None:
    result = cli("chat", stdin=b"/system\n/system Be kind.\none\n/system\n/system -\ntwo\n")
    assert contents(messages(fake)[0]) == ["Be kind.", "one"]
    assert contents(messages(fake)[1]) == ["one", "re:one ", "two"]
    assert result.err.count("no system message") == 2
    assert result.err.count("system: Be kind.") == 2


def test_policy_changes_in_the_middle(cli, fake) -> None:
    result = cli("chat", "--sink", "4", stdin=b"one\n/policy 42\ntwo\n/policy\n")
    assert ("policy", "turbo") in fake[0].log
    assert fake[0].config.resolved_policy().label == "turbo+s4r0"
    assert result.err.count("policy turbo+s4r0") == 2
    assert len(messages(fake)[1]) == 3


def test_unknown_policy_changes_nothing(cli, fake) -> None:
    result = cli("chat", stdin=b"/policy 43\n/policy\none\n")
    assert result.code == 0
    assert "error: unknown policy '43'\n\nhint: " in result.err
    assert "\npolicy none\n" in result.err
    assert result.out == "re:one \n"


def test_stats(cli, fake) -> None:
    result = cli("chat", stdin=b"one two\n/stats\n")
    assert "3.38 bits an element" in result.err
    assert "2 tokens, first after" in result.err
    assert "9 of 300 tokens" in result.err
    assert "room for 1,234 tokens" in result.err
    assert "prefix cache  held 25% of the prompts' tokens so far" in result.err


def test_stats_before_any_answer(cli, fake) -> None:
    assert "0 tokens" in cli("chat", stdin=b"/stats\n").err


def test_save(cli, fake, tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    result = cli("chat", stdin=f"one\n/save {file}\n".encode())
    assert f"saved {file}" in result.err
    document = json.loads(file.read_text())
    assert document["policy"] == "none"
    assert contents(document["messages"]) == ["one", "re:one "]


def test_save_overwrites_nothing(cli, fake, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    result = cli("chat", stdin=f"/save {tmp_path}/x\n/save {tmp_path}/no/x\n/save\none\n".encode())
    assert (tmp_path / "x").read_text() == "mine"
    assert "exists already" in result.err
    assert "cannot write" in result.err
    assert "no file named" in result.err
    assert result.out == "re:one \n"


def test_help_lists_every_command(cli, fake) -> None:
    err = cli("chat", stdin=b"/help\n").err
    for name in ("/help", "/reset", "/system", "/policy", "/stats", "/save", "/exit"):
        assert name in err


def test_exit_leaves(cli, fake) -> None:
    result = cli("chat", stdin=b"one\n/exit\ntwo\n")
    assert result.code == 0
    assert result.out == "re:one \n"
    assert fake[0].log[-1] == "closed"


def test_unknown_command(cli, fake) -> None:
    result = cli("chat", stdin=b"/nope\none\n")
    assert "error: unknown command `/nope`" in result.err
    assert result.out == "re:one \n"


def test_full_context_drops_the_oldest_exchanges(cli, fake) -> None:
    lines = b"".join(b"word%d " % i * 40 + b"\n" for i in range(6))
    result = cli("chat", "--system", "Be kind.", "-n", "30", stdin=lines)
    assert result.code == 0
    assert "the context is full: the oldest 2 messages are no longer part of it" in result.err
    for prompt in messages(fake):
        assert sum(len(content.split()) + 1 for content in contents(prompt)) + 30 <= 300
        assert prompt[0]["role"] == "system"
        assert [message["role"] for message in prompt[1:]] == ["user", "assistant"] * (
            len(prompt) // 2 - 1
        ) + ["user"]
    assert len(messages(fake)[-1]) > 2


def test_message_longer_than_the_context(cli, fake) -> None:
    result = cli("chat", stdin=b"one\n" + b"word " * 400 + b"\ntwo\n")
    assert result.code == 1
    assert "error: the message is longer than the context of 300 tokens" in result.err
    assert result.out == "re:one \nre:two \n"


def test_error_in_the_middle_of_an_answer(cli, fake) -> None:
    result = cli("chat", stdin=b"a fail\nnext\n")
    assert result.code == 1
    assert "error: the stream broke" in result.err
    assert result.out == "re:a \nre:next \n"
    assert contents(messages(fake)[1]) == ["next"]


def test_model_without_a_chat_template(cli, fake) -> None:
    result = cli("chat", "--model", "base", stdin=b"hi\n")
    assert result.code == 1
    assert "error: base has no chat template\n\nhint: " in result.err


def test_broken_utf8(cli, fake) -> None:
    result = cli("chat", stdin=b"\xff\n")
    assert result.code == 1
    assert "not valid UTF-8" in result.err
