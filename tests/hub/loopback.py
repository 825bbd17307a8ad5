"""A Hub on the loopback interface, of the standard library alone, for the real client of huggingface_hub.

It keeps repositories of commits in memory and speaks what the client speaks: create, branches, preupload, LFS batches,
ndjson commits, listings, resolve with ranges. Any answer can be made to fail: `hub.fault(...)`.
"""
import base64
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional, Union
from urllib.parse import unquote, urlsplit

# What the client sends as its token; its shape is that of a real one, so that what looks for tokens finds it.
TOKEN = 'hf_' + 'LoopbackOnly0123456789abcdefghijkl'
# As the Hub decides: small text is a regular file, everything else is large.
_REGULAR = ('.md', '.json', '.yaml', '.csv', '.txt', '.gitattributes')


@dataclass
class Fault:
    """What an answer does instead of what it should.

    Args:
        method: HTTP method.
        path: Regular expression that is searched in the path.
        times: How many answers it takes.
        status: Answer with this status.
        headers: Headers of that answer.
        cut: Send half of the body of the real answer, and close.
        drop: Close without an answer; of an upload, after half of what the client sends.
        serve: Answer as usual, but with this body.
    """
    method: str
    path: str
    times: int = 1_000_000
    status: Optional[int] = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    drop: bool = False
    serve: Optional[bytes] = None

    def takes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""
    content: bytes
    large: bool = False

    @property
    def etag(self) -> str:
        """SHA-256 of a large file, else git's hash of the blob."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


class Repo:
    """The commits of a repository, and its branches."""

    def __init__(self, private: bool = False):
        self.private = private
        self.commits = {}
        self.refs = {'main': self.add({}, 'initial commit')}

    def add(self, files: dict[str, Blob], message: str) -> str:
        listing = json.dumps([len(self.commits), message, {k: v.etag for k, v in files.items()}], sort_keys=True)
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, files)
        return oid

    def find(self, revision: str) -> Optional[Commit]:
        return self.commits.get(self.refs.get(revision, revision))


class LoopbackHub:
    """The server, from `with LoopbackHub() as hub:`, and what a test asks of it.

    Attributes:
        url: `HF_ENDPOINT` for the client.
        repos: Name -> `Repo`.
        lfs: SHA-256 -> content of the large files that were uploaded.
        requests: (method, path, status) of every answer; the status of a connection that was closed is 0.
        authorised: Number of requests that came with the token.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.authorised = 0
        self.lock = threading.RLock()

    def __enter__(self) -> 'LoopbackHub':
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str, **kwargs) -> None:
        self.faults.append(Fault(method, path, **kwargs))

    def files(self, repo: str, revision: str = 'main') -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[repo].find(revision).files.items()}

    def messages(self, repo: str) -> list[str]:
        return [commit.message for commit in self.repos[repo].commits.values()]

    def put(self, repo: str, files: dict[str, bytes], revision: str = 'main', large: Sequence[str] = ()) -> str:
        """Commits files as they are, without a client; returns the commit."""
        blobs = {path: Blob(content, path in large) for path, content in files.items()}
        stored = self.repos.setdefault(repo, Repo())
        stored.refs[revision] = stored.add({**stored.find(revision).files, **blobs}, 'put')
        return stored.refs[revision]


class _Refused(Exception):
    """An answer that is an error: status, code, message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 30

    def log_message(self, *_) -> None:
        pass

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    @property
    def _known(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def _handle(self) -> None:
        self.route = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.authorised += self._known
            self.fault = next((f for f in self.hub.faults if f.takes(self.command, self.route)), None)
        length = int(self.headers.get('Content-Length') or 0)
        if self.fault and self.fault.drop:
            self.rfile.read(length // 2)
            self.hub.requests.append((self.command, self.route, 0))
            self._close()
            return
        self.data = self.rfile.read(length)
        if self.fault and self.fault.status:
            self._send(self.fault.status, {}, self.fault.headers)
            return
        try:
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method:
                    with self.hub.lock:
                        action(self, *match.groups())
                    return
            raise _Refused(404, 'RouteNotFound', f'this Hub has no {self.command} {self.route}')
        except _Refused as e:
            status, code, message = e.args
            self._send(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: Union[bytes, dict, list] = b'', headers: Optional[dict] = None) -> None:
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers['Content-Type'] = 'application/json'
        if self.fault and self.fault.serve is not None:
            body = self.fault.serve
        cut = self.fault is not None and self.fault.cut
        self.hub.requests.append((self.command, self.route, status))
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self._close()

    # -- who may, and what there is -----------------------------------------------------------------------------------

    def _check_writer(self) -> None:
        if not self._known:
            raise _Refused(401, '', 'Invalid credentials in Authorization header')

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Refused(404 if self._known else 401, 'RepoNotFound', 'Repository not found')
        return self.hub.repos[name]

    def _commit_of(self, name: str, revision: str) -> Commit:
        commit = self._repo(name).find(revision)
        if commit is None:
            raise _Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit

    # -- repositories -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        self._check_writer()
        asked = json.loads(self.data)
        name = f'{asked["organization"]}/{asked["name"]}'
        url = {'url': f'{self.hub.url}/{name}'}
        if name in self.hub.repos:
            self._send(409, {**url, 'error': 'You already created this model repo'})
            return
        self.hub.repos[name] = Repo(asked.get('visibility') == 'private' or asked.get('private', False))
        self._send(200, url)

    def branch(self, name: str, branch: str) -> None:
        self._check_writer()
        repo = self._repo(name)
        if branch in repo.refs:
            raise _Refused(409, '', 'Reference already exists')
        repo.refs[branch] = repo.refs['main']
        self._send(200, {})

    def info(self, name: str, revision: str = 'main') -> None:
        commit = self._commit_of(name, revision)
        self._send(200, {'id': name, 'sha': commit.oid, 'private': self.hub.repos[name].private, 'tags': []})

    def tree(self, name: str, revision: str) -> None:
        files = self._commit_of(name, revision).files
        self._send(200, [
            {'type': 'file', 'path': path, 'size': len(blob.content), 'oid': blob.etag}
            for path, blob in sorted(files.items())])

    def validate_yaml(self) -> None:
        if not re.match(r'---\n.*\n---\n', json.loads(self.data)['content'], re.DOTALL):
            raise _Refused(400, '', 'no metadata')
        self._send(200, {'errors': [], 'warnings': []})

    # -- uploads ------------------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        self._check_writer()
        commit, files = self._commit_of(name, revision), []
        for file in json.loads(self.data)['files']:
            regular = file['path'].endswith(_REGULAR) and file['size'] < 10_000_000
            old = commit.files.get(file['path'])
            files.append({
                'path': file['path'], 'uploadMode': 'regular' if regular else 'lfs', 'shouldIgnore': False,
                'oid': old.etag if old else None,
            })
        self._send(200, {'files': files})

    def lfs_batch(self, name: str) -> None:
        self._check_writer()
        self._repo(name)
        objects = []
        for item in json.loads(self.data)['objects']:
            target = {'href': f'{self.hub.url}/lfs-store/{item["oid"]}'}
            objects.append({**item, **({} if item['oid'] in self.hub.lfs else {'actions': {'upload': target}})})
        self._send(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise _Refused(400, 'BadDigest', 'the content is not what its SHA-256 says')
        self.hub.lfs[oid] = self.data
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        self._check_writer()
        files, message = dict(self._commit_of(name, revision).files), ''
        for line in self.data.splitlines():
            item = json.loads(line)
            key, value = item['key'], item['value']
            if key == 'header':
                message = value['summary']
            elif key == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.lfs:
                    raise _Refused(400, 'LfsNotFound', f'{value["path"]}: its content was never uploaded')
                files[value['path']] = Blob(self.hub.lfs[value['oid']], large=True)
            elif key == 'deletedFile':
                del files[value['path']]
        repo = self.hub.repos[name]
        oid = repo.refs[revision] = repo.add(files, message)
        self._send(200, {
            'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{name}/commit/{oid}', 'hookOutput': ''})

    # -- downloads ----------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        blob, headers = commit.files.get(path), {'X-Repo-Commit': commit.oid}
        if blob is None:
            self._send(404, headers={**headers, 'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
            return
        size = len(blob.content)
        headers.update({'ETag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes'})
        if blob.large:
            headers.update({'X-Linked-ETag': f'"{blob.etag}"', 'X-Linked-Size': str(size)})
        span = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if span and self.command == 'GET':
            start = int(span[1])
            headers['Content-Range'] = f'bytes {start}-{size - 1}/{size}'
            self._send(206, blob.content[start:], headers)
            return
        self._send(200, blob.content, headers)


_NAME = r'([\w.-]+/[\w.-]+)'
_ROUTES = (
    (('POST',), r'/api/repos/create', _Handler.create),
    (('POST',), r'/api/validate-yaml', _Handler.validate_yaml),
    (('POST',), rf'/api/models/{_NAME}/branch/(.+)', _Handler.branch),
    (('POST',), rf'/api/models/{_NAME}/preupload/(.+)', _Handler.preupload),
    (('POST',), rf'/api/models/{_NAME}/commit/(.+)', _Handler.commit),
    (('GET',), rf'/api/models/{_NAME}/tree/(.+)', _Handler.tree),
    (('GET',), rf'/api/models/{_NAME}/revision/(.+)', _Handler.info),
    (('GET',), rf'/api/models/{_NAME}', _Handler.info),
    (('POST',), rf'/{_NAME}\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    (('PUT',), r'/lfs-store/([0-9a-f]{64})', _Handler.lfs_put),
    (('GET', 'HEAD'), rf'/{_NAME}/resolve/([^/]+)/(.+)', _Handler.resolve),
)
