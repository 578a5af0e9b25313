#!/usr/bin/env bash
# Train on this machine, one process per role: jobs/local.sh RUN.toml [table.key=value ...] [--resume [auto|CHECKPOINT]] [--quiet]
# The number of ranks follows from the configuration. Ctrl-C writes a checkpoint and stops; --resume auto goes on from the newest one.
DBNET_STARTED="$0" exec "$(dirname "${BASH_SOURCE[0]}")/launch" "$@"
