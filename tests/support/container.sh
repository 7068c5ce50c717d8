# Keeps one throw-away container from its boot to its end; started by container.rs, which says why things are as they are.
#   unshare --mount --propagation private -- bash -c "$(cat container.sh)" container.sh systemd|bare NAME ROOTFS
# stdin: `reboot` (orderly) or `crash` (every process at once), each boots again on the same files; its end tears everything down.
# stdout: `ready LEADER` after each boot, LEADER being the container's first process; or `failed WHY`, then the end.
# The name is aops-test-OWNER-N: OWNER, a pid, is whose container it is.
set -euo pipefail
umask 022
kind=$1 name=$2 rootfs=$3

v2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
v1=$(awk '$3 == "cgroup" && $4 ~ /name=systemd/ { print $2; exit }' /proc/mounts)
trees=(${v2:+"$v2"} ${v1:+"$v1"})
nspawn=

# Ends every process in a cgroup of ours, then removes the cgroup.
remove_cgroup() {
    [ ! -e "$1/cgroup.kill" ] || echo 1 >"$1/cgroup.kill" || true
    for ((i = 0; i < 100; i++)); do
        find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [ -d "$1" ] || return 0
        sleep 0.05
    done
}

halt() {
    [ -n "$nspawn" ] || return 0
    # By itself: it may outlive nspawn, and with it the whole container. Its death is that of all its processes.
    first=$(child_of "$nspawn")
    [ -z "$first" ] || kill -KILL "$first" 2>/dev/null || true
    kill -KILL "$nspawn" 2>/dev/null || true
    wait "$nspawn" 2>/dev/null || true
    nspawn=
    for ((i = 0; i < 200; i++)); do
        [ -n "$first" ] && kill -0 "$first" 2>/dev/null || return 0
        sleep 0.05
    done
    fail "the container outlives its end"
}

tear_down() {
    trap - EXIT
    set +e
    halt
    for tree in "${trees[@]}"; do echo $$ >"$tree/cgroup.procs"; done
    for tree in "${trees[@]}"; do remove_cgroup "$tree/$name"; done
}

fail() {
    echo "failed $*: $(tail -n 5 /run/console 2>/dev/null | tr '\n\r' '  ')"
    exit 1
}

boot() {
    # The container's first process is killed with nspawn, and nspawn with this shell, however that ends.
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 setpriv --pdeathsig KILL -- systemd-nspawn --quiet --directory=/run/root --machine="$name" \
        --register=no --keep-unit --link-journal=no --resolv-conf=off --timezone=off --private-network "$@" \
        </dev/null >/run/console 2>&1 &
    nspawn=$!
    for ((i = 0; i < 600; i++)); do
        leader=$(child_of "$nspawn")
        [ -z "$leader" ] || ! is_up || return 0
        kill -0 "$nspawn" 2>/dev/null || fail "nspawn ended"
        sleep 0.05
    done
    fail "no boot in 30 s"
}

# The first child of a process, if it has one.
child_of() {
    pgrep -P "$1" | head -n 1 || true
}

is_up() {
    case $kind in
    systemd)
        [ -S "/proc/$leader/root/run/dbus/system_bus_socket" ] || return 1
        state=$(nsenter -t "$leader" -m -u -i -n -p -C timeout 30 systemctl is-system-running --wait 2>/dev/null) || true
        case $state in running | degraded) ;; *) fail "the system's state is ${state:-unknown}" ;; esac
        ;;
    bare) [ -n "$(child_of "$leader")" ] ;;
    esac
}

start() {
    case $kind in
    systemd) boot --console=read-only --boot ;;
    bare) boot --console=pipe --as-pid2 sleep infinity ;;
    esac
    echo "ready $leader"
}

# What a run left behind that was killed before it could clean up: cgroups whose owner is gone.
for tree in "${trees[@]}"; do
    for old in "$tree"/aops-test-*; do
        owner=${old##*/aops-test-} owner=${owner%%-*}
        [ ! -d "$old" ] || [ -d "/proc/$owner" ] || remove_cgroup "$old"
    done
done

for tree in "${trees[@]}"; do
    mkdir "$tree/$name"
    trap tear_down EXIT
    echo $$ >"$tree/$name/cgroup.procs"
done
# This mount namespace is ours and ends with its last process, and so does all that is written here.
mount -t tmpfs -o mode=755,size=3g tmpfs /run
mkdir -p /run/systemd /run/upper /run/work /run/root
mount -t overlay overlay -o "lowerdir=$rootfs,upperdir=/run/upper,workdir=/run/work" /run/root
[ "$kind" = systemd ] || rm -f /run/root/{usr/,}bin/systemctl /run/root/{usr/,}sbin/{init,telinit,runlevel,shutdown,reboot,halt,poweroff}

start
while read -r order; do
    case $order in
    reboot)
        kill -TERM "$nspawn"
        for ((i = 0; i < 1200; i++)); do
            kill -0 "$nspawn" 2>/dev/null || break
            sleep 0.05
        done
        halt
        start
        ;;
    crash)
        halt
        start
        ;;
    *) fail "there is no order $order" ;;
    esac
done
