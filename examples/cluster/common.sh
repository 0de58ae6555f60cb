# shellcheck shell=bash
# Sourced by the scripts of this folder.

GOES_ON=75 # exit status: stopped as asked before the work was done; the same command goes on
export GOES_ON

say() { echo "longrope ${0##*/}: $*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# need NAME MEANING: a variable without which nothing can start.
need() { [[ -n ${!1:-} ]] || die "$1 is not set; it must name $2"; }

# Exit status of a child, however often a signal interrupts the wait. Traps must set `interrupted`.
wait_for() {
  local status
  while :; do
    interrupted=
    wait "$1"
    status=$?
    [[ $interrupted ]] || return "$status"
  done
}
