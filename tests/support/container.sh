# Runs one disposable container from boot to end. container.rs starts it and explains the design.
#   unshare --mount --propagation private -- bash -c "$(cat container.sh)" container.sh systemd|bare NAME ROOTFS
# stdin: `reboot` (orderly) or `crash` (every process at once), each boots again with the same files; the end of stdin removes everything.
# stdout: `ready LEADER` after each boot, LEADER being the pid of the container's init; or `failed WHY`, then the script exits.
# The name is aops-test-OWNER-N: OWNER is the pid of the container's owner.
set -euo pipefail
umask 022
kind=$1 name=$2 rootfs=$3

v2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
v1=$(awk '$3 == "cgroup" && $4 ~ /name=systemd/ { print $2; exit }' /proc/mounts)
trees=(${v2:+"$v2"} ${v1:+"$v1"})
nspawn=

# Kills every process in a cgroup of ours, then removes the cgroup.
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
    # Init first: it may outlive nspawn and keep the container running. When it dies, the kernel kills all processes of the container.
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
    # The container's init is killed with nspawn, and nspawn with this shell, however it ends.
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

# Leftovers of a killed run: cgroups whose owner has exited.
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
# This mount namespace ends with its last process, and all files written here are dropped with it.
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
