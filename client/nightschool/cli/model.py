"""`generate`, `run`, `feedback` and `models`: what applications do, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nightschool.cli.output import json_option, note, when, write_json, write_json_line, write_table
from nightschool.cli.root import Target
from nightschool.client import Client
from nightschool.content import Reply, TaskEvent, TaskResult, ToolCalled, ToolReturned
from nightschool.options import GenerateOptions

image_option = click.option(
    "--image", "images", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An image in front of the prompt; may be repeated.",
)  # fmt: skip
file_option = click.option(
    "--file", "files", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file for the task's tools, in its workspace; may be repeated.",
)  # fmt: skip
adapter_option = click.option("--adapter", help='Pin the call to an adapter, "base" for none.')
session_option = click.option("--session", "session_id", help="Calls of one session keep one adapter.")
learning_option = click.option(
    "--learning", type=click.Choice(["train", "log_only", "no_log"]), help="What the server may do with it afterwards."
)
timeout_option = click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="Default: 120.")


@click.command(epilog="Example: nightschool generate --stream 'Write one word.'")
@click.argument("prompt")
@image_option
@click.option("--stream", is_flag=True, help="Write the text as it is sampled.")
@click.option("--max-tokens", type=int, help="Tokens of one answer.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("-n", "n", type=int, help="Answers to sample.")
@adapter_option
@session_option
@learning_option
@timeout_option
@json_option
@click.pass_obj
def generate(target: Target, /, *, prompt: str, stream: bool, as_json: bool, **options: object) -> None:
    """Call the model once. PROMPT - reads it from stdin."""
    given: GenerateOptions = {key: value for key, value in options.items() if value is not None}  # type: ignore[assignment]
    text = sys.stdin.read() if prompt == "-" else prompt
    with target.client() as client:
        if stream:
            _stream(client, text, given, as_json=as_json)
            return
        reply = client.generate(text, **given)
    if as_json:
        write_json(reply)
        return
    for answer in reply.answers:
        click.echo(answer.text)
    _note_reply(reply)


def _stream(client: Client, text: str, options: GenerateOptions, *, as_json: bool) -> None:
    stream = client.stream(text, **options)
    if as_json:
        for event in stream.events():
            write_json_line({"event": type(event).__name__.lower(), **vars(event)})
        return
    for piece in stream:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    _note_reply(stream.reply)


def _note_reply(reply: Reply) -> None:
    note(f"{reply.response_id}: adapter {reply.adapter}, {reply.usage.completion_tokens} tokens")


@click.command(epilog="Example: nightschool run 'How much are 3 mugs?'")
@click.argument("task")
@image_option
@file_option
@click.option(
    "--save-to", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder for files given back."
)
@click.option("--max-steps", type=int, help="Default: the server's limit.")
@click.option("--max-tokens", type=int, help="Tokens of one step.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@adapter_option
@session_option
@learning_option
@timeout_option
@json_option
@click.pass_obj
def run(target: Target, /, *, task: str, save_to: Path | None, as_json: bool, **options: object) -> None:
    """Let the server's agent do TASK with the application's tools; TASK - reads it from stdin."""
    text = sys.stdin.read() if task == "-" else task
    result: TaskResult | None = None
    with target.client() as client:
        given = {key: value for key, value in options.items() if value is not None}
        for event in client.run_task(text, **given):  # type: ignore[arg-type]
            _note_event(event)
            if isinstance(event, TaskResult):
                result = event
        if result is not None and save_to is not None:
            for file in result.files:
                note(f"saved {client.download(file, save_to)}")
    if result is None:
        raise click.ClickException("the server ended the task without a result: see its log")
    if as_json:
        write_json(result)
        return
    click.echo(result.answer)
    note(f"{result.response_id}: adapter {result.adapter}, {result.outcome} after {result.num_steps} steps")


def _note_event(event: TaskEvent) -> None:
    if isinstance(event, ToolCalled):
        note(f"-> {event.call.name} {event.call.arguments_json}")
    elif isinstance(event, ToolReturned):
        mark = "!!" if event.result.is_error else "<-"
        note(f"{mark} {event.result.name} {event.result.content[:200]}")


@click.command(epilog="Example: nightschool feedback resp_01h455vb4pex --bad --correction '27.00'")
@click.argument("response_id")
@click.option("--good/--bad", "good", default=None, help="Whether the answer was right.")
@click.option("--score", type=float, help="How right it was, from 0 to 1.")
@click.option("--comment", default="", help="Why.")
@click.option("--correction", default="", help="What the answer should have been.")
@json_option
@click.pass_obj
def feedback(
    target: Target,
    *,
    response_id: str,
    good: bool | None,
    score: float | None,
    comment: str,
    correction: str,
    as_json: bool,
) -> None:
    """Say what became of an answer."""
    if good is None and score is None and not comment and not correction:
        raise click.UsageError("nothing said: give --good, --bad, --score, --comment or --correction")
    with target.client() as client:
        feedback_id = client.feedback(response_id, good=good, score=score, comment=comment, correction=correction)
    if as_json:
        write_json({"feedback_id": feedback_id, "response_id": response_id})
    else:
        click.echo(feedback_id)


@click.command(epilog="Example: nightschool models --json")
@json_option
@click.pass_obj
def models(target: Target, *, as_json: bool) -> None:
    """List the base model and its servable adapters."""
    with target.client() as client:
        found = client.models()
    if as_json:
        write_json(found)
        return
    rows = [[model.name, "active" if model.active else "", model.base_model, when(model.created_at)] for model in found]
    write_table(["name", "", "base model", "created"], rows)
