# Runs one command in a root file system with Wine. wine.rs starts it in namespaces of its own; its mounts end with them.
#   unshare --mount --propagation private --pid --fork --kill-child --net -- bash wine.sh ROOT DIRECTORY overlay|writable COMMAND...
# DIRECTORY is /program inside. An overlay is discarded at the end.
set -euo pipefail
umask 022
root=$1 directory=$2 kind=$3
shift 3

ip link set lo up

if [ "$kind" = overlay ]; then
    mount -t tmpfs -o mode=755,size=3g tmpfs /run
    mkdir -p /run/upper /run/work /run/root
    mount -t overlay overlay -o "lowerdir=$root,upperdir=/run/upper,workdir=/run/work" /run/root
    root=/run/root
fi
mount -t proc proc "$root/proc"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -p "$root/program"
mount --bind "$directory" "$root/program"
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    WINEDEBUG=-all WINEDLLOVERRIDES=mscoree,mshtml= "$@"
