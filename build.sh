#!/usr/bin/env bash
# The one entry point: builds the wheel; or sets an environment up and runs the demo, the tests or the benchmarks in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
bash build.sh                  build dist/flash_attention-<version>-py3-none-any.whl and its .sha256 (needs only a Python)
bash build.sh demo             train the small language model with our Cell and with naive attention, compare, plot
bash build.sh test             the fast tests
bash build.sh test all         the fast and the slow tests, those against the model libraries, then the table of figures
bash build.sh test integration [LIBRARY]   the tests against the model libraries (or one), each in its own environment
bash build.sh bench [NAME]     measure the tables of docs/benchmarks (all, or NAME; arguments go to `flash_attention bench`)
bash build.sh bench peers      the JAX twin beside jax.nn, tokamax, ringattention and ejkernel, in an environment of their own
bash build.sh bench --integration   a training step inside the model libraries, against their own attention
bash build.sh finetune LIBRARY train a tiny model of mindformers or mindone with its own attention and with our Cell
bash build.sh env [EXTRA...]   only make the environment (with these extras; default: test), and print its Python
What follows `test [all|integration [LIBRARY]]` goes to pytest:  bash build.sh test -k plan

demo, test, bench and env make .venv (MindSpore 2.10 or the newest wheel, numpy 1, jax 0.6.2) and install into it; the next
run finds it made. Set these to change that:
  FLASH_PYTHON=python3.11   the interpreter to use (3.10-3.12; building the wheel: 3.7 or newer)
  FLASH_VENV=.venv          the environment's folder
  FLASH_JAX=newest          the newest jax (or a version: FLASH_JAX=0.9.2) without MindSpore, in .venv-jax; `test` then runs
                            the tests that have to do with JAX
  FLASH_DEADLINE=EPOCH      tests: start none after this time (`date +%s`), print those not reached
  FLASH_TEST_TIMEOUT=900    tests: seconds after which a single test fails
  FLASH_TEST_WORKERS=2      tests: processes side by side, a file each (default: the cores, at most 4; 0: this one)
  FLASH_FAST_DONE=1         `test all`: leave out what `test` has run, and keep its figures for the table
TEXT
}

say() { printf '== %s\n' "$*"; }
die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }

# --- the interpreter: the first one that runs. A name on PATH may be a pyenv shim that only prints an error. --------------
runs() { # runs PYTHON LOWEST HIGHEST
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (${2/./,}) <= sys.version_info[:2] <= (${3/./,}))" >/dev/null 2>&1
}

find_python() { # find_python LOWEST HIGHEST NAME...
    local lowest=$1 highest=$2 name path
    shift 2
    if [ -n "${FLASH_PYTHON:-}" ]; then
        if runs "$FLASH_PYTHON" "$lowest" "$highest"; then
            echo "$FLASH_PYTHON"
            return
        fi
        die "FLASH_PYTHON must be a Python from $lowest to $highest that has venv, but got $FLASH_PYTHON."
    fi
    for name in "$@"; do
        while read -r path; do
            if runs "$path" "$lowest" "$highest"; then
                echo "$path"
                return
            fi
        done < <(type -aP "$name" || true)
    done
    die "a Python from $lowest to $highest with venv must be on PATH. Install one (Debian: python3-venv too), or set FLASH_PYTHON."
}

# --- bash build.sh ---------------------------------------------------------------------------------------------------------
build_wheel() {
    local python scratch version wheel
    python=$(find_python 3.7 3.99 python3 python3.11 python3.12 python3.10 python python3.9 python3.8 python3.7) || exit 1
    scratch=$(mktemp -d)
    trap "rm -rf '$scratch'" EXIT
    version=$("$python" -c "import setup; print(setup.version())")
    rm -rf dist
    mkdir dist
    if "$python" -c "import setup, sys; sys.exit(not setup.can_build_wheels())" 2>/dev/null; then
        say "building flash_attention $version with $python and its own setuptools"
        "$python" -m pip wheel --no-deps --no-build-isolation -w "$scratch/wheel" .
    else
        say "building flash_attention $version with $python in an environment of its own"
        "$python" -m venv "$scratch/venv"
        "$scratch/venv/bin/python" -m pip wheel --no-deps -w "$scratch/wheel" .
    fi
    rm -rf build ./*.egg-info
    wheel=flash_attention-$version-py3-none-any.whl
    mv "$scratch/wheel/$wheel" dist/
    (cd dist && "$python" -c "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest() + '  ' + sys.argv[1])" "$wheel" >"$wheel.sha256")
    say "dist/$wheel"
    cat "dist/$wheel.sha256"
}

# --- the environment of demo, test and bench ---------------------------------------------------------------------------------
install_lines() { # install_lines STEP LINE...   skipped when the stamp says that these very lines are installed
    local step=$1 stamp
    shift
    stamp="$VENV/.installed-$step"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(printf '%s\n' "$@")" ]; then return; fi
    say "installing $step: $*"
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" || return
    printf '%s\n' "$@" >"$stamp"
}

install_mindspore() { # install_mindspore LINE...   returns 1 where there is no wheel for this computer and Python
    local log="$VENV/mindspore.log"
    [ ! -f "$VENV/.no-mindspore" ] || return 1
    if ! (install_lines mindspore "$@") 2>&1 | tee "$log"; then
        grep -q "No matching distribution found for mindspore" "$log" || die "installing MindSpore failed, see above."
        return 1
    fi
}

# The model libraries: each in an environment of its own, which sees the packages of .venv by a .pth file, because
# their requirements contradict one another and MindSpore alone takes 2.5 GB. Versions: the ones that the tests know.
LIBRARIES="mindone mindformers mindformers-1.3"

make_library_env() { # make_library_env LIBRARY   makes VENV-LIBRARY on top of VENV, then sets VENV to it
    local library=$1 base=$VENV lines=("numpy<2") alone=() free
    case $library in
    mindone) lines+=("mindone==0.5.0" "transformers==4.57.1") ;;
    mindformers)
        lines+=("setuptools>=70.1" sentencepiece ftfy regex tqdm pyyaml jieba rouge_chinese "nltk==3.9.1" opencv-python-headless
            "pyarrow==23.0.1" tokenizers tiktoken jinja2 setproctitle tensorboardX deprecated pybind11 "transformers==4.57.1"
            "datasets>=4.0.0") # pyarrow: later ones need numpy 2
        alone=("mindpet==1.0.4" "mindformers==1.9.0") # their requirements name a MindSpore of their own
        ;;
    mindformers-1.3)
        (make_library_env mindformers) || exit # the packages that both need
        alone=("mindformers==1.3.2")
        ;;
    *) die "LIBRARY must be one of $LIBRARIES, but got '$library'." ;;
    esac
    VENV=$base-$library
    if [ ! -x "$VENV/bin/pip" ]; then
        free=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 {print int($4 / 1048576)}')
        [ "$free" -ge 2 ] || die "the environment of $library needs 2 GB of free disk here, but got $free GB. Free some, or set FLASH_VENV to a folder on another disk."
        say "making $VENV on top of $base"
        "$base/bin/python" -m venv "$VENV" || return
    fi
    site_packages "$base" >"$(site_packages "$VENV")/base.pth"
    [ "$library" != mindformers-1.3 ] || site_packages "$base-mindformers" >>"$(site_packages "$VENV")/base.pth"
    export USE_TORCH=0 # transformers would import the torch of the extra `bench`
    install_lines "$library" "${lines[@]}" || return
    [ ${#alone[@]} -eq 0 ] || install_lines "$library-alone" --no-deps "${alone[@]}"
}

site_packages() { # site_packages VENV   the folder of an environment's packages
    "$1/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
}

make_env() { # make_env EXTRA...   sets VENV and makes it hold jax, MindSpore unless FLASH_JAX is set, and the extras
    local python free lines jax=${FLASH_JAX:-}
    VENV=${FLASH_VENV:-.venv${jax:+-jax}}
    if [ ! -x "$VENV/bin/pip" ]; then # pip comes last: without it an earlier run was interrupted
        python=$(find_python 3.10 3.12 python3.11 python3.12 python3.10 python3 python) || exit 1
        free=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 {print int($4 / 1048576)}')
        [ "$free" -ge 5 ] || die "the environment needs 5 GB of free disk here, but got $free GB. Free some, or set FLASH_VENV to a folder on another disk."
        say "making $VENV with $python ($("$python" --version 2>&1), $free GB free)"
        "$python" -m venv "$VENV"
    fi
    VENV=$(cd "$VENV" && pwd)
    if [ -z "$jax" ]; then
        mapfile -t lines < <("$VENV/bin/python" -c "import setup; print('\n'.join(setup.requirements('mindspore')))")
        if install_mindspore "${lines[@]}"; then
            install_lines jax-for-mindspore "jax==0.6.2" "numpy<2" # newer ones need numpy 2, which MindSpore cannot use
        else
            say "there is no MindSpore wheel for this computer and Python: going on with the JAX half"
            install_lines jax jax
            touch "$VENV/.no-mindspore" # only now: had the network been down, jax would have failed too
        fi
    else
        if [ "$jax" = newest ]; then jax="jax"; else jax="jax==$jax"; fi
        install_lines jax "$jax"
    fi
    for extra in "$@"; do
        mapfile -t lines < <("$VENV/bin/python" -c "import setup, sys; print('\n'.join(setup.requirements(sys.argv[1])))" "$extra")
        [ -f "$VENV/.installed-mindspore" ] && lines+=("numpy<2")
        install_lines "$extra" "${lines[@]}"
    done
    export PYTHONPATH="$PWD/train:$PWD/infer${PYTHONPATH:+:$PYTHONPATH}"
}

# --- bash build.sh test [all|integration] [pytest arguments] -----------------------------------------------------------------
run_tests() {
    local what=fast select status=0 cores order=--loadscope-reorder
    export FLASH_COMMAND="bash build.sh test" FLASH_RUN_START="${FLASH_RUN_START:-$(date +%s)}" # for the table of figures
    case ${1:-} in all | integration) what=$1 FLASH_COMMAND+=" $1"; shift ;; esac
    make_env test
    case $what in
    fast) select="not slow and not integration" ;;
    integration)
        test_libraries "$@"
        return
        ;;
    all)
        select="not integration"
        if [ -n "${FLASH_FAST_DONE:-}" ]; then select="slow and not integration"; fi
        export FLASH_ROTATE=1
        order=--no-loadscope-reorder # the files in the day's order, not the largest first
        ;;
    esac
    # The model libraries come last, every third day first: what a deadline cuts off is another part each day.
    local first=0
    if [ "$what" = all ] && [ $((10#$(date +%j) % 3)) -eq 1 ]; then first=1; fi
    if [ $first -eq 1 ]; then (test_libraries "$@") || status=$?; fi
    cores=$("$VENV/bin/python" -c "import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")
    "$VENV/bin/python" -m pytest -m "$select" -n "${FLASH_TEST_WORKERS:-$cores}" --dist loadfile $order --timeout "${FLASH_TEST_TIMEOUT:-900}" --durations 15 "$@" || status=$?
    if [ "$what" = all ]; then
        [ $first -eq 1 ] || (test_libraries "$@") || status=$?
        "$VENV/bin/python" tests/must_show.py --since "$FLASH_RUN_START"
    fi
    return $status
}

test_libraries() { # test_libraries [LIBRARY] [pytest arguments]   the tests against each model library, in its environment
    local base=$VENV library code status=5 libraries=$LIBRARIES
    case " $LIBRARIES " in *" ${1:--} "*) libraries=$1; shift ;; esac
    for library in $libraries; do
        if [ $(($(date +%s) + 300)) -ge "${FLASH_DEADLINE:-99999999999}" ]; then # installing and one test take that long
            say "deadline: the tests against $library are left out"
            [ $status -ne 5 ] || status=0
            continue
        fi
        code=0
        (
            VENV=$base
            make_library_env "$library" || exit
            "$VENV/bin/python" -m pytest -m integration --timeout "${FLASH_TEST_TIMEOUT:-900}" --durations 15 "$@" \
                tests/*/*/st/"test_${library//[-.]/_}.py"
        ) || code=$?
        case $status in 0 | 5) [ $code -eq 5 ] || status=$code ;; esac # 5: -k has left none of this library's tests
    done
    return $status
}

# The libraries that `bench peers` compares with need a newer jax than MindSpore allows.
make_peer_env() { # sets VENV; a library that does not install here is named in its rows
    local peer
    FLASH_JAX=${FLASH_JAX:-newest} FLASH_VENV=${FLASH_VENV:-.venv}-peers make_env
    install_lines plots matplotlib
    for peer in tokamax ringattention ejkernel; do
        install_lines "$peer" "$peer" || say "$peer does not install here"
    done
}

bench_libraries() { # bench_libraries --integration [arguments]   in the environment of each library
    local base=$VENV library
    for library in $LIBRARIES; do
        (
            VENV=$base
            make_library_env "$library" || exit
            export PYTHONPATH="$PYTHONPATH:$PWD/tests"
            case $library in # what the library lacks on a CPU, or in this MindSpore
            mindone) export FLASH_BENCH_PREPARE=support.mindone_on_cpu ;;
            mindformers-1.3) export FLASH_BENCH_PREPARE=support.mindformers_on_new_mindspore ;;
            esac
            "$VENV/bin/python" -m flash_attention bench "$@"
        ) || return
    done
}

main() {
    local what=${1:-wheel}
    [ $# -eq 0 ] || shift
    case $what in
    wheel) build_wheel ;;
    env)
        make_env "${@:-test}"
        echo "$VENV/bin/python"
        ;;
    demo)
        make_env test
        "$VENV/bin/python" docs/examples/train_llm_mindspore.py "$@"
        ;;
    bench)
        if [ "${1:-}" = peers ]; then
            make_peer_env
            "$VENV/bin/python" -m flash_attention bench "$@" --plot
            return
        fi
        if [ "${1:-}" = --integration ]; then
            make_env test
            bench_libraries "$@"
        else
            make_env test bench
            "$VENV/bin/python" -m flash_attention bench "$@"
        fi
        ;;
    finetune)
        make_env test
        make_library_env "${1:-}"
        PYTHONPATH="$PYTHONPATH:$PWD/tests" "$VENV/bin/python" docs/examples/finetune.py "$@"
        ;;
    test) run_tests "$@" ;;
    -h | --help | help) usage ;;
    *) usage >&2; die "'$what' is none of the commands above." ;;
    esac
}

main "$@"
