"""The rewards of a config behind HTTP, for runs elsewhere. `http_client.py` is the other side."""

from __future__ import annotations

import hmac
import logging
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_dist.errors import DataError, RlhfError
from rlhf_dist.scoring.bound_server import counted
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.scoring.scorer import Scorer
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.types import Message

REQUEST_BYTES = 16 * 2**20
REQUEST_RESPONSES = 4096
LOG = logging.getLogger("uvicorn.error")
"""The server's own, which prints."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Text


class ScoreRequest(BaseModel):
    """What POST /score takes: lists of one length."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[Text]
    """Texts of the last user turns."""
    responses: Annotated[list[Text], Field(max_length=REQUEST_RESPONSES)]
    answers: list[Text] = []
    """What rules compare with; left out: none."""
    conversations: list[Annotated[list[Turn], Field(min_length=1)]] = []
    """Whole conversations before the responses, for reward models; left out: one user turn, the prompt."""
    ended: list[bool] = []
    """False for responses that were cut; left out: all came to their end."""

    @model_validator(mode="after")
    def _one_length(self) -> ScoreRequest:
        n = len(self.responses)
        for name in ("prompts", "answers", "conversations", "ended"):
            given = len(getattr(self, name))
            if given != n and (given or name == "prompts"):
                raise ValueError(f"{given} {name} for {n} responses")
        return self

    def texts(self) -> Texts:
        """As the scorer takes them."""
        n = len(self.responses)
        conversations = [tuple(Message(t.role, t.content) for t in turns) for turns in self.conversations]
        return Texts(
            prompts=tuple(self.prompts),
            responses=tuple(self.responses),
            answers=tuple(self.answers) or ("",) * n,
            conversations=tuple(conversations or ((Message("user", prompt),) for prompt in self.prompts)),
            ended=tuple(self.ended) or (True,) * n,
        )


class Door:
    """Lets a request in: with the right token where one is set, and not too large. ASGI, before anything is parsed."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._expected and not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            problem, status = "this server wants its token, as in Authorization: Bearer TOKEN", 401
        elif int(headers.get(b"content-length", b"0")) > REQUEST_BYTES:
            problem, status = _TOO_LARGE, 413
        else:
            await self._app(scope, counted(receive, REQUEST_BYTES, _TOO_LARGE), send)
            return
        await JSONResponse({"detail": problem}, status)(scope, receive, send)


_TOO_LARGE = f"the request has more than {REQUEST_BYTES >> 20} MiB; send fewer responses at once"


def make_app(scorer: Scorer, token: str) -> FastAPI:
    """POST /score and GET /health; every error is JSON {"detail": text}. `token`: empty for none."""
    app = FastAPI(openapi_url=None)  # no pages beside the two

    @app.post("/score")
    def score(request: ScoreRequest) -> dict[str, Any]:
        if not request.responses:
            return {"scores": [], "components": {}}
        scores = scorer.score_texts(request.texts())
        if scores.non_finite:
            LOG.warning(told(scores.non_finite, scorer.policy))
        return {
            "scores": scores.total.tolist(),  # NaN and infinity are written as null
            "components": {name: values.tolist() for name, values in scores.components.items()},
        }

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:5]]
        return JSONResponse({"detail": "; ".join(problems).encode(errors="replace").decode()}, 422)

    @app.exception_handler(RlhfError)
    def failed(_: Request, error: RlhfError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422 if isinstance(error, DataError) else 500)

    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> JSONResponse:  # it is logged with its traceback as well
        return JSONResponse({"detail": f"the server failed: {type(error).__name__}"}, 500)

    app.add_middleware(Door, token=token)
    return app
