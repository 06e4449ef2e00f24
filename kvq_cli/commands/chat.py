"""`kvq chat`: talk to a model, and change the policy while talking."""

import json
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from kvq_cli import console
from kvq_cli.commands.run import check_text, has_chat_template, open_pipeline
from kvq_cli.options import (
    DEFAULT_MODEL,
    SAMPLING,
    SERVER_PANEL,
    ApiKeyEnv,
    ChatModel,
    MaxNewTokens,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    api_key_from,
    engine_options,
    format_size,
    sampling_params,
)
from kvq_core.config import SERVING, EngineConfig, SamplingParams
from kvq_core.errors import INTERRUPTED, KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.pipeline import Pipeline, Response


@engine_options(defaults=SERVING)
def chat(
    model: ChatModel = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = SAMPLING.max_new_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopK = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    stop: Stop = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Talk to this server, `kvq serve` or any other with OpenAI's interface, as in "
            "`http://localhost:8000`.",
            show_default="a model of one's own",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    api_key_env: ApiKeyEnv = None,
    *,
    config: EngineConfig,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.

    kvq chat --policy 42
    kvq chat --url http://localhost:8000
    printf 'Hello!\\nAnd in French?\\n' | kvq chat
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # here Ctrl-C ends a line or an answer, not the program
    params = sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=config.seed,
        stop=stop,
    )
    if url is not None:
        if config != SERVING.replace(policy=str(SERVING.policy), seed=config.seed):
            raise UsageError(
                "--url and flags of the engine exclude each other", "give the engine's flags to `kvq serve`"
            )
        from kvq_cli.remote_chat import RemoteChat

        with RemoteChat(url, api_key_from(api_key_env), params, model, system) as remote:
            remote.loop()
        return
    if api_key_env is not None:
        raise UsageError("--api-key-env is for a server", "name it with `--url`")
    model = DEFAULT_MODEL if model is None else model
    with open_pipeline(model, config) as pipe:
        if not has_chat_template(pipe):
            raise KvqError(
                f"{model} has no chat template", "use an instruction-tuned model, or `kvq run --raw`"
            )
        LocalChat(pipe, config, params, model, system).loop()


class Piece(NamedTuple):
    """What is new of an answer."""

    text: str
    input_tokens: int
    """Of the prompt; 0: not known yet."""
    output_tokens: int


@dataclass
class Turn:
    """What the last answer took."""

    input_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    seconds: float = 0.0

    def summary(self) -> str:
        rate = (self.output_tokens - 1) / max(self.seconds - self.ttft, 1e-9)
        return (
            f"  last answer   {self.output_tokens} tokens, first after {self.ttft:.2f} s,"
            f" then {max(rate, 0):.1f} tokens/s"
        )


class Chat(ABC):
    """One conversation: its messages, and the commands that change it."""

    def __init__(self, params: SamplingParams, model: str, system: str | None) -> None:
        self.params = params
        self.model = model
        self.system: str | None = system
        self.messages: list[dict[str, str]] = []
        self.last = Turn()
        self.interactive = sys.stdin.isatty()
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/help": (self.show_help, "", "this list"),
            "/reset": (self.reset, "", "forget the conversation"),
            "/system": (self.set_system, "TEXT", "set the system message; alone: show it; `-`: none"),
            "/policy": (self.set_policy, "NAME", "answer under another policy; alone: show it"),
            "/stats": (self.show_stats, "", "speed and memory of the last answer"),
            "/save": (self.save, "FILE", "write the conversation as JSON"),
            "/exit": (self.leave, "", "leave; so does Ctrl-D"),
        }

    def loop(self) -> None:
        """Read lines and answer them until the input ends.

        Where nobody is there to see that one had no answer, the exit code says so.
        """
        console.say(f"{self.model}, policy {self.policy}. /help lists the commands, Ctrl-D leaves.")
        failed = 0
        while (line := self.read()) is not None:
            text = line.strip()
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self.command(text)
                else:
                    self.answer(text)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                console.say("(stopped)")
            except KvqError as error:
                console.show_error(error)
                if not text.startswith("/"):
                    failed = error.exit_code
        if self.interactive:
            if line is None:
                console.say("")
        elif failed:
            raise typer.Exit(failed)

    def read(self) -> str | None:
        """The next line; None at the end of the input. Ctrl-C drops the line that is being typed."""
        while True:
            try:
                if not (self.interactive and sys.stdout.isatty()):
                    if self.interactive:
                        print("> ", end="", file=sys.stderr, flush=True)
                    return sys.stdin.readline() or None
                self._line_editing()
                return input("> ")
            except EOFError:
                return None
            except UnicodeDecodeError as error:
                raise KvqError("the input is not valid UTF-8", "convert it to UTF-8") from error
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                console.say("\nCtrl-D or /exit leaves")

    def _line_editing(self) -> None:
        """History and completion of commands, where Python has readline."""
        try:
            import readline
        except ImportError:
            return
        names = list(self.commands)
        readline.set_completer(
            lambda text, state: [*(name + " " for name in names if name.startswith(text)), None][state]
        )
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")

    def command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in self.commands:
            raise UsageError(f"unknown command `{name}`", f"one of {', '.join(self.commands)}")
        self.commands[name][0](argument.strip())

    def answer(self, text: str) -> None:
        """Generate the answer to `text`, shown as it grows; after Ctrl-C, what there is of it is kept."""
        check_text(text)
        self.messages.append({"role": "user", "content": text})
        answer, turn, start = "", Turn(), time.perf_counter()
        try:
            with stop_on_interrupt(self.interactive) as stopped, closing(self.stream()) as stream:
                for piece in stream:
                    turn.ttft = turn.ttft or time.perf_counter() - start
                    turn.input_tokens = piece.input_tokens or turn.input_tokens
                    turn.output_tokens += piece.output_tokens
                    answer += piece.text
                    console.emit(piece.text, end="")
                    if stopped():
                        break
        except BaseException:
            self.messages.pop()  # a question without an answer would stand in the way of the next
            raise
        finally:
            if answer:
                console.emit("")
        if stopped():
            console.say("(stopped)")
        turn.seconds = time.perf_counter() - start
        self.last = turn
        self.messages.append({"role": "assistant", "content": answer})

    @property
    @abstractmethod
    def policy(self) -> str:
        """The policy that answers."""

    @abstractmethod
    def stream(self) -> Generator[Piece]:
        """Answer the conversation; closing the stream cancels what is still running.

        Where the context can't hold it all, its oldest exchanges go.
        """

    @abstractmethod
    def set_policy(self, name: str) -> None: ...

    @abstractmethod
    def show_stats(self, _: str) -> None: ...

    def warn_of_dropped(self, messages: int) -> None:
        console.warn(f"the context is full: the oldest {messages} messages are no longer part of it")

    def prompt(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def show_help(self, _: str) -> None:
        for name, (_run, argument, meaning) in self.commands.items():
            console.say(f"  {f'{name} {argument}':<14} {meaning}")

    def reset(self, _: str) -> None:
        self.messages.clear()
        self.last = Turn()
        console.say("a new conversation")

    def set_system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        console.say(f"system: {self.system}" if self.system else "no system message")

    def save(self, name: str) -> None:
        if not name:
            raise UsageError("no file named", "`/save talk.json`")
        path = Path(name).expanduser()
        document: dict[str, Any] = {
            "model": self.model,
            "policy": self.policy,
            "messages": self.prompt(),
        }
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(document, file, indent=2, ensure_ascii=False)
        except FileExistsError as error:
            raise KvqError(f"{path} exists already", "choose another name") from error
        except OSError as error:
            raise KvqError(f"cannot write {path}: {error.strerror}", "choose another place") from error
        console.say(f"saved {path}")

    def leave(self, _: str) -> None:
        raise EOFError


class LocalChat(Chat):
    """With a model in this process."""

    def __init__(
        self, pipe: "Pipeline", config: EngineConfig, params: SamplingParams, model: str, system: str | None
    ) -> None:
        super().__init__(params, model, system)
        self.pipe = pipe
        self.config = config

    @property
    def policy(self) -> str:
        return self.config.resolved_policy().label

    def stream(self) -> Generator[Piece]:
        prompt = self.fit()
        answer = cast("Generator[Response]", self.pipe.stream_infer(prompt, params=self.params))
        with closing(answer):
            for delta in answer:
                yield Piece(delta.text, delta.input_len, len(delta.token_ids))

    def fit(self) -> list[dict[str, str]]:
        """The conversation as a prompt; where the context can't hold all, its oldest exchanges go."""
        dropped = 0
        while True:
            prompt = self.prompt()
            room = self.context - self.count_tokens(prompt)
            if room >= min(self.params.max_new_tokens, self.context // 4):
                break
            if len(self.messages) == 1:
                if room > 0:
                    break
                raise KvqError(
                    f"the message is longer than the context of {self.context} tokens",
                    "shorten it, or raise `--kv-memory` or `--max-model-len` where these set the limit",
                )
            del self.messages[:2]
            dropped += 2
        if dropped:
            self.warn_of_dropped(dropped)
        return prompt

    @property
    def context(self) -> int:
        """Most tokens that a conversation can have: the model's limit, or the cache's."""
        assert self.pipe.engine is not None
        return self.pipe.engine.plan.max_request_tokens

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        from kvq_core.prompts import encode

        return len(encode(self.pipe.model, messages))

    def set_policy(self, name: str) -> None:
        if name:
            config = self.config.replace(policy=name, layers=())
            self.pipe.set_policy(config)
            self.config = config
        console.say(f"policy {self.policy}")

    def show_stats(self, _: str) -> None:
        stats, turn = self.pipe.kv_stats(), self.last
        used = turn.input_tokens + turn.output_tokens
        console.say(
            f"  policy        {self.policy}, {stats['bits_per_element']:.2f} bits an element\n"
            f"{turn.summary()}\n"
            f"  context       {used} of {self.context} tokens\n"
            f"  its KV cache  {format_size(used * stats['bytes_per_token'])},"
            f" room for {stats['capacity_tokens']:,} tokens"
        )
        if "prefix_hit_rate" in stats:
            console.say(f"  prefix cache  held {stats['prefix_hit_rate']:.0%} of the prompts' tokens so far")


@contextmanager
def stop_on_interrupt(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C only sets what the yielded function tells; a second one leaves the program.

    A step of the engine is thus never cut in two and then gone on with.
    """
    pressed = False

    def note(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise SystemExit(INTERRUPTED)
        pressed = True

    previous = signal.signal(signal.SIGINT, note) if wanted else None
    try:
        yield lambda: pressed
    finally:
        if wanted:
            signal.signal(signal.SIGINT, previous)
