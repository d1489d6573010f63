"""Settings of a task's files and of its verifier: who plans, describes, finds, makes and checks them.

Owns the sections beneath `[learner.synthesize]`; what every role has is in `roles.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nightschool_server.config.roles import EndpointConfig, Positive, RoleConfig, RoleSection, Share, require_named

Temperature = Annotated[float, Field(ge=0, le=4)]


class CaptionerConfig(RoleConfig):
    """Who says what is in a picture, so that it can be found. Text files are found by their first text."""

    max_tokens: Positive = 96
    """Of a caption."""


class EmbedderConfig(RoleSection):
    """How a plan's description is held against what is there."""

    kind: Literal["lexical", "endpoint"] = "lexical"
    """`lexical`: words and parts of words that both have, rare ones counting more. `endpoint`: vectors of another
    model, from an OpenAI-compatible `/embeddings`."""
    endpoint: EndpointConfig = EndpointConfig()

    @model_validator(mode="after")
    def _endpoint_is_named(self) -> Self:
        require_named(self.kind, self.endpoint)
        return self


class FileMakerConfig(RoleConfig):
    """Who writes the programs that make files. They run in the sandbox of code actions, under `agent.code`."""

    max_attempts: Positive = 3
    """Programs for one file, each after the fault of the one before, before the draft is dropped as `unmade`."""
    max_tokens: Positive = 1500
    """Of one program."""
    temperature: Temperature = 0.7
    max_file_bytes: Positive = 4 * 2**20
    """Of a made file."""


class FilesConfig(RoleSection):
    """The files that a task plans: pictures that the assistant is shown, and files in its workspace."""

    enabled: bool = False
    """The writer plans files. Off: a task takes the pictures and files of its examples. Needs the sandbox, and
    `pip install 'nightschool[files]'`."""
    max_files: Positive = 2
    """Of one task."""
    max_blobs: Positive = 500
    """Pictures and files of the cycle's seeds that can be found, the first ones where there are more."""
    top_k: Positive = 3
    """How many of the most similar ones may stand in for a planned file; the first that is not used up is taken."""
    min_similarity: Share = 0.2
    """Cosine below which nothing was found. Vectors of an endpoint want more, 0.5 for a beginning."""
    max_reuse: Positive = 3
    """Kept tasks of a cycle that one picture or file may be in."""
    captioner: CaptionerConfig = CaptionerConfig()
    embedder: EmbedderConfig = EmbedderConfig()
    maker: FileMakerConfig = FileMakerConfig()


class VerifierConfig(RoleConfig):
    """Who looks at a task with its files before it is kept."""

    enabled: bool = False
    """Ask a model whether the task can be done with what is there: it keeps, repairs or drops it."""
    on_unreadable: Literal["drop", "keep"] = "drop"
    """What becomes of a task where the verifier gave no answer that can be read."""
    max_tokens: Positive = 256
    """Of its answer."""
    max_chars: Annotated[int, Field(ge=100)] = 2000
    """Of the text of one file that it is shown."""
    shows_images: bool = True
    """Whether it is shown pictures. False for one that reads text alone."""
