"""The methods of the wire that this client calls, each with its path and its two message types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message as ProtoMessage
from nightschool_proto.v1 import admin_pb2, agent_pb2

Req = TypeVar("Req", bound=ProtoMessage)
Res = TypeVar("Res", bound=ProtoMessage)
Req_contra = TypeVar("Req_contra", bound=ProtoMessage, contravariant=True)
Res_co = TypeVar("Res_co", bound=ProtoMessage, covariant=True)


@dataclass(frozen=True)
class Method(Generic[Req, Res_co]):
    """One RPC."""

    path: str
    request: type[Req]
    response: type[Res_co]

    @property
    def name(self) -> str:
        """`Generate` of `/nightschool.v1.AgentService/Generate`."""
        return self.path.rpartition("/")[2]


_AGENT = "/nightschool.v1.AgentService"
_ADMIN = "/nightschool.v1.AdminService"

GENERATE = Method(f"{_AGENT}/Generate", agent_pb2.GenerateRequest, agent_pb2.GenerateResponse)
STREAM_GENERATE = Method(f"{_AGENT}/StreamGenerate", agent_pb2.GenerateRequest, agent_pb2.StreamGenerateResponse)
SCORE = Method(f"{_AGENT}/Score", agent_pb2.ScoreRequest, agent_pb2.ScoreResponse)
RUN_TASK = Method(f"{_AGENT}/RunTask", agent_pb2.RunTaskRequest, agent_pb2.RunTaskResponse)
RECORD_FEEDBACK = Method(f"{_AGENT}/RecordFeedback", agent_pb2.RecordFeedbackRequest, agent_pb2.RecordFeedbackResponse)
UPLOAD_BLOB = Method(f"{_AGENT}/UploadBlob", agent_pb2.UploadBlobRequest, agent_pb2.UploadBlobResponse)
DOWNLOAD_BLOB = Method(f"{_AGENT}/DownloadBlob", agent_pb2.DownloadBlobRequest, agent_pb2.DownloadBlobResponse)
LIST_MODELS = Method(f"{_AGENT}/ListModels", agent_pb2.ListModelsRequest, agent_pb2.ListModelsResponse)

GET_STATUS = Method(f"{_ADMIN}/GetStatus", admin_pb2.GetStatusRequest, admin_pb2.GetStatusResponse)
LIST_ADAPTERS = Method(f"{_ADMIN}/ListAdapters", admin_pb2.ListAdaptersRequest, admin_pb2.ListAdaptersResponse)
GET_ADAPTER = Method(f"{_ADMIN}/GetAdapter", admin_pb2.GetAdapterRequest, admin_pb2.Adapter)
IMPORT_ADAPTER = Method(f"{_ADMIN}/ImportAdapter", admin_pb2.ImportAdapterRequest, admin_pb2.Adapter)
PROMOTE_ADAPTER = Method(f"{_ADMIN}/PromoteAdapter", admin_pb2.PromoteAdapterRequest, admin_pb2.RouteChange)
ROLLBACK_ADAPTER = Method(f"{_ADMIN}/RollbackAdapter", admin_pb2.RollbackAdapterRequest, admin_pb2.RouteChange)
REJECT_ADAPTER = Method(f"{_ADMIN}/RejectAdapter", admin_pb2.RejectAdapterRequest, admin_pb2.Adapter)
DELETE_ADAPTER = Method(f"{_ADMIN}/DeleteAdapter", admin_pb2.DeleteAdapterRequest, admin_pb2.DeleteAdapterResponse)
TRIGGER_CYCLE = Method(f"{_ADMIN}/TriggerCycle", admin_pb2.TriggerCycleRequest, admin_pb2.Cycle)
LIST_CYCLES = Method(f"{_ADMIN}/ListCycles", admin_pb2.ListCyclesRequest, admin_pb2.ListCyclesResponse)
GET_CYCLE = Method(f"{_ADMIN}/GetCycle", admin_pb2.GetCycleRequest, admin_pb2.Cycle)
WATCH_CYCLE = Method(f"{_ADMIN}/WatchCycle", admin_pb2.WatchCycleRequest, admin_pb2.Cycle)
GET_CYCLE_REPORT = Method(f"{_ADMIN}/GetCycleReport", admin_pb2.GetCycleReportRequest, admin_pb2.GetCycleReportResponse)
CANCEL_CYCLE = Method(f"{_ADMIN}/CancelCycle", admin_pb2.CancelCycleRequest, admin_pb2.Cycle)
PAUSE_LEARNER = Method(f"{_ADMIN}/PauseLearner", admin_pb2.PauseLearnerRequest, admin_pb2.LearnerStatus)
RESUME_LEARNER = Method(f"{_ADMIN}/ResumeLearner", admin_pb2.ResumeLearnerRequest, admin_pb2.LearnerStatus)
SLEEP_ENGINE = Method(f"{_ADMIN}/SleepEngine", admin_pb2.SleepEngineRequest, admin_pb2.SleepEngineResponse)
EXPORT_RUN = Method(f"{_ADMIN}/ExportRun", admin_pb2.ExportRunRequest, admin_pb2.ExportRunResponse)
LIST_TASKS = Method(f"{_ADMIN}/ListTasks", admin_pb2.ListTasksRequest, admin_pb2.ListTasksResponse)
LIST_PAIRS = Method(f"{_ADMIN}/ListPairs", admin_pb2.ListPairsRequest, admin_pb2.ListPairsResponse)
GET_PAIR = Method(f"{_ADMIN}/GetPair", admin_pb2.GetPairRequest, admin_pb2.PairDetail)
EXPORT_PAIRS = Method(f"{_ADMIN}/ExportPairs", admin_pb2.ExportPairsRequest, admin_pb2.ExportPairsResponse)
FORGET_USER = Method(f"{_ADMIN}/ForgetUser", admin_pb2.ForgetUserRequest, admin_pb2.ForgetUserResponse)
