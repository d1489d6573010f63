"""Which form of tool calls a configuration means where it leaves that to the model's chat template.

Server and learner both ask at their start, so that live tasks, practice and training read and write the same form.
Reads the template's file alone: the learner loads neither tokenizer nor model.
"""

from __future__ import annotations

import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from nightschool_server.agent.call_forms import FORMS, CallForm, form_of_template
from nightschool_server.config.config import Config
from nightschool_server.errors import ConfigError

_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def with_call_form(config: Config) -> Config:
    """`config` with `agent.tool_call_format` named. Raises ConfigError where what reads the form is not installed."""
    named = config.agent.tool_call_format
    form = FORMS[named] if named != "auto" else form_of_template(_template(config.engine.model))
    check_installed(form)
    return config.model_copy(update={"agent": config.agent.model_copy(update={"tool_call_format": form.name})})


def check_installed(form: CallForm) -> None:
    """Raise ConfigError where the library's module that reads `form` is missing."""
    if form.needs and find_spec(form.needs) is None:
        library = form.needs.partition(".")[0]
        raise ConfigError(
            f"agent.tool_call_format is {form.name!r}, which {form.needs} reads, and {library} "
            f"{metadata.version(library)} has none: pip install -U {library}"
        )


def _template(model: str) -> str:
    """The text of the chat template; empty where there is none that can be read, which the engine will refuse."""
    folder = Path(model).expanduser() if model else None
    if folder is None or not (folder.is_dir() or _is_hub_id(model)):
        return ""
    for name in _FILES:
        path = folder / name if folder.is_dir() else _from_hub(model, name)
        if path is None or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            return text if path.suffix == ".jinja" else str(json.loads(text)["chat_template"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


def _is_hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") <= 1


def _from_hub(model: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, name))
    except Exception:
        return None  # Not there, or no network: the engine says what is wrong with the model.
