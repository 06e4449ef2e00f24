"""What users hand in as prompts, and the token ids they become."""

from typing import Any

from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel

Prompt = str | list[int] | list[dict[str, Any]]
KINDS = "a prompt is a string, a list of token ids, or a list of chat messages; several go into a list"


def as_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """Prompts as a list, and whether a single one was given; raises `KvqError` for anything else."""
    prompts = _plain(prompts)
    if _is_prompt(prompts):
        return [prompts], True
    if not isinstance(prompts, list):
        raise KvqError(f"a prompt can't be of type {type(prompts).__name__}", KINDS)
    if not prompts:
        raise KvqError("there is no prompt: the list is empty", KINDS)
    several = [_plain(prompt) for prompt in prompts]
    for index, prompt in enumerate(several):
        if isinstance(prompt, list) and not prompt:
            raise KvqError(f"prompt {index} is empty", "give at least one token")
        if not _is_prompt(prompt):
            raise KvqError(f"prompt {index} is not a prompt: {_short(prompt)}", KINDS)
    return several, False


def encode(model: LoadedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; raises `KvqError` where it is empty or the model lacks what it needs."""
    if _is_ids(prompt):
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    elif model.tokenizer is None:
        raise KvqError(f"{model.name} has no tokenizer", "give prompts as lists of token ids")
    elif isinstance(prompt, str):
        ids = list(model.tokenizer(_checked(prompt))["input_ids"])
    else:
        text = _checked(_apply_template(model, prompt))  # type: ignore[arg-type]
        ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise KvqError("the prompt is empty", "give at least one token")
    return ids


def _apply_template(model: LoadedModel, messages: list[dict[str, Any]]) -> str:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if not getattr(tokenizer, "chat_template", None):
        raise KvqError(f"{model.name} has no chat template", "give the prompt as a string")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise KvqError(
            f"the chat template of {model.name} refuses these messages: {error}",
            'messages are like {"role": "user", "content": "Hi"}; some models take no system role',
        ) from error


def _checked(text: str) -> str:
    """Text without lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KvqError(f"the prompt is not valid Unicode: {error.reason}", "decode it from UTF-8") from error
    return text


def _plain(prompt: Any) -> Any:
    """Lists for tuples, arrays and tensors."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    return list(prompt) if isinstance(prompt, tuple) else prompt


def _is_prompt(prompt: Any) -> bool:
    return isinstance(prompt, str) or _is_ids(prompt) or _is_chat(prompt)


def _is_ids(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(hasattr(i, "__index__") and not isinstance(i, bool) for i in prompt)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
