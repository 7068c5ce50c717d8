# Keeps one Windows host for a scenario: an overlay of a root file system with Wine, with processes of its own. windows.rs starts it.
#   unshare --mount --propagation private --pid --fork --kill-child -- bash wine.sh ROOT PROGRAMS HOST
# Inside, PROGRAMS is Z:\program, the temporary directory of this machine is D:\, and HOST, a directory in it, is E:\. The network is the
# one of this machine: the gateway is on its loopback.
#
# Each line of standard input cuts the power and boots the host again: the next program starts the automatic services. Each boot is a line
# of output. The host ends with the standard input.
set -euo pipefail
umask 022
. "$(dirname "$0")/wine_root.sh"
programs=$2 host=$3

overlay "$1"
root=/run/root
equip "$root" "$programs"
if [ -e "$programs/aopst.dll" ]; then
    cp "$programs"/*.dll "$root/root/.wine/drive_c/windows/system32/"
fi
mkdir -p "$root/temporary"
mount --rbind /tmp "$root/temporary"
ln -sfn /temporary "$root/root/.wine/dosdevices/d:"
ln -sfn "/temporary/${host#/tmp/}" "$root/root/.wine/dosdevices/e:"

# A program that runs until the pipe's writing end is closed keeps Wine's service manager running.
mkfifo /run/running
while :; do
    inside "$root" /usr/lib/wine/wine 'Z:\program\tool.exe' wait </run/running &
    exec 3>/run/running
    IFS= read -r _ || exit 0
    exec 3>&-
    inside "$root" /usr/lib/wine/wineserver -k
    inside "$root" /usr/lib/wine/wineserver -w
    wait
done
