"""A Hub on the loopback interface, of the standard library alone, for the real client of huggingface_hub.

It keeps repositories of commits in memory and speaks what the client speaks: create, branches, preupload, LFS batches,
Xet tokens, ndjson commits, listings, resolve with ranges. Large files come on either of the client's transports:

- LFS: a batch answer names a target on this server, where the client puts the bytes;
- Xet: a token answer names a local store, `casUrl: local:///path`, and the client's own hf_xet fills it. The commit
  names a file by its SHA-256, a download by its Xet hash: the shards of the store say which belong together.

Any answer can be made to fail: `hub.fault(...)`.
"""
import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ['TOKEN', 'Fault', 'LoopbackHub']

# What the client sends as its token; its shape is that of a real one, so that what looks for tokens finds it.
TOKEN = 'hf_' + 'LoopbackOnly0123456789abcdefghijkl'
# As the Hub decides: text below this is a regular file, everything else is large.
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
        body: Body of that answer, or of the real one (`serve`).
        cut: Send half of the body of the real answer, and close.
        drop: Close without an answer; of an upload, after half of what the client sends.
        serve: Answer as usual, but with `body`.
    """
    method: str
    path: str
    times: int = 1_000_000
    status: Optional[int] = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b''
    cut: bool = False
    drop: bool = False
    serve: bool = False
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.seen <= self.times


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the SHA-256 and size of a large one."""
    content: bytes = b''
    sha256: Optional[str] = None
    length: int = 0

    @property
    def size(self) -> int:
        return self.length if self.sha256 else len(self.content)

    @property
    def etag(self) -> str:
        """SHA-256 of a large file, else git's hash of the blob."""
        return self.sha256 or hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


class Repo:
    """The commits of a repository, and its branches."""

    def __init__(self, private: bool):
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
    """The server, from `with LoopbackHub(folder) as hub:`, and what a test asks of it.

    Args:
        folder: Where large files are kept.

    Attributes:
        url: `HF_ENDPOINT` for the client.
        repos: Name -> `Repo`.
        requests: (method, path, status) of every answer; the status of a connection that was closed is 0.
        authorised: Number of requests that came with the token.
        transports: The transports that large files came on: `lfs`, `xet`.
    """

    def __init__(self, folder: Union[str, Path]):
        self.folder = Path(folder)
        self.lfs, self.xet = self.folder / 'lfs', self.folder / 'xet'
        self.lfs.mkdir(parents=True)
        self.xet.mkdir()
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.transports: set[str] = set()
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

    def fault(self, method: str, path: str, **kwargs) -> Fault:
        """Adds a `Fault`."""
        self.faults.append(Fault(method, path, **kwargs))
        return self.faults[-1]

    def files(self, repo: str, revision: str = 'main') -> dict[str, bytes]:
        """The files of a revision, large ones as this server would send them."""
        return {path: self.read(blob) for path, blob in self.repos[repo].find(revision).files.items()}

    def messages(self, repo: str) -> list[str]:
        return [commit.message for commit in self.repos[repo].commits.values()]

    def put(self, repo: str, files: dict[str, bytes], revision: str = 'main', large: Sequence[str] = ()) -> str:
        """Commits files as they are, without a client, those in `large` as LFS does; returns the commit."""
        blobs = {}
        for path, content in files.items():
            blobs[path] = Blob(content)
            if path in large:
                blobs[path] = Blob(sha256=hashlib.sha256(content).hexdigest(), length=len(content))
                (self.lfs / blobs[path].sha256).write_bytes(content)
        stored = self.repos.setdefault(repo, Repo(private=False))
        stored.refs[revision] = stored.add({**stored.find(revision).files, **blobs}, 'put')
        return stored.refs[revision]

    def read(self, blob: Blob) -> bytes:
        if not blob.sha256:
            return blob.content
        path = self.lfs / blob.sha256
        return path.read_bytes() if path.exists() else b''

    def xet_hash(self, sha256: str) -> Optional[str]:
        """The Xet hash of a file, from the shards that hf_xet left in the local store."""
        for shard in self.xet.rglob('*.mdb'):
            found = _files_of_shard(shard.read_bytes()).get(sha256)
            if found:
                return found
        return None


def _hash_text(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian words of 64 bits in hexadecimal."""
    return ''.join(f'{word:016x}' for word in struct.unpack('<4Q', raw))


def _files_of_shard(data: bytes) -> dict[str, str]:
    """SHA-256 -> Xet hash of the files that a shard describes.

    A shard begins with a header of 48 bytes. Then come the files, in records of 48 bytes: one with the hash of the
    file, flags and the number of its segments; the segments; with flag 1 << 31 as many records of verification; with
    1 << 30 one that begins with the SHA-256. A hash of ones ends the list.
    """
    files, at = {}, 48
    while at + 48 <= len(data):
        raw, flags, count = data[at:at + 32], *struct.unpack_from('<II', data, at + 32)
        if raw == b'\xff' * 32:
            break
        at += 48 * (1 + count * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            files[_hash_text(data[at:at + 32])] = _hash_text(raw)
            at += 48
    return files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 30

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def log_message(self, *_) -> None:
        pass

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.authorised += self._known
            self.active = next((f for f in self.hub.faults if f.takes(self.command, self.route)), None)
        length = int(self.headers.get('Content-Length') or 0)
        if self.active and self.active.drop:
            self.rfile.read(length // 2)
            self._close()
            return
        self.data = self.rfile.read(length)
        if self.active and self.active.status:
            self._send(self.active.status, self.active.body, self.active.headers)
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                with self.hub.lock:
                    action(self, *match.groups())
                return
        self._error(404, 'RouteNotFound', f'this Hub has no {self.command} {self.route}')

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _close(self) -> None:
        self._log(0)
        self.close_connection = True
        self.connection.close()

    def _log(self, status: int) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.route, status))

    def _send(self, status: int, body: Union[bytes, dict, list] = b'', headers: Optional[dict] = None) -> None:
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault('Content-Type', 'application/json')
        served, cut = body, False
        if self.active and self.command == 'GET':
            served = self.active.body if self.active.serve else body
            cut = self.active.cut
        self._log(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', headers.get('Content-Length', str(len(served))))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(served[:len(served) // 2] if cut else served)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message})

    # -- who may, and what there is -----------------------------------------------------------------------------------

    @property
    def _known(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def _writer(self) -> bool:
        if self._known:
            return True
        self._error(401, '', 'Invalid credentials in Authorization header')
        return False

    def _repo(self, name: str) -> Optional[Repo]:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._known):
            # As the Hub: whether a private repository exists is nobody's business.
            self._error(404 if self._known else 401, 'RepoNotFound', 'Repository not found')
            return None
        return repo

    def _commit_of(self, name: str, revision: str) -> Optional[Commit]:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None:
            self._error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit

    # -- repositories -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if not self._writer():
            return
        asked = json.loads(self.data)
        name = f'{asked.get("organization") or "user"}/{asked["name"]}'
        url = {'url': f'{self.hub.url}/{name}'}
        if name in self.hub.repos:
            self._send(409, {**url, 'error': 'You already created this model repo'})
            return
        self.hub.repos[name] = Repo(asked.get('visibility') == 'private' or asked.get('private', False))
        self._send(200, url)

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name) if self._writer() else None
        if repo is None:
            return
        if branch in repo.refs:
            self._send(409, {'error': 'Reference already exists'})
            return
        start = (json.loads(self.data or b'{}') or {}).get('startingPoint') or 'main'
        repo.refs[branch] = repo.refs.get(start, start)
        self._send(200, {})

    def info(self, name: str, revision: Optional[str] = None) -> None:
        commit = self._commit_of(name, revision or 'main')
        if commit:
            self._send(200, {
                'id': name, 'modelId': name, 'sha': commit.oid, 'private': self.hub.repos[name].private,
                'siblings': [{'rfilename': path} for path in sorted(commit.files)], 'tags': [],
            })

    def tree(self, name: str, revision: str, *_) -> None:
        commit = self._commit_of(name, revision)
        if commit:
            self._send(200, [
                {'type': 'file', 'path': path, 'size': blob.size, 'oid': blob.etag,
                 **({'lfs': {'oid': blob.sha256, 'size': blob.size, 'pointerSize': 130}} if blob.sha256 else {})}
                for path, blob in sorted(commit.files.items())])

    def validate_yaml(self) -> None:
        content = json.loads(self.data)['content']
        if not re.match(r'---\n.*\n---\n', content, re.DOTALL):
            self._send(400, {'errors': [{'message': 'no metadata'}], 'warnings': []})
            return
        self._send(200, {'errors': [], 'warnings': []})

    # -- uploads ------------------------------------------------------------------------------------------------------

    def preupload(self, name: str, revision: str) -> None:
        commit = self._commit_of(name, revision) if self._writer() else None
        if commit is None:
            return
        files = []
        for file in json.loads(self.data)['files']:
            regular = file['path'].endswith(_REGULAR) and file['size'] < 10_000_000
            old = commit.files.get(file['path'])
            files.append({
                'path': file['path'], 'uploadMode': 'regular' if regular else 'lfs', 'shouldIgnore': False,
                'oid': old.etag if old else None,
            })
        self._send(200, {'files': files})

    def lfs_batch(self, name: str) -> None:
        if not self._writer() or self._repo(name) is None:
            return
        objects = []
        for item in json.loads(self.data)['objects']:
            target = {'href': f'{self.hub.url}/lfs-store/{item["oid"]}'}
            there = (self.hub.lfs / item['oid']).exists()
            objects.append({**item, **({} if there else {'actions': {'upload': target}})})
        self._send(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            self._error(400, 'BadDigest', 'the content is not what its SHA-256 says')
            return
        (self.hub.lfs / oid).write_bytes(self.data)
        self.hub.transports.add('lfs')
        self._send(200)

    def xet_token(self, name: str, kind: str, revision: str) -> None:
        repo = (self._repo(name) if kind == 'read' or self._writer() else None)
        if repo is None:
            return
        token = {'casUrl': f'local://{self.hub.xet}', 'accessToken': 'xet', 'exp': int(time.time()) + 3600}
        self._send(200, token, {
            'X-Xet-Cas-Url': token['casUrl'], 'X-Xet-Access-Token': 'xet', 'X-Xet-Token-Expiration': str(token['exp'])})

    def commit(self, name: str, revision: str) -> None:
        old = self._commit_of(name, revision) if self._writer() else None
        if old is None:
            return
        files, message = dict(old.files), ''
        for line in self.data.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                message = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = Blob(base64.b64decode(value['content']))
            elif item['key'] == 'lfsFile':
                if not self._received(value['oid']):
                    self._error(400, 'LfsNotFound', f'{value["path"]}: its content was never uploaded')
                    return
                files[value['path']] = Blob(sha256=value['oid'], length=value['size'])
            elif item['key'] == 'deletedFile':
                if files.pop(value['path'], None) is None:
                    self._error(404, 'EntryNotFound', "A file with this name doesn't exist")
                    return
        repo = self.hub.repos[name]
        oid = repo.refs[revision] = repo.add(files, message)
        self._send(200, {
            'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{name}/commit/{oid}', 'hookOutput': ''})

    def _received(self, sha256: str) -> bool:
        if (self.hub.lfs / sha256).exists():
            return True
        if self.hub.xet_hash(sha256):
            self.hub.transports.add('xet')
            return True
        return False

    # -- downloads ----------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        if commit is None:
            return
        blob = commit.files.get(path)
        base = {'X-Repo-Commit': commit.oid}
        if blob is None:
            self._send(404, b'', {**base, 'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'Entry not found'})
            return
        headers = {**base, 'ETag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes'}
        if blob.sha256:
            headers.update({'X-Linked-ETag': f'"{blob.sha256}"', 'X-Linked-Size': str(blob.size)})
            if not (self.hub.lfs / blob.sha256).exists():
                headers['X-Xet-Hash'] = self.hub.xet_hash(blob.sha256)
                headers['X-Xet-Refresh-Route'] = f'{self.hub.url}/api/models/{name}/xet-read-token/{commit.oid}'
        content = self.hub.read(blob)
        if self.command == 'HEAD':
            self._send(200, b'', {**headers, 'Content-Length': str(blob.size)})
            return
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if span:
            start, stop = int(span[1]), int(span[2] or len(content) - 1) + 1
            self._send(206, content[start:stop], {
                **headers, 'Content-Range': f'bytes {start}-{stop - 1}/{len(content)}'})
            return
        self._send(200, content, headers)


_NAME = r'([\w.-]+/[\w.-]+)'
_ROUTES = (
    (('POST',), r'/api/repos/create', _Handler.create),
    (('POST',), r'/api/validate-yaml', _Handler.validate_yaml),
    (('POST',), rf'/api/models/{_NAME}/branch/(.+)', _Handler.branch),
    (('POST',), rf'/api/models/{_NAME}/preupload/(.+)', _Handler.preupload),
    (('POST',), rf'/api/models/{_NAME}/commit/(.+)', _Handler.commit),
    (('GET',), rf'/api/models/{_NAME}/xet-(read|write)-token/(.+)', _Handler.xet_token),
    (('GET',), rf'/api/models/{_NAME}/tree/([^/]+)(/.*)?', _Handler.tree),
    (('GET',), rf'/api/models/{_NAME}/revision/(.+)', _Handler.info),
    (('GET',), rf'/api/models/{_NAME}', _Handler.info),
    (('POST',), rf'/{_NAME}\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    (('PUT',), r'/lfs-store/([0-9a-f]{64})', _Handler.lfs_put),
    (('GET', 'HEAD'), rf'/{_NAME}/resolve/([^/]+)/(.+)', _Handler.resolve),
)
