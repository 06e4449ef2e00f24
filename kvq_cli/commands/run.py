"""`kvq run`: answer prompts; text on stdout as it is made, talk on stderr."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.options import (
    DEFAULT_MODEL,
    SAMPLING,
    SAMPLING_PANEL,
    IgnoreEos,
    Json,
    MaxNewTokens,
    Model,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    engine_options,
    sampling_params,
)
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.errors import KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.pipeline import Pipeline


@engine_options()
def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` or nothing at all reads one from stdin.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="A prompt; may be repeated: all are answered together."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="Prompts from a file: one a line, or a .json list."
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the model's chat template, or continue it as it stands. Default: the "
            "template, where the model has one.",
            show_default=False,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = SAMPLING.max_new_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopK = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    stop: Stop = None,
    ignore_eos: IgnoreEos = SAMPLING.ignore_eos,
    json: Json = False,
    *,
    config: EngineConfig,
) -> None:
    """Answer prompts. The text goes to stdout as it is made, everything else to stderr.

    kvq run "Why is the sky blue?" --policy 42
    echo "Summarise: ..." | kvq run --max-new-tokens 60
    kvq run --file prompts.txt --json > answers.json
    """
    texts = gather_prompts(prompt, prompts or [], file)
    params = sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=config.seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with open_pipeline(model, config) as pipe:
        answers = Answers(texts, show=not json)
        try:
            answers.collect(pipe, as_messages(pipe, texts, chat, system), params)
        finally:
            found = pipe.kv_stats().get("fidelity")
            if json:
                console.emit_json(answers.document(model, config) | ({"fidelity": found} if found else {}))
        console.say(answers.summary(config))
        if found:
            from kvq_core.bench.report import fidelity_table

            table = fidelity_table(found)
            lines = [table.columns, *([str(cell) for cell in row] for row in table.rows)]
            console.say("\n".join([table.title, *map("  ".join, lines)]))


def open_pipeline(model: str, config: EngineConfig) -> "Pipeline":
    """Load a model and start its engine, with a bar on a terminal."""
    from kvq_core.pipeline import pipeline

    with console.progress(f"loading {model}") as update:
        return pipeline(model, config, progress=update)


def gather_prompts(argument: str | None, options: list[str], file: Path | None) -> list[str]:
    """All prompts, in order: argument, `--prompt`s, file; stdin where there is none, or for `-`."""
    texts = [*([argument] if argument not in (None, "-") else []), *options]
    if file is not None:
        texts += read_prompts(file)
    if argument == "-" or not texts:
        if sys.stdin.isatty():
            raise UsageError("no prompt given", '`kvq run "Why is the sky blue?"`, or pipe one in')
        texts.insert(0, _decode(sys.stdin.buffer.read(), "the prompt on stdin").strip())
    for text in texts:
        if not text.strip():
            raise UsageError("the prompt is empty", '`kvq run "Why is the sky blue?"`')
        check_text(text)
    return texts


def check_text(text: str) -> None:
    """`UsageError` for text with bytes that Python could not decode (they become lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid UTF-8", "give it in UTF-8") from error


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, blank lines skipped, or a JSON list of strings where the name ends in `.json`."""
    try:
        text = _decode(file.read_bytes(), str(file))
    except OSError as error:
        raise KvqError(f"cannot read {file}: {error.strerror}", "check the path given to `--file`") from error
    if file.suffix != ".json":
        prompts: Any = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    else:
        from kvq_core.bench.record import load_json

        try:
            prompts = load_json(text)
        except ValueError as error:
            raise KvqError(
                f"{file} is not valid JSON: {error}", 'a list of strings: ["Hi", "Why?"]'
            ) from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise KvqError(f"{file} is no list of prompts", 'a list of strings: ["Hi", "Why?"]')
    if not prompts:
        raise KvqError(f"{file} holds no prompt", "one a line, or a .json list of strings")
    return prompts


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KvqError(f"{what} is not valid UTF-8 (byte {error.start})", "convert it to UTF-8") from error


def as_messages(pipe: "Pipeline", texts: list[str], chat: bool | None, system: str | None) -> list[Any]:
    """The prompts as chat messages where a template is to be used, else unchanged."""
    template = has_chat_template(pipe)
    if chat is None:
        chat = template
    if not chat:
        if system:
            raise UsageError("--system needs a chat template", "leave out --system, or use a chat model")
        return list(texts)
    if not template:
        raise KvqError("this model has no chat template", "use `--raw`, or an instruction-tuned model")
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": text}] for text in texts]


def has_chat_template(pipe: "Pipeline") -> bool:
    """Whether the model's tokenizer can turn messages into a prompt."""
    return bool(getattr(pipe.model.tokenizer, "chat_template", None))


class Answers:
    """The answers as they grow: shown in the order of their prompts, whichever is finished first."""

    def __init__(self, prompts: list[str], show: bool) -> None:
        self.prompts = prompts
        self.texts = ["" for _ in prompts]
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.input_lens = [0 for _ in prompts]
        self.finish_reasons: list[str | None] = [None for _ in prompts]
        self.seconds = 0.0
        self._show = show
        self._shown = 0
        self._current = 0

    def collect(self, pipe: "Pipeline", prompts: list[Any], params: SamplingParams) -> None:
        """Generate all answers; what there is stays here when it is interrupted."""
        start = time.perf_counter()
        self._announce()
        try:
            for delta in pipe.stream_infer(prompts, params=params):
                self.texts[delta.index] += delta.text
                self.token_ids[delta.index] += delta.token_ids
                self.input_lens[delta.index] = delta.input_len
                self.finish_reasons[delta.index] = delta.finish_reason
                self._print()
        except KeyboardInterrupt:
            if self._show:
                console.emit("")
            raise
        finally:
            self.seconds = time.perf_counter() - start

    def _announce(self) -> None:
        if self._show and len(self.prompts) > 1:
            console.say(f"[{self._current + 1}/{len(self.prompts)}] {self.prompts[self._current]}")

    def _print(self) -> None:
        """Show what is new of the first unfinished answer, and of those after it once it is finished."""
        while self._show and self._current < len(self.prompts):
            console.emit(self.texts[self._current][self._shown :], end="")
            self._shown = len(self.texts[self._current])
            if self.finish_reasons[self._current] is None:
                return
            console.emit("")
            self._current, self._shown = self._current + 1, 0
            if self._current < len(self.prompts):
                self._announce()

    def summary(self, config: EngineConfig) -> str:
        """One line: tokens, seconds, speed, policy."""
        tokens = sum(map(len, self.token_ids))
        return (
            f"{tokens} tokens in {self.seconds:.1f} s, {tokens / max(self.seconds, 1e-9):.1f} tokens/s, "
            f"policy {config.resolved_policy().label}"
        )

    def document(self, model: str, config: EngineConfig) -> dict[str, Any]:
        """The JSON document of `--json`."""
        policy = config.resolved_policy()
        return {
            "complete": all(self.finish_reasons),
            "model": model,
            "policy": policy.label,
            "seconds": self.seconds,
            "responses": [
                {
                    "prompt": self.prompts[i],
                    "text": self.texts[i],
                    "finish_reason": self.finish_reasons[i],
                    "input_tokens": self.input_lens[i],
                    "output_tokens": len(self.token_ids[i]),
                    "token_ids": self.token_ids[i],
                }
                for i in range(len(self.prompts))
            ],
        }
