# Runs one command in a root file system with Wine. wine.rs starts it in namespaces of its own; its mounts end with them.
#   unshare --mount --propagation private --pid --fork --kill-child --net -- bash wine.sh ROOT DIRECTORY overlay|writable COMMAND...
# DIRECTORY is /program inside. An overlay is discarded at the end.
set -euo pipefail
umask 022
. "$(dirname "$0")/../../tests/support/wine_root.sh"
root=$1 directory=$2 kind=$3
shift 3

ip link set lo up

if [ "$kind" = overlay ]; then
    overlay "$root"
    root=/run/root
fi
equip "$root" "$directory"
inside "$root" "$@"
