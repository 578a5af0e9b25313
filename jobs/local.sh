#!/usr/bin/env bash
# Train on this machine, one process per role: jobs/local.sh RUN.toml [table.key=value ...] [--resume [CHECKPOINT | auto]] [--quiet]
# The number of ranks follows from the run file; the mpirun of the project's environment is used if there is one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
for bin in "${DBNET_BIN:-}" "$root/.venv/bin" "$root/.venv-openmpi/bin" "$(dirname "$(command -v dbnet || echo /none/dbnet)")"; do
    [[ -n $bin && -x $bin/dbnet ]] && break
done
[[ -x $bin/dbnet ]] || { echo "dbnet: not installed yet; run jobs/install first." >&2; exit 1; }
export PATH="$bin:$PATH"

plain=()
skip=
for word in "$@"; do
    case $word in
        --resume) skip=yes ;;
        --*) ;;
        *.h5 | auto) [[ $skip ]] || plain+=("$word") ;;
        *) plain+=("$word") ;;
    esac
done
ranks=$(dbnet plan --ranks "${plain[@]}")

options=()
if mpirun --version 2>&1 | grep -q "Open MPI"; then
    # More ranks than cores must give way to each other, and may not be pinned to the same one.
    options=(--bind-to none --oversubscribe)
    export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_osc=^ucx
    if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
fi
exec mpirun "${options[@]}" -n "$ranks" dbnet train "$@"
