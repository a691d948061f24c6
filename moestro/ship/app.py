"""The package server's REST interface (specification 8.3.1): an ASGI application over a store.

    make_app(store, settings) -> Gate      routes are listed once, below, for the router and for the OpenAPI document

Every handler checks a scope first. What waits for a disk or a database runs in threads.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from moestro.core.errors import AccessError, Error, FormatError, RefusalError
from moestro.package import canonical
from moestro.package.fields import Fields
from moestro.package.hashing import SIZE
from moestro.package.limits import MAX_CHUNK_BYTES, MAX_FILE_BYTES, MAX_JSON_INT, MAX_MANIFEST_BYTES
from moestro.package.paths import check_model_id
from moestro.package.sign import Trust
from moestro.ship import audit, catalogue, page
from moestro.ship.content import BlobAnswer, read_body
from moestro.ship.gate import Gate, Limiter, Remembered, require
from moestro.ship.metrics import Metrics
from moestro.ship.openapi import Operation, document
from moestro.ship.settings import ServerSettings
from moestro.ship.store import Blob, Store, Upload
from moestro.ship.tokens import Principal

logger = logging.getLogger("moestro.ship")
MAX_PUBLISH_BYTES = 5 * MAX_MANIFEST_BYTES
"""A manifest and its envelope, both in base64."""
MAX_SMALL_BODY = 1 << 16
MODES = frozenset({"exact", "qres"})
STATES = ("planned", "fetching", "complete", "verified", "patched", "active", "failed", "rolled-back")
"""Install states a device may report."""
IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Held:
    """A blob as requests need it."""

    blob: Blob
    leaves: bytes
    holders: tuple[str, ...]


class Handlers:
    """One method per operation."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self.store, self.settings = store, settings
        self.metrics = Metrics()
        self.trust = Trust.load(settings.trust) if settings.trust else None
        self._held: Remembered[str, Held] = Remembered(256)
        self._uploads: Remembered[str, tuple[Upload, bytes]] = Remembered(256)
        rate = settings.rates.bytes_per_s
        self.bandwidth = Limiter(rate, max(rate, 1 << 20)) if rate else None
        self.document: dict[str, Any] = {}

    async def _note(self, request: Request, action: str, target: str, work: Callable[[], Any]) -> Any:
        """Do something that the audit log shows, whether it succeeds or is refused."""

        def noted() -> Any:
            outcome = "failed"
            try:
                result = work()
                outcome = "done"
                return result
            except Error as error:
                outcome = f"refused: {error}"
                raise
            finally:
                address = request.client.host if request.client else "local"
                audit.record(self.store.db, _who(request).name, address, action, target, outcome)

        return await asyncio.to_thread(noted)

    # packages and models

    async def list_packages(self, request: Request) -> Response:
        """Packages that the token may read, with all their releases and models."""

        def table() -> list[dict[str, Any]]:
            names = [name for name in catalogue.packages(self.store) if _who(request).allows("read", name)]
            return [{"package_id": name, "releases": self._releases(name)} for name in names]

        return JSONResponse({"packages": await asyncio.to_thread(table)})

    def _releases(self, package_id: str) -> list[dict[str, Any]]:
        return [self._release(item) for item in catalogue.releases(self.store, package_id)]

    def _release(self, item: catalogue.Release) -> dict[str, Any]:
        names = ("model_id", "weights_root", "base", "chain", "mode", "info")
        models = [dict(zip(names, row, strict=True)) for row in catalogue.models(self.store, item)]
        return {**dataclasses.asdict(item), "models": models}

    async def list_models(self, request: Request) -> Response:
        """Models of the newest releases; `q` searches names, `limit` and `cursor` page."""
        query = request.query_params.get("q", "").lower()[:200]
        limit, start = _number(request, "limit", 100, 1, 1000), request.query_params.get("cursor", "")
        await asyncio.sleep(0)

        def found() -> list[dict[str, Any]]:
            rows = []
            for name in catalogue.packages(self.store):
                if name > start and _who(request).allows("read", name):
                    with contextlib.suppress(RefusalError):  # all releases revoked
                        rows += [{"package_id": name, **self._release(catalogue.head(self.store, name)[0])}]
            return [row for row in rows if query in str(row["models"]).lower() or query in row["package_id"].lower()]

        rows = await asyncio.to_thread(found)
        cursor = {"cursor": rows[limit - 1]["package_id"]} if len(rows) > limit else {}
        return JSONResponse({"models": rows[:limit], **cursor})

    async def model(self, request: Request) -> Response:
        """A model's management information and the releases it is in."""
        model_id = request.path_params["model_id"]

        def found() -> list[dict[str, Any]]:
            names = [name for name in catalogue.packages(self.store) if _who(request).allows("read", name)]
            releases = [release for name in names for release in self._releases(name)]
            return [item for item in releases if model_id in [model["model_id"] for model in item["models"]]]

        releases = await asyncio.to_thread(found)
        if not releases:
            raise RefusalError(f"there is no model {model_id[:130]}", 404)
        info = next(model["info"] for model in releases[0]["models"] if model["model_id"] == model_id)
        return JSONResponse({"managementinfo": info, "releases": releases})

    async def head(self, request: Request) -> Response:
        """The newest releases of a package; with an ETag, so that watching costs nothing."""
        package_id = _package(request, "read")
        items = await asyncio.to_thread(lambda: [self._release(i) for i in catalogue.head(self.store, package_id)])
        roots = ",".join(item["package_root"] for item in items)
        etag = f'"{hashlib.sha256(roots.encode()).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"ETag": etag})
        body = {"package_id": package_id, "sequence": items[0]["sequence"], "releases": items}
        return JSONResponse(body, headers={"ETag": etag, "Cache-Control": "no-cache"})

    async def manifest(self, request: Request) -> Response:
        """A release's manifest; the full package's unless `root` names another release of that sequence."""
        data, _ = await self._manifest(request)
        return Response(data, media_type="application/json", headers=IMMUTABLE)

    async def signature(self, request: Request) -> Response:
        """The DSSE envelope over the manifest."""
        _, envelope = await self._manifest(request)
        if envelope is None:
            raise RefusalError("this release is not signed", 404)
        return Response(envelope, media_type="application/json", headers=IMMUTABLE)

    async def _manifest(self, request: Request) -> tuple[bytes, bytes | None]:
        package_id, sequence = _package(request, "read"), _sequence(request)

        def found() -> tuple[bytes, bytes | None]:
            item = catalogue.release(self.store, package_id, sequence, request.query_params.get("root"))
            return catalogue.manifest_of(self.store, item)

        return await asyncio.to_thread(found)

    async def publish(self, request: Request) -> Response:
        """Make a release visible; all its files must be uploaded."""
        package_id = _package(request, "publish")
        body = await read_body(request, MAX_PUBLISH_BYTES, self.settings.stall_s)

        def work() -> tuple[catalogue.Release, bool]:
            fields = Fields(canonical.loads_loosely(body, MAX_PUBLISH_BYTES, "the request"), "the request")
            manifest = _decoded(fields.text("manifest", 2 * MAX_MANIFEST_BYTES))
            signature = _decoded(fields.text("signature", 4 * MAX_MANIFEST_BYTES)) if fields.has("signature") else None
            who = _who(request).name
            return catalogue.publish(self.store, manifest, signature, who, package_id, self.trust)

        release, is_new = await self._note(request, "publish", package_id, work)
        self.metrics.published.inc(is_new)
        return JSONResponse(dataclasses.asdict(release), 201 if is_new else 200)

    async def revoke(self, request: Request) -> Response:
        """Withdraw a sequence; it is answered with 410 from then on."""
        package_id, sequence = _package(request, "admin"), _sequence(request)
        work = lambda: catalogue.revoke(self.store, package_id, sequence)  # noqa: E731
        await self._note(request, "revoke", f"{package_id}/{sequence}", work)
        return Response(status_code=204)

    async def updates(self, request: Request) -> Response:
        """The cheapest residual updates from the weights `base` (repeatable) to the newest ones."""
        package_id = _package(request, "read")
        base = frozenset(request.query_params.getlist("base"))
        modes = frozenset(request.query_params.get("accept", "exact").split(",")) & MODES

        def found() -> dict[str, Any]:
            path = catalogue.best_updates(self.store, package_id, base, modes)
            if path is None:
                raise RefusalError(f"no residual update of {package_id} fits this base; take the full package", 404)
            full = [item.size for item in catalogue.head(self.store, package_id) if item.kind == catalogue.FULL]
            steps = [dataclasses.asdict(step.release) for step in path.steps]
            return {"steps": steps, "bytes": path.size, "full_bytes": min(full, default=None)}

        return JSONResponse(await asyncio.to_thread(found))

    async def transfer(self, request: Request) -> Response:
        """What a device at sequence `base` would transfer to reach `target`: whole, by chunks, by residuals."""
        package_id = _package(request, "read")
        base, target = (_number(request, name, 0, 1, MAX_JSON_INT) for name in ("base", "target"))
        route = await asyncio.to_thread(catalogue.transfer, self.store, package_id, base, target, MODES)
        return JSONResponse(
            {
                "full_bytes": route.full_bytes,
                "chunk_bytes": route.chunk_bytes,
                "update_bytes": route.update_bytes,
                "updates": [{"sequence": item.sequence, "bytes": item.size} for item in route.updates],
            }
        )

    # content

    async def blob(self, request: Request) -> Response:
        """A file by its root; ranges are served."""
        held = await self._readable(request)
        bucket = self.bandwidth.bucket(_client(request)) if self.bandwidth else None
        answer: Any = BlobAnswer(
            self.store, held.blob, held.leaves, bucket, self.metrics, stall_s=self.settings.stall_s
        )
        return answer

    async def leaves(self, request: Request) -> Response:
        """The leaf hashes of a file's chunks, joined."""
        held = await self._readable(request)
        headers = {**IMMUTABLE, "X-Chunk-Size": str(held.blob.chunk_size), "X-Hash": held.blob.hash}
        return Response(held.leaves, media_type="application/octet-stream", headers=headers)

    async def _readable(self, request: Request) -> Held:
        root = request.path_params["root"]
        held = self._held.get(root)
        if held is None:
            held = await asyncio.to_thread(self._look_up, root)
            self._held.put(root, held)
        if not any(_who(request).allows("read", name) for name in held.holders):
            if _who(request).name == "anonymous":
                raise AccessError("files need a token; give one with --token-file")
            raise RefusalError(f"there is no file {root[:64]}", 404)  # whether it exists elsewhere stays hidden
        return held

    def _look_up(self, root: str) -> Held:
        blob = self.store.blob(root)
        if blob is None:
            raise RefusalError(f"there is no file {root[:64]}", 404)
        return Held(blob, self.store.leaves(blob), tuple(self.store.holders(root)))

    # uploads

    async def open_upload(self, request: Request) -> Response:
        """Begin or go on with the upload of a file into a package."""
        fields = Fields(await self._json(request), "the request")
        package_id = check_model_id(fields.text("package_id"), "package_id")
        require(_who(request), "publish", package_id)
        size, chunk_size = fields.whole("size", 0, MAX_FILE_BYTES), fields.whole("chunk_size", 1, MAX_CHUNK_BYTES)
        blob = Blob(fields.hex32("root"), size, fields.text("hash"), chunk_size)
        fields.finish()
        upload = await asyncio.to_thread(self.store.open_upload, package_id, blob, _who(request).name)
        if upload is None:
            raise RefusalError(f"{package_id} holds {blob.root[:16]} already", 409)
        state = await asyncio.to_thread(self._state, upload)
        return JSONResponse(state, 201, {"Location": f"/v1/uploads/{upload.id}"})

    async def declare(self, request: Request) -> Response:
        """Say the leaf hashes of all chunks; those held already need not be sent."""
        upload = await self._upload(request)
        leaves = await read_body(request, upload.blob.num_chunks * SIZE, self.settings.stall_s)
        await asyncio.to_thread(self.store.declare, upload, leaves)
        return JSONResponse(await asyncio.to_thread(self._state, self.store.upload(upload.id)))

    async def upload_state(self, request: Request) -> Response:
        """Which chunks are there."""
        return JSONResponse(await asyncio.to_thread(self._state, await self._upload(request)))

    async def put_chunk(self, request: Request) -> Response:
        """One chunk; it counts once its digest is right, and may be sent again."""
        upload_id, number = request.path_params["upload_id"], int(request.path_params["number"])
        known = self._uploads.get(upload_id)
        if known is None:
            upload = await self._upload(request)
            if not upload.declared:
                raise RefusalError("the upload's leaves are not declared yet", 409)
            known = upload, await asyncio.to_thread(self.store.leaves, upload.blob)
            self._uploads.put(upload_id, known)
        require(_who(request), "publish", known[0].package_id)
        data = await read_body(request, known[0].blob.chunk_size, self.settings.stall_s)
        stated = request.headers.get("content-digest")
        try:
            if stated is not None and stated != content_digest(data):
                raise RefusalError("the chunk is not what Content-Digest says; send it again", 422)
            await asyncio.to_thread(self.store.put_chunk, known[0], number, data, known[1])
        except RefusalError as error:
            self.metrics.bad_chunks.inc(error.status == 422)
            raise
        self.metrics.received.inc(len(data))
        return Response(status_code=204)

    async def commit(self, request: Request) -> Response:
        """The file is complete: the package holds it."""
        upload = await self._upload(request)
        blob = await asyncio.to_thread(self.store.commit, upload.id)
        return JSONResponse({"root": blob.root, "size": blob.size})

    async def _upload(self, request: Request) -> Upload:
        upload = await asyncio.to_thread(self.store.upload, request.path_params["upload_id"])
        require(_who(request), "publish", upload.package_id)
        return upload

    def _state(self, upload: Upload) -> dict[str, Any]:
        bits = bytearray(-(-upload.blob.num_chunks // 8))
        for number in self.store.present(upload):
            bits[number // 8] |= 1 << number % 8
        present = base64.b64encode(bits).decode()
        return {"id": upload.id, "declared": upload.declared, "chunks": upload.blob.num_chunks, "present": present}

    async def _json(self, request: Request) -> Any:
        body = await read_body(request, MAX_SMALL_BODY, self.settings.stall_s)
        return canonical.loads_loosely(body, MAX_SMALL_BODY, "the request")

    # devices and care

    async def report(self, request: Request) -> Response:
        """What a device installed, or why not."""
        device_id = check_model_id(request.path_params["device_id"], "device_id")
        fields = Fields(await self._json(request), "the report")
        package_id = check_model_id(fields.text("package_id"), "package_id")
        require(_who(request), "read", package_id)
        state = fields.text("state")
        if state not in STATES:
            raise RefusalError(f"state is {state[:30]!r}; it must be one of {', '.join(STATES)}", 422)
        sequence = fields.whole("sequence", 1, MAX_JSON_INT)
        root = fields.hex32("weights_root") if fields.has("weights_root") else None
        fields.finish()
        await asyncio.to_thread(catalogue.note_report, self.store, device_id, package_id, sequence, state, root)
        self.metrics.reports.labels(state).inc()
        return Response(status_code=202)

    async def devices(self, request: Request) -> Response:
        """The newest report of each device, of packages that the token administers."""
        rows = await asyncio.to_thread(catalogue.reports, self.store)
        return JSONResponse({"devices": [row for row in rows if _who(request).allows("admin", row["package_id"])]})

    async def audit_log(self, request: Request) -> Response:
        """The newest lines of the audit log, and whether its chain of digests holds."""
        _admin(request)
        limit = _number(request, "limit", 1000, 1, 100_000)
        lines = await asyncio.to_thread(audit.lines, self.store.db, limit)
        return JSONResponse({"lines": lines, "broken_at": await asyncio.to_thread(audit.check, self.store.db)})

    async def collect(self, request: Request) -> Response:
        """Collect garbage now."""
        _admin(request)
        done = await self._note(request, "collect", "store", lambda: self.store.collect(self.settings.collect_grace_s))
        self.metrics.collected_now(done.num_bytes)
        return JSONResponse(dataclasses.asdict(done))

    async def health(self, request: Request) -> Response:
        """200 while the database answers."""
        await asyncio.to_thread(self.store.db.value, "SELECT 1")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_document(self, request: Request) -> Response:
        """This interface, described."""
        return JSONResponse(self.document)


def content_digest(data: bytes) -> str:
    """The Content-Digest header of RFC 9530, with SHA-256."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def _who(request: Request) -> Principal:
    principal: Principal = request.scope["principal"]
    return principal


def _client(request: Request) -> str:
    who = _who(request)
    return f"token {who.name}" if who.name != "anonymous" else str(request.client and request.client.host)


def _package(request: Request, action: str) -> str:
    package_id = check_model_id(request.path_params["package_id"], "package_id")
    require(_who(request), action, package_id)
    return package_id


def _admin(request: Request) -> None:
    if not _who(request).is_admin:
        require(_who(request), "admin", "the whole store")


def _sequence(request: Request) -> int:
    number: int = request.path_params["sequence"]
    if number > MAX_JSON_INT:
        raise RefusalError("there is no such release; sequences are below 2^53", 404)
    return number


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not text.isascii() or len(text) > 17 or not least <= int(text) <= most:
        raise RefusalError(f"{name} is {text[:30]!r}; it must be a whole number in {least}..{most}", 400)
    return int(text)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("the request holds what is not base64") from error


def operations(handlers: Handlers) -> list[Operation]:
    """The whole interface."""
    own = handlers
    package, sequence = "/v1/packages/{package_id}", "{sequence:int}"
    upload = "/v1/uploads/{upload_id}"
    return [
        Operation("GET", "/v1/models", own.list_models, query=("q", "limit", "cursor")),
        Operation("GET", "/v1/models/{model_id}", own.model),
        Operation("GET", "/v1/packages", own.list_packages),
        Operation("GET", package, own.head, errors=(404,)),
        Operation("POST", package, own.publish, status=201, body="json", errors=(403, 409, 413, 422)),
        Operation("GET", f"{package}/transfer", own.transfer, query=("base", "target"), errors=(404, 410)),
        Operation("GET", f"{package}/{sequence}/manifest", own.manifest, query=("root",), errors=(404, 410)),
        Operation("GET", f"{package}/{sequence}/manifest.sig", own.signature, query=("root",), errors=(404, 410)),
        Operation("DELETE", f"{package}/{sequence}", own.revoke, status=204, errors=(403, 404)),
        Operation("GET", "/v1/updates/{package_id}", own.updates, query=("base", "accept"), errors=(404,)),
        Operation("GET", "/v1/blobs/{root}", own.blob, answer="bytes", errors=(404, 416)),
        Operation("HEAD", "/v1/blobs/{root}", own.blob, answer="bytes", errors=(404, 416)),
        Operation("GET", "/v1/blobs/{root}/chunks", own.leaves, answer="bytes", errors=(404,)),
        Operation("POST", "/v1/uploads", own.open_upload, status=201, body="json", errors=(403, 409, 413, 429)),
        Operation("GET", upload, own.upload_state, errors=(403, 404)),
        Operation("PUT", f"{upload}/leaves", own.declare, body="bytes", errors=(403, 404, 413, 422)),
        Operation(
            "PUT", upload + "/{number:int}", own.put_chunk, status=204, body="bytes", errors=(403, 404, 409, 413, 422)
        ),
        Operation("POST", f"{upload}:commit", own.commit, errors=(403, 404, 409)),
        Operation("POST", "/v1/devices/{device_id}/reports", own.report, status=202, body="json", errors=(403, 422)),
        Operation("GET", "/v1/devices", own.devices),
        Operation("GET", "/v1/audit", own.audit_log, query=("limit",), errors=(403,)),
        Operation("POST", "/v1/collect", own.collect, errors=(403,)),
        Operation("GET", "/healthz", own.health, open=True),
        Operation("GET", "/metrics", own.show_metrics, answer="text", open=True),
        Operation("GET", "/openapi.json", own.show_document, open=True),
    ]


def make_app(store: Store, settings: ServerSettings) -> Gate:
    """The application; it collects garbage in the background while it runs."""
    handlers = Handlers(store, settings)
    listed = operations(handlers)
    handlers.document = document(listed)
    routes = [Route(item.path, item.handler, methods=[item.method]) for item in listed] + page.routes()

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        collecting = asyncio.create_task(_collect_now_and_then(handlers))
        yield
        collecting.cancel()

    return Gate(
        Router(routes, redirect_slashes=False, lifespan=lifespan), store, settings.rates, settings.public,
        handlers.metrics,
    )  # fmt: skip


async def _collect_now_and_then(handlers: Handlers) -> None:
    while True:
        await asyncio.sleep(handlers.settings.collect_every_s)
        try:
            done = await asyncio.to_thread(handlers.store.collect, handlers.settings.collect_grace_s)
            handlers.metrics.collected_now(done.num_bytes)
        except Error:
            logger.exception("garbage collection failed; it will be tried again")
