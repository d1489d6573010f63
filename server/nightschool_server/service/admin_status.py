"""GetStatus: the server as a whole, put together from what every part says of itself."""

from __future__ import annotations

from nightschool_proto.v1 import admin_pb2

from nightschool_server.distribution import version
from nightschool_server.runtime import Runtime
from nightschool_server.service.wire_replies import timestamp


def status_of(runtime: Runtime, learner: admin_pb2.LearnerStatus) -> admin_pb2.GetStatusResponse:
    """The status; a few counts in the database, no wait."""
    model, engine, counts = runtime.engine.model, runtime.engine.stats(), runtime.request_log.counts()
    return admin_pb2.GetStatusResponse(
        version=version(),
        base_model=model.name,
        base_model_digest=model.digest,
        engine=runtime.engine.kind,
        healthy=runtime.engine.healthy(),
        started_at=timestamp(runtime.started_at),
        active_adapter=runtime.registry.active,
        previous_adapter=runtime.registry.previous,
        engine_status=admin_pb2.EngineStatus(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_generated_tokens=engine.num_generated_tokens,
            num_prompt_tokens=engine.num_prompt_tokens,
            num_cached_tokens=engine.num_cached_tokens,
            loaded_adapters=engine.adapters,
            merged_adapter=engine.merged,
            busy_s=engine.busy_s,
        ),
        log=admin_pb2.LogStatus(
            num_requests=counts.num_requests,
            num_feedback=counts.num_feedback,
            num_dropped=counts.num_dropped,
            queue_length=counts.queue_length,
            redacts=runtime.config.log.redact,
        ),
        learner=learner,
        home=str(runtime.home.path),
        requests_served=runtime.counters.num_served,
        requests_failed=runtime.counters.num_failed,
        chat_template_digest=runtime.engine.model.chat_template_digest,
    )
