"""What a running server is made of, handed whole to the servicers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nightschool_server.adapters.registry import AdapterRegistry
from nightschool_server.agent.formats import ActionFormat
from nightschool_server.agent.toolbox import Toolbox
from nightschool_server.app import App
from nightschool_server.auth import Tokens
from nightschool_server.config.config import Config
from nightschool_server.counters import Counters
from nightschool_server.engine import Engine
from nightschool_server.home import Home
from nightschool_server.image_check import ImageLimits
from nightschool_server.service.images import Images
from nightschool_server.store.request_log import RequestLog
from nightschool_server.store.store import Store


@dataclass(frozen=True)
class Runtime:
    """The parts, each started; who made them closes them."""

    home: Home
    config: Config
    store: Store
    tokens: Tokens
    engine: Engine
    registry: AdapterRegistry
    request_log: RequestLog
    images: Images
    app: App | None
    """None: no system prompt and no tools of the server's own."""
    tools: Toolbox
    """The application's tools, open; empty without one."""
    action_format: ActionFormat
    """How the model writes actions, and what runs them."""
    counters: Counters
    started_at: float = field(default_factory=time.time)

    @property
    def image_limits(self) -> ImageLimits:
        """What one request may bring."""
        return image_limits_of(self.config)


def image_limits_of(config: Config) -> ImageLimits:
    """What one request, and one call of a tool, may bring."""
    log = config.log
    return ImageLimits(log.max_images_per_request, log.max_image_bytes, log.max_image_pixels)
