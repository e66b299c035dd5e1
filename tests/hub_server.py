"""A small Hub on a real socket, for the real client: repositories with commits, LFS, and faults on demand."""
import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import uvicorn
from huggingface_hub import ModelCard
from huggingface_hub.utils.sha import git_hash
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

LFS_SUFFIXES = ('.safetensors', '.png', '.bin')


@dataclass
class Fault:
    """A fault for requests whose 'METHOD path' matches.

    Attributes:
        pattern: Regular expression.
        status: HTTP status to answer with, and `headers`; or 'down' (the server stops), 'truncate' (half the body,
            then the connection closes), 'corrupt' (one byte is flipped), 'hang' (no answer).
        times: How often.
    """

    pattern: str
    status: Any
    times: int = 1000
    headers: Dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    oid: str
    message: str
    files: Dict[str, Tuple[str, bool]]  # path -> (hash in the store, whether LFS)


@dataclass
class Repository:
    kind: str
    private: bool
    branches: Dict[str, List[Commit]]


class HubServer:
    """Starts on a free port and keeps it over `stop` and `start`; `requests` lists 'METHOD path' in order."""

    token = 'hf_' + 'a1B2' * 8

    def __init__(self):
        self.repositories: Dict[str, Repository] = {}
        self.objects: Dict[str, bytes] = {}  # by git hash or SHA-256
        self.faults: List[Fault] = []
        self.requests: List[str] = []
        self.hooks: Dict[str, Callable[[], None]] = {}  # by pattern; called after such a request was answered
        self.port = 0
        self.app = Starlette(routes=self._routes())
        self.start()

    # Life

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def start(self) -> None:
        config = uvicorn.Config(
            self._entry, '127.0.0.1', self.port, log_level='critical', lifespan='off', interface='asgi3')
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < deadline, 'the server does not start'
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def recover(self) -> None:
        """Clears the faults and restarts the server if it is down."""
        self.faults.clear()
        if self.server.should_exit:
            self.thread.join(10)
            self.start()

    def reset(self) -> None:
        """Empties and restarts the server."""
        self.repositories.clear()
        self.objects.clear()
        self.requests.clear()
        self.hooks.clear()
        self.recover()

    def commits(self, name: str, branch: str = 'main') -> List[Commit]:
        return self.repositories[name].branches[branch]

    def contents(self, name: str, branch: str = 'main') -> Dict[str, bytes]:
        """The files of a branch by path."""
        return {path: self.objects[oid] for path, (oid, _) in self.commits(name, branch)[-1].files.items()}

    def put(self, name: str, files: Dict[str, bytes], branch: str = 'main') -> None:
        """Commits exactly these files, as if someone had pushed them."""
        repository = self.repositories.setdefault(name, Repository('model', False, {'main': [_first_commit()]}))
        stored = {path: (self._store(content, path), _is_lfs(path)) for path, content in files.items()}
        self._add_commit(repository.branches[branch], 'put', stored)

    # Requests

    async def _entry(self, scope, receive, send) -> None:
        """Records the request and applies a fault, or lets the app answer."""
        if scope['type'] != 'http':
            return
        what = f"{scope['method']} {scope['path']}"
        self.requests.append(what)
        fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, what)), None)
        if fault is None:
            await self.app(scope, receive, send)
            for pattern, hook in self.hooks.items():
                if re.search(pattern, what):
                    hook()
            return
        fault.times -= 1
        if fault.status == 'down':
            await self._go_down(scope)
        elif fault.status == 'hang':
            await asyncio.sleep(600)
        elif isinstance(fault.status, int):
            while (await receive()).get('more_body'):
                pass
            await JSONResponse({'error': 'a fault'}, fault.status, fault.headers)(scope, receive, send)
        else:
            await self.app(scope, receive, _damaged(send, fault.status))

    async def _go_down(self, scope) -> None:
        self.server.should_exit = self.server.force_exit = True
        for listening in self.server.servers:
            listening.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def _routes(self) -> List[Route]:
        repo = '/api/{kind:str}s/{org}/{name}'
        return [
            Route('/api/repos/create', self.create, methods=['POST']),
            Route('/api/validate-yaml', self.validate, methods=['POST']),
            Route(f'{repo}/branch/{{branch}}', self.branch, methods=['POST']),
            Route(f'{repo}/preupload/{{rev}}', self.preupload, methods=['POST']),
            Route(f'{repo}/commit/{{rev}}', self.commit, methods=['POST']),
            Route(f'{repo}/revision/{{rev}}', self.info),
            Route(f'{repo}/tree/{{rev}}', self.tree),
            Route(repo, self.info),
            Route('/{org}/{name}.git/info/lfs/objects/batch', self.lfs_batch, methods=['POST']),
            Route('/{kind:str}/{org}/{name}.git/info/lfs/objects/batch', self.lfs_batch, methods=['POST']),
            Route('/lfs/{oid}', self.lfs_put, methods=['PUT']),
            Route('/{org}/{name}/resolve/{rev}/{path:path}', self.resolve, methods=['GET', 'HEAD']),
        ]

    def _allowed(self, request: Request) -> bool:
        return request.headers.get('authorization') == f'Bearer {self.token}'

    def _find(self, request: Request) -> Tuple[Optional[Repository], Optional[Commit], Optional[Response]]:
        parameters = request.path_params
        repository = self.repositories.get(f"{parameters['org']}/{parameters['name']}")
        if repository is None or (repository.private and not self._allowed(request)):
            return None, None, _error(404, 'RepoNotFound', 'Repository not found')
        revision = parameters.get('rev', 'main')
        if revision in repository.branches:
            return repository, repository.branches[revision][-1], None
        for commits in repository.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return repository, commit, None
        return repository, None, _error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')

    async def create(self, request: Request) -> Response:
        if not self._allowed(request):
            return _error(401, None, 'Invalid credentials in Authorization header')
        body = await request.json()
        name = f"{body['organization']}/{body['name']}"
        if name in self.repositories:
            return JSONResponse({'error': 'You already created this repo', 'url': f'{self.url}/{name}'}, 409)
        private = body.get('visibility') == 'private' or bool(body.get('private'))
        self.repositories[name] = Repository(body.get('type') or 'model', private, {'main': [_first_commit()]})
        prefix = 'spaces/' if body.get('type') == 'space' else ''
        return JSONResponse({'url': f'{self.url}/{prefix}{name}', 'name': name, 'id': name})

    async def validate(self, request: Request) -> Response:
        body = await request.json()
        try:
            data = ModelCard(body['content'], ignore_metadata_errors=False).data.to_dict()
        except Exception as error:
            return JSONResponse({'errors': [{'message': str(error)}], 'warnings': []}, 400)
        missing = [k for k in ('license', 'model-index', 'pipeline_tag') if not data.get(k)]
        if body['repoType'] == 'space':
            missing = [k for k in ('sdk', 'title') if not data.get(k)]
        if missing:
            return JSONResponse({'errors': [{'message': f'"{m}" is required'} for m in missing], 'warnings': []}, 400)
        return JSONResponse({'errors': [], 'warnings': []})

    async def branch(self, request: Request) -> Response:
        repository, commit, error = self._find(request)
        if error is not None:
            return error
        branch = request.path_params['branch']
        if branch in repository.branches:
            return JSONResponse({'error': 'Reference already exists'}, 409)
        repository.branches[branch] = list(repository.branches['main'])
        return JSONResponse({})

    async def info(self, request: Request) -> Response:
        repository, commit, error = self._find(request)
        if error is not None:
            return error
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        return JSONResponse({
            'id': name, 'modelId': name, 'private': repository.private, 'sha': commit.oid, 'tags': [], 'downloads': 0,
            'likes': 0, 'siblings': [{'rfilename': path} for path in commit.files]})

    async def tree(self, request: Request) -> Response:
        _, commit, error = self._find(request)
        if error is not None:
            return error
        entries = []
        for path, (oid, lfs) in commit.files.items():
            content = self.objects[oid]
            entry = {'type': 'file', 'path': path, 'size': len(content), 'oid': git_hash(content)}
            if lfs:
                entry['lfs'] = {'oid': oid, 'size': len(content), 'pointerSize': 130}
            entries.append(entry)
        return JSONResponse(entries)

    async def preupload(self, request: Request) -> Response:
        _, commit, error = self._find(request)
        if error is not None:
            return error
        files = []
        for f in (await request.json())['files']:
            mode = 'lfs' if _is_lfs(f["path"]) else 'regular'
            files.append({'path': f['path'], 'uploadMode': mode, 'shouldIgnore': False,
                          'oid': commit.files.get(f['path'], (None,))[0]})
        return JSONResponse({'files': files})

    async def lfs_batch(self, request: Request) -> Response:
        objects = []
        for o in (await request.json())['objects']:
            entry = {'oid': o['oid'], 'size': o['size']}
            if o['oid'] not in self.objects:
                entry['actions'] = {'upload': {'href': f"{self.url}/lfs/{o['oid']}"}}
            objects.append(entry)
        return JSONResponse({'transfer': 'basic', 'objects': objects})

    async def lfs_put(self, request: Request) -> Response:
        content = await request.body()
        oid = request.path_params['oid']
        if hashlib.sha256(content).hexdigest() != oid:
            return JSONResponse({'error': 'content does not match its hash'}, 400)
        self.objects[oid] = content
        return Response()

    async def commit(self, request: Request) -> Response:
        if not self._allowed(request):
            return _error(401, None, 'Invalid credentials in Authorization header')
        repository, head, error = self._find(request)
        if error is not None:
            return error
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]['value']
        if header.get('parentCommit') not in (None, head.oid):
            return JSONResponse({'error': 'The branch was updated since you opened this'}, 412)
        files = dict(head.files)
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = self._store(base64.b64decode(value['content']), '.txt'), False
            elif line['key'] == 'lfsFile':
                if value['oid'] not in self.objects:
                    return JSONResponse({'error': f"LFS object {value['oid']} was not uploaded"}, 400)
                files[value['path']] = value['oid'], True
            else:
                del files[value['path']]
        commits = repository.branches[request.path_params['rev']]
        self._add_commit(commits, header['summary'], files)
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        return JSONResponse({
            'success': True, 'commitOid': commits[-1].oid, 'commitUrl': f'{self.url}/{name}/commit/{commits[-1].oid}'})

    async def resolve(self, request: Request) -> Response:
        _, commit, error = self._find(request)
        if error is not None:
            return error
        path = request.path_params['path']
        if path not in commit.files:
            return _error(404, 'EntryNotFound', 'Entry not found', {'X-Repo-Commit': commit.oid})
        oid, _ = commit.files[path]
        content = self.objects[oid]
        headers = {'X-Repo-Commit': commit.oid, 'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'}
        if request.method == 'HEAD':
            return Response(headers={**headers, 'Content-Length': str(len(content))})
        wanted = re.fullmatch(r'bytes=(\d+)-', request.headers.get('range', ''))
        if wanted:
            start = int(wanted[1])
            headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            return Response(content[start:], 206, headers)
        return Response(content, headers=headers)

    def _store(self, content: bytes, path: str) -> str:
        lfs = _is_lfs(path) and path != '.txt'
        oid = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
        self.objects[oid] = content
        return oid

    def _add_commit(self, commits: List[Commit], message: str, files: Dict[str, Tuple[str, bool]]) -> None:
        seed = json.dumps([commits[-1].oid, message, sorted(files.items())])
        commits.append(Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files))


def _first_commit() -> Commit:
    return Commit(hashlib.sha1(b'first').hexdigest(), 'initial commit', {})


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _error(status: int, code: Optional[str], message: str, headers: Optional[Dict[str, str]] = None) -> Response:
    codes = {'X-Error-Code': code} if code else {}
    return JSONResponse({'error': message}, status, {**codes, 'X-Error-Message': message, **(headers or {})})


def _damaged(send, how: str):
    """`send` of a response whose body arrives damaged."""
    async def damaged(message) -> None:
        body = message.get('body', b'')
        if message['type'] == 'http.response.body' and body:
            if how == 'truncate':
                await send({**message, 'body': body[:len(body) // 2], 'more_body': True})
                raise ConnectionResetError('cut off')  # the server then closes the connection
            turned = bytearray(body)
            turned[len(body) // 2] ^= 255
            message = {**message, 'body': bytes(turned)}
        await send(message)
    return damaged
