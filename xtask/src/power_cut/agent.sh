#!/bin/bash
# Runs the commands that come over the second serial port, one at a time. A command is a line "NUMBER SCRIPT", its answer a line
# "= NUMBER CODE :STDOUT :STDERR"; the texts are base64. The first answer has the number 0: the machine is up.
exec <>/dev/ttyS1 >&0
stty raw -echo
cd /run || exit 1
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
echo '= 0 0 : :'
while read -r number script; do
    base64 -d <<<"$script" >machine-agent.sh
    bash machine-agent.sh >machine-agent.out 2>machine-agent.err </dev/null
    code=$?
    echo "= $number $code :$(base64 -w0 machine-agent.out) :$(base64 -w0 machine-agent.err)"
done
