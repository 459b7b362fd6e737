#!/bin/sh
# What the Makefile beside this calls: `run.sh install` makes the environment, `run.sh measure`
# does the rest.
set -eu
cd "$(dirname "$0")/.."
python=original/.venv/bin/python
log=original/.venv/log # what the programs write to stderr
child=
signal=TERM

fail() {
    echo "make original: $1" >&2
    exit 1
}

# Run a command, so that a signal to this script ends the command too.
run() {
    "$@" 2>>$log &
    child=$!
    wait $child || {
        tail -n 30 $log >&2
        fail "stopped; above is the end of $log"
    }
}

stop() {
    kill -$signal $child 2>/dev/null || true # Nothing, or nothing any more, may be running.
    wait
    exit "$1"
}

install() {
    case "$(uname -sm)" in
    "Linux x86_64" | "Darwin x86_64") ;;
    *) fail "TensorFlow 1.13.1 and Ray 0.6.6 exist for x86-64 Linux and macOS alone" ;;
    esac
    if [ -e /proc/cpuinfo ] && ! grep -qw avx /proc/cpuinfo; then
        fail "TensorFlow 1.13.1 needs a processor with AVX"
    fi
    case "$PWD" in
    *" "*) fail "Ray 0.6.6 never starts where there is a space in the path, as in $PWD" ;;
    esac
    for found in "$PYTHON37" "$HOME"/.pyenv/versions/3.7.*/bin/python; do
        if "$found" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 7))' 2>/dev/null; then
            echo "installing TensorFlow 1.13.1 and Ray 0.6.6 in original/.venv, with $found"
            "$found" -m venv --clear original/.venv
            run env PIP_USER=0 $python -m pip install --quiet -r original/requirements.txt
            touch original/.venv/ready
            return
        fi
    done
    fail "there is no Python 3.7: name one with PYTHON37=, or install it with pyenv or uv"
}

measure() {
    : >$log
    if [ ! -e "$DATA" ]; then
        run .venv/bin/python train_model.py --data "$DATA"
    fi
    if [ ! -e "$ORIGINAL_MODEL" ] || [ "$DATA" -nt "$ORIGINAL_MODEL" ]; then
        echo "training $ORIGINAL_MODEL on $DATA"
        run $python original/train_model.py --model "$ORIGINAL_MODEL.part" --data "$DATA"
        mv "$ORIGINAL_MODEL.part" "$ORIGINAL_MODEL"
    fi
    # A record must not be glued to a line that was cut off.
    if [ -n "$(tail -c 1 "$RESULTS" 2>/dev/null)" ]; then
        echo >>"$RESULTS"
    fi

    # Ray 0.6.6 listens on all interfaces. In namespaces of its own nothing reaches it, and nothing
    # outlives it.
    alone="unshare -rnpf --kill-child --mount-proc"
    if $alone ip link set lo up 2>/dev/null; then
        alone="$alone original/run.sh loopback"
        signal=KILL # which --kill-child passes on; unshare does not hear the others
    else
        alone=
        echo "This system gives no namespaces. While Ray 0.6.6 runs, four of its ports are open"
        echo "on all interfaces: two are Redis, which asks for a password, and two are the raylet,"
        echo "which does not."
    fi

    for pass in $(seq "$TRIALS"); do
        for rounds in $ROUNDS; do
            for variant in $(order "$pass"); do
                echo "pass $pass of $TRIALS, $rounds rounds, $variant"
                # multiprocessing+pin_once is bench_multiprocessing.py --pin-once.
                flag=$(expr "$variant" : '[^+]*+\(.*\)' | tr _ -)
                run $alone $python "original/bench_${variant%%+*}.py" ${flag:+"--$flag"} \
                    --rounds "$rounds" --model "$ORIGINAL_MODEL" --data "$DATA" --output "$RESULTS"
            done
        done
    done
    .venv/bin/python analyze.py --figure "$FIGURE" "$RESULTS"
}

# Print the variants in the order of a pass: 0 1 7 2 6 3 5 4 in the first, and in each further one
# the numbers are one higher, modulo 8. So in eight passes each variant follows each other one once
# (Williams 1949), and in any two passes none follows the same one twice.
order() {
    echo "$VARIANTS" | awk -v pass="$1" '{
        for (place = 0; place < NF; place++) {
            number = place % 2 ? (place + 1) / 2 : NF - place / 2
            print $((number + pass - 1) % NF + 1)
        }
    }'
}

loopback() {
    ip link set lo up
    exec "$@"
}

trap 'stop 130' INT
trap 'stop 143' TERM HUP
"$@"
