# For the scripts that run Wine in a root file system, in mount and PID namespaces of their own.

# overlay ROOT: mounts a copy of ROOT at /run/root, whose changes end with the namespace.
overlay() {
    mount -t tmpfs -o mode=755,size=3g tmpfs /run
    mkdir -p /run/upper /run/work /run/root
    mount -t overlay overlay -o "lowerdir=$1,upperdir=/run/upper,workdir=/run/work" /run/root
}

# equip ROOT DIRECTORY: mounts what programs need, and DIRECTORY as /program.
equip() {
    mount -t proc proc "$1/proc"
    local device
    for device in null zero full random urandom; do
        touch "$1/dev/$device"
        mount --bind "/dev/$device" "$1/dev/$device"
    done
    [ -e "$1/etc/hosts" ] || echo '127.0.0.1 localhost' >"$1/etc/hosts"
    mkdir -p "$1/program"
    mount --bind "$2" "$1/program"
}

# inside ROOT COMMAND...: runs a command there with an environment of its own.
inside() {
    local root=$1
    shift
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 WINEDEBUG=-all \
        WINEDLLOVERRIDES=mscoree,mshtml= "$@"
}
