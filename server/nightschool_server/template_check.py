"""What a model's chat template makes of an application: its tools, a call, a result, an image, and how many tokens.

Owns the conversations that are rendered to find out. A template is a program of the model's makers: many know nothing
of tools, and say so by leaving them out. Reads the model folder but no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nightschool_server.agent.call_forms import HERMES, CallForm, form_of_template
from nightschool_server.agent.formats import call_form
from nightschool_server.app import App
from nightschool_server.chat import Message, Text, assistant, system, tool_result, user
from nightschool_server.config.config import Config
from nightschool_server.engine import Prompt
from nightschool_server.engines.model_folder import ModelFolder, read_model_folder
from nightschool_server.engines.rendering import Renderer, RenderingParts
from nightschool_server.errors import InvalidRequestError, NightschoolError
from nightschool_server.findings import Finding, State

ARGUMENT = "nightschool-check-argument"
ASKED = "nightschool-check-question"
SAID = "nightschool-check-result"
GROUP = "template"
_IMAGE = "0" * 64
_REMEDY = "take the instruction-tuned version of the model, or give its folder a chat_template.jinja"


def examine_model(app: App, config: Config, *, has_images: bool) -> Iterator[Finding]:
    """What is to be said of the model for this application; `has_images` of its held-out tasks."""
    engine = config.engine
    try:
        folder = read_model_folder(
            engine.model,
            context_length=engine.context_length,
            max_lora_rank=engine.max_lora_rank,
            with_digest=False,
        )
    except NightschoolError as error:
        yield Finding("model", "", "fault", str(error))
        return
    sight = "text and images" if folder.info.accepts_images else "text"
    yield Finding("model", "", "ok", f"{engine.model}: {sight}, context {folder.info.context_length:,}")
    if has_images and not folder.info.accepts_images:
        yield Finding("model", "images", "fault", "held-out tasks have images and this model reads text only")
    renderer = Renderer(RenderingParts(folder.tokenizer, folder.template, folder.image_token_id, folder.pictures, None))
    yield _form(config, folder)
    yield from _template(app, renderer, folder, call_form(config.agent))
    yield from _length(app, config, renderer, folder)


def _form(config: Config, folder: ModelFolder) -> Finding:
    form, own = call_form(config.agent), form_of_template(folder.template)
    if form is not own and own is not HERMES:
        text = f"agent.tool_call_format is {form.name}, but the template writes {own.name}: set it to auto"
        return Finding(GROUP, "form", "fault", text)
    return Finding(GROUP, "form", "ok", f"calls are read as {form.name}")


def _template(app: App, renderer: Renderer, folder: ModelFolder, form: CallForm) -> Iterator[Finding]:
    opening = [*([system(app.system_prompt)] if app.system_prompt else []), user(ASKED)]
    written = form.write(app.specs[0].name if app.specs else "look_up", {"key": ARGUMENT})
    parsed = form.read(written, app.specs)
    call = parsed.calls[0]
    called = Message("assistant", parsed.calls) if parsed.as_parts else assistant(written)
    answered = tool_result(call, SAID)

    def render(messages: Sequence[Message]) -> str:
        return renderer.text(Prompt(tuple(messages), app.specs))

    def prompt() -> tuple[State, str]:
        if app.system_prompt.strip() not in render(opening):
            return "fault", f"leaves the system prompt out: {_REMEDY}"
        return "ok", "shows the system prompt and the question"

    def tools() -> tuple[State, str]:
        text = render(opening)
        hidden = [spec.name for spec in app.specs if spec.name not in text.replace(app.system_prompt, "")]
        if hidden:
            return "fault", f"does not show the model the tools {', '.join(hidden)}: {_REMEDY} that lists them"
        undescribed = [spec.name for spec in app.specs if spec.description not in text]
        return "ok", f"shows all {len(app.specs)} tools{', without their descriptions' if undescribed else ''}"

    def calls() -> tuple[State, str]:
        text = render([*opening, called, answered])
        if (called.text or ARGUMENT) not in text:
            return "fault", f"changes the model's own call when it is shown again: {_REMEDY} that shows it as it is"
        return "ok", "shows the model's call as it wrote it"

    def sent_calls() -> tuple[State, str]:
        text = render([*opening, Message("assistant", (Text(""), call)), answered])
        if ARGUMENT not in text:
            return "no", "leaves out calls that a client sends as parts of a conversation: send them as text"
        return "ok", "shows calls that a client sends as parts"

    def results() -> tuple[State, str]:
        if SAID not in render([*opening, called, answered]):
            return "fault", f"leaves results of tools out, so the model never learns what a tool said: {_REMEDY}"
        return "ok", "shows results of tools"

    yield _asked("prompt", prompt)
    if app.specs:
        yield _asked("tools", tools)
    yield _asked("calls", calls)
    yield _asked("sent calls", sent_calls, "no")
    yield _asked("results", results)
    if folder.pictures is None:
        return
    mark = folder.pictures.image_mark

    def images() -> tuple[State, str]:
        if render([*opening[:-1], user(ASKED, [_IMAGE])]).count(mark) != 1:
            return "fault", f"does not mark the place of an image with {mark!r}: {_REMEDY} that does"
        return "ok", "marks images"

    def returned() -> tuple[State, str]:
        pictured = tool_result(call, SAID, images=[_IMAGE])
        if render([*opening, called, pictured]).count(mark) != 1:
            return "no", "leaves images out that a tool gives back: let tools describe in words what is to be seen"
        return "ok", "marks images that a tool gives back"

    yield _asked("images", images)
    yield _asked("tool images", returned, "no")


def _asked(name: str, question: Callable[[], tuple[State, str]], refused: State = "fault") -> Finding:
    """What `question` finds; `refused` where the template will not render it."""
    try:
        state, text = question()
    except InvalidRequestError as error:
        return Finding(GROUP, name, refused, str(error))
    return Finding(GROUP, name, state, text)


def _length(app: App, config: Config, renderer: Renderer, folder: ModelFolder) -> Iterator[Finding]:
    opening = [*([system(app.system_prompt)] if app.system_prompt else []), user("?")]
    try:
        used = len(renderer.tokenise(renderer.text(Prompt(tuple(opening), app.specs))))
    except InvalidRequestError:
        return  # Said above.
    context, answer = folder.info.context_length, config.agent.max_tokens
    left = context - used - answer
    text = f"system prompt and tools take {used:,} of {context:,} tokens, agent.max_tokens {answer:,}"
    if left <= 0:
        yield Finding("context", "", "fault", f"{text}: nothing is left for a task; shorten them")
    elif left < context // 4:
        yield Finding("context", "", "no", f"{text}: {left:,} are left for a task and its results; shorten them")
    else:
        yield Finding("context", "", "ok", f"{text}: {left:,} are left for a task and its results")
