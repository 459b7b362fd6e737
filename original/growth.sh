#!/bin/sh
# Measure what the article's stateless call takes and leaves behind, on both stacks:
#
#   original/growth.sh growth.jsonl
#
# Three runs of each variant, two at a time, each on a core of its own, which changes from run to
# run; then one run with a profile; at last, imported.jsonl beside it: calls that begin with an
# earlier graph. Needs the environments and models that `make` and `make original` have made.
# Takes about 25 minutes.
set -eu
output=$(realpath "$1")
cd "$(dirname "$0")"

then_() { # CORE FLAGS: on the stack of 2019
    core=$1
    shift
    taskset -c "$core" .venv/bin/python growth.py --output "$output" --calls 40 "$@"
}

now() { # CORE FLAGS: on the stack of today
    core=$1
    shift
    taskset -c "$core" ../.venv/bin/python growth.py --output "$output" \
        --model /tmp/model.keras "$@"
}

for cores in "0 1" "1 0" "0 1"; do
    one=${cores% *}
    other=${cores#* }
    then_ "$one" &
    then_ "$other" --fresh-session
    wait $!
    then_ "$one" --clear-session &
    now "$other" --clear-session
    wait $!
    now "$one" --parts &
    now "$other" --parts --without-autotuner
    wait $!
    now "$one" --collect &
    now "$other" --collect --without-autotuner
    wait $!
done
then_ 0 --profile 2,20,40

# A new process with the graph of 39 earlier calls: in its default graph, or in another one.
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
then_ 0 --calls 39 --output /dev/null --save-graph "$folder/graph"
output=$(dirname "$output")/imported.jsonl
for cores in "0 1" "1 0" "0 1"; do
    then_ "${cores% *}" --calls 3 --import-graph "$folder/graph" &
    then_ "${cores#* }" --calls 3 --import-apart "$folder/graph"
    wait $!
done
