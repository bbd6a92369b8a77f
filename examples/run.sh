#!/bin/sh
# run.sh - run the three programs against each other, in one fixed order.
#
#   run.sh [DEVICE] [DIRECTORY]
#
# DEVICE is a binder device (default /dev/binderfs/binder): a mounted binderfs-fuse, or the kernel's own. DIRECTORY holds
# the compiled programs (default: where this script is). Plain sh, so that it also runs where there is only busybox.
#
# Each program writes into a pipe of its own, and this script reads from one at a time up to a line that it knows must
# come. So the order of the output does not depend on the scheduler.
set -eu
device=${1:-/dev/binderfs/binder}
programs=${2:-$(dirname "$0")}
pipes=$(mktemp -d)
manager='' service='' client=''

stop() {
    status=$?
    trap - EXIT INT TERM
    for pid in $client $service $manager; do
        kill "$pid" 2>/dev/null || true
    done
    rm -rf "$pipes"
    exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

title() {
    printf '\n%s\n' "$*"
}

# until_line DESCRIPTOR TEXT: pass a program's lines on, up to the first one that holds TEXT.
until_line() {
    while IFS= read -r line <&"$1"; do
        printf '%s\n' "$line"
        case $line in *"$2"*) return ;; esac
    done
    echo "$0: a program ended before it said \"$2\"" >&2
    exit 1
}

# Every pipe is opened for reading and writing here, which does not wait for the other end; the programs are given only
# the descriptor that is theirs, or they would keep each other's pipes open.
mkfifo "$pipes/manager" "$pipes/service" "$pipes/client" "$pipes/go"

title "== A service manager becomes the context manager"
"$programs/service_manager" "$device" >"$pipes/manager" &
manager=$!
exec 3<"$pipes/manager"
until_line 3 'BC_ENTER_LOOPER'

title "== A service registers with it"
"$programs/service" "$device" >"$pipes/service" 3<&- &
service=$!
exec 4<"$pipes/service"
until_line 4 'BC_TRANSACTION to handle 0'
until_line 3 'BR_TRANSACTION_COMPLETE'
until_line 4 'BC_ENTER_LOOPER'

title "== A client finds the service, calls it, and is called back"
"$programs/client" -w "$device" >"$pipes/client" <"$pipes/go" 3<&- 4<&- &
client=$!
exec 5<"$pipes/client" 6>"$pipes/go"
until_line 5 'BC_TRANSACTION to handle 0'
until_line 3 'BR_TRANSACTION_COMPLETE'
until_line 5 'BC_TRANSACTION to handle 1'
until_line 4 'BC_TRANSACTION to handle 1'
until_line 5 'is called back'

title "== binder_logs/state now, in the middle of the call"
cat "$(dirname "$device")/binder_logs/state"

title "== The client answers the callback, the service replies"
echo >&6
until_line 5 'BR_TRANSACTION_COMPLETE'
until_line 4 'BC_REPLY'
until_line 5 'waits for the service to die'
until_line 4 'BR_TRANSACTION_COMPLETE'

title "== The service is killed"
kill -9 "$service"
wait "$service" 2>/dev/null || true
until_line 5 'BC_RELEASE'
until_line 3 'BC_DEAD_BINDER_DONE'
wait "$client"
client='' service=''
