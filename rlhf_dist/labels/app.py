"""The labelling page and what it asks for, over HTTP. Every error is JSON {"detail": text, "why": word}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message as Event, Receive, Scope, Send

from rlhf_dist.errors import InputError, RlhfError
from rlhf_dist.labels.access import Guest, Guests
from rlhf_dist.labels.leases import LabelQueue, Lease, NotTaken, Said
from rlhf_dist.labels.overview import overview
from rlhf_dist.labels.store import LabelStore
from rlhf_dist.scoring.bound_server import counted

COMMENT_CHARACTERS = 2000
REQUEST_BYTES = 64 * 2**10
PAGES = {
    "/": ("index.html", "text/html"),
    "/overview": ("overview.html", "text/html"),
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/judging.js": ("judging.js", "text/javascript"),
    "/shared.js": ("shared.js", "text/javascript"),
    "/overview.js": ("overview.js", "text/javascript"),
}
"""Address -> file in `page/` and its kind. Nothing else is served."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
WHY = {401: "token", 403: "owner", 413: "large"}
STATUS = {"gone": 410, "other": 403, "late": 409, "judged": 409, "nothing": 409}
TOO_LARGE = f"the request has more than {REQUEST_BYTES >> 10} KiB; nothing was saved. A shorter comment will do"


class Decision(BaseModel):
    """What POST /api/decide takes."""

    model_config = ConfigDict(extra="forbid")
    key: Annotated[str, Field(max_length=100)]
    verdict: StrictStr | StrictInt | list[StrictInt]
    comment: str = ""
    flags: list[Literal["spam", "unsafe", "unrankable"]] = []

    def said(self) -> Said:
        """Raises InputError for a comment that cannot be stored."""
        if len(self.comment) > COMMENT_CHARACTERS:
            raise InputError(
                f"the comment has {len(self.comment):,} characters, at most {COMMENT_CHARACTERS:,} are kept; nothing "
                "was saved: shorten it"
            )
        try:
            self.comment.encode()
        except UnicodeEncodeError:
            raise InputError("the comment holds half a character; nothing was saved: write it again") from None
        return Said(self.verdict, self.comment, tuple(self.flags))


class Named(BaseModel):
    """What POST /api/undo (a decision) and /api/renew (a lease) take."""

    model_config = ConfigDict(extra="forbid")
    key: Annotated[str, Field(max_length=100)]


def entered(request: Request, authorization: Annotated[str, Header()] = "") -> Guest:
    """Who asks. Answers 401 where the token is missing or wrong."""
    guests: Guests = request.app.state.guests
    found = guests.who(authorization.removeprefix("Bearer "))
    if found is None:
        what = "this token is not known (any more)" if authorization else "there is no token"
        raise HTTPException(401, f"{what}: open the whole address that `rlhf-dist label serve` printed for you")
    return found


Entered = Annotated[Guest, Depends(entered)]


class Guarded:
    """No large request, and headers that keep a browser from running or showing anything else. ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > REQUEST_BYTES:
            answer = JSONResponse({"detail": TOO_LARGE, "why": "large"}, 413)
            await answer(scope, receive, _with_headers(send))
            return
        await self._app(scope, counted(receive, REQUEST_BYTES, TOO_LARGE), _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def sending(event: Event) -> None:
        if event["type"] == "http.response.start":
            more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            event = {**event, "headers": [*event["headers"], *more]}
        await send(event)

    return sending


def make_app(store: LabelStore, queue: LabelQueue, guests: Guests) -> FastAPI:
    """The page for those with a token, and the overview for the owner."""
    app = FastAPI(openapi_url=None)  # no pages beside these
    app.state.guests = guests
    app.add_middleware(Guarded)
    _add_pages(app)
    _add_errors(app)

    def page(who: Guest, lease: Lease | None, **more: Any) -> dict[str, Any]:
        return {
            "labeller": who.name,
            "owner": who.owner,
            "item": None if lease is None else asdict(lease),
            "progress": asdict(queue.progress(who.name)),
            "comment_characters": COMMENT_CHARACTERS,
            **more,
        }

    @app.post("/api/next")
    def ask(who: Entered) -> dict[str, Any]:
        return page(who, queue.ask(who.name))

    @app.post("/api/decide")
    def decide(decision: Decision, who: Entered) -> dict[str, Any]:
        return page(who, queue.decide(who.name, decision.key, decision.said()))

    @app.post("/api/undo")
    def undo(decision: Named, who: Entered) -> dict[str, Any]:
        lease, said = queue.undo(who.name, decision.key)
        return page(who, lease, said=asdict(said))

    @app.post("/api/renew")
    def renew(lease: Named, who: Entered) -> dict[str, float]:
        return {"seconds": queue.renew(who.name, lease.key)}

    @app.get("/api/overview")
    def see(who: Entered) -> Mapping[str, Any]:
        if not who.owner:
            raise HTTPException(403, "the overview names models, so it is for the owner's token only")
        return overview(store)

    return app


def _add_pages(app: FastAPI) -> None:
    folder = files("rlhf_dist.labels") / "page"

    def serve(name: str, kind: str) -> Callable[[], Response]:
        text = (folder / name).read_text(encoding="utf-8")
        return lambda: Response(text, media_type=kind)

    for address, (name, kind) in PAGES.items():
        app.get(address)(serve(name, kind))


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, text: str, why: str) -> JSONResponse:
        return JSONResponse({"detail": text.encode(errors="replace").decode(), "why": why}, status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:5]]
        return answer(422, "; ".join(problems), "invalid")

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), WHY.get(error.status_code, "nothing"))

    @app.exception_handler(RlhfError)
    def failed(_: Request, error: RlhfError) -> JSONResponse:
        if isinstance(error, NotTaken):
            return answer(STATUS[error.why], str(error), error.why)
        return answer(422 if isinstance(error, InputError) else 500, str(error), "invalid")

    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> JSONResponse:  # it is logged with its traceback as well
        return answer(500, f"the server failed: {type(error).__name__}; nothing was saved", "broken")
