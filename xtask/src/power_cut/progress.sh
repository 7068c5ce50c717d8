#!/bin/bash
# Writes "upgrades: MANAGER SUB-AGENT" to the console when a phase begins: how far the upgrades are, from the files of the home alone. Only bash's
# own commands are used, so it costs the emulated processor little.
home=/opt/aops
agent=changed
# Created again and again: a file that is newer was written in the last two seconds.
mark=/run/progress.mark
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

# Whether a package is fetched or unpacked; a cut may leave one that is removed only at the next download.
download() {
    local package trees=("$home"/staging/*)
    for package in "$home/cache/$1"-*.part; do
        [[ $2 == @(fetching|unpacking) ]] && ((${#trees[@]})) && step=unpacking && return 0
        [ "$package" -nt $mark ] && step=fetching && return 0
    done
    return 1
}

looks=0 last= before= manager=idle changed=idle
while :; do
    # The pause between two looks.
    read -r -t 0.1 -u 9
    ((looks++ % 15)) || : >$mark
    if contains $home/state/upgrade.json '"phase": *"([a-zA-Z]+)'; then
        manager=${BASH_REMATCH[1]}
        [ "$manager" = trial ] && is_proving && manager=proof
    elif download aops-spm "$manager"; then
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
        before=$pid
        if download $agent "$changed"; then changed=$step; else changed=idle; fi
    fi
    if [ "$manager $changed" != "$last" ]; then
        last="$manager $changed"
        echo "upgrades: $last" >/dev/ttyS0
    fi
done
