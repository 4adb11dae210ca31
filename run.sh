#!/bin/sh
# Everything in one command. It makes the environment where needed, then:
#   sh run.sh emoji [--options KEY=VALUE ...]   trains and evaluates the embedded default
#   sh run.sh test [PYTEST ARGUMENTS]           style checks and tests
#   sh run.sh docs                              the documentation site, into site/
#   sh run.sh setup                             the environment alone
# NEUCORE_VENV names another folder than .venv; PYTHON another Python (3.10 or 3.11).
set -eu
cd "$(dirname "$0")"
VENV="${NEUCORE_VENV:-.venv}"
STAMP="$VENV/neucore-installed"
UNFINISHED="$VENV/neucore-installing"

say() { printf 'run.sh: %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Of a version that the host runs on, and able to make environments (Debian packs that part apart).
usable() { "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 12))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" && printf '%s\n' "$PYTHON" && return 0
        fail "PYTHON=$PYTHON is no Python 3.10 or 3.11 with the venv module"
    fi
    # Every folder of PATH, not only the first hit: a pyenv shim may stand there and fail when it is called.
    for name in python3.11 python3.10 python3 python; do
        saved=$IFS
        IFS=:
        for folder in $PATH; do
            IFS=$saved
            if [ -x "$folder/$name" ] && usable "$folder/$name"; then
                printf '%s\n' "$folder/$name"
                return 0
            fi
        done
        IFS=$saved
    done
    for candidate in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.11.*/bin/python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.10.*/bin/python \
        /usr/local/bin/python3.11 /opt/homebrew/bin/python3.11 /opt/homebrew/bin/python3.10; do
        if [ -x "$candidate" ] && usable "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    fail "no Python 3.11 or 3.10 with the venv module found (the host library runs on no other). Install one:
  Debian, Ubuntu   sudo apt install python3.11 python3.11-venv
  Fedora           sudo dnf install python3.11
  macOS            brew install python@3.11
  pyenv            pyenv install 3.11
  conda            conda create -n py311 python=3.11, then PYTHON=\"\$(conda run -n py311 which python)\" sh run.sh ...
or point to one: PYTHON=/path/to/python3.11 sh run.sh ${1:-setup}"
}

# What the environment must have been made from; also the folder, which an editable install remembers.
wanted_stamp() {
    "$VENV/bin/python" - <<'PY'
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version_info[:2]} {os.getcwd()}".encode())
for name in ("constraints.txt", "setup.py"):
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
PY
}

# Packages that an interrupted installation left half written: forget them, so that pip installs them again.
repair() {
    "$VENV/bin/python" - <<'PY'
import importlib.metadata, pathlib, shutil, sys
for package in importlib.metadata.distributions():
    folder = pathlib.Path(getattr(package, "_path", ""))
    if not folder.name.endswith(".dist-info") or sys.prefix not in str(folder):
        continue
    whole = package.files is not None
    for entry in package.files or ():
        if entry.suffix == ".pyc" or entry.size is None:
            continue
        path = pathlib.Path(entry.locate())
        whole = whole and path.is_file() and path.stat().st_size == entry.size
    if not whole:
        print(f"run.sh: {folder.name} is incomplete and will be installed again", file=sys.stderr)
        shutil.rmtree(folder)
PY
}

setup() {
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted_stamp 2>/dev/null)" ]; then
        return 0
    fi
    if ! usable "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        if [ -d "$VENV" ] && [ -n "$(ls -A "$VENV")" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
            fail "$VENV is there but is no Python environment; remove it, or name another: NEUCORE_VENV=DIR sh run.sh ..."
        fi
        python=$(find_python "${1:-}") || exit 2
        say "making the environment $VENV with $python"
        "$python" -m venv --clear "$VENV" || fail "$python could not make $VENV; see above"
    fi
    [ ! -f "$UNFINISHED" ] || repair
    say "installing the tested set of packages into $VENV; the first time this takes minutes and some 5 GB"
    rm -f "$STAMP"
    : >"$UNFINISHED"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[emoji,test]' ||
        fail "the installation did not finish (see above); the same command continues it"
    wanted_stamp >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    rm -f "$UNFINISHED"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
setup)
    setup setup
    say "ready: $VENV/bin/neucore --help"
    ;;
emoji)
    setup emoji
    # `python -m lavis.train` imports the host before our code can silence what its old dependencies warn of.
    PYTHONWARNINGS="${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore::FutureWarning,ignore::DeprecationWarning"
    export PYTHONWARNINGS
    exec "$VENV/bin/python" -m lavis.train --cfg-path projects/neucore/train_emoji.yaml "$@"
    ;;
test)
    setup test
    status=0
    "$VENV/bin/python" -m ruff check . || status=1
    "$VENV/bin/python" -m ruff format --check . || status=1
    # A process a core, at most four, and a thread each: they would only stand in each other's way.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$VENV/bin/python" -m pytest -n auto --maxprocesses=4 --dist worksteal "$@" || status=1
    exit $status
    ;;
docs)
    setup docs
    if ! "$VENV/bin/python" -c 'import material, mkdocs, mkdocstrings' 2>/dev/null; then
        say "adding the packages of the extra 'docs'"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' ||
            fail "the installation did not finish (see above); the same command continues it"
    fi
    NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --quiet "$@"
    say "ready: site/index.html"
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    [ "$command" = help ] || fail "unknown command '$command'; allowed: emoji, test, docs, setup"
    ;;
esac
