#!/usr/bin/env bash
# Sees to it that a Docker engine answers: on Debian, root gets one installed and started; anyone else is told what to do.
set -euo pipefail

answers() { docker info > /dev/null 2>&1; }

if answers; then exit; fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
    echo "No Docker engine answers 'docker info': install Docker or start it (and see that your user may use it), then run this again." >&2
    exit 1
fi
if ! command -v dockerd > /dev/null; then
    echo "Installing docker.io from Debian" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io > /dev/null
fi
log=/var/log/dockerd.log
if [[ -d /run/systemd/system ]]; then
    log="journalctl --unit docker"
    systemctl start docker
else
    setsid dockerd > "$log" 2>&1 < /dev/null &
fi
for ((tenths = 0; tenths < 600; tenths++)); do
    if answers; then exit; fi
    sleep 0.1
done
echo "dockerd was started but does not answer after a minute: see $log." >&2
exit 1
