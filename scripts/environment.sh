# Sourced by scripts/check and scripts/demo: makes a virtual environment once, and updates it when its files change.

# ready FOLDER REQUIREMENT... [-- FILE...]
# Installs the requirements under constraints.txt in one call of pip, unless an earlier call did so for the same files.
ready() {
    local folder=$1 python=${PYTHON:-python3} requirements=() stamp
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        requirements+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$0: requires Python 3.10 or later, found $("$python" --version 2>&1); set PYTHON to another interpreter" >&2
        return 1
    fi
    stamp=$({
        "$python" -c 'import sys; print(sys.base_prefix, sys.version)'
        echo "${requirements[@]}"
        cat pyproject.toml constraints.txt squisher_mergekit/_startup/* "$@"
    } | cksum)
    if [ "$(cat "$folder/installed" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    echo "installing into $folder (some minutes at first, torch being large)" >&2
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$folder"
    fi
    "$folder/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt "${requirements[@]}"
    echo "$stamp" >"$folder/installed"
}
