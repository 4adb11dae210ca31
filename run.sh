#!/bin/sh
# Everything in one command. It makes the environment where needed, then:
#   sh run.sh emoji [--options KEY=VALUE ...]   trains and evaluates the embedded default
#   sh run.sh demo [--port N ...]               searches the drawings in the browser; trains first where needed
#   sh run.sh test [PYTEST ARGUMENTS]           style checks and tests
#   sh run.sh docs                              the documentation site, into site/
#   sh run.sh setup                             the environment alone
#   sh run.sh python                            prints the Python that it would be made with
# NEUCORE_VENV names another folder than .venv; PYTHON another Python: a path, or a version such as 3.11 (3.10 to 3.14).
# TORCH=cpu takes torch's CPU build, 5 GB smaller, where pip can get it; a machine without an NVIDIA GPU does so by itself
# (TORCH=cuda: the other build).
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

# Of a version that is supported, and able to make environments (Debian packs that part apart).
usable() { "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; }

find_python() {
    versions='3.13 3.12 3.14 3.11 3.10'
    case ${PYTHON:-} in
    3.1[0-4]) versions=$PYTHON ;;
    ?*)
        usable "$PYTHON" && printf '%s\n' "$PYTHON" && return 0
        fail "PYTHON=$PYTHON is no Python 3.10 to 3.14 with the venv module"
        ;;
    esac
    # The newest first, but 3.14, which has been tried least, after 3.13 and 3.12. Of each, every folder of PATH, not only
    # the first hit: a pyenv shim may stand there and fail when it is called.
    for version in $versions; do
        saved=$IFS
        IFS=:
        for folder in $PATH /usr/local/bin /opt/homebrew/bin; do
            IFS=$saved
            if [ -x "$folder/python$version" ] && usable "$folder/python$version"; then
                printf '%s\n' "$folder/python$version"
                return 0
            fi
        done
        IFS=$saved
        for candidate in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python; do
            if [ -x "$candidate" ] && usable "$candidate"; then
                printf '%s\n' "$candidate"
                return 0
            fi
        done
    done
    for name in python3 python; do  # where no name says the version
        if [ -z "${PYTHON:-}" ] && usable "$name"; then
            printf '%s\n' "$name"
            return 0
        fi
    done
    fail "no Python ${PYTHON:-3.10 to 3.14} with the venv module found. Install one:
  Debian, Ubuntu   sudo apt install python3 python3-venv
  Fedora           sudo dnf install python3
  macOS            brew install python
  pyenv            pyenv install 3.13
  conda            conda create -n py313 python=3.13, then PYTHON=\"\$(conda run -n py313 which python)\" sh run.sh ...
or point to one: PYTHON=/path/to/python3.13 sh run.sh ${1:-setup}"
}

# The environment that is there stays; asked for by PYTHON, another one must not be passed over in silence.
check_wish() {
    version='import sys; print("%d.%d" % sys.version_info[:2])'
    case ${PYTHON:-} in
    '') return 0 ;;
    3.1[0-4]) asked=$PYTHON ;;
    *) asked=$("$PYTHON" -c "$version" 2>/dev/null) || return 0 ;;
    esac
    made=$("$VENV/bin/python" -c "$version" 2>/dev/null) || return 0
    [ "$asked" = "$made" ] ||
        fail "$VENV was made with Python $made, PYTHON asks for $asked; remove it, or name another: NEUCORE_VENV=.venv-$asked"
}

# The tested set of packages for the environment's Python: what the host asks for has no wheels for 3.12 and later.
pins() {
    if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null; then
        echo constraints-3.12.txt
    else
        echo constraints.txt
    fi
}

# The pinned version of a package, and that of the environment, nothing where it has none.
pinned() { sed -n "s/^$1==//p" "$(pins)"; }
installed() { "$VENV/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || :; }

# Whether pip, as it is set up here, can get the CPU build of a package. PyPI has none for Linux.
offered() {
    [ "$(installed "$1")" = "$(pinned "$1")+cpu" ] ||
        "$VENV/bin/python" -m pip --disable-pip-version-check index versions "$1" 2>/dev/null |
        tr -s ' (),' '\n' | grep -qxF "$(pinned "$1")+cpu"
}

has_gpu() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L 2>/dev/null | grep -q GPU; }

# An environment keeps the build of torch that it has; another one that is asked for must not be passed over in silence.
check_torch() {
    case ${TORCH:-} in
    '') return 0 ;;
    cpu | cuda) ;;
    *) fail "TORCH=$TORCH; allowed: cpu, cuda" ;;
    esac
    [ "$(uname -s)" = Linux ] || return 0
    has=$(installed torch)
    case $has in '') return 0 ;; *+cpu) kind=cpu ;; *) kind=cuda ;; esac
    [ "$TORCH" = "$kind" ] ||
        fail "$VENV has torch $has, TORCH asks for $TORCH; remove it, or name another: NEUCORE_VENV=.venv-$TORCH"
}

# Sets $torch, what pip is asked for beside the pinned set, and $size, what that costs. Only for Linux has torch CUDA.
choose_torch() {
    torch='' size='about 0.6 GB to fetch, 2 to 3 GB of disk'
    [ "$(uname -s)" = Linux ] || return 0
    build="$(pinned torch)+cpu torchvision==$(pinned torchvision)+cpu"
    wish=${TORCH:-}
    case "$wish $(installed torch)" in
    ' '*+cpu) wish=cpu ;;
    ' '?*) wish=there ;;
    ' ') ! has_gpu || wish=there ;;  # pip's own choice
    esac
    if [ "$wish" != cuda ] && [ "$wish" != there ] && offered torch && offered torchvision; then
        torch="torch==$build"
        [ -n "$wish" ] || say "no NVIDIA GPU is here and pip can get torch's CPU build: taking it (else: TORCH=cuda)"
        return 0
    fi
    [ "$wish" != cpu ] || fail "for TORCH=cpu pip finds no torch==$build. Name an index that has
them (PIP_EXTRA_INDEX_URL; PyTorch's installation page says which) or a folder of their wheels (PIP_FIND_LINKS). The build
with CUDA, TORCH=cuda, runs without a GPU as well"
    [ "$wish" != cuda ] || torch="torch!=$(echo "$build" | sed 's/==/!=/')"
    size='about 3.5 GB to fetch, 7 to 8 GB of disk'
    [ -n "$wish" ] || size="$size (5 GB of it CUDA; no NVIDIA GPU is here: TORCH=cpu leaves it out where pip can get that build)"
}

# What the environment must have been made from; also the folder, which an editable install remembers.
wanted_stamp() {
    "$VENV/bin/python" - "$(pins)" <<'PY'
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version_info[:2]} {os.getcwd()}".encode())
for name in (sys.argv[1], "setup.py", "neucore_plugin/host/wheel.py"):
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
    check_wish
    check_torch
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
    choose_torch
    say "installing the tested set of packages into $VENV; the first time: $size, minutes"
    rm -f "$STAMP"
    : >"$UNFINISHED"
    # shellcheck disable=SC2086  # $torch is words
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$(pins)" -e '.[emoji,test]' $torch &&
        "$VENV/bin/python" -m neucore_plugin setup-host ||
        fail "the installation did not finish (see above); the same command continues it"
    wanted_stamp >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    rm -f "$UNFINISHED"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
python) find_python ;;
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
demo)
    setup demo
    PYTHONWARNINGS="${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore::FutureWarning,ignore::DeprecationWarning"
    export PYTHONWARNINGS
    exec "$VENV/bin/python" -m neucore_plugin demo "$@"
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
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$(pins)" -e '.[docs]' ||
            fail "the installation did not finish (see above); the same command continues it"
    fi
    NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --quiet "$@"
    say "ready: site/index.html"
    ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    [ "$command" = help ] || fail "unknown command '$command'; allowed: emoji, demo, test, docs, setup, python"
    ;;
esac
