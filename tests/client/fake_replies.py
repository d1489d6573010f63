"""What the scripted server says: plausible answers to every method, and pieces to script others from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2

from tests.client.fake_server import WAIT_S, FakeServer, Step


def usage() -> content_pb2.Usage:
    return content_pb2.Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=1)


def answer(text: str, index: int = 0) -> content_pb2.Answer:
    return content_pb2.Answer(index=index, text=text, finish_reason=content_pb2.STOP)


def text_of(request: agent_pb2.GenerateRequest) -> str:
    return "".join(part.text for part in request.messages[-1].parts)


def _generate(request: agent_pb2.GenerateRequest, context: grpc.ServicerContext) -> agent_pb2.GenerateResponse:
    n = request.sampling.n or 1
    answers = [answer(f"echo {text_of(request)}", index) for index in range(n)]
    return agent_pb2.GenerateResponse(response_id="resp_1", adapter="3-abcdef01", answers=answers, usage=usage())


def stream_events(text: str) -> Iterator[agent_pb2.StreamGenerateResponse]:
    """The events of one answer, a word each."""
    make = agent_pb2.StreamGenerateResponse
    yield make(started=agent_pb2.Started(response_id="resp_1", adapter="3-abcdef01"))
    for word in text.split():
        yield make(delta=agent_pb2.Delta(index=0, text=f"{word} "))
    yield make(finished=answer(f"{text} "))
    yield make(usage=usage())


def endless_stream(request: Any, context: grpc.ServicerContext) -> Iterator[agent_pb2.StreamGenerateResponse]:
    """One word, then nothing until the call ends."""
    ended = threading.Event()
    context.add_callback(ended.set)
    yield agent_pb2.StreamGenerateResponse(started=agent_pb2.Started(response_id="resp_1", adapter="base"))
    yield agent_pb2.StreamGenerateResponse(delta=agent_pb2.Delta(text="first"))
    ended.wait(WAIT_S)


def task_script(*calls: content_pb2.ToolCall, server: FakeServer | None = None) -> Step:
    """A task that asks the client for each call, then answers with the results it got."""

    def step(requests: Iterator[agent_pb2.RunTaskRequest], context: grpc.ServicerContext) -> Iterator[Any]:
        make = agent_pb2.RunTaskResponse
        start = next(requests).start
        yield make(started=agent_pb2.Started(response_id="resp_t", adapter="3-abcdef01"))
        yield make(delta=agent_pb2.Delta(text="thinking"))
        results = []
        for call in calls:
            yield make(tool_call=call)
            yield make(tool_request=call)
            result = next(requests).tool_result
            results.append(result)
            if server is not None:
                server.tool_results.append(result)
            yield make(tool_result=result)
        said = ", ".join(result.content for result in results) or f"echo {start.messages[-1].parts[-1].text}"
        turn = content_pb2.Message(role=content_pb2.Message.ASSISTANT, parts=[content_pb2.Part(text=said)])
        yield make(
            finished=agent_pb2.TaskFinished(
                outcome=agent_pb2.TaskFinished.ANSWERED,
                answer=said,
                num_steps=len(calls) + 1,
                usage=usage(),
                messages=[turn],
            )
        )

    return step


def pair_detail() -> admin_pb2.PairDetail:
    """A pair that the critic decided."""
    said = content_pb2.Message(role=content_pb2.Message.USER, parts=[content_pb2.Part(text="What is [b]1+1[/b]?")])
    return admin_pb2.PairDetail(
        pair=admin_pb2.Pair(id="pair_1", cycle_id="cyc_1", task_id="task_1", kind="both_ran", margin=1.5),
        messages=[said],
        chosen=admin_pb2.PairSide(text="2", num_samples=3, logprob=-0.5, token_ids=[5]),
        rejected=admin_pb2.PairSide(text="[3]", num_samples=1, logprob=-2.5, token_ids=[6, 7]),
        verdicts=[admin_pb2.PairVerdict(chosen_first=True, verdict="first", margin=1.5, raw="A")],
        task_prompt="What is 1+1?",
        seed_request_ids=["resp_1"],
        sampled_by="base",
        decided_by="judge",
        trained="3-abcdef01",
    )


def cycle(state: admin_pb2.Cycle.State.ValueType = admin_pb2.Cycle.PROMOTED, num_done: int = 10) -> admin_pb2.Cycle:
    """A cycle with two stages."""
    ended = state not in (admin_pb2.Cycle.RUNNING, admin_pb2.Cycle.QUEUED)
    stages = [
        admin_pb2.Stage(name="seeds", state=admin_pb2.Stage.DONE, num_done=5, num_total=5, counts={"kept": 5}),
        admin_pb2.Stage(
            name="explore",
            state=admin_pb2.Stage.DONE if ended else admin_pb2.Stage.RUNNING,
            num_done=num_done,
            num_total=10,
            rate_per_s=2.0,
            eta_s=3.0,
        ),
    ]
    made = admin_pb2.Cycle(id="cyc_1", state=state, trigger="manual", stages=stages, incumbent="base")
    made.created_at.FromJsonString("2026-01-02T03:04:05Z")
    if ended:
        made.candidate = "4-00ff00ff"
        made.outcome = "the gate passed: 62.5% to 94.0%"
        made.evaluation.CopyFrom(
            admin_pb2.Evaluation(
                id="eval_1", candidate="4-00ff00ff", incumbent="base", n=400, incumbent_success=0.625,
                candidate_success=0.94, interval_low=0.26, interval_high=0.37, interval_level=0.95, p_value=1e-9,
                num_gained=130, num_lost=4, passed=True, reasons=["held: significance: p below 0.001"],
                set_digest="5e7d1935" * 8, set_version=2, detectable=0.07, notes=["the evaluation set changed"],
                families=[
                    admin_pb2.FamilyResult(
                        family="stock", n=50, incumbent_success=0.5, candidate_success=0.9, num_gained=20,
                        p_value=2e-6, non_inferiority_p=1e-9, provable=True,
                    )
                ],
                rules=[
                    admin_pb2.GateRule(
                        name="significance", held=True, value=1e-9, threshold=0.01, text="p below 0.001", decides=True
                    ),
                    admin_pb2.GateRule(name="pass@2", held=False, value=0.1, threshold=0.0, text="narrowed"),
                ],
                sampled=admin_pb2.SampledResult(
                    num_tasks=64, num_draws=2, temperature=1.0, reading="narrowed",
                    incumbent=admin_pb2.Spread(pass_at=[0.5, 0.8], distinct_answers=1.5, distinct_actions=1.9),
                    candidate=admin_pb2.Spread(pass_at=[0.7, 0.7], distinct_answers=1.1, distinct_actions=1.2),
                ),
            )
        )  # fmt: skip
    return made


def adapter(name: str = "4-00ff00ff", state: admin_pb2.Adapter.State.ValueType = admin_pb2.Adapter.ACTIVE) -> Any:
    made = admin_pb2.Adapter(
        name=name, state=state, parent="base", cycle_id="cyc_1", rank=64, alpha=16, size_bytes=4096
    )
    made.created_at.FromJsonString("2026-01-02T03:04:05Z")
    return made


def _paged(make_response: Callable[[list[Any], str], Any], rows: list[Any]) -> Step:
    """Two rows a page, whatever page_size says."""

    def step(request: Any, context: grpc.ServicerContext) -> Any:
        start = int(request.page_token or 0)
        following = start + 2
        return make_response(rows[start:following], str(following) if following < len(rows) else "")

    return step


def _status(request: Any, context: grpc.ServicerContext) -> admin_pb2.GetStatusResponse:
    return admin_pb2.GetStatusResponse(
        version="0.1.0", base_model="tiny", engine="transformers", healthy=True, active_adapter="4-00ff00ff",
        requests_served=5_000_000_000, learner=admin_pb2.LearnerStatus(running=True, current_cycle="cyc_1"),
        engine_status=admin_pb2.EngineStatus(num_running=1, num_waiting=2, merged_adapter="4-00ff00ff"),
    )  # fmt: skip


def _route(request: Any, context: grpc.ServicerContext) -> admin_pb2.RouteChange:
    return admin_pb2.RouteChange(active_adapter="4-00ff00ff", previous_adapter="base", duration_s=0.25)


DEFAULTS: dict[str, Step] = {
    "Generate": _generate,
    "Score": lambda request, context: agent_pb2.ScoreResponse(
        adapter=request.adapter or "base",
        tokens=content_pb2.Tokens(ids=[1, 2], logprobs=[-0.5, -1.5]),
        num_prompt_tokens=len(request.messages),
    ),
    "StreamGenerate": lambda request, context: stream_events(f"echo {text_of(request)}"),
    "RunTask": task_script(),
    "RecordFeedback": lambda request, context: agent_pb2.RecordFeedbackResponse(feedback_id="fb_1"),
    "ListModels": _paged(
        lambda rows, token: agent_pb2.ListModelsResponse(models=rows, next_page_token=token),
        [agent_pb2.Model(name=name, base_model="tiny", active=name == "base") for name in ("base", "1-a", "2-b")],
    ),
    "GetStatus": _status,
    "ListAdapters": _paged(
        lambda rows, token: admin_pb2.ListAdaptersResponse(adapters=rows, next_page_token=token),
        [adapter(), *(adapter(f"{n}-11111111", admin_pb2.Adapter.RETIRED) for n in (3, 2, 1))],
    ),
    "GetAdapter": lambda request, context: adapter(request.name),
    "ImportAdapter": lambda request, context: adapter("5-22222222", admin_pb2.Adapter.CANDIDATE),
    "PromoteAdapter": _route,
    "RollbackAdapter": _route,
    "DeleteAdapter": lambda request, context: admin_pb2.DeleteAdapterResponse(),
    "TriggerCycle": lambda request, context: cycle(admin_pb2.Cycle.QUEUED, 0),
    "ListCycles": _paged(
        lambda rows, token: admin_pb2.ListCyclesResponse(cycles=rows, next_page_token=token), [cycle()]
    ),
    "GetCycle": lambda request, context: cycle(),
    "WatchCycle": lambda request, context: iter([cycle(admin_pb2.Cycle.RUNNING, n) for n in (1, 5, 9)] + [cycle()]),
    "GetCycleReport": lambda request, context: iter(
        [
            admin_pb2.GetCycleReportResponse(chunk=chunk)
            for chunk in ((b'{"cycle": ', b'{"id": "cyc_1"}}') if request.format == 2 else (b"<!DOCTYPE ", b"html>"))
        ]
    ),
    "CancelCycle": lambda request, context: cycle(admin_pb2.Cycle.CANCELLED),
    "PauseLearner": lambda request, context: admin_pb2.LearnerStatus(running=True, paused=True),
    "ResumeLearner": lambda request, context: admin_pb2.LearnerStatus(running=True),
    "ListTasks": _paged(
        lambda rows, token: admin_pb2.ListTasksResponse(tasks=rows, next_page_token=token),
        [
            admin_pb2.Task(
                id=f"task_{n}",
                cycle_id="cyc_1",
                prompt=f"What is {n}+1?",
                state="kept",
                origins=[admin_pb2.FileOrigin(name="sold.csv", type="csv", source="made", num_attempts=2)],
                verification=admin_pb2.Verification(verdict="repair", reason="vague", original_prompt="Sum it")
                if n
                else None,
            )
            for n in range(3)
        ],
    ),
    "ListPairs": _paged(
        lambda rows, token: admin_pb2.ListPairsResponse(pairs=rows, next_page_token=token),
        [admin_pb2.Pair(id=f"pair_{n}", cycle_id="cyc_1", step=n, kind="both_ran", margin=1.5) for n in range(3)],
    ),
    "GetPair": lambda request, context: pair_detail(),
    "ExportPairs": lambda request, context: iter(
        [
            admin_pb2.ExportPairsResponse(chunk=b'{"prompt": 1}\n'),
            admin_pb2.ExportPairsResponse(chunk=b'{"prompt": 2}\n'),
        ]
    ),
    "SleepEngine": lambda request, context: iter([admin_pb2.SleepEngineResponse(seconds_asleep=n) for n in (0.5, 1.5)]),
    "ExportRun": lambda request, context: iter(
        [admin_pb2.ExportRunResponse(cycle_id="cyc_1", chunk=chunk) for chunk in (b"tar", b"ball")]
    ),
    "ForgetUser": lambda request, context: admin_pb2.ForgetUserResponse(num_requests=12),
}
