"""What a model's chat template makes of an application: its tools, a call, a result, an image, and how many tokens.

Owns the conversations that are rendered to find out. A template is a program of the model's makers: many know nothing
of tools, and say so by leaving them out. Reads the model folder but no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nightschool_server.agent.call_forms import HERMES, form_of_template
from nightschool_server.agent.formats import action_format, call_form
from nightschool_server.agent.toolcalls import ParsedAnswer
from nightschool_server.app import App
from nightschool_server.chat import Message, Text, ToolCall, ToolSpec, assistant, system, tool_result, user
from nightschool_server.config.config import Config
from nightschool_server.engine import Prompt
from nightschool_server.engines.model_folder import ModelFolder, read_model_folder
from nightschool_server.engines.rendering import Renderer, RenderingParts
from nightschool_server.errors import InvalidRequestError, NightschoolError
from nightschool_server.findings import Finding, State

ARGUMENT = "nightschool-check-argument"
ASKED = "nightschool-check-question"
SAID = "nightschool-check-result"
_IMAGE = "0" * 64
_REMEDY = "take the instruction-tuned version of the model, or give its folder a chat_template.jinja"


@dataclass(frozen=True)
class Subject:
    """What is looked at: an application with its tools, on a model."""

    app: App
    specs: tuple[ToolSpec, ...]
    config: Config
    folder: ModelFolder
    renderer: Renderer

    @property
    def opening(self) -> tuple[Message, ...]:
        """How a task begins."""
        return self.asked(ASKED)

    def asked(self, question: str) -> tuple[Message, ...]:
        """How a task with this question begins."""
        head = (system(self.app.system_prompt),) if self.app.system_prompt else ()
        return action_format(self.config.agent).begin((*head, user(question)), self.specs)

    def render(self, *messages: Message) -> str:
        """The messages as the model reads them. Raises InvalidRequestError where the template refuses them."""
        shown = action_format(self.config.agent).shown(self.specs)
        return self.renderer.text(Prompt(messages, shown))

    @property
    def call(self) -> ToolCall:
        """A call of the first tool."""
        return self._parsed().calls[0]

    @property
    def called(self) -> Message:
        """The step of the model that holds it."""
        parsed = self._parsed()
        return Message("assistant", parsed.calls) if parsed.as_parts else assistant(self._written())

    def _written(self) -> str:
        name = self.specs[0].name if self.specs else "look_up"
        return call_form(self.config.agent).write(name, {"key": ARGUMENT})

    def _parsed(self) -> ParsedAnswer:
        return call_form(self.config.agent).read(self._written(), self.specs)


def examine_model(app: App, specs: tuple[ToolSpec, ...], config: Config, *, has_images: bool) -> Iterator[Finding]:
    """What is to be said of the model for this application with these tools; `has_images` of its held-out tasks."""
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
    parts = RenderingParts(folder.tokenizer, folder.template, folder.image_token_id, folder.pictures, None)
    subject = Subject(app, specs, config, folder, Renderer(parts))
    for check in (_form, _prompt, _tools, _calls, _sent_calls, _results, _images, _tool_images):
        yield from _asked(check, subject)
    yield from _length(subject)


Answer = tuple[State, str] | None
"""None: there is nothing to ask."""


def _asked(check: Callable[[Subject], Answer], subject: Subject) -> Iterator[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        answer = check(subject)
    except InvalidRequestError as error:
        answer = ("no" if check in (_sent_calls, _tool_images) else "fault", str(error))
    if answer is not None:
        yield Finding("template", name, *answer)


def _form(subject: Subject) -> Answer:
    if subject.config.agent.action_format == "code":
        return "ok", "the model acts by writing Python (agent.action_format)"
    form, own = call_form(subject.config.agent), form_of_template(subject.folder.template)
    if form is not own and own is not HERMES:
        return "fault", f"agent.tool_call_format is {form.name}, but the template writes {own.name}: set it to auto"
    return "ok", f"calls are read as {form.name}"


def _prompt(subject: Subject) -> Answer:
    if subject.app.system_prompt.strip() not in subject.render(*subject.opening):
        return "fault", f"leaves the system prompt out: {_REMEDY}"
    return "ok", "shows the system prompt and the question"


def _tools(subject: Subject) -> Answer:
    if not subject.specs:
        return None
    text = subject.render(*subject.opening).replace(subject.app.system_prompt, "")
    if hidden := [spec.name for spec in subject.specs if spec.name not in text]:
        return "fault", f"does not show the model the tools {', '.join(hidden)}: {_REMEDY} that lists them"
    undescribed = any(spec.description not in text for spec in subject.specs)
    return "ok", f"shows all {len(subject.specs)} tools{', without their descriptions' if undescribed else ''}"


def _calls(subject: Subject) -> Answer:
    text = subject.render(*subject.opening, subject.called, tool_result(subject.call, SAID))
    if (subject.called.text or ARGUMENT) not in text:
        return "fault", f"changes the model's own call when it is shown again: {_REMEDY} that shows it as it is"
    return "ok", "shows the model's call as it wrote it"


def _sent_calls(subject: Subject) -> Answer:
    sent = Message("assistant", (Text(""), subject.call))
    if ARGUMENT not in subject.render(*subject.opening, sent, tool_result(subject.call, SAID)):
        return "no", "leaves out calls that a client sends as parts of a conversation: send them as text"
    return "ok", "shows calls that a client sends as parts"


def _results(subject: Subject) -> Answer:
    if SAID not in subject.render(*subject.opening, subject.called, tool_result(subject.call, SAID)):
        return "fault", f"leaves results of tools out, so the model never learns what a tool said: {_REMEDY}"
    return "ok", "shows results of tools"


def _images(subject: Subject) -> Answer:
    if (pictures := subject.folder.pictures) is None:
        return None
    if subject.render(*subject.opening[:-1], user(ASKED, [_IMAGE])).count(pictures.image_mark) != 1:
        return "fault", f"does not mark the place of an image with {pictures.image_mark!r}: {_REMEDY} that does"
    return "ok", "marks images"


def _tool_images(subject: Subject) -> Answer:
    if (pictures := subject.folder.pictures) is None:
        return None
    pictured = tool_result(subject.call, SAID, images=[_IMAGE])
    if subject.render(*subject.opening, subject.called, pictured).count(pictures.image_mark) != 1:
        return "no", "leaves images out that a tool gives back: let tools describe in words what is to be seen"
    return "ok", "marks images that a tool gives back"


def _length(subject: Subject) -> Iterator[Finding]:
    try:
        used = len(subject.renderer.tokenise(subject.render(*subject.asked("?"))))
    except InvalidRequestError:
        return  # Said above.
    context, answer = subject.folder.info.context_length, subject.config.agent.max_tokens
    left = context - used - answer
    text = f"system prompt and tools take {used:,} of {context:,} tokens, agent.max_tokens {answer:,}"
    if left <= 0:
        yield Finding("context", "", "fault", f"{text}: nothing is left for a task; shorten them")
    elif left < context // 4:
        yield Finding("context", "", "no", f"{text}: {left:,} are left for a task and its results; shorten them")
    else:
        yield Finding("context", "", "ok", f"{text}: {left:,} are left for a task and its results")
