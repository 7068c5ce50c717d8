#!/bin/bash
# Writes "upgrades: MANAGER SUB-AGENT" to the console when a phase begins: how far the upgrades are, from the files of the home alone. Only bash's
# own commands are used, so it costs the emulated processor little.
home=/opt/aops
agent=changed
mkfifo /run/progress.pipe
exec 9<>/run/progress.pipe
shopt -s nullglob

contains() {
    local content=
    { read -r -d '' content <"$1"; } 2>/dev/null
    [[ $content =~ $2 ]]
}

# The watchdog's process has children only during a trial: heartbeats, and the proof of the new watchdog.
is_proving() {
    local pids=() words=()
    { mapfile -t pids </sys/fs/cgroup/system.slice/aops-spa.service/cgroup.procs; } 2>/dev/null
    local pid
    for pid in "${pids[@]}"; do
        { mapfile -d '' words <"/proc/$pid/cmdline"; } 2>/dev/null
        [[ ${words[*]} == *--prove* ]] && return 0
    done
    return 1
}

is_fetching() {
    local partial=("$home/cache/$1"-*.part)
    ((${#partial[@]}))
}

# The trees of two downloads at the same time cannot be distinguished.
staging() {
    local trees=("$home"/staging/*)
    if ((${#trees[@]})); then step=unpacking; else step=fetching; fi
}

last= before=
while :; do
    # The pause between two looks.
    read -r -t 0.1 -u 9
    if contains $home/state/upgrade.json '"phase": *"([a-zA-Z]+)'; then
        manager=${BASH_REMATCH[1]}
        [ "$manager" = trial ] && is_proving && manager=proof
    elif is_fetching aops-spm; then
        staging
        manager=$step
    else
        manager=idle
    fi
    pid=
    contains $home/run/agents/$agent.json '"pid": *([0-9]+)' && pid=${BASH_REMATCH[1]}
    if contains $home/state/releases.json '"probation": *\{'; then
        changed=probation
        [ "$pid" = "$before" ] && changed=stopping
        [ "$pid" ] || changed=starting
    else
        before=$pid changed=idle
        is_fetching $agent && staging && changed=$step
    fi
    if [ "$manager $changed" != "$last" ]; then
        last="$manager $changed"
        echo "upgrades: $last" >/dev/ttyS0
    fi
done
