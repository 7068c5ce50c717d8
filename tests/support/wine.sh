# Keeps one Windows host for a scenario: an overlay of a root file system with Wine, with processes of its own. windows.rs starts it.
#   unshare --mount --propagation private --pid --fork --kill-child -- bash wine.sh ROOT PROGRAMS HOST
# Inside, PROGRAMS is Z:\program, the temporary directory of this machine is D:\, and HOST, a directory in it, is E:\. The network is the
# one of this machine: the gateway is on its loopback.
#
# Each line of standard input cuts the power and boots the host again: the next program starts the automatic services. Each boot is a line
# of output. The host ends with the standard input.
set -euo pipefail
umask 022
root=$1 programs=$2 host=$3

mount -t tmpfs -o mode=755,size=3g tmpfs /run
mkdir -p /run/upper /run/work /run/root
mount -t overlay overlay -o "lowerdir=$root,upperdir=/run/upper,workdir=/run/work" /run/root
root=/run/root
mount -t proc proc "$root/proc"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -p "$root/program" "$root/temporary"
mount --bind "$programs" "$root/program"
mount --rbind /tmp "$root/temporary"
ln -sfn /temporary "$root/root/.wine/dosdevices/d:"
ln -sfn "/temporary/${host#/tmp/}" "$root/root/.wine/dosdevices/e:"

inside() {
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 WINEDEBUG=-all WINEDLLOVERRIDES=mscoree,mshtml= "$@"
}

# A program that runs until the pipe's writing end is closed keeps Wine's service manager running.
mkfifo /run/running
while :; do
    inside /usr/lib/wine/wine 'Z:\program\tool.exe' wait </run/running &
    exec 3>/run/running
    IFS= read -r _ || exit 0
    exec 3>&-
    inside /usr/lib/wine/wineserver -k
    inside /usr/lib/wine/wineserver -w
    wait
done
