#!/bin/sh
# demo.sh - mount a binder device in a temporary folder and let the three programs talk over it.
set -eu
examples=$(cd "$(dirname "$0")" && pwd)
mount=$(dirname "$examples")/mount.py
folder=$(mktemp -d)
mkdir "$folder/programs" "$folder/binderfs"

clean_up() {
    status=$?
    trap - EXIT INT TERM
    if mountpoint -q "$folder/binderfs"; then
        "$mount" -u "$folder/binderfs" || status=1
    fi
    # Only what was made here, and never through a mount that is still there.
    rm -rf "$folder/programs"
    rmdir "$folder/binderfs" "$folder"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for program in service_manager service client; do
    ${CC:-cc} -O1 -Wall -o "$folder/programs/$program" "$examples/$program.c"
done

echo "== mount.py $folder/binderfs"
"$mount" "$folder/binderfs"

# The programs wait for each other: should one of them misbehave, this ends them all.
timeout 10 "$examples/run.sh" "$folder/binderfs/binder" "$folder/programs"

printf '\n== mount.py -u %s\n' "$folder/binderfs"
