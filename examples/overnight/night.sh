#!/bin/sh
# One night, begun or gone on with: what a scheduler may start again without thinking.
#
#   night.sh CONFIG.yaml RUN [--until 07:00 | --budget 8h]
#
# The time limit counts for a new run. A run that is gone on with keeps its own deadline, so a restart after it has
# passed ends with exit code 2 and not with another night. NIGHTPRESS names the command where it is not on PATH.
set -eu
if [ $# -lt 2 ]; then
    echo "usage: night.sh CONFIG.yaml RUN [--until TIME | --budget LENGTH]" >&2
    exit 2
fi
config=$1 run=$2
shift 2
if [ -f "$run/state.json" ]; then
    set -- --resume
fi
# exec: signals of the scheduler reach nightpress itself, which ends gracefully on SIGINT and SIGTERM.
exec "${NIGHTPRESS:-nightpress}" run "$config" --out "$run" "$@"
