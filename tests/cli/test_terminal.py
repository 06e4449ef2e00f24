"""`kvq run` and `kvq chat` in a real terminal: streaming, Ctrl-C, Ctrl-D, line editing.

With a fake pipeline for exact timing, and with the demo model for the real thing.
"""

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

FAKE = str(Path(__file__).with_name("fake_kvq.py"))
TIMEOUT = 60
DEMO_TIMEOUT = 300
"""Enough to fetch and convert the demo model where it is not cached."""


class Terminal(pexpect.spawn):
    """A program in a terminal of 100 × 40; `seen` is everything it wrote."""

    def __init__(self, *command: str, timeout: float = TIMEOUT) -> None:
        env = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
        super().__init__(
            command[0], list(command[1:]), env=env, timeout=timeout, encoding="utf-8", dimensions=(40, 100)
        )
        self.logfile_read = io.StringIO()

    @property
    def seen(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.logfile_read.getvalue()).replace("\r", "")

    def finish(self) -> int:
        """Wait for its end and return its exit code."""
        self.expect(pexpect.EOF)
        self.close()
        assert self.signalstatus is None
        assert "Traceback" not in self.seen
        return int(self.exitstatus)


@pytest.fixture
def terminal() -> Iterator:
    started: list[Terminal] = []

    def start(*args: str) -> Terminal:
        started.append(Terminal(sys.executable, FAKE, *args))
        return started[-1]

    yield start
    for program in started:
        program.close(force=True)


@pytest.fixture
def demo_terminal() -> Iterator:
    started: list[Terminal] = []

    def start(*args: str) -> Terminal:
        started.append(Terminal(sys.executable, "-m", "kvq_cli.app", *args, timeout=DEMO_TIMEOUT))
        return started[-1]

    yield start
    for program in started:
        program.close(force=True)


def test_run_streams(terminal) -> None:
    run = terminal("run", "one slow slow slow end")
    run.expect("re:one ")
    start = time.perf_counter()
    run.expect("end")
    assert time.perf_counter() - start > 0.5
    assert run.finish() == 0
    assert "re:one slow slow slow end \n" in run.seen


def test_run_stops_at_ctrl_c(terminal) -> None:
    run = terminal("run", "slow long")
    run.expect("slow ")
    run.sendintr()
    assert run.finish() == 130
    assert "error" not in run.seen
    assert re.search(r"re:slow .*\n$", run.seen)


def test_run_without_a_prompt(terminal) -> None:
    run = terminal("run")
    assert run.finish() == 2
    assert "error: no prompt given" in run.seen


def test_chat_streams_and_ctrl_d_leaves(terminal) -> None:
    chat = terminal("chat", "--policy", "42")
    chat.expect("policy turbo")
    chat.expect("> ")
    chat.sendline("one slow slow slow end")
    chat.expect("re:one ")
    start = time.perf_counter()
    chat.expect("end \r\n")
    assert time.perf_counter() - start > 0.5
    chat.expect("> ")
    chat.sendeof()
    assert chat.finish() == 0


def test_chat_ctrl_c_stops_the_answer_and_keeps_it(terminal, tmp_path: Path) -> None:
    chat = terminal("chat")
    chat.expect("> ")
    chat.sendline("slow long")
    chat.expect("re:slow ")
    chat.sendintr()
    chat.expect(r"\(stopped\)")
    chat.expect("> ")
    chat.sendline("and then")
    chat.expect("re:and then ")
    chat.expect("> ")
    chat.sendline(f"/save {tmp_path}/talk.json")
    chat.expect("saved")
    chat.expect("> ")
    chat.sendeof()
    assert chat.finish() == 0
    talk = (tmp_path / "talk.json").read_text()
    assert '"re:slow ' in talk
    assert talk.index("re:slow") < talk.index("and then")


def test_chat_second_ctrl_c_leaves(terminal) -> None:
    chat = terminal("chat")
    chat.expect("> ")
    chat.sendline("slow slow long")
    chat.expect("re:slow ")
    chat.sendintr()
    chat.sendintr()
    code = None
    if chat.expect([r"\(stopped\)", pexpect.EOF]) == 0:  # the first was quick enough
        chat.expect("> ")
        chat.sendeof()
        code = 0
    assert chat.finish() == (130 if code is None else code)


def test_chat_ctrl_c_at_the_prompt_drops_the_line(terminal) -> None:
    chat = terminal("chat")
    chat.expect("> ")
    chat.send("half a li")
    chat.expect("half a li")
    chat.sendintr()
    chat.expect("Ctrl-D or /exit leaves")
    chat.expect("> ")
    chat.sendline("whole")
    chat.expect("re:whole ")
    chat.expect("> ")
    chat.sendline("/exit")
    assert chat.finish() == 0


def test_chat_line_editing(terminal) -> None:
    chat = terminal("chat")
    chat.expect("> ")
    chat.sendline("first")
    chat.expect("re:first ")
    chat.expect("> ")
    chat.send("\x1b[A")  # arrow up
    chat.expect("first")
    chat.sendline(" again")
    chat.expect("re:first again ")
    chat.expect("> ")
    chat.send("/pol\t")
    chat.expect("/policy ")
    chat.sendline("42")
    chat.expect("policy turbo")
    chat.expect("> ")  # before it the terminal is not readline's, and would eat the Ctrl-D
    chat.sendeof()
    assert chat.finish() == 0


@pytest.mark.demo
def test_run_with_the_demo_model(demo_terminal) -> None:
    run = demo_terminal(
        "run", "What is the capital of France? Answer in one sentence.", "--policy", "8", "-n", "40"
    )
    assert run.finish() == 0
    assert "Paris" in run.seen
    assert re.search(r"\d+ tokens in [\d.]+ s", run.seen)


@pytest.mark.demo
def test_run_with_the_demo_model_streams_and_stops(demo_terminal) -> None:
    run = demo_terminal("run", "1 2 3 4 5 6 7 8 9 10 11", "--raw", "--ignore-eos", "-n", "2000")
    run.expect(r"12 13 14")
    run.sendintr()
    assert run.finish() == 130


@pytest.mark.demo
def test_chat_with_the_demo_model(demo_terminal) -> None:
    chat = demo_terminal("chat", "--policy", "42", "--sink", "4", "--recent", "64", "-n", "400")
    chat.expect("policy turbo")
    chat.expect("> ")
    chat.sendline("Write a very long story about a fox, with many details.")
    chat.expect("many details.\r\n")
    chat.expect("[a-z]{3,} [a-z]{2,} [a-z]+")
    chat.sendintr()
    chat.expect(r"\(stopped\)")
    chat.expect("> ")
    chat.sendline("/policy 0")
    chat.expect("policy none")
    chat.expect("> ")
    chat.sendline("/reset")
    chat.expect("new conversation")
    chat.expect("> ")
    chat.sendline("What is the capital of France? Answer in one sentence.")
    chat.expect("Paris")
    chat.expect("> ")
    chat.sendline("/stats")
    chat.expect("16.00 bits an element|32.00 bits an element")
    chat.expect("room for [0-9,]+ tokens")
    chat.expect("> ")
    chat.sendeof()
    assert chat.finish() == 0
