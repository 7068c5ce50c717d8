#!/bin/bash
# Runs in the virtual machine as `hosts VERB …`. A host is a set of namespaces: its own processes, network, cgroups and mounts, with the
# drive `host-NAME` mounted at /srv, on which its home is, and a gateway of its own in memory. So many hosts can have the same home path.
#   set-up               mounts the drive `tools`
#   open NAME ORDER      starts a host whose gateway orders what is in the file ORDER; fails if the drive cannot be mounted
#   start NAME           starts the home
#   control NAME VERB …  what an operator at the host does
#   enter NAME COMMAND … runs a command in the host
#   order NAME ORDER     the gateway orders something else
#   left NAME …          what is on their drives, line by line: host, kind, name, value
#   status NAME …        for each host one line: its name and, if its manager answers, the reply
#   facts NAME           what is on its drive, and what its gateway and `control status` show, line by line as `left`
#   logs NAME            the ends of its logs
#   close NAME           kills its processes, which unmounts the drive
#   together             runs the verbs that stdin has, one a line, at the same time; fails if one fails
# Each process that it starts costs some hundredths of a second of an emulated processor, and the machine has many hosts.
set -eu
here=/tools
state=/run/hosts
home=/srv/aops
gateway=/tmp/gateway
address=127.0.0.1:8888

# The drive with that serial number; it may not be there yet.
drive() {
    local block file serial
    for ((i = 0; i < 300; i++)); do
        for block in /sys/block/*; do
            for file in "$block"/serial "$block"/device/serial; do
                [ -f "$file" ] || continue
                read -r serial <"$file" || true
                [ "$serial" != "$1" ] || { echo "/dev/${block##*/}" && return; }
            done
        done
        sleep 0.2
    done
    echo "there is no drive $1 in $(echo /sys/block/*)" >&2
    return 1
}

# The host's first process, and its files as seen from outside.
first() {
    echo "$(<"$state/$1.first")"
}

files() {
    echo "/proc/$(<"$state/$1.first")/root"
}

enter() {
    local host=$1
    shift
    (
        echo "$BASHPID" >"/sys/fs/cgroup/host-$host/cgroup.procs"
        exec nsenter -t "$(<"$state/$host.first")" -m -p -n -C -- env -i HOME=/root PATH=/usr/sbin:/usr/bin "$@"
    )
}

control() {
    local host=$1
    shift
    enter "$host" "$home/bin/aops" control --home "$home" "$@"
}

# The state files must be whole at any time. An executable ends with its version.
left() {
    perl -e '
        for my $host (@ARGV) {
            open my $first, "<", "'"$state"'/$host.first" or die;
            chomp(my $pid = <$first>);
            my $home = "/proc/$pid/root'"$home"'";
            my ($file, $content);
            my $show = sub { print join(" ", $host, @_), "\n" };
            my $named = sub { substr $_[0], 1 + length $home };
            if (open $file, "<", "$home/bin/aops") {
                seek $file, -5, 2;
                read $file, $content, 5;
                $show->("version", "bin/aops", $content);
            }
            $show->("link", $named->($_), readlink $_) for grep { -l $_ } glob "$home/bin/* $home/agents/*/current";
            $show->("complete", $named->($_)) for glob "$home/agents/*/*/.complete";
            for my $path (glob "$home/state/*.json $home/etc/agent-id") {
                open $file, "<", $path or next;
                local $/;
                ($content = <$file> // "") =~ tr/\n/ /;
                $show->("content", $named->($path), $content);
            }
        }
    ' "$@"
}

case $1 in
set-up)
    mkdir -p "$here" "$state"
    mount -o ro "$(drive tools)" "$here"
    ;;
open)
    host=$2 order=$3
    device=$(drive "host-$host")
    mkdir -p "/sys/fs/cgroup/host-$host"
    : >"$state/$host.out"
    (
        echo "$BASHPID" >"/sys/fs/cgroup/host-$host/cgroup.procs"
        exec setsid unshare --mount --pid --net --cgroup --fork --mount-proc --kill-child \
            bash "$0" first "$device" "$order"
    ) </dev/null >"$state/$host.out" 2>&1 &
    for ((i = 0; i < 1000; i++)); do
        case $(<"$state/$host.out") in *'listening on '*)
            read -r first _ <"/proc/$!/task/$!/children" || true
            echo "$first" >"$state/$host.first"
            exit 0
            ;;
        esac
        [ -d "/proc/$!" ] || break
        sleep 0.3
    done
    cat "$state/$host.out" >&2
    dmesg | tail -n 20 >&2
    exit 1
    ;;
first)
    # Without this directory, programs see that no systemd runs here.
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /tmp
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ip link set lo up
    # The drives are copies of one, and XFS refuses to mount a second file system with the same UUID.
    case $(blkid -o value -s TYPE "$2") in
    xfs) mount -o discard,nouuid "$2" /srv ;;
    *) mount -o discard "$2" /srv ;;
    esac
    mkdir -p "$gateway/depot"
    cp -a "$here"/gateway/{keys,tls,state} "$gateway"
    mount --bind "$here/gateway/depot" "$gateway/depot"
    cp "$here/$3" "$gateway/fleet.toml"
    "$here/aops-gateway" gateway run --dir "$gateway" --listen "$address" 2>"$gateway/log" &
    # As the first process it waits for all whose parents have ended.
    while :; do
        sleep 1000000 &
        wait $!
    done
    ;;
start)
    # What comes of it is seen in the status.
    control "$2" start >>"$state/$2.out" 2>&1 || echo "control start exited with $?" >>"$state/$2.out"
    ;;
control)
    shift
    control "$@"
    ;;
enter)
    shift
    enter "$@"
    ;;
order)
    enter "$2" sh -c "cp $here/$3 $gateway/fleet.new && mv $gateway/fleet.new $gateway/fleet.toml"
    ;;
left)
    shift
    left "$@"
    ;;
status)
    shift
    sockets=()
    for host; do sockets+=("$host" "$(files "$host")$home/run/spm.sock"); done
    perl -MSocket -e '
        while (my ($host, $path) = splice @ARGV, 0, 2) {
            my $reply = eval {
                local $SIG{ALRM} = sub { die };
                alarm 10;
                socket my $socket, PF_UNIX, SOCK_STREAM, 0 or die;
                connect $socket, sockaddr_un($path) or die;
                syswrite $socket, "{\"verb\":\"status\"}\n" or die;
                scalar <$socket>;
            } // "\n";
            alarm 0;
            print "$host $reply";
        }
    ' "${sockets[@]}"
    ;;
facts)
    left "$2"
    cd "$(files "$2")$home"
    sha256sum bin/aops agents/changed/current/SUMS | while read -r digest file; do echo "$2 digest $file $digest"; done
    (cd agents/changed/current && sha256sum --quiet -c SUMS) && echo "$2 sums agents/changed/current right"
    shown=$(enter "$2" sh -c "$here/aops-gateway gateway status --dir $gateway --json; echo END; $home/bin/aops control --home $home status --json")
    shown=${shown//$'\n'/ }
    echo "$2 shown gateway ${shown%%END*}"
    echo "$2 shown control ${shown#*END}"
    ;;
logs)
    cat "$state/$2.out" || true
    enter "$2" bash -c '
        cd '"$home"'
        find . -path ./staging -prune -o -type f -size -1M -printf "%p %s\n" | sort | head -n 200
        for file in log/* log/agents/* state/*.json run/*.json '"$gateway"'/log; do
            [ ! -f "$file" ] || { echo "--- $file" && tail -n 40 "$file"; }
        done
        ps -eo pid,ppid,stat,etime,args
    '
    ;;
close)
    first=$(first "$2")
    kill -KILL "$first"
    for ((i = 0; i < 600; i++)); do
        if [ ! -d "/proc/$first" ] && find "/sys/fs/cgroup/host-$2" -depth -type d -exec rmdir {} + 2>/dev/null; then
            exit 0
        fi
        sleep 0.1
    done
    echo "the processes of host $2 do not end" >&2
    exit 1
    ;;
together)
    running=() failed=0
    while read -r -a verb; do
        "$0" "${verb[@]}" </dev/null &
        running+=($!)
    done
    for pid in "${running[@]}"; do wait "$pid" || failed=1; done
    exit $failed
    ;;
*)
    echo "there is no verb $1" >&2
    exit 2
    ;;
esac
