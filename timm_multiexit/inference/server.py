"""An HTTP server for an exported folder: images in, answers in JSON, and its numbers for Prometheus."""
import asyncio
import logging
import time
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any, AsyncIterator, ContextManager, Dict, List, Protocol, Tuple

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from ..errors import InputError
from ..stopping.config import ExitConfig
from ..stopping.monitor import ExitMonitor
from ..stopping.policy import ExitPolicy
from .batch_loop import Answers
from .device import FolderEngine, preprocess
from .images import check_sent
from .segment_queues import QueueFull

_logger = logging.getLogger('timm_multiexit.serve')
MAX_FILES = 64  # in one request
MAX_BODIES = 50  # of the largest size, held at once


class Guard:
    """ASGI middleware: a body of more than `max_bytes` ends in status 413, not kept, and one beyond `MAX_BODIES` such
    bodies in 503; the status of answers is counted.

    Callers that leave, and requests that an ending server cancels, are no errors.
    """

    def __init__(self, app: Any, max_bytes: int, requests: Counter):
        self.app, self.max_bytes, self.requests, self.held = app, max_bytes, requests, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        read, kept, started = 0, 0, False

        async def limited() -> Any:
            nonlocal read, kept
            message = await receive()
            size = len(message.get('body', b''))
            read += size
            full = self.held + size > MAX_BODIES * self.max_bytes
            if full or read > self.max_bytes:
                # A caller that still sends would see a broken connection in place of the answer.
                while message.get('more_body') and read < 10 * self.max_bytes:
                    message = await receive()
                    read += len(message.get('body', b''))
                if read > self.max_bytes:
                    raise HTTPException(413, f'more than {self.max_bytes:,} bytes: send smaller or fewer images')
                raise HTTPException(503, 'too many bytes are queued: try again later', {'Retry-After': '1'})
            kept, self.held = kept + size, self.held + size
            return message

        async def counted(message: Any) -> None:
            nonlocal started
            if message['type'] == 'http.response.start':
                started = True
                if scope['path'] == '/classify':
                    self.requests.labels(str(message['status'])).inc()
            await send(message)

        try:
            await self.app(scope, limited, counted)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not started:
                await JSONResponse(dict(detail='the server ends'), 503)(scope, receive, counted)
        finally:
            self.held -= kept


class Metrics:
    """What /metrics tells."""

    def __init__(self, queues: 'Queues', exit_macs: Tuple[int, ...]):
        self.registry = registry = CollectorRegistry()
        self.exit_macs = exit_macs
        self.requests = Counter('multiexit_requests', 'Requests by status', ['status'], registry=registry)
        self.images = Counter('multiexit_images', 'Images answered, by exit', ['exit'], registry=registry)
        self.macs = Counter('multiexit_macs', 'Multiply-adds of the images answered', registry=registry)
        self.seconds = Histogram('multiexit_seconds', 'From image to answer, with decoding', registry=registry)
        waiting = Gauge('multiexit_waiting_images', 'Images that are decoded, wait or run', registry=registry)
        waiting.set_function(lambda: queues.images)
        for k in range(len(exit_macs)):
            self.images.labels(str(k + 1))

    def count(self, exit_index: int, seconds: float) -> None:
        self.images.labels(str(exit_index + 1)).inc()
        self.macs.inc(self.exit_macs[exit_index])
        self.seconds.observe(seconds)


class Queues(Protocol):
    """What runs the images: `segment_queues.SegmentQueues` in this process, `on_ray.RayQueues` in others."""

    engine: FolderEngine
    rule: ExitPolicy
    images: int

    def places(self, count: int) -> ContextManager[None]: ...

    async def answer(self, image: np.ndarray) -> Answers: ...

    def close(self) -> None: ...


def make_app(queues: Queues, config: ExitConfig, max_bytes: int = 20_000_000) -> FastAPI:
    """The ASGI app; the queues are closed with it.

    POST /classify takes an image as the body, or several as the files of a form, and answers with the records of
    `device.classify`: one, or a list. Of several, those that are no images have an `error`; alone that is status 422.

    Args:
        queues: Run the images; above their limit, status 503.
        config: Exit config of the folder, with scores.
        max_bytes: Largest request; above it, status 413.
    """
    engine = queues.engine
    metrics, monitor = Metrics(queues, config.exit_macs), ExitMonitor(config, queues.rule)
    names = config.names_of(engine.num_classes)
    how = engine.graphs['preprocessing']
    decoding = asyncio.Semaphore(4)  # bounds the memory that it takes

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queues.close)

    app = FastAPI(title='timm-multiexit', docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def read(data: bytes) -> Any:
        check_sent(BytesIO(data))
        return preprocess(BytesIO(data), how)

    async def answer(name: str, data: bytes) -> Dict[str, Any]:
        start = time.perf_counter()
        async with decoding:
            image, notes = await asyncio.to_thread(read, data)
        found = await queues.answer(image)
        k = int(found.exit_index[0])
        metrics.count(k, time.perf_counter() - start)
        before = monitor.warning
        monitor.update(found.exit_index)
        if monitor.warning and monitor.warning != before:
            _logger.warning(monitor.warning)
        return dict(image=name, notes=notes, label=names[int(found.prediction[0])],
                    probability=float(found.confidence[0]), exit=k + 1, macs=config.exit_macs[k])

    async def answer_or_error(name: str, data: bytes) -> Dict[str, Any]:
        try:
            return await answer(name, data)
        except InputError as error:
            return dict(image=name, error=str(error))

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> Response:
        return JSONResponse(dict(detail=str(error)), 503, headers={'Retry-After': '1'})

    @app.exception_handler(InputError)
    async def bad(_: Request, error: InputError) -> Response:
        return JSONResponse(dict(detail=str(error)), 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        metrics.requests.labels('500').inc()  # sent outside of Guard
        return JSONResponse(dict(detail='the server failed: its log says why'), 500)

    @app.post('/classify')
    async def classify(request: Request) -> Any:
        if request.headers.get('content-type', '').startswith('multipart/form-data'):
            async with request.form(max_files=MAX_FILES, max_fields=MAX_FILES) as form:
                files: List[UploadFile] = [f for _, f in form.multi_items() if isinstance(f, UploadFile)]
                images = [(file.filename or '', await file.read()) for file in files]
            if not images:
                raise InputError('no files in the form: send images')
            with queues.places(len(images)):
                return await asyncio.gather(*(answer_or_error(*image) for image in images))
        body = await request.body()
        with queues.places(1):
            return await answer('', body)

    @app.get('/health')
    async def health() -> Dict[str, Any]:
        return dict(status='ok', images=monitor.images, waiting=queues.images)

    @app.get('/metrics')
    async def numbers() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type='text/plain; version=0.0.4')

    app.add_middleware(Guard, max_bytes=max_bytes, requests=metrics.requests)
    return app
